"""A subscriber's end of a connection to a kernel's iopub, by ZMTP 3.0 (ZeroMQ RFC 23). No I/O.

The mechanism is NULL (no security): the connection is a Unix socket in a 0700 directory, or loopback TCP where the
kernel cannot use one.

A connection's direction is a greeting, then frames: a byte of flags, the body's size in one byte, or in eight where
LONG is set, and the body. A message is kept as it came, as the bytes of all its frames, and is taken apart when it
is read. Only Jupyter's header frame is looked at on the way, for the message's id.
"""

from __future__ import annotations

import re

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4
# Jupyter's message: topic frames, this, signature, header, parent header, metadata, content, buffers.
DELIMITER = b"<IDS|MSG>"
HEADER_FRAME = 2  # counted from the delimiter
# READY holds a socket type and an identity of at most 255 bytes; PING's context has at most 16 (RFC 37).
COMMAND_LIMIT = 2048
HEADER_LIMIT = 16 * 1024
_MECHANISM = b"NULL".ljust(20, b"\0")
# A property of READY is a name and a value, each behind its length.
_READY = b"\x05READY" + b"\x0bSocket-Type\x00\x00\x00\x03SUB"
_MSG_ID = re.compile(rb'"msg_id"\s*:\s*"([^"\\]{1,200})"')


class ProtocolError(Exception):
    """What arrived is not what a publisher sends."""


def encode_frame(flags: int, body: bytes) -> bytes:
    """One frame as it goes over the connection."""
    if len(body) > 255:
        return bytes([flags | LONG]) + len(body).to_bytes(8, "big") + body
    return bytes([flags, len(body)]) + body


class Message:
    """A message as it came. One that was too large to be kept has an id and no frames."""

    __slots__ = ("_raw", "msg_id")

    def __init__(self, msg_id: str, raw: bytes | None) -> None:
        self.msg_id, self._raw = msg_id, raw

    @property
    def size(self) -> int:
        return len(self._raw or b"")

    @property
    def is_whole(self) -> bool:
        return self._raw is not None

    def frames(self) -> list[bytes]:
        """The bodies of its frames."""
        raw, bodies, at = self._raw or b"", [], 0
        while at < len(raw):
            head = 9 if raw[at] & LONG else 2
            end = at + head + int.from_bytes(raw[at + 1 : at + head], "big")
            bodies.append(raw[at + head : end])
            at = end
        return bodies


class Subscriber:
    """Subscribes to everything. Bytes go in by ``feed``; ``outgoing`` holds what the caller sends.

    A message of more than ``limit`` bytes is passed over, and none is kept while ``wanted`` is False. Any
    other fault of the publisher raises ProtocolError, and the connection is of no more use.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.wanted = True
        self.subscribed = False
        self.outgoing = bytearray(b"\xff" + bytes(8) + b"\x7f\x03\x00" + _MECHANISM + bytes(32))
        self._buffer = bytearray()
        self._greeted = False
        self._start = 0  # of the message in the buffer
        self._at = 0  # the next frame of it
        self._skip = 0  # bytes still to come of a frame that is passed over
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
        if flags & COMMAND:
            return self._command_frame(body, size)
        if not self.subscribed:
            raise ProtocolError(f"a frame with flags {flags} and {size} bytes in place of READY")
        return self._message_frame(flags, body, size, messages)

    def _greeting(self) -> bool:
        if len(self._buffer) < GREETING_BYTES:
            return False
        head = bytes(self._buffer[:GREETING_BYTES])
        if (head[:1], head[9:10]) != (b"\xff", b"\x7f") or head[10] < 3:
            raise ProtocolError("that is no ZMTP 3 publisher")
        if head[12:32] != _MECHANISM:
            raise ProtocolError(f"its mechanism is {head[12:32]!r}, not NULL")
        self._greeted = True
        self._start = self._at = GREETING_BYTES
        self.outgoing += encode_frame(COMMAND, _READY)
        return True

    # -- commands ---------------------------------------------------------------------------

    def _command_frame(self, body: int, size: int) -> bool:
        """A command is no part of a message, though it may come between the frames of one."""
        if size > COMMAND_LIMIT:
            raise ProtocolError(f"a command of {size} bytes")
        end = body + size
        if len(self._buffer) < end:
            return False
        self._command(bytes(self._buffer[body:end]))
        del self._buffer[self._at : end]
        return True

    def _command(self, command: bytes) -> None:
        if self.subscribed:
            if command.startswith(b"\x04PING"):  # then two bytes of time to live, and a context for PONG (RFC 37)
                self.outgoing += encode_frame(COMMAND, b"\x04PONG" + command[7:23])
        elif command.startswith(b"\x05ERROR"):
            raise ProtocolError(f"the publisher refuses: {command[6:100]!r}")
        elif not command.startswith(b"\x05READY"):
            raise ProtocolError(f"{command[:40]!r} in place of READY")
        else:
            # In ZMTP 3.0 a message: 1 and the topic, of which every topic is a beginning.
            self.outgoing += encode_frame(0, b"\x01")
            self.subscribed = True

    # -- messages ---------------------------------------------------------------------------

    def _message_frame(self, flags: int, body: int, size: int, messages: list[Message]) -> bool:
        end = body + size
        if self._too_large or end - self._start > self._limit:
            self._pass_over(end)
        elif len(self._buffer) < end:
            return False
        else:
            self._look_for_id(body, end)
            self._at = end
        if not flags & MORE:
            self._end_message(messages)
        return True

    def _look_for_id(self, body: int, end: int) -> None:
        if self._place is None:
            is_delimiter = end - body == len(DELIMITER) and self._buffer.startswith(DELIMITER, body)
            self._place = 0 if is_delimiter else None
            return
        self._place += 1
        if self._place == HEADER_FRAME and end - body <= HEADER_LIMIT:
            found = _MSG_ID.search(self._buffer, body, end)
            self._msg_id = found[1].decode(errors="replace") if found else ""

    def _pass_over(self, end: int) -> None:
        """Forget the message so far, and this frame of it as it arrives."""
        self._too_large = True
        arrived = min(end, len(self._buffer))
        self._skip = end - arrived
        del self._buffer[self._start : arrived]
        self._at = self._start

    def _end_message(self, messages: list[Message]) -> None:
        if self.wanted:
            raw = None if self._too_large else bytes(memoryview(self._buffer)[self._start : self._at])
            messages.append(Message(self._msg_id, raw))
        self._start = self._at
        self._place, self._msg_id, self._too_large = None, "", False
