"""The store: one database, and what can be asked of it. Imports SQLAlchemy: import it late, off the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from gateway_slurm.errors import StoreError
from gateway_slurm.store import claims as claiming
from gateway_slurm.store import schema
from gateway_slurm.store.encryption import KEY_BYTES, KEY_NAME, Seal, make_key, read_key
from gateway_slurm.store.engine import MEMORY, Database, connect, make_directory
from gateway_slurm.store.records import (
    LEASE_SECONDS,
    AllocationRecord,
    Claimed,
    Found,
    KernelRecord,
    LauncherRecord,
    Rows,
    ServerRecord,
)
from gateway_slurm.store.rows import KINDS, Change, Record, RowKey, collect, from_row, to_row
from gateway_slurm.store.schema import ALLOCATIONS, KERNELS, LAUNCHERS, META, SERVERS, SESSIONS, TABLES

# What an opening process waits for another one that is just making the tables.
PREPARE_LOCK = 0x6A75_7079


class Store:
    """An open database. Blocking; any thread may call it; every method raises StoreError.

    Whoever opened it calls ``close``. What is said of leases is by the database's clock, and told by this machine's.
    """

    def __init__(self, database: Database, seal: Seal) -> None:
        self._database, self._seal = database, seal
        self.shown, self.store_id = database.shown, seal.store_id
        self.is_sqlite = database.is_sqlite
        self._leases: dict[str, float] = {}

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One transaction that changes nothing, for other modules' questions."""
        with self._database.reading() as connection:
            yield connection

    @property
    def was_removed(self) -> bool:
        """Whether its file is not there any more, or another one is in its place."""
        return self._database.was_removed

    # -- servers ----------------------------------------------------------------------------------

    def register(self, server: ServerRecord) -> None:
        """A server lives, or lives again, for a lease from now."""
        with self._database.writing() as connection:
            self._register(connection, server)
            others = self._servers(connection, SERVERS.c.server_id != server.server_id)
            claiming.sweep(connection, [one.server_id for one in others if one.is_dead])

    def _register(self, connection: sa.Connection, server: ServerRecord) -> None:
        self._leases[server.server_id] = LEASE_SECONDS if self.is_leased(server) else math.inf
        now = self._database.now(connection)
        values: dict[str, Any] = {
            **dataclasses.asdict(server.process),
            "deployment": server.deployment,
            "url": server.url,
            "addresses": json.dumps(server.addresses),
            "lease_until": now + self._leases[server.server_id],
            # It is new: it has missed nothing.
            "leased_since": now - LEASE_SECONDS,
            "ended": server.ended,
            "relays": json.dumps(server.relays),
        }
        there = sa.update(SERVERS).where(SERVERS.c.server_id == server.server_id).values(**values)
        if connection.execute(there).rowcount == 0:
            connection.execute(sa.insert(SERVERS).values(server_id=server.server_id, **values))

    def is_leased(self, server: ServerRecord) -> bool:
        """Whether it has to renew what it owns.

        Where all servers are on this machine and nobody takes over from this one, its process says all there is.
        """
        return bool(server.deployment) or not self.is_sqlite

    def end(self, server_id: str) -> None:
        """A server is over: what it still has is there to be claimed."""
        with self._database.writing() as connection:
            connection.execute(sa.update(SERVERS).where(SERVERS.c.server_id == server_id).values(ended=True))
            claiming.sweep(connection, [server_id])

    def servers(self) -> list[ServerRecord]:
        """All that live, and the dead ones that still have rows."""
        with self._database.reading() as connection:
            return self._servers(connection)

    def _servers(self, connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> list[ServerRecord]:
        now = self._database.now(connection)
        rows = connection.execute(sa.select(SERVERS).where(*conditions)).mappings()
        return [claiming.server_of(row, time.time() - now) for row in rows]

    def rejoin(self, server: ServerRecord) -> set[RowKey]:
        """A server that others took for dead lives; return the keys of what is others' by now."""
        with self._database.writing() as connection:
            self._register(connection, server)
            others: set[RowKey] = set()
            for name, table in TABLES.items():
                keys = sa.select(table.c[KINDS[name].key], table.c.server_id == server.server_id)
                found = [(str(key), bool(own)) for key, own in connection.execute(keys)]
                mine = {key for key, own in found if own}
                others |= {(name, key) for key, own in found if not own and key not in mine}
            return others

    # -- rows -------------------------------------------------------------------------------------

    def write(self, server_id: str, changes: Sequence[Change]) -> bool:
        """Change rows of one server's, and renew its lease; all or nothing.

        False where others took over from it, and nothing was written. Raises RowRefused for a row that the
        database will never take. A row that another living server has stays as it is.
        """
        with self._database.writing() as connection:
            now = self._database.now(connection)
            renewed = (
                sa.update(SERVERS)
                .where(SERVERS.c.server_id == server_id, SERVERS.c.ended.is_(False))
                .values(
                    lease_until=now + self._leases.get(server_id, LEASE_SECONDS),
                    leased_since=sa.case((SERVERS.c.lease_until < now, now), else_=SERVERS.c.leased_since),
                )
            )
            if connection.execute(renewed).rowcount == 0:
                return False
            for name in TABLES:
                self._change(connection, name, server_id, [one for one in changes if one[0] == name], now)
        return True

    def _change(self, connection: sa.Connection, name: str, server_id: str, changes: list[Change], now: float) -> None:
        table, key = TABLES[name], KINDS[name].key
        gone = [{"gone": row_key} for _name, row_key, record in changes if record is None]
        if gone:
            own = sa.delete(table).where(table.c[key] == sa.bindparam("gone"), table.c.server_id == server_id)
            connection.execute(own, gone)
        rows = [to_row(record, self._seal) | {"server_id": server_id} for *_place, record in changes if record]
        if not rows:
            return
        # The two dialects have this in common, and no class for it.
        insert: Any = sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)
        keys = [column.name for column in table.primary_key]
        living = sa.select(SERVERS.c.server_id).where(SERVERS.c.ended.is_(False), SERVERS.c.lease_until > now)
        upsert = insert.on_conflict_do_update(
            index_elements=keys,
            set_={name: insert.excluded[name] for name in rows[0] if name not in keys},
            where=sa.or_(table.c.server_id == server_id, table.c.server_id.not_in(living)),
        )
        connection.execute(upsert, rows)

    def rows_of(self, server_id: str) -> Rows:
        """All that one server has."""
        with self._database.reading() as connection:
            found = {
                name: [dict(row) for row in connection.execute(_of(table, server_id)).mappings()]
                for name, table in TABLES.items()
            }
        return self._collected(found)

    def _collected(self, found: Mapping[str, list[dict[str, Any]]]) -> Rows:
        return collect({name: self._records(name, rows) for name, rows in found.items()})

    def _records(self, name: str, rows: Iterable[Mapping[str, Any]]) -> list[Record]:
        return [record for row in rows if (record := from_row(name, row, self._seal)) is not None]

    def all_records(self) -> list[Found]:
        """Every server's allocations."""
        return [(server, one) for server, one in self._all("allocations") if isinstance(one, AllocationRecord)]

    def all_kernels(self) -> list[tuple[ServerRecord, KernelRecord]]:
        """Every server's kernels."""
        return [(server, one) for server, one in self._all("kernels") if isinstance(one, KernelRecord)]

    def find_launcher(self, launcher_id: str) -> tuple[ServerRecord, LauncherRecord] | None:
        """Who owns a launcher, and its record with its tokens."""
        found = self._all("launchers", LAUNCHERS.c.launcher_id == launcher_id)
        return next(((server, one) for server, one in found if isinstance(one, LauncherRecord)), None)

    def _all(self, name: str, *conditions: sa.ColumnElement[bool]) -> Iterator[tuple[ServerRecord, Record]]:
        with self._database.reading() as connection:
            servers = {one.server_id: one for one in self._servers(connection)}
            rows = connection.execute(sa.select(TABLES[name]).where(*conditions)).mappings().all()
        for row in rows:
            record = from_row(name, dict(row), self._seal)
            if record is not None and row["server_id"] in servers:
                yield servers[row["server_id"]], record

    # -- taking over ------------------------------------------------------------------------------

    def claim(self, server_id: str, deployment: str, kernel_ids: Iterable[str] | None = None) -> Claimed:
        """Move what dead servers of the deployment have to this one; or only these kernels, whatever deployment.

        One transaction: of two that claim at once exactly one gets a row. A kernel brings its whole allocation
        along, with the launchers and the other kernels in it. Nothing is claimed for a server that is itself taken
        for dead.
        """
        kernels = None if kernel_ids is None else set(kernel_ids)
        wanted = claiming.Wanted(server_id, deployment, kernels)
        if not deployment and kernels is None:
            return Claimed()
        with self._database.reading() as connection:
            if not claiming.dead_servers(connection, wanted, self._database.now(connection)):
                return Claimed()  # as a rule: it costs nobody a lock
        with self._database.writing() as connection:
            claimed = claiming.claim(connection, wanted, lambda: self._database.now(connection))
        rows = self._collected(claimed.rows)
        return Claimed(**vars(rows), epoch=claimed.epoch, servers=tuple(claimed.servers))

    def drop(self, found: Iterable[Found]) -> None:
        """Remove allocations of dead servers, with the launchers, kernels and sessions in them."""
        with self._database.writing() as connection:
            for server, record in found:
                claiming.remove(connection, server.server_id, record.launcher_id)
            claiming.sweep(connection, [one.server_id for one in self._servers(connection) if one.is_dead])

    def close(self) -> None:
        self._database.close()


