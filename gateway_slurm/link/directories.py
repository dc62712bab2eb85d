"""Private directories for Unix sockets: in the first place that has room for them. Both ends of the link use this file.

The job script carries it to the compute node, so it needs Python >= 3.9 and the standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable

# With the final NUL (unix(7)); a limit of bytes, not of characters.
MAX_SOCKET_PATH = 108
# Bytes that are written to see whether there is room: more than a connection file and its keys.
TRIAL_BYTES = 8192


class NoDirectory(OSError):
    """No place can be used; the message names each of them, and the reason."""


def make_private(parents: Iterable[str], prefix: str, longest: str) -> str:
    """Make a directory (0700) in the first of ``parents`` in which sockets can be bound and files be written.

    Empty parents are skipped. ``longest`` is the longest name, with directories, that a socket in it will have. Raises
    NoDirectory.
    """
    failures = []
    for parent in dict.fromkeys(filter(None, parents)):
        try:
            return _make(parent, prefix, longest)
        except (OSError, ValueError) as error:
            failures.append(f"{shown(parent)}: {why(parent, error)}")
    raise NoDirectory(f"no directory for sockets can be made: {'; '.join(failures)}")


def _make(parent: str, prefix: str, longest: str) -> str:
    if not os.path.isabs(parent) or "\n" in parent:
        raise ValueError("it is not an absolute path in one line")
    _check_length(os.path.join(parent, f"{prefix}xxxxxxxx", longest))
    directory = tempfile.mkdtemp(prefix=prefix, dir=parent)
    try:
        check(directory)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def _check_length(path: str) -> None:
    length = len(os.fsencode(path)) + 1
    if length > MAX_SOCKET_PATH:
        raise ValueError(
            f"its path is too long for Unix sockets, which would have {length} bytes; at most {MAX_SOCKET_PATH} work"
        )


def check(directory: str) -> None:
    """Write a file and bind a socket in ``directory``, and remove both. Raises OSError."""
    path = os.path.join(directory, "t")  # shorter than any socket's name
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:
            file.write(bytes(TRIAL_BYTES))
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def why(directory: str, error: Exception) -> str:
    """The reason in words: a file system may lack inodes although it has room (statvfs(3))."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOSPC:
        with contextlib.suppress(OSError):
            status = os.statvfs(directory)
            if status.f_files and not status.f_favail:
                return "its file system has no free inodes (df -i)"
        return "its file system is full"
    if number == errno.EDQUOT:
        return "the quota is used up"
    return os.strerror(number) if number else str(error)


def shown(path: str) -> str:
    """``path`` for messages: a name that is not valid UTF-8 can be printed and sent, too."""
    return os.fsencode(path).decode(errors="replace")
