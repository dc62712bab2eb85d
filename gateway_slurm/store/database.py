"""The store: one database, its rows, and the queries on them."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from gateway_slurm.errors import StoreError
from gateway_slurm.store import claims, schema
from gateway_slurm.store.encryption import KEY_BYTES, KEY_NAME, RowCipher, make_key, read_key
from gateway_slurm.store.engine import Database, connect, make_directory
from gateway_slurm.store.records import (
    LEASE_SECONDS,
    MEMORY,
    ClaimedRows,
    KernelRecord,
    LauncherRecord,
    Rows,
    ServerAllocation,
    ServerRecord,
)
from gateway_slurm.store.rows import KINDS, Change, RowKey, collect, from_row, is_authentic, to_row
from gateway_slurm.store.schema import ALLOCATIONS, KERNELS, LAUNCHERS, META, SERVERS, SESSIONS, TABLES

# PostgreSQL's advisory lock for opening the store: of two processes, one makes the tables.
OPEN_LOCK = 0x6A75_7079

Ownership = tuple[str, str]
"""The id of the server that has a row, and the name of the user who owns it."""

Row = dict[str, Any]


def open_store(url: str, directory: Path, key_file: str = "") -> Store:
    """Open the store, or make it. Raises StoreError, with the reason and what to do; nothing is destroyed.

    ``url`` is empty (SQLite in ``directory``), ``memory:``, or a URL of SQLAlchemy's (postgresql://…). The key is in
    ``key_file``. If that is empty, it is in the parent of ``directory``: hosts that share a home share the key, but no
    SQLite file.
    """
    database = connect(url, directory)
    try:
        with database.writing() as connection:
            if database.is_sqlite:
                _check_file(connection, database.name)
            else:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(OPEN_LOCK)))
            schema.prepare(connection, database.name)
            # Write something: a full disk is found now, and not when a kernel depends on the store.
            schema.set_meta(connection, "opened", f"{time.time():.0f}")
            key_path = Path(key_file).expanduser() if key_file else directory.parent / KEY_NAME
            cipher = _cipher(connection, database.name, None if url == MEMORY else key_path)
    except BaseException:
        database.close()
        raise
    return Store(database, cipher)


def _check_file(connection: sa.Connection, name: str) -> None:
    found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
        raise StoreError(
            f"the store {name} is damaged ({found}); it is left as it is: move it away (with its -wal file) for a new "
            "one to be made, or put a copy of it back"
        )


def _cipher(connection: sa.Connection, name: str, path: Path | None) -> RowCipher:
    """The cipher with the store's key, which is the key that encrypted its ``key_check``. Both are made with the store.

    Without a ``path`` the key is in memory only.
    """
    store_id, check = schema.meta(connection, "store_id") or "", schema.meta(connection, "key_check")
    if path is None:
        return RowCipher(secrets.token_bytes(KEY_BYTES), store_id)
    try:
        key = read_key(path)
    except FileNotFoundError:
        if check is not None:
            raise StoreError(
                f"the store {name} is encrypted with a key, and the key's file {path} does not exist: put it back, "
                "name the right one in SlurmService.store_key_file, or move the store away: its kernels cannot be "
                "restored without the key"
            ) from None
        make_directory(path.parent)
        key = make_key(path)
    cipher = RowCipher(key, store_id)
    try:
        if check is None:
            schema.set_meta(connection, "key_check", cipher.encrypt(META.name, "key_check", store_id).hex())
        else:
            cipher.decrypt(META.name, "key_check", bytes.fromhex(check))
    except ValueError:
        raise StoreError(
            f"the key in {path} is not the one that the store {name} is encrypted with: name the right one in "
            "SlurmService.store_key_file (gateways that share a store share its key, too)"
        ) from None
    return cipher


class Store:
    """An open database. All methods block, may be called by any thread, and raise StoreError.

    The caller that opened it calls ``close``. Leases count by the database's clock; records have them in this host's.
    """

    def __init__(self, database: Database, cipher: RowCipher) -> None:
        self.database, self._cipher = database, cipher
        self.name, self.store_id = database.name, cipher.store_id
        self.is_sqlite = database.is_sqlite
        self.peer_key = cipher.derive_key("peers")
        """With it the servers of a deployment prove themselves to each other."""
        self._leases: dict[str, float] = {}

    def close(self) -> None:
        """Close the connections."""
        self.database.close()

    # -- Servers --

    def register(self, server: ServerRecord) -> None:
        """Record a living server, with a lease from now. Dead servers without rows are removed."""
        with self.database.writing() as connection:
            self._register(connection, server)
            others = self._servers(connection, SERVERS.c.server_id != server.server_id)
            claims.remove_empty_servers(connection, [other.server_id for other in others if other.is_dead])

    def _register(self, connection: sa.Connection, server: ServerRecord) -> None:
        self._leases[server.server_id] = LEASE_SECONDS if self.is_leased(server) else math.inf
        now = self.database.now(connection)
        values: dict[str, Any] = {
            **dataclasses.asdict(server.process),
            "deployment": server.deployment,
            "url": server.url,
            "addresses": json.dumps(server.addresses),
            "lease_until": now + self._leases[server.server_id],
            # A server that is new has missed no renewal.
            "leased_since": now - LEASE_SECONDS,
            "ended": server.ended,
            "relays": json.dumps(server.relays),
        }
        row = self._cipher.seal(SERVERS.name, {"server_id": server.server_id, **values})
        known = sa.update(SERVERS).where(SERVERS.c.server_id == server.server_id).values(**row)
        if connection.execute(known).rowcount == 0:
            connection.execute(sa.insert(SERVERS).values(**row))

    def is_leased(self, server: ServerRecord) -> bool:
        """Whether the server must renew a lease.

        With SQLite all servers are on this host. Where no other server takes over either, the process alone shows
        whether the server lives.
        """
        return bool(server.deployment) or not self.is_sqlite

    def end(self, server_id: str) -> None:
        """Record the end of a server. Other servers may claim the rows that it still has."""
        with self.database.writing() as connection:
            connection.execute(sa.update(SERVERS).where(SERVERS.c.server_id == server_id).values(ended=True))
            claims.remove_empty_servers(connection, [server_id])

    def servers(self) -> list[ServerRecord]:
        """All living servers, and the dead ones that still have rows."""
        with self.database.reading() as connection:
            return self._servers(connection)

    def _servers(self, connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> list[ServerRecord]:
        now = self.database.now(connection)
        rows = connection.execute(sa.select(SERVERS).where(*conditions)).mappings()
        return claims.servers_of(rows, self._cipher, time.time() - now)

    def rejoin(self, server: ServerRecord) -> set[RowKey]:
        """Register a server that others took for dead. Returns the keys of all rows that other servers have."""
        with self.database.writing() as connection:
            self._register(connection, server)
            return self._rows_of_others(connection, server.server_id)

    def taken_over(self, server_id: str) -> set[RowKey]:
        """The keys of all rows that other servers have, if others have taken this one for dead; else none."""
        with self.database.reading() as connection:
            ended = sa.select(SERVERS.c.ended).where(SERVERS.c.server_id == server_id)
            lives = connection.execute(ended).scalar() is False
            return set() if lives else self._rows_of_others(connection, server_id)

    def _rows_of_others(self, connection: sa.Connection, server_id: str) -> set[RowKey]:
        others: set[RowKey] = set()
        for name, table in TABLES.items():
            key = KINDS[name].key
            rows = connection.execute(sa.select(table)).mappings().all()
            mine = {row[key] for row in rows if row["server_id"] == server_id}
            others |= {
                (name, str(row[key])) for row in rows if row[key] not in mine and is_authentic(name, row, self._cipher)
            }
        return others

    # -- Rows --

    def write(self, server_id: str, changes: Sequence[Change]) -> bool:
        """Change rows of one server and renew its lease, all in one transaction.

        Returns False, and writes nothing, where others have taken over from the server. Raises RowRefused for a row
        that the database will never accept. A row of another living server stays as it is.
        """
        with self.database.writing() as connection:
            now = self.database.now(connection)
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
                self._change(connection, name, server_id, [change for change in changes if change[0] == name], now)
        return True

    def _change(self, connection: sa.Connection, name: str, server_id: str, changes: list[Change], now: float) -> None:
        table, key = TABLES[name], KINDS[name].key
        removed = [{"removed": row_key} for _name, row_key, record in changes if record is None]
        if removed:
            delete = sa.delete(table).where(table.c[key] == sa.bindparam("removed"), table.c.server_id == server_id)
            connection.execute(delete, removed)
        rows = [to_row(record, self._cipher, server_id) for *_key, record in changes if record]
        if not rows:
            return
        # The two dialects have this in common, and SQLAlchemy has no common class for it.
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
        """All records of one server."""
        with self.database.reading() as connection:
            own = {name: sa.select(table).where(table.c.server_id == server_id) for name, table in TABLES.items()}
            rows = {name: [dict(row) for row in connection.execute(of).mappings()] for name, of in own.items()}
        return collect(rows, self._cipher)

    def all_allocations(self) -> list[ServerAllocation]:
        """All servers' allocations."""
        return list(self._all("allocations"))

    def all_kernels(self) -> list[tuple[ServerRecord, KernelRecord]]:
        """All servers' kernels."""
        return list(self._all("kernels"))

    def find_launcher(self, launcher_id: str) -> tuple[ServerRecord, LauncherRecord] | None:
        """A launcher's record, with its tokens, and the server that has it; None if no server has it."""
        return next(self._all("launchers", LAUNCHERS.c.launcher_id == launcher_id), None)

    def _all(self, name: str, *conditions: sa.ColumnElement[bool]) -> Iterator[tuple[ServerRecord, Any]]:
        with self.database.reading() as connection:
            servers = {server.server_id: server for server in self._servers(connection)}
            rows = connection.execute(sa.select(TABLES[name]).where(*conditions)).mappings().all()
        for row in rows:
            record = from_row(name, dict(row), self._cipher)
            if record is not None and row["server_id"] in servers:
                yield servers[row["server_id"]], record

    # -- Takeovers --

    def claim(self, server_id: str, deployment: str, kernel_ids: Iterable[str] | None = None) -> ClaimedRows:
        """Move the rows of the deployment's dead servers to this one; or these kernels only, of any deployment.

        It is one transaction: of two servers that claim at once, exactly one gets a row. A kernel brings its whole
        allocation along, with the launchers and the other kernels in it. A server that is itself taken for dead gets
        nothing.
        """
        request = claims.ClaimRequest(server_id, deployment, None if kernel_ids is None else set(kernel_ids))
        if not deployment and kernel_ids is None:
            return ClaimedRows()
        with self.database.reading() as connection:
            if not claims.dead_servers(connection, request, self._cipher, self.database.now(connection)):
                return ClaimedRows()  # the usual case, which takes no lock
        with self.database.writing() as connection:
            moved = claims.claim(connection, request, self._cipher, lambda: self.database.now(connection))
        rows = collect(moved.rows, self._cipher)
        return ClaimedRows(**vars(rows), epoch=moved.epoch, servers=tuple(moved.servers))

    def drop(self, allocations: Iterable[ServerAllocation]) -> None:
        """Remove allocations of dead servers, with the launchers, kernels and sessions in them."""
        with self.database.writing() as connection:
            for server, record in allocations:
                claims.remove_allocation(connection, server.server_id, record.launcher_id)
            dead = [server.server_id for server in self._servers(connection) if server.is_dead]
            claims.remove_empty_servers(connection, dead)

    # -- Ownership: which server of a deployment has a row; these queries decrypt nothing --

    def kernel_ownership(self, deployment: str, kernel_id: str) -> Ownership | None:
        """The server and owner of a kernel. Only the allocation names a kernel that is still starting."""
        with self.database.reading() as connection:
            found = self._owned(connection, KERNELS, deployment, KERNELS.c.kernel_id == kernel_id)
            if not found:
                is_named = ALLOCATIONS.c.record.contains(f'"{kernel_id}"', autoescape=True)
                found = self._owned(connection, ALLOCATIONS, deployment, is_named)
        return _first(found)

    def session_ownership(self, deployment: str, session_id: str) -> Ownership | None:
        """The server and owner of a session."""
        with self.database.reading() as connection:
            return _first(self._owned(connection, SESSIONS, deployment, SESSIONS.c.session_id == session_id))

    def document_ownership(self, deployment: str, owner: str, path: str) -> Ownership | None:
        """The server and owner of this user's session of the document at ``path``."""
        with self.database.reading() as connection:
            sessions = self._owned(connection, SESSIONS, deployment, SESSIONS.c.owner == owner)
        return _first([row for row in sessions if json.loads(row["record"]).get("path") == path])

    def kernel_owners(self, deployment: str, *, except_server: str) -> dict[str, str]:
        """The owner of each kernel of the deployment's other servers, by kernel id. Starting kernels are included."""
        with self.database.reading() as connection:
            starting = self._owned(connection, ALLOCATIONS, deployment, ALLOCATIONS.c.server_id != except_server)
            running = self._owned(connection, KERNELS, deployment, KERNELS.c.server_id != except_server)
        owners = {
            str(kernel_id): str(row["owner"])
            for row in starting
            for kernel_id in json.loads(row["record"]).get("kernel_ids", ())
        }
        return owners | {str(row["kernel_id"]): str(row["owner"]) for row in running}

    def _owned(
        self, connection: sa.Connection, table: sa.Table, deployment: str, *conditions: sa.ColumnElement[bool]
    ) -> list[Row]:
        """The authentic ones of the deployment's rows in a table."""
        joined = table.join(SERVERS, SERVERS.c.server_id == table.c.server_id)
        rows = sa.select(table).select_from(joined).where(SERVERS.c.deployment == deployment, *conditions)
        return [dict(row) for row in connection.execute(rows).mappings() if is_authentic(table.name, row, self._cipher)]


def _first(rows: list[Row]) -> Ownership | None:
    return (str(rows[0]["server_id"]), str(rows[0]["owner"])) if rows else None
