"""The driver against a real Slurm."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gateway_slurm.errors import (
    AllocationError,
    LauncherFailed,
    SlurmUnavailable,
    SubmitRefused,
    Unanswered,
    UnknownJob,
)
from gateway_slurm.slurm.driver import CommandLineDriver
from gateway_slurm.slurm.formats import Meaning, expand_hostlist
from gateway_slurm.slurm.model import JobSpec, StepSpec
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.slurm.watcher import JobWatcher
from gateway_slurm.testing import PrivateCluster
from helpers.daemons import start_daemon, stop_daemon
from helpers.driver_jobs import SLEEP, WITHIN, Jobs, failure, submitting, until


@pytest.fixture
def driver(cluster: PrivateCluster) -> CommandLineDriver:
    """The driver on the private cluster."""
    return CommandLineDriver(Runner())


@pytest_asyncio.fixture
async def jobs(driver: CommandLineDriver) -> AsyncIterator[Jobs]:
    """Jobs that do not outlive the test."""
    async with submitting(driver) as jobs:
        yield jobs


async def test_submit_and_describe(jobs: Jobs, driver: CommandLineDriver) -> None:
    """What was asked for is what Slurm made, odd characters in name and comment included."""
    name, comment = "a b'\"$(id)\n\x1f|x,:é", "c;\n;d"
    jobid = await jobs.running(name=name, comment=comment, nodes=2, gres=["gpu:1"], time=7)
    info = await driver.describe(jobid)
    assert (info.name, info.comment, info.time_limit) == (name, comment, 7)
    assert len(expand_hostlist(info.nodes)) == 2
    assert info.start_time is not None
    assert info.end_time == info.start_time + 7 * 60


async def test_environment_reaches_the_job(jobs: Jobs, tmp_path: Path) -> None:
    """The job gets the variables of its spec, and neither our locale nor our time format."""
    out = tmp_path / "env"
    jobid = await jobs.submit(f"#!/bin/sh\nenv >{out}\n", env={"TOKEN": "a b\nc"})
    await jobs.reaches(jobid, Meaning.OVER)
    lines = out.read_text().splitlines()
    assert "TOKEN=a b" in lines
    assert not [line for line in lines if line.startswith(("LC_ALL=", "SLURM_TIME_FORMAT="))]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"partition": "nope"}, "invalid partition specified: nope"),
        ({"gres": ["foo:1"]}, "Invalid generic resource (gres) specification"),
        ({"reservation": "zz"}, "Requested reservation is invalid"),
        ({"script": "no script"}, "This does not look like a batch script"),
        ({"memory": "lots"}, "Invalid --mem specification"),
    ],
)
async def test_refused_in_slurms_words(jobs: Jobs, spec: dict[str, object], words: str) -> None:
    """A job that Slurm refuses is an error at once, in Slurm's words."""
    error = await failure(jobs.submit(**spec))  # type: ignore[arg-type]
    assert isinstance(error, SubmitRefused)
    assert words in str(error)


async def test_one_squeue_for_many(jobs: Jobs, driver: CommandLineDriver) -> None:
    """One call asks for all jobs, and a job that is not known is not in the answer."""
    first, second = await jobs.submit(), await jobs.submit()
    before = driver.runner.counts["squeue"]
    found = await driver.jobs([first, second, "99999999"])
    assert set(found) == {first, second}
    assert driver.runner.counts["squeue"] == before + 1
    assert await driver.jobs(["99999999"]) == {}
    assert await driver.jobs([]) == {}


async def test_ids_are_compared_whole(jobs: Jobs, driver: CommandLineDriver) -> None:
    """A job's id that begins with another's is not that other's."""
    jobid = await jobs.running()
    assert set(await driver.jobs([jobid, f"{jobid}0"])) == {jobid}
    assert await driver.jobs([f"{jobid}0"]) == {}
    assert await driver.steps(f"{jobid}0") == []


@pytest.mark.parametrize(("script", "code", "signal"), [("exit 3", 3, None), ("kill -9 $$", 0, 9), ("exit 0", 0, None)])
async def test_how_a_job_ended(jobs: Jobs, script: str, code: int, signal: int | None) -> None:
    """A finished job's exit code or signal is known without any accounting database."""
    jobid = await jobs.submit(f"#!/bin/sh\n{script}\n")
    info = await jobs.reaches(jobid, Meaning.OVER)
    assert (info.exit_code, info.exit_signal) == (code, signal)
    assert info.end_time is not None


async def test_cancel(jobs: Jobs, driver: CommandLineDriver) -> None:
    """Cancelling ends a job, and is fine for one that is over and for one that never was."""
    jobid = await jobs.running()
    await driver.cancel(jobid)
    info = await jobs.reaches(jobid, Meaning.OVER)
    assert info.state.startswith("CANCELLED")
    await driver.cancel(jobid)
    await driver.cancel("99999999")


