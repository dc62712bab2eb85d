"""Files drawn from the records, for who does not read the store: Jupyter's frontends, and servers on other hosts.

``slurm_provisioner.json`` in Jupyter's runtime directory is for frontends that know jupyter-slurm-provisioner.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from gateway_slurm.errors import StoreError
from gateway_slurm.filelock import locked
from gateway_slurm.store.files import LOCK_SECONDS, RecordFiles, write_atomically
from gateway_slurm.store.processes import ProcessInfo
from gateway_slurm.store.records import AllocationRecord, Found

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
