"""Takeovers from dead servers, each in one transaction.

Only one claim runs at a time: each begins with the lock on the epoch's row (SQLite: on the file). A server that renews
its lease or writes locks its own row, and so does a claim. Either the server has renewed before the claim looks, and
lives; or it finds itself ended, and writes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from gateway_slurm.store.encryption import RowCipher
from gateway_slurm.store.records import LEASE_SECONDS, ProcessInfo, ServerRecord
from gateway_slurm.store.rows import is_authentic
from gateway_slurm.store.schema import ALLOCATIONS, KERNELS, LAUNCHERS, META, SERVERS, SESSIONS, TABLES


@dataclass(frozen=True)
class ClaimRequest:
    """The claiming server, and its claim: all rows of its deployment's dead servers, or these kernels' allocations."""

    server_id: str
    deployment: str
    kernel_ids: set[str] | None


@dataclass
class MovedRows:
    """The rows after the move, by table; the launchers' new epoch; the servers that had the rows."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    epoch: int = 0
    servers: list[ServerRecord] = field(default_factory=list)


def servers_of(rows: Iterable[Any], cipher: RowCipher, ahead: float) -> list[ServerRecord]:
    """The records of the authentic ones of servers' rows.

    ``ahead``: seconds by which this host's clock is ahead of the database's.
    """
    return [_server_of(row, ahead) for row in rows if cipher.is_authentic(SERVERS.name, row["server_id"], row)]


def _server_of(row: Any, ahead: float) -> ServerRecord:
    return ServerRecord(
        server_id=row["server_id"],
        deployment=row["deployment"],
        process=ProcessInfo(row["host"], row["boot"], row["pid"], row["start"]),
        url=row["url"],
        addresses=tuple(json.loads(row["addresses"])),
        lease_until=row["lease_until"] + ahead,
        ended=bool(row["ended"]),
        relays=tuple(json.loads(row["relays"])),
    )


def dead_servers(
    connection: sa.Connection, request: ClaimRequest, cipher: RowCipher, now: float, *, lock: bool = False
) -> list[ServerRecord]:
    """The servers whose rows may be claimed; none if the claiming server is itself ended or unknown."""
    claimer = connection.execute(sa.select(SERVERS).where(SERVERS.c.server_id == request.server_id)).mappings().first()
    if claimer is None or claimer["ended"]:
        return []
    others = sa.select(SERVERS).where(SERVERS.c.server_id != request.server_id)
    if request.kernel_ids is None:
        others = others.where(SERVERS.c.deployment == request.deployment)
    else:
        others = others.where(
            SERVERS.c.server_id.in_(sa.select(KERNELS.c.server_id).where(KERNELS.c.kernel_id.in_(request.kernel_ids)))
        )
    rows = connection.execute(others.with_for_update() if lock else others).mappings()
    found = servers_of(rows, cipher, time.time() - now)
    # A gap in the claimer's own lease may mean that the database was away: the other servers may renew first.
    caught_up = now - claimer["leased_since"] >= LEASE_SECONDS
    return [server for server in found if server.ended or server.process.is_dead or (caught_up and server.is_dead)]


def claim(connection: sa.Connection, request: ClaimRequest, cipher: RowCipher, clock: Callable[[], float]) -> MovedRows:
    """Move the authentic rows. The caller's transaction commits the move."""
    epoch = connection.execute(sa.select(META.c.value).where(META.c.key == "epoch").with_for_update()).scalar_one()
    dead = dead_servers(connection, request, cipher, clock(), lock=True)
    if not dead:
        return MovedRows()
    moved = MovedRows(epoch=int(epoch) + 1)
    dead_ids = [server.server_id for server in dead]
    if request.kernel_ids is None:
        scope = _all_rows(dead_ids)
    else:
        scope = _allocations_of(connection, dead_ids, request.kernel_ids)
    for name, table in TABLES.items():
        rows = connection.execute(sa.select(table).where(scope[name])).mappings()
        moved.rows[name] = [dict(row) for row in rows if is_authentic(name, row, cipher)]
    for name in ("launchers", "kernels", "sessions"):
        values = {"server_id": request.server_id} | ({"epoch": moved.epoch} if name == "launchers" else {})
        moved.rows[name] = [cipher.seal(name, row | values) for row in moved.rows[name]]
        _update(connection, TABLES[name], (*values, "mac"), moved.rows[name])
    moved.rows["allocations"] = _move_allocations(connection, cipher, request.server_id, moved.rows["allocations"])
    if moved.rows["launchers"]:
        connection.execute(sa.update(META).where(META.c.key == "epoch").values(value=str(moved.epoch)))
    # A server that lives after all finds itself ended before it writes the next row.
    connection.execute(sa.update(SERVERS).where(SERVERS.c.server_id.in_(dead_ids)).values(ended=True))
    remove_empty_servers(connection, dead_ids)
    moved.servers = dead
    return moved


def _update(connection: sa.Connection, table: sa.Table, columns: Iterable[str], rows: list[dict[str, Any]]) -> None:
    """Set these columns of rows whose key is a single column."""
    (key,) = table.primary_key
    this_row = sa.update(table).where(key == sa.bindparam("row_key"))
    changed = this_row.values({name: sa.bindparam(f"new_{name}") for name in columns})
    if rows:
        new = [{f"new_{name}": row[name] for name in columns} | {"row_key": row[key.name]} for row in rows]
        connection.execute(changed, new)


