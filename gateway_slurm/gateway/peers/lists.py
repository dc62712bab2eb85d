"""Lists of a user's kernels, sessions and allocations at all gateways; the store stands in for a silent gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, Final

from tornado.web import RequestHandler

from gateway_slurm.gateway.auth.user import can_see
from gateway_slurm.gateway.peers.client import ForwardedRequest, PeerUnreachable
from gateway_slurm.gateway.peers.directory import ALLOCATIONS, KERNELS, DirectoryUnavailable, Peer
from gateway_slurm.gateway.peers.forward import Forwarder, is_forwarded

LIST_SECONDS: Final = 2.0
"""How long a list waits for the other gateways: a frontend asks for its lists every few seconds."""

Models = list[dict[str, Any]]


async def with_peers(handler: RequestHandler, collection: str, local: Models) -> Models:
    """``local``, and the other gateways' models for this user. Of two models with one id, the local one counts.

    A forwarded request gets ``local`` only. For a gateway that does not answer within LIST_SECONDS the store's records
    are used, so that no client takes its kernels for gone.
    """
    forwarder: Forwarder = handler.settings["forwarder"]
    if is_forwarded(handler):
        return local
    others = await forwarder.peers.others()
    if not others:
        return local
    request = forwarder.request_of(handler).get(f"api/{collection}")
    answers = await asyncio.gather(*(_list_of(forwarder, peer, request) for peer in others))
    silent = [peer.server_id for peer, answer in zip(others, answers, strict=True) if answer is None]
    models = [*local, *(model for answer in answers if answer is not None for model in answer)]
    if silent and collection != ALLOCATIONS:
        # Without an answer of the store there are none: it was logged when the gateways were looked up.
        with contextlib.suppress(DirectoryUnavailable):
            records = await forwarder.peers.directory.records_of(silent)
            entries = records.kernels if collection == KERNELS else records.sessions
            models += [model for owner, maker, model in entries if can_see(handler.current_user, owner, maker)]
    return _merged(models, "jobid" if collection == ALLOCATIONS else "id")


async def _list_of(forwarder: Forwarder, peer: Peer, request: ForwardedRequest) -> Models | None:
    """The peer's models; None if the peer does not answer."""
    if not peer.can_be_asked:
        return None
    try:
        answer = await forwarder.client.send(peer, request, timeout=LIST_SECONDS)
        models = json.loads(answer.body) if answer.code == 200 else None
    except PeerUnreachable as error:
        forwarder.peers.unreachable(peer, str(error))
        return None
    except (ValueError, RecursionError):
        models = None
    if not isinstance(models, list):
        forwarder.peers.unreachable(peer, f"it answered {answer.code} to a question for a list")
        return None
    forwarder.peers.reachable(peer)
    return [model for model in models if isinstance(model, dict)]


def _merged(models: Models, key: str) -> Models:
    """One model for each id. A job that several gateways use gets the kernels of all."""
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        known = found.setdefault(str(model.get(key)), model)
        if known is not model and "kernel_ids" in model:
            ids = sorted({*known.get("kernel_ids", ()), *model["kernel_ids"]})
            found[str(model.get(key))] = {**known, "kernel_ids": ids}
    return list(found.values())
