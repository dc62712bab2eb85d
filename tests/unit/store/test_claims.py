"""Takeovers from dead servers: which servers are dead, which rows move, and that each row has one server."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from gateway_slurm.errors import StoreUnavailable
from gateway_slurm.store import (
    LEASE_SECONDS,
    AllocationRecord,
    ClaimedRows,
    KernelRecord,
    LauncherRecord,
    LostRows,
    Registry,
    Rows,
    ServerRecord,
    SessionRecord,
    this_process,
)
from gateway_slurm.store.database import Store, open_store
from gateway_slurm.store.rows import Record, key_of
from gateway_slurm.store.schema import SERVERS
from helpers.private_slurm import poll

ELSEWHERE = replace(this_process(), host="elsewhere")
GONE = replace(this_process(), start="1")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where SQLite's file is, as the registry has it."""
    return tmp_path / this_process().host


@pytest.fixture
def store(store_url: str, directory: Path) -> Iterator[Store]:
    """An open store of each kind."""
    opened = open_store(store_url, directory)
    yield opened
    opened.close()


def server(store: Store, server_id: str, *records: Record, deployment: str = "gateway", **changes: object) -> None:
    """A server with these rows."""
    store.register(ServerRecord(server_id=server_id, deployment=deployment, **{"process": this_process(), **changes}))
    assert store.write(server_id, [(*key_of(record), record) for record in records])


def dead(store: Store, server_id: str, *records: Record, **options: object) -> None:
    """A server that has no process any more."""
    server(store, server_id, *records, **{"process": GONE, **options})


def job(number: int, kernels: int = 1, **changes: object) -> list[Record]:
    """An allocation, its launcher, its kernels, and a session for each."""
    key = f"gs-{number}"
    ids = [f"k{number}.{one}" for one in range(kernels)]
    return [
        AllocationRecord(launcher_id=key, jobid=str(number), kernel_ids=ids, **changes),
        LauncherRecord(launcher_id=key, record_key=key, tokens=(b"a" * 32, b"b" * 32)),
        *(KernelRecord(kernel_id=one, launcher_id=key, record_key=key, launch={"env": {"A": "1"}}) for one in ids),
        *(SessionRecord(session_id=f"s-{one}", kernel_id=one) for one in ids),
    ]


def keys(claimed: Rows) -> dict[str, list[str]]:
    """What was claimed, by table."""
    return {
        "allocations": sorted(one.launcher_id for one in claimed.allocations),
        "launchers": sorted(one.launcher_id for one in claimed.launchers),
        "kernels": sorted(one.kernel_id for one in claimed.kernels),
        "sessions": sorted(one.session_id for one in claimed.sessions),
    }


def end_lease(store: Store, server_id: str, ago: float = 1.0) -> None:
    """As if the server had not been heard of for a while: its lease was over ``ago`` seconds before now."""
    with store.database.writing() as connection:
        now = store.database.now(connection)
        ended = sa.update(SERVERS).where(SERVERS.c.server_id == server_id).values(lease_until=now - ago)
        connection.execute(ended)


# -- dead servers ----------------------------------------------------------------------------------


def test_all_that_a_dead_server_had_is_the_claimers(store):
    """Records come back as they were, the launchers with a new epoch; the dead server is known by its addresses."""
    records = job(1)
    dead(store, "old", *records, addresses=("10.0.0.1:5000",), url="http://old")
    server(store, "new")
    claimed = store.claim("new", "gateway")
    assert [*claimed.allocations, *claimed.launchers, *claimed.kernels, *claimed.sessions] == [
        records[0],
        replace(records[1], epoch=1),
        *records[2:],
    ]
    assert claimed.epoch == 1
    assert [(one.server_id, one.addresses, one.url) for one in claimed.servers] == [
        ("old", ("10.0.0.1:5000",), "http://old")
    ]
    assert [one.server_id for one in store.servers()] == ["new"]
    assert store.rows_of("new").launchers == claimed.launchers
    assert store.claim("new", "gateway") == ClaimedRows()


def test_each_claim_has_a_higher_epoch(store):
    """A launcher tells by it which of two servers is the later one."""
    for number in range(1, 4):
        dead(store, f"old{number}", *job(number))
        server(store, "new")
        assert store.claim("new", "gateway").epoch == number
    owner, launcher = store.find_launcher("gs-2")
    assert (owner.server_id, launcher.epoch) == ("new", 2)
    assert store.find_launcher("gs-") is None


