"""Records that outlive their process: durable, private, and of one server each."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.pool
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from gateway_slurm import store
from gateway_slurm.errors import StoreError
from gateway_slurm.store import (
    AllocationRecord,
    KernelRecord,
    LauncherRecord,
    Registry,
    ServerRecord,
    SessionRecord,
    this_process,
)
from gateway_slurm.store.export import MAX_FILE_BYTES, RecordFiles
from gateway_slurm.store.rows import MAX_ALLOCATION_BYTES
from gateway_slurm.store.schema import ALLOCATIONS
from helpers.private_slurm import poll

RECORD = AllocationRecord(
    launcher_id="gs-1",
    jobid="12",
    state="RUNNING",
    nodelist=["c1"],
    end_time=1e9,
    kernel_ids=["k1"],
    config={"partition": "batch"},
)
LAUNCHER = LauncherRecord(
    launcher_id="gs-1", record_key="gs-1", jobid="12", tokens=(b"first-token-of-it", b"second-token-of-it"), node="c1"
)
KERNEL = KernelRecord(
    kernel_id="k1",
    launcher_id="gs-1",
    record_key="gs-1",
    ports={"shell": 1},
    launch={"env": {"PASSWORD": "secret-of-the-kernel"}, "connection": {"key": "hmac-key-of-it"}},
    manager={"kernel_name": "slurm", "given": "what-the-client-gave"},
)
SESSION = SessionRecord(session_id="s1", owner="ada", kernel_id="k1", path="a.ipynb", data={"x": [1]})

NewRegistry = Callable[..., Registry]


@pytest.fixture
def new_registry(tmp_path: Path, store_url: str) -> Iterator[NewRegistry]:
    """Registries on one store, each as a server of its own."""
    made = []

    def new(**options: object) -> Registry:
        made.append(Registry(tmp_path / "state", tmp_path / "runtime" / store.EXPORT_NAME, url=store_url, **options))
        return made[-1]

    yield new
    for one in made:
        one.close()


@pytest.fixture
def registry(new_registry: NewRegistry) -> Registry:
    """One of them, of a server that runs."""
    one = new_registry()
    one.open()
    return one


def exported(registry: Registry) -> dict[str, object]:
    """The frontends' file, after the writes that were under way."""
    registry.flush()
    registry._exporter._executor.submit(lambda: None).result(timeout=10)
    return json.loads(registry._exporter._export.read_text())


def allocations(registry: Registry) -> list[AllocationRecord]:
    """The allocations of all servers."""
    return [record for _server, record in registry.all_allocations()]


def dead_server(registry: Registry, *records: object, server_id: str = "dead", **changes: object) -> ServerRecord:
    """A dead server with these rows: its pid now has another start time."""
    server = ServerRecord(server_id=server_id, process=replace(this_process(), start="1"), **changes)
    registry.store.register(server)
    rows = [(*store.rows.key_of(record), record) for record in records]
    assert registry.store.write(server_id, rows)
    return server


def file_of_other_host(registry: Registry, *records: AllocationRecord) -> None:
    """The file of a server on another host."""
    process = replace(this_process(), host="elsewhere", start="1")
    RecordFiles(registry.directory / "registry").write(process, list(records))


# -- what is kept -------------------------------------------------------------------------------


async def test_what_was_put_is_durable_once_it_is_flushed(registry, new_registry):
    """After a crash the next server finds all of it; the loop does not wait meanwhile."""
    registry.put(RECORD)
    registry.put(LAUNCHER)
    registry.put(KERNEL)
    registry.put(SESSION)
    await registry.flushed()
    rows = new_registry().store.rows_of(registry.server_id)
    assert (rows.allocations, rows.launchers, rows.kernels, rows.sessions) == (
        (RECORD,),
        (LAUNCHER,),
        (KERNEL,),
        (SESSION,),
    )
    assert registry.kernels() == [KERNEL]
    assert registry.launchers() == [LAUNCHER]
    assert registry.sessions() == [SESSION]


def test_a_row_is_as_it_was_put_last(registry):
    """Changes of one row overtake one another in memory; the database gets the last."""
    for number in range(100):
        registry.put(replace(RECORD, state=f"ROUND {number}"))
        registry.put(replace(KERNEL, pid=number))
    registry.put(SESSION)
    registry.remove("sessions", "s1")
    registry.flush()
    rows = registry.store.rows_of(registry.server_id)
    assert [one.state for one in rows.allocations] == ["ROUND 99"]
    assert [one.pid for one in rows.kernels] == [99]
    assert rows.sessions == ()


