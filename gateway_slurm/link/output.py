"""Read the kept output of a kernel from its launcher: one stream of the tunnel, on the service's loop."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from gateway_slurm.errors import LinkError
from gateway_slurm.link import wire
from gateway_slurm.link.tunnel import Streams

# Reading fails after so many seconds without a byte: there is no link, or the launcher hangs.
SILENCE_SECONDS = 30.0
# The header holds the positions of up to 1024 sessions (launchers/output.py).
MAX_HEADER = 8 * 1024 * 1024
_MAX_ID = 200
_MAX_POSITION = 4096


@dataclass(frozen=True)
class KeptOutput:
    """The messages of a kernel that clients have not acknowledged.

    ``messages`` holds the frames of each message, topic first, oldest message first. ``dropped`` is the number of lost
    messages before or between them. ``positions`` comes from the last ACK: for each session the last message that it
    has. ``acked`` is the last message that every client has. ``keeps`` is False if the node keeps nothing, or does not
    yet: the launcher subscribes at the first ACK, a second after the start, or when the link breaks.
    """

    messages: list[list[bytes]]
    dropped: int
    positions: dict[str, str]
    acked: str = ""
    keeps: bool = True


class _Reader:
    """The server's end of the stream; see ``tunnel.StreamEnd``."""

    def __init__(self, streams: Streams, limit: int) -> None:
        self._streams = streams
        # Twice the limit: the length of a frame takes more bytes here than on the kernel's own connection.
        self._allowance = 2 * limit + MAX_HEADER
        self._frames = wire.FrameReader(self._allowance)
        self.number: int | None = None
        self.paused = False
        self.records: list[bytes] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.received = 0  # bytes

    def from_kernel(self, data: bytes) -> None:
        self.received += len(data)
        if self.received > self._allowance:
            self._fail("more bytes than the limit allows")
            return
        try:
            self.records += self._frames.feed(data)
        except wire.WireError as error:
            self._fail(str(error))
            return
        if self.number is not None:
            self._streams.took(self.number, len(data))

    def read_on(self) -> None:
        """The server sends nothing on this stream."""

    def end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def abort(self) -> None:
        self._fail("more bytes than the stream's credit")

    def _fail(self, fault: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(
                LinkError(f"the kept output of a kernel is not readable; its launcher sent: {fault}")
            )


async def read_kept(streams: Streams, kernel_id: str, *, limit: int) -> KeptOutput:
    """Read the kept output, at most ``limit`` bytes.

    Raises LinkError if the launcher is gone or silent, or sends more or something else. Nothing is lost then: the
    output may be read again.
    """
    reader = _Reader(streams, limit)
    reader.number = streams.open(reader, kernel_id, wire.KEPT_OUTPUT)
    if reader.number is None:
        raise LinkError(f"the launcher of kernel {kernel_id} is gone, and the kept output with it")
    received = -1
    try:
        while not reader.ended.done():
            if reader.received == received:
                raise LinkError(
                    f"the kept output of kernel {kernel_id} cannot be read: the launcher sent nothing for "
                    f"{SILENCE_SECONDS:g} s; try again when its link is up"
                )
            received = reader.received
            await asyncio.wait([reader.ended], timeout=SILENCE_SECONDS)
        reader.ended.result()
    finally:
        streams.close(reader.number)
    return _parse(reader.records)


def _parse(records: list[bytes]) -> KeptOutput:
    """Parse the records of a stream, which are not trusted."""
    if not records:
        raise LinkError("the launcher does not know the kernel, or keeps no output")
    header, *rest = records
    try:
        fields = json.loads(header)
        messages = [wire.unpack(record) for record in rest]
        positions = fields.get("positions")
        pairs = positions.items() if isinstance(positions, dict) else ()
        return KeptOutput(
            messages=[message for message in messages if message],
            dropped=max(0, int(fields.get("dropped", 0))) + messages.count([]),
            positions={str(key)[:_MAX_ID]: str(value)[:_MAX_POSITION] for key, value in pairs},
            acked=str(fields.get("acked", ""))[:_MAX_ID],
            keeps=bool(fields.get("keeps")),
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LinkError(f"the launcher did not send kept output: {error}") from error
