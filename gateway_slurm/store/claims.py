"""Taking over from dead servers, in one transaction: what is looked at, locked and moved. Imports SQLAlchemy.

Claims are one after the other: each begins with the lock on the epoch's row (SQLite: on the file). A server that
renews its lease or writes locks its own row, and so do we: it has either renewed before we look, and lives; or it
finds itself ended, and writes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from gateway_slurm.store.records import LEASE_SECONDS, ProcessInfo, ServerRecord
from gateway_slurm.store.schema import ALLOCATIONS, KERNELS, LAUNCHERS, META, SERVERS, SESSIONS, TABLES


@dataclass(frozen=True)
class Wanted:
    """Who claims, and what: everything of a deployment's dead servers, or what these kernels are in."""

    server_id: str
    deployment: str
    kernel_ids: set[str] | None


@dataclass
class Moved:
    """Rows as they are now, by table."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    epoch: int = 0
    servers: list[ServerRecord] = field(default_factory=list)


def server_of(row: Any, ahead: float) -> ServerRecord:
    """A server's row as its record; ``ahead``: seconds by which this machine's clock is before the database's."""
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


def dead_servers(connection: sa.Connection, wanted: Wanted, now: float, *, lock: bool = False) -> list[ServerRecord]:
    """Those that may be taken over from; none while the claimer is no living server itself."""
    me = connection.execute(sa.select(SERVERS).where(SERVERS.c.server_id == wanted.server_id)).mappings().first()
    if me is None or me["ended"]:
        return []
    others = sa.select(SERVERS).where(SERVERS.c.server_id != wanted.server_id)
    if wanted.kernel_ids is None:
        others = others.where(SERVERS.c.deployment == wanted.deployment)
    else:
        others = others.where(
            SERVERS.c.server_id.in_(sa.select(KERNELS.c.server_id).where(KERNELS.c.kernel_id.in_(wanted.kernel_ids)))
        )
    rows = connection.execute(others.with_for_update() if lock else others).mappings()
    found = [server_of(row, time.time() - now) for row in rows]
    # Where the claimer's own lease had a gap, so had the others' maybe: the database was away. They may renew first.
    caught_up = now - me["leased_since"] >= LEASE_SECONDS
    return [one for one in found if one.ended or one.process.is_dead or (caught_up and one.is_dead)]


def claim(connection: sa.Connection, wanted: Wanted, clock: Callable[[], float]) -> Moved:
    """Move the rows; the caller's transaction commits it."""
    epoch = connection.execute(sa.select(META.c.value).where(META.c.key == "epoch").with_for_update()).scalar_one()
    dead = dead_servers(connection, wanted, clock(), lock=True)
    if not dead:
        return Moved()
    moved = Moved(epoch=int(epoch) + 1)
    owners = [one.server_id for one in dead]
    scope = _everything(owners) if wanted.kernel_ids is None else _around(connection, owners, wanted.kernel_ids)
    moved.rows = {
        name: [dict(row) for row in connection.execute(sa.select(table).where(scope[name])).mappings()]
        for name, table in TABLES.items()
    }
    for name in ("launchers", "kernels", "sessions"):
        values = {"server_id": wanted.server_id} | ({"epoch": moved.epoch} if name == "launchers" else {})
        connection.execute(sa.update(TABLES[name]).where(scope[name]).values(**values))
        moved.rows[name] = [row | values for row in moved.rows[name]]
    moved.rows["allocations"] = _move_allocations(connection, wanted.server_id, moved.rows["allocations"])
    connection.execute(sa.update(META).where(META.c.key == "epoch").values(value=str(moved.epoch)))
    # Should it live after all: it finds out before it writes the next row.
    connection.execute(sa.update(SERVERS).where(SERVERS.c.server_id.in_(owners)).values(ended=True))
    sweep(connection, owners)
    moved.servers = dead
    return moved


Scope = dict[str, sa.ColumnElement[bool]]


def _everything(owners: list[str]) -> Scope:
    return {name: table.c.server_id.in_(owners) for name, table in TABLES.items()}