def test_what_is_in_an_allocation_goes_with_it(registry):
    """Its launchers and kernels, and no others."""
    registry.put(RECORD)
    registry.put(replace(RECORD, launcher_id="gs-2"))
    registry.put(LAUNCHER)
    registry.put(KERNEL)
    registry.put(replace(KERNEL, kernel_id="k2", record_key="gs-2"))
    registry.remove("allocations", "gs-1")
    registry.flush()
    rows = registry.store.rows_of(registry.server_id)
    assert [one.launcher_id for one in rows.allocations] == ["gs-2"]
    assert rows.launchers == ()
    assert [one.kernel_id for one in rows.kernels] == ["k2"]


def test_a_record_that_is_as_it_was_is_not_written_again(registry, monkeypatch):
    """Kernels that come and go do not wear the disk."""
    registry.put(RECORD)
    registry.flush()
    written = []
    monkeypatch.setattr(registry._writer, "_on_written", written.append)
    registry.put(replace(RECORD))
    registry.flush()
    assert [keys for keys in written if keys] == []


@pytest.mark.parametrize("text", ["\0", "\ud800", "ä\N{SNOWMAN}", "'; DROP TABLE sessions; --"])
def test_a_clients_words_come_back_as_they_were(registry, text):
    """Whatever a database's text may not hold."""
    session = replace(SESSION, path=text, data={text: text})
    registry.put(session)
    registry.flush()
    assert registry.store.rows_of(registry.server_id).sessions == (session,)


def test_a_row_that_cannot_be_kept_takes_only_itself_out(registry, caplog):
    """The others are written, and a flush does not wait for the refused row."""
    registry.put(replace(SESSION, data={"x": object()}))
    registry.put(replace(SESSION, session_id="s2"))
    registry.flush()
    assert [one.session_id for one in registry.store.rows_of(registry.server_id).sessions] == ["s2"]
    assert "sessions s1 is not kept on record" in caplog.text


def test_a_job_is_found_whatever_it_was_made_with(registry):
    """What would take more room than all others is left out."""
    registry.put(replace(RECORD, config={"kernel_argv": ["x" * MAX_ALLOCATION_BYTES]}, keep=True))
    registry.flush()
    assert allocations(registry) == [replace(RECORD, config={}, nodelist=[], keep=True)]


def test_a_record_that_comes_after_the_end_is_no_error(registry):
    """A kernel may still end while its service is closed."""
    registry.put(RECORD)
    registry.close()
    registry.put(replace(RECORD, state="COMPLETING"))
    registry.remove("allocations", "gs-1")
    registry.close()


def test_many_threads_lose_nothing(registry):
    """Rows are put from the service's loop and from Jupyter's."""
    with multiprocessing.pool.ThreadPool(8) as threads:
        threads.map(lambda number: registry.put(replace(SESSION, session_id=f"s{number}")), range(400))
    registry.flush()
    assert len(registry.store.rows_of(registry.server_id).sessions) == 400


# -- secrets ------------------------------------------------------------------------------------


def test_no_secret_is_readable_in_the_files(tmp_path):
    """Tokens, keys and environments are encrypted; the key is in a file that only its user can read."""
    registry = Registry(tmp_path / "state")
    registry.open()
    registry.put(LAUNCHER)
    registry.put(KERNEL)
    registry.flush()
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    key = (tmp_path / "state" / "store.key").read_text().strip()
    assert b"gs-1" in content
    secrets = [b"secret-of-the-kernel", b"hmac-key-of-it", b"what-the-client-gave", *LAUNCHER.tokens]
    for secret in (*secrets, *(one.hex().encode() for one in LAUNCHER.tokens), bytes.fromhex(key)):
        assert secret not in content
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for directory in (tmp_path / "state", tmp_path / "state" / this_process().host):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert "secret" not in repr(KERNEL) + repr(LAUNCHER)
    assert "token-of-it" not in repr(LAUNCHER)
    registry.close()


def test_an_encrypted_value_can_be_decrypted_in_its_row_only(registry, caplog):
    """A blob that was put into another row, or changed, is logged, and affects no other row."""
    other = replace(LAUNCHER, launcher_id="gs-2", tokens=(b"a", b"b"))
    registry.put(LAUNCHER)
    registry.put(other)
    registry.flush()
    with registry.store.database.writing() as connection:
        connection.exec_driver_sql(
            "UPDATE launchers SET encrypted = (SELECT encrypted FROM launchers WHERE launcher_id = 'gs-1') "
            "WHERE launcher_id = 'gs-2'"
        )
    assert registry.store.rows_of(registry.server_id).launchers == (LAUNCHER,)
    assert "row 'gs-2' of the store's table launchers is not used" in caplog.text


