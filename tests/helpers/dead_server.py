"""Records that a dead server has left in the store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gateway_slurm import store
from gateway_slurm.store import AllocationRecord
from gateway_slurm.store.database import open_store


def leave_behind(directory: Path, *records: AllocationRecord) -> None:
    """Write the records of a dead server into the store."""
    opened = open_store("", directory / store.this_process().host)
    dead = store.ServerRecord(server_id="dead", process=replace(store.this_process(), start="1"))
    opened.register(dead)
    assert opened.write("dead", [("allocations", record.launcher_id, record) for record in records])
    opened.close()
