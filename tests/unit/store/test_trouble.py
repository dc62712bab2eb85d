"""A store that cannot be used is refused at the start, in words; one that fails later ends nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_slurm.errors import StoreError, StoreUnavailable
from gateway_slurm.store import AllocationRecord, LauncherRecord, Registry, ServerRecord, schema, this_process
from gateway_slurm.store.database import Store, open_store
from gateway_slurm.store.engine import connect
from helpers.postgres import PASSWORD
from helpers.private_slurm import poll

RECORD = AllocationRecord(launcher_id="gs-1", jobid="12")
LAUNCHER = LauncherRecord(launcher_id="gs-1", record_key="gs-1", tokens=(b"a", b"b"))


@pytest.fixture
def state() -> Iterator[Path]:
    """A state directory that other users can reach, for tests that become one."""
    with tempfile.TemporaryDirectory(prefix="gss-", dir="/tmp") as base:
        Path(base).chmod(0o777)
        yield Path(base) / "state"


def filled(state: Path, url: str = "") -> None:
    """A store in which a server left something."""
    registry = Registry(state, url=url)
    registry.open()
    registry.put(RECORD)
    registry.put(LAUNCHER)
    registry.close(leave=True)


def file_of(state: Path) -> Path:
    """SQLite's."""
    return state / this_process().host / "store.sqlite"


def refused(state: Path, url: str = "", key_file: str = "") -> str:
    """The error message that an admin reads."""
    registry = Registry(state, url=url, key_file=key_file)
    with pytest.raises(StoreError) as caught:
        registry.open()
    registry.close()
    return str(caught.value)


def contents(directory: Path) -> dict[Path, bytes]:
    """Every file, to see that nothing was destroyed."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# -- at the start: the key ------------------------------------------------------------------------


def test_a_store_without_its_key_is_refused(state, store_url):
    """The encrypted values could not be read; no new key takes the place of the old one."""
    filled(state, store_url)
    (state / "store.key").rename(state / "away")
    words = refused(state, store_url)
    assert str(state / "store.key") in words
    assert "put it back" in words
    assert not (state / "store.key").exists()
    (state / "away").rename(state / "store.key")
    filled(state, store_url)


def test_a_key_that_is_another_stores_is_refused(state, store_url):
    """No value is encrypted with a second key."""
    filled(state, store_url)
    (state / "store.key").write_text("ab" * 32)
    assert "is not the one" in refused(state, store_url)
    assert (state / "store.key").read_text() == "ab" * 32


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(state, store_url, mode):
    """It is no secret any more."""
    filled(state, store_url)
    (state / "store.key").chmod(mode)
    words = refused(state, store_url)
    assert f"{mode:04o}" in words
    assert "chmod 600" in words


@pytest.mark.parametrize("text", ["", "ab", "x" * 64, "ab" * 33, "\0" * 64, "\xff"])
def test_a_file_that_holds_no_key_is_refused(state, tmp_path, text):
    """And says what would be one."""
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(text)
    assert "openssl rand -hex 32" in refused(state, key_file=str(path))


def test_a_key_file_is_made_where_it_is_named(state, tmp_path, store_url):
    """Private, and the same for all servers of the store."""
    path = tmp_path / "keys" / "of-the-store"
    for _server in range(2):
        registry = Registry(state, url=store_url, key_file=str(path))
        registry.open()
        registry.put(LAUNCHER)
        registry.close(leave=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not (state / "store.key").exists()
    assert "SlurmService.store_key_file" in refused(state, store_url)


# -- at the start: the database -------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["header", "middle", "short"])
def test_a_damaged_file_is_refused_and_left(state, damage):
    """An admin may still save some of its rows."""
    filled(state)
    path = file_of(state)
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[:16] = b"x" * 16
    elif damage == "middle":
        content[4096:] = os.urandom(len(content) - 4096)
    else:
        del content[2000:]
    path.write_bytes(content)
    words = refused(state)
    assert str(path) in words
    assert "move it away" in words
    assert path.read_bytes() == bytes(content)


@pytest.mark.parametrize("difference", [-1, 1], ids=["older", "newer"])
def test_a_store_of_another_schema_is_refused_in_one_line(state, store_url, difference):
    """The line names the store, both schemas, and what to do; the store is left as it is."""
    filled(state, store_url)
    found = schema.VERSION + difference
    set_schema(state, store_url, str(found))
    words = refused(state, store_url)
    assert f"has schema {found}, and this gateway_slurm needs schema {schema.VERSION}" in words
    assert "while no kernel runs, remove" in words
    assert (str(file_of(state)) if not store_url else "its tables (meta, ") in words
    assert "\n" not in words.strip()
    set_schema(state, store_url, str(schema.VERSION))
    filled(state, store_url)


def set_schema(state: Path, url: str, version: str) -> None:
    """As another version had left it."""
    database = connect(url, file_of(state).parent)
    with database.writing() as connection:
        schema.set_meta(connection, "schema", version)
    database.close()


def test_a_database_of_something_else_is_refused(state, store_url):
    """Its tables are not ours to use."""
    store = open_store(store_url, file_of(state).parent)
    with store.database.writing() as connection:
        for table in ("meta", "allocations"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
    store.close()
    assert "tables of something else" in refused(state, store_url)


AS_NOBODY = """
import os, resource, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from gateway_slurm.store import Registry
state, limit = Path(sys.argv[1]), int(sys.argv[2])
import gateway_slurm.store.database
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
registry = Registry(state)
try:
    registry.open()
