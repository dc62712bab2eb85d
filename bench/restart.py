"""Duration of a gateway's restart: until the first cell runs again, and with a thousand kernels on record."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bench.gateway import Client, ask, execute
from bench.harness import Table, write_kernelspec
from gateway_slurm.testing.processes import free_port
from scripts.demo_gateway import GATEWAY, make_token

KERNELS = 20
RESTORED = 1000
RUNS = 3
RETRY_DELAY = 0.02  # seconds between two attempts of the client; a frontend waits a second
TIMEOUT = 60.0  # seconds


class RestartedGateway:
    """Gateways that run one after the other on the same port; ``end`` ends the current one."""

    def __init__(self, directory: Path) -> None:
        self._log = directory / "restarted.log"
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.argv = [*GATEWAY, "gateway", f"--tokens={directory / 'tokens.json'}", "--ip=127.0.0.1"]
        self.argv += [f"--port={self._port}", "--SlurmGatewayApp.port_retries=0", "--allow-root"]
        self._process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start the next gateway."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(self.argv, stdout=output, stderr=output)

    def end(self, number: int = signal.SIGKILL) -> None:
        """End the gateway, by default with ``kill -9``."""
        self._process.send_signal(number)
        self._process.wait(timeout=TIMEOUT)

    def rss(self) -> int:
        """The gateway's memory (RSS) in bytes."""
        return int(psutil.Process(self._process.pid).memory_info().rss)


async def until(attempt: Callable[[], Any]) -> Any:
    """Repeat the attempt until it succeeds; return its result. After TIMEOUT seconds raise its error."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            return await attempt()
        except Exception:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(RETRY_DELAY)


async def bench_restart(table: Table, directory: Path, _runs: int) -> None:
    """Measure the first cell after a restart, and a restart with many kernels."""
    state = directory / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    os.environ["XDG_STATE_HOME"] = str(state)
    client_token = make_token(directory)
    gateway = RestartedGateway(directory)
    client = Client(gateway.url, client_token)
    gateway.start()
    try:
        await until(lambda: client.rest("GET", "/api/kernels"))
        await measure_first_cell(table, gateway, client, directory)
        await measure_many(table, gateway, client, directory)
    finally:
        gateway.end(signal.SIGTERM)


async def measure_first_cell(table: Table, gateway: RestartedGateway, client: Client, directory: Path) -> None:
    """Seconds from ``kill -9`` until a cell has run in one kernel, and in each of the kernels."""
    name = write_kernelspec(directory, "outliving", connect="tunnel")
    first = await client.start(name)
    jobid = (await client.rest("GET", f"/api/kernels/{first}"))["slurm"]["jobid"]
    name = write_kernelspec(directory, "beside", connect="tunnel", jobid=jobid)
    kernels = [first, *[await client.start(name) for _ in range(KERNELS - 1)]]

    async def run_cell(kernel_id: str) -> None:
        websocket = await client.connect(kernel_id)
        try:
            await execute(websocket, "1")
        finally:
            websocket.close()

    for _run in range(RUNS):
        gateway.end()
        began = time.perf_counter()
        gateway.start()
        await until(lambda: run_cell(first))
        table.add(f"kill -9 to the first cell, {KERNELS} kernels", time.perf_counter() - began)
        await asyncio.gather(*(until(lambda kernel_id=kernel_id: run_cell(kernel_id)) for kernel_id in kernels))  # type: ignore[misc]
        table.add(f"kill -9 to a cell in each, {KERNELS} kernels", time.perf_counter() - began)
    await asyncio.gather(*(client.rest("DELETE", f"/api/kernels/{kernel_id}") for kernel_id in kernels))
    for what in ("the first cell", "a cell in each"):
        table.row(f"kill -9 to {what}, {KERNELS} kernels", "s")


async def measure_many(table: Table, gateway: RestartedGateway, client: Client, directory: Path) -> None:
    """Seconds until all of a thousand kernels are listed, and until all of their launchers are connected again."""
    real = await client.start(write_kernelspec(directory, "copied", connect="direct"))
    before = gateway.rss()
    gateway.end()
    facts = await asyncio.to_thread(_clones)
    pipe = asyncio.subprocess.PIPE
    argv = [sys.executable, "-m", "bench.launchers"]
    stubs = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
    assert stubs.stdin is not None
    assert stubs.stdout is not None
    try:
        stubs.stdin.write(facts)
        await stubs.stdin.drain()
        began = time.perf_counter()
        gateway.start()
        listed = await until(lambda: client.rest("GET", "/api/kernels"))
        table.add(f"start until {RESTORED} kernels are listed", time.perf_counter() - began)
        assert len(listed) == RESTORED + 1, len(listed)
        while int(await asyncio.wait_for(stubs.stdout.readline(), TIMEOUT)) < RESTORED:
            pass
        table.add(f"start until {RESTORED} launchers are back", time.perf_counter() - began)
        websocket = await client.connect(real)  # the stub launchers have no channels
        await asyncio.wait_for(ask(websocket, "kernel_info_request", {}), TIMEOUT)
        websocket.close()
        table.add(f"start until the one among {RESTORED} answers", time.perf_counter() - began)
        table.add(f"gateway's memory, {RESTORED} kernels more", gateway.rss() - before)
    finally:
        stubs.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            stubs.kill()
        await stubs.wait()
    await client.rest("DELETE", f"/api/kernels/{real}")
    for what in (
        f"{RESTORED} kernels are listed",
        f"{RESTORED} launchers are back",
        f"the one among {RESTORED} answers",
    ):
        table.row(f"start until {what}", "s")
    table.row(f"gateway's memory, {RESTORED} kernels more", "MB", scale=1e-6)


def _clones() -> bytes:
    argv = [sys.executable, "-m", "bench.clones", str(RESTORED)]
    facts = subprocess.run(argv, check=True, stdout=subprocess.PIPE, timeout=TIMEOUT).stdout
    assert len(json.loads(facts)) == RESTORED
    return facts