@pytest.mark.parametrize(
    ("deployment", "claims"), [("gateway", True), ("another", False), ("", False)], ids=["same", "another", "none"]
)
def test_servers_take_over_within_a_deployment(store, deployment, claims):
    """An empty name is no deployment."""
    dead(store, "old", *job(1), deployment=deployment)
    server(store, "new")
    server(store, "alone", deployment="")
    assert store.claim("alone", "") == ClaimedRows()
    assert bool(store.claim("new", "gateway").kernels) is claims


def test_a_server_that_lives_keeps_what_it_has(store):
    """On this host or another, as long as its lease lasts."""
    server(store, "here", *job(1))
    server(store, "there", *job(2), process=ELSEWHERE)
    server(store, "new")
    assert store.claim("new", "gateway") == ClaimedRows()
    assert store.claim("new", "gateway", ["k1.0", "k2.0"]) == ClaimedRows()


def test_a_server_on_another_host_is_dead_when_its_lease_is_over(store):
    """Its process cannot be seen from here."""
    server(store, "there", *job(1), process=ELSEWHERE)
    server(store, "new")
    end_lease(store, "there")
    assert [one.is_dead for one in store.servers() if one.server_id == "there"] == [True]
    assert keys(store.claim("new", "gateway"))["kernels"] == ["k1.0"]


def test_a_server_that_is_only_stopped_is_not_gone(store):
    """Its deployment may take over; for all others its kernels' jobs are in use."""
    server(store, "stopped", *job(1))
    server(store, "far", *job(2), process=ELSEWHERE)
    for one in ("stopped", "far"):
        end_lease(store, one)
    found = {one.server_id: (one.is_dead, one.is_gone) for one in store.servers()}
    assert found == {"stopped": (True, False), "far": (True, True)}


def test_a_server_that_ended_left_all_to_the_next(store):
    """Even while its process is still there."""
    server(store, "old", *job(1))
    store.end("old")
    server(store, "new")
    assert keys(store.claim("new", "gateway"))["kernels"] == ["k1.0"]


def test_leases_are_by_the_databases_clock(store, monkeypatch):
    """A host with a clock that is an hour off takes no server for dead."""
    if store.is_sqlite:
        monkeypatch.setattr(store.database, "now", lambda connection: time.time() - 3600)
    else:
        monkeypatch.setattr(time, "time", lambda real=time.time: real() + 3600)
    server(store, "there", *job(1), process=ELSEWHERE)
    server(store, "new")
    assert not any(one.is_dead for one in store.servers())
    assert store.claim("new", "gateway") == ClaimedRows()


def test_after_an_outage_the_others_may_renew_first(store):
    """The database was away for longer than a lease: the first server back must not take the others for dead."""
    server(store, "there", *job(1), process=ELSEWHERE)
    server(store, "old", *job(2), process=GONE)
    server(store, "new")
    for one in ("there", "new"):
        end_lease(store, one)
    assert store.write("new", [])
    # A server without a process is dead all the same.
    assert keys(store.claim("new", "gateway"))["kernels"] == ["k2.0"]
    assert store.write("there", [])
    with store.database.writing() as connection:
        connection.execute(sa.update(SERVERS).values(leased_since=SERVERS.c.leased_since - LEASE_SECONDS - 1))
    assert store.claim("new", "gateway") == ClaimedRows()
    end_lease(store, "there")
    assert keys(store.claim("new", "gateway"))["kernels"] == ["k1.0"]


def test_a_server_that_is_taken_for_dead_claims_nothing(store):
    """It has to find out first."""
    dead(store, "old", *job(1))
    server(store, "slept")
    store.end("slept")
    assert store.claim("slept", "gateway") == ClaimedRows()


# -- the rows that move -----------------------------------------------------------------------------


def test_a_kernel_brings_its_allocation_and_all_in_it(store):
    """Its launcher has one server, which takes over all kernels of the launcher. The rest stays."""
    second = LauncherRecord(launcher_id="gs-1b", record_key="gs-1", tokens=(b"c", b"d"))
    there = KernelRecord(kernel_id="k1.b", launcher_id="gs-1b", record_key="gs-1")
    dead(store, "old", *job(1, kernels=2), second, there, *job(2), deployment="")
    server(store, "new", deployment="")
    claimed = store.claim("new", "", ["k1.1", "unknown"])
    assert keys(claimed) == {
        "allocations": ["gs-1"],
        "launchers": ["gs-1", "gs-1b"],
        "kernels": ["k1.0", "k1.1", "k1.b"],
        "sessions": ["s-k1.0", "s-k1.1"],
    }
    assert [one.kernel_id for one in store.rows_of("old").kernels] == ["k2.0"]
    assert keys(store.claim("new", "", ["k2.0"]))["kernels"] == ["k2.0"]