except gateway_slurm.errors.StoreError as error:
    print(error)
"""


def opened_by_another(state: Path, limit: int = 0) -> str:
    """The error message of a process without root's rights, with files of up to ``limit`` bytes."""
    argv = [sys.executable, "-c", AS_NOBODY, str(state), str(limit), str(Path(schema.__file__).parents[2])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("limit", [4096, 20_000])
def test_a_disk_that_is_full_is_told_at_the_start(state, limit):
    """Also where there is room for the file and for nothing in it."""
    words = opened_by_another(state, limit)
    assert "make room" in words
    assert "SlurmService.store_url" in words


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_store_that_is_read_only_is_told_at_the_start(state, what):
    """Root could write it; the unprivileged user cannot."""
    assert opened_by_another(state) == ""
    path = file_of(state)
    before = contents(state)
    for one in (path, path.parent) if what == "directory" else (path,):
        os.chown(one, os.geteuid(), -1)
        one.chmod(0o555 if one.is_dir() else 0o444)
    words = opened_by_another(state)
    assert "writable" in words
    assert str(path) in words
    assert {name: content for name, content in contents(state).items() if name in before} == before


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://host/db", "SQLite or PostgreSQL"),
        ("no url with secret", "is no URL"),
        ("postgresql://me:secret@127.0.0.1:1/db?password=secret", "me:***@127.0.0.1:1/db"),
        ("postgresql+nonsense://me:secret@host/db", "cannot be used"),
    ],
)
def test_a_url_that_leads_nowhere_is_told_without_its_password(state, url, words):
    """Messages end up in logs."""
    told = refused(state, url)
    assert words in told
    assert "secret" not in told


def test_a_wrong_password_is_told_and_never_shown(state, postgres):
    """PostgreSQL's own words are."""
    told = refused(state, postgres.url().replace(PASSWORD, "the-wrong-one"))
    assert "password authentication failed" in told
    assert "the-wrong-one" not in told


# -- while it runs --------------------------------------------------------------------------------


@pytest.fixture
def running(state: Path) -> Iterator[Registry]:
    """A server on SQLite, with something on record."""
    registry = Registry(state)
    registry.open()
    registry.put(RECORD)
    registry.flush()
    yield registry
    registry.close()


def on_record(registry: Registry) -> list[str | None]:
    """The jobs that the next server would find."""
    return [record.jobid for record in registry.store.rows_of(registry.server_id).allocations]


def with_jobid(number: int) -> AllocationRecord:
    """A record that fills a few of a database's pages."""
    return AllocationRecord(launcher_id=f"gs-{number}", jobid=str(number), config={"x": "y" * 20_000})


