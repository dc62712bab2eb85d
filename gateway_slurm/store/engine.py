"""The connection to a database: how each kind is opened, and its errors in our words. Imports SQLAlchemy."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.pool import QueuePool

from gateway_slurm.errors import StoreError, StoreUnavailable

MEMORY = "memory:"
# How long another process's write may take: SQLite's lock is the whole file's.
BUSY_SECONDS = 5.0
# What a PostgreSQL that does not answer costs before it is tried again.
CONNECT_SECONDS, STATEMENT_SECONDS, IDLE_SECONDS = 5, 30, 10


class RowRefused(StoreError):
    """The database will never take this row, whatever the reason is."""


class Database:
    """An engine, and transactions on it. ``shown`` names it without its password; ``path`` is SQLite's file."""

    def __init__(self, engine: sa.Engine, shown: str, path: Path | None = None) -> None:
        self.engine, self.shown, self._path = engine, shown, path
        self._file = _identity(path)
        self.is_sqlite = engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One transaction that changes nothing. Raises StoreError."""
        with self._errors(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction, of all or nothing. Raises StoreError."""
        with (
            self._errors(),
            self.engine.connect() as connection,
            connection.execution_options(writes=True).begin(),
        ):
            yield connection

    def now(self, connection: sa.Connection) -> float:
        """Seconds since the epoch by the database's clock; SQLite's is this machine's."""
        if self.is_sqlite:
            return time.time()
        return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())::float8")).scalar_one())

    @property
    def was_removed(self) -> bool:
        """Whether its file is not there any more, or another one is in its place."""
        return self._path is not None and _identity(self._path) != self._file

    def close(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (exc.DataError, exc.IntegrityError, TypeError, ValueError) as error:
            raise RowRefused(f"the store {self.shown} refuses a row: {_words(error)}") from error
        except (exc.SQLAlchemyError, OSError) as error:
            raise self._in_our_words(error) from error

    def _in_our_words(self, error: Exception) -> StoreError:
        words = _words(error)
        if not self.is_sqlite:
            return StoreUnavailable(
                f"the store {self.shown} does not answer as it should: {words}; see that this PostgreSQL runs, and "
                "that the user, password and database of SlurmService.store_url are right"
            )
        for part, kind, what_to_do in _SQLITE_ERRORS:
            if part in words:
                return kind(f"the store {self.shown} cannot be used: {words}; {what_to_do}")
        return StoreUnavailable(f"the store {self.shown} cannot be used: {words}")


def _identity(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path is not None else None
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino) if status is not None else None


_ELSEWHERE = "or name another store in SlurmService.store_url"
_MOVE_AWAY = (
    "it is left as it is: move it away (with its -wal file) for a new one to be made, or put a copy of it back; jobs "
    "that run are still listed by: jupyter slurm allocations"
)
_FULL = f"its disk is full, or a quota is used up: make room, {_ELSEWHERE}"
_READ_ONLY = f"make the file, its directory and its file system writable for this user, {_ELSEWHERE}"
_SQLITE_ERRORS: tuple[tuple[str, type[StoreError], str], ...] = (
    # What SQLite says; whether it can be over in a moment; what to do.
    ("disk is full", StoreUnavailable, _FULL),
    ("disk I/O error", StoreUnavailable, f"its disk fails, or is full, or a quota is used up: make room, {_ELSEWHERE}"),
    ("readonly database", StoreUnavailable, _READ_ONLY),
    ("unable to open", StoreUnavailable, _READ_ONLY),
    ("locked", StoreUnavailable, "another process of this user's holds it: see which one is stopped, or hangs"),
    ("not a database", StoreError, _MOVE_AWAY),
    ("malformed", StoreError, _MOVE_AWAY),
)


def _words(error: Exception) -> str:
    """The database's own, on one line; never the statement, whose values may be secret."""
    return " ".join(str(getattr(error, "orig", None) or error).split())[:500]


def connect(url: str, directory: Path) -> Database:
    """The database that ``url`` names; nothing is asked of it yet, but a file is made where there is none."""
    if url == MEMORY:
        return _sqlite(None)
    if not url:
        path = directory / "store.sqlite"
        make_private(path)
        return _sqlite(path)
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:
        # SQLAlchemy's message repeats the URL, and with it the password.
        raise StoreError("SlurmService.store_url is no URL: it must be like postgresql://user@host/database") from None
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        path = Path(parsed.database).absolute()
        make_private(path)
        return _sqlite(path)
    if parsed.get_backend_name() != "postgresql":
        raise StoreError(
            f"SlurmService.store_url names {parsed.get_backend_name()}: the store is SQLite or PostgreSQL "
            "(postgresql://user@host/database)"
        )
    return _postgresql(parsed)


def make_private(path: Path) -> None:
    """The store's file, 0600, in a 0700 directory. Raises StoreError where that cannot be."""
    make_directory(path.parent)
    try:
        # Not opened where it is there: closing it would give up the locks by which SQLite holds it elsewhere in this
        # process (sqlite.org/howtocorrupt.html, 2.2), and another process then removes the log beside it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise _no_file(path, error) from error


def make_directory(directory: Path) -> None:
    """One of the user's own, 0700, and so is what is made on the way to it. Raises StoreError."""
    try:
        for one in [*reversed(directory.parents), directory]:
            if not one.is_dir():
                one.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _no_file(directory, error) from error


def _no_file(path: Path, error: OSError) -> StoreUnavailable:
    what_to_do = _FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else _READ_ONLY
    return StoreUnavailable(f"the store {path} cannot be used: {error.strerror}; {what_to_do}")


def _sqlite(path: Path | None) -> Database:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path) if path is not None else None),
        poolclass=QueuePool,
        # A database in memory is its one connection.
        pool_size=2 if path is not None else 1,
        max_overflow=0,
        connect_args={"check_same_thread": False, "timeout": BUSY_SECONDS},
        hide_parameters=True,
    )

    @sa.event.listens_for(engine, "connect")
    def connected(connection: object, _record: object) -> None:
        # The driver must not begin transactions by itself: it would begin them too late.
        connection.isolation_level = None  # type: ignore[attr-defined]
        cursor = connection.cursor()  # type: ignore[attr-defined]
        # A writer does not keep readers waiting, and what is committed is on the disk.
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        # Who is to write takes the lock at once: a reader that becomes a writer later may be refused.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return Database(engine, str(path) if path is not None else MEMORY, path)


def _postgresql(url: sa.URL) -> Database:
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    shown = url.set(query={}, drivername="postgresql").render_as_string(hide_password=True)
    try:
        engine = sa.create_engine(
            url,
            pool_size=2,
            max_overflow=3,
            pool_timeout=STATEMENT_SECONDS,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={
                "connect_timeout": CONNECT_SECONDS,
                # A machine that vanished is found out: nobody else would say that it did. Milliseconds.
                "tcp_user_timeout": 1000 * IDLE_SECONDS,
                # Statements that are prepared in a session do not go through a pooler.
                "prepare_threshold": None,
                "application_name": "gateway_slurm",
            },
        )
    except ModuleNotFoundError as error:
        raise StoreError(
            f"the store {shown} needs psycopg, which is not installed: pip install 'gateway-slurm[postgresql]'"
        ) from error
    except exc.SQLAlchemyError as error:
        raise StoreError(f"the store {shown} cannot be used: {_words(error)}; see SlurmService.store_url") from error

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        # A process that is stopped in the middle must not hold what the others wait for.
        connection.exec_driver_sql(
            f"SET LOCAL statement_timeout = '{STATEMENT_SECONDS}s'; "
            f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"
        )

    return Database(engine, shown)