Scope = dict[str, sa.ColumnElement[bool]]


def _all_rows(dead_ids: list[str]) -> Scope:
    return {name: table.c.server_id.in_(dead_ids) for name, table in TABLES.items()}


def _allocations_of(connection: sa.Connection, dead_ids: list[str], kernel_ids: Iterable[str]) -> Scope:
    """The allocations of these kernels, and all rows in them.

    A launcher has one server: the server that takes over a launcher takes over all its kernels.
    """
    named = KERNELS.c.kernel_id.in_(list(kernel_ids)) & KERNELS.c.server_id.in_(dead_ids)
    places = sa.select(KERNELS.c.server_id, KERNELS.c.record_key).where(named)
    pairs = [tuple(row) for row in connection.execute(places)]
    inside = [tuple(row) for row in connection.execute(sa.select(KERNELS.c.kernel_id).where(_in_any(KERNELS, pairs)))]
    return {
        "allocations": _in_any(ALLOCATIONS, pairs),
        "launchers": _in_any(LAUNCHERS, pairs),
        "kernels": _in_any(KERNELS, pairs),
        "sessions": SESSIONS.c.kernel_id.in_([kernel_id for (kernel_id,) in inside])
        & SESSIONS.c.server_id.in_(dead_ids),
    }


def _in_any(table: sa.Table, pairs: Iterable[tuple[Any, ...]]) -> sa.ColumnElement[bool]:
    key = table.c.launcher_id if table is ALLOCATIONS else table.c.record_key
    return sa.or_(
        sa.false(),
        *(sa.and_(table.c.server_id == server_id, key == record_key) for server_id, record_key in set(pairs)),
    )


def _move_allocations(
    connection: sa.Connection, cipher: RowCipher, new: str, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Move the allocations to one row per job: a job that several of these servers adopted gets all their kernels."""
    keys = [row["launcher_id"] for row in rows]
    mine = sa.select(ALLOCATIONS).where(ALLOCATIONS.c.server_id == new, ALLOCATIONS.c.launcher_id.in_(keys))
    kept: dict[str, dict[str, Any]] = {}
    for known_row in connection.execute(mine).mappings().all():
        key = known_row["launcher_id"]
        if is_authentic(ALLOCATIONS.name, known_row, cipher):
            kept[key] = dict(known_row)
        else:  # it would be in the way of the authentic row
            forged = (ALLOCATIONS.c.server_id == new) & (ALLOCATIONS.c.launcher_id == key)
            connection.execute(sa.delete(ALLOCATIONS).where(forged))
    this_row = sa.and_(
        ALLOCATIONS.c.server_id == sa.bindparam("old_server"), ALLOCATIONS.c.launcher_id == sa.bindparam("old_key")
    )
    gone: list[dict[str, Any]] = []
    moving: list[dict[str, Any]] = []
    for row in rows:
        where: dict[str, Any] = {"old_server": row["server_id"], "old_key": row["launcher_id"]}
        known = kept.get(row["launcher_id"])
        if known is None:
            kept[row["launcher_id"]] = cipher.seal(ALLOCATIONS.name, row | {"server_id": new})
            moving.append(where | {"new_mac": kept[row["launcher_id"]]["mac"]})
        else:
            known["record"] = _merged(known["record"], row["record"])
            gone.append(where)
    if gone:
        connection.execute(sa.delete(ALLOCATIONS).where(this_row), gone)
    if moving:
        moved = sa.update(ALLOCATIONS).where(this_row).values(server_id=new, mac=sa.bindparam("new_mac"))
        connection.execute(moved, moving)
    for key in {row["old_key"] for row in gone}:
        mine = (ALLOCATIONS.c.server_id == new) & (ALLOCATIONS.c.launcher_id == key)
        kept[key] = cipher.seal(ALLOCATIONS.name, kept[key])
        merged = {name: kept[key][name] for name in ("record", "mac")}
        connection.execute(sa.update(ALLOCATIONS).where(mine).values(**merged))
    return list(kept.values())


def _merged(known: str, other: str) -> str:
    first, second = json.loads(known), json.loads(other)
    if first.get("identity") == second.get("identity"):
        first["kernel_ids"] = sorted({*first.get("kernel_ids", ()), *second.get("kernel_ids", ())})
    return json.dumps(first)


def remove_allocation(connection: sa.Connection, server_id: str, record_key: str) -> None:
    """Remove one allocation, with the launchers, kernels and sessions in it."""
    inside = (KERNELS.c.server_id == server_id) & (KERNELS.c.record_key == record_key)
    sessions = SESSIONS.c.kernel_id.in_(sa.select(KERNELS.c.kernel_id).where(inside))
    connection.execute(sa.delete(SESSIONS).where(SESSIONS.c.server_id == server_id, sessions))
    for table in (KERNELS, LAUNCHERS, ALLOCATIONS):
        connection.execute(sa.delete(table).where(_in_any(table, [(server_id, record_key)])))


def remove_empty_servers(connection: sa.Connection, dead: Iterable[str]) -> None:
    """Remove the servers, of these dead ones, that have no rows."""
    empty = [sa.not_(sa.exists().where(table.c.server_id == SERVERS.c.server_id)) for table in TABLES.values()]
    connection.execute(sa.delete(SERVERS).where(SERVERS.c.server_id.in_(list(dead)), *empty))
