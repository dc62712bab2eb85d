"""The job's end by this node's clock, and the warnings before it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from launchers.reactor import Reactor, Timer


class Walltime:
    """Plans the warnings. ``say`` sends a message to the server, and does nothing while there is none."""

    def __init__(self, reactor: Reactor, *, say: Callable[..., None], is_linked: Callable[[], bool]) -> None:
        self._reactor, self._say, self._is_linked = reactor, say, is_linked
        self.started = time.time()
        self.end_time: float | None = None
        self._minutes: list[float] = []
        self._timers: list[Timer] = []
        self._is_due = False  # a warning was, for the end as it is now
        self._unheard = False  # and no server was there

    def link_up(self, fields: dict[str, Any], *, same_server: bool) -> None:
        """WELCOME came, and REPORT has gone: plan, once; tell this server what was due before it came."""
        if self.end_time is None:
            self._plan(fields)
        if self._unheard or (self._is_due and not same_server):
            self._warn()

    def _plan(self, fields: dict[str, Any]) -> None:
        self._minutes = [float(minutes) for minutes in fields.get("warn_minutes", [])]
        known = os.environ.get("SLURM_JOB_END_TIME", "")
        if fields.get("end_time"):
            self.end_time = float(fields["end_time"])
        elif known.isdigit():
            self.end_time = float(known)
        elif fields.get("minutes"):
            self.end_time = self.started + 60.0 * float(fields["minutes"])
        else:
            return
        self._set_timers()

    def until(self, fields: dict[str, Any]) -> None:
        """Slurm's own word on the end: somebody changed the time limit."""
        self.end_time = float(fields["end_time"])
        self._is_due = self._unheard = False
        self._set_timers()

    def _set_timers(self) -> None:
        assert self.end_time is not None
        for timer in self._timers:
            timer.cancel()
        waits = [self.end_time - time.time() - 60.0 * minutes for minutes in self._minutes]
        self._timers = [self._reactor.later(wait, self._warn) for wait in waits if wait > 0]

    def _warn(self) -> None:
        assert self.end_time is not None
        self._is_due, self._unheard = True, not self._is_linked()
        self._say("NOTICE", kind="walltime", end_time=self.end_time, remaining=self.end_time - time.time())
