"""Cluster access: how this process reaches Slurm, and how launchers on the nodes reach this process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol

from gateway_slurm._util import run_in_thread
from gateway_slurm.slurm.driver import CommandLineDriver, SlurmDriver
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.slurm.sudo.runner import HelperPlaces, SudoRunner, process_user

if TYPE_CHECKING:
    from gateway_slurm.slurm.rest.driver import StepLauncher

MAX_LOG_END: Final = 8000
"""Bytes that are read from the end of a log."""


MAX_LOGS: Final = 10_000
"""Files of a directory that are listed."""
MAX_LOG_READ: Final = 256 << 10
"""Bytes of a log that are read at a time."""
LOOK_TIMEOUT: Final = 5.0
"""Seconds for a look at a log during a start: the file system of the nodes may hang, and a thread with it."""
MAX_LOOKS: Final = 8
"""Looks that may hang at one time; further ones find nothing."""


@dataclass(frozen=True)
class LogFile:
    """A file in a directory of logs: its size in bytes, and when it has changed, in seconds since the epoch."""

    name: str
    size: int
    changed: float


@dataclass(frozen=True)
class LogPart:
    """Bytes of a log, from the byte ``start`` on."""

    start: int
    content: bytes

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.start + len(self.content)


class LauncherLink(Protocol):
    """An ``asyncio.Protocol`` that takes the bytes of one launcher's connection."""

    @property
    def is_authenticated(self) -> bool:
        """Whether the launcher has proved its identity."""

    def data_received(self, data: bytes) -> None: ...
    def connection_lost(self, error: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


AcceptLauncher = Callable[[asyncio.Transport], LauncherLink]
"""Called with the transport of a launcher's new connection; returns the protocol that serves it."""


class ClusterAccess:
    """One cluster, for one service. The service calls ``open`` and ``close`` on its loop.

    ``runner`` runs Slurm's commands; with REST it runs only the admin's own.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._looks = threading.BoundedSemaphore(MAX_LOOKS)
        # Returns this server's launcher in a job if it is linked. The service sets this.
        self.find_launcher: Callable[[str], StepLauncher | None] = lambda _jobid: None

    @property
    def user(self) -> str:
        """The Unix user who owns this process's jobs in Slurm."""
        return process_user()

    def driver(self, user: str) -> SlurmDriver:
        """The driver that acts as ``user``."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise SlurmError if there is no sbatch, or if the last login failed. Sends nothing to Slurm."""
        self.runner.find(["sbatch"])

    async def connect(self) -> str:
        """Connect as far as possible without Slurm itself, and describe the result to the user. Raises SlurmError."""
        raise NotImplementedError

    async def log_end(self, path: str) -> str | None:
        """Return the last ``MAX_LOG_END`` bytes of a file that a job of this process's user wrote, as a launcher's log.

        ``~/`` is the user's home. None if the file cannot be read within ``LOOK_TIMEOUT``, for example because the
        nodes have other home directories, or if it is not a plain file of the user's own.
        """

        def look() -> str | None:
            # Not in the loop's own threads, which the store needs: a look may hang as long as the file system does.
            if not self._looks.acquire(timeout=LOOK_TIMEOUT):
                return None
            try:
                return _end_of(path)
            finally:
                self._looks.release()

        try:
            return await asyncio.wait_for(run_in_thread(look), LOOK_TIMEOUT)
        except asyncio.TimeoutError:
            return None

    async def logs(self, directory: str) -> list[LogFile]:
        """List the user's own files in a directory of logs (``~/`` is the user's home), at most MAX_LOGS.

        Raises SlurmError where the directory cannot be reached; a missing directory has none.
        """
        return await asyncio.to_thread(_files_in, directory)

    async def read_log(self, path: str, start: int) -> LogPart:
        """Return up to MAX_LOG_READ bytes of a log from ``start`` on; -1: its end. Empty if it cannot be read.

        A file that is shorter than ``start`` is read from its beginning: the launcher began a new one.
        """
        return await asyncio.to_thread(_read_from, path, start)

    def environment(self, environment: dict[str, str]) -> dict[str, str]:
        """Return a kernel's environment without the variables that mean nothing on the cluster."""
        return environment

    # -- Access for launchers to this server --

    async def open(self, accept: AcceptLauncher, changed: Callable[[], None]) -> None:
        """Open further endpoints for launchers, and pass their connections to ``accept``.

        ``changed`` is called whenever ``endpoints`` has changed.
        """

    @property
    def relays(self) -> list[dict[str, Any]]:
        """Records of the relays, which a later server passes to ``adopt_relays`` (``ServerRecord.relays``)."""
        return []

    def adopt_relays(self, relays: Iterable[dict[str, Any]]) -> None:
        """Listen on the ports of these relays of dead servers, if possible."""

    async def wait_ready(self) -> None:
        """Return when ``endpoints`` is complete. Raises SshError if no launcher could reach this server."""

    def endpoints(self, direct: list[str]) -> list[str]:
        """The addresses that launchers dial, in this order; ``direct`` are the server's own."""
        return direct

    async def close(self) -> None:
        """Close what was opened; bytes that were written to links are sent first."""


class LocalAccess(ClusterAccess):
    """Slurm's commands on this machine.

    Commands for other users run through ``as_user_command``, an argv with ``{user}`` in it, for at most
    ``command_timeout`` seconds each.
    """

    def __init__(self, runner: Runner, *, as_user_command: Sequence[str], command_timeout: float) -> None:
        super().__init__(runner)
        self._as_user_command, self._command_timeout = as_user_command, command_timeout
        self._places = HelperPlaces()

    def driver(self, user: str) -> SlurmDriver:
        if user == self.user:
            return CommandLineDriver(self.runner)
        counts, timeout = self.runner.counts, self._command_timeout
        runner = SudoRunner(user, self._as_user_command, timeout=timeout, counts=counts, places=self._places)
        return CommandLineDriver(runner)

    async def connect(self) -> str:
        return f"sbatch is {self.runner.find(['sbatch'])}"


def _files_in(directory: str) -> list[LogFile]:
    found = []
    try:
        with os.scandir(Path(directory).expanduser()) as entries:
            for entry in itertools.islice(entries, MAX_LOGS):
                with contextlib.suppress(OSError):  # it was removed meanwhile
                    status = entry.stat(follow_symlinks=False)
                    if _is_own(status):
                        found.append(LogFile(entry.name, status.st_size, status.st_mtime))
    except (OSError, RuntimeError):  # the directory or the home directory does not exist
        return []
    return found


def _read_from(path: str, start: int) -> LogPart:
    try:
        with _opened(path) as file:
            size = file.seek(0, os.SEEK_END)
            first = max(0, size - MAX_LOG_READ) if start < 0 else start if start <= size else 0
            file.seek(first)
            return LogPart(first, file.read(MAX_LOG_READ))
    except (OSError, RuntimeError):  # the file or the home directory does not exist
        return LogPart(max(0, start), b"")


def _end_of(path: str) -> str | None:
    try:
        with _opened(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_LOG_END))
            return file.read(MAX_LOG_END).decode(errors="replace")
    except (OSError, RuntimeError):  # the file or the home directory does not exist
        return None


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Open a log. Raises OSError for all but a plain file of this user's own.

    The directory may be one that all users write to, and this process may read files that they may not.
    """
    descriptor = os.open(Path(path).expanduser(), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not _is_own(os.fstat(descriptor)):
            raise PermissionError(errno.EPERM, "no plain file of this user's own", path)
        yield file


def _is_own(status: os.stat_result) -> bool:
    # Where hard links to others' files are possible (proc(5), protected_hardlinks), one could name any file of ours.
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
