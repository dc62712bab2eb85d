"""What a server that was killed left behind, and the command line over the user's allocations."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gateway_slurm import store
from gateway_slurm.allocations import recovery
from gateway_slurm.allocations.identity import COMMENT, identity_of
from gateway_slurm.allocations.recovery import recover
from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.slurm.driver import CommandLineDriver
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.store import AllocationRecord, Registry
from helpers.dead_server import leave_behind
from helpers.failing_starts import jobs_of_ours
from helpers.kernel_clients import READY, async_kernel, install_kernelspec, job_state, jobid_of, poll_async
from helpers.private_slurm import jobs_of, poll, slurm
from helpers.server_processes import on_record, server

LOG = logging.getLogger("test.recovery")

KILLED_SERVER = """
import os, signal, sys
from jupyter_client import KernelManager
from gateway_slurm.slurm.driver import CommandLineDriver
when = sys.argv[1]
submit = CommandLineDriver.submit
async def killed(self, spec):
    if when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    await submit(self, spec)
    os.kill(os.getpid(), signal.SIGKILL)
CommandLineDriver.submit = killed
KernelManager(kernel_name="slurm").start_kernel()
"""


def submit(cluster, comment: str, *options: str) -> str:
    """A job with a comment as ours have, that only sleeps; an admin may have given it any name."""
    argv = ("sbatch", "--parsable", "--job-name=a notebook", f"--comment={comment}", "-o/dev/null", *options)
    return slurm(*argv, "--wrap", "sleep 300", cluster=cluster).stdout.strip()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """The next server's."""
    with contextlib.closing(Registry(tmp_path)) as opened:
        yield opened


@pytest.fixture
def driver(cluster) -> CommandLineDriver:
    """The real Slurm."""
    return CommandLineDriver(Runner())


async def test_a_job_that_no_kernel_ever_ran_in_is_cancelled_and_others_are_not(
    driver, cluster, tmp_path, monkeypatch, registry
):
    """The comment decides, whole; a kept one, one with kernels, and what is on record of them, are left alone."""
    orphan = submit(cluster, f"{COMMENT}gs-1", "--hold")
    other = submit(cluster, f"{COMMENT}gs-12", "--hold")
    kept = submit(cluster, f"{COMMENT}gs-3", "--hold")
    used = submit(cluster, f"{COMMENT}gs-4")
    assert poll(lambda: job_state(used) == "RUNNING", timeout=READY)
    leave_behind(
        tmp_path,
        AllocationRecord(launcher_id="gs-1", jobid=orphan, state="PENDING"),
        AllocationRecord(launcher_id="gs-3", jobid=None, state="PENDING", keep=True),
        AllocationRecord(launcher_id="gs-4", jobid=used, state="RUNNING", kernel_ids=["k"]),
    )
    assert await recover(registry, driver, LOG) == [orphan]
    assert poll(lambda: job_state(orphan) == "", timeout=READY)
    assert [job_state(jobid) for jobid in (other, kept, used)] == ["PENDING", "PENDING", "RUNNING"]
    assert registry.keep_flags.all() == {(kept, "gs-3")}
    assert await recover(registry, driver, LOG) == []
    assert [record.launcher_id for _process, record in registry.orphans()] == ["gs-3", "gs-4"]
    slurm("scancel", other, kept, used, cluster=cluster)
    monkeypatch.setattr(recovery, "INTENT_TIMEOUT", 0.0)  # one look: the kept job's id was never on record
    assert poll(lambda: not jobs_of(cluster), timeout=READY)
    assert await recover(registry, driver, LOG) == []
    assert registry.orphans() == []
    assert registry.keep_flags.all() == frozenset()


async def test_an_intent_is_looked_for_until_its_job_is_there(driver, cluster, tmp_path, registry):
    """The sbatch of a dead server may still be under way when the next one looks."""
    leave_behind(tmp_path, AllocationRecord(launcher_id="gs-1", jobid=None))
    looking = asyncio.ensure_future(recover(registry, driver, LOG))
    assert await poll_async(lambda: driver.runner.counts["squeue"], timeout=READY)
    late = await asyncio.to_thread(submit, cluster, f"{COMMENT}gs-1", "--hold")
    assert await asyncio.wait_for(looking, READY) == [late]
    assert registry.orphans() == []
    assert driver.runner.counts["squeue"] < 8


