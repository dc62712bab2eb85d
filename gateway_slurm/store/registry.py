"""A server process's own rows, in memory first and then in the store; and everybody's, to read."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_core.paths import jupyter_runtime_dir

from gateway_slurm.errors import StoreError, StoreUnavailable
from gateway_slurm.store.export import EXPORT_NAME, Drawing, RecordFiles
from gateway_slurm.store.marks import KeepMarks
from gateway_slurm.store.records import (
    AllocationRecord,
    Claimed,
    Found,
    KernelRecord,
    LauncherRecord,
    Lost,
    ServerRecord,
    SessionRecord,
    this_process,
)
from gateway_slurm.store.rows import Record, RowKey
from gateway_slurm.store.writer import OwnRows

if TYPE_CHECKING:
    from gateway_slurm.store.database import Store

MEMORY = "memory:"
# How long the end of a server waits for a database that is away.
CLOSE_SECONDS = 5.0


def state_directory() -> Path:
    """The user's own, on XDG's terms."""
    base = os.environ.get("XDG_STATE_HOME", "")
    state = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state"
    return state / "gateway_slurm"


class Registry:
    """One server's rows. ``put_…``, ``remove_…`` and what reads memory return at once, on any thread.

    What is marked *blocking* asks the store, raises StoreError, and belongs in ``asyncio.to_thread``. A disk that
    is full, or a database that is away, is told in ``trouble`` and never the end of a kernel.
    """

    def __init__(
        self,
        directory: Path,
        export: Path | None = None,
        *,
        url: str = "",
        key_file: str = "",
        deployment: str = "",
        on_lost: Callable[[Lost], None] = lambda lost: None,
    ) -> None:
        """``on_lost`` is called on the writer's thread with what another server took over."""
        self.directory = directory
        self.marks = KeepMarks(directory / "registry" / "keep")
        self.on_lost = on_lost
        self.epoch = 0
        self.store_id = ""
        """Of the store, once it has been opened: what tells its servers' jobs from those of others."""
        self._url, self._key_file = url, key_file
        self._files = RecordFiles(directory / "registry")
        process = this_process()
        self._host_directory = directory / (re.sub(r"[^\w.-]", "_", process.host) or "localhost")
        self._drawing = Drawing(export, None if url else self._files, process)
        # Keys of allocations that a server has left and Slurm has yet to be told of, or to tell of: they stay, as kept.
        self.unsettled: set[str] = set()
        self._opening = threading.Lock()
        self._store: Store | None = None
        self._own = OwnRows(
            ServerRecord(server_id=secrets.token_hex(8), deployment=deployment, process=process),
            lambda: self.store,
            on_lost=lambda lost: self.on_lost(lost),
            on_written=self._draw,
        )

    @classmethod
    def default(cls, *, url: str = "", key_file: str = "", deployment: str = "") -> Registry:
        """The user's; ``on_lost`` is a plain attribute and may be set later."""
        return cls(
            state_directory(),
            Path(jupyter_runtime_dir()) / EXPORT_NAME,
            url=url,
            key_file=key_file,
            deployment=deployment,
        )

    @property
    def server_id(self) -> str:
        return self._own.server.server_id

    @property
    def trouble(self) -> str:
        """Why the store takes nothing at the moment, for health; empty while it does."""
        return self._own.trouble

    @property
    def store(self) -> Store:
        """Blocking. The open store."""
        with self._opening:
            if self._store is not None and self._store.was_removed:
                # Somebody tidied up: what goes into the old file is lost. What there is goes into a new one.
                self._store.close()
                self._store = None
            if self._store is None:
                # It takes a good part of a second: here, off every loop, and for who needs a store only.
                from gateway_slurm.store.database import open_store

                self._store = open_store(self._url, self._host_directory, self._key_file)
                self.store_id = self._store.store_id
            return self._store

    # -- a server's life --------------------------------------------------------------------------

    def open(self) -> None:
        """Blocking. Open the store and register this server; its lease is renewed from now on, by a thread."""
        store = self.store
        store.register(self._own.server)
        self._own.start(store)

    def announce(self, *, url: str = "", addresses: Iterable[str] = (), relays: Iterable[dict[str, Any]] = ()) -> None:
        """Where clients and launchers reach this server, for the others and the next; returns at once."""
        self._own.announce(url, tuple(addresses), tuple(relays))

    def close(self, *, leave: bool = False) -> None:
        """Blocking, bounded. End; with ``leave`` everything stays for the next server, else only kept and unsettled
        allocations.
        """
        kept = {record.launcher_id for record in self.records() if record.keep or record.launcher_id in self.unsettled}

        def stays(record: Record) -> bool:
            if leave or (isinstance(record, AllocationRecord) and record.launcher_id in kept):
                return True
            # The launcher that holds a kept job stays with it.
            return isinstance(record, LauncherRecord) and record.holds_job and record.record_key in kept

        self._own.close(stays, CLOSE_SECONDS)
        self._drawing.close()
        with self._opening:
            if self._store is not None:
                self._store.close()
                self._store = None

    async def flushed(self, seconds: float = 30.0) -> None:
        """Until all that was put before is durable. Raises StoreError, with the trouble, when it takes longer."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._own.flushed()), seconds)
        except asyncio.TimeoutError:
            raise self._not_durable(seconds) from None

    def flush(self, seconds: float = 30.0) -> None:
        """Blocking. The same, for threads."""
        try:
            self._own.flushed().result(seconds)
        except concurrent.futures.TimeoutError:
            raise self._not_durable(seconds) from None

    def _not_durable(self, seconds: float) -> StoreError:
        return StoreUnavailable(f"nothing could be put on record for {seconds:g} s: {self.trouble or 'it is busy'}")

    # -- own rows ---------------------------------------------------------------------------------

    def put(self, record: AllocationRecord) -> None:
        """Keep an allocation, new or changed; one that is as it was costs nothing."""
        self._own.put(record)

    def remove(self, launcher_id: str) -> None:
        """An allocation is over, with its launchers and kernels."""
        self._own.remove(("allocations", launcher_id), *self._own.inside(launcher_id))

    def records(self) -> list[AllocationRecord]:
        return self._own.all("allocations")

    def put_launcher(self, record: LauncherRecord) -> None:
        self._own.put(record)

    def remove_launcher(self, launcher_id: str) -> None:
        self._own.remove(("launchers", launcher_id))

    def launchers(self) -> list[LauncherRecord]:
        return self._own.all("launchers")

    def put_kernel(self, record: KernelRecord) -> None:
        self._own.put(record)

    def remove_kernel(self, kernel_id: str) -> None:
        self._own.remove(("kernels", kernel_id))

    def kernels(self) -> list[KernelRecord]:
        return self._own.all("kernels")

    def put_session(self, record: SessionRecord) -> None:
        self._own.put(record)

    def remove_session(self, session_id: str) -> None:
        self._own.remove(("sessions", session_id))

    def sessions(self) -> list[SessionRecord]:
        return self._own.all("sessions")

    def _draw(self, changed: set[RowKey]) -> None:
        if any(table == "allocations" for table, _key in changed):
            self._drawing.again(self.records, self.all_records)

    # -- everybody's (blocking) -------------------------------------------------------------------

    def claim(self, kernel_ids: Iterable[str] | None = None) -> Claimed:
        """Blocking. Take over what dead servers of the deployment have (``Store.claim``); it is own rows then."""
        claimed = self.store.claim(self.server_id, self._own.server.deployment, kernel_ids)
        self._own.took_over([*claimed.allocations, *claimed.launchers, *claimed.kernels, *claimed.sessions])
        self.epoch = max(self.epoch, claimed.epoch)
        return claimed

    def servers(self) -> list[ServerRecord]:
        """Blocking. All that live, and the dead ones that still have rows."""
        return self.store.servers()

    def find_launcher(self, launcher_id: str) -> tuple[ServerRecord, LauncherRecord] | None:
        """Blocking. Who owns a launcher, and its record with its tokens."""
        return self.store.find_launcher(launcher_id)

    def all_kernels(self) -> list[tuple[ServerRecord, KernelRecord]]:
        """Blocking. Every server's kernels."""
        return self.store.all_kernels()

    def all_records(self) -> list[Found]:
        """Blocking. Every server's allocations, other hosts' too."""
        return self.store.all_records() + ([] if self._url else self._files.found())

    def owners_of(self, jobid: str) -> set[str]:
        """Blocking. To whom the records say that this job belongs; none for a job that no record names."""
        return {record.owner for _server, record in self.all_records() if record.jobid == jobid}

    def used_jobs(self, *, elsewhere: bool = False) -> set[str]:
        """Blocking. The ids of jobs in which servers that live have kernels; ``elsewhere``: others than this one."""
        found = [one for one in self.all_records() if not one[0].is_gone and one[1].kernel_ids]
        return {record.jobid or "" for server, record in found if not elsewhere or server.server_id != self.server_id}

    def orphans(self) -> list[Found]:
        """Blocking. Allocations of servers that are gone. Also removes the files that dead processes left."""
        if self._url != MEMORY:
            self._files.remove_dead()
        # A database that several share holds jobs that only their own deployment can ask Slurm about.
        deployment = None if self.store.is_sqlite else self._own.server.deployment
        return [
            (server, record)
            for server, record in self.all_records()
            if server.is_gone and deployment in (None, server.deployment)
        ]

    def drop(self, orphans: Iterable[Found]) -> None:
        """Blocking. Remove these allocations of dead servers, with their launchers and kernels."""
        found = list(orphans)
        if found:
            self.store.drop(found)
