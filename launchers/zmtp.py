"""One end of a ZMTP 3.0 connection (ZeroMQ RFC 23), for PUB and SUB sockets. No I/O.

The mechanism is NULL (no security): the connection is a Unix socket in a 0700 directory, a stream of the tunnel, or
loopback TCP where the kernel cannot use Unix sockets.

A connection's direction is a greeting, then frames: a byte of flags, the body's size in one byte, or in eight where
LONG is set, and the body. A message is kept as it came, as the bytes of all its frames.
"""

from __future__ import annotations

import struct

MORE, LONG, COMMAND = 1, 2, 4
GREETING_BYTES = 64
# READY holds a socket type and an identity of at most 255 bytes; PING's context has at most 16 (RFC 37).
COMMAND_LIMIT = 2048
# Commands in what is fed at once (each costs a copy of it), and bytes of answers that the far end has not taken.
MAX_COMMANDS, MAX_OUTGOING = 1000, 8 << 20
# No publisher has a message with such a frame: what arrived is no frame.
MAX_FRAME = 1 << 40
# A larger buffer is cut without a copy of it.
COPY_LIMIT = 512 * 1024
_MECHANISM = b"NULL".ljust(20, b"\0")
_size_at = struct.Struct(">Q").unpack_from


class ProtocolError(Exception):
    """What arrived is not what the other end of such a connection sends."""


def encode_frame(flags: int, body: bytes) -> bytes:
    """One frame as it goes over the connection."""
    if len(body) > 255:
        return bytes([flags | LONG]) + len(body).to_bytes(8, "big") + body
    return bytes([flags, len(body)]) + body


def encode(bodies: list[bytes]) -> bytes:
    """A message of these frames."""
    return b"".join([encode_frame(MORE, body) for body in bodies[:-1]]) + encode_frame(0, bodies[-1])


def split(message: bytes, limit: int) -> list[bytes]:
    """The bodies of a message's frames; [] where it has more than ``limit`` of them."""
    bodies: list[bytes] = []
    at, size = 0, len(message)
    while at < size and len(bodies) <= limit:
        if message[at] & LONG:
            start = at + 9
            at = start + _size_at(message, at + 1)[0]
        else:
            start = at + 2
            at = start + message[at + 1]
        bodies.append(message[start:at])
    return bodies if len(bodies) <= limit else []


class Peer:
    """One end of a connection. Bytes go in by ``feed``; ``outgoing`` holds what the caller sends.

    ``socket_type`` is this end's. A message of more than ``limit`` bytes is passed over. Any other fault of the far
    end raises ProtocolError, and the connection is of no more use.
    """

    def __init__(self, socket_type: bytes, limit: int) -> None:
        self._limit = limit
        self.ready = False  # the far end has sent READY
        self.outgoing = bytearray(b"\xff" + bytes(8) + b"\x7f\x03\x00" + _MECHANISM + bytes(32))
        # A property of READY is a name and a value, each behind its length.
        self._own_ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(socket_type)) + socket_type
        self._greeted = False
        self._buffer = bytearray()  # begins with a message, or with what is left of one
        self._at = 0  # in the buffer: the next frame
        self._needed = 0  # bytes in the buffer before a look at it is of use
        self._skip = 0  # bytes still to come of a frame that is passed over
        self._too_large = False

    def feed(self, data: bytes) -> list[bytes | None]:
        """Take what arrived and return the messages that are complete; None is one that was passed over."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self._buffer += data
        messages: list[bytes | None] = []
        if len(self._buffer) >= self._needed and (self._greeted or self._take_greeting()):
            commands = 0
            while self._walk(messages):
                commands += 1
                if commands > MAX_COMMANDS:
                    raise ProtocolError(f"more than {MAX_COMMANDS} commands at once")
            if len(self.outgoing) > MAX_OUTGOING:
                raise ProtocolError("it asks for answers, and takes none")
        return messages

    def _take_greeting(self) -> bool:
        head = bytes(self._buffer[:GREETING_BYTES])
        if len(head) < GREETING_BYTES:
            return False
        if (head[:1], head[9:10]) != (b"\xff", b"\x7f") or head[10] < 3:
            raise ProtocolError("that is no peer of ZMTP 3")
        if head[12:32] != _MECHANISM:
            raise ProtocolError(f"its mechanism is {head[12:32]!r}, not NULL")
        del self._buffer[:GREETING_BYTES]
        self._greeted = True
        self.outgoing += encode_frame(COMMAND, self._own_ready)
        return True

    def _walk(self, messages: list[bytes | None]) -> bool:  # noqa: C901 - a call per frame would cost too much
        """Take all complete frames up to a command; return whether there was one."""
        buffer = self._buffer
        size, at, start = len(buffer), self._at, 0
        if not self.ready and size and not buffer[0] & COMMAND:
            raise ProtocolError(f"{bytes(buffer[:40])!r} in place of READY")
        chunk = bytes(buffer) if size <= COPY_LIMIT else memoryview(buffer)
        self._needed, command = 0, None
        while at + 2 <= size:
            flags = chunk[at]
            if flags < LONG:
                body = at + 2
                end = body + chunk[at + 1]
            elif flags > COMMAND | LONG or flags == COMMAND | MORE:
                raise ProtocolError(f"a frame with flags {flags}")
            elif not flags & LONG:
                body = at + 2
                end = body + chunk[at + 1]
            else:
                body = at + 9
                if body > size:
                    break
                end = body + _size_at(chunk, at + 1)[0]
            if flags & COMMAND:
                command = at, body, end
                break
            if end > size:
                if self._too_large or end - start > self._limit:
                    if end - at > MAX_FRAME:
                        raise ProtocolError(f"a frame of {end - at} bytes")
                    self._too_large, self._skip, end = True, end - size, size
                    start = at = size
                    if not flags & MORE:
                        # Its last frame: the message ends with the bytes that are skipped.
                        self._too_large = False
                        messages.append(None)
                else:
                    self._needed = end - start
                break
            at = end
            if not flags & MORE:
                is_whole = not self._too_large and at - start <= self._limit
                messages.append(bytes(chunk[start:at]) if is_whole else None)
                self._too_large, start = False, at
            elif self._too_large:
                start = at
        del chunk
        if command is not None:
            at = command[0]
            if not self._take_command(*command):
                command = None
        del buffer[:start]
        self._at = at - start
        return command is not None

    def _take_command(self, at: int, body: int, end: int) -> bool:
        """Take a command out of the buffer. It is no part of a message, though it may come between its frames."""
        if end - body > COMMAND_LIMIT:
            raise ProtocolError(f"a command of {end - body} bytes")
        if end > len(self._buffer):
            return False
        command = bytes(self._buffer[body:end])
        del self._buffer[at:end]
        if self.ready:
            if command.startswith(b"\x04PING"):  # then two bytes of time to live, and a context for PONG (RFC 37)
                self.outgoing += encode_frame(COMMAND, b"\x04PONG" + command[7:23])
        elif command.startswith(b"\x05ERROR"):
            raise ProtocolError(f"the far end refuses: {command[6:100]!r}")
        elif not command.startswith(b"\x05READY"):
            raise ProtocolError(f"{command[:40]!r} in place of READY")
        else:
            self.ready = True
        return True
