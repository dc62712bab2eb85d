"""Records as rows: which fields are columns, which are sealed, and which go into one JSON text.

Only what is asked for is a column. The JSON is ASCII: a client's words may hold what a database's text may
not (NUL, half a surrogate pair). A field of a later version is passed over: it is no reason not to find a job.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gateway_slurm.store.encryption import Seal
from gateway_slurm.store.records import AllocationRecord, KernelRecord, LauncherRecord, Rows, SessionRecord

# A job and its kernels are found whatever it was made with: what is larger is not kept.
LARGEST_ALLOCATION = 1 << 20

Record = AllocationRecord | LauncherRecord | KernelRecord | SessionRecord
RowKey = tuple[str, str]
"""Table and key."""
Change = tuple[str, str, Record | None]
"""Table, key, and what the row is to be; None: gone."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowKind:
    """A table's records; ``columns`` are those beside the key."""

    record: type[Record]
    key: str
    columns: tuple[str, ...]
    sealed: tuple[str, ...] = ()


KINDS: dict[str, RowKind] = {
    "allocations": RowKind(AllocationRecord, "launcher_id", ("jobid", "owner")),
    "launchers": RowKind(LauncherRecord, "launcher_id", ("record_key", "epoch"), ("tokens",)),
    "kernels": RowKind(KernelRecord, "kernel_id", ("launcher_id", "record_key", "owner"), ("launch", "manager")),
    "sessions": RowKind(SessionRecord, "session_id", ("kernel_id", "owner")),
}


def key_of(record: Record) -> RowKey:
    """The row's place: its table and its key."""
    table = next(name for name, kind in KINDS.items() if isinstance(record, kind.record))
    return table, str(getattr(record, KINDS[table].key))


def to_row(record: Record, seal: Seal) -> dict[str, Any]:
    """The row's columns, ``server_id`` aside."""
    table, key = key_of(record)
    kind = KINDS[table]
    values = {one.name: getattr(record, one.name) for one in fields(record)}
    row = {name: values.pop(name) for name in (kind.key, *kind.columns)}
    if kind.sealed:
        hidden = {name: values.pop(name) for name in kind.sealed}
        row["sealed"] = seal.close(table, key, _hexed(hidden))
    row["record"] = json.dumps(values)
    if isinstance(record, AllocationRecord) and len(row["record"]) > LARGEST_ALLOCATION:
        return to_row(replace(record, config={}, nodelist=[]), seal)
    return row


def _hexed(hidden: dict[str, Any]) -> dict[str, Any]:
    return {**hidden, "tokens": [one.hex() for one in hidden["tokens"]]} if "tokens" in hidden else hidden


def from_row(table: str, row: Mapping[str, Any], seal: Seal) -> Record | None:
    """The record of a row; one that cannot be read is told, and takes only itself out."""
    kind = KINDS[table]
    key = str(row[kind.key])
    try:
        values: dict[str, Any] = json.loads(row["record"])
        if kind.sealed:
            values |= seal.open(table, key, bytes(row["sealed"]))
        if "tokens" in values:
            values["tokens"] = tuple(bytes.fromhex(one) for one in values["tokens"])
        values |= {name: row[name] for name in (kind.key, *kind.columns)}
        names = {one.name for one in fields(kind.record)}
        return kind.record(**{name: value for name, value in values.items() if name in names})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        _log.warning("row %s of the store's table %s cannot be read and is left as it is: %s", key, table, error)
        return None


def collect(found: Mapping[str, list[Record]]) -> Rows:
    """Records by table, as one."""
    return Rows(**{table: tuple(found.get(table, ())) for table in KINDS})  # type: ignore[arg-type]
