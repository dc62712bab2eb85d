"""The tables and their version."""

from __future__ import annotations

import secrets

import sqlalchemy as sa

from gateway_slurm.errors import StoreError

VERSION = 4

METADATA = sa.MetaData()


def _server_table(name: str, *columns: sa.Column[str]) -> sa.Table:
    """A table whose rows belong to servers. ``record`` has the fields without a column, ``encrypted`` the secrets.

    ``mac`` is over all other columns (``encryption.RowCipher.mac``).
    """
    server_id = sa.Column("server_id", sa.Text, primary_key=name == "allocations", nullable=False, index=True)
    return sa.Table(name, METADATA, server_id, *columns, sa.Column("record", sa.Text, nullable=False), _mac())


def _mac() -> sa.Column[bytes]:
    return sa.Column("mac", sa.LargeBinary, nullable=False)


META = sa.Table("meta", METADATA, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))
SERVERS = sa.Table(
    "servers",
    METADATA,
    sa.Column("server_id", sa.Text, primary_key=True),
    sa.Column("deployment", sa.Text, nullable=False, index=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("boot", sa.Text, nullable=False),
    sa.Column("pid", sa.BigInteger, nullable=False),
    sa.Column("start", sa.Text, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("addresses", sa.Text, nullable=False),
    # Seconds since the epoch, by the database's clock. Infinity: only the end of its process ends the server.
    sa.Column("lease_until", sa.Double, nullable=False),
    # Since when the server has renewed its lease without a gap.
    sa.Column("leased_since", sa.Double, nullable=False),
    sa.Column("ended", sa.Boolean, nullable=False),
    sa.Column("relays", sa.Text, nullable=False),
    _mac(),
)
# Several servers may have a record of the same adopted job. Every other row belongs to one server.
ALLOCATIONS = _server_table(
    "allocations",
    sa.Column("launcher_id", sa.Text, primary_key=True),
    sa.Column("jobid", sa.Text),
    sa.Column("owner", sa.Text, nullable=False),
)
LAUNCHERS = _server_table(
    "launchers",
    sa.Column("launcher_id", sa.Text, primary_key=True),
    sa.Column("record_key", sa.Text, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),  # type: ignore[arg-type]
    sa.Column("encrypted", sa.LargeBinary, nullable=False),  # type: ignore[arg-type]
)
KERNELS = _server_table(
    "kernels",
    sa.Column("kernel_id", sa.Text, primary_key=True),
    sa.Column("launcher_id", sa.Text, nullable=False),
    sa.Column("record_key", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("encrypted", sa.LargeBinary, nullable=False),  # type: ignore[arg-type]
)
SESSIONS = _server_table(
    "sessions",
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("kernel_id", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
)
TABLES = {table.name: table for table in (ALLOCATIONS, LAUNCHERS, KERNELS, SESSIONS)}


def meta(connection: sa.Connection, key: str) -> str | None:
    """A fact about the store itself; None if it is not recorded."""
    return connection.execute(sa.select(META.c.value).where(META.c.key == key)).scalar()


def set_meta(connection: sa.Connection, key: str, value: str) -> None:
    """Record a fact about the store itself."""
    changed = connection.execute(sa.update(META).where(META.c.key == key).values(value=value))
    if changed.rowcount == 0:
        connection.execute(sa.insert(META).values(key=key, value=value))


def prepare(connection: sa.Connection, name: str) -> None:
    """Create the tables in an empty database. Raises StoreError for a store of another schema, and for other tables."""
    tables = set(sa.inspect(connection).get_table_names())
    if "meta" in tables:
        _check_version(connection, name)
        return
    if taken := tables & set(METADATA.tables):
        raise StoreError(
            f"the store {name} holds tables of something else ({', '.join(sorted(taken))}): give "
            "SlurmService.store_url a database, or a schema, of its own"
        )
    METADATA.create_all(connection)
    set_meta(connection, "schema", str(VERSION))
    set_meta(connection, "store_id", secrets.token_hex(16))
    set_meta(connection, "epoch", "0")


def _check_version(connection: sa.Connection, name: str) -> None:
    found = meta(connection, "schema") or ""
    if not found.isdigit():
        raise StoreError(
            f"the store {name} has a table meta of another program: give SlurmService.store_url a database, or a "
            "schema, of its own"
        )
    if int(found) != VERSION:
        files = "the file, with those ending in -wal and -shm beside it"
        what = files if connection.dialect.name == "sqlite" else f"its tables ({', '.join(METADATA.tables)})"
        raise StoreError(
            f"the store {name} has schema {found}, and this gateway_slurm needs schema {VERSION}: while no kernel "
            f"runs, remove {what}, or name another store in SlurmService.store_url"
        )
