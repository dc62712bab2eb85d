"""One server's rows: changed in memory first, then written by one thread, in order, and retried until it succeeds."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gateway_slurm._util import Backoff
from gateway_slurm.errors import StoreError, StoreUnavailable
from gateway_slurm.store.records import RENEW_SECONDS, KernelRecord, LauncherRecord, LostRows, ServerRecord
from gateway_slurm.store.rows import KINDS, Change, Record, RowKey, key_of

if TYPE_CHECKING:
    from gateway_slurm.store.database import Store

# Seconds after a failed write: short at first, since a PostgreSQL that restarts is back soon.
RETRY_DELAY, MAX_RETRY_DELAY = 0.1, 2.0

_log = logging.getLogger(__name__)


class RecordWriter:
    """The rows of one server. ``put``, ``remove`` and the reads return at once, on any thread.

    The writer's thread retries after every StoreError, with back-off. Unwritten changes stay in memory, the latest one
    for each row. The thread also renews the server's lease. When another server has taken over rows, it calls
    ``on_lost`` with them and continues with the rest. The owner of a RecordWriter calls ``close``.

    While ``standing`` names an event loop of this process that stands still, nothing is written, and the lease is not
    renewed: another server must be able to take over. ``on_lost`` is called then, too.
    """

    def __init__(
        self,
        server: ServerRecord,
        open_store: Callable[[], Store],
        *,
        on_lost: Callable[[LostRows], None],
        on_written: Callable[[set[RowKey]], None],
        standing: Callable[[], str] = lambda: "",
    ) -> None:
        self.server = server
        self.trouble = ""
        self.failures = 0  # attempts to write that failed
        self._open_store, self._on_lost, self._on_written = open_store, on_lost, on_written
        self._standing = standing
        self._changed = threading.Condition()
        self._rows: dict[RowKey, Record] = {}
        self._pending: dict[RowKey, Record | None] = {}
        self._flushes: list[Future[None]] = []
        # The keys of our rows that the database has had. Such a row with another server's id was taken from us.
        self._written: set[RowKey] = set()
        self._thread: threading.Thread | None = None
        # The store in which this server is registered as ``server`` is now.
        self._joined: Store | None = None
        self._deadline: float | None = None  # monotonic; set by close
        self._backoff = Backoff(RETRY_DELAY, MAX_RETRY_DELAY)

    # -- Called by any thread --

    def put(self, record: Record) -> None:
        """Keep a new or changed record. An unchanged record is not written again."""
        key = key_of(record)
        with self._changed:
            if self._deadline is None and self._rows.get(key) != record:
                self._rows[key] = record
                self._change({key: record})

    def remove(self, *keys: RowKey) -> None:
        """Remove these rows, if they exist."""
        with self._changed:
            known = [key for key in keys if self._rows.pop(key, None) is not None]
            if known:
                self._change(dict.fromkeys(known))

    def all(self, table: str) -> list[Any]:
        """The records of one table."""
        with self._changed:
            return [record for (name, _key), record in self._rows.items() if name == table]

    def keys_in_allocation(self, record_key: str) -> list[RowKey]:
        """The keys of the launchers and kernels in an allocation."""
        with self._changed:
            return [
                key
                for key, record in self._rows.items()
                if isinstance(record, (LauncherRecord, KernelRecord)) and record.record_key == record_key
            ]

    def add_claimed(self, records: Iterable[Record]) -> None:
        """Add the records that this server has claimed; the database has them already."""
        with self._changed:
            claimed = {key_of(record): record for record in records}
            self._rows |= claimed
            self._written.update(claimed)

    def announce(self, url: str, addresses: tuple[str, ...], relays: tuple[dict[str, Any], ...]) -> None:
        """Record where clients and launchers reach this server."""
        with self._changed:
            self.server = replace(self.server, url=url, addresses=addresses, relays=relays)
            self._joined = None
            self._change({})

    def flushed(self) -> Future[None]:
        """A future that is done when all changes up to now are durable."""
        future: Future[None] = Future()
        with self._changed:
            if self._deadline is not None and not self._pending:
                future.set_result(None)
            else:
                self._flushes.append(future)
                self._change({})
        return future

    def start(self, store: Store) -> None:
        """Write to this store, in which the server is registered, and renew its lease."""
        with self._changed:
            self._joined = store
            self._change({})

    def close(self, keep: Callable[[Record], bool], seconds: float) -> None:
        """Remove the rows that ``keep`` rejects, write all changes, and end. Blocks for up to ``seconds``."""
        with self._changed:
            if self._deadline is not None:
                return
            removed = [key for key, record in self._rows.items() if not keep(record)]
            for key in removed:
                del self._rows[key]
            if self._thread is not None:
                self._pending.update(dict.fromkeys(removed))
            self._deadline = time.monotonic() + seconds
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds + 1.0)

    def _change(self, changes: dict[RowKey, Record | None]) -> None:
        """The caller holds the lock."""
        self._pending.update(changes)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gateway_slurm-store", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # -- The writer's thread --

    def _run(self) -> None:
        renewed = time.monotonic()
        while True:
            with self._changed:
                due = renewed + RENEW_SECONDS
                self._changed.wait_for(self._has_work, max(0.0, due - time.monotonic()))
                if self._deadline is not None and not self._pending and not self._flushes:
                    break
                batch, self._pending = self._pending, {}
                flushes, self._flushes = self._flushes, []
            if not batch and not flushes and self._joined is not None and not self._joined.is_leased(self.server):
                renewed = time.monotonic()
                continue
            try:
                if standing := self._standing():
                    self._drop_lost(self._open_store().taken_over(self.server.server_id))
                    raise StoreUnavailable(f"{standing} stands still, and every write would renew the server's lease")
                self._write(batch)
            except Exception as error:  # noqa: BLE001 - whatever it is: nothing may be lost with the thread
                if not self._failed(error, batch, flushes):
                    break
                continue
            renewed = time.monotonic()
            self._succeeded(flushes)
        with contextlib.suppress(StoreError):
            self._open_store().end(self.server.server_id)

    def _has_work(self) -> bool:
        return bool(self._pending or self._flushes or self._joined is None or self._deadline is not None)

    def _write(self, batch: dict[RowKey, Record | None]) -> None:
        store = self._open_store()
        if self._joined is not store:
            self._join(store)
        changes: list[Change] = [(*key, record) for key, record in batch.items()]
        try:
            while not store.write(self.server.server_id, changes):
                self._join(store)
                changes = [change for change in changes if change[2] is None or change[:2] in self._rows]
        except StoreUnavailable:
            raise
        except StoreError:
            # The database may refuse only one of the rows.
            self._write_one_by_one(store, changes)
        for table, key, record in changes:
            (self._written.discard if record is None else self._written.add)((table, key))
        self._on_written(set(batch))

    def _write_one_by_one(self, store: Store, changes: list[Change]) -> None:
        for change in changes:
            try:
                store.write(self.server.server_id, [change])
            except StoreUnavailable:
                raise
            except StoreError as error:
                _log.error("%s is not kept on record: %s", " ".join(change[:2]), error)

    def _join(self, store: Store) -> None:
        """Register this server (again), and drop the rows that other servers have taken over."""
        taken = store.rejoin(self.server)
        self._drop_lost(taken)
        with self._changed:
            # Write all rows again: the database may have lost some of them.
            self._pending = {**self._rows, **self._pending} if self._written else self._pending
            self._joined = store

    def _drop_lost(self, taken: set[RowKey]) -> None:
        """Drop those of our rows that are among the rows that other servers have."""
        with self._changed:
            lost = self._written & taken
            lost |= {
                key
                for key, record in self._rows.items()
                if isinstance(record, KernelRecord) and ("launchers", record.launcher_id) in lost
            }
            for key in lost:
                self._rows.pop(key, None)
                self._pending.pop(key, None)
            self._written -= lost
        if lost:
            _log.warning(
                "another server has taken over %d kernels from this one, which it took for dead",
                sum(table == "kernels" for table, _key in lost),
            )
            try:
                tables = {name: frozenset(key for table, key in lost if table == name) for name in KINDS}
                self._on_lost(LostRows(**tables))
            except Exception:  # noqa: BLE001 - the callback's fault must not end the writing
                _log.exception("the kernels that another server has taken over could not be dropped")

    def _failed(self, error: Exception, batch: dict[RowKey, Record | None], flushes: list[Future[None]]) -> bool:
        """Keep the batch for the next attempt, and wait; False when there is no time left for one."""
        with self._changed:
            # Not the rows that another server has taken over meanwhile.
            again = {key: record for key, record in batch.items() if record is None or key in self._rows}
            self._pending = {**again, **self._pending}
            self._flushes = flushes + self._flushes
            if not self.trouble:
                _log.error("jobs and kernels cannot be recorded at the moment; the server tries again: %s", error)
            self.trouble = str(error) or repr(error)
            self.failures += 1
            # New changes do not end the wait: they would fail as well.
            end = time.monotonic() + self._backoff.next()
            while (remaining := end - time.monotonic()) > 0 and not self._is_due():
                self._changed.wait(remaining)
            if self._is_due():
                _log.error("%d changes are lost to the next server: %s", len(self._pending), error)
                return False
        return True

    def _is_due(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _succeeded(self, flushes: list[Future[None]]) -> None:
        if self.trouble:
            _log.warning("the store is back: all jobs and kernels are on record")
        self.trouble = ""
        self._backoff.reset()
        for future in flushes:
            if future.set_running_or_notify_cancel():
                future.set_result(None)
