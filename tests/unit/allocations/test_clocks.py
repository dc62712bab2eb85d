"""Times of jobs where squeue's host has another clock, and where slurmctld has moved a job's end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_slurm.allocations.identity import identity_of
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.allocations.monitor import WalltimeMonitor
from gateway_slurm.allocations.table import OwnerContext
from gateway_slurm.config import ServiceSettings
from gateway_slurm.events import Events
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.driver import CommandLineDriver
from gateway_slurm.slurm.runner import CommandResult, Runner
from helpers.kernel_clients import poll_async

LOG = logging.getLogger("test.clocks")
LIMIT = 4 * 3600


class Squeue(Runner):
    """Prints one running job of four hours, as a squeue whose host's clock is ``ahead`` of ours."""

    def __init__(self, used: float, *, ahead: float = 0.0) -> None:
        super().__init__()
        self.begun, self.end, self.ahead = int(time.time() + ahead - used), 0, ahead

    async def run(self, argv: Sequence[str], **_options: Any) -> CommandResult:
        mark = argv[-1].partition("JobID:")[2].partition(",")[0]
        used = int(time.time() + self.ahead) - self.begun
        left = time.strftime("%H:%M:%S", time.gmtime(LIMIT - used))
        end = self.end or self.begun + LIMIT
        fields = ["12", "12", "RUNNING", "None", "c1", "ada", "batch", "a", str(self.begun - 5), str(self.begun)]
        fields += [str(end), left, "4:00:00", "0", "job", "(null)"]
        return CommandResult(0, "".join(field + mark for field in fields) + "\n", "")


class Launcher:
    """Notes the warnings that it is to pass on."""

    def __init__(self, warned: list[float]) -> None:
        self.warn_of_end = warned.append


async def test_a_preemption_with_a_grace_time_is_an_early_end_and_no_other_clock() -> None:
    """slurmctld moves the end to the end of the grace time and leaves the limit; the users are warned."""
    slurm = Squeue(used=3600)
    slurm.end = int(time.time()) + 300
    driver, tasks, warned = CommandLineDriver(slurm), list[Any](), list[float]()
    info = await driver.describe("12")
    assert (info.end_time, info.start_time) == (slurm.end, slurm.begun)

    def create_task(coroutine: Any) -> asyncio.Task[Any]:
        tasks.append(asyncio.ensure_future(coroutine))
        return tasks[-1]

    table: Any = SimpleNamespace(tasks=SimpleNamespace(create_task=create_task), record=lambda _allocation: None)
    settings: Any = ServiceSettings(walltime_warnings=[10])
    context = OwnerContext("", "ada", driver, None, None, table, settings, Events(LOG), LOG)  # type: ignore[arg-type]
    allocation = Allocation(ours=True, request=KernelRequest())
    allocation.accept("12")
    launcher: Any = Launcher(warned)
    WalltimeMonitor(context).check(allocation, launcher, float(slurm.begun + LIMIT), due=False)
    try:
        assert await poll_async(lambda: warned, timeout=10)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert warned == [slurm.end]


@pytest.mark.parametrize("ahead", [7200, -7200])
async def test_another_clock_moves_a_jobs_end_and_never_its_identity(
    ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adopted job is recognised by its submit time, at every moment; a search by comment has the same times."""
    slurm = Squeue(used=60, ahead=ahead)
    driver = CommandLineDriver(slurm)
    now, found = time.time(), []
    for later in (0.0, 0.7, 1.4):
        monkeypatch.setattr("gateway_slurm.slurm.driver.time.time", lambda later=later: now + later)
        found += [await driver.describe("12"), (await driver.find(""))["12"]]
    assert {identity_of(info) for info in found} == {str(slurm.begun - 5)}
    assert [info for info in found if abs((info.end_time or 0) - (now + LIMIT - 60)) > 5] == []
