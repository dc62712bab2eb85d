"""What waits to go over a link, in the order in which it should go. One source for both ends.

Messages go before tunnel data; tunnel streams take turns, each within the credit that its far end
gave. So a full iopub delays neither an interrupt nor a heartbeat, and a slow reader fills at most
one window at either end.

Messages go with their link. Streams outlive it: what was sent is kept until the far end has taken
it, and on the next link of the same launcher and server each end tells how many bytes of each
stream it has received, from where the other goes on. Pure: no I/O. Standard library only,
Python >= 3.9.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

from gateway_slurm.link import wire

# Bytes a stream may send before its far end has taken them; as many are kept, to be sent again.
WINDOW = 1024 * 1024
# The far end gives credit back in steps of this many bytes.
CREDIT_STEP = WINDOW // 4
# Bytes a stream may hold here before its local socket is read no further.
BACKLOG = 256 * 1024
# Bytes that all streams of a launcher may hold together. A kernel does not wait for readers, it drops
# what it publishes once 1000 messages wait: this is 20 s without a link of a cell that prints 3 MB/s, or
# 100 000 lines that are printed faster than a frontend reads, in memory that the job pays for.
NODE_BACKLOG = 64 * 1024 * 1024
# Streams that ended here and whose far end has not said that it knows: so many are kept, with so many
# bytes in all. An honest far end says so at once; without a link only those are kept that it knew.
CLOSING_STREAMS, CLOSING_BYTES = 1024, NODE_BACKLOG
# Bytes of one DATA frame: large enough for the cipher to be fast, small enough to take turns.
CHUNK = 128 * 1024


class ReceiveWindow:
    """What came on one stream, and how much more may; positions count from the stream's start."""

    def __init__(self) -> None:
        self.received = 0
        self.taken = 0  # by our local socket
        self.told = 0  # of these, what the far end knows of

    def arrived(self, count: int) -> None:
        """Raise WireError when the far end sends more than its credit."""
        self.received += count
        if self.received - self.told > WINDOW:
            raise wire.WireError("a stream sent more than its credit")

    def took(self, count: int) -> None:
        self.taken += count

    def tell(self) -> int:
        """What was taken since this was asked last; the far end is told."""
        untold, self.told = self.taken - self.told, self.taken
        return untold


class _Sending:
    """What goes to the far end on one stream; positions count from the stream's start."""

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()
        self.size = 0  # of what waits
        self.sent = 0
        self.taken = 0  # by the far end
        # Sent and not known to be received: a link that breaks may lose it.
        self._kept: deque[bytes] = deque()
        self._kept_from = 0

    @property
    def held(self) -> int:
        """The most bytes that it has in memory, to a chunk."""
        return self.size + self.sent - self.taken

    @property
    def credit(self) -> int:
        return self.taken + WINDOW - self.sent

    def put(self, data: bytes) -> None:
        for start in range(0, len(data), CHUNK):
            self.waiting.append(data[start : start + CHUNK])
        self.size += len(data)

    def next(self) -> bytes:
        """The next chunk that goes; there must be one, and credit."""
        chunk = self.waiting.popleft()
        if len(chunk) > self.credit:
            self.waiting.appendleft(chunk[self.credit :])
            chunk = chunk[: self.credit]
        self.size -= len(chunk)
        self.sent += len(chunk)
        self._kept.append(chunk)
        return chunk

    def took(self, count: int) -> None:
        self.taken = min(self.taken + count, self.sent)
        self._let_go(self.taken)

    def rewind(self, received: int, taken: int) -> bool:
        """Go on from what the far end has received; False, and nothing done, when it cannot have that."""
        possible = max(self.taken, self._kept_from) <= received <= self.sent
        if not possible or not max(self.taken, received - WINDOW) <= taken <= received:
            return False
        self._let_go(received)
        if self._kept:
            self._kept[0] = self._kept[0][received - self._kept_from :]
        self.size += sum(map(len, self._kept))
        self.waiting.extendleft(reversed(self._kept))
        self._kept.clear()
        self._kept_from = self.sent = received
        self.taken = taken
        return True

    def _let_go(self, position: int) -> None:
        while self._kept and self._kept_from + len(self._kept[0]) <= position:
            self._kept_from += len(self._kept.popleft())


