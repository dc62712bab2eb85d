"""How far one session is with one kernel, and how it goes on where an earlier server ended.

What the kernel said meanwhile is kept by its launcher. The session subscribes anew first and asks for that
then: what it gets by both ways counts once, by the message's id.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.acks import Delivery, Position
from gateway_slurm.gateway.channels.queue import QUEUE_LIMIT, Item

MOST = 10_000
# How far a cell is: the kernel was asked; it has begun, or failed, with the count ("+3", "!3"); one that is over
# has its status and count, as in "ok:3".
ASKED, BEGUN, FAILED = "-", "+", "!"
# Told of on iopub under the cell's request.
_TOLD = (b"status", b"execute_input", b"error")


@dataclass(slots=True)
class Cell:
    """One execute_request that the kernel has, as far as is known."""

    header: dict[str, Any]
    begun: bool = False
    ended: bool = False
    count: int | None = None
    error: dict[str, Any] | None = None
    let_go: bool = False
    """Whether it ended without having run, since a cell before it failed."""
    missed: bool = False
    """Whether its reply may have been lost."""


class Cells:
    """The session's cells, from their requests to their replies."""

    def __init__(self) -> None:
        self._cells: dict[str, Cell] = {}
        # Those that were answered here: a reply that comes nevertheless is one too many.
        self._made: dict[str, None] = {}
        self._error_seen = False

    def __bool__(self) -> bool:
        return bool(self._cells)

    def __contains__(self, msg_id: str) -> bool:
        return msg_id in self._cells

    def marks(self) -> dict[str, str]:
        """Every cell without an answer, and how far it is."""
        return {msg_id: self._mark(cell) for msg_id, cell in self._cells.items()}

    def mark(self, msg_id: str) -> str:
        """How far this cell is; nothing for one that is not known."""
        cell = self._cells.get(msg_id)
        return self._mark(cell) if cell is not None else ""

    def _mark(self, cell: Cell) -> str:
        count = "" if cell.count is None else str(cell.count)
        if cell.ended:
            return f"{self._reply(cell)['status']}:{count}"
        if not cell.begun:
            return ASKED
        return (BEGUN if cell.error is None else FAILED) + count

    def ended(self) -> Iterator[str]:
        """Those that are over, and whose reply may have been lost."""
        return (msg_id for msg_id, cell in self._cells.items() if cell.ended and cell.missed)

    def unheard(self) -> set[str]:
        """Those that may never have reached the kernel."""
        return {msg_id for msg_id, cell in self._cells.items() if cell.missed and not cell.begun}

    def asked(self, header: dict[str, Any]) -> bool:
        """A request is on its way to the kernel; whether it is a cell's."""
        if header.get("msg_type") != "execute_request" or len(self._cells) >= MOST:
            return False
        self._cells[str(header.get("msg_id"))] = Cell(header)
        return True

    def remembered(self, marks: Mapping[str, str]) -> None:
        """Cells that a server before this one passed on, and how far they were."""
        for msg_id, mark in marks.items():
            header = {"msg_id": msg_id, "msg_type": "execute_request"}
            cell = self._cells[msg_id] = Cell(header, begun=mark != ASKED, missed=True)
            status, colon, count = mark.partition(":") if ":" in mark else (mark[:1], "", mark[1:])
            cell.ended, cell.count = bool(colon), int(count) if count.isdecimal() else None
            if status in ("error", FAILED):
                # Its words were delivered, by iopub.
                cell.error = {"ename": "", "evalue": "", "traceback": []}
                self._error_seen = True
            cell.let_go = status == "aborted"

    def is_answered(self, msg_id: str) -> bool:
        """A reply came. Returns False for one too many: it was made here already."""
        self._cells.pop(msg_id, None)
        return msg_id not in self._made

    def heard(self, parts: list[bytes], is_ours: Callable[[dict[str, Any]], bool] | None = None) -> tuple[bool, str]:
        """iopub told this. Returns whether a cell is further, and the one that is over and may have lost its reply.

        With ``is_ours`` also a cell counts that is not known yet, where it says so of the request's header.
        """
        if not parts or not (self._cells or is_ours) or not any(word in parts[0] for word in _TOLD):
            return False, ""
        parent = messages.parent_header_of(parts)
        msg_id = str(parent.get("msg_id", ""))
        cell = self._cells.get(msg_id)
        if cell is None and is_ours and parent.get("msg_type") == "execute_request" and is_ours(parent):
            cell = self._cells[msg_id] = Cell(parent, missed=True)
        if cell is None:
            return False, ""
        if len(cell.header) < len(parent):
            cell.header = parent
        before = self._mark(cell)
        self._note(cell, messages.header_of(parts).get("msg_type"), messages.content_of(parts))
        return before != self._mark(cell), msg_id if cell.ended and cell.missed else ""

    def _note(self, cell: Cell, msg_type: object, content: dict[str, Any]) -> None:
        cell.begun = True
        if msg_type == "execute_input":
            count = content.get("execution_count")
            cell.count = count if isinstance(count, int) else None
        elif msg_type == "error":
            cell.error = {name: content.get(name) for name in ("ename", "evalue", "traceback")}
            self._error_seen = True
        elif msg_type == "status" and content.get("execution_state") == "idle":
            cell.ended = True
            cell.let_go = cell.count is None and cell.error is None and self._error_seen

    def answer(self, msg_id: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The request's header and its reply's content, as iopub has told them; None for one that is answered."""
        cell = self._cells.pop(msg_id, None)
        if cell is None:
            return None
        self._made[msg_id] = None
        while len(self._made) > MOST:
            self._made.pop(next(iter(self._made)))
        return cell.header, self._reply(cell)

    def _reply(self, cell: Cell) -> dict[str, Any]:
        if cell.error is not None:
            return {"status": "error", "execution_count": cell.count, **cell.error}
        if cell.let_go:
            return {"status": "aborted", "execution_count": None}
        return {"status": "ok", "execution_count": cell.count, "payload": [], "user_expressions": {}}

    def take_all(self) -> list[tuple[str, dict[str, Any]]]:
        """All of them, ids and headers, which are then nobody's any more."""
        taken = [(msg_id, cell.header) for msg_id, cell in self._cells.items()]
        self._cells.clear()
        return taken

    def take(self, msg_ids: set[str]) -> list[dict[str, Any]]:
        """The headers of these, which are then nobody's any more."""
        return [self._cells.pop(msg_id).header for msg_id in list(self._cells) if msg_id in msg_ids]


# -- How far one session is with one kernel, and how it goes on where an earlier server ended. --


# Seconds for which the kernel's own reply is waited for after the cell's end, where it may have been lost.
REPLY_GRACE = 1.0
# Seconds for which a loop is busy with what was kept before all else has its turn.
TURN = 0.005


class Kept(Protocol):
    """What a launcher has of a kernel's output."""

    @property
    def messages(self) -> list[list[bytes]]:
        """ZMQ's frames of each message, in the kernel's order."""

    @property
    def dropped(self) -> int:
        """How many messages before those were too much to keep."""

    @property
    def positions(self) -> dict[str, str]:
        """How far each session was, as it was acknowledged last."""


@dataclass
class Missed:
    """What a session has not had."""

    kept: list[tuple[list[bytes], str]] = field(default_factory=list)
    """Parts and id of each message."""
    live: list[tuple[str, list[bytes]]] = field(default_factory=list)
    """What came since the session subscribed anew, by channel."""
    dropped: int = 0

    @property
    def words(self) -> str:
        return f"gateway_slurm: {self.dropped} messages of output were dropped while the server was away\n"


class CatchUp:
    """One session's place in its kernel's output, and its cells. ``end`` gives it up.

    Without a ``delivery`` nothing is acknowledged and nothing is caught up with: the kernel has no launcher of ours.
    ``is_ours`` tells from a request's header whether this session may have made it.
    """

    def __init__(
        self,
        delivery: Delivery | None = None,
        kept: Callable[[], Awaitable[Kept]] | None = None,
        *,
        position: Position | None = None,
        is_ours: Callable[[dict[str, Any]], bool] = lambda _header: True,
    ) -> None:
        self._delivery, self._kept, self._restored = delivery, kept, position
        self.cells = Cells()
        self.position = Position()
        self._is_ours = is_ours
        # What came before it is known what was kept; None while messages are passed on at once.
        self._live: deque[tuple[str, list[bytes]]] | None = None
        self._live_size = self._live_dropped = 0
        self._session_id = ""
        self._answered = asyncio.Event()
        self._asked = ""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        # Replies that have not left to the frontend, by their cells, and what they said.
        self._replying: dict[str, str] = {}

    def begin(self, session_id: str, answer: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
        """The session's kernel is there; ``answer`` gets the header of a cell's request, and its reply's content.

        Where an earlier server knew the session it goes on from there.
        """
        self._session_id, self._make_reply = session_id, answer
        if self._delivery is None:
            return
        if self._restored is not None:
            self.position, self._live = self._restored, deque()
            self.cells.remembered(self._restored.cells)
        self._delivery.join(session_id, self._restored)
        self.told()

    def end(self) -> None:
        """The session is over."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._delivery is not None and self._session_id:
            self._delivery.leave(self._session_id)

    # -- what goes by -----------------------------------------------------------------------------

    def id_of(self, parts: list[bytes]) -> str:
        """The message's id, where it is worth knowing."""
        return messages.id_of(parts) if self._delivery is not None else ""

    def heard(self, parts: list[bytes], msg_id: str, *, kept: bool = False) -> None:
        """A message of iopub's goes into the queue."""
        if self._delivery is not None:
            self._delivery.published(msg_id)
        changed, ended = self.cells.heard(parts, self._is_ours if kept else None)
        if changed:
            self.told()
        if ended and ended not in self._timers:
            self._answer_later(ended)

    def answered(self, cell: str) -> bool:
        """The kernel's reply to a cell goes into the queue; False for one that was made already."""
        mark = self.cells.mark(cell)
        if mark:
            self._replying[cell] = mark
        wanted = self.cells.is_answered(cell)
        timer = self._timers.pop(cell, None)
        if timer is not None:
            timer.cancel()
        return wanted

    def left(self, item: Item) -> None:
        """The frontend has it, or it was dropped."""
        if self._delivery is None:
            return
        if item.cell and self._replying.pop(item.cell, None) is not None:
            self.told()
        if item.msg_id:
            self.position = Position(item.msg_id)
            self._delivery.left(self._session_id, item.msg_id)

    def told(self) -> None:
        """The session's cells are not those that they were."""
        if self._delivery is not None and self._session_id:
            self._delivery.runs(self._session_id, {**self._replying, **self.cells.marks()})

    # -- a gap --------------------------------------------------------------------------------------

    @property
    def is_behind(self) -> bool:
        """Whether it is to be looked for what was kept."""
        return self._live is not None

    def waits(self, channel: str, parts: list[bytes]) -> bool:
        """Whether a message of the kernel's has to wait for those before it."""
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
        """What was kept, without what is ``queued`` or the frontend has, and what came meanwhile."""
        missed = Missed()
        kept = await self._read(log)
        if kept is not None:
            await self._sort(kept, queued, sign, missed, log)
        live, self._live = self._live or deque(), None
        missed.dropped += self._live_dropped
        self._live_size = self._live_dropped = 0
        seen = queued | {msg_id for _parts, msg_id in missed.kept}
        missed.live = [
            (channel, parts) for channel, parts in live if channel != "iopub" or messages.id_of(parts) not in seen
        ]
        return missed

    async def _read(self, log: logging.Logger) -> Kept | None:
        try:
            return await self._kept() if self._kept is not None else None
        except GatewaySlurmError as error:
            log.warning("what a kernel said meanwhile cannot be read: %s", error)
            return None

    async def _sort(
        self,
        kept: Kept,
        queued: set[str],
        sign: Callable[[list[bytes]], bytes],
        missed: Missed,
        log: logging.Logger,
    ) -> None:
        """Pick from what was kept; what is not signed by the kernel is left out."""
        loop, found, forged = asyncio.get_running_loop(), [], 0
        until = loop.time() + TURN
        for frames in kept.messages:
            signature, parts = messages.signed_parts(frames)
            if len(parts) < 4 or not hmac.compare_digest(sign(parts[:4]), signature):
                forged += 1
                continue
            found.append((parts, messages.id_of(parts)))
            if loop.time() > until:
                await asyncio.sleep(0)
                until = loop.time() + TURN
        if forged:
            log.warning("%d kept messages were not signed by their kernel, and were left out", forged)
        ids = [msg_id for _parts, msg_id in found]
        if self._delivery is not None:
            self._delivery.kept(self._session_id, ids)
        begin = ids.index(self.position.msg_id) + 1 if self.position.msg_id in ids else 0
        # Also where it may have been another session's: better said once too often.
        missed.dropped = kept.dropped
        missed.kept = [(parts, msg_id) for parts, msg_id in found[begin:] if msg_id not in queued]

    def caught_up(self) -> None:
        """All that was missed is queued: cells that are over, and had no reply, get one."""
        for cell in list(self.cells.ended()):
            if cell not in self._timers:
                self._answer_later(cell)

    # -- answers of ours ------------------------------------------------------------------------------

    def _answer_later(self, cell: str) -> None:
        self._timers[cell] = asyncio.get_running_loop().call_later(REPLY_GRACE, self._answer, cell)

    def _answer(self, cell: str) -> None:
        self._timers.pop(cell, None)
        made = self.cells.answer(cell)
        if made is not None:
            self.told()
            self._make_reply(*made)

    def heard_answer(self, msg_id: str) -> None:
        """The kernel answered a request of ours on shell."""
        if msg_id == self._asked:
            self._answered.set()

    async def find_unheard(self, ask: Callable[[], str], refuse: Callable[[list[dict[str, Any]]], None]) -> None:
        """Tell of cells that never reached the kernel.

        It takes what comes by shell in turn. Where it answers there, twice, and began meanwhile with none of
        them, there is nothing of them before it.
        """
        quiet = 0
        while self._delivery is not None and (unheard := self.cells.unheard()):
            self._answered.clear()
            self._asked = ask()
            await self._answered.wait()
            await asyncio.sleep(REPLY_GRACE)  # iopub has its own way
            quiet = quiet + 1 if self.cells.unheard() == unheard else 0
            if quiet == 2:
                refuse(self.cells.take(unheard))
                self.told()
