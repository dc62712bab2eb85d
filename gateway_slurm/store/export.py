"""Files for readers that cannot open the store: Jupyter's frontends, and servers on other hosts.

``slurm_provisioner.json`` in Jupyter's runtime directory is for frontends that know jupyter-slurm-provisioner. The
files for other hosts are one per process: with SQLite each host has a store of its own, but hosts share the home.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gateway_slurm._util import LogOnce, locked, make_private_directory, write_atomically
from gateway_slurm.errors import StoreError
from gateway_slurm.store.records import AllocationRecord, ProcessInfo, ServerAllocation, ServerRecord, this_process
from gateway_slurm.store.rows import known_fields

EXPORT_NAME = "slurm_provisioner.json"
MAX_FILE_BYTES = 4 << 20
LOCK_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Exporter:
    """Writes both kinds of files in a thread of its own, since it waits for a lock. Its owner calls ``close``.

    ``export`` is the frontends' file, ``files`` those for other hosts; None where they are not wanted.
    """

    def __init__(
        self,
        export: Path | None,
        files: RecordFiles | None,
        own_allocations: Callable[[], list[AllocationRecord]],
        all_allocations: Callable[[], list[ServerAllocation]],
    ) -> None:
        self._export, self._files = export, files
        self._own_allocations, self._all_allocations = own_allocations, all_allocations
        self._process = this_process()
        self._executor = ThreadPoolExecutor(1, "gateway_slurm-export")
        self._scheduled: Future[None] | None = None
        self._log = LogOnce(_log)

    def schedule(self) -> None:
        """Write the files soon: once for all changes until then."""
        scheduled = self._scheduled
        if scheduled is None or scheduled.running() or scheduled.done():
            with contextlib.suppress(RuntimeError):  # after close
                self._scheduled = self._executor.submit(self._write)

    def close(self) -> None:
        """Finish the write that is under way, and end the thread."""
        self._executor.shutdown()

    def _write(self) -> None:
        try:
            if self._files is not None:
                self._files.write(self._process, self._own_allocations())
            if self._export is not None:
                write_export(self._export, self._all_allocations)
        except (OSError, StoreError) as error:
            self._log.warning("write", "the files for frontends and other hosts are out of date: %s", error)
        else:
            self._log.clear("write")


# -- The frontends' file --


def write_export(path: Path, all_allocations: Callable[[], list[ServerAllocation]]) -> None:
    """Write the frontends' file. The lock makes the last writer see what all have recorded. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), LOCK_SECONDS):
        found = all_allocations()
        gone = servers_gone(found)
        living = [(server, record) for server, record in found if server.server_id not in gone]
        # The file belongs to the Unix user of this process. It must not show other owners' jobs.
        jobs = {
            jobid: {  # jupyter-slurm-provisioner's format
                "kernel_ids": record.kernel_ids,
                "nodelist": record.nodelist,
                "endtime": record.end_time,
                "config": record.config,
                "state": record.state,
            }
            for jobid, (_server, record) in by_job(living, gone).items()
            if not record.owner
        }
        write_atomically(path, json.dumps(jobs))


def servers_gone(allocations: Iterable[ServerAllocation]) -> set[str]:
    """The ids of the servers that are gone. Each is looked at once: it costs reads of /proc, and has many records."""
    servers = {server.server_id: server for server, _record in allocations}
    return {server_id for server_id, server in servers.items() if server.is_gone}


def by_job(allocations: Collection[ServerAllocation], gone: set[str] | None = None) -> dict[str, ServerAllocation]:
    """One record per job id. Where several servers have kernels in a job, it has the kernels of all living ones.

    The other fields are those of a living server's record before a dead one's, and the submitter's before an adopter's.
    A record of an earlier job with the same id is left out. ``gone`` has the ids of the servers that are gone, where
    the caller knows them.
    """
    if gone is None:
        gone = servers_gone(allocations)
    jobs: dict[str, ServerAllocation] = {}
    for server, record in sorted(
        allocations, key=lambda pair: (pair[0].server_id in gone, not pair[1].ours, pair[0].server_id)
    ):
        if record.jobid is None:
            continue
        kernel_ids = [] if server.server_id in gone else record.kernel_ids
        leader, known = jobs.setdefault(record.jobid, (server, replace(record, kernel_ids=[])))
        if known.identity == record.identity:
            merged = sorted({*known.kernel_ids, *kernel_ids})
            jobs[record.jobid] = (leader, replace(known, kernel_ids=merged, keep=known.keep or record.keep))
    return jobs


# -- The files for servers on other hosts --


class RecordFiles:
    """One file per process in one directory. A file that cannot be read is logged and does not affect the others."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, process: ProcessInfo, records: list[AllocationRecord]) -> None:
        """Replace a process's file; without records, remove it. Raises OSError."""
        path = self.directory / process.file_name
        if not records:
            path.unlink(missing_ok=True)
            return
        make_private_directory(self.directory)
        text = _content(process, records)
        if len(text) > MAX_FILE_BYTES:
            # The fields that find a job and its kernels matter more than the request.
            text = _content(process, [replace(record, config={}, nodelist=[]) for record in records])
        write_atomically(path, text)

    def of_other_hosts(self) -> list[ServerAllocation]:
        """The allocations of servers on other hosts, which this host's store does not have."""
        this_host = this_process().host
        others = [(server, records) for _path, server, records in self._all() if server.process.host != this_host]
        return [(server, record) for server, records in others for record in records]

    def remove_dead(self) -> None:
        """Remove the files of this host's processes that have ended; the store has their records. Raises OSError."""
        for path, server, _records in self._all():
            if server.process.is_dead:
                path.unlink(missing_ok=True)

    def _all(self) -> Iterable[tuple[Path, ServerRecord, list[AllocationRecord]]]:
        for path in sorted(self.directory.glob("*.json")):
            try:
                yield (path, *_read(path))
            except FileNotFoundError:  # its process has just ended
                continue
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                _log.warning("%s cannot be read and is left as it is: %s", path, error)


def _content(process: ProcessInfo, records: list[AllocationRecord]) -> str:
    return json.dumps({"process": asdict(process), "records": [asdict(record) for record in records]})


def _read(path: Path) -> tuple[ServerRecord, list[AllocationRecord]]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
    content: dict[str, Any] = json.loads(path.read_text())
    process = ProcessInfo(**content["process"])
    server = ServerRecord(server_id=f"file-{process.file_name}", process=process, lease_until=math.inf)
    return server, [known_fields(AllocationRecord, entry) for entry in content["records"]]
