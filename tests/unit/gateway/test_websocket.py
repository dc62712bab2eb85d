"""A websocket to a kernel, before it opens."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from tornado.httputil import HTTPHeaders

from gateway_slurm.budget import Budget
from gateway_slurm.gateway.channels.websocket import SlurmWebsocketConnection
from gateway_slurm.gateway.http_errors import PlainHTTPError


class Frontends:
    """Counts websockets, as the manager's does; its sessions take all."""

    def __init__(self, websockets):
        self.websockets = websockets

    def refusal(self, _kernel_id, _session_id):
        return ""

    def open_session(self, _kernel_id, _session_id):
        return SimpleNamespace(attach=lambda _sink, _since: None, detach=lambda _sink: None)


def websocket_of(frontends, owner):
    """A websocket that a page opens to a kernel of this user's."""
    made = SlurmWebsocketConnection.__new__(SlurmWebsocketConnection)
    manager = SimpleNamespace(
        budget=Budget(0, 0),
        owner_of=lambda _kernel_id: owner,
        frontends=frontends,
        max_websockets_per_user=2,
        max_request_size=1000,
        notify_connect=lambda _kernel_id: None,
        notify_disconnect=lambda _kernel_id: None,
    )
    handler = SimpleNamespace(
        get_query_argument=lambda _name, default: default,
        request=SimpleNamespace(headers=HTTPHeaders()),
        get_websocket_protocol=lambda: None,
        set_nodelay=lambda _on: None,
    )
    values = {"parent": SimpleNamespace(), "websocket_handler": handler, "kernel_id": "k"}
    made.__class__ = type(
        "Made", (SlurmWebsocketConnection,), {**values, "multi_kernel_manager": manager, "session_id": "s"}
    )
    return made


async def test_a_user_has_only_so_many_websockets():
    """One more is refused with what to do, until another is closed; the one user of a server may have any number."""
    frontends = Frontends(Counter())
    opened = [websocket_of(frontends, "alice") for _ in range(2)]
    for one in opened:
        await one.prepare()
        await one.connect()
    with pytest.raises(PlainHTTPError, match="2 websockets to your kernels are open") as refused:
        await websocket_of(frontends, "alice").prepare()
    assert refused.value.status_code == 429
    await websocket_of(frontends, "bob").prepare()
    opened[0].disconnect()
    opened[0].disconnect()
    await websocket_of(frontends, "alice").prepare()
    opened[1].disconnect()
    assert frontends.websockets == {}
    frontends.websockets[""] = 1000
    await websocket_of(frontends, "").prepare()
