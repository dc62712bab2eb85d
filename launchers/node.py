"""The launcher's view of its node: Slurm's daemon there, old log files, and the time until the job ends.

The server does not ask Slurm about a job whose link is up. So the launcher reports a missing slurmd, without which
Slurm declares the job lost (slurm.conf(5), SlurmdTimeout), and it plans the warnings before the time limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from launchers.reactor import Reactor, Timer

LOG_RETENTION_SECONDS = 30 * 86400
# Directory entries that one cleaning looks at.
MAX_ENTRIES = 10_000


# -- Processes --


def pids() -> list[int]:
    """The processes on this node that can be seen."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def stat_fields(pid: int) -> list[str]:
    """The status of a process (proc(5), /proc/PID/stat), from field 3 on, the state. Raises OSError."""
    with open(f"/proc/{pid}/stat", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def find_slurmd(node: str) -> int | None:
    """The process id of the node's slurmd; None if there is none, or it is hidden."""
    found = [pid for pid in pids() if is_slurmd(pid)]
    if len(found) > 1:
        # Several on one host have different node names, given by -N (slurmd(8)).
        found = [pid for pid in found if node in _read(pid, "cmdline").split("\0")]
    return found[0] if found else None


def is_slurmd(pid: int) -> bool:
    """Whether the process exists and is slurmd."""
    return _read(pid, "comm").strip() == "slurmd"


def _read(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", errors="replace") as file:
            return file.read()
    except OSError:  # the process has ended, or is hidden (proc(5), hidepid)
        return ""


# -- Log files in the user's home --


def remove_old_logs(directory: str, now: float | None = None) -> None:
    """Remove logs of launchers and kernels that have not changed for LOG_RETENTION_SECONDS."""
    oldest = (time.time() if now is None else now) - LOG_RETENTION_SECONDS
    try:
        with os.scandir(os.path.expanduser(directory)) as entries:
            for _count, entry in zip(range(MAX_ENTRIES), entries):
                named = entry.name.startswith(("launcher-", "kernel-")) and ".log" in entry.name
                if named and entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < oldest:
                    os.unlink(entry.path)
    except OSError:  # another launcher removed the file first, or the directory is gone: the next launcher tries again
        return


# -- The end of the job --


class Walltime:
    """Plans the warnings before the job's end, by this node's clock.

    ``send`` sends a message to the server; without a link it does nothing.
    """

    def __init__(self, reactor: Reactor, *, send: Callable[..., None], is_linked: Callable[[], bool]) -> None:
        self._reactor, self._send, self._is_linked = reactor, send, is_linked
        self.started = time.time()
        self.end_time: float | None = None
        self._minutes: list[float] = []
        self._timers: list[Timer] = []
        self._was_due = False  # a warning was due for the current end time
        self._unsent = False  # the last warning was due while there was no server

    def link_up(self, fields: dict[str, Any], *, same_server: bool) -> None:
        """WELCOME came and REPORT was sent: plan, once, and repeat a warning that this server has not received."""
        if self.end_time is None:
            self._plan(fields)
        if self._unsent or (self._was_due and not same_server):
            self._warn()

    def _plan(self, fields: dict[str, Any]) -> None:
        self._minutes = [float(minutes) for minutes in fields.get("warn_minutes", [])]
        end_by_slurm = os.environ.get("SLURM_JOB_END_TIME", "")
        if fields.get("end_time"):
            self.end_time = float(fields["end_time"])
        elif end_by_slurm.isdigit():
            self.end_time = float(end_by_slurm)
        elif fields.get("minutes"):
            self.end_time = self.started + 60.0 * float(fields["minutes"])
        else:
            return
        self._set_timers()

    def set_end_time(self, fields: dict[str, Any]) -> None:
        """Take the end time from END_TIME: a user or an admin changed the time limit."""
        self.end_time = float(fields["end_time"])
        self._was_due = self._unsent = False
        self._set_timers()

    def _set_timers(self) -> None:
        assert self.end_time is not None
        for timer in self._timers:
            timer.cancel()
        waits = [self.end_time - time.time() - 60.0 * minutes for minutes in self._minutes]
        self._timers = [self._reactor.later(wait, self._warn) for wait in waits if wait > 0]

    def _warn(self) -> None:
        assert self.end_time is not None
        self._was_due, self._unsent = True, not self._is_linked()
        self._send("NOTICE", kind="walltime", end_time=self.end_time, remaining=self.end_time - time.time())
