"""The outbox of a link: what waits to be sent, in its order. Both ends use this file.

Messages go before tunnel data. Tunnel streams take turns, each within the credit that the far end gave. So a full iopub
delays neither an interrupt nor a heartbeat, and a slow reader fills at most one window at either end.

Messages are lost with their link. Streams outlive it: sent data is kept until the far end has taken it. On the next
link between the same launcher and server each end reports how many bytes of each stream it has received, and the other
end continues from there. Pure: no I/O. Standard library only, Python >= 3.9.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Any

from gateway_slurm.link import wire

# Bytes that a stream may send before its far end has taken them. As many are kept, because they may be sent again.
WINDOW = 1024 * 1024
# Bytes after which the far end returns credit.
CREDIT_STEP = WINDOW // 4
# Bytes that may wait in a stream before reading from its local socket stops.
BACKLOG = 256 * 1024
# Bytes that may wait in all streams of a launcher together. A kernel does not wait for readers: it drops messages once
# 1000 of them wait. Behind the tunnel only replies do, because output waits in the kernel's journal; but a direct
# kernel's iopub may pass here, too. The memory counts for the job.
NODE_BACKLOG = 64 * 1024 * 1024
# Streams that are closed here and not yet confirmed by the far end: the number that is kept, and their bytes in total.
# An honest far end confirms at once; without a link only streams that it knew are kept.
MAX_CLOSING_STREAMS, MAX_CLOSING_BYTES = 1024, NODE_BACKLOG
# Bytes of one DATA message: many enough for a fast cipher, few enough to take turns.
CHUNK = 128 * 1024


class ReceiveWindow:
    """The bytes received on one stream, and the credit for more; positions count from the stream's start."""

    def __init__(self) -> None:
        self.received = 0
        self.taken = 0  # by our local socket
        self.reported = 0  # of these, the bytes that the far end knows of

    def arrived(self, count: int) -> None:
        """Raise WireError if the far end sends more than its credit."""
        self.received += count
        if self.received - self.reported > WINDOW:
            raise wire.WireError("a stream sent more than its credit")

    def took(self, count: int) -> None:
        self.taken += count

    def take_unreported(self) -> int:
        """The bytes taken since the last call; the caller reports them to the far end."""
        unreported, self.reported = self.taken - self.reported, self.taken
        return unreported


class _Sending:
    """The data for the far end on one stream; positions count from the stream's start."""

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()
        self.size = 0  # bytes in ``waiting``
        self.sent = 0
        self.taken = 0  # by the far end
        # Sent, and perhaps not received: a broken link may have lost it.
        self._kept: deque[bytes] = deque()
        self._kept_from = 0

    @property
    def held(self) -> int:
        """The bytes in memory at most, to within a chunk."""
        return self.size + self.sent - self.taken

    @property
    def credit(self) -> int:
        return self.taken + WINDOW - self.sent

    def put(self, data: bytes) -> None:
        for start in range(0, len(data), CHUNK):
            self.waiting.append(data[start : start + CHUNK])
        self.size += len(data)

    def next(self) -> bytes:
        """The next chunk to send; the caller checks that there is one, and credit."""
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
        self._discard_upto(self.taken)

    def rewind(self, received: int, taken: int) -> bool:
        """Continue from the far end's positions; return False, and change nothing, if they are impossible."""
        possible = max(self.taken, self._kept_from) <= received <= self.sent
        if not possible or not max(self.taken, received - WINDOW) <= taken <= received:
            return False
        self._discard_upto(received)
        if self._kept:
            self._kept[0] = self._kept[0][received - self._kept_from :]
        self.size += sum(map(len, self._kept))
        self.waiting.extendleft(reversed(self._kept))
        self._kept.clear()
        self._kept_from = self.sent = received
        self.taken = taken
        return True

    def _discard_upto(self, position: int) -> None:
        while self._kept and self._kept_from + len(self._kept[0]) <= position:
            self._kept_from += len(self._kept.popleft())


class _Stream:
    """A stream at this end, from OPEN until both ends have sent CLOSE."""

    def __init__(self, opening: bytes | None) -> None:
        self.opening = opening  # the payload of this end's OPEN; None if the far end opened the stream
        self.opened = opening is None
        self.sending = _Sending()
        self.window = ReceiveWindow()
        self.closing = False
        self.close_sent = False
        self.queued = False

    def resume(self, positions: Any, *, opening_lost: bool) -> bool:
        """Continue from the far end's positions; return False if the stream has ended."""
        if opening_lost and self.closing:
            return False  # the far end does not know the stream, and need not know it
        if opening_lost:
            self.opened, positions = False, [0, 0]
        if not isinstance(positions, list) or [type(count) for count in positions] != [int, int]:
            return False
        self.close_sent = self.queued = False
        return self.sending.rewind(*positions)


