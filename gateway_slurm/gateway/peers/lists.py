"""Lists of what a user has at all gateways: each is asked, and what one does not tell in time is on record."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

from tornado.web import RequestHandler

from gateway_slurm.gateway.auth.user import can_see
from gateway_slurm.gateway.peers.client import ForwardedRequest, PeerUnreachable
from gateway_slurm.gateway.peers.forward import Forwarder, is_forwarded
from gateway_slurm.gateway.peers.peers import KERNELS, SESSIONS, DirectoryUnavailable, Peer, PeerRecords

LIST_SECONDS: Final = 2.0
"""For so long the others are waited for: a frontend asks for its lists every few seconds."""

Models = list[dict[str, Any]]


async def with_peers(handler: RequestHandler, collection: str, own: Models) -> Models:
    """``own`` and what the other gateways have for this user; what is here counts where two have it.

    A request that comes from another gateway gets what is here. What a gateway does not tell within
    LIST_SECONDS is as the store has it, so that no client takes it for gone.
    """
    forwarder: Forwarder = handler.settings["forwarder"]
    if is_forwarded(handler):
        return own
    others = await forwarder.peers.others()
    if not others:
        return own
    passed = forwarder.request_of(handler).at(f"api/{collection}")
    answers = await asyncio.gather(*(_list_of(forwarder, peer, passed) for peer in others))
    silent = [peer.server_id for peer, answer in zip(others, answers, strict=True) if answer is None]
    models = [*own, *(model for answer in answers if answer is not None for model in answer)]
    if silent:
        models += _visible(await _kept(forwarder, silent), collection, handler.current_user)
    return list(_merged(models, "jobid" if collection not in (KERNELS, SESSIONS) else "id"))


async def _list_of(forwarder: Forwarder, peer: Peer, passed: ForwardedRequest) -> Models | None:
    """What the peer has; None where it does not say."""
    if not peer.can_be_asked:
        return None
    try:
        answer = await forwarder.client.send(peer, passed, timeout=LIST_SECONDS)
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


async def _kept(forwarder: Forwarder, silent: list[str]) -> PeerRecords:
    try:
        return await forwarder.peers.directory.records_of(silent)
    except DirectoryUnavailable:
        return PeerRecords()  # has been told when it was asked for the gateways


def _visible(kept: PeerRecords, collection: str, user: Any) -> Models:
    entries = {KERNELS: kept.kernels, SESSIONS: kept.sessions}.get(collection, ())
    return [model for owner, maker, model in entries if can_see(user, owner, maker)]


def _merged(models: Models, key: str) -> Models:
    """One model for each id; of a job that several gateways use the kernels of all."""
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        known = found.setdefault(str(model.get(key)), model)
        if known is not model and "kernel_ids" in model:
            ids = sorted({*known.get("kernel_ids", ()), *model["kernel_ids"]})
            found[str(model.get(key))] = {**known, "kernel_ids": ids}
    return list(found.values())