def test_an_adopted_job_of_both_becomes_one(store):
    """Its kernels are those of both; of an earlier job with the same id nothing is mixed in."""
    key = "job-7"
    shared = AllocationRecord(launcher_id=key, jobid="7", ours=False, identity="1000", kernel_ids=["a"])
    dead(store, "old1", replace(shared, kernel_ids=["b"]))
    dead(store, "old2", replace(shared, kernel_ids=["c"]))
    dead(store, "old3", replace(shared, kernel_ids=["d"], identity="500"))
    server(store, "new", shared)
    (claimed,) = store.claim("new", "gateway").allocations
    assert claimed == replace(shared, kernel_ids=["a", "b", "c"])
    assert [record for _server, record in store.all_allocations()] == [claimed]


def test_two_dead_servers_jobs_become_one_without_one_of_the_claimers(store):
    """It is on record once, and can be written and claimed again."""
    shared = AllocationRecord(launcher_id="job-7", jobid="7", ours=False, kernel_ids=["a"])
    dead(store, "old1", shared)
    dead(store, "old2", replace(shared, kernel_ids=["b"]))
    server(store, "new")
    assert [one.kernel_ids for one in store.claim("new", "gateway").allocations] == [["a", "b"]]
    assert store.rows_of("new").allocations == (replace(shared, kernel_ids=["a", "b"]),)


# -- fencing --------------------------------------------------------------------------------------


def test_a_server_that_slept_through_its_lease_cannot_write(store):
    """Its rows are another's: it learns that by its next renewal, and changes nothing."""
    server(store, "slept", *job(1), process=ELSEWHERE)
    end_lease(store, "slept")
    server(store, "new")
    store.claim("new", "gateway")
    assert not store.write("slept", [])
    assert not store.write("slept", [("kernels", "k1.0", None), ("kernels", "k9", replace(job(1)[2], kernel_id="k9"))])
    assert [one.kernel_id for one in store.rows_of("new").kernels] == ["k1.0"]
    again = ServerRecord(server_id="slept", deployment="gateway", process=ELSEWHERE)
    assert {("kernels", "k1.0"), ("launchers", "gs-1"), ("allocations", "gs-1")} <= store.rejoin(again)
    assert store.write("slept", [])
    assert store.write("slept", [("kernels", "k1.0", replace(job(1)[2], pid=99)), ("launchers", "gs-1", None)])
    rows = store.rows_of("new")
    assert [one.pid for one in rows.kernels] == [0]
    assert [one.launcher_id for one in rows.launchers] == ["gs-1"]


def test_a_server_of_which_one_kernel_was_taken_finds_out_before_it_writes(store):
    """What it still has is its own again once it has."""
    server(store, "slept", *job(1), *job(2), process=ELSEWHERE)
    end_lease(store, "slept")
    server(store, "new")
    assert keys(store.claim("new", "", ["k1.0"]))["kernels"] == ["k1.0"]
    assert not store.write("slept", [("allocations", "gs-1", AllocationRecord(launcher_id="gs-1"))])
    others = store.rejoin(ServerRecord(server_id="slept", deployment="gateway", process=ELSEWHERE))
    assert others == {("allocations", "gs-1"), ("launchers", "gs-1"), ("kernels", "k1.0"), ("sessions", "s-k1.0")}
    assert keys(store.rows_of("slept"))["kernels"] == ["k2.0"]
    assert store.write("slept", [])


def test_a_row_of_a_server_that_is_gone_can_be_replaced(store):
    """A server that starts a kernel with the id of a dead server's kernel gets the row."""
    server(store, "old", *job(1), deployment="", process=GONE)
    store.end("old")
    server(store, "new", replace(job(1)[2], pid=7))
    assert [one.pid for one in store.rows_of("new").kernels] == [7]


def registry(directory: Path, url: str, lost: Callable[[LostRows], None] = lambda lost: None) -> Registry:
    """A server of the deployment."""
    made = Registry(directory.parent, url=url, deployment="gateway", on_lost=lost)
    made.open()
    return made