def _of(table: sa.Table, server_id: str) -> sa.Select[Any]:
    return sa.select(table).where(table.c.server_id == server_id)


def open_store(url: str, directory: Path, key_file: str = "") -> Store:
    """Open the store, or make it. Raises StoreError, with the reason and what to do; nothing is destroyed.

    ``url`` is empty (SQLite in ``directory``), ``memory:``, or a URL of SQLAlchemy's (postgresql://…). The key is in
    ``key_file``; if that is empty, in the directory above: hosts that share a home share it, and no SQLite file.
    """
    database = connect(url, directory)
    try:
        with database.writing() as connection:
            if database.is_sqlite:
                _check(connection, database.shown)
            else:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(PREPARE_LOCK)))
            schema.prepare(connection, database.shown)
            # A disk that takes no more says so here, and not once a kernel depends on it.
            schema.set_meta(connection, "opened", f"{time.time():.0f}")
            seal = _seal(connection, database.shown, _key_path(url, directory, key_file))
    except BaseException:
        database.close()
        raise
    return Store(database, seal)


def _check(connection: sa.Connection, shown: str) -> None:
    found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
        raise StoreError(
            f"the store {shown} is damaged ({found}); it is left as it is: move it away (with its -wal file) for a new "
            "one to be made, or put a copy of it back"
        )


