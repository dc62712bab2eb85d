"""Starts by each access to Slurm: commands on this machine, over SSH, slurmrestd; and the requests of each.

The first start of a process is cold: it includes the login, or the choice of the REST interface's version.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Table, admin_settings, start, stop, write_kernelspec
from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from helpers.daemons import slurm_token
from helpers.login_node import USER, login_node
from helpers.tcp_proxy import TcpProxy, tcp_proxy_to

WAYS = ("commands", "SSH", "REST")
WARM = 2
"""Warm starts for each cold one."""


async def bench_ways(table: Table, directory: Path, cluster: PrivateCluster, runs: int) -> None:
    """Measure them in turns, so that noise affects all."""
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text(slurm_token(cluster, USER))
    with login_node() as node, tcp_proxy_to(node.port) as line:
        settings: dict[str, dict[str, object]] = {
            "commands": {},
            "SSH": {**node.settings(line.port), "relay": "auto"},
            "REST": {"cluster": cluster.rest_url, "rest_token_file": str(token)},
        }
        for _run in range(runs):
            for way in WAYS:
                with admin_settings(directory, settings[way]) as service:
                    await _measure(table, directory, way, service, line)
    for what in ("cold", "warm"):
        for way in WAYS:
            reference = f"start by {WAYS[0]}, {what}" if way != WAYS[0] else None
            table.row(f"start by {way}, {what}", "ms", reference=reference, scale=1e3)
    for what in ("cold", "warm"):
        for way, count in (("commands", "Slurm commands"), ("SSH", "SSH round trips"), ("REST", "HTTP requests")):
            table.row(f"{count}, start by {way}, {what}", "")


async def _measure(table: Table, directory: Path, way: str, service: SlurmService, line: TcpProxy) -> None:
    """One cold start and some warm ones, with a new service."""
    name = write_kernelspec(directory, "by-way", connect="tunnel")
    counted = {"commands": "Slurm commands", "SSH": "SSH round trips", "REST": "HTTP requests"}[way]
    for number in range(1 + WARM):
        what = "warm" if number else "cold"
        before = _count(service, way, line)()
        kernel, seconds = await start(name)
        table.add(f"start by {way}, {what}", seconds)
        table.add(f"{counted}, start by {way}, {what}", _count(service, way, line)() - before)
        await stop(kernel)


def _count(service: SlurmService, way: str, line: TcpProxy) -> Callable[[], int]:
    """A counter of requests; for SSH it counts round trips on the wire."""
    counts: Any = service.runner.counts
    return lambda: line.round_trips if way == "SSH" else counts.total()