class Outbox:
    """What waits for the link. Streams may exceed BACKLOG as long as all together hold less than ``shared_backlog``."""

    def __init__(self, shared_backlog: int = 0) -> None:
        self._messages: deque[bytes] = deque()
        self.messages_size = 0  # bytes of them
        self._streams: dict[int, _Stream] = {}
        self._unopened: deque[int] = deque()
        self._ready: deque[int] = deque()
        self._shared_backlog = shared_backlog
        # Whether this end has reported its positions on this link, and whether the far end has.
        self._reported = self._flowing = True

    # -- links come and go ------------------------------------------------------------------

    def hold(self) -> None:
        """The link is gone, and its messages with it; the streams wait for ``resume`` on the next link."""
        self._messages.clear()
        self.messages_size = 0
        self._reported = self._flowing = False

    def positions(self) -> dict[str, list[int]]:
        """For the far end's ``resume``: the bytes of each stream that were received and taken here."""
        self._reported = True
        for stream in self._streams.values():
            stream.window.take_unreported()
        return {str(number): [s.window.received, s.window.taken] for number, s in self._streams.items()}

    def resume(self, positions: Any, last_opened: Any = 0) -> list[int]:
        """Continue from the far end's positions, which are not trusted; return the streams that have ended.

        Streams that this end opened after ``last_opened`` are opened again. Other streams that the far end does not
        know have ended. A stream with impossible positions has ended, too, and is closed at the far end.
        """
        if self._flowing:
            return []
        reported = positions if isinstance(positions, dict) else {}
        ended = []
        for number, stream in self._streams.items():
            known = reported.get(str(number))
            lost = known is None and stream.opening is not None and _is_before(last_opened, number)
            if not stream.resume(known, opening_lost=lost):
                ended.append(number)
                if known is not None:
                    self.message(wire.encode_stream("CLOSE", number))
        for number in ended:
            del self._streams[number]
        self._unopened = deque(sorted(number for number, stream in self._streams.items() if not stream.opened))
        self._ready = deque()
        self._flowing = True
        for number, stream in self._streams.items():
            self._queue(number, stream)
        return ended

    # -- messages and streams ---------------------------------------------------------------

    def message(self, body: bytes) -> None:
        """Queue a message ahead of all data; the caller limits the number by ``messages_size``."""
        self._messages.append(body)
        self.messages_size += len(body)

    def open(self, number: int, opening: bytes | None = None) -> None:
        """Add a stream; data of unknown streams is ignored. With ``opening``, send OPEN with this payload.

        The numbers of streams that this end opens must grow.
        """
        self._streams[number] = _Stream(opening)
        if opening is not None:
            self._unopened.append(number)

    def data(self, number: int, data: bytes) -> bool:
        """Queue data; return whether the stream may take more (see ``may_read``)."""
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
        """Whether the stream may take more data now."""
        stream = self._streams.get(number)
        if stream is None:
            return False
        if stream.sending.size < BACKLOG:
            return True
        return bool(self._shared_backlog) and sum(s.sending.size for s in self._streams.values()) < self._shared_backlog

    def close(self, number: int) -> None:
        """Close this side: CLOSE follows the queued data, and the stream is kept until the far end confirms."""
        stream = self._streams.get(number)
        if stream is None:
            return
        if not stream.opened:
            del self._streams[number]
            return
        # The stream becomes the newest closing one; _bound_closing drops the oldest.
        self._streams[number] = self._streams.pop(number)
        stream.closing = True
        self._queue(number, stream)
        self._bound_closing()

    def _bound_closing(self) -> None:
        count = size = 0
        for number, stream in reversed(list(self._streams.items())):
            if stream.closing:
                count, size = count + 1, size + stream.sending.held
                if count > MAX_CLOSING_STREAMS or size > MAX_CLOSING_BYTES:
                    del self._streams[number]

    def closed(self, number: int) -> None:
        """The far end closed the stream: drop the queued data, and confirm by CLOSE."""
        stream = self._streams.pop(number, None)
        if stream is not None and not stream.close_sent:
            self.message(wire.encode_stream("CLOSE", number))

    def forget_streams(self) -> None:
        """The far end is another process, which knows none of the streams."""
        for waiting in (self._streams, self._unopened, self._ready):
            waiting.clear()

    def credit(self, number: int, count: int) -> None:
        """The far end took ``count`` bytes."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.sending.took(count)
            self._queue(number, stream)

    def arrived(self, number: int, count: int) -> None:
        """Bytes came on the stream; raises WireError if they exceed its credit."""
        stream = self._streams.get(number)
        if stream is not None:
            stream.window.arrived(count)

    def took(self, number: int, count: int) -> None:
        """Return credit, in steps, for ``count`` bytes that this side wrote to its socket."""
        stream = self._streams.get(number)
        if stream is None:
            return
        window = stream.window
        window.took(count)
        # Before this end has reported its positions, a CREDIT would count some bytes twice.
        if self._reported and window.taken - window.reported >= CREDIT_STEP:
            self.message(wire.encode_stream("CREDIT", number, struct.pack(">I", window.take_unreported())))

    # -- frames -----------------------------------------------------------------------------

    def next_frame(self) -> bytes | None:
        """The content of the next frame, about a CHUNK at most; None if nothing can be sent now."""
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
        """Put the stream in line, if it has something to send."""
        wanted = stream.sending.waiting or (stream.closing and not stream.close_sent)
        if wanted and self._flowing and stream.opened and not stream.queued:
            stream.queued = True
            self._ready.append(number)


def _is_before(last: Any, number: int) -> bool:
    return isinstance(last, int) and last < number


def credit_of(payload: bytes) -> int:
    """The count in a CREDIT message; raises WireError for a malformed one."""
    if len(payload) != 4:
        raise wire.WireError("the payload of CREDIT is not four bytes")
    return int.from_bytes(payload, "big")
