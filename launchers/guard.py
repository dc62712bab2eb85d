"""The guard: a small process that cleans up if the launcher is killed.

PR_SET_PDEATHSIG reaches only the first process of a kernel: a kernel behind a wrapper script would survive the
launcher. The guard holds the other end of a pipe. When the pipe closes, the guard kills the process groups that are
still registered, removes the launcher's directories, and exits.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal


class Guard:
    """The launcher's handle of its guard."""

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._write_end)
            _watch(read_end)
        os.close(read_end)

    def add(self, pgid: int) -> None:
        os.write(self._write_end, f"+{pgid}\n".encode())

    def remove(self, pgid: int) -> None:
        os.write(self._write_end, f"-{pgid}\n".encode())

    def add_directory(self, path: str) -> None:
        """Have a directory removed; its path is absolute and in one line."""
        os.write(self._write_end, os.fsencode(path) + b"\n")

    def close(self) -> None:
        """The launcher ends: close the pipe and wait for the guard's exit."""
        os.close(self._write_end)
        os.waitpid(self.pid, 0)


def _watch(read_end: int) -> None:
    """The guard's process; never returns."""
    try:
        os.setsid()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_IGN)
        groups: set[int] = set()
        directories: list[bytes] = []
        with open(read_end, "rb") as pipe:
            for line in pipe:
                if line.startswith(b"/"):
                    directories.append(line.rstrip(b"\n"))
                else:
                    (groups.add if line.startswith(b"+") else groups.discard)(int(line[1:]))
        for pgid in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pgid, signal.SIGKILL)
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os._exit(0)
