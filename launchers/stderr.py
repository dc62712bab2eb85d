"""A line into a running kernel's own standard error, as anything that it started could write one.

ipykernel (``IPKernelApp.capture_fd_output``, the default since 6.0) makes its file descriptor 2 a pipe to
itself and shows what comes out of it under the cell that runs, from threads of its own: it does not have to
be idle, and no code is run in it. Any process of the same user can open that pipe (proc(5),
/proc/PID/fd). What a kernel that captures nothing has there is the launcher's own pipe, or the user's file.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection

# One write of this many bytes goes into a pipe as a whole, or not at all (pipe(7), PIPE_BUF).
LINE_LIMIT = 4096


class NotCapturedError(Exception):
    """There is no pipe by which this kernel would show the line."""


def write_line(line: str, session: int, sockets: Collection[int], own_pipe: int) -> None:
    """Write ``line`` to the kernel in ``session`` that listens on ``sockets`` (inodes).

    Raises NotCapturedError, BlockingIOError while the pipe is full, and OSError when the kernel is gone.
    ``own_pipe`` is the descriptor of the pipe from which we read what the kernel's session prints.
    """
    path = f"/proc/{_kernel_in(session, sockets)}/fd/2"
    # Only look at first: opening a user's FIFO, or a device, may have effects.
    found, ours = os.stat(path), os.fstat(own_pipe)
    if not stat.S_ISFIFO(found.st_mode) or (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
        raise NotCapturedError("it does not capture its standard error")
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(descriptor, line.encode(errors="replace")[:LINE_LIMIT])
    finally:
        os.close(descriptor)


def _kernel_in(session: int, sockets: Collection[int]) -> int:
    """The process in the session that has the sockets: not a wrapper around the kernel, nor a later fork."""
    wanted = {f"socket:[{inode}]" for inode in sockets}
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            process_session, started = _session_and_start(entry)
            if process_session == session and wanted & _targets(entry):
                found.append((started, int(entry)))
        except OSError:  # it ended meanwhile, or is another user's
            continue
    if not found:
        raise NotCapturedError("the process that listens on its channels was not found")
    return min(found)[1]


def _session_and_start(pid: str) -> tuple[int, int]:
    """The session and start time of a process (proc(5), /proc/PID/stat, fields 6 and 22)."""
    with open(f"/proc/{pid}/stat", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[3]), int(fields[19])


def _targets(pid: str) -> set[str]:
    """What a process has open; what it closes meanwhile is left out."""
    directory = f"/proc/{pid}/fd"
    found = set()
    for number in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"{directory}/{number}"))
    return found
