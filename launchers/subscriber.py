"""A subscriber's end of a connection to a kernel's iopub, by ZMTP 3.0 (ZeroMQ RFC 23). No I/O.

A message is kept as it came, as the bytes of all its frames, and taken apart when somebody wants it: with
CURVE it is also opened then. Only Jupyter's header frame is looked at on the way, for the message's id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from gateway_slurm.link.zmtp_frames import COMMAND, DELIMITER, GREETING_BYTES, HEADER_FRAME, LONG, MORE, encode_frame

# READY holds a socket type and an identity of at most 255 bytes; PING's context has at most 16 (RFC 37).
COMMAND_LIMIT = 2048
# So much of a body shows its frame's flags, and whether it is Jupyter's delimiter, whatever the mechanism.
BEGINNING = 96
HEADER_LIMIT = 16 * 1024
_MSG_ID = re.compile(rb'"msg_id"\s*:\s*"([^"\\]{1,200})"')


class ProtocolError(Exception):
    """What arrived is not what a publisher sends."""


class Mechanism(Protocol):
    """How the two ends make sure of each other (RFC 23: NULL; RFC 26: CURVE), and what frames then look like."""

    name: bytes
    ready: bool

    def begin(self) -> bytes:
        """Our first command, once the greetings are exchanged."""

    def take(self, command: bytes) -> bytes:
        """The publisher's next command of the handshake; return ours. Sets ``ready`` at its end."""

    def outgoing(self, flags: int, body: bytes) -> bytes:
        """A frame of ours."""

    def look(self, flags: int, beginning: bytes) -> tuple[int, bytes]:
        """The flags of one of the publisher's frames, and the first bytes of what it says."""

    def said(self, size: int) -> int:
        """How many bytes a frame says whose body has ``size``."""

    def open(self, body: bytes) -> bytes:
        """What a frame of the publisher's says; raises ProtocolError when it is not the publisher's."""


def metadata() -> bytes:
    """What each end says of itself: a property is a name and a value, each behind its length."""
    return b"\x0bSocket-Type\x00\x00\x00\x03SUB"


class Null:
    """No security: for Unix sockets in a 0700 directory, and loopback where a kernel can do no better."""

    name = b"NULL"

    def __init__(self) -> None:
        self.ready = False

    def begin(self) -> bytes:
        return encode_frame(COMMAND, b"\x05READY" + metadata())

    def take(self, command: bytes) -> bytes:
        if not command.startswith(b"\x05READY"):
            raise ProtocolError(f"{command[:40]!r} in place of READY")
        self.ready = True
        return b""

    def outgoing(self, flags: int, body: bytes) -> bytes:
        return encode_frame(flags, body)

    def look(self, flags: int, beginning: bytes) -> tuple[int, bytes]:
        return flags, beginning

    def said(self, size: int) -> int:
        return size

    def open(self, body: bytes) -> bytes:
        return body


class Message:
    """A message as it came. One that was too large to be kept has an id and no frames."""

    __slots__ = ("_mechanism", "_raw", "msg_id")

    def __init__(self, msg_id: str, raw: bytes | None, mechanism: Mechanism) -> None:
        self.msg_id, self._raw, self._mechanism = msg_id, raw, mechanism

    @property
    def size(self) -> int:
        return len(self._raw or b"")

    @property
    def is_whole(self) -> bool:
        return self._raw is not None

    def frames(self) -> list[bytes]:
        """What its frames say; raises ProtocolError for one that the publisher's key does not open."""
        return [self._mechanism.open(body) for body in _bodies(self._raw or b"")]


