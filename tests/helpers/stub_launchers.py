"""Many launchers in one process, each with one running kernel: ``stub_launchers.py PORT``.

Each line of standard input describes a launcher in JSON: id, job, token, kernel id. As real launchers do, they dial
until the server accepts them. Then each reports its kernel, and stays connected until the server ends.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from typing import Any

from gateway_slurm.link import envelope, wire


async def dial(port: int, stub: dict[str, Any]) -> None:
    """Run one launcher until the server that accepted it is gone."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if await serve(reader, writer, stub):
                return
        except (OSError, asyncio.IncompleteReadError):
            pass
        await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311 - jitter


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stub: dict[str, Any]) -> bool:
    """Serve one connection; return whether the server accepted the launcher."""
    public_key = wire.parse_preamble(await reader.readexactly(wire.PREAMBLE_BYTES))
    hello = {"slurmd_nodename": "c1", "slurm_step_id": "4294967291"}
    token = bytes.fromhex(stub["token"])
    opening, seal, unseal = envelope.seal_hello(public_key, token, stub["launcher_id"], stub["jobid"], hello)
    writer.write(wire.frame(opening.encode()))
    frames = wire.FrameReader(wire.FRAME_LIMIT)
    welcomed = False
    while data := await reader.read(65536):
        for frame in frames.feed(data):
            for body in wire.unpack(unseal(frame)):
                if wire.decode(body, wire.DOWN)[0] == "WELCOME":
                    welcomed = True
                    writer.write(wire.frame(seal(wire.pack([report(stub)]))))
    writer.close()
    return welcomed


def report(stub: dict[str, Any]) -> bytes:
    """A REPORT of the running kernel."""
    kernel = {"kernel_id": stub["kernel_id"], "generation": 1, "state": "running", "pid": 1, "mode": "ipc"}
    kernel |= {"ip": "/tmp/x", "ports": {channel: 1 + n for n, channel in enumerate(wire.CHANNELS)}}
    return wire.encode("REPORT", kernels=[kernel], streams={}, opened=0)


async def main() -> None:
    """Run all launchers at the same time."""
    await asyncio.gather(*(dial(int(sys.argv[1]), json.loads(line)) for line in sys.stdin))


if __name__ == "__main__":
    asyncio.run(main())
