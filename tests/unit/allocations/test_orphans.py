"""Orphans: the store is compared with Slurm's jobs, and a job of a live server is never among them."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest

from gateway_slurm.allocations.identity import COMMENT, STEP_NAME, is_of_store, new_launcher_id
from gateway_slurm.allocations.recovery import NO_TIMEOUT_GRACE, find_orphans, watch_orphans
from gateway_slurm.errors import StepsUnknown
from gateway_slurm.slurm.model import JobInfo, StepInfo
from gateway_slurm.store import AllocationRecord, ServerRecord, this_process

STORE = "0123456789abcdef0123456789abcdef"
NOW = 2_000_000_000.0
LOG = logging.getLogger("test.orphans")
HERE = this_process()
DEAD = ServerRecord(server_id="dead", process=replace(HERE, start="1"), lease_until=NOW - 100)
LIVING = ServerRecord(server_id="living", process=HERE, lease_until=NOW + 10)
ELSEWHERE = ServerRecord(server_id="far", process=replace(HERE, host="far.away", start="1"), lease_until=NOW - 100)


def job(jobid: str, launcher_id: str, *, state: str = "RUNNING", age: float = 500.0) -> JobInfo:
    """A job as Slurm describes it."""
    comment = f"{COMMENT}{launcher_id}"
    return JobInfo(jobid=jobid, state=state, name="a.ipynb", comment=comment, user="ada", submit_time=NOW - age)


def row(jobid: str, launcher_id: str, **more) -> AllocationRecord:
    """The job's record in the store."""
    return AllocationRecord(launcher_id=launcher_id, jobid=jobid, identity=launcher_id, **more)


def orphans(jobs, found=(), marks=frozenset(), *, orphan_timeout=60.0, now=NOW, store_id=STORE):
    """The orphans among these jobs."""
    known = {info.jobid: info for info in jobs}
    return find_orphans(known, found, marks, store_id=store_id, orphan_timeout=orphan_timeout, now=now)


def test_a_launchers_id_names_its_store():
    """And no other store."""
    launcher_id = new_launcher_id(STORE)
    assert is_of_store(launcher_id, STORE)
    assert not is_of_store(launcher_id, "f" * 32)
    assert not is_of_store(launcher_id, "")
    assert not is_of_store(new_launcher_id(""), STORE)
    assert new_launcher_id(STORE) != launcher_id


def test_a_live_servers_job_is_no_orphan():
    """Other servers' records of it and its age do not matter."""
    found = [(LIVING, row("1", "gs-1")), (DEAD, row("1", "gs-1"))]
    assert orphans([job("1", "gs-1", age=1e6)], found) == []


def test_a_dead_servers_job_may_be_cancelled_once_its_launcher_would_have_ended_it():
    """Until then the server's successor, or ``attach``, may take it over."""
    (orphan,) = orphans([job("1", "gs-1")], [(DEAD, row("1", "gs-1", kernel_ids=["k", "l"]))])
    assert (orphan.since, orphan.due, orphan.why_left(NOW)) == (NOW - 100, NOW - 40, "")
    assert "its kernels (2) are out of reach" in orphan.what
    (young,) = orphans([job("1", "gs-1")], [(DEAD, row("1", "gs-1"))], orphan_timeout=900.0)
    assert "may take it over" in young.why_left(NOW)
    (patient,) = orphans([job("1", "gs-1")], [(DEAD, row("1", "gs-1"))], orphan_timeout=0.0)
    assert patient.due == NOW - 100 + NO_TIMEOUT_GRACE


def test_the_grace_of_a_server_without_a_lease_begins_when_it_is_found_dead():
    """A plain program's server has no lease: only its process shows that it died."""
    found, seen = [(replace(DEAD, lease_until=math.inf), row("1", "gs-1"))], {}
    for passed, left in ((0.0, True), (50.0, True), (60.0, False)):
        known = {"1": job("1", "gs-1")}
        (orphan,) = find_orphans(
            known, found, frozenset(), store_id=STORE, orphan_timeout=60.0, now=NOW + passed, seen=seen
        )
        assert (orphan.since, bool(orphan.why_left(NOW + passed))) == (NOW, left)


@pytest.mark.parametrize("late", [-10.0, 0.0, 59.0])
def test_a_server_on_another_host_has_a_grace_beyond_its_lease(late):
    """It may have been suspended, and its launchers still wait for it."""
    server = replace(ELSEWHERE, lease_until=NOW - late)
    assert orphans([job("1", "gs-1")], [(server, row("1", "gs-1"))]) == []


def test_a_server_that_is_late_with_its_lease_lives_while_its_process_does():
    """As one that is stopped in a terminal (Ctrl-Z), overnight."""
    server = replace(LIVING, lease_until=NOW - 50_000)
    assert orphans([job("1", "gs-1")], [(server, row("1", "gs-1"))]) == []


