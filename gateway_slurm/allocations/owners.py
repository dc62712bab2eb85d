"""Owners: the users that kernels and allocations belong to. No owner sees another one's.

The gateway and the command line ask about allocations here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field, fields
from typing import Any

from gateway_slurm.allocations.identity import COMMENT
from gateway_slurm.allocations.launcher import LauncherSteps
from gateway_slurm.allocations.manager import Allocations
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.errors import NotAllowed, UnknownJob
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.model import JobInfo, StepInfo
from gateway_slurm.store import Registry

LATE_LAUNCHER = "it runs without its launcher"


@dataclass(frozen=True)
class QueuedStart:
    """A start that waits in Slurm's queue, or in a running job for a late launcher."""

    jobid: str
    partition: str
    """Empty where it is not known."""
    state: str
    reason: str
    """Slurm's words, or ``LATE_LAUNCHER``."""
    advice: str
    """What to do about the reason, or what it may come from; empty where there is nothing to say."""
    queue_place: int | None
    """In its partition's queue; 1 is the next job to start."""
    expected_start: float | None
    """Slurm's estimate in seconds since the epoch; None where Slurm gives none."""


class Owners:
    """Each owner's allocations. ``make`` makes them at the owner's first request; its maker awaits ``close``.

    Lives on the service's loop. ``rows``, ``waiting`` and ``has_job`` read memory only, and any thread may call
    them. An owner of None means all owners, for admins.
    """

    def __init__(self, make: Callable[[str], Allocations], registry: Registry) -> None:
        self._make, self._registry = make, registry
        self._by_name: dict[str, Allocations] = {}

    def of(self, owner: str) -> Allocations:
        """The allocations of ``owner``; a new owner has none yet."""
        if owner not in self._by_name:
            self._by_name[owner] = self._make(owner)
        return self._by_name[owner]

    def _known(self, owner: str | None) -> list[Allocations]:
        return [allocations for name, allocations in list(self._by_name.items()) if owner is None or name == owner]

    def owner_of(self, jobid: str) -> str | None:
        """The owner of a job; None for a job that no owner has, or that is over."""
        return next((name for name, allocations in self._by_name.items() if allocations.table.find(jobid)), None)

    def steps_of(self, jobid: str) -> LauncherSteps | None:
        """Starts steps from inside the job: through the launcher that holds it, where that one is linked."""
        found = [known for allocations in self._by_name.values() if (known := allocations.table.find(jobid))]
        launchers = [launcher for allocation in found for launcher in allocation.launchers.values()]
        return next((launcher.steps for launcher in launchers if launcher.holds_job and launcher.link), None)

    async def may_adopt(self, owner: str, jobid: str, *, separate_users: bool) -> bool:
        """Whether a job that ``owner`` names can be this owner's, as far as memory and records say.

        With ``separate_users`` each owner is a Unix user of their own, and Slurm says the rest. Else all owners' jobs
        run as one Unix user: an owner other than that user may only adopt a job that is on record as theirs.
        """
        if self.owner_of(jobid) not in (owner, None):
            return False
        if separate_users:
            return True
        recorded = await asyncio.to_thread(self._registry.owners_of, jobid)
        return recorded == {owner} or (owner == "" and not recorded)

    def listed(self, owner: str | None = None) -> list[Allocation]:
        """The owner's allocations that are not over."""
        return [allocation for allocations in self._known(owner) for allocation in allocations.table.listed()]

    # -- Requests of owners and admins --

    def rows(self, owner: str | None) -> list[dict[str, Any]]:
        """``Allocation.row`` of each allocation, by job id."""
        return sorted((allocation.row() for allocation in self.listed(owner)), key=lambda row: int(row["jobid"]))

    def waiting(self, kernel_id: str, owner: str | None) -> QueuedStart | None:
        """Why a kernel's start takes its time; None when it waits neither for Slurm nor for a late launcher."""
        allocation = self._of_kernel(kernel_id, owner)
        if allocation is None or (allocation.is_running and not allocation.late):
            return None
        row = {**allocation.row(), "partition": allocation.partition}
        if allocation.is_running:
            row |= {"reason": LATE_LAUNCHER, "advice": allocation.late}
        return QueuedStart(**{item.name: row[item.name] for item in fields(QueuedStart)})

    def has_job(self, kernel_id: str, owner: str | None) -> bool:
        """Whether Slurm has accepted a job for the kernel, or the kernel has a place in another job."""
        return self._of_kernel(kernel_id, owner) is not None

    def _of_kernel(self, kernel_id: str, owner: str | None) -> Allocation | None:
        """The allocation in which the kernel has a place."""
        return next((found for found in self.listed(owner) if kernel_id in found.kernel_ids), None)

    def find(self, owner: str | None, jobid: str) -> tuple[Allocations, Allocation]:
        """The allocation with this id. Raises UnknownJob for one that is over, or not this owner's."""
        for allocations in self._known(owner):
            if allocation := allocations.table.find(jobid):
                return allocations, allocation
        raise UnknownJob(f"{jobid[:20]!r} is no allocation of yours that kernels run in")

    def keep(self, owner: str | None, jobid: str) -> None:
        """Let an allocation stay after its last kernel, until its time limit or ``release``. Raises UnknownJob."""
        allocations, allocation = self.find(owner, jobid)
        allocations.keep_flags.keep(allocation)

    async def release(self, owner: str | None, jobid: str) -> None:
        """Take ``keep`` back: the allocation ends with its last kernel, or now if it has none. Raises UnknownJob."""
        allocations, allocation = self.find(owner, jobid)
        await allocations.release(allocation)

    async def cancel(self, owner: str | None, jobid: str) -> None:
        """End an allocation now, with its kernels. Raises UnknownJob, or SlurmError when Slurm did not end it."""
        allocations, allocation = self.find(owner, jobid)
        await allocations.cancel(allocation)

    async def close(self, *, leave: bool = False) -> None:
        """Release every allocation of every owner; with ``leave`` those in which kernels run stay."""
        await asyncio.gather(*(allocations.close(leave=leave) for allocations in self._by_name.values()))