# -- all servers' rows --------------------------------------------------------------------------------


def test_the_end_of_a_process_in_good_order_leaves_nothing(registry, new_registry):
    """Only what its user asked to keep stays on record, and the launcher that holds it."""
    registry.put(RECORD)
    registry.put(replace(RECORD, launcher_id="gs-2", jobid="13", keep=True))
    registry.put(LAUNCHER)
    registry.put(replace(LAUNCHER, launcher_id="gs-2", record_key="gs-2", holds_job=True))
    registry.put(KERNEL)
    registry.close()
    later = new_registry()
    assert [(server.is_dead, record.jobid) for server, record in later.all_allocations()] == [(True, "13")]
    rows = later.store.rows_of(registry.server_id)
    assert [one.launcher_id for one in rows.launchers] == ["gs-2"]
    assert rows.kernels == ()


def test_a_server_that_leaves_all_to_the_next_is_dead_at_once(registry, new_registry):
    """Its process may still be there."""
    registry.put(RECORD)
    registry.put(KERNEL)
    registry.close(leave=True)
    later = new_registry()
    assert [(server.is_dead, kernel) for server, kernel in later.store.all_kernels()] == [(True, KERNEL)]
    assert later.used_jobs() == set()


def test_a_pid_that_lives_again_is_not_the_process_that_died():
    """The start time tells them apart; another boot's process is dead, another host's is not ours to judge."""
    assert not this_process().is_dead
    assert replace(this_process(), start="1").is_dead
    assert replace(this_process(), boot="another").is_dead
    assert not replace(this_process(), host="elsewhere", start="1").is_dead


def test_a_process_without_a_waiting_parent_is_dead():
    """It is still in the process table, and does nothing any more."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert store.records.start_time(pid) == ""
    finally:
        os.waitpid(pid, 0)


def test_orphans_are_the_records_of_the_dead(registry):
    """Own records and other hosts' are none."""
    registry.put(RECORD)
    registry.flush()
    dead = dead_server(registry, replace(RECORD, launcher_id="gs-9"))
    here = replace(this_process(), host="elsewhere")
    registry.store.register(ServerRecord(server_id="far", process=here))
    registry.store.write("far", [("allocations", "gs-8", replace(RECORD, launcher_id="gs-8"))])
    found = [(server.server_id, record.launcher_id) for server, record in registry.orphans()]
    assert found == [(dead.server_id, "gs-9")]
    assert registry.used_jobs(by_others=True) == {"12"}


def test_what_a_dead_server_left_goes_record_by_record(registry, new_registry):
    """What is not dealt with stays for the next, with all that is in it; who comes second finds less, or nothing."""
    second = replace(RECORD, launcher_id="gs-2", jobid="13")
    kernel = replace(KERNEL, kernel_id="k2", launcher_id="gs-2", record_key="gs-2")
    dead_server(registry, RECORD, LAUNCHER, KERNEL, SESSION, second, kernel)
    orphans = {record.launcher_id: (server, record) for server, record in registry.orphans()}
    registry.drop([orphans["gs-1"]])
    assert [record for _server, record in registry.orphans()] == [second]
    rows = registry.store.rows_of("dead")
    assert (rows.launchers, rows.kernels, rows.sessions) == ((), (kernel,), ())
    new_registry().drop(orphans.values())
    registry.drop(orphans.values())
    assert registry.orphans() == []
    assert [server.server_id for server in registry.store.servers()] == [registry.server_id]


def test_one_job_of_two_servers_is_one_job():
    """It has the kernels of all living servers, and the other fields of the server that submitted it."""
    living = ServerRecord(server_id="a", process=this_process(), lease_until=1e12)
    other = replace(living, server_id="b")
    dead = replace(living, server_id="0", process=replace(this_process(), start="1"))
    found = [
        (dead, replace(RECORD, kernel_ids=["gone"], state="PENDING")),
        (other, replace(RECORD, ours=False, launcher_id="job-12", kernel_ids=["k2"], config={}, state="?")),
        (living, RECORD),
        (other, replace(RECORD, jobid="123", kernel_ids=["other"])),
        (other, replace(RECORD, identity="an earlier job", ours=False, kernel_ids=["earlier"])),
    ]
    for order in (found, found[::-1]):
        jobs = store.by_job(order)
        assert jobs["12"] == (living, replace(RECORD, kernel_ids=["k1", "k2"]))
        assert jobs["123"][1].kernel_ids == ["other"]