def _bodies(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        head = 9 if raw[at] & LONG else 2
        end = at + head + int.from_bytes(raw[at + 1 : at + head], "big")
        yield raw[at + head : end]
        at = end


class Subscriber:
    """Subscribes to everything. Bytes go in by ``feed``; what is to be sent is in ``outgoing``.

    A message of more than ``limit`` bytes is passed over, and none is kept while ``wanted`` is False. Any
    other fault of the publisher's raises ProtocolError, and the connection is of no more use.
    """

    def __init__(self, mechanism: Mechanism, limit: int) -> None:
        self._mechanism, self._limit = mechanism, limit
        self.wanted = True
        self.subscribed = False
        self.outgoing = bytearray(b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.name.ljust(20, b"\0") + bytes(32))
        self._buffer = bytearray()
        self._greeted = False
        self._start = 0  # of the message in the buffer
        self._at = 0  # the next frame of it
        self._skip = 0  # bytes that a frame that is passed over still lacks
        self._too_large = False
        self._place: int | None = None  # frames since the delimiter
        self._msg_id = ""

    def feed(self, data: bytes) -> list[Message]:
        """Take what arrived and return the messages that are complete."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self._buffer += data
        messages: list[Message] = []
        while not self._skip and self._step(messages):
            pass
        del self._buffer[: self._start]
        self._at -= self._start
        self._start = 0
        return messages

    def _step(self, messages: list[Message]) -> bool:
        """Take the next frame; False until more has arrived."""
        if not self._greeted:
            return self._greeting()
        buffer, at = self._buffer, self._at
        if len(buffer) < at + 2:
            return False
        flags = buffer[at]
        if flags > MORE | LONG | COMMAND or flags & (MORE | COMMAND) == MORE | COMMAND:
            raise ProtocolError(f"a frame with flags {flags}")
        body = at + (9 if flags & LONG else 2)
        if len(buffer) < body:
            return False
        size = int.from_bytes(buffer[at + 1 : body], "big")
        if not self._mechanism.ready:
            return self._handshake_frame(flags, body, size)
        return self._message_frame(flags, body, size, messages)

    def _greeting(self) -> bool:
        if len(self._buffer) < GREETING_BYTES:
            return False
        head = bytes(self._buffer[:GREETING_BYTES])
        if (head[:1], head[9:10]) != (b"\xff", b"\x7f") or head[10] < 3:
            raise ProtocolError("that is no ZMTP 3 publisher")
        if head[12:32].rstrip(b"\0") != self._mechanism.name:
            raise ProtocolError(f"its mechanism is {head[12:32]!r}, not {self._mechanism.name!r}")
        self._greeted = True
        self._start = self._at = GREETING_BYTES
        self.outgoing += self._mechanism.begin()
        return True

    def _handshake_frame(self, flags: int, body: int, size: int) -> bool:
        if not flags & COMMAND or size > COMMAND_LIMIT:
            raise ProtocolError(f"a frame with flags {flags} and {size} bytes in place of a command")
        if len(self._buffer) < body + size:
            return False
        command = bytes(self._buffer[body : body + size])
        self._start = self._at = body + size
        if command.startswith(b"\x05ERROR"):
            raise ProtocolError(f"the publisher refuses: {command[6:100]!r}")
        self.outgoing += self._mechanism.take(command)
        if self._mechanism.ready:
            # In ZMTP 3.0 a message: 1 and the topic, of which every topic is a beginning.
            self.outgoing += self._mechanism.outgoing(0, b"\x01")
            self.subscribed = True
        return True

    # -- messages ---------------------------------------------------------------------------

    def _command(self, command: bytes) -> None:
        """A command after the handshake is no part of a message, though it may come between its frames."""
        if command.startswith(b"\x04PING"):  # then two bytes of time to live and a context to be sent back (RFC 37)
            self.outgoing += self._mechanism.outgoing(COMMAND, b"\x04PONG" + command[7:23])

    def _message_frame(self, flags: int, body: int, size: int, messages: list[Message]) -> bool:
        end = body + size
        too_large = self._too_large or end - self._start > self._limit
        if len(self._buffer) < (min(end, body + BEGINNING) if too_large else end):
            return False
        flags, beginning = self._mechanism.look(flags, bytes(self._buffer[body : min(end, body + BEGINNING)]))
        if flags & COMMAND:
            if too_large or size > COMMAND_LIMIT:
                raise ProtocolError(f"a command of {size} bytes")
            self._command(self._mechanism.open(bytes(self._buffer[body:end])))
            del self._buffer[self._at : end]
            return True
        if not too_large:
            self._look_for_id(body, size, beginning)
        if too_large:
            self._pass_over(end)
        else:
            self._at = end
        if not flags & MORE:
            self._end_message(messages)
        return True

    def _look_for_id(self, body: int, size: int, beginning: bytes) -> None:
        if self._place is None:
            # A topic that begins like the delimiter, and is longer, is none.
            is_delimiter = beginning.startswith(DELIMITER) and self._mechanism.said(size) == len(DELIMITER)
            self._place = 0 if is_delimiter else None
            return
        self._place += 1
        if self._place == HEADER_FRAME and size <= HEADER_LIMIT:
            found = _MSG_ID.search(self._mechanism.open(bytes(self._buffer[body : body + size])))
            self._msg_id = found[1].decode(errors="replace") if found else ""

    def _pass_over(self, end: int) -> None:
        """Forget the message so far, and this frame of it as it arrives."""
        self._too_large = True
        here = min(end, len(self._buffer))
        self._skip = end - here
        del self._buffer[self._start : here]
        self._at = self._start

    def _end_message(self, messages: list[Message]) -> None:
        if self.wanted:
            raw = None if self._too_large else bytes(memoryview(self._buffer)[self._start : self._at])
            messages.append(Message(self._msg_id, raw, self._mechanism))
        self._start = self._at
        self._place, self._msg_id, self._too_large = None, "", False
