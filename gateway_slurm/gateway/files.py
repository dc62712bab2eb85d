"""Files that an admin edits under a running server: read when they have changed, and only then."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Generic, TypeVar

T = TypeVar("T")

LARGEST: Final = 1 << 20
"""Bytes of a file that is read here; what is larger is no such file."""
SETTLED_SECONDS: Final = 1.0
"""A file changed less long ago than this may change again with the same time stamp: it is read each time."""

Stamp = tuple[int, int, int, int, int, int, int]


def stamp(status: os.stat_result) -> Stamp:
    """What is different after a change. Owner and mode count, since they decide whether a file is trusted."""
    s = status
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_uid, s.st_mode


@contextlib.contextmanager
def opened(path: Path, within: Path | None = None) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A plain file, opened once, and its status: what is looked at is what is read, whatever takes its name meanwhile.

    With ``within`` it must lie in that directory, links followed. Raises OSError, and ValueError for what is no plain
    file or lies elsewhere.
    """
    # Nobody is waited for at the other end of a pipe.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    target, more = (path, 0) if within is None else (os.path.realpath(path), os.O_NOFOLLOW)
    descriptor = os.open(target, flags | more)
    # Before open(), whose words on a directory would name the descriptor's number.
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError("it is no plain file")
    with open(descriptor, "rb") as file:
        # A directory above it may have become a link since: the descriptor knows where it has led.
        if within is not None and not _is_within(within, os.readlink(f"/proc/self/fd/{descriptor}")):
            raise ValueError(f"it is a link that leads out of {within}")
        yield file, status


def read_bounded(file: BinaryIO, largest: int) -> bytes:
    """Raises ValueError for more than ``largest`` bytes."""
    content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest} bytes")
    return content


def _is_within(folder: Path, real: str) -> bool:
    return real.startswith(os.path.realpath(folder).rstrip("/") + "/")


@dataclass(frozen=True)
class _Known(Generic[T]):
    """What was made of a file: a value, or the error that it is instead."""

    stamp: Stamp
    settled: bool
    value: T | None
    error: Exception | None


class FileCache(Generic[T]):
    """What files say, made by ``parse`` from path, content and status. Any thread may ask; nothing is to be closed.

    An error of ``parse`` is remembered and raised again until the file changes. Asking costs one stat(2).
    """

    def __init__(self, parse: Callable[[Path, bytes, os.stat_result], T]) -> None:
        self._parse = parse
        self._known: dict[Path, _Known[T]] = {}
        self.reads = 0
        """How often a file was read."""

    def get(self, path: Path, within: Path | None = None) -> T:
        """Raises as ``opened`` does, ValueError for a file that is too large, and what ``parse`` raises."""
        known = self._known.get(path)
        if known is None or not known.settled or known.stamp != stamp(path.stat()):
            known = self._known[path] = self._read(path, within)
        if known.error is not None:
            raise known.error.with_traceback(None)
        assert known.value is not None
        return known.value

    def forget_others(self, paths: Collection[Path]) -> None:
        """Keep what is known of ``paths`` only, so that files that are gone do not pile up."""
        for path in [path for path in list(self._known) if path not in paths]:
            self._known.pop(path, None)

    def _read(self, path: Path, within: Path | None) -> _Known[T]:
        now = time.time()
        with opened(path, within) as (file, status):
            self.reads += 1
            settled = now - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS
            try:
                content = read_bounded(file, LARGEST)
                return _Known(stamp(status), settled, self._parse(path, content, status), None)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised to whoever asks
                return _Known(stamp(status), settled, None, error)
