"""Files drawn from the records, for who does not read the store: Jupyter's frontends, and servers on other hosts.

``slurm_provisioner.json`` in Jupyter's runtime directory is for frontends that know jupyter-slurm-provisioner.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from gateway_slurm._util import locked, write_atomically
from gateway_slurm.errors import StoreError
from gateway_slurm.store.records import AllocationRecord, Found, ProcessInfo, ServerRecord, this_process

LARGEST_FILE = 4 << 20
LOCK_SECONDS = 5.0

_log = logging.getLogger(__name__)


class RecordFiles:
    """The files in one directory. What is broken is told, and takes only itself out."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def draw(self, process: ProcessInfo, records: list[AllocationRecord]) -> None:
        """Replace a process's file; without records there is none. Raises OSError."""
        path = self.directory / process.file_name
        if not records:
            path.unlink(missing_ok=True)
            return
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = _content(process, records)
        if len(text) > LARGEST_FILE:
            # What it takes to find a job and its kernels is more important than what it was asked for.
            text = _content(process, [replace(record, config={}, nodelist=[]) for record in records])
        write_atomically(path, text)

    def found(self) -> list[Found]:
        """The records of servers on other hosts, which are in no database of this host."""
        this_host = this_process().host
        return [
            (server, record)
            for _path, server, records in self._all()
            if server.process.host != this_host
            for record in records
        ]

    def remove_dead(self) -> None:
        """Remove the files of this host's processes that have ended; the store has what they had. Raises OSError."""
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
    return json.dumps({"process": asdict(process), "records": [asdict(one) for one in records]})


def _read(path: Path) -> tuple[ServerRecord, list[AllocationRecord]]:
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
    content: dict[str, Any] = json.loads(path.read_text())
    process = ProcessInfo(**content["process"])
    names = {one.name for one in fields(AllocationRecord)}
    # A field of a later version is no reason not to find the job.
    known = [{name: value for name, value in one.items() if name in names} for one in content["records"]]
    server = ServerRecord(server_id=f"file-{process.file_name}", process=process, lease_until=math.inf)
    return server, [AllocationRecord(**one) for one in known]


# -- Files drawn from the records, for who does not read the store: Jupyter's frontends, and servers on other hosts. --


EXPORT_NAME = "slurm_provisioner.json"

_log = logging.getLogger(__name__)


class Drawing:
    """Draws in a thread of its own, since it waits for a lock; whoever made it calls ``close``.

    ``export`` is the frontends' file, ``files`` the other hosts'; None: not wanted.
    """

    def __init__(self, export: Path | None, files: RecordFiles | None, process: ProcessInfo) -> None:
        self._export, self._files, self._process = export, files, process
        self._executor = ThreadPoolExecutor(1, "gateway_slurm-export")
        self._drawing: Future[None] | None = None
        self._complained = False

    def again(self, own: Callable[[], list[AllocationRecord]], found: Callable[[], list[Found]]) -> None:
        """Draw anew, soon; once for all that changes until then."""
        drawing = self._drawing
        if drawing is None or drawing.running() or drawing.done():
            with contextlib.suppress(RuntimeError):  # after the end: there is nobody to draw for
                self._drawing = self._executor.submit(self._draw, own, found)

    def close(self) -> None:
        """Draw what is under way, and end."""
        self._executor.shutdown()

    def _draw(self, own: Callable[[], list[AllocationRecord]], found: Callable[[], list[Found]]) -> None:
        try:
            if self._files is not None:
                self._files.draw(self._process, own())
            if self._export is not None:
                draw_export(self._export, found)
        except (OSError, StoreError) as error:
            if not self._complained:
                _log.warning("frontends and other hosts are not shown what there is: %s", error)
            self._complained = True


def draw_export(path: Path, found: Callable[[], list[Found]]) -> None:
    """Draw the frontends' file; the lock makes who draws last see what all have written. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), LOCK_SECONDS):
        living = [(server, record) for server, record in found() if not server.is_gone]
        # The file is the process's own user's; what other owners have is none of theirs.
        jobs = {jobid: record for jobid, (_server, record) in by_job(living).items() if not record.owner}
        write_atomically(path, json.dumps({jobid: _for_frontends(record) for jobid, record in jobs.items()}))


def _for_frontends(record: AllocationRecord) -> dict[str, Any]:
    """As jupyter-slurm-provisioner writes it."""
    return {
        "kernel_ids": record.kernel_ids,
        "nodelist": record.nodelist,
        "endtime": record.end_time,
        "config": record.config,
        "state": record.state,
    }


def by_job(found: Iterable[Found]) -> dict[str, Found]:
    """One record a job, where several servers have kernels in it: those of all that live, and the rest from one.

    That is the one that lives, and whose job it is. A record of an earlier job with the same id is left out.
    """
    jobs: dict[str, Found] = {}
    for server, record in sorted(found, key=lambda one: (one[0].is_gone, not one[1].ours, one[0].server_id)):
        if record.jobid is None:
            continue
        kernel_ids = [] if server.is_gone else record.kernel_ids
        leader, known = jobs.setdefault(record.jobid, (server, replace(record, kernel_ids=[])))
        if known.identity == record.identity:
            merged = sorted({*known.kernel_ids, *kernel_ids})
            jobs[record.jobid] = (leader, replace(known, kernel_ids=merged, keep=known.keep or record.keep))
    return jobs
