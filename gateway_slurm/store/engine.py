"""The connection to a database: how each kind is opened, and its errors as StoreErrors that say what to do."""

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

from gateway_slurm._util import make_private_directory, why_no_locks
from gateway_slurm.errors import StoreError, StoreUnavailable
from gateway_slurm.store.records import MEMORY

# How long a write waits for another process's write: SQLite locks the whole file.
BUSY_SECONDS = 5.0
# How long a PostgreSQL that does not answer may delay a call.
CONNECT_SECONDS, STATEMENT_SECONDS, IDLE_SECONDS = 5, 30, 10


class RowRefused(StoreError):
    """The database will never accept this row."""


class Database:
    """An engine, and transactions on it. ``name`` is for messages, without a password; ``path`` is SQLite's file."""

    def __init__(self, engine: sa.Engine, name: str, path: Path | None = None) -> None:
        self.engine, self.name, self._path = engine, name, path
        self._file = _identity(path)
        self.is_sqlite = engine.dialect.name == "sqlite"

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One transaction that changes nothing. Raises StoreError."""
        with self._errors(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction, which commits all changes or none. Raises StoreError."""
        with self._errors(), self.engine.connect() as connection, connection.execution_options(writes=True).begin():
            yield connection

    def now(self, connection: sa.Connection) -> float:
        """Seconds since the epoch by the database's clock; SQLite's is this host's."""
        if self.is_sqlite:
            return time.time()
        return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())::float8")).scalar_one())

    @property
    def was_removed(self) -> bool:
        """Whether SQLite's file has been removed or replaced."""
        return self._path is not None and _identity(self._path) != self._file

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (exc.DataError, exc.IntegrityError, TypeError, ValueError) as error:
            raise RowRefused(f"the store {self.name} refuses a row: {_message(error)}") from error
        except (exc.SQLAlchemyError, OSError) as error:
            raise self._store_error(error) from error

    def _store_error(self, error: Exception) -> StoreError:
        message = _message(error)
        if not self.is_sqlite:
            return StoreUnavailable(
                f"the store {self.name} does not answer as it should: {message}; check that this PostgreSQL runs, and "
                "the user, password and database in SlurmService.store_url"
            )
        if self._path is not None and (reason := why_no_locks(self._path.parent)):
            return StoreUnavailable(f"the store {self.name} cannot be used: {reason}; {_NO_LOCKS}")
        for part, kind, what_to_do in _SQLITE_ERRORS:
            if part in message:
                return kind(f"the store {self.name} cannot be used: {message}; {what_to_do}")
        return StoreUnavailable(f"the store {self.name} cannot be used: {message}")


def _identity(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path is not None else None
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino) if status is not None else None


_OTHER_STORE = "or name another store in SlurmService.store_url"
_MOVE_AWAY = (
    "it is left as it is: move it away (with its -wal file) for a new one to be made, or put a copy of it back; jobs "
    "that run are still listed by: jupyter slurm allocations"
)
_NO_LOCKS = (
    "SQLite needs them: keep the store on a disk of this host (SlurmService.store_url = "
    "'sqlite:////DIRECTORY/store.sqlite', with a directory that only this user can write), or use PostgreSQL; a user "
    "without admin settings sets XDG_STATE_HOME to a directory on such a disk. Locks on the home need lockd for NFS, "
    "or the mount option flock for Lustre"
)
_FULL = f"its disk is full, or a quota is used up: make room, {_OTHER_STORE}"
_READ_ONLY = f"make the file, its directory and its file system writable for this user, {_OTHER_STORE}"
_SQLITE_ERRORS: tuple[tuple[str, type[StoreError], str], ...] = (
    # SQLite's message; whether the trouble may pass by itself (StoreUnavailable); what to do.
    ("disk is full", StoreUnavailable, _FULL),
    (
        "disk I/O error",
        StoreUnavailable,
        f"its disk fails, or is full, or a quota is used up: make room, {_OTHER_STORE}",
    ),
    ("readonly database", StoreUnavailable, _READ_ONLY),
    ("unable to open", StoreUnavailable, _READ_ONLY),
    ("locked", StoreUnavailable, "another process of this user holds it: find the one that is stopped, or hangs"),
    ("not a database", StoreError, _MOVE_AWAY),
    ("malformed", StoreError, _MOVE_AWAY),
)


def _message(error: Exception) -> str:
    """The database's own message, on one line; never the statement, which may have secret values."""
    return " ".join(str(getattr(error, "orig", None) or error).split())[:500]


def connect(url: str, directory: Path) -> Database:
    """The database that ``url`` names. It is not queried yet, but SQLite's file is made if it does not exist."""
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
    """Make the store's file, 0600, in a 0700 directory. Raises StoreError where that fails."""
    make_directory(path.parent)
    try:
        # An existing file is not opened: closing it would release the locks that SQLite has on it in this process
        # (sqlite.org/howtocorrupt.html, 2.2), and another process would then remove the log beside it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        raise _no_file(path, error) from error


def make_directory(directory: Path) -> None:
    """Make a directory and its missing parents, all 0700. Raises StoreError."""
    try:
        make_private_directory(directory)
    except OSError as error:
        raise _no_file(directory, error) from error


def _no_file(path: Path, error: OSError) -> StoreUnavailable:
    what_to_do = _FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else _READ_ONLY
    return StoreUnavailable(f"the store {path} cannot be used: {error.strerror}; {what_to_do}")


def _sqlite(path: Path | None) -> Database:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path) if path is not None else None),
        poolclass=QueuePool,
        # A database in memory lives in one connection.
        pool_size=2 if path is not None else 1,
        max_overflow=0,
        connect_args={"check_same_thread": False, "timeout": BUSY_SECONDS},
        hide_parameters=True,
    )

    @sa.event.listens_for(engine, "connect")
    def connected(connection: object, _record: object) -> None:
        # The driver must not begin transactions itself: it would begin them too late.
        connection.isolation_level = None  # type: ignore[attr-defined]
        cursor = connection.cursor()  # type: ignore[attr-defined]
        # WAL: a writer does not block readers. FULL: a committed transaction is on the disk.
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        # A writer takes the lock at once: a reader that becomes a writer later may be refused.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return Database(engine, str(path) if path is not None else MEMORY, path)


def _postgresql(url: sa.URL) -> Database:
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    name = url.set(query={}, drivername="postgresql").render_as_string(hide_password=True)
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
                # Milliseconds. A host that has vanished does not close its connections.
                "tcp_user_timeout": 1000 * IDLE_SECONDS,
                # A pooler cannot forward statements that are prepared in a session.
                "prepare_threshold": None,
                "application_name": "gateway_slurm",
            },
        )
    except ModuleNotFoundError as error:
        raise StoreError(
            f"the store {name} needs psycopg, which is not installed: pip install 'gateway-slurm[postgresql]'"
        ) from error
    except exc.SQLAlchemyError as error:
        raise StoreError(f"the store {name} cannot be used: {_message(error)}; see SlurmService.store_url") from error

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        # A process that is stopped inside a transaction must not block the others with its locks.
        connection.exec_driver_sql(
            f"SET LOCAL statement_timeout = '{STATEMENT_SECONDS}s'; "
            f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"
        )

    return Database(engine, name)
