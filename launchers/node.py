"""The launcher's view of its node: Slurm's daemon there, old log files, and the time until the job ends.

The server does not ask Slurm about a job whose link is up. So the launcher reports a missing slurmd, without which
Slurm declares the job lost (slurm.conf(5), SlurmdTimeout), and it plans the warnings before the time limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterable
from typing import Any

from launchers.reactor import Reactor, Timer

# Bytes of a log that a server may ask for.
MAX_LOG_END = 64 * 1024
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


def command_line(pid: int) -> str:
    """The arguments of a process, or its title; empty if it has ended or is hidden."""
    return _read(pid, "cmdline").replace("\0", " ").strip()


def _read(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", errors="replace") as file:
            return file.read()
    except OSError:  # the process has ended, or is hidden (proc(5), hidepid)
        return ""


# -- Log files in the user's home --


def remove_old_logs(directory: str, newest: str, days: float) -> None:
    """Remove logs of launchers and kernels that are so many days older than ``newest``, a log of now.

    The file server's times are compared with each other: this node's clock may be wrong.
    """
    try:
        oldest = os.stat(newest).st_mtime - days * 86400
        with os.scandir(os.path.expanduser(directory)) as entries:
            for _count, entry in zip(range(MAX_ENTRIES), entries):
                named = entry.name.startswith(("launcher-", "kernel-")) and ".log" in entry.name
                if named and entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < oldest:
                    os.unlink(entry.path)
    except OSError:  # another launcher removed the file first, or the directory is gone: the next launcher tries again
        return


def end_of(path: str) -> str:
    """The last MAX_LOG_END bytes of a log; empty for one that cannot be read, or that is no plain file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return ""
            file.seek(max(0, status.st_size - MAX_LOG_END))
            return file.read(MAX_LOG_END).decode(errors="replace")
    except OSError:
        return ""


def remove_empty_logs(paths: Iterable[str]) -> None:
    """Remove the logs of kernels that have printed nothing and have ended."""
    for path in paths:
        with contextlib.suppress(OSError):  # it does not exist
            if os.path.getsize(path) == 0:
                os.unlink(path)


class OwnLog:
    """The file that this launcher's standard error goes to. Launchers of a job, each a job step, share it.

    ``hold`` keeps the other launchers from removing it. The lock is on a descriptor of its own, for reading and
    writing: standard error is for writing alone, and NFS refuses a shared lock on such a descriptor (flock(2)).
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def hold(self) -> None:
        """Open the file and lock it, where it is a file and the file system has locks."""
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(2).st_mode):
                self._descriptor = os.open("/proc/self/fd/2", os.O_RDWR)
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def remove_if_empty(self, *, alone: bool) -> None:
        """Remove the file if nothing is in it. A launcher that is not ``alone`` needs the lock of all for that."""
        try:
            status, path = os.fstat(2), os.readlink("/proc/self/fd/2")
            if not alone:
                if self._descriptor is None:
                    return
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(2)  # another launcher may have written until now
            if stat.S_ISREG(status.st_mode) and status.st_size == 0 and os.path.basename(path).startswith("launcher-"):
                os.unlink(path)
        except OSError:  # another launcher uses it, or the file system has no locks
            return
        finally:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


# -- The end of the job --


class Walltime:
    """Plans the warnings before the job's end, by this node's monotonic clock.

    Times are seconds from now: the node's clock may be wrong, and Slurm's absolute times are another host's. ``send``
    sends a message to the server; without a link it does nothing.
    """

    def __init__(self, reactor: Reactor, *, send: Callable[..., None], is_linked: Callable[[], bool]) -> None:
        self._reactor, self._send, self._is_linked = reactor, send, is_linked
        self._started = time.monotonic()
        self._end: float | None = None  # by the monotonic clock
        self._minutes: list[float] = []
        self._timers: list[Timer] = []
        self._was_due = False  # a warning was due for the current end time
        self._unsent = False  # the last warning was due while there was no server

    @property
    def age(self) -> float:
        """Seconds since the launcher started."""
        return time.monotonic() - self._started

    @property
    def remaining(self) -> float | None:
        """Seconds until the job's end; None until a server has named it."""
        return None if self._end is None else self._end - time.monotonic()

    def link_up(self, fields: dict[str, Any], *, same_server: bool) -> None:
        """WELCOME came and REPORT was sent: plan, once, and repeat a warning that this server has not received."""
        if self._end is None and fields.get("remaining") is not None:
            self._minutes = [float(minutes) for minutes in fields.get("warn_minutes", [])]
            self._plan(float(fields["remaining"]))
        if self._unsent or (self._was_due and not same_server):
            self._warn()

    def set_end_time(self, fields: dict[str, Any]) -> None:
        """Take the end from END_TIME: a user or an admin changed the time limit."""
        self._was_due = self._unsent = False
        self._plan(float(fields["remaining"]))

    def _plan(self, remaining: float) -> None:
        self._end = time.monotonic() + remaining
        for timer in self._timers:
            timer.cancel()
        waits = [remaining - 60.0 * minutes for minutes in self._minutes]
        self._timers = [self._reactor.later(wait, self._warn) for wait in waits if wait > 0]

    def _warn(self) -> None:
        self._was_due, self._unsent = True, not self._is_linked()
        self._send("NOTICE", kind="walltime", remaining=self.remaining)
