"""Records as rows: which fields are columns, which are encrypted, and which go into one JSON text.

Only fields that queries use are columns. The JSON is ASCII: a client's text may hold what a database's text may not
(NUL, half a surrogate pair).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from gateway_slurm.store.encryption import RowCipher
from gateway_slurm.store.records import AllocationRecord, KernelRecord, LauncherRecord, Rows, SessionRecord

MAX_ALLOCATION_BYTES = 1 << 20
"""Of an allocation's JSON text. A larger one is kept without its request and node list, so that the job is found."""

Record = AllocationRecord | LauncherRecord | KernelRecord | SessionRecord
RowKey = tuple[str, str]
"""Table and key."""
Change = tuple[str, str, Record | None]
"""Table, key, and the row's new content; None removes the row."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowKind:
    """How a table keeps its records: the key, the other ``columns``, and the ``encrypted`` fields."""

    record: type[Record]
    key: str
    columns: tuple[str, ...]
    encrypted: tuple[str, ...] = ()


KINDS: dict[str, RowKind] = {
    "allocations": RowKind(AllocationRecord, "launcher_id", ("jobid", "owner")),
    "launchers": RowKind(LauncherRecord, "launcher_id", ("record_key", "epoch"), ("tokens",)),
    "kernels": RowKind(KernelRecord, "kernel_id", ("launcher_id", "record_key", "owner"), ("launch", "manager")),
    "sessions": RowKind(SessionRecord, "session_id", ("kernel_id", "owner")),
}


def key_of(record: Record) -> RowKey:
    """The record's table and key."""
    table = next(name for name, kind in KINDS.items() if isinstance(record, kind.record))
    return table, str(getattr(record, KINDS[table].key))


def to_row(record: Record, cipher: RowCipher, server_id: str) -> dict[str, Any]:
    """The row, with its MAC. Raises TypeError or ValueError for a record that JSON cannot hold."""
    table, key = key_of(record)
    kind = KINDS[table]
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    row = {name: values.pop(name) for name in (kind.key, *kind.columns)} | {"server_id": server_id}
    if kind.encrypted:
        secret = {name: values.pop(name) for name in kind.encrypted}
        if "tokens" in secret:
            secret["tokens"] = [token.hex() for token in secret["tokens"]]
        row["encrypted"] = cipher.encrypt(table, key, secret)
    row["record"] = json.dumps(values)
    if isinstance(record, AllocationRecord) and len(row["record"]) > MAX_ALLOCATION_BYTES:
        return to_row(replace(record, config={}, nodelist=[]), cipher, server_id)
    return cipher.seal(table, row)


def is_authentic(table: str, row: Any, cipher: RowCipher) -> bool:
    """Whether a server with the store's key has written the row."""
    return cipher.is_authentic(table, str(row[KINDS[table].key]), row)


def from_row(table: str, row: Mapping[str, Any], cipher: RowCipher) -> Record | None:
    """The record of a row; None for a row that cannot be read or is not authentic.

    Such a row is logged and does not affect other rows.
    """
    kind = KINDS[table]
    key = str(row[kind.key])
    if not is_authentic(table, row, cipher):
        return None
    try:
        values: dict[str, Any] = json.loads(row["record"])
        if kind.encrypted:
            values |= cipher.decrypt(table, key, bytes(row["encrypted"]))
        if "tokens" in values:
            values["tokens"] = tuple(bytes.fromhex(token) for token in values["tokens"])
        return known_fields(kind.record, values | {name: row[name] for name in (kind.key, *kind.columns)})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        _log.warning("row %s of the store's table %s cannot be read and is left as it is: %s", key, table, error)
        return None


def known_fields(kind: type[T], values: Mapping[str, Any]) -> T:
    """A record of these values. Fields of another version are ignored: the job must be found all the same."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names})


def collect(rows: Mapping[str, list[dict[str, Any]]], cipher: RowCipher) -> Rows:
    """The records of all tables' rows in one object."""
    records = {
        table: tuple(record for row in rows.get(table, ()) if (record := from_row(table, row, cipher)) is not None)
        for table in KINDS
    }
    return Rows(**records)  # type: ignore[arg-type]
