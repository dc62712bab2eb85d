"""Leaving an allocation: the last kernel relinquishes it, unless it is kept or others use it.

Lives on the service's loop. Slurm is asked for the steps in a job before it is ended, and for
nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from weakref import WeakKeyDictionary

from gateway_slurm._util import printable
from gateway_slurm.allocations.identity import JOB_NAME, identity_of
from gateway_slurm.allocations.keep import Keeping
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation, Books, Place
from gateway_slurm.errors import SlurmError, StoreError
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.watcher import JobWatcher

RELEASE_SECONDS = 5.0
ENDING_SECONDS = 10.0
# How long the store may take to confirm that a job that is to be ended is ours.
OWN_SECONDS = 2.0
# When a job that others use is looked at again: a step of theirs that ends is listed for a moment more.
STEPS_AGAIN_FIRST, STEPS_AGAIN_LONGEST = 3.0, 30.0
# For how long Slurm is asked again who works in a job of ours: an idle one costs its user's budget.
STEPS_UNKNOWN_SECONDS = 120.0
# For how long a job is looked for that may come of an sbatch without an answer, once Slurm answers; the first pause.
COMES_SECONDS, COMES_AGAIN = 300.0, 5.0
# Between attempts to have Slurm end a job, while it does not answer.
CANCEL_AGAIN_FIRST, CANCEL_AGAIN_LONGEST = 0.5, 60.0


class Leaving:
    """How kernels leave their allocations, and what becomes of these; ``idle_timeout`` is in seconds."""

    def __init__(
        self,
        driver: SlurmDriver,
        socket: ResponseSocket,
        watcher: JobWatcher,
        keeping: Keeping,
        books: Books,
        *,
        idle_timeout: float,
        log: logging.Logger,
    ) -> None:
        self._driver, self._socket, self._watcher = driver, socket, watcher
        self._keeping, self._books, self._idle_timeout, self.log = keeping, books, idle_timeout, log
        # Jobs that are over for us, and that Slurm has yet to be told of.
        self._ending: set[asyncio.Task[None]] = set()
        # Those of ours of which Slurm did not say who works in them, and since when (the loop's time).
        self._unknown: WeakKeyDictionary[Allocation, float] = WeakKeyDictionary()

    # -- a kernel goes ----------------------------------------------------------------------

    async def leave(self, allocation: Allocation, place: Place) -> None:
        """The kernel of ``place`` is over; the last one relinquishes the allocation."""
        allocation.places.discard(place)
        if allocation.is_over:
            return
        if not allocation.jobid:
            if self._books.is_unsettled(allocation):
                self._books.own(self._end_if_it_comes(allocation))
            else:
                self._books.forget(allocation)
            for launcher in allocation.launchers.values():
                self._socket.forget(launcher.launcher_id)
        elif allocation.places:
            self._books.record(allocation)
            if place.launcher is not None and place.launcher.isolated:
                await self._end_isolated(allocation, place.launcher)
        else:
            await self._leave_last(allocation)

    async def leave_unused(self, allocation: Allocation) -> None:
        """Of a restored job: end launchers that serve nobody any more, and the job, if that is all there is."""
        unused = [one for one in allocation.launchers.values() if not one.kernels]
        isolated = [one for one in unused if one.isolated]
        if allocation.places and not isolated:
            return
        # They dial in soon, as a rule, and then hear that they may go.
        waits = [one.until_linked(RELEASE_SECONDS) for one in unused if one.was_up]
        await asyncio.gather(*waits, return_exceptions=True)
        if not allocation.places:
            await self.leave(allocation, Place(""))
            return
        for launcher in isolated:
            await self._end_isolated(allocation, launcher)

    async def _end_isolated(self, allocation: Allocation, launcher: Launcher) -> None:
        """An isolated kernel's step ends with it; its share is free for the next when Slurm says it ended."""
        following = allocation.steps.get(launcher.launcher_id)
        await self._say_goodbye([launcher])
        if following is not None:
            await asyncio.wait({following}, timeout=RELEASE_SECONDS)

    async def _leave_last(self, allocation: Allocation) -> None:
        if not allocation.ours and not allocation.used:
            await self._withdraw(allocation)
            return
        self._books.record(allocation)
        if allocation.used and await self._keeping.is_kept(allocation):
            self.log.info("job %s is kept after its last kernel, as asked", allocation.jobid)
            isolated = [launcher for launcher in allocation.launchers.values() if launcher.isolated]
            await self._say_goodbye(isolated)
        elif allocation.used and self._idle_timeout:
            self._books.own(self._relinquish_later(allocation, self._idle_timeout))
        else:
            await self._relinquish_if_idle(allocation)

    async def _end_if_it_comes(self, allocation: Allocation) -> None:
        """Of an sbatch that gave no answer: it may have reached Slurm, which has not looked at it yet."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + COMES_SECONDS, COMES_AGAIN
        while True:
            last = loop.time() >= deadline
            with contextlib.suppress(SlurmError):
                found = await self._driver.find(JOB_NAME)
                jobid = next((one for one, info in found.items() if identity_of(info) == allocation.identity), None)
                if jobid is not None:
                    self.log.warning("job %s came of an sbatch that gave no answer; it is cancelled", jobid)
                    await self._cancel(jobid)
                if jobid is not None or last:
                    self._books.forget(allocation)
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, CANCEL_AGAIN_LONGEST)

    # -- the job goes -----------------------------------------------------------------------

    async def _relinquish_later(self, allocation: Allocation, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.relinquish_if_empty(allocation, again=min(2 * seconds, STEPS_AGAIN_LONGEST))

    async def relinquish_if_empty(self, allocation: Allocation, again: float = STEPS_AGAIN_FIRST) -> None:
        """End the job, if no kernel is in it, it is not (or no longer) kept, and nobody else uses it."""
        kept = allocation.used and await self._keeping.is_kept(allocation)
        if not kept and not allocation.places and not allocation.is_over:
            await self._relinquish_if_idle(allocation, again)

    async def _relinquish_if_idle(self, allocation: Allocation, again: float = STEPS_AGAIN_FIRST) -> None:
        """End the job, unless others use it (it is looked at ``again`` then), a kernel came, or it is over."""
        if await self._is_used_by_others(allocation):
            self._books.own(self._relinquish_later(allocation, again))
        elif not allocation.places and not allocation.is_over:
            await self._relinquish(allocation)

    async def _is_used_by_others(self, allocation: Allocation) -> bool:
        """Whether another server has kernels in the job, or another step of the user's runs there, or may."""
        try:
            used = await asyncio.to_thread(self._books.registry.used_jobs, elsewhere=True)
        except StoreError as error:
            # What is not known to be idle is not ended.
            self.log.warning("job %s is kept for now: who else uses it cannot be read (%s)", allocation.jobid, error)
            return True
        if allocation.jobid in used:
            self.log.warning("job %s is kept after its last kernel: another server uses it", allocation.jobid)
            return True
        ran = allocation.restored or any(one.was_up for one in allocation.launchers.values())
        if allocation.ours and not ran:
            return False  # nobody but us can be in it
        try:
            steps = await self._driver.steps(allocation.jobid)
        except SlurmError as error:
            return self._may_be_used(allocation, error)
        self._unknown.pop(allocation, None)
        # Launchers of other servers count as in use, and so does the shell of an interactive step.
        others = [step for step in steps if step.number not in allocation.own_steps | {"batch", "extern"}]
        for step in others[:1]:
            words = "job %s is kept after its last kernel: step %s (%s) runs in it"
            self.log.warning(words, allocation.jobid, step.stepid, printable(step.name))
        return bool(others)

    def _may_be_used(self, allocation: Allocation, error: SlurmError) -> bool:
        """What is not known to be idle is not ended; but a job of ours is not kept on a guess for ever."""
        now = asyncio.get_running_loop().time()
        since = self._unknown.setdefault(allocation, now) if allocation.ours else now
        kept = now - since < STEPS_UNKNOWN_SECONDS
        what = "it is kept for now" if kept else "it is released"
        self.log.warning("job %s: its steps could not be listed (%s); %s", allocation.jobid, error, what)
        return kept

    async def _relinquish(self, allocation: Allocation) -> None:
        """End the job; whoever waits for that, ENDING_SECONDS at most, may go away meanwhile."""
        # A server that slept through its lease learns by this that the job is another one's by now.
        with contextlib.suppress(StoreError):
            await self._books.registry.flushed(OWN_SECONDS)
        if allocation.is_over or allocation.places:
            return
        self._unknown.pop(allocation, None)
        self._books.record(allocation)  # without kernels: that is how the next server finds it, if we do not end it
        allocation.relinquished = True
        ending = self._books.own(self._end_job(allocation))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        await asyncio.wait({ending}, timeout=ENDING_SECONDS)

    async def _end_job(self, allocation: Allocation) -> None:
        """By its launcher where there is one, else by scancel; on record until Slurm or the launcher has answered."""
        self._watcher.unwatch(allocation.jobid)
        self._books.unsettle(allocation)
        launchers = list(allocation.launchers.values())
        holder = any(one.holds_job and one.link for one in launchers)  # the job ends with this one only
        said_goodbye = await self._say_goodbye(launchers)
        if await self._has_server(allocation):
            self._books.forget(allocation)
            self.log.info("job %s is left to the server that it is of", allocation.jobid)
            return
        if not (holder and said_goodbye):
            await self._cancel(allocation.jobid)
        self._books.forget(allocation)
        self._keeping.forget(allocation)
        self.log.info("job %s is relinquished", allocation.jobid)

    async def _has_server(self, allocation: Allocation) -> bool:
        """Whether another server of the user's that lives has submitted it, and so ends it."""
        if allocation.ours:
            return False
        try:
            found = await asyncio.to_thread(self._books.registry.all_records)
        except StoreError:
            return True
        return any(one.ours and one.launcher_id == allocation.identity and not owner.is_gone for owner, one in found)

    async def _withdraw(self, allocation: Allocation) -> None:
        """End our launchers in the job, which is somebody's, and forget it."""
        allocation.relinquished = True
        self._watcher.unwatch(allocation.jobid)
        self._books.forget(allocation)
        await self._say_goodbye(list(allocation.launchers.values()))

    async def _say_goodbye(self, launchers: list[Launcher]) -> bool:
        """Release these launchers; return whether there were some and all of them went."""
        linked = [launcher for launcher in launchers if launcher.link]
        for launcher in launchers:
            launcher.release()
        if linked:
            with contextlib.suppress(asyncio.TimeoutError):
                goodbyes = asyncio.gather(*(launcher.gone.wait() for launcher in linked))
                await asyncio.wait_for(goodbyes, RELEASE_SECONDS)
        for launcher in launchers:
            self._socket.forget(launcher.launcher_id)
        return bool(linked) and all(launcher.gone.is_set() for launcher in linked)

    async def cancel(self, allocation: Allocation) -> None:
        """End a job that is over for us, and forget it once Slurm knows. Whoever calls this owns the task."""
        await self._cancel(allocation.jobid)
        self._books.forget(allocation)

    async def _cancel(self, jobid: str) -> None:
        """End a job by scancel, tried again for as long as Slurm does not answer and this process lives."""
        pause, told = CANCEL_AGAIN_FIRST, False
        while True:
            try:
                await self._driver.cancel(jobid)
                return
            except SlurmError as error:
                if not told and pause > CANCEL_AGAIN_FIRST:
                    told = True
                    words = "job %s could not be cancelled yet: %s; it is tried again (by hand: scancel %s)"
                    self.log.error(words, jobid, error, jobid)
            await asyncio.sleep(pause)
            pause = min(2 * pause, CANCEL_AGAIN_LONGEST)

    # -- the server goes --------------------------------------------------------------------

    async def leave_running(self) -> None:
        """Let every allocation be that has kernels or is kept; relinquish the others, and see those through."""
        await self._keeping.refresh()
        idle = [one for one in self._books.by_jobid.values() if not one.places and not one.keep and not one.is_over]
        await self._see_through(idle)
        for allocation in list(self._books.by_jobid.values()):
            allocation.relinquished = True
            for launcher in allocation.launchers.values():
                launcher.leaving = True  # that its link goes down now is no news

    async def leave_all(self) -> None:
        """Leave every allocation, as its last kernel would, and see those through that were being left."""
        await self._keeping.refresh()
        await self._see_through(list(self._books.by_jobid.values()))

    async def _see_through(self, allocations: list[Allocation]) -> None:
        """Leave these, and wait for all jobs that are being ended; what takes longer is for the next server."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ENDING_SECONDS
        await asyncio.gather(*map(self._leave_for_good, allocations), return_exceptions=True)
        # Only now: a start that was given up may have begun to end its job meanwhile.
        if self._ending:
            await asyncio.wait(set(self._ending), timeout=max(0.0, deadline - loop.time()))

    async def _leave_for_good(self, allocation: Allocation) -> None:
        allocation.places.clear()
        if allocation.used and allocation.keep:
            self.log.info("job %s is kept after its server, as asked", allocation.jobid)
            self._books.record(allocation)
            allocation.relinquished = True
            await self._say_goodbye([one for one in allocation.launchers.values() if not one.holds_job])
            return
        if not allocation.ours and not allocation.used:
            await self._withdraw(allocation)
        elif not await self._is_used_by_others(allocation):
            await self._relinquish(allocation)
        elif allocation.ours:
            # Others work in the job, or may: it stays, and its launcher with it, until they or it end.
            allocation.relinquished = True
        else:
            await self._withdraw(allocation)
