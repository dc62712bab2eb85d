"""The relay on a login node that does not forward ports, beside a link that dials the server directly."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.harness import Kernel, Table, admin_settings, start, stop, write_kernelspec
from gateway_slurm.service import SlurmService
from helpers.login_node import login_node

WAYS = ("tunnel", "relay")
STREAM = "for _ in range(100): print('x' * 999_999)"


async def bench_ssh(table: Table, directory: Path, runs: int) -> None:
    """Round trips and throughput of two kernels that differ in their link."""
    with login_node() as node, admin_settings(directory, {**node.settings(), "relay": "auto"}) as service:
        await _measure(table, directory, service, runs)


async def _measure(table: Table, directory: Path, service: SlurmService, runs: int) -> None:
    name = write_kernelspec(directory, "by-ssh", connect="tunnel")
    kernels: dict[str, Kernel] = {}
    for way in WAYS:
        kernels[way] = await _start(service, name, way)
        await kernels[way].subscribe()
    await _compare(table, kernels, runs)
    for kernel in kernels.values():
        await stop(kernel)
    for what, unit, scale in (("round trip", "ms", 1e3), ("100 MB stream", "s", 1.0)):
        for way in WAYS:
            reference = f"{what}, {WAYS[0]} (SSH)" if way != WAYS[0] else None
            table.row(f"{what}, {way} (SSH)", unit, reference=reference, scale=scale)


async def _start(service: SlurmService, name: str, way: str) -> Kernel:
    """A kernel in its own job, whose launcher dials the server or the relay."""
    access: Any = service.access
    if access.relay is not None:
        access.relay.was_used = way == "relay"  # its addresses come first then
    kernel, _seconds = await start(name)
    link = kernel.provisioner._handle.process.launcher.link
    by_relay = type(link._transport).__name__ == "RelayedConnection"
    assert by_relay == (way == "relay"), f"the launcher of {name} did not use the {way}"
    return kernel


async def _compare(table: Table, kernels: dict[str, Kernel], runs: int) -> None:
    """Measure both in turns, so that noise affects both."""
    for _run in range(max(runs, 7) * 3):
        for way, kernel in kernels.items():
            began = time.perf_counter()
            for _ in range(50):
                await kernel.run("1")
            table.add(f"round trip, {way} (SSH)", (time.perf_counter() - began) / 50)
    for _run in range(runs):
        for way, kernel in kernels.items():
            size, seconds = await kernel.run(STREAM)
            assert size >= 99_000_000, size
            table.add(f"100 MB stream, {way} (SSH)", seconds)
