"""Small tools for all rooms: printable text, files, delays between attempts, log lines, tasks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import random
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Seconds between two signs that a loop runs.
BEAT_SECONDS = 1.0


def printable(text: object, line_end: str = "\n    ") -> str:
    """Return ``text`` with escapes for characters that control a terminal or change the reading order.

    These are all characters that Python calls not printable, except tabs: C0 and C1 controls, marks of writing
    direction, and unusual line separators. A line's end becomes ``line_end``, so that ``text`` cannot begin a line of
    a log.
    """
    lines = str(text).replace("\r\n", "\n").split("\n")
    return line_end.join("".join(map(_escaped, line)) for line in lines)


def in_one_line(text: object) -> str:
    """Return ``text`` printable and in one line, for a cell of a table."""
    return printable(text, "\\n")


USER_NAMES = "1 to 255 letters, digits and _ . @ - + $ \\, beginning with a letter, a digit or _, and not digits alone"
"""What ``is_user_name`` accepts, in words."""
# Names of directories have these characters: ann@corp.example, CORP\ann, CORP+ann, 1234567a, pc7$. The first character
# is never one by which sudo(8) or another program would know an option, a user id (#0) or a group (%users).
_USER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@$+\\-]{0,254}", re.ASCII)


def is_user_name(text: object) -> bool:
    """Whether ``text`` can be a user's name here. The name becomes part of argv, headers, paths and records.

    Digits alone are refused: tools that accept a name take a number for a uid. Whether the user exists is a question
    for getpwnam(3).
    """
    return isinstance(text, str) and bool(_USER_NAME.fullmatch(text)) and not text.isdigit()


# What a failed TCP connection's reason (strerror(3), or a program's words for a time-out) says about the cause.
_NO_ANSWER = re.compile(r"no answer|timed? ?out|timeout", re.IGNORECASE)
_REFUSED = re.compile(r"connection refused", re.IGNORECASE)
_NO_ROUTE = re.compile(r"no route to host|unreachable|operation not permitted|permission denied", re.IGNORECASE)
_CUT = re.compile(r"connection reset|broken pipe", re.IGNORECASE)


def dial_advice(reason: str, target: str, source: str) -> str:
    """Return what the reason of a failed TCP connection suggests, and what to open; empty for another reason.

    ``target`` is the port and host that were dialled, in words, and ``source`` the host that dialled.
    """
    if _NO_ANSWER.search(reason):
        return f"no answer: the host is down, or a firewall drops the packets; let {source} connect to {target}"
    if _REFUSED.search(reason):
        return f"refused: no program listens there, or a firewall rejects what {source} sends to {target}"
    if _NO_ROUTE.search(reason):
        return f"not reachable: there is no route, or a firewall rejects what {source} sends to {target}"
    if _CUT.search(reason):
        return f"cut: a firewall or a proxy between {source} and {target} ended the connection"
    return ""


def _escaped(character: str) -> str:
    plain = character.isprintable() or character == "\t"
    return character if plain else character.encode("unicode_escape").decode()


# -- Files --


# NFS without lockd, Lustre without the mount option flock, and some FUSE file systems (flock(2), fcntl(2)).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def why_no_locks(directory: Path) -> str:
    """Return the reason why files in ``directory`` cannot be locked; empty if they can be, or if no file can be made.

    Locks of both kinds are tried, on a new file: closing another one would release the locks that this process has.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return f"the file system of {directory} has no file locks ({error.strerror})"
    return ""


def make_private_directory(directory: Path) -> None:
    """Make a directory and its missing parents, all 0700; Path.mkdir does not set the parents' mode. Raises OSError."""
    for path in [*reversed(directory.parents), directory]:
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold a lock file.

    Raises OSError if another process, such as a stopped one, holds it longer than ``seconds``, and where the file
    system has no locks.
    """
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
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise OSError(
                    f"{path} cannot be locked: its file system has no file locks ({error.strerror}); keep the file on "
                    "one that has, such as a disk of this host"
                ) from error
        yield
    finally:
        os.close(lock)


def exposure(status: os.stat_result) -> str:
    """Return the reason why a file with this status must not hold secrets; empty for a private file.

    A private file is a plain file that belongs to this process's user or to root and that no other user can read or
    write.
    """
    if not stat.S_ISREG(status.st_mode):
        return "it is not a plain file"
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to uid {status.st_uid}, and must belong to this process's user or to root"
    if stat.S_IMODE(status.st_mode) & 0o077:
        return f"other users may read or write it (its mode is {stat.S_IMODE(status.st_mode):04o}); run chmod 600 on it"
    return ""


def write_atomically(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file as a whole, with mode 0600. A reader sees the old text or the new text.

    ``durable`` writes the text to the disk before the file gets its name. If root replaces a user's file, the new file
    belongs to the same user. Raises OSError.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "w") as file:
            file.write(text)
            if os.geteuid() == 0 and path.exists():
                owner = path.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


# -- Repeated attempts --


class Backoff:
    """Delays between attempts, in seconds: each is twice the previous one, up to ``longest``.

    ``jitter`` is the fraction by which a delay may be shorter or longer, so that many clients do not retry together.
    """

    def __init__(self, first: float, longest: float, *, jitter: float = 0.0) -> None:
        self._first, self._longest, self._jitter = first, longest, jitter
        self._next = first

    def next(self) -> float:
        """Return the delay before the next attempt."""
        delay, self._next = self._next, min(2 * self._next, self._longest)
        return delay * random.uniform(1 - self._jitter, 1 + self._jitter)  # noqa: S311 - jitter

    async def sleep(self) -> None:
        """Sleep for the delay before the next attempt."""
        await asyncio.sleep(self.next())

    def reset(self) -> None:
        """Start again with the first delay, after an attempt that succeeded."""
        self._next = self._first


class LogOnce:
    """Logs each complaint once until ``clear`` closes it."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._open: set[str] = set()

    def warning(self, key: str, message: str, *arguments: object) -> None:
        """Log a warning and open the complaint ``key``, unless it is already open."""
        if key not in self._open:
            self._open.add(key)
            self._log.warning(message, *arguments, stacklevel=2)

    def clear(self, key: str) -> bool:
        """Close the complaint ``key``; return whether it was open."""
        was_open = key in self._open
        self._open.discard(key)
        return was_open


