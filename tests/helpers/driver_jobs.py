"""Jobs for tests of the drivers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest

from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import JobInfo, JobSpec

SLEEP = "#!/bin/sh\nexec sleep 300\n"
WITHIN = 30.0
Answer = TypeVar("Answer")


async def until(ask: Callable[[], Awaitable[Answer]], accept: Callable[[Answer], bool]) -> Answer:
    """Repeat a question until its answer is accepted; return the answer."""
    deadline = asyncio.get_running_loop().time() + WITHIN
    while not accept(answer := await ask()):
        assert asyncio.get_running_loop().time() < deadline, f"still {answer}"
        await asyncio.sleep(0.05)
    return answer


class Jobs:
    """Submits jobs and remembers their ids."""

    def __init__(self, driver: SlurmDriver) -> None:
        self.driver = driver
        self.ids: list[str] = []

    async def submit(self, script: str = SLEEP, **spec: object) -> str:
        """Submit a job; return its id."""
        options = {"name": "test", "time": 5, "memory": "50M", **spec}
        jobid = await self.driver.submit(JobSpec(script=script, **options))  # type: ignore[arg-type]
        self.ids.append(jobid)
        return jobid

    async def reaches(self, jobid: str, *meanings: Meaning) -> JobInfo:
        """Wait until the job's state has one of these meanings; return the job."""
        return await until(lambda: self.driver.describe(jobid), lambda info: info.meaning in meanings)

    async def running(self, **spec: object) -> str:
        """Submit a job, and return its id when it runs."""
        jobid = await self.submit(**spec)  # type: ignore[arg-type]
        await self.reaches(jobid, Meaning.USABLE)
        return jobid


@asynccontextmanager
async def submitting(driver: SlurmDriver) -> AsyncIterator[Jobs]:
    """Jobs that are cancelled at the end of the block."""
    jobs = Jobs(driver)
    try:
        yield jobs
    finally:
        for jobid in jobs.ids:
            await driver.cancel(jobid)


async def failure(awaitable: Awaitable[object]) -> GatewaySlurmError:
    """The GatewaySlurmError that it raises."""
    with pytest.raises(GatewaySlurmError) as caught:
        await awaitable
    return caught.value
