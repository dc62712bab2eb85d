"""Acknowledgements of one kernel's output to its launcher, which keeps all output that is not acknowledged.

A server that stops, or is killed, loses the output that it has not sent to its frontends. So the launcher, on the
kernel's node, keeps each message until the server acknowledges it: until all frontends have it. The next server reads
from the launcher what is left, and each session's position.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from gateway_slurm._util import call_on

# Seconds between two acknowledgements; what is sent meanwhile goes into one. The first one does not wait: messages that
# were sent and not acknowledged come twice when a server is killed.
ACK_INTERVAL = 0.02
# Messages in the server's memory of the kernel's order. The output before them is acknowledged unseen.
MAX_MESSAGES = 200_000
# Characters of a position, of which a launcher takes no more. The cells that were requested last are left out.
MAX_POSITION = 4000
STATE_KEY = " state"
"""The key of the kernel's state among the positions. No session has this id, which begins with a space."""


@dataclass(frozen=True)
class Position:
    """A session's position: the last of the kernel's messages that its frontend has, and its cells without a reply.

    ``cells`` has each cell's mark (``cells``). As text, which is never empty: ``@last +/cell ok:3/cell``.
    """

    msg_id: str = ""
    cells: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = "@" + self.msg_id.replace(" ", "")
        for cell, mark in self.cells.items():
            if " " not in cell and len(text) + len(cell) < MAX_POSITION:
                text += f" {mark}/{cell}"
        return text

    @classmethod
    def parse(cls, text: str) -> Position:
        msg_id, *cells = text.split(" ")
        split = [cell.partition("/") for cell in cells]
        return cls(msg_id.removeprefix("@"), {cell: mark for mark, _slash, cell in split if cell})


class OutputAcks:
    """The acknowledgements of one kernel's output, on the loop of its frontends. ``close`` ends them.

    ``acknowledge`` gets the id of the last message that all sessions have, and every session's position. It returns at
    once a future that is done when the acknowledgement has been sent to the launcher, or None if there is no launcher.
    """

    def __init__(self, acknowledge: Callable[[str, dict[str, str]], Future[None] | None]) -> None:
        self._acknowledge = acknowledge
        # The ids of the kernel's messages in its order, which is the same for all subscribers, and each one's number.
        # The first session that receives a message adds it.
        self._ids: deque[str] = deque()
        self._numbers: dict[str, int] = {}
        self._first = 0
        # The number of the last message that each session has.
        self._sessions: dict[str, int] = {}
        self._positions: dict[str, Position] = {}
        self._state = ""
        self._upto = ""
        self._last_ack: tuple[str, dict[str, str]] = ("", {})
        self._last_time = 0.0  # by the loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._used = False
        self._is_sending = False

    # -- messages and positions ------------------------------------------------------------------

    def published(self, msg_id: str) -> None:
        """The kernel published this message, and a session has it in its queue."""
        if msg_id and msg_id not in self._numbers:
            self._numbers[msg_id] = self._end + 1
            self._ids.append(msg_id)
            if len(self._ids) > MAX_MESSAGES:
                self._upto = self._forget_first()

    def published_unheard(self, msg_id: str) -> None:
        """The kernel published this message; without a session, it is acknowledged at once."""
        if self._used and not self._sessions and msg_id:
            while self._ids:
                self._forget_first()
            self._upto = msg_id
            self._schedule()

    def add_kept(self, session_id: str, msg_ids: Iterable[str]) -> None:
        """Add the messages that the launcher keeps, in the kernel's order, whether the session has them or not."""
        for msg_id in msg_ids:
            self.published(msg_id)
        if session_id in self._sessions:
            number = self._numbers.get(self._positions[session_id].msg_id, self._first - 1)
            self._sessions[session_id] = max(self._sessions[session_id], number)
            self._schedule()

    def join(self, session_id: str, position: Position | None = None) -> None:
        """Add a session. Without a position it waits for no earlier message."""
        start = position or Position(self._ids[-1] if self._ids else self._upto)
        self._positions[session_id] = start
        self._sessions[session_id] = self._numbers.get(start.msg_id, self._first - 1 if position else self._end)
        self._used = True
        self._schedule()

    def leave(self, session_id: str) -> None:
        """Remove a session; no message waits for it any more."""
        self._sessions.pop(session_id, None)
        self._positions.pop(session_id, None)
        self._schedule()

    def sent(self, session_id: str, msg_id: str) -> None:
        """The message was sent to the session's frontend, or was dropped."""
        number = self._numbers.get(msg_id, -1)
        if session_id in self._sessions and number > self._sessions[session_id]:
            self._sessions[session_id] = number
            self._positions[session_id] = Position(msg_id, self._positions[session_id].cells)
            self._schedule()

    def set_cells(self, session_id: str, cells: Mapping[str, str]) -> None:
        """Set the session's cells without a reply, with their marks."""
        if session_id in self._sessions:
            self._positions[session_id] = Position(self._positions[session_id].msg_id, dict(cells))
            self._schedule()

    def set_state(self, state: str) -> None:
        """Set the kernel's execution state."""
        if state != self._state:
            self._state = state
            self._schedule()

    # -- acknowledging ----------------------------------------------------------------------------

    @property
    def _end(self) -> int:
        return self._first + len(self._ids) - 1

    def _forget_first(self) -> str:
        msg_id = self._ids.popleft()
        self._numbers.pop(msg_id, None)
        self._first += 1
        return msg_id

    def _schedule(self) -> None:
        # Without an acknowledgement the launcher keeps nothing while the link is up: right for a kernel that never had
        # a frontend.
        if self._used and self._timer is None and not self._is_sending:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(self._last_time + ACK_INTERVAL, loop.time()), self.flush)

    def flush(self) -> None:
        """Acknowledge now what is not acknowledged yet."""
        self._cancel_timer()
        lowest = min(self._sessions.values(), default=self._end)
        while self._ids and self._first <= lowest:
            self._upto = self._forget_first()
        positions = {session: str(position) for session, position in self._positions.items()}
        ack = self._upto, {**positions, STATE_KEY: self._state or "idle"}
        if self._used and ack != self._last_ack:
            loop = asyncio.get_running_loop()
            self._last_ack, self._last_time = ack, loop.time()
            if sending := self._acknowledge(*ack):
                # One at a time: while the service is busy, later ones are put together rather than queued.
                self._is_sending = True
                sending.add_done_callback(lambda _done: call_on(loop, self._was_sent))

    def _was_sent(self) -> None:
        self._is_sending = False
        self._schedule()

    def resend(self, state: str = "") -> None:
        """Acknowledge everything again: the launcher has a new link, or a new server."""
        self._last_ack, self._used = ("", {}), True
        self._state = state or self._state
        self._schedule()

    def close(self) -> None:
        """Send no more acknowledgements: the kernel has ended, or runs on for the next server."""
        self._cancel_timer()
        self._used = False

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