def test_a_server_that_was_taken_for_dead_loses_what_is_anothers_and_keeps_the_rest(store, store_url, directory):
    """It learns what it lost, and continues as a living server with what it has started meanwhile."""
    lost: list[LostRows] = []
    slept, other = registry(directory, store_url, lost.append), registry(directory, store_url)
    for record in job(1):
        slept._writer.put(record)
    slept.flush()
    store.end(slept.server_id)  # as a lease that was over while it was stopped
    assert keys(other.claim())["kernels"] == ["k1.0"]
    for record in job(2):
        slept._writer.put(record)
    slept.flush()
    assert lost == [
        LostRows(
            allocations=frozenset({"gs-1"}),
            launchers=frozenset({"gs-1"}),
            kernels=frozenset({"k1.0"}),
            sessions=frozenset({"s-k1.0"}),
        )
    ]
    assert [one.kernel_id for one in slept.kernels()] == ["k2.0"]
    assert keys(store.rows_of(slept.server_id))["kernels"] == ["k2.0"]
    assert keys(store.rows_of(other.server_id))["kernels"] == ["k1.0"]
    assert other.claim() == ClaimedRows()
    for one in (slept, other):
        one.close()


def test_a_server_of_which_a_loop_stands_still_does_not_renew_its_lease(store, store_url, directory):
    """It writes nothing, drops at once what another server takes over, and continues when the loop runs again."""
    lost: list[LostRows] = []
    standing, other = "", registry(directory, store_url)
    url, parent = store_url, directory.parent
    stood = Registry(parent, url=url, deployment="gateway", on_lost=lost.append, standing=lambda: standing)
    stood.open()
    for record in job(1):
        stood._writer.put(record)
    stood.flush()
    standing = "the loop"
    lease = next(one.lease_until for one in store.servers() if one.server_id == stood.server_id)
    stood.put(replace(job(1)[0], state="RUNNING"))
    assert poll(lambda: stood.trouble.startswith("the loop stands still"), timeout=10)
    unchanged = next(one.lease_until for one in store.servers() if one.server_id == stood.server_id)
    assert unchanged == pytest.approx(lease, abs=0.5)  # the two clocks are compared each time
    end_lease(store, stood.server_id, ago=2 * LEASE_SECONDS)
    assert poll(lambda: keys(other.claim())["kernels"] == ["k1.0"], timeout=2 * LEASE_SECONDS)
    assert poll(lambda: bool(lost), timeout=10)
    assert lost[0].kernels == {"k1.0"}
    standing = ""
    for record in job(2):
        stood._writer.put(record)
    stood.flush()
    assert keys(store.rows_of(stood.server_id))["kernels"] == ["k2.0"]
    assert keys(store.rows_of(other.server_id))["kernels"] == ["k1.0"]
    assert (len(lost), stood.trouble) == (1, "")
    for one in (stood, other):
        one.close()


def test_what_was_lost_is_not_written_after_a_write_that_failed(store, store_url, directory, monkeypatch):
    """The database goes away in the moment in which a server learns that a job is another's."""
    slept, other = registry(directory, store_url), registry(directory, store_url)
    for record in job(1):
        slept._writer.put(record)
    slept.flush()
    write, answers, taken = Store.write, [], threading.Event()

    def failing(self: Store, server_id: str, changes: list[object]) -> bool:
        taken.wait(30)
        if server_id == slept.server_id and answers == [False]:
            answers.append(True)
            raise StoreUnavailable("away")
        answers.append(write(self, server_id, changes))
        return answers[-1]

    monkeypatch.setattr(Store, "write", failing)
    slept.put(replace(job(1)[0], state="RUNNING"))
    store.end(slept.server_id)
    other.claim()
    taken.set()
    slept.flush()
    monkeypatch.undo()
    assert answers[:2] == [False, True]
    assert [owner.server_id for owner, _record in store.all_allocations()] == [other.server_id]
    for one in (slept, other):
        one.close()


def test_what_a_server_claimed_it_can_lose_again(store, store_url, directory):
    """A claimed row can be claimed by a third server."""
    lost: list[LostRows] = []
    dead(store, "old", *job(1))
    first, second = registry(directory, store_url, lost.append), registry(directory, store_url)
    assert keys(first.claim())["kernels"] == ["k1.0"]
    assert first.epoch == 1
    store.end(first.server_id)
    assert keys(second.claim())["kernels"] == ["k1.0"]
    assert second.epoch == 2
    first.flush()
    assert [one.kernels for one in lost] == [{"k1.0"}]
    assert first.kernels() == []
    for one in (first, second):
        one.close()


