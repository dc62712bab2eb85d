"""One JSON file a process, in the user's state directory: for other hosts, and of versions that had no database.

Homes are shared between hosts, and SQLite's files must not be. So what a server has on record it draws here as
well, for the user's servers on other hosts to read: they may share or leave a job that it is in. No secrets, and
the database is what counts: on the file's own host it is passed over.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from gateway_slurm.filelock import locked
from gateway_slurm.store.processes import ProcessInfo, this_process
from gateway_slurm.store.records import AllocationRecord, Found, ServerRecord

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
        """What no database of this host has: other hosts' records, and those of older versions."""
        here = this_process().host
        return [
            (server, record)
            for _path, server, in_store, records in self._all()
            if server.process.host != here or not in_store
            for record in records
        ]

    def take_dead(self) -> Iterable[tuple[ServerRecord, list[AllocationRecord]]]:
        """The records that processes of this host left with older versions; each file goes once they are dealt with."""
        if not self.directory.is_dir():
            return
        with locked(self.directory / "recovery.lock", LOCK_SECONDS):
            for path, server, in_store, records in self._all():
                if server.process.is_dead:
                    if not in_store:
                        yield server, records
                    path.unlink(missing_ok=True)

    def _all(self) -> Iterable[tuple[Path, ServerRecord, bool, list[AllocationRecord]]]:
        for path in sorted(self.directory.glob("*.json")):
            try:
                yield (path, *_read(path))
            except FileNotFoundError:  # its process has just ended
                continue
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                _log.warning("%s cannot be read and is left as it is: %s", path, error)


def _content(process: ProcessInfo, records: list[AllocationRecord]) -> str:
    return json.dumps({"process": asdict(process), "in_store": True, "records": [asdict(one) for one in records]})


def _read(path: Path) -> tuple[ServerRecord, bool, list[AllocationRecord]]:
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"it is larger than {LARGEST_FILE} bytes")
    content: dict[str, Any] = json.loads(path.read_text())
    process = ProcessInfo(**content["process"])
    names = {one.name for one in fields(AllocationRecord)}
    # A field of a later version is no reason not to find the job.
    known = [{name: value for name, value in one.items() if name in names} for one in content["records"]]
    server = ServerRecord(server_id=f"file-{process.file_name}", process=process, lease_until=math.inf)
    return server, bool(content.get("in_store")), [AllocationRecord(**one) for one in known]


def write_atomically(path: Path, text: str) -> None:
    """Replace a file whole, 0600; whoever reads sees the old text or the new one."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
