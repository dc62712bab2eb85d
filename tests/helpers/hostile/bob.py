"""The user who only works: ``python -m helpers.hostile.bob URL KERNEL_ID JOBID``, the token in BOB_TOKEN.

Without a pause of note he lists his kernels, runs a cell, and starts a kernel in his job. A line on standard input ends
a time of measuring: the answer is a line of JSON, with the seconds of each by ``rest``, ``cell`` and ``start``, and
what failed. What has not been answered yet counts with the time that it has taken.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from tornado.httpclient import HTTPClientError
from tornado.websocket import WebSocketClosedError

from helpers.gateway_process import ask, start, stop
from helpers.notebook_server import V1, Frontend, Server

# Seconds between two, for each kind.
PAUSES = {"rest": 0.04, "cell": 0.08, "start": 0.7}


class Bob:
    """Three loops, each with what it has measured."""

    def __init__(self, server: Server, kernel_id: str, jobid: str) -> None:
        self._server, self._kernel_id, self._jobid = server, kernel_id, jobid
        self._seconds: dict[str, list[float]] = {kind: [] for kind in PAUSES}
        self._begun: dict[str, float] = {}
        self._failures: list[str] = []
        self._page: Frontend | None = None

    async def repeat(self, kind: str, do: Callable[[], Awaitable[None]]) -> None:
        """Measure, again and again."""
        while True:
            self._begun[kind] = time.monotonic()
            try:
                await asyncio.wait_for(do(), 60)
            except (AssertionError, HTTPClientError, WebSocketClosedError, OSError, asyncio.TimeoutError) as error:
                self._failures.append(f"{kind}: {type(error).__name__}: {error}"[:300])
                if kind == "cell":
                    self._page = None
            else:
                self._seconds[kind].append(time.monotonic() - self._begun[kind])
            del self._begun[kind]
            await asyncio.sleep(PAUSES[kind])

    async def rest(self) -> None:
        await self._server.json("GET", "/api/kernels")

    async def cell(self) -> None:
        if self._page is None:
            self._page = await Frontend.connect(self._server, self._kernel_id, V1)
        reply, printed = await self._page.execute("print(6 * 7)")
        assert (reply["status"], printed) == ("ok", "42"), (reply, printed)

    async def start(self) -> None:
        kernel_id = await start(self._server, "stub", env={"KERNEL_SLURM_JOBID": self._jobid})
        try:
            assert await ask(self._server, kernel_id, "print(1)") == "1"
        finally:
            await stop(self._server, kernel_id)

    def told(self) -> dict[str, list[float] | list[str]]:
        """All since the last time."""
        now = time.monotonic()
        told: dict[str, list[float] | list[str]] = {}
        for kind, seconds in self._seconds.items():
            waits = now - self._begun[kind] if kind in self._begun else 0.0
            told[kind] = [*seconds, waits] if waits > 0.2 else seconds
        told["failures"] = self._failures
        self._seconds, self._failures = {kind: [] for kind in PAUSES}, []
        return told


async def main(bob: Bob) -> None:
    """Work until standard input ends."""
    loops = [asyncio.ensure_future(bob.repeat(kind, getattr(bob, kind))) for kind in PAUSES]
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while await lines.readline():
        for loop in loops:
            if loop.done():
                loop.result()  # raises what ended it
        sys.stdout.write(json.dumps(bob.told()) + "\n")
        sys.stdout.flush()
    for loop in loops:
        loop.cancel()
    await asyncio.wait(loops)


if __name__ == "__main__":
    url, kernel_id, jobid = sys.argv[1:4]
    gateway = Server(None, url, os.environ["BOB_TOKEN"], Path())  # type: ignore[arg-type]
    asyncio.run(main(Bob(gateway, kernel_id, jobid)))
