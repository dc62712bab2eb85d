"""What Slurm and the launchers' links say of allocations, and what follows from it."""

from __future__ import annotations

import asyncio
import signal
import time
from functools import partial

from gateway_slurm.allocations.identity import identity_of
from gateway_slurm.allocations.keep import KeepFlags
from gateway_slurm.allocations.launcher import Launcher, LauncherEvents
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.allocations.release import AllocationReleaser
from gateway_slurm.allocations.table import OwnerContext
from gateway_slurm.errors import AllocationEnded, SlurmError
from gateway_slurm.slurm.formats import Meaning, meaning
from gateway_slurm.slurm.model import JobInfo

# Time limits are whole minutes: ends that differ by less are the same end by two clocks.
SAME_END = 30.0
# Seconds between two checks for the same launcher, which may ask for them as often as it likes.
CHECK_INTERVAL = 3.0
# The signal in the exit code (0:125) by which Slurm marks a job that ran out of memory: the low bits of its SIG_OOM.
OOM_SIGNAL = 125


class WalltimeMonitor:
    """Checks when allocations end: before users are warned, and when Slurm's signal arrives.

    A launcher warns by its own clock. Slurm's signal (sbatch(1), ``--signal``) comes relative to the end as Slurm
    knows it. So a changed time limit is noticed without polling. Lives on the service's loop.
    """

    def __init__(self, context: OwnerContext) -> None:
        self._driver, self._table, self.log = context.driver, context.table, context.log
        self._first_warning = 60 * max(context.settings.walltime_warnings, default=0.0)
        self._queries: dict[str, asyncio.Task[dict[str, JobInfo]]] = {}
        # For each launcher that has asked for a check: the end that it calculates, and whether a warning is due.
        self._wanted: dict[Launcher, tuple[float | None, bool]] = {}
        self._checking: set[Launcher] = set()

    def check(self, allocation: Allocation, launcher: Launcher, calculated: float | None, *, due: bool) -> None:
        """A warning is due by the launcher's clock, or Slurm's signal says that the end may have changed."""
        self._wanted[launcher] = calculated, due or self._wanted.get(launcher, (None, False))[1]
        if launcher not in self._checking:
            self._checking.add(launcher)
            self._table.tasks.create_task(self._check_while_wanted(allocation, launcher))

    async def _check_while_wanted(self, allocation: Allocation, launcher: Launcher) -> None:
        """Check, with pauses; requests that arrive meanwhile are answered together."""
        try:
            while launcher in self._wanted:
                end = await self._end_by_slurm(allocation)
                calculated, due = self._wanted.pop(launcher)
                self._apply(allocation, launcher, end or calculated, calculated, due=due)
                await asyncio.sleep(CHECK_INTERVAL)
        finally:
            self._checking.discard(launcher)
            self._wanted.pop(launcher, None)

    def _apply(
        self, allocation: Allocation, launcher: Launcher, end: float | None, calculated: float | None, *, due: bool
    ) -> None:
        if end is None:
            return
        if calculated is None or abs(end - calculated) > SAME_END:
            # The time limit was changed: the launchers set their clocks by the new end.
            change = "was given" if calculated is None else "was given more" if end > calculated else "has less"
            clock = time.strftime("%H:%M", time.localtime(end))
            self.log.info("job %s %s time: its time limit was changed, it ends at %s", allocation.jobid, change, clock)
            for other in allocation.launchers.values():
                other.end_time = end
                # For launchers of the previous version as well, which know ``end_time`` alone.
                other.send("END_TIME", remaining=end - time.time(), end_time=end)
            due = end - time.time() < self._first_warning and (calculated is None or end < calculated)
        if due:
            launcher.warn_of_end(end)

    async def _end_by_slurm(self, allocation: Allocation) -> float | None:
        """One squeue, also where the launchers of several nodes ask at the same moment."""
        jobid = allocation.jobid
        task = self._queries.get(jobid)
        if task is None:
            task = self._queries[jobid] = self._table.tasks.create_task(self._driver.jobs([jobid]))
            task.add_done_callback(lambda _task: self._queries.pop(jobid, None))
        try:
            info = (await asyncio.shield(task)).get(jobid)
        except SlurmError as error:
            self.log.info("job %s: Slurm did not say when it ends, its launcher's calculation holds: %s", jobid, error)
            return None
        if info is None or info.meaning is not Meaning.USABLE:
            return None
        allocation.update(info)
        self._table.record(allocation)
        return info.end_time


