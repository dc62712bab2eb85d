"""When allocations end: Slurm's answer, asked for before users are warned, and when Slurm's signal arrives.

A launcher warns by its own clock. Slurm's signal (sbatch(1), ``--signal``) comes relative to the end as Slurm
knows it. So a changed time limit is noticed without polling.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.allocations.table import OwnerContext
from gateway_slurm.errors import SlurmError
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import JobInfo

MAX_SIGNAL_SECONDS = 65535  # sbatch(1), --signal
# Slurm may send its signal a minute early, and looks at its jobs twice a minute.
SIGNAL_SLACK = 120.0
# Time limits are whole minutes: ends that differ by less are the same end by two clocks.
SAME_END = 30.0
# Seconds between two checks for the same launcher, which may ask for them as often as it likes.
CHECK_INTERVAL = 3.0


def signal_seconds(warnings: Sequence[float], minutes: float | None) -> int | None:
    """How many seconds before its end a job of ``minutes`` (None: no limit) asks for Slurm's signal.

    The largest of the warnings (in minutes) that does not come with the job's start; None where there is none.
    """
    fitting = [60 * warning for warning in warnings if minutes is None or 60 * warning + SIGNAL_SLACK <= 60 * minutes]
    return min(int(max(fitting)), MAX_SIGNAL_SECONDS) if fitting and max(fitting) >= 1 else None


class WalltimeMonitor:
    """Checks when allocations end. Lives on the service's loop."""

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
                other.send("END_TIME", end_time=end)
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
