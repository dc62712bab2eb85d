"""Releasing an allocation: the job ends with its last kernel, unless it is kept or others use it (``use``).

Before a job is ended, Slurm is asked for the steps in it, and for nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from weakref import WeakKeyDictionary

from gateway_slurm._util import Backoff
from gateway_slurm.allocations.identity import COMMENT, identity_of
from gateway_slurm.allocations.keep import KeepFlags
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation, AllocationPhase, Place
from gateway_slurm.allocations.table import OwnerContext
from gateway_slurm.allocations.use import Use, jobs_of_this_process, use_by_steps
from gateway_slurm.errors import SlurmError, StoreError

# How long released launchers may take to go, and how long a caller waits for a job's end.
RELEASE_TIMEOUT = 5.0
END_TIMEOUT = 10.0
# How long the store may take to confirm that this server still has a job, before the job is ended.
CONFIRM_TIMEOUT = 2.0
# When a job that others use is checked again. Slurm lists a step that has ended for a moment more.
IN_USE_RETRY_DELAY, MAX_IN_USE_RETRY_DELAY = 3.0, 30.0
# For how long Slurm is asked again which steps run in a job of ours: an idle job costs its user's budget.
MAX_STEPS_UNKNOWN = 120.0
# For how long a job is looked for that an sbatch without an answer may have made, and the first pause.
LATE_JOB_TIMEOUT, LATE_JOB_RETRY_DELAY = 300.0, 5.0
# Between attempts to have Slurm end a job, while Slurm does not answer.
CANCEL_RETRY_DELAY, MAX_CANCEL_RETRY_DELAY = 0.5, 60.0


class AllocationReleaser:
    """Gives kernels' places back and ends jobs. Lives on the service's loop."""

    def __init__(self, context: OwnerContext, keep_flags: KeepFlags) -> None:
        self._driver, self._socket, self._watcher = context.driver, context.socket, context.watcher
        self._table, self._events, self.log = context.table, context.events, context.log
        self._keep_flags, self._idle_timeout = keep_flags, context.settings.idle_timeout
        # The tasks that end jobs which this server has released.
        self._ending: set[asyncio.Task[None]] = set()
        # Jobs of ours whose steps Slurm did not list, and since when (the loop's time).
        self._unknown_since: WeakKeyDictionary[Allocation, float] = WeakKeyDictionary()

    # -- A kernel leaves --

    async def release_place(self, allocation: Allocation, place: Place) -> None:
        """The kernel of ``place`` is over; the last one releases the allocation."""
        allocation.remove_place(place)
        if allocation.is_over:
            return
        if not allocation.jobid:
            if allocation.phase is AllocationPhase.UNCONFIRMED:
                self._table.tasks.create_task(self._cancel_if_submitted(allocation))
            else:
                self._table.forget(allocation)
            for launcher in allocation.launchers.values():
                self._socket.forget(launcher.launcher_id)
        elif allocation.places:
            self._table.record(allocation)
            if place.launcher is not None and place.launcher.isolated:
                await self._end_isolated(allocation, place.launcher)
        else:
            await self._release_last(allocation)

    async def release_unused(self, allocation: Allocation) -> None:
        """In a restored job, end the launchers that have no kernel, and the job, if no kernel is left in it."""
        unused = [launcher for launcher in allocation.launchers.values() if not launcher.kernels]
        isolated = [launcher for launcher in unused if launcher.isolated]
        if allocation.places and not isolated:
            return
        # Most launchers dial in soon, and can then be released over their link.
        waits = [launcher.until_linked(RELEASE_TIMEOUT) for launcher in unused if launcher.was_up]
        await asyncio.gather(*waits, return_exceptions=True)
        if not allocation.places:
            await self.release_place(allocation, Place(""))
            return
        for launcher in isolated:
            await self._end_isolated(allocation, launcher)

    async def _end_isolated(self, allocation: Allocation, launcher: Launcher) -> None:
        """End an isolated kernel's step. The next one can have its share once Slurm says that the step ended."""
        await self._release_launchers([launcher])
        if launcher.step_watch is not None:
            await asyncio.wait({launcher.step_watch}, timeout=RELEASE_TIMEOUT)

    async def _release_last(self, allocation: Allocation) -> None:
        if not allocation.ours and not allocation.used:
            await self._detach(allocation)
            return
        self._table.record(allocation)
        if allocation.used and await self._keep_flags.is_kept(allocation):
            self.log.info("job %s is kept after its last kernel, as requested", allocation.jobid)
            isolated = [launcher for launcher in allocation.launchers.values() if launcher.isolated]
            await self._release_launchers(isolated)
        elif allocation.used and self._idle_timeout:
            self._table.tasks.create_task(self._release_later(allocation, self._idle_timeout))
        else:
            await self._release_if_idle(allocation)

    async def _cancel_if_submitted(self, allocation: Allocation) -> None:
        """Cancel the job of an sbatch that gave no answer, if one appears: Slurm may take the request up later."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LATE_JOB_TIMEOUT
        backoff = Backoff(LATE_JOB_RETRY_DELAY, MAX_CANCEL_RETRY_DELAY)
        while True:
            last = loop.time() >= deadline
            with contextlib.suppress(SlurmError):
                found = await self._driver.find(COMMENT)
                jobid = next((key for key, info in found.items() if identity_of(info) == allocation.identity), None)
                if jobid is not None:
                    self.log.warning("job %s was submitted by an sbatch that gave no answer; it is cancelled", jobid)
                    await self.cancel(allocation, jobid)
                    return
                if last:
                    self._table.forget(allocation)
                    return
            await backoff.sleep()

    # -- The job ends --

    async def _release_later(self, allocation: Allocation, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.release_if_empty(allocation, again=min(2 * seconds, MAX_IN_USE_RETRY_DELAY))

    async def release_if_empty(self, allocation: Allocation, again: float | None = None) -> None:
        """End the job, unless a kernel is in it, it is kept, or others use it."""
        kept = allocation.used and await self._keep_flags.is_kept(allocation)
        if not kept and not allocation.places and not allocation.is_over:
            await self._release_if_idle(allocation, again)

    async def _release_if_idle(self, allocation: Allocation, again: float | None = None) -> None:
        """End the job, unless others use it.

        In that case, check once more after ``again`` seconds, or leave the job alone if it is not ours to end.
        """
        use = await self._use_of(allocation)
        if allocation.places or allocation.is_over:
            return
        if use is None:
            await self._release(allocation)
        elif use.is_lasting and not allocation.ours:
            await self._detach(allocation)
        else:
            self._table.tasks.create_task(self._release_later(allocation, again or IN_USE_RETRY_DELAY))

    async def _use_of(self, allocation: Allocation) -> Use | None:
        """What keeps the job from being ended; None if there is nothing."""
        use, what = await self._find_use(allocation)
        if use is not None:
            self.log.warning("job %s stays after its last kernel: %s", allocation.jobid, use.in_words(what))
        return use

    async def _find_use(self, allocation: Allocation) -> tuple[Use | None, str]:
        # A job that this process has submitted began later than this process.
        if (not allocation.ours or allocation.restored) and allocation.jobid in jobs_of_this_process(self._driver):
            return Use.SERVER, ""
        try:
            used = await asyncio.to_thread(self._table.registry.used_jobs, by_others=True)
        except StoreError as error:
            return Use.UNKNOWN, f"the store cannot be read: {error}"
        if allocation.jobid in used:
            return Use.OTHER_SERVER, ""
        ran = allocation.restored or any(launcher.was_up for launcher in allocation.launchers.values())
        if allocation.ours and not ran:
            return None, ""  # only this server can have started anything in it
        try:
            steps = await self._driver.steps(allocation.jobid)
        except SlurmError as error:
            now = asyncio.get_running_loop().time()
            since = self._unknown_since.setdefault(allocation, now) if allocation.ours else now
            if now - since < MAX_STEPS_UNKNOWN:
                return Use.UNKNOWN, f"its steps could not be listed: {error}"
            text = "job %s is released: its steps could not be listed for %.0f s (%s)"
            self.log.warning(text, allocation.jobid, now - since, error)
            return None, ""
        self._unknown_since.pop(allocation, None)
        # Launchers of other servers count as use, and so does the shell of an interactive step.
        own = allocation.own_steps | ({"batch"} if allocation.ours else set())
        return use_by_steps(steps, own=own, identity=allocation.identity)

    async def _release(self, allocation: Allocation) -> None:
        """End the job. Waits END_TIMEOUT at most; the end goes on if the caller is cancelled."""
        # A server that slept through its lease learns by this that another server has the job.
        with contextlib.suppress(StoreError):
            await self._table.registry.flushed(CONFIRM_TIMEOUT)
        if allocation.is_over or allocation.places:
            return
        self._unknown_since.pop(allocation, None)
        self._table.record(allocation)  # without kernels: so the next server finds it, if this one does not end it
        allocation.release()
        ending = self._table.tasks.create_task(self._end_job(allocation))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        await asyncio.wait({ending}, timeout=END_TIMEOUT)

    async def _end_job(self, allocation: Allocation) -> None:
        """End the job by its launcher, else by scancel. It stays on record until the launcher or Slurm has answered."""
        self._watcher.unwatch(allocation.jobid)
        self._table.mark_pending_cancel(allocation)
        launchers = list(allocation.launchers.values())
        holder = any(launcher.holds_job and launcher.link for launcher in launchers)  # the job ends with this one only
        all_gone = await self._release_launchers(launchers)
        if await self._has_server(allocation):
            self._table.forget(allocation)
            self.log.info("job %s is left to the server that submitted it", allocation.jobid)
            return
        if holder and all_gone:
            self._table.forget(allocation)
        else:
            await self.cancel(allocation)
        self._keep_flags.forget(allocation)
        self._events.emit("allocation_released", **allocation.facts())

    async def _has_server(self, allocation: Allocation) -> bool:
        """Whether another live server of the user submitted the job, and so ends it."""
        if allocation.ours:
            return False
        try:
            found = await asyncio.to_thread(self._table.registry.all_allocations)
        except StoreError:
            return True
        return any(
            record.ours and record.launcher_id == allocation.identity and not server.is_gone for server, record in found
        )

    async def _detach(self, allocation: Allocation) -> None:
        """End this server's launchers in a job that is another server's or the user's own, and forget the job."""
        allocation.detach()
        self._watcher.unwatch(allocation.jobid)
        self._table.forget(allocation)
        await self._release_launchers(list(allocation.launchers.values()))

    async def _release_launchers(self, launchers: list[Launcher]) -> bool:
        """Release these launchers; return whether any was linked and all that were have gone."""
        linked = [launcher for launcher in launchers if launcher.link]
        for launcher in launchers:
            launcher.release()
        if linked:
            with contextlib.suppress(asyncio.TimeoutError):
                gone = asyncio.gather(*(launcher.gone.wait() for launcher in linked))
                await asyncio.wait_for(gone, RELEASE_TIMEOUT)
        for launcher in launchers:
            self._socket.forget(launcher.launcher_id)
        return bool(linked) and all(launcher.gone.is_set() for launcher in linked)

    async def cancel(self, allocation: Allocation, jobid: str = "") -> None:
        """End a job by scancel, and forget it once Slurm knows. The caller owns the task.

        Retries for as long as Slurm does not answer and this process lives.
        """
        jobid = jobid or allocation.jobid
        backoff, failures = Backoff(CANCEL_RETRY_DELAY, MAX_CANCEL_RETRY_DELAY), 0
        while True:
            try:
                await self._driver.cancel(jobid)
                self._table.forget(allocation)
                return
            except SlurmError as error:
                failures += 1
                if failures == 2:
                    text = "job %s could not be cancelled yet: %s; this is retried (by hand: scancel %s)"
                    self.log.error(text, jobid, error, jobid)
            await backoff.sleep()

    # -- The server ends --

    async def close(self, *, leave: bool) -> None:
        """Release every allocation, as its last kernel would, and wait for all jobs that are being ended.

        With ``leave``, allocations that have kernels or are kept stay for the next server. It also ends what takes
        longer than END_TIMEOUT.
        """
        await self._keep_flags.refresh()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + END_TIMEOUT
        allocations = list(self._table.by_jobid.values())
        idle = [allocation for allocation in allocations if not leave or not (allocation.places or allocation.keep)]
        await asyncio.gather(*map(self._release_at_exit, idle), return_exceptions=True)
        # Only now: a start that was cancelled may have begun to end its job meanwhile.
        if self._ending:
            await asyncio.wait(set(self._ending), timeout=max(0.0, deadline - loop.time()))
        for allocation in list(self._table.by_jobid.values()) if leave else ():
            if not allocation.is_over:
                allocation.detach()
            for launcher in allocation.launchers.values():
                launcher.leaving = True  # its link goes down now, as is expected

    async def _release_at_exit(self, allocation: Allocation) -> None:
        for place in tuple(allocation.places):
            allocation.remove_place(place)
        if allocation.is_over:
            return
        if allocation.used and allocation.keep:
            self.log.info("job %s is kept after its server, as requested", allocation.jobid)
            self._table.record(allocation)
            allocation.detach()
            steps = [launcher for launcher in allocation.launchers.values() if not launcher.holds_job]
            await self._release_launchers(steps)
            return
        if not allocation.ours and not allocation.used:
            await self._detach(allocation)
        elif await self._use_of(allocation) is None:
            await self._release(allocation)
        elif self._table.find(allocation.jobid) is allocation:  # it did not end meanwhile
            if allocation.ours:
                # Others use the job, or may: it stays, and its launcher with it, until they leave or it ends.
                allocation.detach()
            else:
                await self._detach(allocation)
