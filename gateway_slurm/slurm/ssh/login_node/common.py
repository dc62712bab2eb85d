"""What both programs on the login node, and the server at the other end of their channels, share: frames.

Frames go both ways: kind, number, length, payload. Needs Python 3.9, and the standard library only.
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

MAX_FRAME = 40 << 20  # bytes: a command's output and errors, both bounded, with what is said of them
MAX_TAIL = 64 << 10  # bytes of what a started command said last
WINDOW = 4 << 20  # bytes of one relayed connection that may be under way in one direction
READ_SIZE = 256 << 10


class Frames:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield each whole frame; raises ValueError for one that is too long."""
        self._buffer += data
        at = 0
        with memoryview(self._buffer) as view:
            while len(view) - at >= HEAD.size:
                kind, number, length = HEAD.unpack_from(view, at)
                if length > MAX_FRAME:
                    raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME} are taken")
                end = at + HEAD.size + length
                if len(view) < end:
                    break
                yield kind, number, bytes(view[at + HEAD.size : end])
                at = end
        del self._buffer[:at]


def frame(kind: int, number: int, payload: bytes = b"") -> bytes:
    """One frame's bytes."""
    return HEAD.pack(kind, number, len(payload)) + payload


def pack(fields: dict[str, Any], *data: bytes) -> bytes:
    """A payload of fields and the data that belong to them, each with its length before it."""
    parts = [json.dumps(fields).encode(), *data]
    return b"".join(LENGTH.pack(len(part)) + part for part in parts)


def unpack(payload: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """What ``pack`` has packed; raises ValueError for anything else."""
    parts, at = [], 0
    while at < len(payload):
        begin = at + LENGTH.size
        at = begin + count_of(payload[at:begin])
        if at > len(payload):
            raise ValueError("a payload that is cut off")
        parts.append(payload[begin:at])
    try:
        fields = json.loads(parts[0]) if parts else None
    except RecursionError as error:
        raise ValueError("a payload whose fields are too deep") from error
    if not isinstance(fields, dict):
        raise ValueError("a payload without fields")
    return fields, parts[1:]


def count_of(data: bytes) -> int:
    """The number in four bytes; raises ValueError where they are not four."""
    if len(data) != LENGTH.size:
        raise ValueError(f"a number of {len(data)} bytes, not {LENGTH.size}")
    return int(LENGTH.unpack(data)[0])


def start_ticks(pid: int) -> str | None:
    """When a process started, in clock ticks since the boot (proc(5), stat, field 22); None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else fields[19].decode()
