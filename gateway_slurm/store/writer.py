"""One server's rows: in memory first, then written by one thread, in order, for as long as it takes."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gateway_slurm.errors import StoreError, StoreUnavailable
from gateway_slurm.store.records import RENEW_SECONDS, KernelRecord, LauncherRecord, Lost, ServerRecord
from gateway_slurm.store.rows import Change, Record, RowKey, key_of

if TYPE_CHECKING:
    from gateway_slurm.store.database import Store

# After a write that failed: short, since a PostgreSQL is back in seconds; longer while it is not.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0

_log = logging.getLogger(__name__)


class OwnRows:
    """Rows of one server. ``put``, ``remove`` and what reads return at once, on any thread.

    The thread retries every StoreError, with back-off; what it has not written stays in memory, the last word for
    each row. It renews the server's lease. Where another server took over, it calls ``on_lost`` with what is
    not this server's any more, and goes on with the rest. Whoever made it calls ``close``.
    """

    def __init__(
        self,
        server: ServerRecord,
        open_store: Callable[[], Store],
        *,
        on_lost: Callable[[Lost], None],
        on_written: Callable[[set[RowKey]], None],
    ) -> None:
        self.server = server
        self.trouble = ""
        self._open_store, self._on_lost, self._on_written = open_store, on_lost, on_written
        self._changed = threading.Condition()
        self._rows: dict[RowKey, Record] = {}
        self._pending: dict[RowKey, Record | None] = {}
        self._waiting: list[Future[None]] = []
        # What the database had of ours at some time: if it is another's there, it was taken from us.
        self._written: set[RowKey] = set()
        self._thread: threading.Thread | None = None
        # Where this server is registered, and as it is now.
        self._joined: Store | None = None
        self._deadline: float | None = None  # monotonic; set by close
        self._pause = FIRST_PAUSE

    # -- any thread -------------------------------------------------------------------------------

    def put(self, record: Record) -> None:
        """Keep a record, new or changed; one that is as it was costs nothing."""
        key = key_of(record)
        with self._changed:
            if self._deadline is None and self._rows.get(key) != record:
                self._rows[key] = record
                self._change({key: record})

    def remove(self, *keys: RowKey) -> None:
        with self._changed:
            there = [key for key in keys if key in self._rows]
            for key in there:
                del self._rows[key]
            if there:
                self._change(dict.fromkeys(there))

    def all(self, table: str) -> list[Any]:
        """The records of one table."""
        with self._changed:
            return [record for (name, _key), record in self._rows.items() if name == table]

    def inside(self, record_key: str) -> list[RowKey]:
        """The launchers and kernels in an allocation."""
        with self._changed:
            return [
                key
                for key, record in self._rows.items()
                if isinstance(record, (LauncherRecord, KernelRecord)) and record.record_key == record_key
            ]

    def took_over(self, records: Iterable[Record]) -> None:
        """These rows are this server's by a claim: the database knows."""
        with self._changed:
            for record in records:
                key = key_of(record)
                self._rows[key] = record
                self._written.add(key)

    def announce(self, url: str, addresses: tuple[str, ...], relays: tuple[dict[str, Any], ...]) -> None:
        with self._changed:
            self.server = replace(self.server, url=url, addresses=addresses, relays=relays)
            self._joined = None
            self._change({})

    def flushed(self) -> Future[None]:
        """Done when all that was changed before is durable."""
        future: Future[None] = Future()
        with self._changed:
            if self._deadline is not None and not self._pending:
                future.set_result(None)
            else:
                self._waiting.append(future)
                self._change({})
        return future

    def start(self, store: Store) -> None:
        """The server is registered there: write, and renew its lease."""
        with self._changed:
            self._joined = store
            self._change({})

    def close(self, keep: Callable[[Record], bool], seconds: float) -> None:
        """Remove the rows that are not to be kept, write what there is, end; blocking, for up to ``seconds``."""
        with self._changed:
            if self._deadline is not None:
                return
            leaving = [key for key, record in self._rows.items() if not keep(record)]
            self._change(dict.fromkeys(leaving) if self._thread is not None else {}, start=False)
            self._rows = {key: record for key, record in self._rows.items() if key not in leaving}
            self._deadline = time.monotonic() + seconds
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds + 1.0)

    def _change(self, changes: dict[RowKey, Record | None], *, start: bool = True) -> None:
        """With the lock."""
        self._pending.update(changes)
        if self._thread is None and start:
            self._thread = threading.Thread(target=self._run, name="gateway_slurm-store", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # -- the writer's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        renewed = time.monotonic()
        while True:
            with self._changed:
                due = renewed + RENEW_SECONDS
                self._changed.wait_for(self._has_work, max(0.0, due - time.monotonic()))
                if self._deadline is not None and not self._pending and not self._waiting:
                    break
                batch, self._pending = self._pending, {}
                waiting, self._waiting = self._waiting, []
            if not batch and not waiting and self._joined is not None and not self._joined.is_leased(self.server):
                renewed = time.monotonic()
                continue
            try:
                self._write(batch)
            except Exception as error:  # noqa: BLE001 - whatever it is: nothing may be lost with the thread
                if not self._failed(error, batch, waiting):
                    break
                continue
            renewed = time.monotonic()
            self._succeeded(waiting)
        with contextlib.suppress(StoreError):
            self._open_store().end(self.server.server_id)

    def _has_work(self) -> bool:
        return bool(self._pending or self._waiting or self._joined is None or self._deadline is not None)

    def _write(self, batch: dict[RowKey, Record | None]) -> None:
        store = self._open_store()
        if self._joined is not store:
            self._join(store)
        changes: list[Change] = [(*key, record) for key, record in batch.items()]
        try:
            while not store.write(self.server.server_id, changes):
                self._join(store)
                changes = [one for one in changes if one[2] is None or one[:2] in self._rows]
        except StoreUnavailable:
            raise
        except StoreError:
            # One row may be what it refuses: the others are none the worse for it.
            self._write_each(store, changes)
        self._written = (self._written | {(table, key) for table, key, record in changes if record}) - {
            (table, key) for table, key, record in changes if record is None
        }
        self._on_written(set(batch))

    def _write_each(self, store: Store, changes: list[Change]) -> None:
        for change in changes:
            try:
                store.write(self.server.server_id, [change])
            except StoreUnavailable:
                raise
            except StoreError as error:
                _log.error("%s is not kept on record: %s", " ".join(change[:2]), error)

    def _join(self, store: Store) -> None:
        """Be a living server (again); what others have got hold of meanwhile is theirs."""
        others = store.rejoin(self.server)
        with self._changed:
            lost = {key for key in self._written if key in others}
            gone = {key for table, key in lost if table == "launchers"}
            for key, record in self._rows.items():
                if isinstance(record, KernelRecord) and record.launcher_id in gone:
                    lost.add(key)
            for key in lost:
                self._rows.pop(key, None)
                self._pending.pop(key, None)
            self._written -= lost
            # Whatever else the database may have lost.
            self._pending = {**self._rows, **self._pending} if self._written else self._pending
            self._joined = store
        if lost:
            _log.warning(
                "another server has taken over %d kernels from this one, which it took for dead",
                sum(table == "kernels" for table, _key in lost),
            )
            try:
                self._on_lost(_lost(lost))
            except Exception:  # noqa: BLE001 - a fault of whoever is told must not end the writing
                _log.exception("what was lost could not be told")

    def _failed(self, error: Exception, batch: dict[RowKey, Record | None], waiting: list[Future[None]]) -> bool:
        """Keep what was to be written, and wait; False when there is no time left for another try."""
        with self._changed:
            # Without what another server was found to have meanwhile.
            again = {key: record for key, record in batch.items() if record is None or key in self._rows}
            self._pending = {**again, **self._pending}
            self._waiting = waiting + self._waiting
            if not self.trouble:
                _log.error(
                    "what kernels and jobs there are is not on record at the moment, and is tried again: %s", error
                )
            self.trouble = str(error) or repr(error)
            # A change wakes nobody here: it would fail as well.
            ends = time.monotonic() + self._pause
            while (left := ends - time.monotonic()) > 0 and not self._is_due():
                self._changed.wait(left)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            if self._is_due():
                _log.error("%d changes are lost to the next server: %s", len(self._pending), error)
                return False
        return True

    def _is_due(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _succeeded(self, waiting: list[Future[None]]) -> None:
        if self.trouble:
            _log.warning("the store is back: all that was to be kept is on record")
        self.trouble, self._pause = "", FIRST_PAUSE
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(None)


def _lost(keys: set[RowKey]) -> Lost:
    def of(table: str) -> frozenset[str]:
        return frozenset(key for name, key in keys if name == table)

    return Lost(
        allocations=of("allocations"), launchers=of("launchers"), kernels=of("kernels"), sessions=of("sessions")
    )
