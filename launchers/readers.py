"""The readers of a kernel's journal: tunnel streams, each with a cursor in the ring.

Consecutive messages of one stream (stdout, stderr) that wait for a reader are sent to it as one: thousands of lines
that a cell printed one by one cost a client that is behind as much as a few.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from gateway_slurm.link import flow, wire
from launchers import zmtp
from launchers.journal import MARKER, Journal

# Messages that are looked at in one turn of the reactor. The next turn begins with reading from the kernel: it drops
# messages for a subscriber that is away for some ten milliseconds.
MAX_BATCH = 256
# Bytes up to which a message and the texts that are added to it are joined.
MAX_JOINED = 64 * 1024
# Jupyter's message: topic frames, this, signature, header, parent header, metadata, content, buffers.
DELIMITER = b"<IDS|MSG>"
_IS_STREAM = re.compile(rb'"msg_type"\s*:\s*"stream"').search
MAX_SUBSCRIPTIONS, MAX_TOPIC = 1024, 4096


class _Stream(NamedTuple):
    """A stream message that may be joined with others: its frames, the delimiter's place, and its text."""

    frames: list[bytes]
    at: int
    text: str
    key: tuple[Any, ...]  # what joined messages have in common: the topic, parent header, metadata and stream's name


class _Item:
    """A message as it is sent: one of the ring's, or several of one stream."""

    def __init__(self, number: int, message: bytes, stream: _Stream | None) -> None:
        self.first = self.number = number
        self.message, self._stream, self._is_known = message, stream, stream is not None
        self._texts: list[str] = []
        self._size = len(message)

    def join(self, message: bytes, journal: Journal) -> _Stream | None:
        """Add the message, if it continues this one's stream; else return what was found out about it."""
        if max(len(message), self._size) > MAX_JOINED or message.find(b'"stream"', 0, 2048) < 0:
            return None
        if not self._is_known:
            self._is_known, self._stream = True, _stream_of(self.message, journal)
        own, other = self._stream, _stream_of(message, journal)
        if own is None or other is None or own.key != other.key:
            return other
        self._texts.append(other.text)
        self._size += len(other.text)
        self.number += 1
        return None

    def encode(self, journal: Journal) -> bytes:
        """The message to send."""
        if not self._texts or self._stream is None:
            return self.message
        frames, at, text, key = self._stream
        content = json.dumps({"name": key[-1], "text": text + "".join(self._texts)})
        parts = [*frames[at + 2 : -1], content.encode()]
        return zmtp.encode([*frames[: at + 1], journal.sign(parts), *parts])


