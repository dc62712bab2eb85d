"""An owner's allocations: submitted, adopted by jobid, shared by their kernels, and ended by the last one.

A new allocation costs one ``sbatch``; its launcher reports that it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from gateway_slurm.allocations.keep import KeepFlags
from gateway_slurm.allocations.launcher import Launcher, LauncherSettings
from gateway_slurm.allocations.model import (
    Allocation,
    Owner,
    Place,
    QueuedStart,
    check_adoptable,
    check_time,
    not_yours,
)
from gateway_slurm.allocations.monitor import AllocationMonitor
from gateway_slurm.allocations.release import AllocationReleaser
from gateway_slurm.allocations.sharing import ForeignAllocations, Offer, choose, misfit
from gateway_slurm.allocations.start import DialAddresses, LauncherStarter
from gateway_slurm.allocations.table import OwnerContext
from gateway_slurm.allocations.walltime import WalltimeMonitor
from gateway_slurm.config import ServiceSettings
from gateway_slurm.errors import Unanswered
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.account import Account
from gateway_slurm.slurm.driver import not_adoptable
from gateway_slurm.slurm.model import JobInfo, JobSpec
from gateway_slurm.store import RENEW_SECONDS, AllocationRecord
from gateway_slurm.store.records import LauncherRecord

T = TypeVar("T")

# How long the end of the process waits for an sbatch that runs.
SUBMIT_TIMEOUT = 10.0


@dataclass(frozen=True)
class AllocationSettings:
    """The admin's settings of allocations; times are in seconds."""

    launcher: LauncherSettings
    idle_timeout: float
    min_time_left: float

    @classmethod
    def of(cls, settings: ServiceSettings) -> AllocationSettings:
        """The part of the service's settings that allocations use."""
        launcher = LauncherSettings(
            pythons=tuple(settings.launcher_python),
            log_dir=settings.log_directory,
            heartbeat=_heartbeat(settings),
            orphan_timeout=settings.orphan_timeout,
            link_timeout=settings.link_timeout,
            queue_timeout=settings.queue_timeout,
            walltime_warnings=tuple(settings.walltime_warnings),
            kept_output=settings.kept_output * 2**20,
        )
        return cls(launcher, idle_timeout=settings.idle_timeout, min_time_left=settings.min_time_left)


def _heartbeat(settings: ServiceSettings) -> float:
    """Seconds. Where other servers take over, launchers must miss a hanging server as soon as its lease is over."""
    takes_over = settings.deployment and settings.store_url
    return min(settings.heartbeat, RENEW_SECONDS) if takes_over else settings.heartbeat


def make_allocations(
    owner: Owner,
    context: OwnerContext,
    keep_flags: KeepFlags,
    settings: AllocationSettings,
    addresses: DialAddresses,
    *,
    log_end: Callable[[str], Awaitable[str]],
) -> Allocations:
    """Compose a new owner's allocations. Owners share the response socket, the watcher, keep flags and records."""
    keep_flags.add(context.table)
    releaser = AllocationReleaser(context, keep_flags, idle_timeout=settings.idle_timeout)
    walltime = WalltimeMonitor(context, warnings=settings.launcher.walltime_warnings)
    monitor = AllocationMonitor(context, keep_flags, releaser, walltime)
    starter = LauncherStarter(context, monitor, settings.launcher, addresses, log_end=log_end)
    return Allocations(context, keep_flags, releaser, monitor, starter, owner, min_time_left=settings.min_time_left)


