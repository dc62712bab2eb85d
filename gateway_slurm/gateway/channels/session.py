"""One frontend's session with a kernel: a place in what the kernel publishes, and the messages for this session alone.

The session outlives its websockets. What a slow or an absent frontend costs is its place: it gets what has left the
shared window from the kernel's node, and what the node does not have any more is counted, and said.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from logging import Logger
from typing import Any, Protocol

from gateway_slurm._util import Backoff
from gateway_slurm.budget import Budget
from gateway_slurm.errors import LinkError
from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.window import OVERHEAD, Published, Window
from gateway_slurm.link.journal import JournalReading, Record

# Bytes handed to the websocket before the session waits until they are written.
FLUSH_BYTES = 256 << 10
# Bytes of messages for one session alone that wait for its frontend, and for one that is away. The last one stays.
PRIVATE_LIMIT, AWAY_LIMIT = 64 << 20, 4 << 20
# Bytes, as the window counts them, that a frontend may be behind before the others wait for it; seconds that they do so
# in all, until it is at the end again; and seconds for which a frontend that has taken something is one that reads.
MAX_LAG, PATIENCE, ACTIVE_SECONDS = 64 << 20, 5.0, 1.0
# Bytes, as the window counts them, of a message that waits until its user has room for it; seconds that it does so at
# most, and between two attempts.
LARGE, ROOM_SECONDS, ROOM_INTERVAL = 1 << 20, 5.0, 0.1
# Seconds that one turn takes, and between two attempts to read from the node.
LOOP_SLICE = 0.002
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.2, 5.0


class Sink(Protocol):
    """An open websocket."""

    @property
    def protocol(self) -> str:
        """The websocket's format of messages."""

    @property
    def reads_model(self) -> bool:
        """Whether the frontend reads the kernel's model when the websocket closes and no other can be opened."""

    def send(self, frame: bytes | str) -> asyncio.Future[None] | None:
        """Send a message. The future is done when it is written, or never will be; None: closed. Raises nothing."""

    def end(self, reason: str) -> None:
        """Close: another websocket of the same session has taken over, or the session is over."""

    def end_dead(self, reason: str) -> None:
        """Close, with a code after which the frontend tries to open another: the kernel is dead."""

    def refuse(self, reason: str) -> None:
        """Close: the frontend sends too much, or does not read. It may open another websocket."""