def _stream_of(message: bytes, journal: Journal) -> _Stream | None:
    """The message's parts; None if it is no stream message with a text alone, or not signed as the kernel signs."""
    frames = zmtp.split(message, wire.MAX_RECORD_FRAMES)
    at = len(frames) - 6
    if at < 0 or frames[at] != DELIMITER or not _IS_STREAM(frames[at + 2]):
        return None
    try:
        content = json.loads(frames[-1])
        name, text = content["name"], content["text"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if type(name) is not str or type(text) is not str or len(content) != 2:
        return None
    if not wire.same(frames[at + 1], journal.sign(frames[at + 2 :])):
        return None
    return _Stream(frames, at, text, (*frames[:at], frames[at + 3], frames[at + 4], name))


def batch(journal: Journal, cursor: int, last: int) -> tuple[int, list[tuple[int, int, bytes]]]:
    """The next messages up to the number ``last``: the number behind them, and ``(first, number, message)`` of each."""
    number, entries = journal.entries(cursor, min(MAX_BATCH, max(0, last + 1 - max(cursor, journal.oldest))))
    items: list[_Item] = []
    size = 0
    for message in entries:
        stream = None
        if items and message is not None and items[-1].number == number - 1:
            stream = items[-1].join(message, journal)
        if message is not None and not (items and items[-1].number == number):
            if size >= flow.CHUNK:
                break
            items.append(_Item(number, message, stream))
            size += len(message)
        number += 1
    return number, [(item.first, item.number, item.encode(journal)) for item in items]


class Reader:
    """Sends messages from the number ``cursor`` on over one tunnel stream, until the message ``upto`` if there is one.

    ``flush`` has the link send soon; then the readers are pumped again.
    """

    def __init__(
        self, journal: Journal, outbox: flow.Outbox, flush: Callable[[], None], number: int, cursor: int
    ) -> None:
        self._journal, self._outbox, self._flush, self._number = journal, outbox, flush, number
        self.cursor, self.moved_at = cursor, time.monotonic()
        self._upto: int | None = None
        self._is_inside = False  # a message has been sent in part
        self._is_over = False
        self._pieces = self._all_pieces()
        journal.readers[number] = self

    def pump(self) -> None:
        """Queue the next piece, if the stream has room."""
        if self._is_over or self._outbox.waiting(self._number) >= flow.BACKLOG:
            return
        try:
            piece = next(self._pieces, None)
        except MemoryError:
            # The messages that were about to be sent are lost, as their numbers tell.
            self._journal.make_room()
            piece, self._pieces = (None, self._pieces) if self._is_inside else (b"", self._all_pieces())
        if piece is None:
            self.end()
            return
        if piece:
            self._outbox.data(self._number, piece)
        if piece or self.cursor < self._journal.next:
            self._flush()

    @property
    def is_live(self) -> bool:
        """Whether it reads on without an end."""
        return self._upto is None

    def data(self, data: bytes) -> None:
        """Take what the far end sends."""

    def end(self) -> None:
        """Close the stream behind what is queued."""
        self.close()
        self._outbox.close(self._number)
        self._flush()

    def close(self) -> None:
        """The stream is over at the far end."""
        self._journal.readers.pop(self._number, None)
        self._is_over, self._pieces = True, iter(())

    def _all_pieces(self) -> Iterator[bytes]:
        """About a CHUNK each; b"" where a batch is through, or there is nothing to send."""
        waiting = bytearray()
        while True:
            waiting += self._own_bytes()
            if self._upto is not None and self.cursor > self._upto:
                break
            upto = wire.MAX_NUMBER if self._upto is None else self._upto
            before = self.cursor
            self.cursor, messages = batch(self._journal, self.cursor, upto)
            if self.cursor > before:
                self.moved_at = time.monotonic()
                self._journal.moved_on()
            for first, number, message in messages:
                for part in self._parts(first, number, message):
                    if len(part) < flow.CHUNK:
                        waiting += part
                        continue
                    self._is_inside = True
                    for at in range(0, len(part), flow.CHUNK):
                        waiting += part[at : at + flow.CHUNK]
                        yield bytes(waiting)
                        waiting.clear()
                    self._is_inside = False
                if len(waiting) >= flow.CHUNK:
                    yield bytes(waiting)
                    waiting.clear()
            message = part = b""  # while there is nothing to send, nothing large is held
            messages.clear()
            yield bytes(waiting)
            waiting.clear()
        if waiting:
            yield bytes(waiting)

    def _own_bytes(self) -> bytes:
        """What goes before the next message."""
        raise NotImplementedError

    def _parts(self, first: int, number: int, message: bytes) -> list[bytes]:
        """The message as it goes over the stream; a part that is large is sent in several pieces."""
        raise NotImplementedError


class ServerReader(Reader):
    """The server's reading: a header, then records, each behind its length (``wire.JOURNAL``)."""

    def __init__(
        self, journal: Journal, outbox: flow.Outbox, flush: Callable[[], None], number: int, channel: str
    ) -> None:
        """Raises ValueError for a channel that is malformed."""
        start, upto = channel[len(wire.JOURNAL) :].split(":")
        journal.drain()
        default = journal.positions.get(" read", journal.next - 1) + 1
        super().__init__(journal, outbox, flush, number, min(max(int(start or default), journal.oldest), journal.next))
        if int(upto):
            self._upto = min(int(upto), journal.next - 1)
        self._header = wire.frame(journal.header(self.cursor))

    def _own_bytes(self) -> bytes:
        header, self._header = self._header, b""
        return header

    def _parts(self, first: int, number: int, message: bytes) -> list[bytes]:
        frames = zmtp.split(message, wire.MAX_RECORD_FRAMES)
        if message and not frames:
            return []
        body = struct.pack(">QQ", first, number) + wire.pack(frames)
        if len(body) <= flow.CHUNK:
            return [wire.frame(body)]
        return [] if len(body) > wire.MAX_RECORD else [struct.pack(">I", len(body)), body]


class ClientReader(Reader):
    """A client's stream to iopub: this is the publisher's end of its connection, in place of the kernel's socket.

    The client gets what is published from its first subscription on. A kernel welcomes only its first subscriber (JEP
    65), and so only this launcher. So each subscriber gets a welcome of its own from here.
    """

    def __init__(self, journal: Journal, outbox: flow.Outbox, flush: Callable[[], None], number: int) -> None:
        self._peer = zmtp.Peer(b"PUB", MAX_TOPIC)
        self._topics: set[bytes] = set()
        self._welcomes = 0
        self._last = journal.next - 1  # the number up to which the client has all, or a word in its place
        super().__init__(journal, outbox, flush, number, journal.next)

    def data(self, data: bytes) -> None:
        """Take what the client sends: subscriptions. Its faults end the stream."""
        try:
            self._outbox.arrived(self._number, len(data))
            self._outbox.took(self._number, len(data))
            for message in self._peer.feed(data):
                self._subscription(b"".join(zmtp.split(message or b"\0\0", 1)))
        except (wire.WireError, zmtp.ProtocolError):
            self.end()
        else:
            self.pump()

    def pump(self) -> None:
        if not self._topics:
            self.cursor = self._journal.next
            self._last = self.cursor - 1
        super().pump()

    def _own_bytes(self) -> bytes:
        outgoing = bytes(self._peer.outgoing)
        self._peer.outgoing.clear()
        return outgoing

    def _subscription(self, body: bytes) -> None:
        """A subscription is 1 and the topic's beginning; 0 ends one (RFC 23). Other messages mean nothing."""
        topic = body[1:]
        if body[:1] == b"\0":
            self._topics.discard(topic)
        if body[:1] != b"\1" or topic in self._topics or len(self._topics) >= MAX_SUBSCRIPTIONS:
            return
        self._topics.add(topic)
        self._peer.outgoing += self._welcome(topic)

    def _welcome(self, topic: bytes) -> bytes:
        """The kernel's welcome for a subscriber to this topic, with its own id: clients take no message twice."""
        welcome = self._journal.welcome
        frames = zmtp.split(welcome or b"", 20)
        if DELIMITER not in frames[:-4]:
            return b""
        at = frames.index(DELIMITER)
        try:
            header: dict[str, Any] = json.loads(frames[at + 2])
            self._welcomes += 1
            header["msg_id"] = f"{header['msg_id']}_{self._number}_{self._welcomes}"
            content = json.dumps({"subscription": topic.decode()}).encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            return b""
        parts = [json.dumps(header).encode(), *frames[at + 3 : at + 5], content]
        return zmtp.encode([topic, DELIMITER, self._journal.sign(parts), *parts])

    def _parts(self, first: int, number: int, message: bytes) -> list[bytes]:
        missed, self._last = first - 1 - self._last, number
        if message == MARKER:
            return []
        notice = self._notice(missed, message) if missed > 0 else []
        if b"" not in self._topics:
            topic = zmtp.split(message, wire.MAX_RECORD_FRAMES)[:1]
            if not topic or not topic[0].startswith(tuple(self._topics)):
                return notice
        return [*notice, message]

    def _notice(self, missed: int, message: bytes) -> list[bytes]:
        """What the client gets in place of lost messages, under the cell of the next one."""
        frames = zmtp.split(message, 20)
        if DELIMITER not in frames[:-4]:
            return []
        at = frames.index(DELIMITER)
        header = {"msg_id": f"missed_{self._number}_{self._last}", "msg_type": "stream", "version": "5.3"}
        header.update(username="", session="", date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        content = {"name": "stderr", "text": wire.missed_text(missed)}
        parts = [json.dumps(header).encode(), frames[at + 3], b"{}", json.dumps(content).encode()]
        return [zmtp.encode([b"stream.stderr", DELIMITER, self._journal.sign(parts), *parts])]
