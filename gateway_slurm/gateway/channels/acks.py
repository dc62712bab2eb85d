"""What of one kernel's output has left to all of its frontends: the rest is kept by its launcher, on the node.

A gateway that ends, however it ends, takes with it what it has not sent. So the launcher keeps each message
until it is acknowledged here; the next gateway reads what is left, and what each session has had of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

# Seconds between two acknowledgements, for which what leaves is put together. The first one waits for nothing:
# what has left and is not acknowledged when a server is killed comes twice.
EVERY = 0.02
# Messages whose order is known here; a frontend that is further behind holds only its launcher's bound up.
MOST = 200_000
# Characters of a position, of which a launcher takes no more: those cells go that were asked for last.
LONGEST = 4000
STATE = " state"
"""The key in the positions that can be no session's: its value is the kernel's state."""


@dataclass(frozen=True)
class Position:
    """How far a session is: the last message of the kernel's that it has, and its cells without an answer.

    A cell's value is how far it is (``cells``). As text, which is never empty: ``@last +/cell ok:3/cell``.
    """

    msg_id: str = ""
    cells: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = "@" + self.msg_id.replace(" ", "")
        for cell, mark in self.cells.items():
            if " " not in cell and len(text) + len(cell) < LONGEST:
                text += f" {mark}/{cell}"
        return text

    @classmethod
    def parse(cls, text: str) -> Position:
        msg_id, *cells = text.split(" ")
        split = [cell.partition("/") for cell in cells]
        return cls(msg_id.removeprefix("@"), {cell: mark for mark, _slash, cell in split if cell})


class Delivery:
    """The acknowledgements of one kernel's output; lives on the loop of its frontends.

    ``acknowledge`` gets the id of the last message that nobody waits for, and every session's position; it
    returns at once, and the future is done when that is on its way. ``close`` ends it.
    """

    def __init__(self, acknowledge: Callable[[str, dict[str, str]], Future[None] | None]) -> None:
        self._acknowledge = acknowledge
        # The order in which the kernel published: ids, and each one's number. It is the same for all who
        # subscribe, so the first who hears of a message says where it comes.
        self._ids: deque[str] = deque()
        self._numbers: dict[str, int] = {}
        self._first = 0
        self._sessions: dict[str, int] = {}
        self._positions: dict[str, Position] = {}
        self._state = ""
        self._upto = ""
        self._said: tuple[str, dict[str, str]] = ("", {})
        self._timer: asyncio.TimerHandle | None = None
        self._used = False
        self._saying = False
        self._last = 0.0  # by the loop's clock

    # -- what is heard, and what has left --------------------------------------------------------

    def published(self, msg_id: str) -> None:
        """The kernel published this message, and a session has it in its queue."""
        if not msg_id or msg_id in self._numbers:
            return
        self._numbers[msg_id] = self._end + 1
        self._ids.append(msg_id)
        if len(self._ids) > MOST:
            self._upto = self._forget_first()

    def unwanted(self, msg_id: str) -> None:
        """The kernel published this message; it is nobody's to have where there is no session."""
        if self._used and not self._sessions and msg_id:
            while self._ids:
                self._forget_first()
            self._upto = msg_id
            self._soon()

    def kept(self, session_id: str, msg_ids: Iterable[str]) -> None:
        """The launcher has these, in the kernel's order, whether the session has had them or not."""
        for msg_id in msg_ids:
            self.published(msg_id)
        if session_id in self._sessions:
            here = self._numbers.get(self._positions[session_id].msg_id, self._first - 1)
            self._sessions[session_id] = max(self._sessions[session_id], here)
            self._soon()

    def join(self, session_id: str, position: Position | None = None) -> None:
        """A session is there; without a position it waits for nothing that was published before."""
        here = position or Position(self._ids[-1] if self._ids else self._upto)
        self._positions[session_id] = here
        self._sessions[session_id] = self._numbers.get(here.msg_id, self._first - 1 if position else self._end)
        self._used = True
        self._soon()

    def leave(self, session_id: str) -> None:
        """Nobody waits for the session's messages any more."""
        self._sessions.pop(session_id, None)
        self._positions.pop(session_id, None)
        self._soon()

    def left(self, session_id: str, msg_id: str) -> None:
        """The message has left to this session's frontend, or was dropped."""
        number = self._numbers.get(msg_id, -1)
        if session_id in self._sessions and number > self._sessions[session_id]:
            self._sessions[session_id] = number
            self._positions[session_id] = Position(msg_id, self._positions[session_id].cells)
            self._soon()

    def runs(self, session_id: str, cells: Mapping[str, str]) -> None:
        """The session's cells that have no answer, and how far each is."""
        if session_id in self._sessions:
            self._positions[session_id] = Position(self._positions[session_id].msg_id, dict(cells))
            self._soon()

    def state(self, state: str) -> None:
        """What the kernel does."""
        if state != self._state:
            self._state = state
            self._soon()

    # -- acknowledging ----------------------------------------------------------------------------

    @property
    def _end(self) -> int:
        return self._first + len(self._ids) - 1

    def _forget_first(self) -> str:
        msg_id = self._ids.popleft()
        self._numbers.pop(msg_id, None)
        self._first += 1
        return msg_id

    def _soon(self) -> None:
        # Who never had a frontend owes nobody anything, and its launcher keeps nothing while the link is there.
        if self._used and self._timer is None and not self._saying:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(self._last + EVERY, loop.time()), self.say)

    def say(self) -> None:
        """Say what there is to say, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lowest = min(self._sessions.values(), default=self._end)
        while self._ids and self._first <= lowest:
            self._upto = self._forget_first()
        positions = {session: str(position) for session, position in self._positions.items()}
        said = self._upto, {**positions, STATE: self._state or "idle"}
        if self._used and said != self._said:
            loop = asyncio.get_running_loop()
            self._said, self._last = said, loop.time()
            on_its_way = self._acknowledge(*said)
            if on_its_way is not None:
                # One at a time: where the service has much to do, each says more, and none waits behind others.
                self._saying = True
                on_its_way.add_done_callback(lambda _done: self._call(loop, self._said_it))

    @staticmethod
    def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(function)

    def _said_it(self) -> None:
        self._saying = False
        self._soon()

    def again(self, state: str = "") -> None:
        """Say it all once more: to the launcher this is a new link, or the one of a new server."""
        self._said, self._used = ("", {}), True
        self._state = state or self._state
        self._soon()

    def close(self) -> None:
        """The kernel is over, or this server leaves it: what was not said stays as it is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._used = False
