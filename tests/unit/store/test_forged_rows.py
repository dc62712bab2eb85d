"""Rows that were changed or made with plain SQL: no server uses them, and the log says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from gateway_slurm.store import (
    AllocationRecord,
    KernelRecord,
    LauncherRecord,
    ServerRecord,
    SessionRecord,
    this_process,
)
from gateway_slurm.store.database import Store, open_store
from gateway_slurm.store.rows import key_of
from gateway_slurm.store.schema import SERVERS, TABLES

GONE = replace(this_process(), start="1")
RECORDS = (
    AllocationRecord(launcher_id="gs-1", jobid="1", owner="alice", kernel_ids=["k1"]),
    LauncherRecord(launcher_id="gs-1", record_key="gs-1", tokens=(b"a" * 32, b"b" * 32)),
    KernelRecord(kernel_id="k1", launcher_id="gs-1", record_key="gs-1", owner="alice"),
    SessionRecord(session_id="s1", owner="alice", kernel_id="k1", path="a.ipynb"),
)


@pytest.fixture
def store(store_url: str, tmp_path: Path) -> Iterator[Store]:
    """An open store of each kind, with two servers, of which ``old`` has a kernel and no process any more."""
    opened = open_store(store_url, tmp_path / this_process().host)
    opened.register(ServerRecord(server_id="old", deployment="gateway", process=GONE, url="http://old/"))
    assert opened.write("old", [(*key_of(record), record) for record in RECORDS])
    opened.register(ServerRecord(server_id="new", deployment="gateway", process=this_process(), url="http://new/"))
    yield opened
    opened.close()


def other_value(value: object) -> object:
    """Another value of the same type."""
    if isinstance(value, bytes | memoryview):
        return bytes(value)[:-1] + bytes([bytes(value)[-1] ^ 1])
    return value + 1 if isinstance(value, int) else f"{value or ''} "


def test_a_row_of_which_any_column_was_changed_is_not_used(store, caplog):
    """A kernel's owner or server, a launcher's epoch, an allocation's job, a session's kernel: each has its MAC."""
    for name, table in TABLES.items():
        for column in table.columns:
            with store.database.writing() as connection:
                known = dict(connection.execute(sa.select(table)).mappings().one())
                changed = "new" if column.name == "server_id" else other_value(known[column.name])
                connection.execute(sa.update(table).values({column.name: changed}))
            rows = [*getattr(store.rows_of("old"), name), *getattr(store.rows_of("new"), name)]
            assert not rows, f"{name}.{column.name}"
            with store.database.writing() as connection:
                connection.execute(sa.update(table).values(**known))
        assert getattr(store.rows_of("old"), name), name
    assert caplog.text.count("row 'k1' of the store's table kernels is not used") == 1


def test_a_servers_address_that_was_changed_or_added_is_not_used(store, caplog):
    """A request, and the user's token with it, goes to no address that a row without the store's key names."""
    with store.database.writing() as connection:
        mine = dict(connection.execute(sa.select(SERVERS).where(SERVERS.c.server_id == "new")).mappings().one())
        connection.execute(sa.insert(SERVERS).values(**{**mine, "server_id": "eve", "url": "http://evil/"}))
    assert {server.server_id for server in store.servers()} == {"old", "new"}
    fixed = ("server_id", "deployment", "host", "boot", "pid", "start", "url", "addresses", "relays", "mac")
    for name in fixed:
        changed = other_value(mine[name])
        with store.database.writing() as connection:
            connection.execute(sa.update(SERVERS).where(SERVERS.c.url == "http://new/").values({name: changed}))
        assert [server.server_id for server in store.servers()] == ["old"], name
        with store.database.writing() as connection:
            where = SERVERS.c.server_id.in_(["new", changed])
            connection.execute(sa.update(SERVERS).where(where).values(**mine))
    assert "new" in {server.server_id for server in store.servers()}
    lines = [line for line in caplog.text.splitlines() if "'eve'" in line]
    assert len(lines) == 1
    assert "no server with the store's key has written it" in lines[0]


def test_a_changed_owner_gives_another_user_nothing(store):
    """The other gateways find no such kernel, and a takeover leaves its row where it is."""
    with store.database.writing() as connection:
        for name in ("allocations", "kernels", "sessions"):
            connection.execute(sa.update(TABLES[name]).values(owner="bob"))
    assert store.kernel_ownership("gateway", "k1") is None
    assert store.session_ownership("gateway", "s1") is None
    assert store.document_ownership("gateway", "bob", "a.ipynb") is None
    assert store.kernel_owners("gateway", except_server="new") == {}
    claimed = store.claim("new", "gateway")
    assert (claimed.allocations, claimed.kernels, claimed.sessions) == ((), (), ())
    assert claimed.launchers == (replace(RECORDS[1], epoch=1),)
    assert store.claim("new", "gateway").launchers == ()


def test_a_row_of_a_claimers_own_that_was_changed_is_replaced_by_the_claimed_one(store):
    """A forged row of the same job is not in the way of a takeover."""
    with store.database.writing() as connection:
        table = TABLES["allocations"]
        row = dict(connection.execute(sa.select(table)).mappings().one())
        connection.execute(sa.insert(table).values(**{**row, "server_id": "new", "owner": "bob"}))
    assert [record.owner for record in store.claim("new", "gateway").allocations] == ["alice"]
    assert [record.owner for record in store.rows_of("new").allocations] == ["alice"]
