"""The stages of a job before its launcher is linked, and the time that it spends in each.

A limit holds for one stage: a job that boots its nodes does not wait in the queue, and one whose prolog runs has no
launcher yet.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable

from gateway_slurm.allocations.model import Allocation

BOOTING = ("CONFIGURING", "POWER_UP_NODE")
"""The job has its nodes: they boot, or PrologSlurmctld runs (slurm.conf(5))."""
PROLOG_REASON = "Prolog"
"""Slurm's reason for a job in the state RUNNING whose prolog runs on its nodes (PrologFlags=Alloc)."""


class Stage(enum.Enum):
    """Where a job is."""

    QUEUE = "queue"
    BOOT = "boot"
    PROLOG = "prolog"
    RUNNING = "running"
    """By Slurm's word. Whether its script has begun Slurm does not say."""


def stage_of(allocation: Allocation) -> Stage:
    """The stage, by Slurm's last answer."""
    info = allocation.info
    if not allocation.is_running:
        return Stage.BOOT if info is not None and info.state in BOOTING else Stage.QUEUE
    is_prolog = not allocation.is_linked and info is not None and info.reason == PROLOG_REASON
    return Stage.PROLOG if is_prolog else Stage.RUNNING


class StageClock:
    """Adds up the seconds of each stage, by ``now``."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._last = now, now()
        self._spent: Counter[Stage] = Counter()

    def spend(self, stage: Stage) -> float:
        """The time since the last call was spent in ``stage``; return all that was."""
        now = self._now()
        self._spent[stage] += now - self._last  # type: ignore[assignment]
        self._last = now
        return self._spent[stage]
