"""The jobs of several Unix users: watched together, and what a dead server left of them ended, as each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

from gateway_slurm.errors import NotAllowed
from gateway_slurm.launching import JOB_NAME
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.model import JobInfo, StepInfo
from gateway_slurm.store import Registry


class EverybodysSlurm:
    """What the process asks Slurm about jobs of all owners; ``own`` is its own user's way there.

    ``owner_of`` knows whose a job is that this process has, or None; ``driver_of`` gives an owner's driver, or
    raises NotAllowed for one as whom nothing is run any more.
    """

    def __init__(
        self,
        own: SlurmDriver,
        registry: Registry,
        *,
        owner_of: Callable[[str], str | None],
        driver_of: Callable[[str], Awaitable[SlurmDriver]],
    ) -> None:
        self._own = own
        self._registry, self._owner_of, self._driver_of = registry, owner_of, driver_of
        self._found: dict[str, SlurmDriver] = {}

    async def jobs(self, jobids: Collection[str]) -> dict[str, JobInfo]:
        """Ask for all with one squeue.

        One that is asked for alone and not there may be a job that only its user is shown (slurm.conf,
        PrivateData): that one is asked.
        """
        found = await self._own.jobs(jobids)
        owner = self._owner_of(next(iter(jobids))) if len(jobids) == 1 and not found else None
        return await (await self._driver_of(owner)).jobs(jobids) if owner else found

    async def queue(self, partitions: Collection[str]) -> dict[str, int]:
        """Each waiting job's place in its partition's queue, as the process's own user sees it."""
        return await self._own.queue(partitions)

    async def find(self, name: str) -> dict[str, JobInfo]:
        """Ask with one squeue for each owner on record, and one for the process's own user."""
        jobs = await self._own.find(name)
        records = await asyncio.to_thread(self._registry.all_records)
        owner_of = {f"{JOB_NAME}:{record.launcher_id}": record.owner for _process, record in records}
        for owner in sorted(set(owner_of.values()) - {""}):
            try:
                driver = await self._driver_of(owner)
            except NotAllowed:
                continue
            for jobid, info in (await driver.find(name)).items():
                # Anybody may give a job of theirs any comment.
                if owner_of.get(info.comment) == owner:
                    jobs[jobid] = info
                    self._found[jobid] = driver
        return jobs

    async def steps(self, jobid: str) -> list[StepInfo]:
        """List a job's running steps as the user as whom it was found."""
        return await self._found.get(jobid, self._own).steps(jobid)

    async def cancel(self, jobid: str) -> None:
        """End a job as the user as whom it was found."""
        await self._found.get(jobid, self._own).cancel(jobid)
