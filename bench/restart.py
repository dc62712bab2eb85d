"""How long a gateway's restart takes: until the first cell runs again, and with a thousand kernels on record."""

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
AGAIN = 0.02  # seconds between two attempts of a client's, here only: frontends wait a second
PATIENCE = 60.0  # seconds


class Gateway:
    """One gateway after the other on one port; ``end`` ends the last one."""

    def __init__(self, directory: Path) -> None:
        self._log = directory / "restarted.log"
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.argv = [*GATEWAY, "gateway", f"--tokens={directory / 'tokens.json'}", "--ip=127.0.0.1"]
        self.argv += [f"--port={self._port}", "--SlurmGatewayApp.port_retries=0", "--allow-root"]
        self._process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start the next one."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(self.argv, stdout=output, stderr=output)

    def end(self, number: int = signal.SIGKILL) -> None:
        """End it, by ``kill -9`` as a rule."""
        self._process.send_signal(number)
        self._process.wait(timeout=PATIENCE)

    def rss(self) -> int:
        """Bytes of memory."""
        return int(psutil.Process(self._process.pid).memory_info().rss)


async def until(attempt: Callable[[], Any]) -> Any:
    """Try again until it works, and return what it returned."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return await attempt()
        except Exception:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(AGAIN)


async def bench_restart(table: Table, directory: Path, _runs: int) -> None:
    """Both figures, each with a gateway of its own."""
    state = directory / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    os.environ["XDG_STATE_HOME"] = str(state)
    client_token = make_token(directory)
    gateway = Gateway(directory)
    client = Client(gateway.url, client_token)
    gateway.start()
    try:
        await until(lambda: client.rest("GET", "/api/kernels"))
        await measure_first_cell(table, gateway, client, directory)
        await measure_many(table, gateway, client, directory)
    finally:
        gateway.end(signal.SIGTERM)


async def measure_first_cell(table: Table, gateway: Gateway, client: Client, directory: Path) -> None:
    """From ``kill -9`` until a cell has run, and until one has run in each of the kernels."""
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
        await asyncio.gather(*(until(lambda one=one: run_cell(one)) for one in kernels))  # type: ignore[misc]
        table.add(f"kill -9 to a cell in each, {KERNELS} kernels", time.perf_counter() - began)
    await asyncio.gather(*(client.rest("DELETE", f"/api/kernels/{one}") for one in kernels))
    for what in ("the first cell", "a cell in each"):
        table.row(f"kill -9 to {what}, {KERNELS} kernels", "s")


async def measure_many(table: Table, gateway: Gateway, client: Client, directory: Path) -> None:
    """Until all of a thousand kernels are listed, and until all of their launchers are back."""
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
        while int(await asyncio.wait_for(stubs.stdout.readline(), PATIENCE)) < RESTORED:
            pass
        table.add(f"start until {RESTORED} launchers are back", time.perf_counter() - began)
        websocket = await client.connect(real)  # the copies' launchers have no channels
        await asyncio.wait_for(ask(websocket, "kernel_info_request", {}), PATIENCE)
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
    facts = subprocess.run(argv, check=True, stdout=subprocess.PIPE, timeout=PATIENCE).stdout
    assert len(json.loads(facts)) == RESTORED
    return facts