@pytest.mark.slow
def test_a_stopped_process_loses_its_lease_and_no_kernel(store, store_url, directory):
    """SIGSTOP for longer than a lease: another server takes over, and the first one learns of it when it goes on."""
    program = f"""
import sys
from pathlib import Path
from gateway_slurm.store import KernelRecord, Registry
registry = Registry(Path({str(directory.parent)!r}), url={store_url!r}, deployment="gateway",
                    on_lost=lambda lost: print("lost", *lost.kernels, flush=True))
registry.open()
registry.put(KernelRecord(kernel_id="k1", launcher_id="gs-1", record_key="gs-1"))
registry.flush()
print("ready", flush=True)
sys.stdin.read()
registry.close()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    other = registry(directory, store_url)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        assert other.claim() == ClaimedRows()
        assert poll(lambda: keys(other.claim())["kernels"] == ["k1"], timeout=3 * LEASE_SECONDS)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "lost k1\n"
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert [one.kernel_id for one in store.rows_of(other.server_id).kernels] == ["k1"]
    other.close()


def test_a_server_renews_its_lease_by_itself(store, store_url, directory):
    """Also while nothing changes and its loop hangs."""
    one = registry(directory, store_url)

    def until() -> float:
        return next(server.lease_until for server in store.servers())

    first = until()
    assert poll(lambda: until() > first + 1.0, timeout=LEASE_SECONDS, interval=0.2)
    relay = {"port": 7, "boot": "b", "pid": 1, "ticks": "2"}
    one.announce(url="http://here", addresses=["10.0.0.1:1"], relays=[relay])
    one.flush()
    (server,) = store.servers()
    assert (server.url, server.addresses, server.relays) == ("http://here", ("10.0.0.1:1",), (relay,))
    one.close()
    assert store.servers() == []


# -- concurrent claims --------------------------------------------------------------------------------------


def test_of_claimers_at_once_exactly_one_gets_each_row(store, store_url, directory):
    """Threads of two processes claim together: every row has one owner, and none is lost."""
    for number in range(20):
        dead(store, f"old{number}", *job(number))
    barrier = threading.Barrier(8)
    claims: list[tuple[str, list[str]]] = []

    def claim(name: str) -> None:
        own = open_store(store_url, directory)
        server(own, name)
        barrier.wait(30)
        claims.append((name, keys(own.claim(name, "gateway"))["kernels"]))
        own.close()

    threads = [threading.Thread(target=claim, args=(f"new{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(kernel for _name, kernels in claims for kernel in kernels) == sorted(f"k{n}.0" for n in range(20))
    for name, kernels in claims:
        assert keys(store.rows_of(name))["kernels"] == kernels


CLAIMER = """
import sys
from pathlib import Path
from gateway_slurm.store import ServerRecord, this_process
from gateway_slurm.store.database import open_store
directory, url, name = sys.argv[1:]
store = open_store(url, Path(directory))
store.register(ServerRecord(server_id=name, deployment="gateway", process=this_process()))
print("ready", flush=True)
for _round in sys.stdin:
    print(*sorted(one.kernel_id for one in store.claim(name, "gateway").kernels), flush=True)
"""


def test_of_two_processes_that_claim_at_once_exactly_one_gets_each_row(store, store_url, directory):
    """Ten rounds; in each a server has died, and both processes claim at the same time."""
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, str(directory), store_url, f"new{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for one in claimers:
            assert one.stdout.readline() == "ready\n"
        for round_ in range(10):
            dead(store, f"old{round_}", *(record for n in range(3) for record in job(10 * round_ + n)))
            for one in claimers:
                one.stdin.write("\n")
                one.stdin.flush()
            got = [one.stdout.readline().split() for one in claimers]
            assert sorted(got[0] + got[1]) == [f"k{10 * round_ + n}.0" for n in range(3)]
    finally:
        for one in claimers:
            one.communicate(timeout=30)


def test_a_thousand_kernels_are_claimed_and_read_in_under_two_seconds(store, store_url, directory):
    """As many as a restart of a large gateway has to do with."""
    dead(store, "old", *(record for number in range(1000) for record in job(number)))
    new = registry(directory, store_url)
    try:
        # What it costs, however busy the machine is with other tests; a PostgreSQL works beside.
        began, begun = time.monotonic(), time.thread_time()
        claimed = new.claim()
        took = time.thread_time() - begun
        assert time.monotonic() - began < 10.0
        assert {name: len(found) for name, found in keys(claimed).items()} == dict.fromkeys(keys(claimed), 1000)
        assert len(new.kernels()) == 1000
        assert took < 2.0
    finally:
        new.close(leave=True)


async def test_the_loop_runs_on_while_a_thousand_rows_are_written(store_url, directory):
    """Putting a row takes no time to speak of, whatever the database does."""
    one = await asyncio.to_thread(registry, directory, store_url)
    records = [record for number in range(1000) for record in job(number)]
    begun = time.thread_time()
    for record in records:
        one._writer.put(record)
    assert time.thread_time() - begun < 0.5
    await one.flushed()
    await asyncio.to_thread(one.close)