class Connection(Protocol):
    """What a session uses of its kernel's connection (``connection``)."""

    window: Window
    user: str
    """The kernel's owner, who pays for what waits here."""
    budget: Budget
    is_known: bool
    """Whether the numbers of the window are known."""
    log: Logger
    failure: str
    """Why the kernel is dead, or nothing."""

    @property
    def newest(self) -> int:
        """The number of the last message, as far as it is known."""

    @property
    def can_read(self) -> bool:
        """Whether the kernel's node has what has left the window."""

    def read(self, start: int, upto: int) -> JournalReading:
        """Read these numbers from the node. Raises LinkError where that is not possible."""

    def signing(self, parts: list[bytes]) -> Generator[None, None, list[bytes]]:
        """Sign a large message for the kernel, in steps; return its parts."""

    async def check_large(self, records: list[Record]) -> list[Record]:
        """The records, with the signatures of the large ones checked, in turns of the kernel's owner."""

    def parse(self, record: Record) -> tuple[Published, dict[str, Any]]:
        """The message of a record, hidden where the kernel has not signed it, and its header."""

    def post(self, function: Callable[[], object]) -> None:
        """Call the function, which takes some milliseconds at most, in a turn of the kernel's owner."""

    async def turn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The same, and return what it returns."""

    def attached(self, session: Session, sink: Sink) -> None:
        """A websocket has opened."""

    def detached(self, session: Session) -> None:
        """A websocket has closed."""

    def progressed(self, session: Session) -> None:
        """The websocket has written something."""

    def dropped(self, msg_ids: list[str]) -> None:
        """The replies to these requests were dropped."""

    def from_client(self, session: Session, channel: str, parts: list[bytes]) -> None:
        """The frontend has sent a message."""

    def instead_of(self, session: Session, after: int, upto: int, parent: dict[str, Any]) -> list[list[bytes]]:
        """What a session gets in place of lost messages."""


@dataclass(slots=True, eq=False)
class _Private:
    """A message for this session alone, sent once it has all that the kernel published up to number ``after``."""

    after: int
    channel: str
    parts: list[bytes]

    @property
    def size(self) -> int:
        return OVERHEAD + sum(map(len, self.parts))


class Session:
    """A session on its connection. ``close`` ends it.

    ``position`` is the number of the last message that the websocket has written; -1 until the numbers are known.
    """

    def __init__(self, connection: Connection, session_id: str, position: int) -> None:
        self.id, self._connection = session_id, connection
        self.position = position
        self._cursor = position  # the last message handed to the websocket
        self._place = connection.window.place_after(position)
        self._offset = connection.window.total
        self.patience, self._written_at = PATIENCE, 0.0
        self._private: deque[_Private] = deque()
        self._private_bytes = 0
        self._holding = connection.budget.holding(connection.user, "frontend", self._shed)
        self._sink: Sink | None = None
        # Handed to the websocket and not written: the write, the cursor then, and the message for this session alone.
        self._writing: deque[tuple[asyncio.Future[None], int, _Private | None]] = deque()
        self._unwritten = 0  # bytes since the session waited last
        self._followed: asyncio.Future[None] | None = None  # the write whose end is noticed
        self._is_blocked = self._is_due = False
        self._reading: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()
        self._unblocked = asyncio.Event()
        # Since when a large message waits for room, and the next attempt.
        self._waits_since: float | None = None
        self._next_push: asyncio.TimerHandle | None = None
        # Whether the frontend gets the reason of its kernel's death with what waits for it, and whether it has it.
        self.failure_queued = self.failure_shown = False

    @property
    def sink(self) -> Sink | None:
        """The open websocket."""
        return self._sink

    @property
    def is_attached(self) -> bool:
        return self._sink is not None

    @property
    def has_unsent(self) -> bool:
        """Whether the frontend does not have all that is meant for it."""
        unseen = self._connection.is_known and self._place < self._connection.window.end
        return bool(self._private or self._writing or self._reading or unseen)

    @property
    def lag(self) -> int:
        """Bytes that the session has fallen behind since it was at the end, or began."""
        return self._connection.window.total - self._offset

    @property
    def is_worth_waiting_for(self) -> bool:
        """Whether the frontend reads, but has fallen far behind, and the others have waited little for it."""
        reads = self.is_attached and asyncio.get_running_loop().time() - self._written_at < ACTIVE_SECONDS
        return reads and self.lag > MAX_LAG and self.patience > 0

    # -- the websocket --------------------------------------------------------------------------

    def attach(self, sink: Sink, since: int | None = None) -> None:
        """Send to this websocket from now on; from the message after ``since``, if that is given."""
        older = self._sink
        self._detach()
        self._sink = sink
        if since is not None:
            self.go_to(since)
        if older is not None:
            older.end("a newer websocket of the same session")
        self._connection.attached(self, sink)
        self.push()
        # Later: the websocket is still being opened.
        asyncio.get_running_loop().call_soon(self._connection.progressed, self)

    def detach(self, sink: Sink) -> None:
        """The websocket has closed: what follows is for the session's next websocket."""
        if self._sink is sink:
            self._detach()
            self._connection.detached(self)

    def signing(self, parts: list[bytes]) -> Generator[None, None, list[bytes]]:
        """Sign a large message for the kernel, in steps; return its parts."""
        return self._connection.signing(parts)

    def from_client(self, channel: str, parts: list[bytes]) -> None:
        """Take a message for the kernel."""
        self._connection.from_client(self, channel, parts)

    def _detach(self) -> None:
        """Forget the websocket, and what it did not write."""
        self._sink, self._followed = None, None
        self._settle()
        for _written, _cursor, item in reversed(self._writing):
            if item is not None:
                self._private.appendleft(item)
                self._private_bytes += item.size
        self._writing.clear()
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if self._next_push is not None:
            self._next_push.cancel()
            self._next_push = None
        self._unwritten, self._is_blocked = 0, False
        self._count()
        self.go_to(self.position)

    def go_to(self, position: int) -> None:
        """Continue after the message with this number, which may be gone, or not exist yet."""
        if self._connection.is_known:
            position = min(position, self._connection.newest)
        self.position = self._cursor = position
        self._place = self._connection.window.place_after(position)
        self._offset = self._connection.window.total

    def close(self, reason: str) -> None:
        self._push_some()
        sink = self._sink
        self._detach()
        self._private.clear()
        self._holding.close()
        self._progress.set()
        if sink is not None:
            sink.end(reason)

    # -- what the frontend gets -------------------------------------------------------------------

    def put(self, channel: str, parts: list[bytes], after: int | None = None) -> None:
        """Send a message to this session alone, behind the number ``after``; by default, all that has come by now."""
        if after is None:
            after = self._connection.window.next - 1 if self._connection.is_known else -1
        item = _Private(after, channel, parts)
        self._private.append(item)
        self._private_bytes += item.size
        limit = PRIVATE_LIMIT if self.is_attached else AWAY_LIMIT
        while self._private_bytes > limit and len(self._private) > 1:
            self._private_bytes -= self._private.popleft().size
        self._count()
        self.push()

    def push(self) -> None:
        """Hand the websocket, in turns of the kernel's owner, what it takes."""
        if not self._is_due:
            self._is_due = True
            self._connection.post(self._push_some)

    def _push_some(self) -> None:
        self._is_due = False
        window, until = self._connection.window, time.monotonic() + LOOP_SLICE
        while self._sink is not None and not self._is_blocked and self._reading is None:
            if time.monotonic() > until:
                self.push()
                break
            if self._send_due():
                continue
            if not self._connection.is_known:
                break
            if self._cursor + 1 < window.oldest:
                if self._connection.can_read:
                    self._reading = asyncio.ensure_future(self._read_up())
                    break
                self._place = window.begin
                self._miss(window.oldest - 1, window.at(window.begin).parent if window.end > window.begin else {})
            elif self._place >= window.end:
                break
            else:
                item = window.at(self._place)
                if not self._has_room(item.size):
                    break
                self._place += 1
                if item.number > self._cursor:
                    self._take(item)
                self._offset = item.offset
        self._count()
        self._follow()

    def _count(self) -> None:
        self._holding.set(self._private_bytes + self._unwritten)

    def _shed(self, reason: str) -> None:
        """The user has too much, and most of it waits for this frontend, which has to open another websocket."""
        sink = self._sink
        self._detach()
        dropped, self._private, self._private_bytes = self._private, deque(), 0
        self._count()
        self._progress.set()
        self._connection.dropped([messages.parent_id(item.parts) for item in dropped if item.channel == "shell"])
        if sink is not None:
            self._connection.detached(self)
            sink.refuse(reason)

    def _has_room(self, size: int) -> bool:
        """Whether a message may be handed over now; where its user has no room for a large one, ``push`` comes again.

        After ROOM_SECONDS it is handed over all the same, and what is largest of the user's is given up.
        """
        loop = asyncio.get_running_loop()
        if size < LARGE or self._connection.budget.has_room(self._connection.user, size):
            self._waits_since = None
            return True
        if self._waits_since is None:
            self._waits_since = loop.time()
        elif loop.time() > self._waits_since + ROOM_SECONDS:
            self._waits_since = None
            return True
        if self._next_push is None:
            self._next_push = loop.call_later(ROOM_INTERVAL, self._push_again)
        return False

    def _push_again(self) -> None:
        self._next_push = None
        self.push()

    def _send_due(self) -> bool:
        """Send the next message for this session alone, if it is its turn."""
        if not self._private or self._private[0].after > self._cursor or self._sink is None:
            return False
        item = self._private.popleft()
        self._private_bytes -= item.size
        self._hand(messages.encode(self._sink.protocol, item.channel, item.parts), item)
        return True

    def _take(self, item: Published) -> None:
        """Send a message of the kernel's, after a word on those that are missing before it."""
        if item.first > self._cursor + 1:
            self._miss(item.first - 1, item.parent)
        self._cursor = item.number
        if not item.is_hidden and self._sink is not None:
            self._hand(item.frame(self._sink.protocol))

    def _miss(self, upto: int, parent: dict[str, Any]) -> None:
        """Say how many messages are lost, and end the cells whose end was among them."""
        after, self._cursor = self._cursor, upto
        for parts in self._connection.instead_of(self, after, upto, parent):
            if self._sink is not None:
                self._hand(messages.encode(self._sink.protocol, "iopub", parts))

    def _hand(self, frame: bytes | str, item: _Private | None = None) -> None:
        assert self._sink is not None
        written = self._sink.send(frame)
        if written is None:  # closed, and will detach
            written = asyncio.get_running_loop().create_future()
            self._is_blocked = True
        self._writing.append((written, self._cursor, item))
        self._unwritten += len(frame)
        if self._unwritten > FLUSH_BYTES:
            self._is_blocked = True

    # -- what the websocket has written -------------------------------------------------------------

    def _follow(self) -> None:
        """Notice when all is written that the websocket has now."""
        if not self._writing and self.position != self._cursor:
            self.position = self._cursor
            self._connection.progressed(self)
            self._progress.set()
        elif self._writing and self._followed is None:
            self._followed = self._writing[-1][0]
            self._followed.add_done_callback(self._on_written)

    def _on_written(self, written: asyncio.Future[None]) -> None:
        if self._followed is not written or not _is_written(written):
            return
        self._followed, self._is_blocked, self._unwritten = None, False, 0
        self._written_at = asyncio.get_running_loop().time()
        if self.lag <= 0:
            self.patience = PATIENCE
        self._settle()
        self._unblocked.set()
        self.push()
        self._connection.progressed(self)
        self._progress.set()

    def _settle(self) -> None:
        while self._writing and _is_written(self._writing[0][0]):
            # What was handed over before the numbers were known has a place of -1.
            self.position = max(self.position, self._writing.popleft()[1])
        if not self._writing and self._sink is not None:
            self.position = self._cursor

    async def flushed(self) -> None:
        """Wait until the frontend, if it is there, has all that is meant for it."""
        while self._sink is not None and self.has_unsent:
            self._progress.clear()
            await self._progress.wait()

    # -- what has left the window -----------------------------------------------------------------

    async def _read_up(self) -> None:
        """Read from the node up to the window's beginning."""
        delays = Backoff(RETRY_SECONDS, MAX_RETRY_SECONDS)
        while True:
            upto = self._connection.window.oldest - 1
            try:
                reading = self._connection.read(self._cursor + 1, upto)
            except LinkError:  # the kernel is over
                break
            try:
                async for records in reading:
                    await self._take_records(records)
                break
            except LinkError as error:
                if self._connection.failure:  # the launcher is gone with its kernel
                    break
                self._connection.log.info("what a kernel's node keeps is read again later: %s", error)
                await asyncio.sleep(delays.next())
            finally:
                reading.close()
        if self._cursor < upto:
            self._miss(upto, {})
        self._reading, self._place = None, self._connection.window.place_after(self._cursor)
        self.push()

    async def _take_records(self, records: list[Record]) -> None:
        records, place = await self._connection.check_large(records), 0
        while place < len(records):
            while self._is_blocked:
                self._follow()
                self._unblocked.clear()
                await self._unblocked.wait()
            if self._reading is not asyncio.current_task():
                # Python < 3.12: wait_for loses a cancellation that comes with what it waits for.
                raise asyncio.CancelledError
            before, place = place, await self._connection.turn(self._take_some, records, place)
            if place == before and not self._is_blocked:  # there is no room for the next one
                await asyncio.sleep(ROOM_INTERVAL)

    def _take_some(self, records: list[Record], place: int) -> int:
        """Take records from this place on, as many as the websocket takes in one turn; return the next place."""
        until = time.monotonic() + LOOP_SLICE
        while place < len(records) and not self._is_blocked and time.monotonic() < until:
            while self._send_due():
                pass
            record = records[place]
            if not self._has_room(2 * sum(map(len, record.frames))):
                break
            place += 1
            if record.number > self._cursor:
                item = self._connection.parse(record)[0]
                self._take(item)
                self._offset += item.size
        return place


def _is_written(written: asyncio.Future[None]) -> bool:
    return written.done() and not written.cancelled() and written.exception() is None