class _Stream:
    """A stream at this end, from OPEN until both ends have said CLOSE."""

    def __init__(self, opening: bytes | None) -> None:
        self.opening = opening  # what our OPEN says; None where the far end opened it
        self.opened = opening is None
        self.sending = _Sending()
        self.window = ReceiveWindow()
        self.closing = False
        self.close_sent = False
        self.queued = False

    def go_on(self, told: Any, *, opening_lost: bool) -> bool:
        """Go on from the positions that the far end told; False when the stream is over."""
        if opening_lost and self.closing:
            return False  # the far end never heard of it, and need not now
        if opening_lost:
            self.opened, told = False, [0, 0]
        if not isinstance(told, list) or [type(count) for count in told] != [int, int]:
            return False
        self.close_sent = self.queued = False
        return self.sending.rewind(*told)


class Outbox:
    """What waits for the link. ``shared_backlog``: bytes that may wait in all, where BACKLOG each is too little."""

    def __init__(self, shared_backlog: int = 0) -> None:
        self._messages: deque[bytes] = deque()
        self.messages_size = 0  # bytes of them
        self._streams: dict[int, _Stream] = {}
        self._unopened: deque[int] = deque()
        self._ready: deque[int] = deque()
        self._shared_backlog = shared_backlog
        # Whether the far end of this link was told our positions, and whether it told its own.
        self._told = self._flowing = True

    # -- links come and go ------------------------------------------------------------------

    def hold(self) -> None:
        """The link is gone, and its messages with it; streams wait for the next one's ``resume``."""
        self._messages.clear()
        self.messages_size = 0
        self._told = self._flowing = False

    def positions(self) -> dict[str, list[int]]:
        """For the far end's ``resume``: how many bytes of each stream have come here and were taken."""
        self._told = True
        for stream in self._streams.values():
            stream.window.tell()
        return {str(number): [s.window.received, s.window.taken] for number, s in self._streams.items()}

    def resume(self, positions: Any, last_opened: Any = 0) -> list[int]:
        """Go on from the far end's positions, which nobody has checked; return the streams that are over.

        Streams of ours after ``last_opened`` are opened again. What the far end does not know else is
        over, and what it cannot have is closed there, too.
        """
        if self._flowing:
            return []
        told = positions if isinstance(positions, dict) else {}
        over = []
        for number, stream in self._streams.items():
            known = told.get(str(number))
            lost = known is None and stream.opening is not None and _is_before(last_opened, number)
            if not stream.go_on(known, opening_lost=lost):
                over.append(number)
                if known is not None:
                    self.message(wire.encode_stream("CLOSE", number))
        for number in over:
            del self._streams[number]
        self._unopened = deque(sorted(number for number, stream in self._streams.items() if not stream.opened))
        self._ready = deque()
        self._flowing = True
        for number, stream in self._streams.items():
            self._queue(number, stream)
        return over

    # -- messages and streams ---------------------------------------------------------------

    def message(self, body: bytes) -> None:
        """Queue a message ahead of all data; how many is the caller's to bound, by ``messages_size``."""
        self._messages.append(body)
        self.messages_size += len(body)

    def open(self, number: int, opening: bytes | None = None) -> None:
        """Know a stream from now on, others are ignored; with ``opening``, the far end is told to open it.

        Numbers of streams that are opened here must grow.
        """
        self._streams[number] = _Stream(opening)
        if opening is not None:
            self._unopened.append(number)

    def data(self, number: int, data: bytes) -> bool:
        """Queue data; True while the stream may be read on (see ``may_read``)."""
        stream = self._streams.get(number)
        if stream is None:
            return False
        stream.sending.put(data)
        self._queue(number, stream)
        return self.may_read(number)

    def waiting(self, number: int) -> int:
        """Bytes of the stream that wait for the link."""
        stream = self._streams.get(number)
        return stream.sending.size if stream is not None else 0

    def may_read(self, number: int) -> bool:
        """Whether more may be queued for the stream now."""
        stream = self._streams.get(number)
        if stream is None:
            return False
        if stream.sending.size < BACKLOG:
            return True
        return bool(self._shared_backlog) and sum(s.sending.size for s in self._streams.values()) < self._shared_backlog

    def close(self, number: int) -> None:
        """Our side ended: CLOSE follows what is queued, and the stream is kept until the far end knows."""
        stream = self._streams.get(number)
        if stream is None:
            return
        if not stream.opened:
            del self._streams[number]
            return
        # As the newest of those that end: where these are too many the oldest go.
        self._streams[number] = self._streams.pop(number)
        stream.closing = True
        self._queue(number, stream)
        self._bound_closing()

    def _bound_closing(self) -> None:
        count = size = 0
        for number, stream in reversed(list(self._streams.items())):
            if stream.closing:
                count, size = count + 1, size + stream.sending.held
                if count > CLOSING_STREAMS or size > CLOSING_BYTES:
                    del self._streams[number]

    def closed(self, number: int) -> None:
        """The far end closed the stream: drop what was to go there, and let it know."""
        stream = self._streams.pop(number, None)
        if stream is not None and not stream.close_sent:
            self.message(wire.encode_stream("CLOSE", number))

    def forget_streams(self) -> None:
        """The far end is another one, which knows none of them."""
        for waiting in (self._streams, self._unopened, self._ready):
            waiting.clear()

    def credit(self, number: int, count: int) -> None:
        """The far end took ``count`` bytes."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.sending.took(count)
            self._queue(number, stream)

    def arrived(self, number: int, count: int) -> None:
        """Bytes came on the stream; raises WireError when they are more than its credit."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.window.arrived(count)

    def took(self, number: int, count: int) -> None:
        """Our side wrote ``count`` bytes of the stream to its socket: give credit back in steps."""
        stream = self._streams.get(number)
        if stream is None:
            return
        window = stream.window
        window.took(count)
        # Before our positions are told a CREDIT would say part of them twice.
        if self._told and window.taken - window.told >= CREDIT_STEP:
            self.message(wire.encode_stream("CREDIT", number, struct.pack(">I", window.tell())))

    # -- frames -----------------------------------------------------------------------------

    def next_frame(self) -> bytes | None:
        """What goes into the next frame, up to about a CHUNK; None when nothing can go now."""
        bodies = []
        size = 0
        while size < CHUNK:
            body = self._next()
            if body is None:
                break
            bodies.append(body)
            size += len(body)
        return wire.pack(bodies) if bodies else None

    def _next(self) -> bytes | None:
        if self._messages:
            self.messages_size -= len(self._messages[0])
            return self._messages.popleft()
        if not self._flowing:
            return None
        return self._next_open() or self._next_of_streams()

    def _next_open(self) -> bytes | None:
        while self._unopened:
            number = self._unopened.popleft()
            stream = self._streams.get(number)
            if stream is not None and stream.opening is not None:
                stream.opened = True
                self._queue(number, stream)
                return wire.encode_stream("OPEN", number, stream.opening)
        return None

    def _next_of_streams(self) -> bytes | None:
        while self._ready:
            number = self._ready.popleft()
            stream = self._streams.get(number)
            if stream is None:
                continue
            stream.queued = False
            if stream.sending.waiting and stream.sending.credit > 0:
                chunk = stream.sending.next()
                self._queue(number, stream)
                return wire.encode_stream("DATA", number, chunk)
            if stream.closing and not stream.close_sent and not stream.sending.waiting:
                stream.close_sent = True
                return wire.encode_stream("CLOSE", number)
        return None

    def _queue(self, number: int, stream: _Stream) -> None:
        """Let the stream take its turn, if it has something to send."""
        wanted = stream.sending.waiting or (stream.closing and not stream.close_sent)
        if wanted and self._flowing and stream.opened and not stream.queued:
            stream.queued = True
            self._ready.append(number)


def _is_before(last: Any, number: int) -> bool:
    return isinstance(last, int) and last < number


def credit_of(payload: bytes) -> int:
    """The count in a CREDIT message."""
    if len(payload) != 4:
        raise wire.WireError("a CREDIT that is not four bytes")
    return int.from_bytes(payload, "big")
