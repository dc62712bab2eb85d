"""Owners: the users whom kernels and allocations belong to. None of them sees what another one has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from gateway_slurm.allocation import Allocation, Waiting
from gateway_slurm.allocations import Allocations
from gateway_slurm.errors import UnknownJob
from gateway_slurm.insidejob import StepsInside
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