class Allocations:
    """All allocations of one owner; its maker awaits ``close``. ``min_time_left`` is in seconds."""

    def __init__(
        self,
        context: OwnerContext,
        keep_flags: KeepFlags,
        releaser: AllocationReleaser,
        monitor: AllocationMonitor,
        starter: LauncherStarter,
        owner: Owner,
        *,
        min_time_left: float,
    ) -> None:
        self._driver, self._table, self.log = context.driver, context.table, context.log
        self._keep_flags, self._releaser, self._monitor, self._starter = keep_flags, releaser, monitor, starter
        self._owner, self._min_time_left = owner, min_time_left
        self._foreign = ForeignAllocations(
            self._driver, self._table.registry, owner=owner.name, user=owner.user, log=self.log
        )
        self._submissions: dict[asyncio.Task[None], Allocation] = {}

    def create_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a task that ``close`` cancels."""
        return self._table.create_task(coroutine)

    # -- A kernel's place --

    async def acquire(self, request: KernelRequest, account: Account, place: Place) -> tuple[Allocation, Launcher]:
        """An allocation with a place for a kernel, and the launcher there; ``release_place`` gives it back.

        Raises AllocationError, SlurmError or LauncherFailed. A call that fails or is cancelled leaves no job that it
        submitted.
        """
        allocation = await self._find(request, account)
        allocation.add_place(place)
        if allocation.jobid:
            self._table.record(allocation)  # from now on, other servers that have the job must not end it
        if request.keep_allocation:
            self._keep_flags.keep(allocation)
        try:
            if not allocation.jobid:
                await self._submit(allocation, request, account)
            place.launcher = await self._launcher(allocation, request, place)
        except BaseException:
            await asyncio.shield(self.create_task(self.release_place(allocation, place)))
            raise
        self._table.record(allocation)
        return allocation, place.launcher

    async def release_place(self, allocation: Allocation, place: Place) -> None:
        """The kernel of ``place`` is over; the last one releases the allocation."""
        await self._releaser.release_place(allocation, place)

    # -- Finding or submitting a job --

    async def _find(self, request: KernelRequest, account: Account) -> Allocation:
        """The allocation that the request names or may share; else a new one, not submitted yet."""
        if request.jobid:
            return await self._named(request.jobid)
        if request.share:
            searched = False
            while not searched or self._being_submitted(request, account):
                # Starts that come together share one job: all but one wait for it, and search again.
                while suitable := self._being_submitted(request, account):
                    await asyncio.wait(suitable)
                shared, searched = await self._shared(request, account), True
                if shared is not None:
                    return shared
        # No await from here to its submission: another start would submit a second job.
        return Allocation(ours=True, owner=self._owner.name, request=request, account=account.account)

    async def _shared(self, request: KernelRequest, account: Account) -> Allocation | None:
        """The best fit among this server's jobs, for which Slurm is not asked; else among other servers' jobs."""
        own = {allocation.jobid: allocation for allocation in self._table.listed() if allocation.ours}
        best = self._choose(request, account, [allocation.offer() for allocation in own.values()])
        if best is not None:
            return own[best.jobid]
        others = await self._foreign.offers(own) if self._driver.can_adopt else {}
        best = self._choose(request, account, [offer for offer, _info in others.values()])
        return None if best is None else self._adopted(others[best.jobid][1])

    def _being_submitted(self, request: KernelRequest, account: Account) -> set[asyncio.Task[None]]:
        """The submissions that may bring a job which suits the request."""
        offers = {task: allocation.offer() for task, allocation in self._submissions.items() if not task.done()}
        return {task for task, offer in offers.items() if not misfit(request, account.account, offer)}

    def _choose(self, request: KernelRequest, account: Account, offers: list[Offer]) -> Offer | None:
        best, lines = choose(request, account.account, offers)
        for line in lines:
            self.log.info("share: %s", line)
        return best

    async def _submit(self, allocation: Allocation, request: KernelRequest, account: Account) -> None:
        launcher, token = self._starter.register(allocation)
        allocation.identify(launcher.launcher_id)
        # On record before Slurm knows of the job: a later server finds the job by this comment, and accepts its
        # launcher.
        self._table.record(allocation)
        self._table.record_launcher(allocation, launcher)
        job = self._starter.job(launcher, token, request, account)
        submission = self.create_task(self._submit_recorded(allocation, launcher, job))
        self._submissions[submission] = allocation
        submission.add_done_callback(self._submissions.pop)
        try:
            await asyncio.shield(submission)
        except asyncio.CancelledError:
            # A start that is cancelled, however often, must learn the job's id, or it could not cancel the job.
            while not submission.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({submission})
            if not submission.cancelled():
                submission.exception()  # seen: the start is cancelled anyway
            raise
        self.log.info("job %s submitted to partition %s", allocation.jobid, request.partition)

    async def _submit_recorded(self, allocation: Allocation, launcher: Launcher, job: JobSpec) -> None:
        await self._table.registry.flushed()
        try:
            jobid = await self._driver.submit(job)
        except (Unanswered, asyncio.CancelledError):
            # There may be a job. The next server looks for it, and ends it: no start waits for it.
            allocation.lose_answer()
            self._table.record(allocation)
            self._table.mark_pending_cancel(allocation)
            raise
        self._accepted(allocation, launcher, jobid)

    def _accepted(self, allocation: Allocation, launcher: Launcher, jobid: str) -> None:
        allocation.accept(jobid)
        launcher.jobid = jobid
        self._table.add(allocation)
        assert launcher.expected is not None
        launcher.expected.jobid.set_result(jobid)
        if allocation.keep:
            self._keep_flags.keep(allocation)  # before the job's id is on record: recovery relies on it
        self._table.record(allocation)
        self._table.record_launcher(allocation, launcher)
        self._monitor.watch(allocation)

    async def _named(self, jobid: str) -> Allocation:
        """The allocation with this id: one that this server has, or one that it adopts now."""
        known = self._table.find(jobid)
        if known is None:
            if not await self._owner.may_adopt(jobid):
                raise not_yours(jobid)
            info = await self._driver.describe(jobid)
            check_adoptable(jobid, info, self._owner.user)
            if not self._driver.can_adopt:
                raise not_adoptable(jobid)
            known = self._adopted(info)
        check_time(jobid, known.seconds_left, self._min_time_left)
        return known

    def _adopted(self, info: JobInfo) -> Allocation:
        """A job that this server has not submitted; another start may have adopted it a moment ago."""
        known = self._table.find(info.jobid)
        if known is None:
            known = Allocation.adopted(info, self._owner.name)
            self._table.add(known)
            self._monitor.watch(known)
        return known

    # -- The launcher for a kernel --

    async def _launcher(self, allocation: Allocation, request: KernelRequest, place: Place) -> Launcher:
        """The launcher for this kernel, linked."""
        if not allocation.is_running and allocation.launchers:
            # The job's nodes are known once its own launcher is up.
            await self._starter.wait_for(allocation, next(iter(allocation.launchers.values())))
        elif not allocation.is_running:
            await self._starter.wait_until_running(allocation)
        place.node = allocation.choose_node(request.node)
        launcher = None if request.isolate else self._launcher_on(allocation, place.node)
        if launcher is None:
            isolated = request if request.isolate else None
            launcher, step = await self._starter.start_step(allocation, place.node, isolated)
            watching = self.create_task(self._starter.watch_step(allocation, launcher, step))
            allocation.add_step(launcher.launcher_id, watching)
        place.launcher = launcher
        await self._starter.wait_for(allocation, launcher)
        place.node = launcher.node
        return launcher

    @staticmethod
    def _launcher_on(allocation: Allocation, node: str | None) -> Launcher | None:
        """A launcher on ``node`` (None: any node) that is not isolated; one that has not dialled in yet may be it."""
        for launcher in allocation.launchers.values():
            if not launcher.isolated and (node is None or launcher.node == node):
                return launcher
        return None

    def record_launcher(self, allocation: Allocation, launcher: Launcher) -> None:
        """Put on record what the next server process needs of a launcher."""
        self._table.record_launcher(allocation, launcher)

    # -- Between server processes --

    def restore(self, record: AllocationRecord, launchers: list[LauncherRecord]) -> Allocation:
        """Restore a job of another server process with its launchers, which may dial in after ``allow_reconnect``.

        Slurm is asked about the job until they are all linked.
        """
        allocation = self._table.find(record.jobid or "")
        if allocation is None:
            allocation = Allocation.from_record(record)
            self._table.add(allocation)
        else:
            # This server has kernels in the job, too.
            older = allocation.record_key
            allocation.merge(record)
            if older != allocation.record_key:
                self._table.registry.remove_allocation(older)
        for launcher in launchers:
            self._starter.restore(allocation, launcher)
        self._monitor.watch(allocation)
        return allocation

    def allow_reconnect(self, allocation: Allocation) -> None:
        """Let the allocation's launchers dial in, now that their kernels are known."""
        self._table.record(allocation)
        for launcher in allocation.launchers.values():
            if launcher.expected is None:
                self._starter.allow_reconnect(launcher)
                self._table.record_launcher(allocation, launcher)
                if not launcher.holds_job:
                    watching = self.create_task(self._starter.watch_restored_step(allocation, launcher))
                    allocation.add_step(launcher.launcher_id, watching)
        self.create_task(self._releaser.release_unused(allocation))

    def hand_over(self, allocation: Allocation) -> None:
        """Another server has the allocation now: drop it here, without a word to Slurm or its launchers."""
        self._monitor.unwatch(allocation)
        allocation.detach()
        self._table.discard(allocation)
        for launcher in list(allocation.launchers.values()):
            self._table.hand_over_launcher(allocation, launcher)

    async def close(self, *, leave: bool = False) -> None:
        """Release every allocation, as its last kernel would, and cancel what is under way.

        With ``leave``, allocations in which kernels run, or which are kept, stay with their kernels.
        """
        if self._submissions:
            # A job that Slurm has accepted must be known here, to be ended. Slower submissions stay on record.
            await asyncio.wait(set(self._submissions), timeout=SUBMIT_TIMEOUT)
        await (self._releaser.detach_all() if leave else self._releaser.release_all())
        await self._table.close()

    # -- Requests of the owner --

    def listed(self) -> list[Allocation]:
        """The allocations with a job id that are not over. Reads memory only; any thread may call this."""
        return self._table.listed()

    def find(self, jobid: str) -> Allocation | None:
        """The allocation with this id; None for one that is over or not this owner's."""
        return self._table.find(jobid)

    def keep(self, allocation: Allocation) -> None:
        """Let it stay after its last kernel."""
        self._keep_flags.keep(allocation)

    async def release(self, allocation: Allocation) -> None:
        """Take ``keep`` back. An allocation without kernels ends, unless another step runs in it."""
        self._keep_flags.release(allocation)
        # The end goes on if the caller is cancelled.
        await asyncio.shield(self.create_task(self._releaser.release_if_empty(allocation)))

    async def cancel(self, allocation: Allocation) -> None:
        """End it now, with its kernels. Raises SlurmError when Slurm could not be asked, or refused."""
        await self._driver.cancel(allocation.jobid)
        self._keep_flags.release(allocation)
        self._monitor.ask_soon(allocation)  # Slurm will say that it is over

    def waiting(self, kernel_id: str) -> QueuedStart | None:
        """Why the kernel's start takes its time; None when it does not wait for Slurm."""
        for allocation in list(self._table.by_jobid.values()):
            if not allocation.is_running and kernel_id in allocation.kernel_ids:
                info = allocation.info
                state, reason = (info.state, info.reason) if info is not None else ("PENDING", "")
                start = info.start_time if info is not None else None
                return QueuedStart(allocation.jobid, state, reason, allocation.queue_place, start)
        return None
