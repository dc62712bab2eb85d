"""What users, their jobs and kernels say, as it may stand in a log or on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


def printable(text: object, line_end: str = "\n    ") -> str:
    """``text`` with escapes for what a terminal would obey or that changes the order of what is read.

    That is all that Python calls not printable, but for tabs: C0 and C1, marks of writing direction, ends of lines of
    other kinds. A line's end becomes ``line_end``, so that no line of a log begins with what the text says.
    """
    lines = str(text).replace("\r\n", "\n").split("\n")
    return line_end.join("".join(map(_shown, line)) for line in lines)


def in_one_line(text: object) -> str:
    """The same for a cell of a table."""
    return printable(text, "\\n")


def _shown(character: str) -> str:
    if character.isprintable() or character == "\t":
        return character
    return character.encode("unicode_escape").decode()


# -- A lock that processes hold by a file: whoever is killed lets it go. --


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold a lock file. Raises OSError when somebody (a stopped process) does not let it go within ``seconds``."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is locked by another process") from error
                time.sleep(0.01)
        yield
    finally:
        os.close(lock)