async def test_describe_refuses_what_cannot_be_adopted(jobs: Jobs, driver: CommandLineDriver) -> None:
    """An array, its task, a heterogeneous job and an unknown one are each refused with the reason."""
    array = await jobs.submit(extra=["--array=1-2"])
    for jobid in (array, f"{array}_1"):
        error = await failure(driver.describe(jobid))
        assert type(error) is AllocationError
        assert "cannot be adopted yet" in str(error)
    assert isinstance(await failure(driver.describe("99999999")), UnknownJob)


async def test_step(jobs: Jobs, driver: CommandLineDriver, tmp_path: Path) -> None:
    """A step runs beside the others, on the node asked for, with its environment and a large script."""
    jobid = await jobs.running(nodes=2)
    node = expand_hostlist((await driver.describe(jobid)).nodes)[1]
    out = tmp_path / "out"
    large = f"cat <<'E' | wc -c\n{'y' * 99_999}\nE\n"
    script = f"#!/bin/sh\n# {'x' * 200_000}\necho $SLURMD_NODENAME $FOO $({large}) >{out}\n"
    step = await driver.start_step(StepSpec(jobid=jobid, name="s", script=script, node=node, env={"FOO": "bar"}))
    await asyncio.wait_for(step.wait(), WITHIN)
    assert out.read_text() == f"{node} bar 100000\n"


async def test_steps_are_listed_until_killed(jobs: Jobs, driver: CommandLineDriver) -> None:
    """A running step is listed beside the batch step; killed, it is gone, and the job is not."""
    jobid = await jobs.running()
    step = await driver.start_step(StepSpec(jobid=jobid, name="our step", script="exec sleep 300\n"))
    listed = await until(lambda: driver.steps(jobid), lambda steps: len(steps) == 2)
    assert {info.number for info in listed} == {"batch", "0"}
    assert {info.name for info in listed} == {"batch", "our step"}
    step.kill()
    assert isinstance(await failure(asyncio.wait_for(step.wait(), WITHIN)), AllocationError)
    await until(lambda: driver.steps(jobid), lambda steps: [info.number for info in steps] == ["batch"])
    assert (await driver.describe(jobid)).meaning is Meaning.USABLE


async def test_step_failures(jobs: Jobs, driver: CommandLineDriver) -> None:
    """A step in an unknown job, on a foreign node, or whose program fails is an error of its own kind."""
    jobid = await jobs.running()
    taken = expand_hostlist((await driver.describe(jobid)).nodes)
    free = next(node for node in ("c1", "c2", "c3", "c4") if node not in taken)
    for spec, kind in (
        (StepSpec(jobid="99999999", name="s", script="true\n"), UnknownJob),
        (StepSpec(jobid=jobid, name="s", script="true\n", node=free), AllocationError),
        (StepSpec(jobid=jobid, name="s", script="exit 127\n"), LauncherFailed),
    ):
        step = await driver.start_step(spec)
        assert type(await failure(asyncio.wait_for(step.wait(), WITHIN))) is kind


async def test_hostnames_as_slurm_expands_them(jobs: Jobs, driver: CommandLineDriver) -> None:
    """The host list of a real allocation expands as scontrol expands it."""
    jobid = await jobs.running(nodes=3)
    nodes = (await driver.describe(jobid)).nodes
    theirs = await asyncio.to_thread(
        subprocess.run, ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    assert expand_hostlist(nodes) == theirs.stdout.split()


async def test_watcher_on_the_real_thing(jobs: Jobs, driver: CommandLineDriver) -> None:
    """The watcher tells of a job's life and of a job that Slurm does not know."""
    watcher = JobWatcher(driver, interval=(0.05, 0.2))
    seen: list[Meaning] = []
    missing: list[object] = []
    jobid = await jobs.submit()
    watcher.watch(jobid, lambda info: seen.append(info.meaning if info else Meaning.UNKNOWN))
    watcher.watch("99999999", missing.append)
    try:
        await jobs.reaches(jobid, Meaning.USABLE)
        await driver.cancel(jobid)

        async def heard() -> bool:
            return Meaning.OVER in seen and bool(missing)

        await until(heard, bool)
    finally:
        await watcher.close()
    assert Meaning.UNKNOWN not in seen
    assert missing[0] is None


async def test_controller_down(cluster: PrivateCluster, driver: CommandLineDriver, jobs: Jobs) -> None:
    """With the controller down every question is "unavailable", and the job is there when it is back."""
    jobid = await jobs.running()
    await asyncio.to_thread(stop_daemon, cluster, "slurmctld")
    try:
        impatient = CommandLineDriver(Runner(timeout=1))
        asked = [
            driver.submit(JobSpec(name="t", script=SLEEP)),
            driver.jobs([jobid]),
            driver.describe(jobid),
            driver.cancel(jobid),
            driver.steps(jobid),
            impatient.jobs([jobid]),
        ]
        errors = await asyncio.gather(*(failure(one) for one in asked))
    finally:
        await asyncio.to_thread(start_daemon, cluster, "slurmctld")
    assert [type(error) for error in errors] == [SlurmUnavailable] * 5 + [Unanswered]
    assert (await jobs.reaches(jobid, Meaning.USABLE)).jobid == jobid