# -- files: frontends, other hosts -----------------------------------------------------------


def test_the_frontends_file_has_what_the_process_own_user_has(registry):
    """Other owners' jobs are on record with their owners, and in no frontend."""
    registry.put(RECORD)
    registry.put(replace(RECORD, launcher_id="gs-2", jobid="13", owner="ada"))
    assert list(exported(registry)) == ["12"]
    assert registry.owners_of("12") == {""}
    assert registry.owners_of("13") == {"ada"}
    assert registry.owners_of("14") == set()
    assert stat.S_IMODE(registry._exporter._export.stat().st_mode) == 0o600


def test_frontends_find_what_they_know(registry):
    """The file has what jupyter-slurm-provisioner's extension reads, and loses a job when it is gone."""
    registry.put(RECORD)
    assert exported(registry) == {
        "12": {
            "kernel_ids": ["k1"],
            "nodelist": ["c1"],
            "endtime": 1e9,
            "config": {"partition": "batch"},
            "state": "RUNNING",
        }
    }
    registry.remove("allocations", "gs-1")
    assert exported(registry) == {}


def test_an_intent_without_a_job_is_kept_but_not_shown_to_frontends(registry):
    """Between the record and sbatch's answer there is no job id."""
    registry.put(replace(RECORD, jobid=None))
    assert exported(registry) == {}
    assert registry.all_allocations()[0][1].jobid is None


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Registry]:
    """A registry on SQLite. Its user works on other hosts, too."""
    registry = Registry(tmp_path / "state", tmp_path / "runtime" / store.EXPORT_NAME)
    registry.open()
    yield registry
    registry.close()


def test_servers_on_other_hosts_are_seen_by_their_files(local):
    """Homes are shared, SQLite's files are not: a job that another host's server is in is not ended from here."""
    file_of_other_host(local, RECORD)
    assert [(server.is_dead, record) for server, record in local.all_allocations()] == [(False, RECORD)]
    assert local.used_jobs(by_others=True) == {"12"}
    assert local.orphans() == []


def test_other_hosts_see_what_this_one_has(local, monkeypatch):
    """And this one does not count it twice; the file goes with the record."""
    local.put(RECORD)
    exported(local)
    assert allocations(local) == [RECORD]
    monkeypatch.setattr(store.export, "this_process", lambda: replace(this_process(), host="elsewhere"))
    assert [record for _server, record in RecordFiles(local.directory / "registry").of_other_hosts()] == [RECORD]
    monkeypatch.undo()
    local.remove("allocations", "gs-1")
    exported(local)
    assert list((local.directory / "registry").glob("*.json")) == []


def test_a_file_for_other_hosts_whose_process_died_is_only_removed(local):
    """What it had is in the store; dealt with there, it does not come back."""
    files = RecordFiles(local.directory / "registry")
    files.write(replace(this_process(), start="1"), [RECORD])
    assert local.orphans() == []
    assert list(files.directory.glob("*.json")) == []


def test_a_file_is_never_larger_than_what_is_read(local):
    """Jobs, kernels and what is kept are found whatever they were made with."""
    files = RecordFiles(local.directory / "registry")
    large = replace(RECORD, config={"kernel_argv": ["x" * MAX_FILE_BYTES]}, keep=True)
    files.write(replace(this_process(), host="elsewhere"), [large])
    assert allocations(local) == [replace(RECORD, config={}, nodelist=[], keep=True)]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"process": 1}', '{"process": {"pid": 1}, "records": []}', "\0" * 100]
)
def test_a_broken_file_is_told_and_left(local, text, caplog):
    """Other files are still read."""
    file_of_other_host(local, RECORD)
    broken = local.directory / "registry" / "x-1-1.json"
    broken.write_text(text)
    assert allocations(local) == [RECORD]
    assert str(broken) in caplog.text
    assert broken.exists()


def test_records_that_are_none_take_only_their_file_out(local):
    """Another program may have written the file."""
    file_of_other_host(local, RECORD)
    process = asdict(replace(this_process(), start="1"))
    for number, records in enumerate(['"x"', "[1]", '["x"]', "{}", "[" * 3000 + "]" * 3000]):
        text = f'{{"process": {json.dumps(process)}, "records": {records}}}'
        (local.directory / "registry" / f"x-{number}-1.json").write_text(text)
    assert allocations(local) == [RECORD]


