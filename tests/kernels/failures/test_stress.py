"""Kernels come and go in shared allocations while everything under them breaks: at the end nothing is left."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
import signal
from typing import Any

import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.errors import GatewaySlurmError
from helpers.daemons import kill_daemon, start_daemon
from helpers.kernel_clients import READY, async_execute, install_kernelspec, job_state, jobid_of, processes_of_job
from helpers.private_slurm import jobs_of, poll, slurm
from helpers.server_processes import on_record

KERNELS = 20
AT_ONCE = 4


class Storm:
    """One seeded run: what is done is drawn from ``rng`` alone, what happened is counted."""

    def __init__(self, cluster: Any, rng: random.Random, specs: list[str]) -> None:
        self.cluster, self.rng, self.specs = cluster, rng, specs
        self.counts: collections.Counter[str] = collections.Counter()
        self.managers: list[AsyncKernelManager] = []

    async def kernel(self, number: int) -> None:
        """One kernel's life: it runs code, is interrupted, restarted or killed, and stops."""
        manager = AsyncKernelManager(kernel_name=self.rng.choice(self.specs), kernel_id=f"kernel-{number}")
        self.managers.append(manager)
        try:
            await manager.start_kernel()
            self.counts["started"] += 1
            await self._use(manager)
        except (GatewaySlurmError, RuntimeError, TimeoutError, asyncio.TimeoutError) as error:
            # Its job was cancelled under it: refused or ended, in words.
            self.counts[type(error).__name__] += 1
        await self._stop(manager)

    async def _use(self, manager: AsyncKernelManager) -> None:
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=20)
            assert await async_execute(client, "print(6 * 7)", timeout=20) == "42"
            self.counts["executed"] += 1
            match self.rng.choice(("nothing", "interrupt", "restart", "kill")):
                case "interrupt":
                    await manager.interrupt_kernel()
                case "restart":
                    await manager.restart_kernel(now=self.rng.random() < 0.5)
                    self.counts["restarted"] += 1
                case "kill":
                    process = manager.provisioner._handle.process
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                    self.counts["killed"] += 1
        finally:
            client.stop_channels()

    async def _stop(self, manager: AsyncKernelManager) -> None:
        with contextlib.suppress(RuntimeError):
            await manager.shutdown_kernel(now=self.rng.random() < 0.5)
        self.counts["stopped"] += 1

    async def break_things(self, jobids: list[str]) -> None:
        """A job is cancelled, and slurmds are killed and come back, between kernels."""
        await self._until(lambda: self.counts["stopped"] >= KERNELS // 4)
        await self._slurmd("c1")
        await self._until(lambda: self.counts["stopped"] >= KERNELS // 2)
        await asyncio.to_thread(slurm, "scancel", jobids[0], cluster=self.cluster)
        self.counts["cancelled jobs"] += 1
        await self._slurmd("c2")

    async def _slurmd(self, node: str) -> None:
        await asyncio.to_thread(kill_daemon, self.cluster, node)
        self.counts["killed slurmds"] += 1
        await asyncio.sleep(self.rng.random())
        await asyncio.to_thread(start_daemon, self.cluster, node)

    @staticmethod
    async def _until(condition: Any) -> None:
        assert await asyncio.to_thread(poll, condition, timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 12])
async def test_twenty_kernels_in_three_jobs_leave_nothing_whatever_breaks(
    admin_settings, kernelspecs, cluster, tmp_path, monkeypatch, seed
):
    """No job of ours, no process on a node, no record is left, and no other job was touched."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    service = admin_settings(release_grace=5)
    argv = ("sbatch", "--parsable", "-o/dev/null", "--wrap", "sleep 600")
    foreign = slurm(*argv, cluster=cluster).stdout.strip()
    holders = [AsyncKernelManager(kernel_name=("slurm", "slurm-direct")[number % 2]) for number in range(3)]
    await asyncio.gather(*(holder.start_kernel() for holder in holders))
    jobids = [jobid_of(holder) for holder in holders]
    specs = [f"join-{number}" for number in range(3)]
    for spec, jobid in zip(specs, jobids, strict=True):
        curve = {"metadata": {"supported_encryption": ["curve"]}} if spec == "join-2" else None
        install_kernelspec(kernelspecs, spec, config_overrides={"jobid": jobid}, spec_overrides=curve)

    storm = Storm(cluster, random.Random(seed), specs)  # noqa: S311 - a seed, so that a run can be had again
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            await storm.kernel(number)

    await asyncio.gather(storm.break_things(jobids), *map(one, range(KERNELS)))
    for holder in holders:
        with contextlib.suppress(RuntimeError):
            await holder.shutdown_kernel()

    def ours() -> list[str]:
        return [line for line in jobs_of(cluster) if not line.startswith(f"{foreign} ")]

    assert await asyncio.to_thread(poll, lambda: ours() == [], timeout=READY), ours()
    print(f"seed {seed}: {dict(sorted(storm.counts.items()))}")  # noqa: T201 - the counts, with -s
    assert storm.counts["stopped"] == KERNELS
    assert storm.counts["executed"] >= KERNELS // 2
    for jobid in jobids:
        assert await asyncio.to_thread(poll, lambda jobid=jobid: processes_of_job(jobid) == [], timeout=READY)
    assert await asyncio.to_thread(poll, lambda: on_record() == [], timeout=READY)
    assert service.kernels.handles() == []
    assert os.listdir(service._directory) == []
    assert job_state(foreign) in ("PENDING", "RUNNING")
    slurm("scancel", foreign, cluster=cluster)
