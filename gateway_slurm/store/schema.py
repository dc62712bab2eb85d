"""The tables and their version. This module imports SQLAlchemy: import it late, off the loop."""

from __future__ import annotations

import secrets

import sqlalchemy as sa

from gateway_slurm.errors import StoreError

VERSION = 3

METADATA = sa.MetaData()


def _owned(name: str, *columns: sa.Column[str]) -> sa.Table:
    """A table whose rows a server owns; ``record`` holds what is no column, ``sealed`` what is secret."""
    owner = sa.Column("server_id", sa.Text, primary_key=name == "allocations", nullable=False, index=True)
    return sa.Table(name, METADATA, owner, *columns, sa.Column("record", sa.Text, nullable=False))


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
    # Seconds since the epoch, by the database's clock. Infinity: its process's end is all that ends it.
    sa.Column("lease_until", sa.Double, nullable=False),
    # Since when the lease has been without a gap.
    sa.Column("leased_since", sa.Double, nullable=False),
    sa.Column("ended", sa.Boolean, nullable=False),
    sa.Column("relays", sa.Text, nullable=False),
)
# One adopted job may be on record for several servers; everything else is one server's.
ALLOCATIONS = _owned(
    "allocations",
    sa.Column("launcher_id", sa.Text, primary_key=True),
    sa.Column("jobid", sa.Text),
    sa.Column("owner", sa.Text, nullable=False),
)
LAUNCHERS = _owned(
    "launchers",
    sa.Column("launcher_id", sa.Text, primary_key=True),
    sa.Column("record_key", sa.Text, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),  # type: ignore[arg-type]
    sa.Column("sealed", sa.LargeBinary, nullable=False),  # type: ignore[arg-type]
)
KERNELS = _owned(
    "kernels",
    sa.Column("kernel_id", sa.Text, primary_key=True),
    sa.Column("launcher_id", sa.Text, nullable=False),
    sa.Column("record_key", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("sealed", sa.LargeBinary, nullable=False),  # type: ignore[arg-type]
)
SESSIONS = _owned(
    "sessions",
    sa.Column("session_id", sa.Text, primary_key=True),
    sa.Column("kernel_id", sa.Text, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
)
TABLES = {table.name: table for table in (ALLOCATIONS, LAUNCHERS, KERNELS, SESSIONS)}


def meta(connection: sa.Connection, key: str) -> str | None:
    """A fact about the store itself."""
    return connection.execute(sa.select(META.c.value).where(META.c.key == key)).scalar()


def set_meta(connection: sa.Connection, key: str, value: str) -> None:
    """Note one."""
    changed = connection.execute(sa.update(META).where(META.c.key == key).values(value=value))
    if changed.rowcount == 0:
        connection.execute(sa.insert(META).values(key=key, value=value))


def prepare(connection: sa.Connection, shown: str) -> None:
    """Create the tables in an empty database. Raises StoreError for a store of another schema, and for other tables."""
    names = set(sa.inspect(connection).get_table_names())
    if "meta" in names:
        _check_version(connection, shown)
        return
    if taken := names & set(METADATA.tables):
        raise StoreError(
            f"the store {shown} holds tables of something else ({', '.join(sorted(taken))}): give "
            "SlurmService.store_url a database, or a schema, of its own"
        )
    METADATA.create_all(connection)
    set_meta(connection, "schema", str(VERSION))
    set_meta(connection, "store_id", secrets.token_hex(16))
    set_meta(connection, "epoch", "0")


def _check_version(connection: sa.Connection, shown: str) -> None:
    found = meta(connection, "schema") or ""
    if not found.isdigit():
        raise StoreError(
            f"the store {shown} has a table meta of another program: give SlurmService.store_url a database, or a "
            "schema, of its own"
        )
    if int(found) != VERSION:
        files = "the file, with those ending in -wal and -shm beside it"
        what = files if connection.dialect.name == "sqlite" else f"its tables ({', '.join(METADATA.tables)})"
        raise StoreError(
            f"the store {shown} has schema {found}, and this gateway_slurm needs schema {VERSION}: while no kernel "
            f"runs, remove {what}, or name another store in SlurmService.store_url"
        )
