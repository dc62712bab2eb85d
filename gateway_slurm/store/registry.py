"""One server's rows, in memory first and then in the store; and questions about all servers' rows."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_core.paths import jupyter_runtime_dir

from gateway_slurm.errors import StoreUnavailable
from gateway_slurm.store.export import EXPORT_NAME, Exporter, RecordFiles
from gateway_slurm.store.keep_flags import KeepFlagFiles
from gateway_slurm.store.records import (
    MEMORY,
    AllocationRecord,
    ClaimedRows,
    KernelRecord,
    LauncherRecord,
    LostRows,
    ServerAllocation,
    ServerRecord,
    SessionRecord,
    this_process,
)
from gateway_slurm.store.rows import Record, RowKey
from gateway_slurm.store.writer import RecordWriter

if TYPE_CHECKING:
    from gateway_slurm.store.database import Store

CLOSE_SECONDS = 5.0
"""How long the end of a server waits for a database that does not answer."""


def state_directory() -> Path:
    """The user's directory for state (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_STATE_HOME", "")
    state = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state"
    return state / "gateway_slurm"


class Registry:
    """One server's rows. ``put_…``, ``remove_…`` and the reads from memory return at once, on any thread.

    Methods marked *blocking* query the store, raise StoreError, and belong in ``asyncio.to_thread``. A full disk or a
    database that does not answer is reported in ``trouble`` and never ends a kernel.
    """

    def __init__(
        self,
        directory: Path,
        export: Path | None = None,
        *,
        url: str = "",
        key_file: str = "",
        deployment: str = "",
        on_lost: Callable[[LostRows], None] = lambda lost: None,
        standing: Callable[[], str] = lambda: "",
    ) -> None:
        """``on_lost`` is called on the writer's thread with the rows that another server has taken over.

        So is ``standing``, which names an event loop of this process that stands still: while it does, the lease is not
        renewed.
        """
        self.directory = directory
        self.keep_flags = KeepFlagFiles(directory / "registry" / "keep")
        self.on_lost = on_lost
        self.epoch = 0
        """The highest epoch of the launchers that this server has claimed."""
        self.store_id = ""
        """The id of the store, once it is open: it tells the store's jobs in Slurm from those of other stores."""
        self._url, self._key_file = url, key_file
        self._files = RecordFiles(directory / "registry")
        process = this_process()
        self._host_directory = directory / (re.sub(r"[^\w.-]", "_", process.host) or "localhost")
        self._exporter = Exporter(export, None if url else self._files, self.allocations, self.all_allocations)
        self.pending_cancel: set[str] = set()
        """Keys of allocations that this server no longer uses and Slurm may still have. ``close`` keeps them on record.
        """
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._writer = RecordWriter(
            ServerRecord(server_id=secrets.token_hex(8), deployment=deployment, process=process),
            lambda: self.store,
            on_lost=lambda lost: self.on_lost(lost),
            on_written=self._export,
            standing=standing,
        )

    @classmethod
    def default(
        cls,
        *,
        url: str = "",
        key_file: str = "",
        deployment: str = "",
        standing: Callable[[], str] = lambda: "",
    ) -> Registry:
        """The user's registry. ``on_lost`` may be set later."""
        export = Path(jupyter_runtime_dir()) / EXPORT_NAME
        return cls(state_directory(), export, url=url, key_file=key_file, deployment=deployment, standing=standing)

    @property
    def server_id(self) -> str:
        """The id of this server in the store."""
        return self._writer.server.server_id

    @property
    def trouble(self) -> str:
        """Why the store accepts no records at the moment, for health checks; empty while it does."""
        return self._writer.trouble

    @property
    def failures(self) -> int:
        """How often the store has not accepted records."""
        return self._writer.failures

    @property
    def peer_key(self) -> bytes:
        """With it the servers of a deployment prove themselves to each other; empty before the store is open."""
        store = self._store
        return b"" if store is None else store.peer_key

    @property
    def store(self) -> Store:
        """Blocking. The open store."""
        with self._opening:
            if self._store is not None and self._store.database.was_removed:
                # The user has removed the file: what is written to it is lost. The records go into a new file.
                self._store.close()
                self._store = None
            if self._store is None:
                # The import takes a good part of a second: it happens off every loop, and only where it is needed.
                from gateway_slurm.store.database import open_store

                self._store = open_store(self._url, self._host_directory, self._key_file)
                self.store_id = self._store.store_id
            return self._store

    # -- A server's life --

    def open(self) -> None:
        """Blocking. Open the store and register this server. A thread renews its lease from now on."""
        store = self.store
        store.register(self._writer.server)
        self._writer.start(store)

    def announce(self, *, url: str = "", addresses: Iterable[str] = (), relays: Iterable[dict[str, Any]] = ()) -> None:
        """Record where clients and launchers reach this server, for other servers and the next one; returns at once."""
        self._writer.announce(url, tuple(addresses), tuple(relays))

    def close(self, *, leave: bool = False) -> None:
        """Blocking, bounded. End this server.

        With ``leave`` all rows stay for the next server; otherwise only allocations that are kept or pending a cancel.
        """
        kept = {record.launcher_id for record in self.allocations() if record.keep} | self.pending_cancel

        def stays(record: Record) -> bool:
            if leave or (isinstance(record, AllocationRecord) and record.launcher_id in kept):
                return True
            # The launcher that holds a kept job stays with it.
            return isinstance(record, LauncherRecord) and record.holds_job and record.record_key in kept

        self._writer.close(stays, CLOSE_SECONDS)
        self._exporter.close()
        with self._opening:
            if self._store is not None:
                self._store.close()
                self._store = None

    async def flushed(self, seconds: float = 30.0) -> None:
        """Wait until all changes up to now are durable. Raises StoreError, with the trouble, after ``seconds``."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._writer.flushed()), seconds)
        except asyncio.TimeoutError:
            raise StoreUnavailable(
                f"the store has recorded nothing for {seconds:g} s: {self.trouble or 'it is busy'}"
            ) from None

    def flush(self, seconds: float = 30.0) -> None:
        """Blocking. As ``flushed``, for threads without a loop."""
        asyncio.run(self.flushed(seconds))

    # -- This server's rows --

    def put(self, record: Record) -> None:
        """Keep a new or changed record. An unchanged record is not written again."""
        self._writer.put(record)

    def remove(self, table: str, key: str) -> None:
        """Remove a row, if it exists; an allocation with its launchers and kernels."""
        self._writer.remove((table, key), *(self._writer.keys_in_allocation(key) if table == "allocations" else ()))

    def allocations(self) -> list[AllocationRecord]:
        """The allocations of this server."""
        return self._writer.all("allocations")

    def launchers(self) -> list[LauncherRecord]:
        """The launchers of this server."""
        return self._writer.all("launchers")

    def kernels(self) -> list[KernelRecord]:
        """The kernels of this server."""
        return self._writer.all("kernels")

    def sessions(self) -> list[SessionRecord]:
        """The sessions of this server."""
        return self._writer.all("sessions")

    def _export(self, changed: set[RowKey]) -> None:
        if any(table == "allocations" for table, _key in changed):
            self._exporter.schedule()

    # -- All servers' rows (blocking) --

    def claim(self, kernel_ids: Iterable[str] | None = None) -> ClaimedRows:
        """Blocking. Take over the rows of the deployment's dead servers, or of these kernels (``Store.claim``)."""
        claimed = self.store.claim(self.server_id, self._writer.server.deployment, kernel_ids)
        self._writer.add_claimed([*claimed.allocations, *claimed.launchers, *claimed.kernels, *claimed.sessions])
        self.epoch = max(self.epoch, claimed.epoch)
        return claimed

    def all_allocations(self) -> list[ServerAllocation]:
        """Blocking. All servers' allocations, other hosts' included."""
        return self.store.all_allocations() + ([] if self._url else self._files.of_other_hosts())

    def owners_of(self, jobid: str) -> set[str]:
        """Blocking. The users who own this job on record; empty for a job that is not on record."""
        return {record.owner for _server, record in self.all_allocations() if record.jobid == jobid}

    def used_jobs(self, *, by_others: bool = False) -> set[str]:
        """Blocking. The ids of jobs in which living servers have kernels; ``by_others`` leaves this server out."""
        return {
            record.jobid or ""
            for server, record in self.all_allocations()
            if record.kernel_ids and not server.is_gone and not (by_others and server.server_id == self.server_id)
        }

    def orphans(self) -> list[ServerAllocation]:
        """Blocking. Allocations of servers that are gone. Also removes the files that dead processes left."""
        if self._url != MEMORY:
            self._files.remove_dead()
        # A database that several deployments share has jobs that only their own deployment can ask Slurm about.
        deployment = None if self.store.is_sqlite else self._writer.server.deployment
        return [
            (server, record)
            for server, record in self.all_allocations()
            if server.is_gone and deployment in (None, server.deployment)
        ]

    def drop(self, orphans: Collection[ServerAllocation]) -> None:
        """Blocking. Remove these allocations of dead servers, with their launchers and kernels."""
        if orphans:
            self.store.drop(orphans)
