"""The standard error of a command that was started and left running: a file without a name, of bounded size.

What a job step prints on its nodes reaches srun's standard error, so a user decides how much that is.
"""

from __future__ import annotations

import fcntl
import os
import tempfile

MAX_TAIL = 64 << 10
"""Bytes that are kept of the end."""
MAX_SIZE = 1 << 20
"""Bytes of the file beyond which ``trim`` empties it."""
TRIM_INTERVAL = 1.0
"""Seconds between two calls of ``trim``."""


class StderrFile:
    """The file, which the owner closes. A file, because a pipe would end the command with its reader.

    The owner calls ``trim`` at each TRIM_INTERVAL while the command runs. An owner that has ended trims no longer.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - ``close`` closes it
        # The command writes at the end of the file, also after the file was emptied (open(2), O_APPEND).
        flags = fcntl.fcntl(self.file, fcntl.F_GETFL)
        fcntl.fcntl(self.file, fcntl.F_SETFL, flags | os.O_APPEND)
        self._tail = b""

    def trim(self) -> None:
        """Empty the file if it is too large, and keep its end."""
        if not self.file.closed and os.fstat(self.file.fileno()).st_size > MAX_SIZE:
            self._tail = self.tail()
            os.ftruncate(self.file.fileno(), 0)

    def tail(self) -> bytes:
        """Return the last MAX_TAIL bytes that the command has written."""
        if self.file.closed:
            return self._tail
        descriptor = self.file.fileno()
        data = os.pread(descriptor, MAX_TAIL, max(0, os.fstat(descriptor).st_size - MAX_TAIL))
        return (self._tail + data)[-MAX_TAIL:]

    def close(self) -> None:
        """Close the file; ``tail`` returns its end from then on, too."""
        self._tail = self.tail()
        self.file.close()
