"""Private members of tornado that the gateway uses: a websocket that stays open when a message is too large.

Tornado closes the websocket at the header of such a message, and offers nothing to refuse one message only. A page
would show no reason, and would send the same again. ``tests/unit/gateway/test_tornado_compat.py`` fails when a release
changes a member.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from tornado.util import _websocket_mask
from tornado.websocket import WebSocketHandler, WebSocketProtocol13

from gateway_slurm.budget import Holding

# Bytes of an oversized message that are kept of its beginning, and of its end.
KEPT: Final = 64 << 10
# Bytes of it that are read at once, and thrown away.
_DISCARDED: Final = 1 << 20
# Bytes of the longest control frame (RFC 6455, section 5.5).
_MAX_CONTROL: Final = 125
_NO_LIMIT: Final = 1 << 63

Oversized = Callable[[bytes, bytes, int, str], None]
MakeHolding = Callable[[], Holding]


class LimitedProtocol(WebSocketProtocol13):
    """A websocket whose oversized messages are read, thrown away and reported.

    So are messages for which there is no room: ``holding`` makes what counts the parts of a message until
    it is handled.

    ``_receive_frame`` reads one frame, by ``_read_bytes``; ``_fragmented_message_buffer`` has the frames of the message
    so far, ``_frame_mask`` is that of the frame; ``_handle_message`` gets each message and control frame, and calls the
    handler by ``_run_callback``, which logs an error and closes the websocket. A compressed websocket, with a
    ``_decompressor``, has tornado's own limit.
    """

    def __init__(self, handler: Any, params: Any, limit: int, oversized: Oversized, holding: MakeHolding) -> None:
        params.max_message_size = limit  # of decompressed messages
        super().__init__(handler, False, params)
        self._limit, self._oversized, self._make_holding = limit, oversized, holding
        self._holding: Holding | None = None
        self._left_out, self._end, self._refusal = 0, bytearray(), ""

    async def _receive_frame_loop(self) -> None:
        try:
            await super()._receive_frame_loop()
        finally:
            self._count_no_more()

    async def _receive_frame(self) -> None:
        if self._decompressor is None:
            self.params.max_message_size = _NO_LIMIT
            self.stream.max_buffer_size = max(self.stream.max_buffer_size, self._limit + 2 * _DISCARDED)
        await super()._receive_frame()
        buffer = self._fragmented_message_buffer
        if buffer is None or self._decompressor is not None:
            return
        # Frames of the size of a control frame come here uncounted.
        is_over = len(buffer) > (KEPT if self._left_out else self._limit)
        if is_over or not (self._left_out or self._has_room(len(buffer))):
            self._leave_out(bytes(buffer[KEPT:]))
            del buffer[KEPT:]

    def _leave_out(self, data: bytes) -> None:
        self._left_out += len(data)
        self._end += data[-KEPT:]
        del self._end[:-KEPT]

    async def _read_bytes(self, n: int) -> bytes:
        before = len(self._fragmented_message_buffer or b"")
        is_payload = n > _MAX_CONTROL and self._decompressor is None
        if not is_payload or (before + n <= self._limit and not self._left_out and self._has_room(before + n)):
            return await super()._read_bytes(n)
        kept = await super()._read_bytes(min(n, max(0, KEPT - before)))
        place = len(kept)
        mask = self._frame_mask or bytes(4)
        while place < n:
            data = await self.stream.read_bytes(min(n - place, _DISCARDED), partial=True)
            self._wire_bytes_in += len(data)
            shift = place % 4
            self._leave_out(_websocket_mask(mask[shift:] + mask[:shift], data))
            place += len(data)
            await asyncio.sleep(0)  # what is there already is read without a wait
        return kept

    def _has_room(self, size: int) -> bool:
        """Count a message of this size; small ones cost nothing."""
        if size <= KEPT:
            return True
        if self._holding is None:
            self._holding = self._make_holding()
        if self._holding.try_add(size - self._holding.size):
            return True
        self._refusal = self._holding.refusal()
        return False

    def _count_no_more(self, _handled: object = None) -> None:
        if self._holding is not None:
            self._holding.close()
            self._holding = None

    def _handle_message(self, opcode: int, data: bytes) -> Any:
        if opcode & 0x8:
            return super()._handle_message(opcode, data)
        self._count_no_more()  # what takes it counts it
        handled = self._handle_data(opcode, data)
        if handled is not None and not handled.done() and len(data) > KEPT:
            self._holding = self._make_holding()
            self._holding.add(len(data))
            handled.add_done_callback(self._count_no_more)
        return handled

    def _handle_data(self, opcode: int, data: bytes) -> Any:
        if not (self._left_out or (len(data) > self._limit and self._decompressor is None)):
            return super()._handle_message(opcode, data)
        self._leave_out(data[KEPT:])
        size, end = len(data[:KEPT]) + self._left_out, bytes(self._end)
        refusal, self._left_out, self._refusal = self._refusal, 0, ""
        self._end.clear()
        return self._run_callback(self._oversized, data[:KEPT], end, size, refusal)


def limit_messages(handler: WebSocketHandler, limit: int, oversized: Oversized, holding: MakeHolding) -> None:
    """Call ``oversized`` with the beginning, the end and the size of each message of more than ``limit`` bytes.

    Its last argument is why there is no room in what ``holding`` makes; empty for an oversized message.
    Call this before the websocket is open. ``get_websocket_protocol`` makes the protocol, and its parameters
    (``_WebSocketParams``) are the handler's.
    """
    make = handler.get_websocket_protocol

    def make_limited() -> Any:
        made = make()
        return (
            LimitedProtocol(handler, made.params, limit, oversized, holding)
            if isinstance(made, WebSocketProtocol13)
            else made
        )

    handler.get_websocket_protocol = make_limited  # type: ignore[method-assign]
