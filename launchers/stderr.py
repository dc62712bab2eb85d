"""Write a line to the standard error of a running kernel, as a child process of the kernel could do.

ipykernel (``IPKernelApp.capture_fd_output``, the default since 6.0) replaces its file descriptor 2 by a pipe to itself,
and shows what it reads there under the running cell. A thread of its own reads the pipe: the kernel need not be idle,
and no code runs in it. Any process of the same user can open that pipe (proc(5), /proc/PID/fd). In a kernel that
captures nothing, file descriptor 2 is the launcher's own pipe, or a file of the user.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection

from launchers.node import pids, stat_fields

# A write of up to this many bytes goes into a pipe as a whole, or not at all (pipe(7), PIPE_BUF).
MAX_LINE = 4096


class NotCapturedError(Exception):
    """The kernel has no pipe by which it would show the line."""


def write_line(line: str, session: int, sockets: Collection[int], own_pipe: int) -> None:
    """Write ``line`` to the kernel that listens on ``sockets`` (inodes) and belongs to ``session`` (a session id).

    ``own_pipe`` is the descriptor of the pipe from which the launcher reads the output of that session. Raises
    NotCapturedError, BlockingIOError while the pipe is full, and OSError if the kernel is gone.
    """
    path = f"/proc/{_kernel_in(session, sockets)}/fd/2"
    # The file is checked before it is opened: opening a user's FIFO, or a device, may have effects.
    target, launchers = os.stat(path), os.fstat(own_pipe)
    if not stat.S_ISFIFO(target.st_mode) or (target.st_dev, target.st_ino) == (launchers.st_dev, launchers.st_ino):
        raise NotCapturedError("it does not capture its standard error")
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(descriptor, line.encode(errors="replace")[:MAX_LINE])
    finally:
        os.close(descriptor)


def _kernel_in(session: int, sockets: Collection[int]) -> int:
    """The oldest process of the session that has the sockets: neither a wrapper of the kernel nor a fork of it."""
    wanted = {f"socket:[{inode}]" for inode in sockets}
    found = []
    for pid in pids():
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            fields = stat_fields(pid)
            if int(fields[3]) == session and wanted & _targets(pid):
                found.append((int(fields[19]), pid))  # its start time
    if not found:
        raise NotCapturedError("the process that listens on its channels was not found")
    return min(found)[1]


def _targets(pid: int) -> set[str]:
    """The open files of a process; a file that it closes meanwhile is left out."""
    directory = f"/proc/{pid}/fd"
    found = set()
    for number in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"{directory}/{number}"))
    return found
