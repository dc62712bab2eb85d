"""Owners: the users whom kernels and allocations belong to. None of them sees what another one has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from gateway_slurm.allocations.identity import JOB_NAME
from gateway_slurm.allocations.launcher import StepsInside
from gateway_slurm.allocations.manager import Allocations
from gateway_slurm.allocations.model import Allocation, Waiting
from gateway_slurm.errors import NotAllowed, UnknownJob
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.model import JobInfo, StepInfo
from gateway_slurm.store import Registry


class Owners:
    """Each owner's allocations, made by ``make`` when the owner is first met; whoever made it awaits ``close``.

    Lives on the service's loop. ``rows`` and ``waiting`` read memory only, and any thread may call them.
    """

    def __init__(self, make: Callable[[str], Allocations], registry: Registry) -> None:
        self._make, self._registry = make, registry
        self._by_name: dict[str, Allocations] = {}

    def of(self, owner: str) -> Allocations:
        """The allocations of ``owner``, none yet for one who is new."""
        if owner not in self._by_name:
            self._by_name[owner] = self._make(owner)
        return self._by_name[owner]

    def _known(self, owner: str | None) -> list[Allocations]:
        """One owner's, if there is anything of theirs; for None everybody's."""
        return [one for name, one in list(self._by_name.items()) if owner is None or name == owner]

    def owner_of(self, jobid: str) -> str | None:
        """Whose the job is; None for one that is nobody's, or over."""
        return next((name for name, one in self._by_name.items() if one.find(jobid)), None)

    def inside(self, jobid: str) -> StepsInside | None:
        """How steps are started from inside the job: by the launcher that holds it, where one of ours is linked."""
        allocation = next((found for one in self._by_name.values() if (found := one.find(jobid))), None)
        launchers = allocation.launchers.values() if allocation is not None else ()
        return next((one.inside for one in launchers if one.holds_job and one.link), None)

    async def may_adopt(self, owner: str, jobid: str, *, told_apart: bool) -> bool:
        """Whether a job that ``owner`` names can be theirs, as far as memory and records know.

        ``told_apart`` says that each owner is a user of Slurm's: then Slurm knows the rest. Else they all
        have jobs under one name, and those of an owner other than the process's user are only the ones
        on record as theirs.
        """
        if self.owner_of(jobid) not in (owner, None):
            return False
        if told_apart:
            return True
        recorded = await asyncio.to_thread(self._registry.owners_of, jobid)
        return recorded == {owner} or (owner == "" and not recorded)

    def listed(self) -> list[Allocation]:
        """Everybody's that are not over."""
        return [allocation for one in self._known(None) for allocation in one.listed()]

    # -- what owners, or admins for all of them, ask for ---------------------------------------------

    def rows(self, owner: str | None) -> list[dict[str, Any]]:
        """``Allocation.row`` of each, by job id; for None everybody's."""
        rows = [allocation.row() for one in self._known(owner) for allocation in one.listed()]
        return sorted(rows, key=lambda row: int(row["jobid"]))

    def waiting(self, kernel_id: str, owner: str | None) -> Waiting | None:
        found = (one.waiting(kernel_id) for one in self._known(owner))
        return next((waiting for waiting in found if waiting is not None), None)

    def find(self, owner: str | None, jobid: str) -> tuple[Allocations, Allocation]:
        """The allocation with this id. Raises UnknownJob for one that is over, or not this owner's."""
        for one in self._known(owner):
            allocation = one.find(jobid)
            if allocation is not None:
                return one, allocation
        raise UnknownJob(f"{jobid[:20]!r} is no allocation of yours that kernels run in")

    async def close(self, *, leave: bool = False) -> None:
        """Relinquish every allocation of every owner; with ``leave`` those in which kernels run stay."""
        await asyncio.gather(*(one.close(leave=leave) for one in self._by_name.values()))


# -- The jobs of several Unix users: watched together, and what a dead server left of them ended, as each of them. --


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

    async def queue_positions(self, partitions: Collection[str]) -> dict[str, int]:
        """Each waiting job's place in its partition's queue, as the process's own user sees it."""
        return await self._own.queue_positions(partitions)

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
