"""Stub launchers: many launchers in one process, each of which reports one running kernel.

The program reads one line of JSON: a list of objects with ``launcher_id``, ``jobid``, ``token`` (hexadecimal),
``addresses`` and ``report`` (the kernel in REPORT). It prints the number of connected launchers whenever that changes,
and runs until its input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from gateway_slurm.link import endpoints, envelope, wire

RETRY_DELAY = 0.5  # seconds


class Stub:
    """One launcher; ``run`` dials until it is cancelled."""

    connected = 0

    def __init__(self, facts: dict[str, Any]) -> None:
        self._id, self._jobid, self._token = facts["launcher_id"], facts["jobid"], bytes.fromhex(facts["token"])
        self._address = endpoints.parse_endpoint(facts["addresses"][0])
        self._report = facts["report"]

    async def run(self) -> None:
        """Dial, stay connected until the link ends, and dial again."""
        assert self._address is not None
        while True:
            try:
                reader, writer = await asyncio.open_connection(*self._address)
            except OSError:
                await asyncio.sleep(RETRY_DELAY)
                continue
            try:
                await self._serve(reader, writer)
            except (OSError, EOFError):
                await asyncio.sleep(RETRY_DELAY)
            finally:
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = wire.parse_preamble(await reader.readexactly(wire.PREAMBLE_BYTES))
        opening, seal, unseal = envelope.seal_hello(key, self._token, self._id, self._jobid, {"pid": 1})
        writer.write(wire.frame(opening.encode()))
        frames = wire.FrameReader(wire.FRAME_LIMIT)
        beating: asyncio.Task[None] | None = None
        try:
            while data := await reader.read(1 << 16):
                for body in [body for frame in frames.feed(data) for body in wire.unpack(unseal(frame))]:
                    name, _payload = wire.decode(body, wire.DOWN)
                    if name == "WELCOME":
                        report = wire.encode("REPORT", kernels=[self._report], streams={}, last_opened=0)
                        writer.write(wire.frame(seal(wire.pack([report]))))
                        beating = asyncio.ensure_future(_beat(writer, seal))
                        _count(1)
        finally:
            if beating is not None:
                beating.cancel()
                _count(-1)
        raise EOFError


async def _beat(writer: asyncio.StreamWriter, seal: envelope.Sealing) -> None:
    while True:
        await asyncio.sleep(10)
        writer.write(wire.frame(seal(wire.pack([wire.encode("HEARTBEAT")]))))


def _count(change: int) -> None:
    Stub.connected += change
    print(Stub.connected, flush=True)


async def main() -> None:
    """Run all stub launchers."""
    loop = asyncio.get_running_loop()
    facts = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    stubs = [asyncio.ensure_future(Stub(item).run()) for item in facts]
    await loop.run_in_executor(None, sys.stdin.read)
    for stub in stubs:
        stub.cancel()
    await asyncio.gather(*stubs, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