class AllocationMonitor:
    """Watches an owner's allocations. Slurm is asked only about jobs that wait or whose link broke.

    While all launchers of a job are linked, they report what there is to know. Lives on the service's loop.
    """

    def __init__(
        self, context: OwnerContext, keep_flags: KeepFlags, releaser: AllocationReleaser, walltime: WalltimeMonitor
    ) -> None:
        self._watcher, self._table, self.log = context.watcher, context.table, context.log
        self._events = context.events
        self._keep_flags, self._releaser, self._walltime = keep_flags, releaser, walltime

    def events(self, allocation: Allocation) -> LauncherEvents:
        """The receiver of what the allocation's launchers report."""
        return LauncherEvents(
            linked=partial(self.linked, allocation),
            link_lost=partial(self._link_lost, allocation),
            end_reported=partial(self._walltime.check, allocation),
        )

    def _link_lost(self, allocation: Allocation, reason: str) -> None:
        self._events.emit("link_lost", **allocation.facts(), reason=reason)
        self.ask_soon(allocation)

    def watch(self, allocation: Allocation) -> None:
        """Ask Slurm about the job until its launchers are linked or it is over."""
        self._watcher.watch(allocation.jobid, lambda info: self._update(allocation, info))

    def ask_soon(self, allocation: Allocation) -> None:
        """Ask Slurm at once, and again until the launcher or Slurm says more. The job's state is unknown, not over."""
        if not allocation.is_over and allocation.jobid:
            self.watch(allocation)
            self._watcher.poll_soon(allocation.jobid)

    def linked(self, allocation: Allocation) -> None:
        """A launcher's link is up."""
        for launcher in allocation.launchers.values():
            self._table.record_launcher(allocation, launcher)
        if all(launcher.link and not launcher.slurmd_missing for launcher in allocation.launchers.values()):
            self._watcher.unwatch(allocation.jobid)
            self._table.record(allocation)

    def _update(self, allocation: Allocation, info: JobInfo | None) -> None:
        """Take the watcher's answer: Slurm's description of the job, or None when a healthy controller has none."""
        if allocation.is_over:
            return
        if info is None:
            self._end(allocation, "UNKNOWN", f"job {allocation.jobid} is gone: Slurm no longer knows it")
            return
        if allocation.restored and allocation.info is None and identity_of(info) != allocation.identity:
            self._end(allocation, "UNKNOWN", f"job {allocation.jobid} is gone: the job with that id is another one")
            return
        state, known = meaning(info.state), allocation.info
        waits = info.is_waiting
        if waits and (known is None or known.reason != info.reason):
            advice = f"; {info.pending.advice}" if info.pending.advice else ""
            self.log.info("job %s waits in the queue: %s%s%s", info.jobid, info.state, _because(info), advice)
        allocation.update(info, self._watcher.queue_positions.get(info.jobid) if waits else None)
        self._table.record(allocation)
        if state is Meaning.OVER and info.state == "NODE_FAIL" and allocation.is_linked:
            self._node_failed(allocation)
        elif state is Meaning.OVER:
            memory = _memory_words(allocation, info)
            self._end(allocation, info.state, f"job {allocation.jobid} ended: {info.state}{_because(info)}{memory}")
        elif waits and any(launcher.was_up for launcher in allocation.launchers.values()):
            # Its kernels are gone, and its launcher's token is spent: the launcher cannot come back.
            reason = f"job {allocation.jobid} was taken off its nodes and queued again"
            self._end(allocation, info.state, reason, cancel=allocation.ours)
        elif state is Meaning.USABLE and allocation.launchers:
            self.linked(allocation)

    def _node_failed(self, allocation: Allocation) -> None:
        """The node's slurmd stayed away. The kernels live until it comes back and ends them, or their link breaks."""
        self._watcher.unwatch(allocation.jobid)
        text = "is NODE_FAIL: Slurm has given its node up, and will end the kernel; save your work"
        for launcher in allocation.launchers.values():
            for kernel in list(launcher.kernels.values()):
                kernel.warn(f"job {allocation.jobid} {text}")

    def _end(self, allocation: Allocation, state: str, reason: str, *, cancel: bool = False) -> None:
        """The job is over for its kernels. With ``cancel`` it stays on record until Slurm has ended it."""
        self._watcher.unwatch(allocation.jobid)
        allocation.end(AllocationEnded(reason, jobid=allocation.jobid, state=state))
        self._events.emit("allocation_ended", **allocation.facts(), state=state, reason=reason)
        if cancel:
            self._table.mark_pending_cancel(allocation)
            self._table.tasks.create_task(self._releaser.cancel(allocation))
        else:
            self._table.forget(allocation)
        self._keep_flags.forget(allocation)
        for launcher in list(allocation.launchers.values()):
            self._table.remove_launcher(allocation, launcher, reason)


def _because(info: JobInfo) -> str:
    return f" ({info.reason})" if info.reason and info.reason not in ("None", info.state) else ""


def _memory_words(allocation: Allocation, info: JobInfo) -> str:
    """What is known, or likely, about the memory of a job that has ended; empty where it is no cause."""
    if info.state == "OUT_OF_MEMORY" or info.reason == "OutOfMemory" or info.exit_signal == OOM_SIGNAL:
        return f"; {allocation.memory_words}"
    # Where Slurm itself watches the memory (OverMemoryKill), it kills the job's script, and its words are lost with it.
    if info.state == "FAILED" and info.exit_signal == signal.SIGKILL:
        return f"; SIGKILL ended its launcher: if no user sent it, the job was {allocation.memory_words}"
    return ""
