"""The guard: a small process that outlives the launcher by a moment and ends what it leaves.

PR_SET_PDEATHSIG reaches only the kernel's first process; a kernel behind a wrapper script would
live on when the launcher is killed. The guard holds the other end of a pipe: when that closes
without a farewell, it kills the kernels' process groups and removes the runtime directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal


class Guard:
    """The launcher's handle on its guard."""

    def __init__(self, directory: str) -> None:
        read_end, self._write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._write_end)
            _watch(read_end, directory)
        os.close(read_end)

    def add(self, pgid: int) -> None:
        os.write(self._write_end, f"+{pgid}\n".encode())

    def remove(self, pgid: int) -> None:
        os.write(self._write_end, f"-{pgid}\n".encode())

    def close(self) -> None:
        """The launcher ends in good order: nothing is left for the guard to do but to go."""
        os.close(self._write_end)
        os.waitpid(self.pid, 0)


def _watch(read_end: int, directory: str) -> None:
    """Runs in the guard's process; never returns."""
    try:
        os.setsid()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_IGN)
        groups: set[int] = set()
        with open(read_end) as pipe:
            for line in pipe:
                (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
        for pgid in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pgid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os._exit(0)
