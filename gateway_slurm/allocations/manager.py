"""An owner's allocations: submitted, adopted by jobid, shared by their kernels, and ended by the last one.

A new allocation costs one ``sbatch``; its launcher reports that it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from gateway_slurm.allocations.keep import KeepFlags
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation, Place
from gateway_slurm.allocations.monitor import AllocationMonitor, WalltimeMonitor
from gateway_slurm.allocations.release import AllocationReleaser
from gateway_slurm.allocations.sharing import ForeignAllocations, Offer, choose, misfit
from gateway_slurm.allocations.start import DialAddresses, LauncherStarter
from gateway_slurm.allocations.table import OwnerContext
from gateway_slurm.errors import AllocationEnded, AllocationError, Unanswered
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.account import Account
from gateway_slurm.slurm.driver import not_adoptable
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import ClusterInfo, JobInfo, JobSpec
from gateway_slurm.store import AllocationRecord
from gateway_slurm.store.records import LauncherRecord

# How long the end of the process waits for an sbatch that runs.
SUBMIT_TIMEOUT = 10.0


class Allocations:
    """All allocations of one owner; its maker awaits ``close``.

    Owners share the response socket, the watcher, the keep flags and the records. ``may_adopt`` says whether a job
    with this id, which Slurm says is one of the Unix user's, can be the owner's. ``log_end`` reads the end of a
    launcher's log; it returns None where the log cannot be read. ``cluster_info`` asks Slurm about its
    cluster.
    """

    def __init__(
        self,
        context: OwnerContext,
        keep_flags: KeepFlags,
        addresses: DialAddresses,
        *,
        may_adopt: Callable[[str], Awaitable[bool]],
        log_end: Callable[[str], Awaitable[str | None]],
        cluster_info: Callable[[], Awaitable[ClusterInfo]],
    ) -> None:
        self._driver, self.table, self.log = context.driver, context.table, context.log
        self._owner, self._user, self._may_adopt = context.owner, context.user, may_adopt
        self._watcher, self.keep_flags, self._events = context.watcher, keep_flags, context.events
        self._min_time_left = context.settings.min_time_left
        keep_flags.tables.append(self.table)
        self.releaser = AllocationReleaser(context, keep_flags)
        self._monitor = AllocationMonitor(context, keep_flags, self.releaser, WalltimeMonitor(context))
        self._starter = LauncherStarter(context, self._monitor, addresses, log_end=log_end, cluster_info=cluster_info)
        self._foreign = ForeignAllocations(
            self._driver, self.table.registry, owner=self._owner, user=self._user, log=self.log
        )
        self._submissions: dict[asyncio.Task[None], Allocation] = {}

    # -- A kernel's place --

    async def acquire(self, request: KernelRequest, account: Account, place: Place) -> tuple[Allocation, Launcher]:
        """An allocation with a place for a kernel, and the launcher there; ``release_place`` gives it back.

        Raises AllocationError, SlurmError or LauncherFailed. A call that fails or is cancelled leaves no job that it
        submitted.
        """
        allocation = await self._find(request, account)
        allocation.add_place(place)
        if allocation.jobid:
            self.table.record(allocation)  # from now on, other servers that have the job must not end it
        if request.keep_allocation:
            self.keep_flags.keep(allocation)
        try:
            if not allocation.jobid:
                await self._submit(allocation, request, account, place)
            place.launcher = await self._launcher(allocation, request, place)
        except BaseException:
            await asyncio.shield(self.table.tasks.create_task(self.releaser.release_place(allocation, place)))
            raise
        self.table.record(allocation)
        return allocation, place.launcher

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
        return Allocation(ours=True, owner=self._owner, request=request, account=account.account)

    async def _shared(self, request: KernelRequest, account: Account) -> Allocation | None:
        """The best fit among this server's jobs, for which Slurm is not asked; else among other servers' jobs."""
        own = {allocation.jobid: allocation for allocation in self.table.listed() if allocation.ours}
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

    async def _submit(self, allocation: Allocation, request: KernelRequest, account: Account, place: Place) -> None:
        launcher = self._starter.register(allocation)
        # On record before Slurm knows of the job: a later server finds the job by this comment, and accepts its
        # launcher.
        self.table.record(allocation)
        self.table.record_launcher(allocation, launcher)
        job = self._starter.job(launcher, request, account, place)
        submission = self.table.tasks.create_task(self._submit_recorded(allocation, launcher, job))
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
        self._events.emit("allocation_submitted", **allocation.facts())

    async def _submit_recorded(self, allocation: Allocation, launcher: Launcher, job: JobSpec) -> None:
        await self.table.registry.flushed()
        try:
            jobid = await self._driver.submit(job)
        except (Unanswered, asyncio.CancelledError):
            # There may be a job. The next server looks for it, and ends it: no start waits for it.
            allocation.lose_answer()
            self.table.record(allocation)
            self.table.mark_pending_cancel(allocation)
            raise
        allocation.accept(jobid, job.name)
        launcher.set_jobid(jobid)
        self.table.add(allocation)
        if allocation.keep:
            self.keep_flags.keep(allocation)  # before the job's id is on record: recovery relies on it
        self.table.record(allocation)
        self.table.record_launcher(allocation, launcher)
        self._monitor.watch(allocation)

    async def _named(self, jobid: str) -> Allocation:
        """The allocation with this id: one that this server has, or one that it adopts now.

        Raises AllocationEnded for a job that is over, AllocationError for one that is another user's or ends too soon.
        """
        known = self.table.find(jobid)
        if known is None:
            # The error does not say whether another user's job exists: that is not every user's to know.
            text = f"jobid {jobid} is not a job of yours; name one of your own, or none"
            if not await self._may_adopt(jobid):
                raise AllocationError(text, jobid=jobid)
            info = await self._driver.describe(jobid)
            if info.user != self._user:
                raise AllocationError(text, jobid=jobid)
            if info.meaning is not Meaning.USABLE and not info.is_waiting:
                raise AllocationEnded(
                    f"job {jobid} is {info.state}: name in jobid a job that runs or waits, or leave it out for a "
                    "new one",
                    jobid=jobid,
                    state=info.state,
                )
            if not self._driver.can_adopt:
                raise not_adoptable(jobid)
            known = self._adopted(info)
        left = known.seconds_left
        if left is not None and left < self._min_time_left:
            raise AllocationError(
                f"job {jobid} (RUNNING) ends in {max(left, 0):.0f} s: too soon for a kernel "
                f"(SlurmService.min_time_left is {self._min_time_left:g} s); name another job, or none",
                jobid=jobid,
            )
        return known

    def _adopted(self, info: JobInfo) -> Allocation:
        """A job that this server has not submitted; another start may have adopted it a moment ago."""
        known = self.table.find(info.jobid)
        if known is None:
            known = Allocation.adopted(info, self._owner)
            self.table.add(known)
            self._events.emit("allocation_adopted", **known.facts(), state=info.state)
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
        # One that has not dialled in yet counts, too.
        shared = [launcher for launcher in allocation.launchers.values() if not launcher.isolated]
        found = [launcher for launcher in shared if place.node in (None, launcher.node)]
        if found and not request.isolate:
            launcher = found[0]
        else:
            isolated = request if request.isolate else None
            launcher, step = await self._starter.start_step(allocation, place.node, isolated)
            watch = self._starter.watch_step(allocation, launcher, step)
            launcher.step_watch = self.table.tasks.create_task(watch)
        place.launcher = launcher
        await self._starter.wait_for(allocation, launcher)
        place.node = launcher.node
        return launcher

    # -- Between server processes --

    def restore(self, record: AllocationRecord, launchers: list[LauncherRecord]) -> Allocation:
        """Restore a job of another server process with its launchers, which may dial in after ``allow_reconnect``.

        Slurm is asked about the job until they are all linked.
        """
        allocation = self.table.find(record.jobid or "")
        if allocation is None:
            allocation = Allocation.from_record(record)
            self.table.add(allocation)
        else:
            # This server has kernels in the job, too.
            older = allocation.record_key
            allocation.merge(record)
            if older != allocation.record_key:
                self.table.registry.remove("allocations", older)
        for launcher in launchers:
            self._starter.restore(allocation, launcher)
        self._monitor.watch(allocation)
        return allocation

    def allow_reconnect(self, allocation: Allocation) -> None:
        """Let the allocation's launchers dial in, now that their kernels are known."""
        self.table.record(allocation)
        for launcher in allocation.launchers.values():
            if launcher.expected is None:
                self._starter.allow_reconnect(launcher)
                self.table.record_launcher(allocation, launcher)
                if not launcher.holds_job:
                    watch = self._starter.watch_restored_step(allocation, launcher)
                    launcher.step_watch = self.table.tasks.create_task(watch)
        self.table.tasks.create_task(self.releaser.release_unused(allocation))

    def hand_over(self, allocation: Allocation) -> None:
        """Another server has the allocation now: drop it here, without a word to Slurm or its launchers."""
        self._watcher.unwatch(allocation.jobid)
        allocation.detach()
        self.table.discard(allocation)
        for launcher in list(allocation.launchers.values()):
            self.table.hand_over_launcher(allocation, launcher)

    async def close(self, *, leave: bool = False) -> None:
        """Release every allocation, as its last kernel would, and cancel what is under way.

        With ``leave``, allocations in which kernels run, or which are kept, stay with their kernels.
        """
        if self._submissions:
            # A job that Slurm has accepted must be known here, to be ended. Slower submissions stay on record.
            await asyncio.wait(set(self._submissions), timeout=SUBMIT_TIMEOUT)
        await self.releaser.close(leave=leave)
        await self.table.tasks.close()

    # -- Requests of the owner --

    async def release(self, allocation: Allocation) -> None:
        """Take ``keep`` back. An allocation without kernels ends, unless another step runs in it."""
        self.keep_flags.release(allocation)
        # The end goes on if the caller is cancelled.
        await asyncio.shield(self.table.tasks.create_task(self.releaser.release_if_empty(allocation)))

    async def cancel(self, allocation: Allocation) -> None:
        """End it now, with its kernels. Raises SlurmError when Slurm could not be asked, or refused."""
        await self._driver.cancel(allocation.jobid)
        self.keep_flags.release(allocation)
        self._monitor.ask_soon(allocation)  # Slurm will say that it is over