# -- Slurm for the jobs of several Unix users --


@dataclass(frozen=True)
class MultiUserSlurm:
    """What the process asks Slurm about jobs of all owners.

    Jobs are watched together as the process's own user (``driver``). What a dead server left is ended as the user
    that it was found as.
    """

    driver: SlurmDriver
    registry: Registry
    owner_of: Callable[[str], str | None]
    """Returns the owner of a job that this process has, or None."""
    driver_of: Callable[[str], Awaitable[SlurmDriver]]
    """Returns an owner's driver. Raises NotAllowed for a user that may no longer run jobs."""
    found: dict[str, SlurmDriver] = field(default_factory=dict)
    """The driver of the user that a job was found as, by job id."""

    @property
    def is_local(self) -> bool:
        return self.driver.is_local

    async def jobs(self, jobids: Collection[str]) -> dict[str, JobInfo]:
        """Ask for all with one squeue.

        A single job that is not found may be visible to its user only (slurm.conf, PrivateData): squeue then runs
        as that user, too.
        """
        found = await self.driver.jobs(jobids)
        owner = self.owner_of(next(iter(jobids))) if len(jobids) == 1 and not found else None
        return await (await self.driver_of(owner)).jobs(jobids) if owner else found

    async def queue_positions(self, partitions: Collection[str]) -> dict[str, int]:
        """Each waiting job's place in its partition's queue, as the process's own user sees it."""
        return await self.driver.queue_positions(partitions)

    async def find(self, comment: str) -> dict[str, JobInfo]:
        """Ask with one squeue for each owner on record, and one for the process's own user."""
        jobs = await self.driver.find(comment)
        records = await asyncio.to_thread(self.registry.all_allocations)
        owner_of = {f"{COMMENT}{record.launcher_id}": record.owner for _process, record in records}
        for owner in sorted(set(owner_of.values()) - {""}):
            try:
                driver = await self.driver_of(owner)
            except NotAllowed:
                continue
            for jobid, info in (await driver.find(comment)).items():
                # Any user may give a job of theirs any comment.
                if owner_of.get(info.comment) == owner:
                    jobs[jobid] = info
                    self.found[jobid] = driver
        return jobs

    async def steps(self, jobid: str) -> list[StepInfo]:
        """List a job's running steps, as the user that the job was found as."""
        return await self.found.get(jobid, self.driver).steps(jobid)

    async def cancel(self, jobid: str) -> None:
        """End a job, as the user that it was found as."""
        await self.found.get(jobid, self.driver).cancel(jobid)