def test_a_record_of_another_version_is_understood(local):
    """Unknown fields do not hide a job."""
    file_of_other_host(local, RECORD)
    path = next((local.directory / "registry").glob("*.json"))
    content = json.loads(path.read_text())
    content["records"][0]["colour"] = "blue"
    path.write_text(json.dumps(content))
    assert allocations(local) == [RECORD]
    local.put(replace(RECORD, launcher_id="gs-2"))
    local.flush()
    with local.store.database.writing() as connection:
        for row in connection.execute(sa.select(ALLOCATIONS)).mappings().all():
            newer = {**row, "record": row["record"].replace("{", '{"colour": "blue", ')}
            connection.execute(sa.update(ALLOCATIONS).values(**local.store._cipher.seal("allocations", newer)))
    assert [one.launcher_id for one in local.store.rows_of(local.server_id).allocations] == ["gs-2"]


def test_a_registry_that_only_reads_is_no_server(new_registry):
    """The command line looks, and leaves nothing."""
    reader = new_registry()
    assert reader.all_allocations() == []
    assert reader.store.servers() == []


# -- several processes --------------------------------------------------------------------------


def _one_process(base: str, url: str, number: int) -> None:
    registry = Registry(Path(base) / "state", Path(base) / "runtime" / store.EXPORT_NAME, url=url)
    registry.open()
    for round_ in range(20):
        registry.put(replace(RECORD, launcher_id=f"gs-{number}", jobid=str(number), state=f"ROUND {round_}"))
        registry.flush()
    registry._exporter.close()
    # It stays alive until all have written: a dead process's jobs are not shown.
    Path(base, f"done-{number}").touch()
    poll(lambda: len(list(Path(base).glob("done-*"))) == 4, timeout=60)
    os._exit(0)  # as a server that is killed


def test_several_processes_lose_nothing_of_one_anothers(tmp_path, store_url):
    """Four servers of one user open a new store and write at once; the frontends' file is whole at any moment."""
    context = multiprocessing.get_context("spawn")
    arguments = [(str(tmp_path), store_url, number) for number in range(1, 5)]
    processes = [context.Process(target=_one_process, args=one) for one in arguments]
    for process in processes:
        process.start()
    path = tmp_path / "runtime" / store.EXPORT_NAME
    seen: dict[str, object] = {}
    while len(list(tmp_path.glob("done-*"))) < 4 and any(process.is_alive() for process in processes):
        if path.exists():
            seen = json.loads(path.read_text())  # never half a file
    for process in processes:
        process.join(30)
    assert set(seen) | set(json.loads(path.read_text())) == {"1", "2", "3", "4"}
    assert not list(path.parent.glob(".*"))
    later = Registry(tmp_path / "state", url=store_url)
    assert sorted(record.state for _server, record in later.orphans()) == ["ROUND 19"] * 4
    later.close()


def test_what_only_kernels_need_does_not_import_the_database():
    """SQLAlchemy takes a good part of a second, and is for the thread that opens the store."""
    program = "import sys, gateway_slurm.provisioner; print('sqlalchemy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def test_a_key_or_url_that_is_wrong_is_told_at_open(tmp_path):
    """Before a kernel depends on it."""
    registry = Registry(tmp_path, url="mysql://host/db")
    with pytest.raises(StoreError, match="SQLite or PostgreSQL"):
        registry.open()
    registry.close()


# -- marks --------------------------------------------------------------------------------------


def test_a_keep_flag_is_seen_by_other_processes(local):
    """The command line asks, the server that has the job sees it; ids are compared whole."""
    assert local.keep_flags.all() == frozenset()
    Registry(local.directory).keep_flags.set("12", "gs-1")
    assert local.keep_flags.all() == {("12", "gs-1")}
    (local.keep_flags.directory / "12").touch()  # not one of ours
    local.keep_flags.remove("12", "gs-2")
    local.keep_flags.remove("123", "gs-1")
    assert local.keep_flags.all() == {("12", "gs-1")}
    local.keep_flags.remove("12", "gs-1")
    local.keep_flags.remove("12", "gs-1")
    assert local.keep_flags.all() == frozenset()


@pytest.mark.parametrize("flag", [("", "gs-1"), ("12", ""), ("12", "../x"), ("../12", "x"), ("12", "a.b")])
def test_a_keep_flag_is_of_a_job(local, flag):
    """No other file can be made or removed by one."""
    for change in (local.keep_flags.set, local.keep_flags.remove):
        with pytest.raises(ValueError, match="not a job id and an identity"):
            change(*flag)
