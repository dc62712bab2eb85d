"""The frames that the server and the two programs on the login node exchange.

A frame has a kind, a number, a length and a payload. Needs Python 3.9 and the standard library only.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

HEAD = struct.Struct("!BII")  # kind, number, length of the payload
LENGTH = struct.Struct("!I")
PING, PONG, FAILED, INFO = 1, 2, 3, 4
RUN, RESULT, KILL, START, STARTED, ENDED, TERM, WATCH = 10, 11, 12, 13, 14, 15, 16, 17
LISTEN, LISTENING, OPEN, DATA, CLOSE, CREDIT = 20, 21, 22, 23, 24, 25

MAX_FRAME = 40 << 20  # bytes; enough for the limits of a command's stdout and stderr together
WINDOW = 4 << 20  # bytes of one relayed connection that may be under way in one direction
READ_SIZE = 256 << 10


class Frames:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield each complete frame. Raises ValueError for a frame that is too long."""
        self._buffer += data
        start = 0
        with memoryview(self._buffer) as view:
            while len(view) - start >= HEAD.size:
                kind, number, length = HEAD.unpack_from(view, start)
                if length > MAX_FRAME:
                    raise ValueError(f"the frame has {length} bytes; at most {MAX_FRAME} are accepted")
                end = start + HEAD.size + length
                if len(view) < end:
                    break
                yield kind, number, bytes(view[start + HEAD.size : end])
                start = end
        del self._buffer[:start]


def frame(kind: int, number: int, payload: bytes = b"") -> bytes:
    """Return one frame's bytes."""
    return HEAD.pack(kind, number, len(payload)) + payload


def pack(fields: dict[str, Any], *data: bytes) -> bytes:
    """Return a payload of fields and their data, each preceded by its length."""
    parts = [json.dumps(fields).encode(), *data]
    return b"".join(LENGTH.pack(len(part)) + part for part in parts)


def unpack(payload: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return the fields and data of a payload from ``pack``. Raises ValueError for other data."""
    parts, position = [], 0
    while position < len(payload):
        start = position + LENGTH.size
        position = start + count_of(payload[position:start])
        if position > len(payload):
            raise ValueError("the payload is incomplete")
        parts.append(payload[start:position])
    try:
        fields = json.loads(parts[0]) if parts else None
    except RecursionError as error:
        raise ValueError("the payload's fields are nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError("the payload has no fields")
    return fields, parts[1:]


def count_of(data: bytes) -> int:
    """Return the number in four bytes. Raises ValueError for another length."""
    if len(data) != LENGTH.size:
        raise ValueError(f"the number has {len(data)} bytes, not {LENGTH.size}")
    return int(LENGTH.unpack(data)[0])


def start_ticks(pid: int) -> str | None:
    """Return a process's start time in clock ticks since boot (proc(5), stat, field 22); None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else fields[19].decode()
