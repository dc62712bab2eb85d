"""The size of a ZMQ message before it is complete.

libzmq collects all frames of a message in memory, without a limit, before it gives the message to its reader: a kernel
that begins one and never ends it would take all of the server's memory.

Source: RFC 23 of ZeroMQ ("ZMTP 3.0"), sections "Overall Behavior", "Interoperability" and "Traffic". The frames of RFC
15 ("ZMTP 2.0") are the same, after a shorter greeting.
"""

from __future__ import annotations

from typing import Final

from gateway_slurm.link import wire

MAX_MESSAGE: Final = 256 << 20
"""Bytes of all frames of one message."""
MAX_FRAMES: Final = wire.MAX_RECORD_FRAMES
_GREETING, _GREETING_2 = 64, 12  # bytes, in all
_SIGNATURE, _REVISION = 0, 10  # places in the greeting
_MORE, _LONG = 0x01, 0x02
_HEAD, _LONG_HEAD = 2, 9


class MessageSizes:
    """Follows the bytes of one connection, in pieces of any size, and counts those of the message that has begun."""

    def __init__(self) -> None:
        self._skip = 0  # bytes until the next frame's head
        self._greeting = bytearray()
        self._head = bytearray()
        self._size = self._frames = 0

    def feed(self, data: bytes) -> str:
        """Take the next bytes. Returns what is too large, or ""; after that no more may be fed."""
        place = 0
        if len(self._greeting) <= _REVISION:
            place = min(len(data), _REVISION + 1 - len(self._greeting))
            self._greeting += data[:place]
            if trouble := self._check_greeting():
                return trouble
        while place < len(data):
            if self._skip:
                taken = min(self._skip, len(data) - place)
                self._skip -= taken
                place += taken
                continue
            if not self._head and place + 1 < len(data) and not data[place] & _LONG:  # most heads, in one step
                if trouble := self._begin_frame(data[place], data[place + 1]):
                    return trouble
                place += _HEAD
                continue
            self._head.append(data[place])
            place += 1
            if len(self._head) == (_LONG_HEAD if self._head[0] & _LONG else _HEAD):
                if trouble := self._begin_frame(self._head[0], int.from_bytes(self._head[1:], "big")):
                    return trouble
                self._head.clear()
        return ""

    def _check_greeting(self) -> str:
        if self._greeting[_SIGNATURE] != 0xFF:
            return "a greeting of a ZMQ before version 3"
        if len(self._greeting) > _REVISION:
            size = _GREETING if self._greeting[_REVISION] >= 3 else _GREETING_2
            self._skip = size - len(self._greeting)
        return ""

    def _begin_frame(self, flags: int, length: int) -> str:
        self._size += length
        self._frames += 1
        self._skip = length
        if self._size > MAX_MESSAGE:
            return f"a message of more than {MAX_MESSAGE >> 20} MiB"
        if self._frames > MAX_FRAMES:
            return f"a message of more than {MAX_FRAMES} frames"
        if not flags & _MORE:
            self._size = self._frames = 0
        return ""
