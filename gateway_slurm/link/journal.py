"""Read a kernel's journal from its launcher: one stream of the tunnel, for a reader on another loop.

The stream is on the service's loop. The bytes are passed as they are to the reader's loop, and parsed there. All of
them come from a launcher, and are not trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from gateway_slurm.bounded_json import load_json
from gateway_slurm.budget import Budget, Holding
from gateway_slurm.errors import LinkError
from gateway_slurm.link import wire
from gateway_slurm.link.tunnel import Streams

SILENCE_SECONDS = 30.0
"""A bounded reading fails after so many seconds without a byte: there is no link, or the launcher hangs."""
SLICE = 64 * 1024
"""Bytes that are parsed at once, before the reader's loop does other work."""
MAX_HEADER = 8 << 20
"""Bytes of the header, which holds the positions of up to 1024 sessions, and the notes."""
MAX_HEADER_VALUES = 50_000
"""Values of the header's JSON."""
READ_AHEAD = 4 << 20
"""Bytes that may wait for the reader before the launcher gets no more credit."""
LARGE_RECORD = 1 << 20
"""Bytes of a record that is left out where its user has no room for it."""
_RECORD_HEAD = struct.Struct(">QQ")


def _count_nowhere(shed: Callable[[str], object]) -> Holding:
    return Budget(0, 0).holding("", "reading", shed)


@dataclass(frozen=True, slots=True)
class Record:
    """A message of a kernel's iopub, or several of one stream that were joined; ``frames`` is empty for a marker.

    ``first`` and ``number`` are the numbers of the first and the last message in it. The frames are the topic, the
    delimiter ``<IDS|MSG>``, the signature, header, parent header, metadata, content, and buffers.
    """

    first: int
    number: int
    frames: list[bytes]


@dataclass(frozen=True)
class JournalHeader:
    """The journal when the reading began.

    ``oldest`` is the number of its oldest message, ``next`` that of the next one to come, and ``start`` the first that
    may be read. ``positions`` and ``notes`` come from the last acknowledgements. ``subscribed`` tells whether a message
    of the kernel's present process has come. ``trouble`` says why none can come.
    """

    oldest: int
    next: int
    start: int
    positions: dict[str, int]
    notes: dict[str, str]
    subscribed: bool
    trouble: str