class RatedLog(logging.LoggerAdapter):  # type: ignore[type-arg] # generic since Python 3.11 only
    """The log of what one peer says: ``burst`` lines at once, then one in ``seconds``.

    The first line after others were left out says how many. A line may be logged from any thread.
    """

    def __init__(
        self,
        log: logging.Logger | logging.LoggerAdapter[Any],
        *,
        burst: int = 30,
        seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(log, {})
        self._burst, self._seconds, self._clock = burst, seconds, clock
        self._lock = threading.Lock()
        self._left, self._counted_at, self._left_out = float(burst), clock(), 0

    def log(self, level: int, msg: object, *arguments: object, **options: Any) -> None:
        """As ``Logger.log``, at the rate."""
        if self.isEnabledFor(level) and self.takes(level):
            self.logger.log(level, msg, *arguments, **options)

    def takes(self, level: int) -> bool:
        """Count a line; whether it may be logged. The number of those that were left out before it is logged first."""
        with self._lock:
            now = self._clock()
            self._left = min(self._burst, self._left + (now - self._counted_at) / self._seconds)
            self._counted_at = now
            if self._left < 1:
                self._left_out += 1
                return False
            self._left -= 1
            left_out, self._left_out = self._left_out, 0
        if left_out:
            self.logger.log(level, "%d more lines were left out before the next one", left_out)
        return True


# -- Tasks and loops --


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Call ``function`` on another thread's loop; a closed loop calls nothing."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


async def run_in_thread(blocking: Callable[[], T]) -> T:
    """Run a blocking call in a thread of its own; the end of the process does not wait for that thread."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(blocking())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller
            result.set_exception(error)
        call_on(loop, done.set)

    threading.Thread(target=run, name="gateway_slurm-blocking", daemon=True).start()
    await done.wait()
    return result.result()


class TaskSet:
    """The tasks of one owner, which calls ``close`` or ``cancel``. Tasks created later are cancelled at once."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def create_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run ``coroutine`` as a task, which ``close`` cancels."""
        task = asyncio.ensure_future(coroutine)
        if self._closed:
            task.cancel()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(tuple(self._tasks))

    def cancel(self) -> None:
        """Cancel the tasks, and those that are created later, without waiting for their ends."""
        self._closed = True
        for task in self:
            task.cancel()

    async def close(self) -> None:
        """Cancel the tasks and wait until all of them have ended."""
        self.cancel()
        await asyncio.gather(*self, return_exceptions=True)


class LoopWatch:
    """When each of several event loops last ran, for a thread that must know whether one stands still.

    Any thread may call any method.
    """

    def __init__(self) -> None:
        self._beats: dict[str, float] = {}
        self._closed = False

    @contextlib.contextmanager
    def following(self, name: str) -> Iterator[None]:
        """Watch a loop until the end of the block; it must call ``beat`` meanwhile."""
        self._beats[name] = time.monotonic()
        try:
            yield
        finally:
            self._beats.pop(name, None)

    def beat(self, name: str) -> None:
        """Note that a loop that is watched runs. A long callback calls it at each of its steps."""
        if name in self._beats:
            self._beats[name] = time.monotonic()

    async def follow(self, name: str) -> None:
        """Watch the calling loop until the task is cancelled."""
        with self.following(name):
            while True:
                self.beat(name)
                await asyncio.sleep(BEAT_SECONDS)

    def standing(self, seconds: float) -> str:
        """The name of a loop that has not run for so many seconds; empty if all run."""
        oldest = time.monotonic() - seconds
        standing = [name for name, beat in list(self._beats.items()) if beat < oldest]
        return standing[0] if standing and not self._closed else ""

    def close(self) -> None:
        """The loops end: none of them stands still from now on."""
        self._closed = True
