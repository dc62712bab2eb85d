"""When allocations end: Slurm's word on it, asked for before users are warned, and when Slurm says to look again.

A launcher warns by its own clock, and Slurm's signal (sbatch(1), ``--signal``) comes relative to the end as
it is now: so a time limit that somebody changed is noticed, and nobody has to ask in between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation, Books
from gateway_slurm.errors import SlurmError
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import JobInfo

LONGEST_SIGNAL = 65535  # seconds: sbatch(1), --signal
# Slurm may send its signal a minute early, and looks at its jobs twice a minute.
SIGNAL_SLACK = 120.0
# Time limits are whole minutes: what differs by less is the same one, by another clock.
SAME_END = 30.0
# Between two looks for the same launcher: it may ask for them as often as it likes.
PAUSE = 3.0


def signal_seconds(warnings: Sequence[float], minutes: float | None) -> int | None:
    """How long before its end a job of ``minutes`` (None: no limit) asks for Slurm's signal; None for not at all.

    The largest of the warnings (in minutes) that does not come with the job's start.
    """
    fitting = [60 * warning for warning in warnings if minutes is None or 60 * warning + SIGNAL_SLACK <= 60 * minutes]
    return min(int(max(fitting)), LONGEST_SIGNAL) if fitting and max(fitting) >= 1 else None


class TimeLimits:
    """Looks at allocations' ends; ``warnings`` are minutes before them. Lives on the service's loop."""

    def __init__(self, driver: SlurmDriver, books: Books, *, warnings: Sequence[float], log: logging.Logger) -> None:
        self._driver, self._books, self.log = driver, books, log
        self._first_warning = 60 * max(warnings, default=0.0)
        self._asking: dict[str, asyncio.Task[dict[str, JobInfo]]] = {}
        # What the next look for a launcher is to answer: the end as it reckons, and whether a warning is due.
        self._wanted: dict[Launcher, tuple[float | None, bool]] = {}
        self._looking: set[Launcher] = set()

    def look(self, allocation: Allocation, launcher: Launcher, reckoned: float | None, *, due: bool) -> None:
        """A warning is due, as the launcher reckons the end; or Slurm's signal says that the end may be another."""
        self._wanted[launcher] = reckoned, due or self._wanted.get(launcher, (None, False))[1]
        if launcher not in self._looking:
            self._looking.add(launcher)
            self._books.own(self._look_while_wanted(allocation, launcher))

    async def _look_while_wanted(self, allocation: Allocation, launcher: Launcher) -> None:
        """Look, with pauses; what is asked for meanwhile is answered together."""
        try:
            while launcher in self._wanted:
                word = await self._slurms_word(allocation)
                reckoned, due = self._wanted.pop(launcher)
                self._answer(allocation, launcher, word or reckoned, reckoned, due=due)
                await asyncio.sleep(PAUSE)
        finally:
            self._looking.discard(launcher)
            self._wanted.pop(launcher, None)

    def _answer(
        self, allocation: Allocation, launcher: Launcher, end: float | None, reckoned: float | None, *, due: bool
    ) -> None:
        if end is None:
            return
        if reckoned is None or abs(end - reckoned) > SAME_END:
            self._tell(allocation, end, reckoned)
            due = end - time.time() < self._first_warning and (reckoned is None or end < reckoned)
        if due:
            launcher.warn_of_end(end)

    async def _slurms_word(self, allocation: Allocation) -> float | None:
        """One squeue, also where the launchers of several nodes want to know at the same moment."""
        jobid = allocation.jobid
        task = self._asking.get(jobid)
        if task is None:
            task = self._asking[jobid] = self._books.own(self._driver.jobs([jobid]))
            task.add_done_callback(lambda _task: self._asking.pop(jobid, None))
        try:
            info = (await asyncio.shield(task)).get(jobid)
        except SlurmError as error:
            self.log.info("job %s: its end is its launcher's reckoning, Slurm did not answer: %s", jobid, error)
            return None
        if info is None or info.meaning is not Meaning.USABLE:
            return None
        allocation.info = info
        self._books.record(allocation)
        return info.end_time

    def _tell(self, allocation: Allocation, end: float, reckoned: float | None) -> None:
        """The time limit is another: the launchers set their clocks by it."""
        what = "was given" if reckoned is None else "was given more" if end > reckoned else "has less"
        clock = time.strftime("%H:%M", time.localtime(end))
        self.log.info("job %s %s time: somebody changed its time limit, it ends at %s", allocation.jobid, what, clock)
        for launcher in allocation.launchers.values():
            launcher.end_time = end
            launcher.send("UNTIL", end_time=end)
