"""Whether this node's slurmd is there: without it Slurm will take the job for lost (slurm.conf(5), SlurmdTimeout).

Nobody asks Slurm about a job whose link is up, so the launcher has to notice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from launchers.reactor import Reactor, Timer


def find_slurmd(node: str) -> int | None:
    """The process id of the node's slurmd; None where there is none to be seen."""
    found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_slurmd(pid)]
    if len(found) > 1:
        # Several on one host are told apart by -N (slurmd(8)).
        found = [pid for pid in found if node in _arguments(pid)]
    return found[0] if found else None


def is_slurmd(pid: int) -> bool:
    """Whether the process is still there, and still slurmd."""
    return _read(pid, "comm").strip() == "slurmd"


def _arguments(pid: int) -> list[str]:
    return _read(pid, "cmdline").split("\0")


def _read(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", errors="replace") as file:
            return file.read()
    except OSError:  # it ended meanwhile, or is hidden (proc(5), hidepid)
        return ""


# -- Old logs: a user's home is not to fill up with them. --


KEPT_SECONDS = 30 * 86400
AT_MOST = 10_000


def remove_old_logs(directory: str, now: float | None = None) -> None:
    """Remove logs of launchers and kernels that nobody has written to for KEPT_SECONDS."""
    oldest = (time.time() if now is None else now) - KEPT_SECONDS
    try:
        with os.scandir(os.path.expanduser(directory)) as entries:
            for _count, entry in zip(range(AT_MOST), entries):
                named = entry.name.startswith(("launcher-", "kernel-")) and ".log" in entry.name
                if named and entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < oldest:
                    os.unlink(entry.path)
    except OSError:  # another launcher was first, or the directory is gone: the next one tries again
        return


# -- The job's end by this node's clock, and the warnings before it. --


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