async def test_an_intent_without_a_job_is_forgotten_in_the_end(driver, cluster, tmp_path, monkeypatch, registry):
    """Looking for it is bounded, and what was not there by then never was."""
    monkeypatch.setattr(recovery, "INTENT_TIMEOUT", 1.5)
    leave_behind(tmp_path, AllocationRecord(launcher_id="gs-1", jobid=None))
    assert await recover(registry, driver, LOG) == []
    assert registry.orphans() == []


async def test_what_an_adopted_or_suspended_job_is_on_record_for_stays_until_it_is_over(
    driver, cluster, tmp_path, registry
):
    """They are not ours to cancel, and their user is to find them; another job with the id is not meant."""
    adopted = submit(cluster, "another job", "--job-name=theirs")
    suspended = submit(cluster, f"{COMMENT}gs-2")
    assert poll(lambda: job_state(adopted) == job_state(suspended) == "RUNNING", timeout=READY)
    slurm("scontrol", "suspend", suspended, cluster=cluster)
    info = (await driver.jobs([adopted]))[adopted]
    assert info.submit_time is not None
    theirs = AllocationRecord(launcher_id=f"job-{adopted}", jobid=adopted, ours=False, identity=identity_of(info))
    leave_behind(
        tmp_path,
        theirs,
        replace(theirs, launcher_id="job-reused", identity="123"),
        AllocationRecord(launcher_id="gs-2", jobid=suspended, state="PENDING"),
    )
    assert await recover(registry, driver, LOG) == []
    assert [record.launcher_id for _process, record in registry.orphans()] == [f"job-{adopted}", "gs-2"]
    slurm("scancel", adopted, suspended, cluster=cluster)
    assert poll(lambda: not jobs_of(cluster), timeout=READY)
    assert await recover(registry, driver, LOG) == []
    assert registry.orphans() == []


async def test_a_mark_goes_with_its_job(driver, cluster, tmp_path, registry):
    """One of an earlier job with the same id does not keep a later one, and is removed; a living job's stays."""
    job = submit(cluster, f"{COMMENT}gs-7", "--hold")
    for identity in ("gs-6", "gs-7"):
        registry.keep_flags.set(job, identity)
    registry.keep_flags.set("99999999", "gs-1")
    assert await recover(registry, driver, LOG) == []
    assert registry.keep_flags.all() == {(job, "gs-7")}
    slurm("scancel", job, cluster=cluster)


async def test_where_nothing_was_left_slurm_is_not_asked(driver, tmp_path, registry):
    """A start costs no squeue for what is not there."""
    assert await recover(registry, driver, LOG) == []
    assert driver.runner.counts.total() == 0


async def test_while_slurm_does_not_answer_nothing_is_forgotten(tmp_path, monkeypatch, registry):
    """The next server tries again."""
    monkeypatch.setattr(recovery, "INTENT_TIMEOUT", 0.0)

    class Down:
        async def find(self, comment: str) -> dict[str, object]:
            raise SlurmUnavailable("no answer")

    leave_behind(tmp_path, AllocationRecord(launcher_id="gs-1"), AllocationRecord(launcher_id="gs-2", jobid="12"))
    registry.keep_flags.set("12", "gs-2")
    assert await recover(registry, Down(), LOG) == []
    assert len(registry.orphans()) == 2
    assert registry.keep_flags.all() == {("12", "gs-2")}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_killed_around_sbatch_leaves_no_job(service, kernelspecs, cluster, tmp_path, monkeypatch, when):
    """Killed before sbatch ran, or before its answer was heard: the next server finds the job and cancels it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(recovery, "INTENT_TIMEOUT", 3.0)
    filler = slurm(
        "sbatch", "--parsable", "--exclusive", "-N4", "-o/dev/null", "--wrap", "sleep 300", cluster=cluster
    ).stdout.strip()
    assert poll(lambda: job_state(filler) == "RUNNING", timeout=READY)
    killed = subprocess.run([sys.executable, "-c", KILLED_SERVER, when], check=False, timeout=READY)
    assert killed.returncode == -signal.SIGKILL
    left = jobs_of_ours(cluster)
    assert len(left) == (1 if when == "after" else 0)
    asyncio.run_coroutine_threadsafe(service.open(), service._ensure_thread()).result(READY)
    assert poll(lambda: not jobs_of_ours(cluster), timeout=READY)
    assert poll(lambda: not on_record(), timeout=READY)
    slurm("scancel", filler, cluster=cluster)


# -- the command line -------------------------------------------------------------------------------


def allocations(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``jupyter slurm allocations …`` as its user runs it."""
    argv = [sys.executable, "-m", "gateway_slurm.cli.app", "allocations", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=READY, check=False)