def test_a_job_without_a_record_is_an_orphan_of_its_own_store_only():
    """The same user may have servers on other hosts, with stores that cannot be read from here."""
    ours, theirs, old = new_launcher_id(STORE), new_launcher_id("f" * 32), "gs-0011223344556677"
    found = orphans([job("1", ours), job("2", theirs), job("3", old)])
    assert [(orphan.jobid, orphan.foreign) for orphan in found] == [("1", False), ("2", True), ("3", True)]
    assert found[0].why_left(NOW) == ""
    assert "of that store" in found[1].why_left(NOW + 1e9)
    assert orphans([job("1", ours)], store_id="")[0].foreign


def test_a_kept_job_is_left_and_a_job_that_is_over_or_foreign_is_ignored():
    """The user's keep flag counts more than the policy."""
    launcher_id = new_launcher_id(STORE)
    over = job("2", launcher_id, state="COMPLETED")
    foreign = replace(job("3", launcher_id), comment="theirs")
    (kept,) = orphans([job("1", launcher_id), over, foreign], marks=frozenset({("1", launcher_id)}))
    assert "must be kept" in kept.why_left(NOW)


# -- The policy --


class Slurm:
    """Answers from memory, and notes which jobs were cancelled."""

    is_local = True

    def __init__(self, *jobs: JobInfo, steps=()) -> None:
        self.known, self._steps = {info.jobid: info for info in jobs}, list(steps)
        self.cancelled: list[str] = []

    async def find(self, _comment: str) -> dict[str, JobInfo]:
        return dict(self.known)

    async def steps(self, _jobid: str) -> list[StepInfo]:
        return self._steps

    async def cancel(self, jobid: str) -> None:
        self.cancelled.append(jobid)
        del self.known[jobid]


class Rows:
    """A store's records and keep flags, as a registry returns them."""

    store_id = STORE

    def __init__(self, *found) -> None:
        self._found, self.dropped = found, []
        self.keep_flags = self

    def all(self) -> frozenset:
        return frozenset()

    def all_allocations(self) -> list:
        return list(self._found)

    def drop(self, found) -> None:
        self.dropped += found


async def settled(slurm: Slurm, rows: Rows, policy: str, *, orphan_timeout: float = 60.0) -> None:
    """Run the policy to its end."""
    no_wait = {"pause": lambda _seconds: 0.0}
    await watch_orphans(rows, slurm, LOG, policy=policy, orphan_timeout=orphan_timeout, **no_wait)


@pytest.fixture
def found():
    """A dead server's record of job 1."""
    return DEAD, row("1", "gs-1")


async def test_the_policy_leave_logs_one_line_a_job_and_cancels_nothing(found, caplog):
    """The line says where to learn more."""
    slurm, rows = Slurm(job("1", "gs-1")), Rows((replace(DEAD, lease_until=1.0), found[1]))
    await settled(slurm, rows, "leave")
    assert (slurm.cancelled, rows.dropped) == ([], [])
    assert [record.getMessage() for record in caplog.records if "job 1" in record.getMessage()] == [
        "job 1 belongs to a dead server; it is left: SlurmService.orphan_jobs is leave; see: jupyter slurm doctor"
    ]


async def test_the_policy_cancel_ends_the_job_and_drops_its_record(found):
    """Steps of our own launchers do not count as use."""
    steps = [StepInfo(stepid="1.batch"), StepInfo(stepid="1.0", name=STEP_NAME)]
    slurm, rows = Slurm(job("1", "gs-1"), steps=steps), Rows((replace(DEAD, lease_until=1.0), found[1]))
    await settled(slurm, rows, "cancel")
    assert slurm.cancelled == ["1"]
    assert [record for _server, record in rows.dropped] == [found[1]]


async def test_a_job_with_another_step_is_not_cancelled(caplog):
    """The step is not a launcher's."""
    rows = Rows((replace(DEAD, lease_until=1.0), row("1", "gs-1")))
    slurm = Slurm(job("1", "gs-1"), steps=[StepInfo(stepid="1.7", name="a.out")])
    await settled(slurm, rows, "cancel")
    assert slurm.cancelled == []
    assert "another job step runs in it (step 1.7 (a.out))" in caplog.text


async def test_a_job_with_unknown_steps_is_not_cancelled(caplog):
    """Another orphan is cancelled in the same look all the same."""

    class Tacit(Slurm):
        async def steps(self, jobid: str) -> list[StepInfo]:
            if jobid == "1":
                raise StepsUnknown("which steps run in job 1 is not known")
            return []

    gone = replace(DEAD, lease_until=1.0)
    rows, slurm = Rows((gone, row("1", "gs-1")), (gone, row("2", "gs-2"))), Tacit(job("1", "gs-1"), job("2", "gs-2"))
    await settled(slurm, rows, "cancel")
    assert slurm.cancelled == ["2"]
    assert "it is left: which steps run in job 1 is not known" in caplog.text
