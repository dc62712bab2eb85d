"""A websocket whose kernel another gateway has: the messages of each side are forwarded to the other.

The gateway keeps no messages. It reads one from a side when it has sent the one before to the other side. A slow
reader therefore slows its sender down, as it would without this gateway, and costs no memory here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

from tornado import web
from tornado.httpclient import HTTPClientError
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, WebSocketHandler

from gateway_slurm.gateway import oversized
from gateway_slurm.gateway.auth.user import GatewayUser
from gateway_slurm.gateway.peers.client import PeerUnreachable
from gateway_slurm.gateway.peers.directory import KERNELS, Peer
from gateway_slurm.gateway.peers.forward import (
    MOVED_STATUSES,
    POLL_SECONDS,
    TRY_AGAIN,
    WAIT_SECONDS,
    Forwarder,
    is_forwarded,
)
from gateway_slurm.gateway.peers.peers import SERVICE_RESTART, Peers
from gateway_slurm.gateway.tornado_compat import limit_messages

MAX_REASON_BYTES: Final = 120
"""Of a close frame's reason, which has room for 123 bytes (RFC 6455 section 5.5)."""
# Codes that must not be sent in a close frame (RFC 6455 section 7.4.1).
_NOT_SENT: Final = frozenset({1004, 1005, 1006, 1015})


@dataclass(eq=False, kw_only=True)
class PeerChannels:
    """The connection of a KernelWebsocketHandler to a kernel of ``peer``.

    It owns ``connection``, the websocket to the peer; ``disconnect`` closes it.
    """

    handler: WebSocketHandler
    connection: WebSocketClientConnection
    kernel_id: str
    peer: Peer
    peers: Peers
    log: logging.Logger

    def __post_init__(self) -> None:
        # What the kernel's gateway chose, and both websockets use. jupyter_server's handler reads it.
        self.kernel_ws_protocol = self.connection.selected_subprotocol or ""
        self._closed = False

    async def connect(self) -> None:
        """The client's websocket is open: forward the peer's messages to it."""
        self.handler.set_nodelay(True)
        self.peers.watch(self.peer, self.end)
        self._forwarding = asyncio.ensure_future(self._to_client())

    async def handle_incoming_message(self, message: str | bytes) -> None:
        """Forward a client's message. The next one is read when this one is sent."""
        try:
            await self.connection.write_message(message, binary=isinstance(message, bytes))
        except (WebSocketClosedError, StreamClosedError):
            # _to_client sees that too, and closes the client's websocket.
            self.log.debug("kernel %s: a client's message came after the peer had closed", self.kernel_id)

    def refuse(self, limit: int, beginning: bytes, end: bytes, size: int, refusal: str) -> None:
        """Answer a client's message of more than ``limit`` bytes, or one that is refused: the peer does not get it."""
        reason = refusal or oversized.reason_of(size, limit)
        self.log.warning("kernel %s: a client's message is refused: %s", self.kernel_id, reason)
        frames = oversized.answer(self.kernel_ws_protocol, beginning, end, reason)
        if not frames:
            self.end(oversized.MESSAGE_TOO_BIG, reason)
        for frame in frames:
            # A closed websocket is seen by ``_to_client``.
            with contextlib.suppress(WebSocketClosedError):
                self.handler.write_message(frame, binary=isinstance(frame, bytes))

    async def _to_client(self) -> None:
        """Forward the peer's messages until the peer closes. Those for a client that is gone are dropped."""
        while (message := await self.connection.read_message()) is not None:
            if self._closed:
                continue
            try:
                await self.handler.write_message(message, binary=isinstance(message, bytes))
            except (WebSocketClosedError, StreamClosedError):
                self._close_peer(None)
        code, reason = self.connection.close_code, self.connection.close_reason
        self.end(SERVICE_RESTART if code is None or code in _NOT_SENT else code, reason or "")

    def end(self, code: int, reason: str) -> None:
        """Close both websockets."""
        short = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
        self.handler.close(code, short)
        self._close_peer(None)

    def disconnect(self) -> None:
        """The client's websocket is closed: close the peer's with the client's code."""
        self.peers.unwatch(self.end)
        code = self.handler.close_code
        self._close_peer(None if code in _NOT_SENT else code)

    def _close_peer(self, code: int | None) -> None:
        if not self._closed:
            self._closed = True
            self.connection.close(code)


class ForwardsWebsocket(WebSocketHandler):
    """A kernel's websocket handler that forwards to the gateway that has the kernel."""

    connection: Any
    log: logging.Logger

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        """A client's message. Tornado awaits the result before it reads the next message."""
        return cast("Awaitable[None] | None", self.connection.handle_incoming_message(message))

    async def forward_websocket(self, kernel_id: str) -> bool:
        """Forward the websocket until one side closes; False, at once, for a kernel that no peer has.

        Raises HTTPError with the peer's status if the peer refuses, and 503 if it does not answer.
        """
        if is_forwarded(self) or not isinstance(self.current_user, GatewayUser):
            return False
        found = await self._peer_websocket(kernel_id)
        if found is None:
            return False
        peer, connection = found
        limit: int = self.settings["kernel_manager"].max_request_size
        holding = partial(self.settings["kernel_manager"].budget.holding, self.current_user.username, "incoming")
        forwarder: Forwarder = self.settings["forwarder"]
        channels = PeerChannels(
            handler=self, connection=connection, kernel_id=kernel_id, peer=peer, peers=forwarder.peers, log=self.log
        )
        self.kernel_id, self.connection = kernel_id, channels
        limit_messages(self, limit, partial(channels.refuse, limit), holding)
        try:
            await WebSocketHandler.get(self, kernel_id=kernel_id)
        finally:
            channels.disconnect()
        return True

    async def _peer_websocket(self, kernel_id: str) -> tuple[Peer, WebSocketClientConnection] | None:
        """The websocket to the peer that has the kernel; None if no peer has it."""
        forwarder: Forwarder = self.settings["forwarder"]
        request, deadline = forwarder.request_of(self), time.monotonic() + WAIT_SECONDS
        offered = self.request.headers.get("Sec-WebSocket-Protocol", "")
        subprotocols = [name for part in offered.split(",") if (name := part.strip())]
        asked: Peer | None = None
        refused: HTTPClientError | None = None
        while True:
            here, peer = await forwarder.find_holder(self, KERNELS, kernel_id, fresh=asked is not None)
            if here:
                return None
            if refused is not None and (peer is None or peer == asked):
                raise web.HTTPError(refused.code, refused.message)
            if peer is None:
                return None
            try:
                return peer, await forwarder.client.websocket(peer, request, subprotocols)
            except PeerUnreachable as error:
                forwarder.peers.unreachable(peer, str(error))
                if time.monotonic() > deadline:
                    raise web.HTTPError(503, TRY_AGAIN) from error
                await asyncio.sleep(POLL_SECONDS)
            except HTTPClientError as error:
                if error.code not in MOVED_STATUSES or refused is not None:
                    raise web.HTTPError(error.code, error.message) from error
                refused = error
            asked = peer