def test_a_kernel_whose_server_was_killed_is_counted_and_release_asks_first(service, tmp_path, monkeypatch, cluster):
    """Without a terminal ``release`` ends nothing and says how; with ``--yes`` it ends the job and its kernels."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with server() as one:
        one.end("SIGKILL")
        (row,) = json.loads(allocations("--json").stdout)
        assert (row["kernel_ids"], len(row["orphans"])) == ([], 1)
        assert "1 without a server" in allocations().stdout
        assert f"{row['orphans'][0]} (no server)" in allocations("show", one.jobid).stdout
        asked = allocations("release", one.jobid)
        assert asked.returncode == 1
        assert "jupyter slurm attach" in asked.stderr
        assert f"release --yes {one.jobid}" in asked.stderr
        assert job_state(one.jobid) == "RUNNING"
        assert psutil.pid_exists(one.kernel)
        ended = allocations("release", "--yes", one.jobid)
        assert ended.stdout == f"job {one.jobid} is cancelled, and with it its kernels (1)\n"
    assert poll(lambda: not jobs_of(cluster), timeout=READY)


async def test_the_command_line_lists_keeps_releases_and_cancels(service, kernelspecs, tmp_path, monkeypatch):
    """A user's own allocations, with the kernels in each, from another process than the server's."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    async with async_kernel("slurm") as (manager, _client):
        jobid = jobid_of(manager)
        table = (await asyncio.to_thread(allocations)).stdout
        assert table.splitlines()[0].split() == [
            "JOBID",
            "STATE",
            "NODES",
            "TIME",
            "LEFT",
            "KERNELS",
            "KEPT",
            "WAITS",
            "FOR",
        ]
        assert table.splitlines()[1].split()[:2] == [jobid, "RUNNING"]
        (row,) = json.loads((await asyncio.to_thread(allocations, "--json")).stdout)
        assert row["kernel_ids"] == [manager.kernel_id]
        shown = (await asyncio.to_thread(allocations, "show", jobid)).stdout
        assert manager.kernel_id in shown
        assert '"partition": "batch"' in shown
        assert (await asyncio.to_thread(allocations, "keep", jobid)).returncode == 0
        frontends = json.loads((Path(os.environ["JUPYTER_RUNTIME_DIR"]) / store.EXPORT_NAME).read_text())
        assert frontends[jobid]["kernel_ids"] == [manager.kernel_id]
    assert job_state(jobid) == "RUNNING"
    assert "yes" in (await asyncio.to_thread(allocations)).stdout
    released = await asyncio.to_thread(allocations, "release", jobid)
    assert f"job {jobid} is cancelled" in released.stdout
    assert await asyncio.to_thread(poll, lambda: job_state(jobid) == "", timeout=READY)
    assert "no allocations" in (await asyncio.to_thread(allocations)).stdout


async def test_releasing_a_job_with_a_kernel_in_it_ends_it_with_the_kernel(service, kernelspecs, tmp_path, monkeypatch):
    """What is in use is not ended."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    async with async_kernel("slurm") as (manager, _client):
        said = await asyncio.to_thread(allocations, "release", jobid_of(manager))
        assert "will end with the last of its kernels" in said.stdout
        assert job_state(jobid_of(manager)) == "RUNNING"


def test_jobs_of_other_kinds_are_not_touched(service, kernelspecs, cluster, tmp_path, monkeypatch):
    """The command line cancels what kernels run in, and nothing else, whatever id it is given."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    argv = ("sbatch", "--parsable", "-o/dev/null", "--wrap", "sleep 300")
    foreign = slurm(*argv, cluster=cluster).stdout.strip()
    said = allocations("cancel", foreign)
    assert said.returncode == 1
    assert "you have no allocation" in said.stderr
    assert job_state(foreign) in ("PENDING", "RUNNING")
    slurm("scancel", foreign, cluster=cluster)


def test_a_kernelspec_may_be_unreadable_and_the_list_still_works(service, kernelspecs, tmp_path, monkeypatch):
    """A broken record takes only itself out."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    directory = tmp_path / "gateway_slurm" / "registry"
    directory.mkdir(parents=True)
    (directory / "x-1-1.json").write_text("{")
    install_kernelspec(kernelspecs, "unused")
    assert "no allocations" in allocations().stdout