def _around(connection: sa.Connection, owners: list[str], kernel_ids: Iterable[str]) -> Scope:
    """The allocations that these kernels are in, and all in them.

    A launcher has one server: whoever takes one over has all its kernels to see to.
    """
    named = KERNELS.c.kernel_id.in_(list(kernel_ids)) & KERNELS.c.server_id.in_(owners)
    places = sa.select(KERNELS.c.server_id, KERNELS.c.record_key).where(named)
    pairs = [tuple(row) for row in connection.execute(places)]
    inside = [tuple(row) for row in connection.execute(sa.select(KERNELS.c.kernel_id).where(_in_any(KERNELS, pairs)))]
    return {
        "allocations": _in_any(ALLOCATIONS, pairs),
        "launchers": _in_any(LAUNCHERS, pairs),
        "kernels": _in_any(KERNELS, pairs),
        "sessions": SESSIONS.c.kernel_id.in_([one for (one,) in inside]) & SESSIONS.c.server_id.in_(owners),
    }


def _in_any(table: sa.Table, pairs: Iterable[tuple[Any, ...]]) -> sa.ColumnElement[bool]:
    key = table.c.launcher_id if table is ALLOCATIONS else table.c.record_key
    return sa.or_(sa.false(), *(sa.and_(table.c.server_id == owner, key == one) for owner, one in set(pairs)))


def _move_allocations(connection: sa.Connection, new: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a job: where the claimer, or two of the dead, have the same adopted job, its kernels become one list."""
    keys = [row["launcher_id"] for row in rows]
    mine = sa.select(ALLOCATIONS).where(ALLOCATIONS.c.server_id == new, ALLOCATIONS.c.launcher_id.in_(keys))
    kept = {row["launcher_id"]: dict(row) for row in connection.execute(mine).mappings()}
    this_row = sa.and_(
        ALLOCATIONS.c.server_id == sa.bindparam("owner_was"), ALLOCATIONS.c.launcher_id == sa.bindparam("key_was")
    )
    gone, moving = [], []
    for row in rows:
        where = {"owner_was": row["server_id"], "key_was": row["launcher_id"]}
        known = kept.get(row["launcher_id"])
        if known is None:
            kept[row["launcher_id"]] = row | {"server_id": new}
            moving.append(where)
        else:
            known["record"] = _joined(known["record"], row["record"])
            gone.append(where)
    if gone:
        connection.execute(sa.delete(ALLOCATIONS).where(this_row), gone)
    if moving:
        connection.execute(sa.update(ALLOCATIONS).where(this_row).values(server_id=new), moving)
    for key in {one["key_was"] for one in gone}:
        own = (ALLOCATIONS.c.server_id == new) & (ALLOCATIONS.c.launcher_id == key)
        connection.execute(sa.update(ALLOCATIONS).where(own).values(record=kept[key]["record"]))
    return list(kept.values())


def _joined(known: str, other: str) -> str:
    first, second = json.loads(known), json.loads(other)
    if first.get("identity") == second.get("identity"):
        first["kernel_ids"] = sorted({*first.get("kernel_ids", ()), *second.get("kernel_ids", ())})
    return json.dumps(first)


def remove(connection: sa.Connection, owner: str, record_key: str) -> None:
    """One allocation and all in it."""
    inside = (KERNELS.c.server_id == owner) & (KERNELS.c.record_key == record_key)
    sessions = SESSIONS.c.kernel_id.in_(sa.select(KERNELS.c.kernel_id).where(inside))
    connection.execute(sa.delete(SESSIONS).where(SESSIONS.c.server_id == owner, sessions))
    for table in (KERNELS, LAUNCHERS, ALLOCATIONS):
        connection.execute(sa.delete(table).where(_in_any(table, [(owner, record_key)])))


def sweep(connection: sa.Connection, dead: Iterable[str]) -> None:
    """Forget those of these dead servers that have nothing any more."""
    empty = [sa.not_(sa.exists().where(table.c.server_id == SERVERS.c.server_id)) for table in TABLES.values()]
    connection.execute(sa.delete(SERVERS).where(SERVERS.c.server_id.in_(list(dead)), *empty))