def test_a_disk_that_is_full_for_a_while_loses_nothing(state, caplog):
    """It is said once and in ``trouble``, tried again, and all that was put meanwhile is there in the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    registry = Registry(state)
    registry.open()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, before[1]))
        for number in range(20):
            registry.put(with_jobid(number))
        assert poll(lambda: registry.trouble != "", timeout=10)
        assert "make room" in registry.trouble
        with pytest.raises(StoreUnavailable, match="make room"):
            registry.flush(0.5)
        assert len(registry.allocations()) == 20
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    registry.flush()
    assert registry.trouble == ""
    assert sorted(on_record(registry), key=int) == [str(number) for number in range(20)]
    assert caplog.text.count("cannot be recorded at the moment") == 1
    assert caplog.text.count("the store is back") == 1
    registry.close()


async def test_nothing_waits_for_a_store_that_somebody_holds(running, state):
    """Putting takes no time; who has to know waits for as long as it says, and the loop runs on."""
    holder = sqlite3.connect(file_of(state), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    begun = time.monotonic()
    running.put(with_jobid(13))
    assert time.monotonic() - begun < 0.1
    waiting = asyncio.ensure_future(running.flushed(60))
    ticks = 0
    while time.monotonic() - begun < 1.0:
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 20
    with pytest.raises(StoreUnavailable, match=r"for 0\.2 s"):
        await running.flushed(0.2)
    holder.execute("ROLLBACK")
    holder.close()
    await waiting
    assert on_record(running) == ["12", "13"]


def test_a_close_is_bounded_while_nothing_can_be_written(running, state, caplog):
    """A server's end does not hang; what is lost to the next one is said."""
    holder = sqlite3.connect(file_of(state), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    running.put(with_jobid(13))
    begun = time.monotonic()
    running.close(leave=True)
    assert time.monotonic() - begun < 20
    holder.execute("ROLLBACK")
    holder.close()
    assert poll(lambda: threads_of_ours() == [], timeout=20)
    assert "changes are lost to the next server" in caplog.text


def threads_of_ours() -> list[str]:
    """The writers that have not ended."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gateway_slurm-store")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["in good order", "crash"])
def test_a_postgresql_that_restarts_loses_nothing(state, postgres, how, caplog):
    """The server lives on in memory; when the database is back, all is there, and so is the lease."""
    registry = Registry(state, url=postgres.new_database(), deployment="gateway")
    registry.open()
    registry.put(RECORD)
    registry.flush()
    postgres.down(how)
    try:
        registry.put(with_jobid(13))
        registry.put(LAUNCHER)
        assert poll(lambda: registry.trouble != "", timeout=10)
        assert "check that this PostgreSQL runs" in registry.trouble
        assert PASSWORD not in registry.trouble + caplog.text
        with pytest.raises(StoreUnavailable):
            registry.all_allocations()
        assert len(registry.allocations()) == 2
    finally:
        postgres.up()
    registry.flush()
    assert on_record(registry) == ["12", "13"]
    assert [one.is_dead for one in registry.store.servers()] == [False]
    assert registry.trouble == ""
    registry.close()


def test_what_a_database_lost_is_written_again(running):
    """An admin put an older copy back: no other server has these rows, so they are still this server's."""
    with running.store.database.writing() as connection:
        for table in (schema.SERVERS, schema.ALLOCATIONS):
            connection.execute(table.delete())
    running.put(with_jobid(13))
    running.flush()
    assert poll(lambda: sorted(on_record(running)) == ["12", "13"], timeout=10)


def test_a_file_that_is_removed_is_made_again_with_all_that_is_there(running, state):
    """The user removed the file: rows written to a file without a name would be lost."""
    file_of(state).unlink()
    running.put(with_jobid(13))
    running.flush()
    assert poll(lambda: sorted(on_record(running)) == ["12", "13"], timeout=10)
    with contextlib.closing(Registry(state)) as later:
        assert sorted(record.jobid for _server, record in later.all_allocations()) == ["12", "13"]


def test_a_store_that_is_opened_twice_in_a_process_survives_what_other_processes_do(running, state):
    """Its locks stay when the second is opened and closed: the last one elsewhere does not take its log away."""
    with contextlib.closing(Registry(state)) as second:
        assert second.all_allocations()
    assert seen_by_another_process(state) == ["12"]
    running.put(with_jobid(13))
    running.flush()
    assert running.trouble == ""
    assert seen_by_another_process(state) == ["12", "13"]


def seen_by_another_process(state: Path) -> list[str]:
    """The jobs that all servers have on record, as another process finds them, which is then the last to close."""
    program = f"""
import pathlib
from gateway_slurm.store import Registry
registry = Registry(pathlib.Path({str(state)!r}))
print(*sorted(record.jobid for _server, record in registry.all_allocations()))
registry.close()
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.slow
def test_a_session_in_the_middle_of_a_claim_does_not_hold_the_others(postgres, state):
    """A process that is stopped there is cut off by the database."""
    url = postgres.new_database()
    store: Store = open_store(url, state / "host")
    for name in ("stopped", "other"):
        store.register(ServerRecord(server_id=name, deployment="gateway", process=this_process()))
    stopped = store.database.engine.connect()
    stopped.begin()
    stopped.execute(schema.sa.select(schema.META.c.value).where(schema.META.c.key == "epoch").with_for_update())
    store.register(ServerRecord(server_id="gone", deployment="gateway", process=this_process()))
    store.write("gone", [("allocations", "gs-1", RECORD)])
    store.end("gone")
    assert len(store.claim("other", "gateway").allocations) == 1
    stopped.invalidate()
    stopped.close()
    store.close()
