"""How a session continues where an earlier server stopped: the output that it missed, and the replies to its cells.

The kernel's launcher keeps the output meanwhile. The session first subscribes again and then reads what was kept; a
message that comes both ways counts once, by its id.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.acks import OutputAcks, Position
from gateway_slurm.gateway.channels.cells import Cells
from gateway_slurm.gateway.channels.queue import QUEUE_LIMIT, QueuedMessage
from gateway_slurm.link.output import KeptOutput

# Seconds between a cell's end and a reply made here, in which the kernel's own reply may come.
REPLY_GRACE = 1.0
# Seconds that checking kept messages may hold the event loop before other tasks get their turn.
LOOP_SLICE = 0.005


@dataclass
class Missed:
    """The messages that a session has not had."""

    kept: list[tuple[list[bytes], str]] = field(default_factory=list)
    """Parts and id of each message."""
    live: list[tuple[str, list[bytes]]] = field(default_factory=list)
    """Channel and parts of each message since the session subscribed again."""
    dropped: int = 0

    @property
    def dropped_text(self) -> str:
        return f"gateway_slurm: {self.dropped} messages of output were dropped while the server was away\n"


class Replay:
    """One session's position in its kernel's output, and its cells. ``end`` ends it.

    Without ``acks`` there is nothing to acknowledge and nothing to read: the kernel has no launcher of ours.
    ``read_kept`` returns what the launcher has kept. ``position`` is where an earlier server knew the session to be.
    ``may_be_ours`` gets a request's header and returns whether this session may have made it.
    """

    def __init__(
        self,
        acks: OutputAcks | None = None,
        read_kept: Callable[[], Awaitable[KeptOutput]] | None = None,
        *,
        position: Position | None = None,
        may_be_ours: Callable[[dict[str, Any]], bool] = lambda _header: True,
    ) -> None:
        self._acks, self._read_kept, self._restored = acks, read_kept, position
        self.cells = Cells()
        self.position = Position()
        self._may_be_ours = may_be_ours
        # Messages that came before the kept ones were read; None while messages are delivered at once.
        self._live: deque[tuple[str, list[bytes]]] | None = None
        self._live_size = self._live_dropped = 0
        self._session_id = ""
        self._probe = ""
        self._probe_answered = asyncio.Event()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        # The marks of cells with a reply in the queue to the frontend.
        self._replying: dict[str, str] = {}

    def begin(self, session_id: str, send_reply: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        """Begin, once the kernel exists, at the position from an earlier server if there is one.

        ``send_reply`` gets the header of a cell's request and the content of the reply to it.
        """
        self._session_id, self._send_reply = session_id, send_reply
        if self._acks is None:
            return
        if self._restored is not None:
            self.position, self._live = self._restored, deque()
            self.cells.restore(self._restored.cells)
        self._acks.join(session_id, self._restored)
        self.acknowledge_cells()

    def end(self) -> None:
        """The session is over: nothing waits for it."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._acks is not None and self._session_id:
            self._acks.leave(self._session_id)

    # -- messages on their way to the frontend ------------------------------------------------------

    def id_of(self, parts: list[bytes]) -> str:
        """The message's id; empty where acknowledgements do not need it."""
        return messages.id_of(parts) if self._acks is not None else ""

    def on_iopub(self, parts: list[bytes], msg_id: str, *, kept: bool = False) -> None:
        """Note a message on iopub that is queued."""
        if self._acks is not None:
            self._acks.published(msg_id)
        changed, ended = self.cells.on_iopub(parts, self._may_be_ours if kept else None)
        if changed:
            self.acknowledge_cells()
        if ended:
            self._reply_later(ended)

    def on_reply(self, cell: str) -> bool:
        """Note the kernel's reply to a cell. Return False if the frontend has one already, which was made here."""
        if mark := self.cells.mark(cell):
            self._replying[cell] = mark
        is_first = self.cells.on_reply(cell)
        if timer := self._timers.pop(cell, None):
            timer.cancel()
        return is_first

    def on_sent(self, item: QueuedMessage) -> None:
        """Note that a message was sent to the frontend, or dropped."""
        if self._acks is None:
            return
        if item.cell and self._replying.pop(item.cell, None) is not None:
            self.acknowledge_cells()
        if item.msg_id:
            self.position = Position(item.msg_id)
            self._acks.sent(self._session_id, item.msg_id)

    def acknowledge_cells(self) -> None:
        """Have the session's cells in the next acknowledgement."""
        if self._acks is not None and self._session_id:
            self._acks.set_cells(self._session_id, {**self._replying, **self.cells.marks()})

    def subscription_lost(self) -> None:
        """Hold back what a new subscription brings, until the messages kept meanwhile have been read."""
        if self._acks is not None and self._live is None:
            self._live = deque()

    def shell_lost(self) -> None:
        """Requests and replies may have been lost with the connection: ``find_lost_cells`` finds such requests."""
        self.cells.doubt_replies()
        self.finish()

    # -- the output that was missed -----------------------------------------------------------------

    @property
    def is_behind(self) -> bool:
        """Whether kept messages must be read before others are delivered."""
        return self._live is not None

    def hold_back(self, channel: str, parts: list[bytes]) -> bool:
        """Hold a message back if earlier ones are still to come; return whether it was held back."""
        if self._live is None:
            return False
        self._live.append((channel, parts))
        self._live_size += sum(map(len, parts))
        while self._live_size > QUEUE_LIMIT:
            _channel, oldest = self._live.popleft()
            self._live_size -= sum(map(len, oldest))
            self._live_dropped += 1
        return True

    async def missed_messages(
        self, queued: set[str], sign: Callable[[list[bytes]], bytes], log: logging.Logger
    ) -> Missed:
        """Read what was kept, without the ids in ``queued`` and what the frontend has, and what came meanwhile.

        ``sign`` returns the signature of a message's parts by the kernel's key.
        """
        missed = Missed()
        try:
            if self._read_kept is not None:
                await self._select(await self._read_kept(), queued, sign, missed, log)
        except GatewaySlurmError as error:
            log.warning("the output that a kernel's launcher kept cannot be read: %s", error)
        live, self._live = self._live or deque(), None
        missed.dropped += self._live_dropped
        self._live_size = self._live_dropped = 0
        seen = queued | {msg_id for _parts, msg_id in missed.kept}
        missed.live = [
            (channel, parts) for channel, parts in live if channel != "iopub" or messages.id_of(parts) not in seen
        ]
        return missed

    async def _select(
        self,
        kept: KeptOutput,
        queued: set[str],
        sign: Callable[[list[bytes]], bytes],
        missed: Missed,
        log: logging.Logger,
    ) -> None:
        """Put into ``missed`` the kept messages after the session's position that the kernel has signed."""
        loop, signed, forged = asyncio.get_running_loop(), [], 0
        until = loop.time() + LOOP_SLICE
        for frames in kept.messages:
            signature, parts = messages.signed_parts(frames)
            if len(parts) < 4 or not hmac.compare_digest(sign(parts[:4]), signature):
                forged += 1
                continue
            signed.append((parts, messages.id_of(parts)))
            if loop.time() > until:
                await asyncio.sleep(0)
                until = loop.time() + LOOP_SLICE
        if forged:
            log.warning("%d kept messages were not signed by their kernel, and are not delivered", forged)
        ids = [msg_id for _parts, msg_id in signed]
        if self._acks is not None:
            self._acks.add_kept(self._session_id, ids)
        # Without its position among them the session gets all: a message may come twice, but none is lost.
        begin = ids.index(self.position.msg_id) + 1 if self.position.msg_id in ids else 0
        # Some of the dropped ones may have been sent already: the frontend shows a count that may be too high.
        missed.dropped = kept.dropped
        missed.kept = [(parts, msg_id) for parts, msg_id in signed[begin:] if msg_id not in queued]

    def finish(self) -> None:
        """All missed messages are queued: cells that have ended, and have no reply, get one."""
        for cell in self.cells.ended():
            self._reply_later(cell)

    # -- replies made here --------------------------------------------------------------------------

    def _reply_later(self, cell: str) -> None:
        if cell not in self._timers:
            self._timers[cell] = asyncio.get_running_loop().call_later(REPLY_GRACE, self._reply, cell)

    def _reply(self, cell: str) -> None:
        self._timers.pop(cell, None)
        if made := self.cells.make_reply(cell):
            self.acknowledge_cells()
            self._send_reply(*made)

    def on_probe_reply(self, msg_id: str) -> None:
        """Note the kernel's reply, on shell, to a request of the server's own."""
        if msg_id == self._probe:
            self._probe_answered.set()

    async def find_lost_cells(self, probe: Callable[[], str], refuse: Callable[[list[dict[str, Any]]], None]) -> None:
        """Find cells that never reached the kernel, and call ``refuse`` with the headers of their requests.

        ``probe`` sends a request on shell and returns its id. The kernel takes requests on shell in turn: if it replies
        to two probes and has begun none of the cells meanwhile, no cell is before them.
        """
        quiet = 0
        while self._acks is not None and (unconfirmed := self.cells.unconfirmed()):
            self._probe_answered.clear()
            self._probe = probe()
            await self._probe_answered.wait()
            await asyncio.sleep(REPLY_GRACE)  # iopub is another connection, and may be later
            quiet = quiet + 1 if self.cells.unconfirmed() == unconfirmed else 0
            if quiet == 2:
                refuse(self.cells.take(unconfirmed))
                self.acknowledge_cells()
