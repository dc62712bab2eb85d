"""A frontend's websocket, which opens at once, also while its kernel waits in Slurm's queue.

The class is ``ServerApp.kernel_websocket_connection_class`` in the gateway and in a Jupyter server.
"""

from __future__ import annotations

import asyncio
import re
from functools import partial
from typing import Any

from jupyter_server.services.kernels.connection.base import BaseKernelWebsocketConnection
from tornado.websocket import WebSocketClosedError

from gateway_slurm.gateway import oversized
from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.session import Session
from gateway_slurm.gateway.channels.signatures import is_large
from gateway_slurm.gateway.http_errors import PlainHTTPError
from gateway_slurm.gateway.tornado_compat import limit_messages

# RFC 6455, section 7.4.1.
POLICY_VIOLATION = 1008
GOING_AWAY = 1001
# JupyterLab opens no other websocket after 1000 and 1001.
INTERNAL_ERROR = 1011
# Bytes of a close frame's reason, which has room for 123 (RFC 6455, section 5.5).
MAX_REASON_BYTES = 120


class SlurmWebsocketConnection(BaseKernelWebsocketConnection):
    """Attaches a websocket to its session, which outlives the websocket."""

    _session: Session | None = None
    _open = False
    _user = ""
    _since: int | None = None

    @property
    def protocol(self) -> str:
        return self.websocket_handler.selected_subprotocol or ""

    @property
    def reads_model(self) -> bool:
        """JupyterLab's client, which alone speaks this protocol, does; through a Jupyter server it does not."""
        return self.protocol == messages.V1

    async def prepare(self) -> None:
        """Called before the websocket opens. Refuse one to a dead kernel, so that JupyterLab shows the reason.

        Raises HTTPError 429 for one websocket too many of its user, 410 if the frontend will read the kernel's model
        then, and has all that was meant for it, and 400 for a ``since`` that is no number.
        """
        since = self.websocket_handler.get_query_argument("since", None)
        if since is not None:
            if not re.fullmatch(r"[0-9]{1,18}", since):
                raise PlainHTTPError(400, "since is not the number of a message: digits only")
            self._since = int(since)
        offered = self.websocket_handler.request.headers.get("Sec-WebSocket-Protocol", "").split(",")
        if messages.V1 in map(str.strip, offered) and self.kernel_ws_protocol in (None, messages.V1):
            reason = self.multi_kernel_manager.frontends.refusal(self.kernel_id, self.session_id)
            if reason:
                raise PlainHTTPError(410, f"the kernel is dead: {reason}", brief="the kernel is dead")
        limit = self.multi_kernel_manager.max_request_size
        manager = self.multi_kernel_manager
        self._user = manager.owner_of(self.kernel_id)
        most, count = manager.max_websockets_per_user, manager.frontends.websockets[self._user]
        if self._user and 0 < most <= count:
            raise PlainHTTPError(
                429,
                f"{count} websockets to your kernels are open, and {most} is the limit "
                "(SlurmMappingKernelManager.max_websockets_per_user): close pages that you do not use",
            )
        holding = partial(manager.budget.holding, self._user, "incoming")
        limit_messages(self.websocket_handler, limit, partial(self._on_oversized, limit), holding)
        # Tornado reads the next message when what this returns is done; Jupyter server's own method returns nothing.
        self.websocket_handler.on_message = self.handle_incoming_message  # type: ignore[method-assign,assignment]

    async def connect(self) -> None:
        # Nagle's algorithm and delayed ACKs together cost 40 ms for each small message.
        self.websocket_handler.set_nodelay(True)
        self._open = True
        self.multi_kernel_manager.frontends.websockets[self._user] += 1
        self.multi_kernel_manager.notify_connect(self.kernel_id)
        self._session = self.multi_kernel_manager.frontends.open_session(self.kernel_id, self.session_id)
        self._session.attach(self, self._since)

    def disconnect(self) -> None:  # type: ignore[override] # Jupyter server's own is no coroutine either
        if not self._open:
            return
        self._open = False
        websockets = self.multi_kernel_manager.frontends.websockets
        websockets[self._user] -= 1
        if not websockets[self._user]:
            del websockets[self._user]
        self.multi_kernel_manager.notify_disconnect(self.kernel_id)
        if self._session is not None:
            self._session.detach(self)

    async def handle_incoming_message(self, incoming_msg: str | bytes) -> None:  # type: ignore[override]
        """Take a message in turns of the kernel's owner."""
        if self._session is None or not self._open:
            return
        turns, owner = self.multi_kernel_manager.turns, self._user
        try:
            steps = messages.decoding(self.protocol, incoming_msg)
            channel, parts = await turns.run_steps(owner, steps)
            if is_large(parts):
                parts = await turns.run_steps(owner, self._session.signing(parts))
            allowed = self.multi_kernel_manager.allowed_message_types
            if allowed and messages.header_of(parts).get("msg_type") not in allowed:
                self.log.warning(
                    "kernel %s: a message was ignored: its type is not in allowed_message_types", self.kernel_id
                )
                return
            await turns.run(owner, self._session.from_client, channel, parts)
        except messages.MessageError as error:
            self.log.warning("kernel %s: the server closes a websocket: %s", self.kernel_id, error)
            self._close(POLICY_VIOLATION, str(error))

    def _on_oversized(self, limit: int, beginning: bytes, end: bytes, size: int, refusal: str) -> None:
        """The frontend has sent a message of more than ``limit`` bytes: its cell fails, and the websocket stays.

        The same for one that is refused for another reason.
        """
        reason = refusal or oversized.reason_of(size, limit)
        self.log.warning("kernel %s: a frontend's message is refused: %s", self.kernel_id, reason)
        frames = oversized.answer(self.protocol, beginning, end, reason)
        if not frames:
            self._close(oversized.MESSAGE_TOO_BIG, reason)
        for frame in frames:
            self.send(frame)

    # -- ``session.Sink`` -------------------------------------------------------------------------

    def send(self, frame: bytes | str) -> asyncio.Future[None] | None:
        try:
            written = self.websocket_handler.write_message(frame, binary=isinstance(frame, bytes))
        except WebSocketClosedError:
            return None
        written.add_done_callback(_retrieve_error)
        return written

    def end(self, reason: str) -> None:
        self.log.debug("kernel %s: a websocket ends: %s", self.kernel_id, reason)
        self._close(GOING_AWAY, reason)

    def end_dead(self, reason: str) -> None:
        self._close(INTERNAL_ERROR, reason)

    def refuse(self, reason: str) -> None:
        self.log.warning("kernel %s: the server closes a websocket: %s", self.kernel_id, reason)
        self._close(POLICY_VIOLATION, reason)

    def _close(self, code: int, reason: str) -> None:
        self.websocket_handler.close(code, reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore"))

    @classmethod
    async def close_all(cls) -> None:
        """Jupyter server calls it when it stops. The kernel manager closes the channels, and these the websockets."""


def _retrieve_error(written: asyncio.Future[Any]) -> None:
    """Retrieve a write's error, which asyncio would log: a closed websocket cannot write."""
    if not written.cancelled():
        written.exception()
