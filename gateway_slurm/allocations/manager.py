"""Allocations: submitted, adopted by jobid, shared by their kernels, relinquished by the last one.

Lives on the service's loop. Slurm is told of a new allocation by one ``sbatch``; that it runs we
learn from its launcher. Slurm is asked only about jobs that wait or whose link broke.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from gateway_slurm.allocations.identity import identity_of
from gateway_slurm.allocations.keep import Keeping
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import (
    Allocation,
    Books,
    Owner,
    Place,
    Waiting,
    check_adoptable,
    check_time,
    not_yours,
    restored_allocation,
    take_over,
)
from gateway_slurm.allocations.release import Leaving
from gateway_slurm.allocations.sharing import Elsewhere, Offer, choose, misfit
from gateway_slurm.allocations.start import Launching
from gateway_slurm.errors import AllocationEnded, Unanswered
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.account import Account
from gateway_slurm.slurm.driver import SlurmDriver, not_adoptable
from gateway_slurm.slurm.formats import Meaning, meaning
from gateway_slurm.slurm.model import JobInfo, JobSpec
from gateway_slurm.slurm.watcher import JobWatcher
from gateway_slurm.store import AllocationRecord
from gateway_slurm.store.records import LauncherRecord

# How long the end of the process waits for an sbatch that runs.
SUBMIT_SECONDS = 10.0


class Allocations:
    """All allocations of one owner; whoever made it awaits ``close``. ``min_time_left`` is in seconds."""

    def __init__(
        self,
        driver: SlurmDriver,
        watcher: JobWatcher,
        launching: Launching,
        leaving: Leaving,
        keeping: Keeping,
        books: Books,
        *,
        owner: Owner,
        min_time_left: float,
        log: logging.Logger,
    ) -> None:
        self._owner = owner
        self._elsewhere = Elsewhere(driver, books.registry, owner.name, owner.user, log)
        self._driver, self._watcher, self._launching, self._leaving = driver, watcher, launching, leaving
        self._keeping, self._books, self._min_time_left, self.log = keeping, books, min_time_left, log
        self.leave, self.own, self.record_launcher = leaving.leave, books.own, launching.record
        self._submissions: dict[asyncio.Task[None], Allocation] = {}

    # -- acquire ----------------------------------------------------------------------------

    async def acquire(self, request: KernelRequest, account: Account, place: Place) -> tuple[Allocation, Launcher]:
        """An allocation with a place for a kernel, and the launcher there; ``leave`` gives it back.

        Raises AllocationError, SlurmError or LauncherFailed; cancelled or failed, it leaves no job
        that it made.
        """
        allocation = await self._find(request, account)
        allocation.places.add(place)
        if allocation.jobid:
            self._books.record(allocation)  # other servers that have the job must not end it now
        if request.keep_allocation:
            self._keeping.keep(allocation)
        try:
            if not allocation.jobid:
                await self._submit(allocation, request, account)
            place.launcher = await self._launcher(allocation, request, place)
        except BaseException:
            await asyncio.shield(self._books.own(self.leave(allocation, place)))
            raise
        self._books.record(allocation)
        return allocation, place.launcher

    async def _find(self, request: KernelRequest, account: Account) -> Allocation:
        """The allocation that the request names or may share; else a new one, not submitted yet."""
        if request.jobid:
            return await self._named(request.jobid)
        if request.share:
            looked = False
            while not looked or self._being_submitted(request, account):
                # Starts that come together are to share one job: all but one wait for it, and look again.
                while suitable := self._being_submitted(request, account):
                    await asyncio.wait(suitable)
                shared, looked = await self._shared(request, account), True
                if shared is not None:
                    return shared
        # No await from here to its submission: another start would submit a second job.
        return Allocation(ours=True, owner=self._owner.name, request=request, account=account.account)

    async def _shared(self, request: KernelRequest, account: Account) -> Allocation | None:
        """The best fit among this server's jobs, for which Slurm is not asked; else among other servers'."""
        own = {one.jobid: one for one in self._books.by_jobid.values() if one.ours and not one.is_over}
        best = self._choose(request, account, [one.offer() for one in own.values()])
        if best is not None:
            return own[best.jobid]
        others = await self._elsewhere.offers(own) if self._driver.can_adopt else {}
        best = self._choose(request, account, [offer for offer, _info in others.values()])
        return None if best is None else self._adopted(others[best.jobid][1])

    def _being_submitted(self, request: KernelRequest, account: Account) -> set[asyncio.Task[None]]:
        """The submissions of which a job may come that suits the request."""
        offers = {task: one.offer() for task, one in self._submissions.items() if not task.done()}
        return {task for task, offer in offers.items() if not misfit(request, account.account, offer)}

    def _choose(self, request: KernelRequest, account: Account, offers: list[Offer]) -> Offer | None:
        best, lines = choose(request, account.account, offers)
        for line in lines:
            self.log.info("share: %s", line)
        return best

    async def _submit(self, allocation: Allocation, request: KernelRequest, account: Account) -> None:
        launcher, token = self._launching.expect(allocation)
        allocation.identity = launcher.launcher_id
        # On record before Slurm knows of it: whoever comes after us finds the job by this comment, and lets
        # its launcher in.
        self._books.record(allocation)
        self._launching.record(allocation, launcher)
        job = self._launching.job(launcher, token, request, account)
        submission = self._books.own(self._submit_on_record(allocation, launcher, job))
        self._submissions[submission] = allocation
        submission.add_done_callback(self._submissions.pop)
        try:
            await asyncio.shield(submission)
        except asyncio.CancelledError:
            # A start that is cancelled, however often, must learn the job's id, or it could not take the job with it.
            while not submission.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({submission})
            if not submission.cancelled():
                submission.exception()  # it counts for nothing any more
            raise
        self.log.info("job %s submitted to partition %s", allocation.jobid, request.partition)

    async def _submit_on_record(self, allocation: Allocation, launcher: Launcher, job: JobSpec) -> None:
        await self._books.registry.flushed()
        try:
            jobid = await self._driver.submit(job)
        except (Unanswered, asyncio.CancelledError):
            # There may be a job: the next server looks for it, and ends it, since nobody's start it is.
            allocation.keep = False
            self._books.record(allocation)
            self._books.unsettle(allocation)
            raise
        self._name(allocation, launcher, jobid)

    def _name(self, allocation: Allocation, launcher: Launcher, jobid: str) -> None:
        allocation.jobid = launcher.jobid = jobid
        self._books.by_jobid[jobid] = allocation
        assert launcher.expected is not None
        launcher.expected.jobid.set_result(jobid)
        if allocation.keep:
            self._keeping.keep(allocation)  # before the job's id is on record: recovery counts on it
        self._books.record(allocation)
        self._launching.record(allocation, launcher)
        self._watch(allocation)

    def _watch(self, allocation: Allocation) -> None:
        self._watcher.watch(allocation.jobid, lambda info: self._looked_up(allocation, info))

    async def _named(self, jobid: str) -> Allocation:
        """The allocation with this id: known to us, or adopted now."""
        known = self._books.by_jobid.get(jobid)
        if known is None or known.is_over:
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
        """A job that this server has not made; another start may have adopted it a moment ago."""
        known = self._books.by_jobid.get(info.jobid)
        if known is None or known.is_over:
            known = Allocation(
                ours=False,
                owner=self._owner.name,
                request=KernelRequest(jobid=info.jobid),
                jobid=info.jobid,
                info=info,
                identity=identity_of(info),
            )
            self._books.by_jobid[info.jobid] = known
            self._watch(known)
        return known

    # -- launchers --------------------------------------------------------------------------

    async def _launcher(self, allocation: Allocation, request: KernelRequest, place: Place) -> Launcher:
        """The launcher for this kernel, there and linked."""
        if not allocation.runs and allocation.launchers:
            # Which nodes there are is known once the job's own launcher is there.
            await self._launching.wait_for(allocation, next(iter(allocation.launchers.values())))
        elif not allocation.runs:
            await self._launching.wait_until_running(allocation)
        place.node = allocation.choose_node(request.node)
        launcher = None if request.isolate else self._launcher_on(allocation, place.node)
        if launcher is None:
            launcher, step = await self._launching.start_step(
                allocation, place.node, request if request.isolate else None
            )
            following = self._books.own(self._launching.follow_step(allocation, launcher, step))
            allocation.steps[launcher.launcher_id] = following
        place.launcher = launcher
        await self._launching.wait_for(allocation, launcher)
        place.node = launcher.node
        return launcher

    @staticmethod
    def _launcher_on(allocation: Allocation, node: str | None) -> Launcher | None:
        """A launcher for all on ``node`` (None = any); one that has not dialled in yet may be for any."""
        for launcher in allocation.launchers.values():
            if not launcher.isolated and (node is None or launcher.node == node):
                return launcher
        return None

    # -- what Slurm and the links say --------------------------------------------------------

    def linked(self, allocation: Allocation) -> None:
        """A link is up: while all of them are, the launchers tell us all there is to know."""
        allocation.own_steps |= {launcher.stepid for launcher in allocation.launchers.values()}
        for launcher in allocation.launchers.values():
            self._launching.record(allocation, launcher)
        if all(launcher.link and not launcher.slurmd_missing for launcher in allocation.launchers.values()):
            self._watcher.unwatch(allocation.jobid)
            self._books.record(allocation)

    def link_lost(self, allocation: Allocation) -> None:
        """Unknown, not dead: ask Slurm soon, and again until the launcher or Slurm says more."""
        if not allocation.is_over and allocation.jobid:
            self._watch(allocation)
            self._watcher.poll_soon(allocation.jobid)

    def _looked_up(self, allocation: Allocation, info: JobInfo | None) -> None:
        """The watcher's answer: Slurm's word on this job, or None when a healthy controller has none."""
        if allocation.relinquished:
            return
        if info is None:
            self._end(allocation, "UNKNOWN", f"job {allocation.jobid} is gone: Slurm no longer knows it")
            return
        if allocation.restored and allocation.info is None and identity_of(info) != allocation.identity:
            self._end(allocation, "UNKNOWN", f"job {allocation.jobid} is gone: the job with that id is another one")
            return
        state, told = meaning(info.state), allocation.info
        waits = state in (Meaning.WAITING, Meaning.HELD)
        if waits and (told is None or told.reason != info.reason):
            self.log.info("job %s waits in the queue: %s%s", info.jobid, info.state, _because(info))
        allocation.info = info
        allocation.queue_place = self._watcher.queue_positions.get(info.jobid) if waits else None
        self._books.record(allocation)
        if state is Meaning.OVER and info.state == "NODE_FAIL" and allocation.is_linked:
            self._given_up_by_slurm(allocation)
        elif state is Meaning.OVER:
            self._end(allocation, info.state, f"job {allocation.jobid} ended: {info.state}{_because(info)}")
        elif waits and any(launcher.was_up for launcher in allocation.launchers.values()):
            # Its kernels are gone, and its launcher's token is spent: it cannot come back to us.
            words = f"job {allocation.jobid} was taken off its nodes and queued again"
            self._end(allocation, info.state, words, on_record=allocation.ours)
            if allocation.ours:
                self._books.own(self._leaving.cancel(allocation))
        elif state is Meaning.USABLE and allocation.launchers:
            self.linked(allocation)

    def _given_up_by_slurm(self, allocation: Allocation) -> None:
        """The node's slurmd stayed away; the kernels live until it comes back and ends them, or their link breaks."""
        self._watcher.unwatch(allocation.jobid)
        text = (
            f"job {allocation.jobid} is NODE_FAIL: Slurm has given its node up, and will end the kernel; save your work"
        )
        kernels = [kernel for launcher in allocation.launchers.values() for kernel in launcher.kernels.values()]
        for kernel in kernels:
            kernel.warn(text)

    def _end(self, allocation: Allocation, state: str, reason: str, *, on_record: bool = False) -> None:
        """It is over for its kernels; it stays ``on_record`` where Slurm has yet to be told."""
        self._watcher.unwatch(allocation.jobid)
        if not allocation.ended.done():
            allocation.ended.set_result(AllocationEnded(reason, jobid=allocation.jobid, state=state))
            self.log.warning("%s", reason)
        self._books.unsettle(allocation) if on_record else self._books.forget(allocation)
        self._keeping.forget(allocation)
        for launcher in list(allocation.launchers.values()):
            self._launching.drop(allocation, launcher, reason)

    async def close(self, *, leave: bool = False) -> None:
        """Leave every allocation, as its last kernel would, and cancel what is under way.

        With ``leave`` those in which kernels run, or which are kept, stay with their kernels.
        """
        if self._submissions:
            # A job that Slurm has accepted must be known here, to be ended; what takes longer stays on record.
            await asyncio.wait(set(self._submissions), timeout=SUBMIT_SECONDS)
        await (self._leaving.leave_running() if leave else self._leaving.leave_all())
        await self._books.close()

    # -- after an earlier server process ---------------------------------------------------------

    def restore(self, record: AllocationRecord, launchers: list[LauncherRecord]) -> Allocation:
        """Have a job again that another process had, with its launchers, which ``let_in`` is to let in.

        Slurm is asked about it until they are all there.
        """
        allocation = self._books.by_jobid.get(record.jobid or "")
        if allocation is None or allocation.is_over:
            allocation = restored_allocation(record)
            self._books.by_jobid[allocation.jobid] = allocation
        else:
            # Both had kernels in it.
            older = allocation.record_key
            take_over(allocation, record)
            if older != allocation.record_key:
                self._books.registry.remove(older)
        for each in launchers:
            self._launching.restore(allocation, each)
        self._watch(allocation)
        return allocation

    def let_in(self, allocation: Allocation) -> None:
        """Its launchers may come, now that their kernels are known."""
        self._books.record(allocation)
        for launcher in allocation.launchers.values():
            if launcher.expected is None:
                self._launching.let_in(launcher)
                self._launching.record(allocation, launcher)
                if not launcher.holds_job:
                    following = self._books.own(self._launching.follow_restored_step(allocation, launcher))
                    allocation.steps[launcher.launcher_id] = following
        self.own(self._leaving.leave_unused(allocation))

    def give_away(self, allocation: Allocation) -> None:
        """Another server has it now: let go of it, and tell neither Slurm nor its launchers."""
        self._watcher.unwatch(allocation.jobid)
        allocation.relinquished = True
        self._books.let_go(allocation)
        for launcher_id in list(allocation.launchers):
            self._launching.let_go(allocation, launcher_id)

    # -- what the owner asks for ----------------------------------------------------------------

    def listed(self) -> list[Allocation]:
        """Those that Slurm knows; memory only, any thread may ask."""
        return [allocation for allocation in list(self._books.by_jobid.values()) if not allocation.is_over]

    def find(self, jobid: str) -> Allocation | None:
        """The allocation with this id; None for one that is over or not this owner's."""
        known = self._books.by_jobid.get(jobid)
        return None if known is None or known.is_over else known

    async def keep(self, allocation: Allocation) -> None:
        """Let it stay after its last kernel."""
        self._keeping.keep(allocation)

    async def release(self, allocation: Allocation) -> None:
        """Take ``keep`` back; one without kernels ends, unless another step runs in it."""
        self._keeping.release(allocation)
        # Whoever asks may go away meanwhile.
        await asyncio.shield(self.own(self._leaving.relinquish_if_empty(allocation)))

    async def cancel(self, allocation: Allocation) -> None:
        """End it now, with its kernels. Raises SlurmError when Slurm could not be asked, or refused."""
        await self._driver.cancel(allocation.jobid)
        self._keeping.release(allocation)
        self.link_lost(allocation)  # Slurm tells soon

    def waiting(self, kernel_id: str) -> Waiting | None:
        """Why the kernel's start takes its time; None when it does not wait for Slurm."""
        for allocation in list(self._books.by_jobid.values()):
            if not allocation.runs and any(place.kernel_id == kernel_id for place in list(allocation.places)):
                info = allocation.info
                state, reason = (info.state, info.reason) if info is not None else ("PENDING", "")
                start = info.start_time if info is not None else None
                return Waiting(allocation.jobid, state, reason, allocation.queue_place, start)
        return None


def _because(info: JobInfo) -> str:
    return f" ({info.reason})" if info.reason and info.reason not in ("None", info.state) else ""