class JournalReading:
    """The records of a kernel's journal, in batches: ``async for records in reading``.

    It belongs to the loop that makes it, and has one reader. ``start`` is the first number (None: where the last server
    had read up to); after the number ``upto`` the reading ends, and with 0 it goes on. At most READ_AHEAD and
    flow.WINDOW bytes, and a record, wait in it. ``delivered`` is called with the highest number of each batch.

    ``holding`` makes what counts these bytes, and gets a function that ends the reading with a LinkError, from which it
    may be begun again. A large record for which there is no room is left out; ``skipped`` gets its size, and why.
    ``turn`` calls a function that takes some milliseconds, when it is this reader's turn on its loop.
    """

    def __init__(
        self,
        kernel_id: str,
        *,
        start: int | None,
        upto: int,
        delivered: Callable[[int], None] = lambda _number: None,
        holding: Callable[[Callable[[str], object]], Holding] = _count_nowhere,
        skipped: Callable[[int, str], object] = lambda _size, _reason: None,
        turn: Callable[..., Awaitable[Any]] | None = None,
    ) -> None:
        self._kernel_id = kernel_id
        self._channel = f"{wire.JOURNAL}{'' if start is None else start}:{upto}"
        self._silence = SILENCE_SECONDS if upto else None
        self._delivered, self._skipped = delivered, skipped
        self._holding = holding(self._shed)
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._turn = turn or _at_once
        # Between the two loops, under the lock.
        self._lock = threading.Lock()
        self._unparsed = bytearray()
        self._end: LinkError | bool = False  # True: the launcher has closed the stream
        self._woken = False
        self._waiting = self._withheld = 0  # bytes that were not parsed, and those for which the launcher has no credit
        # The reader's.
        self._beginning = bytearray()
        self._frames = wire.FrameReader(wire.MAX_RECORD)
        self._large = 0  # bytes that are reserved for the large record that is being read
        self._skips = 0  # bytes that follow, of a record that is left out
        self._header: JournalHeader | None = None
        self._records: list[Record] = []
        self._error: LinkError | None = None
        self._number = 0
        # The service's.
        self.paused = False
        self._closed = False
        self._streams: Streams | None = None
        self._service_loop: asyncio.AbstractEventLoop | None = None
        self._stream: int | None = None

    # -- the reader's loop -------------------------------------------------------------------

    async def header(self) -> JournalHeader:
        """The journal's header. Raises LinkError."""
        try:
            while self._header is None:
                await self._read()
        except StopAsyncIteration:
            raise LinkError(f"the reading of kernel {self._kernel_id}'s journal was closed") from None
        return self._header

    def __aiter__(self) -> JournalReading:
        return self

    async def __anext__(self) -> list[Record]:
        """The next records. Raises LinkError when the launcher is gone for good, or breaks the protocol."""
        await asyncio.sleep(0)  # in a flood there are always more
        while not self._records:
            await self._read()
        records, self._records = self._records, []
        self._delivered(self._number)
        return records

    def close(self) -> None:
        """End the reading, at any time; what waits is dropped."""
        self._closed = True
        self._arrived.set()
        self._holding.close()
        self._on_service(self._close_stream)

    def _shed(self, reason: str) -> None:
        self.close()
        self._error = LinkError(f"the journal of kernel {self._kernel_id} is not read further: {reason}")

    async def _read(self) -> None:
        """Parse what has arrived, or wait for more. Raises StopAsyncIteration at the clean end."""
        with self._lock:
            piece = bytes(self._unparsed[:SLICE])
            del self._unparsed[:SLICE]
            end = self._end
            if not self._unparsed:
                self._woken = False
                self._arrived.clear()
        if self._closed or self._error is not None:
            raise self._error or StopAsyncIteration
        try:
            await self._turn(self._parse, piece)
        except wire.WireError as error:
            self.close()
            self._error = LinkError(
                f"the journal of kernel {self._kernel_id} is not readable; its launcher sent {error}"
            )
            if not self._records:
                raise self._error from error
        if piece:
            self._took(len(piece))
            self._holding.set(self._waiting + max(self._large, self._frames.waiting))
        elif isinstance(end, LinkError):
            raise end
        elif end and (self._frames.waiting or self._skips):
            raise LinkError(f"the journal of kernel {self._kernel_id} ended inside a record")
        elif end and self._header is None:
            raise LinkError(f"the launcher of kernel {self._kernel_id} has no journal of it")
        elif end:
            raise StopAsyncIteration
        else:
            await self._wait()

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._arrived.wait(), self._silence)
        except asyncio.TimeoutError:
            self.close()
            self._error = LinkError(
                f"the journal of kernel {self._kernel_id} cannot be read: the launcher sent nothing for "
                f"{self._silence:g} s; try again when its link is up"
            )
            raise self._error from None

    def _took(self, count: int) -> None:
        """Make room for more. The service's loop is woken only where it has withheld credit."""
        with self._lock:
            self._waiting -= count
            withheld = self._withheld if self._waiting <= READ_AHEAD // 2 else 0
            self._withheld -= withheld
        if withheld:
            self._on_service(lambda: self._credit(withheld))

    # -- parsing -----------------------------------------------------------------------------

    def _parse(self, piece: bytes) -> None:
        """Raises WireError."""
        if self._header is None:
            piece = self._parse_header(piece)
        if self._skips:
            skipped = min(self._skips, len(piece))
            self._skips -= skipped
            piece = piece[skipped:]
        bodies = self._frames.feed(piece)
        self._records += map(self._record, bodies)  # also those before a bad one
        if bodies or not self._frames.waiting:
            self._large = 0
        if (size := self._frames.announced) > LARGE_RECORD and not self._large:
            self._large = self._reserve(size)

    def _reserve(self, size: int) -> int:
        """Count a large record, which is copied once, before it comes; or leave it out. Returns what is counted."""
        if self._holding.try_add(2 * size):
            return 2 * size
        self._skipped(size, self._holding.refusal())
        self._skips = size + 4 - self._frames.waiting
        self._frames = wire.FrameReader(wire.MAX_RECORD)
        return 0

    def _parse_header(self, piece: bytes) -> bytes:
        """Parse the first frame, which has a limit of its own; return what follows it. Raises WireError."""
        self._beginning += piece
        length = int.from_bytes(self._beginning[:4], "big")
        if length > MAX_HEADER:
            raise wire.WireError(f"a header of {length} bytes, and the limit is {MAX_HEADER}")
        end = 4 + length
        if len(self._beginning) < max(5, end):
            return b""
        header = self._header = _parsed_header(bytes(self._beginning[4:end]))
        self._number = header.start - 1
        self._delivered(header.next - 1)  # the next process's numbers are larger, also if none is read
        following, self._beginning = bytes(self._beginning[end:]), bytearray()
        return following

    def _record(self, body: bytes) -> Record:
        if len(body) < _RECORD_HEAD.size:
            raise wire.WireError("a record without its numbers")
        first, number = _RECORD_HEAD.unpack_from(body)
        if not self._number < first <= number < wire.MAX_NUMBER:
            raise wire.WireError(f"the record {first} to {number} behind {self._number}")
        self._number = number
        return Record(first, number, wire.unpack(body, _RECORD_HEAD.size, wire.MAX_RECORD_FRAMES))

    # -- the service's loop ------------------------------------------------------------------

    def attach(self, streams: Streams) -> None:
        """Open the stream; called once, on the service's loop."""
        self._service_loop, self._streams = asyncio.get_running_loop(), streams
        if self._closed:
            return
        self._stream = streams.open(self, self._kernel_id, self._channel)
        if self._stream is None:
            self._finish(LinkError(f"the launcher of kernel {self._kernel_id} is gone, and its journal with it"))

    def fail(self, error: LinkError) -> None:
        """There is no stream to open."""
        self._finish(error)

    def from_kernel(self, data: bytes) -> None:
        with self._lock:
            self._waiting += len(data)
            is_full = self._waiting > READ_AHEAD
            self._withheld += len(data) if is_full else 0
        self._pass(data)
        if not is_full:
            self._credit(len(data))

    def read_on(self) -> None:
        """The server sends nothing on this stream."""

    def end(self) -> None:
        gone = self._streams is not None and self._streams.over
        self._stream = None
        self._finish(
            LinkError(f"the launcher of kernel {self._kernel_id} is gone, and its journal with it") if gone else True
        )

    def abort(self) -> None:
        self._close_stream()
        self._finish(LinkError(f"the launcher of kernel {self._kernel_id} sent more than the stream's credit"))

    def _finish(self, end: LinkError | bool) -> None:
        with self._lock:
            self._end = self._end or end
        self._pass(b"")

    def _pass(self, data: bytes) -> None:
        with self._lock:
            self._unparsed += data
            wake, self._woken = not self._woken, True
        if wake:
            with contextlib.suppress(RuntimeError):  # the reader's loop is closed
                self._loop.call_soon_threadsafe(self._arrived.set)

    def _credit(self, count: int) -> None:
        if self._streams is not None and self._stream is not None:
            self._streams.took(self._stream, count)

    def _close_stream(self) -> None:
        number, self._stream = self._stream, None
        if self._streams is not None and number is not None:
            self._streams.close(number)

    def _on_service(self, action: Callable[[], None]) -> None:
        if self._service_loop is not None:
            with contextlib.suppress(RuntimeError):  # the service is closed, and the stream with it
                self._service_loop.call_soon_threadsafe(action)


async def _at_once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _parsed_header(body: bytes) -> JournalHeader:
    """Raises WireError."""
    try:
        fields: Any = load_json(body, MAX_HEADER, values=MAX_HEADER_VALUES)
    except ValueError as error:
        raise wire.WireError(f"a header that is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise wire.WireError("a header that is not a JSON object")
    numbers: list[Any] = [fields.get(name) for name in ("oldest", "start", "next")]
    oldest, start, following = numbers
    if not all(map(wire.is_number, numbers)) or not 0 < oldest <= start <= following:
        raise wire.WireError("a header with impossible numbers")
    notes = wire.Notes()
    notes.change(fields.get("notes"))
    return JournalHeader(
        oldest=oldest,
        next=following,
        start=start,
        positions=wire.checked_positions(fields.get("positions")),
        notes=notes.texts,
        subscribed=fields.get("subscribed") is True,
        trouble=str(fields.get("trouble", ""))[:1000],
    )
