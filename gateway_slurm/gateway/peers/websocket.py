"""A websocket whose kernel another gateway has: what the one side sends goes on to the other.

Nothing is kept here: a message is read from one side when the one before it has left to the other, so a slow
reader slows its sender down, as it would without us, and not this gateway's memory up.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import Any, Final

from tornado import web
from tornado.httpclient import HTTPClientError
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, WebSocketHandler

from gateway_slurm.gateway.auth.user import GatewayUser
from gateway_slurm.gateway.peers.client import PeerUnreachable
from gateway_slurm.gateway.peers.forward import (
    MOVED_STATUSES,
    POLL_SECONDS,
    TRY_AGAIN,
    WAIT_SECONDS,
    Forwarder,
    is_forwarded,
)
from gateway_slurm.gateway.peers.peers import KERNELS, SERVICE_RESTART, Peer, Peers

MAX_REASON_BYTES: Final = 120
"""Bytes; RFC 6455 has room for 123 in a close frame."""
# A close frame may hold these; others stand for what no frame said (RFC 6455 section 7.4.1).
_NOT_SENT: Final = frozenset({1004, 1005, 1006, 1015})


class PeerChannels:
    """What KernelWebsocketHandler calls a connection, to a kernel of ``peer``'s.

    It owns ``connection``, the websocket to the peer; ``disconnect`` closes it.
    """

    def __init__(
        self,
        handler: WebSocketHandler,
        connection: WebSocketClientConnection,
        *,
        kernel_id: str,
        peer: Peer,
        peers: Peers,
        log: logging.Logger,
    ) -> None:
        self.kernel_id, self.peer = kernel_id, peer
        self._handler, self._connection, self._peers, self._log = handler, connection, peers, log
        self._pump: asyncio.Task[None] | None = None
        self._subprotocol = connection.selected_subprotocol or ""
        self._closed = False

    @property
    def kernel_ws_protocol(self) -> str:
        """The one that the kernel's gateway chose is the one for both halves."""
        return self._subprotocol

    async def connect(self) -> None:
        """The client's websocket is open."""
        self._handler.set_nodelay(True)
        self._peers.watch(self)
        self._pump = asyncio.ensure_future(self._to_client())

    async def handle_incoming_message(self, message: str | bytes) -> None:
        """From the client; the next one is read when this has left."""
        try:
            await self._connection.write_message(message, binary=isinstance(message, bytes))
        except (WebSocketClosedError, StreamClosedError):
            # Whatever reads from the peer sees that too, and says why.
            self._log.debug("kernel %s: a message came for a websocket that has just closed", self.kernel_id)

    async def _to_client(self) -> None:
        """Until the peer has closed; what it sends to a client that is gone is read and dropped."""
        while (message := await self._connection.read_message()) is not None:
            if self._closed:
                continue
            try:
                await self._handler.write_message(message, binary=isinstance(message, bytes))
            except (WebSocketClosedError, StreamClosedError):
                self._close_peer(None)
        code, reason = self._connection.close_code, self._connection.close_reason
        self.end(SERVICE_RESTART if code is None or code in _NOT_SENT else code, reason or "")

    def end(self, code: int, reason: str) -> None:
        """Close both halves."""
        short = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
        self._handler.close(code, short)
        self._close_peer(None)

    def disconnect(self) -> None:
        """The client's websocket is closed: so is the other half, with the client's words."""
        self._peers.unwatch(self)
        code = self._handler.close_code
        self._close_peer(None if code in _NOT_SENT else code)

    def _close_peer(self, code: int | None) -> None:
        if not self._closed:
            self._closed = True
            self._connection.close(code)


class ForwardsWebsocket(WebSocketHandler):
    """A kernel's websocket handler that also takes clients whose kernel another gateway has."""

    connection: Any
    log: logging.Logger

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        """From the client; what is returned is waited for before the next message is read."""
        waiting: Awaitable[None] | None = self.connection.handle_incoming_message(message)
        return waiting

    async def forward_websocket(self, kernel_id: str) -> bool:
        """Whether the kernel is a peer's; then the websocket was joined to it, until one of the two closed.

        Raises HTTPError with the peer's status where it refuses, and 503 where it does not answer.
        """
        if is_forwarded(self) or not isinstance(self.current_user, GatewayUser):
            return False
        found = await self._peer_websocket(kernel_id)
        if found is None:
            return False
        peer, connection = found
        forwarder: Forwarder = self.settings["forwarder"]
        channels = PeerChannels(self, connection, kernel_id=kernel_id, peer=peer, peers=forwarder.peers, log=self.log)
        self.kernel_id, self.connection = kernel_id, channels
        try:
            await WebSocketHandler.get(self, kernel_id=kernel_id)
        finally:
            channels.disconnect()
        return True

    async def _peer_websocket(self, kernel_id: str) -> tuple[Peer, WebSocketClientConnection] | None:
        """The peer's half; None where this gateway has the kernel, or nobody."""
        forwarder: Forwarder = self.settings["forwarder"]
        passed, deadline = forwarder.request_of(self), time.monotonic() + WAIT_SECONDS
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
                return peer, await forwarder.client.websocket(peer, passed, subprotocols_of(self))
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


def subprotocols_of(handler: Any) -> list[str]:
    """Those that the client offers."""
    offered = handler.request.headers.get("Sec-WebSocket-Protocol", "")
    return [name for part in offered.split(",") if (name := part.strip())]
