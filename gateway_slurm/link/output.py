"""Reading what a launcher has kept of a kernel's output: one stream of the tunnel, on the service's loop."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from gateway_slurm.errors import LinkError
from gateway_slurm.link import wire
from gateway_slurm.link.tunnel import Streams

# Without a byte for so long, in seconds, it is given up: there is no link, or the launcher does nothing.
SILENCE = 30.0
# The header holds clients' positions, of which a launcher remembers 1024.
HEADER_LIMIT = 8 * 1024 * 1024
_ID_LIMIT = 200
_POSITION_LIMIT = 4096


@dataclass(frozen=True)
class KeptOutput:
    """What a kernel has published that its clients were not known to have.

    ``messages`` are the frames of each, topic first, oldest first. ``dropped`` were before or between them and
    are lost; ``positions`` are what the last ACK said: for each session the message up to which it has all,
    as ``acked`` is for every client (messages up to there are not kept). ``keeps`` is False where
    the node keeps nothing, or not yet: it subscribes at the first ACK, a second after the start, or when
    the link breaks.
    """

    messages: list[list[bytes]]
    dropped: int
    positions: dict[str, str]
    acked: str = ""
    keeps: bool = True


class _Reader:
    """The stream's end at the server; see ``tunnel.StreamEnd``."""

    def __init__(self, streams: Streams, limit: int) -> None:
        self._streams = streams
        # A frame's length takes more here than on the kernel's own connection; a frame may be empty.
        self._left = 2 * limit + HEADER_LIMIT
        self._frames = wire.FrameReader(self._left)
        self.number: int | None = None
        self.paused = False
        self.records: list[bytes] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.got = 0

    def from_kernel(self, data: bytes) -> None:
        self.got += len(data)
        self._left -= len(data)
        if self._left < 0:
            self._fail("more than was to be kept")
            return
        try:
            self.records += self._frames.feed(data)
        except wire.WireError as error:
            self._fail(str(error))
            return
        if self.number is not None:
            self._streams.took(self.number, len(data))

    def read_on(self) -> None:
        """Nothing is sent on this stream."""

    def end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def abort(self) -> None:
        self._fail("more than the stream's credit")

    def _fail(self, what: str) -> None:
        if not self.over.done():
            self.over.set_exception(LinkError(f"the launcher sent {what} as a kernel's kept output"))


async def read_kept(streams: Streams, kernel_id: str, *, limit: int) -> KeptOutput:
    """Read what is kept, at most ``limit`` bytes of it.

    Raises LinkError when the launcher is gone, silent, or does not keep to that; nothing is lost then, and it
    may be read again.
    """
    reader = _Reader(streams, limit)
    reader.number = streams.open(reader, kernel_id, wire.KEPT_OUTPUT)
    if reader.number is None:
        raise LinkError(f"the launcher of kernel {kernel_id} is gone, and with it what it had kept of its output")
    try:
        await _until_over(reader, kernel_id)
    finally:
        streams.close(reader.number)
    return _parse(reader.records)


async def _until_over(reader: _Reader, kernel_id: str) -> None:
    got = -1
    while not reader.over.done():
        if reader.got == got:
            raise LinkError(f"kernel {kernel_id}'s kept output could not be read: nothing came for {SILENCE:g} s")
        got = reader.got
        await asyncio.wait([reader.over], timeout=SILENCE)
    reader.over.result()


def _parse(records: list[bytes]) -> KeptOutput:
    """The records of a stream; what a launcher says is checked here."""
    if not records:
        raise LinkError("the launcher knows no such kernel, or keeps no output")
    header, *rest = records
    try:
        fields = json.loads(header)
        messages = [wire.unpack(record) for record in rest]
        unreadable = messages.count([])
        return KeptOutput(
            messages=[message for message in messages if message],
            dropped=max(0, int(fields.get("dropped", 0))) + unreadable,
            positions=_positions(fields.get("positions")),
            acked=str(fields.get("acked", ""))[:_ID_LIMIT],
            keeps=bool(fields.get("keeps")),
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LinkError(f"the launcher sent no kept output: {error}") from error


def _positions(told: Any) -> dict[str, str]:
    pairs = told.items() if isinstance(told, dict) else ()
    return {str(key)[:_ID_LIMIT]: str(value)[:_POSITION_LIMIT] for key, value in pairs}