def _key_path(url: str, directory: Path, key_file: str) -> Path | None:
    if url == MEMORY:
        return None
    return Path(key_file).expanduser() if key_file else directory.parent / KEY_NAME


def _seal(connection: sa.Connection, shown: str, path: Path | None) -> Seal:
    """With the store's key, which is the one that sealed its first secret. Made where there is neither."""
    store_id, check = schema.meta(connection, "store_id") or "", schema.meta(connection, "key_check")
    if path is None:
        return Seal(secrets.token_bytes(KEY_BYTES), store_id)
    try:
        key = read_key(path)
    except FileNotFoundError:
        if check is not None:
            raise StoreError(
                f"the store {shown} is sealed with a key, and its file {path} is not there: put it back, name the "
                "right one in SlurmService.store_key_file, or move the store away: its kernels cannot be restored "
                "without the key"
            ) from None
        make_directory(path.parent)
        key = make_key(path)
    seal = Seal(key, store_id)
    if check is None:
        schema.set_meta(connection, "key_check", seal.close(META.name, "key_check", store_id).hex())
        return seal
    try:
        seal.open(META.name, "key_check", bytes.fromhex(check))
    except ValueError:
        raise StoreError(
            f"the key in {path} is not the one that the store {shown} is sealed with: name the right one in "
            "SlurmService.store_key_file (gateways that share a store share its key, too)"
        ) from None
    return seal


# -- Which server of a deployment has what: small questions, of columns only, so that nothing is unsealed for them. --


Owned = tuple[str, str]
"""The server's id, and the name of the user whose it is."""


def _in(table: sa.Table, deployment: str, *conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Server and owner of the deployment's rows of a table."""
    joined = table.join(SERVERS, SERVERS.c.server_id == table.c.server_id)
    columns: sa.Select[Any] = sa.select(table.c.server_id, table.c.owner)
    return columns.select_from(joined).where(SERVERS.c.deployment == deployment, *conditions)


def _first(connection: sa.Connection, question: sa.Select[Any]) -> Owned | None:
    row = connection.execute(question.limit(1)).first()
    return None if row is None else (str(row[0]), str(row[1]))


def kernel(connection: sa.Connection, deployment: str, kernel_id: str) -> Owned | None:
    """Whose a kernel is; of one that still starts only its allocation knows."""
    found = _first(connection, _in(KERNELS, deployment, KERNELS.c.kernel_id == kernel_id))
    if found is not None:
        return found
    named = ALLOCATIONS.c.record.contains(f'"{kernel_id}"', autoescape=True)
    return _first(connection, _in(ALLOCATIONS, deployment, named))


def session(connection: sa.Connection, deployment: str, session_id: str) -> Owned | None:
    """Whose a session is."""
    return _first(connection, _in(SESSIONS, deployment, SESSIONS.c.session_id == session_id))


def session_at(connection: sa.Connection, deployment: str, owner: str, path: str) -> Owned | None:
    """Whose this user's session of this document is."""
    mine = _in(SESSIONS, deployment, SESSIONS.c.owner == owner).add_columns(SESSIONS.c.record)
    for server_id, name, record in connection.execute(mine):
        if json.loads(record).get("path") == path:
            return str(server_id), str(name)
    return None


def kernel_owners(connection: sa.Connection, deployment: str, but: str) -> dict[str, str]:
    """The owner of each kernel of the deployment, starting ones included, but for the server ``but``."""
    starting = _in(ALLOCATIONS, deployment, ALLOCATIONS.c.server_id != but).add_columns(ALLOCATIONS.c.record)
    running = _in(KERNELS, deployment, KERNELS.c.server_id != but).add_columns(KERNELS.c.kernel_id)
    owners = {
        str(kernel_id): str(owner)
        for _server, owner, record in connection.execute(starting)
        for kernel_id in json.loads(record).get("kernel_ids", ())
    }
    return owners | {str(kernel_id): str(owner) for _server, owner, kernel_id in connection.execute(running)}
