"""The drivers with a real Slurm: by Slurm's commands, over SSH and by REST."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
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
from gateway_slurm.slurm.driver import CommandLineDriver, SlurmDriver
from gateway_slurm.slurm.formats import Meaning, expand_hostlist
from gateway_slurm.slurm.model import JobSpec, StepSpec
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.slurm.watcher import JobWatcher
from gateway_slurm.testing import PrivateCluster
from helpers.daemons import slurm_token, start_daemon, stop_daemon
from helpers.driver_jobs import SLEEP, WITHIN, Jobs, failure, submitting, until
from helpers.login_node import LoginNode
from helpers.private_slurm import slurm
from helpers.rest_cluster import USER, cluster_with_rest, driver_for, write_token
from helpers.slurm_accesses import ACCESSES, COMMANDS, REST, SSH
from helpers.ssh_login import runner_for

BY_COMMANDS = pytest.mark.parametrize("access_name", [COMMANDS])
BY_EACH_RUNNER = pytest.mark.parametrize("access_name", [COMMANDS, SSH])


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    """A cluster with slurmrestd, in place of the session's."""
    with cluster_with_rest() as private:
        yield private


@pytest.fixture(params=ACCESSES)
def access_name(request: pytest.FixtureRequest) -> str:
    """The access to Slurm: each test runs by all of them, unless its decorator names some."""
    return str(request.param)


@pytest_asyncio.fixture
async def driver(
    access_name: str, cluster: PrivateCluster, node: LoginNode, tmp_path: Path
) -> AsyncIterator[SlurmDriver]:
    """The driver for the private cluster."""
    if access_name == COMMANDS:
        yield CommandLineDriver(Runner())
    elif access_name == SSH:
        async with runner_for(node, slurm_conf=str(cluster.slurm_conf), timeout=60) as runner:
            yield CommandLineDriver(runner)
    else:
        async with driver_for(cluster.rest_url, write_token(tmp_path / "token", slurm_token(cluster, USER))) as driver:
            yield driver


@pytest_asyncio.fixture
async def jobs(driver: SlurmDriver) -> AsyncIterator[Jobs]:
    """Jobs that do not outlive the test."""
    async with submitting(driver) as jobs:
        yield jobs


async def test_submit_and_describe(jobs: Jobs, driver: SlurmDriver) -> None:
    """Slurm makes the job as the spec asks, with odd characters in its name and comment."""
    name, comment = "a b'\"$(id)\n\x1f|x,:é", "c;\n;d"
    jobid = await jobs.running(name=name, comment=comment, nodes=2, gres=["gpu:1"], time=7)
    info = await driver.describe(jobid)
    assert (info.name, info.comment, info.time_limit) == (name, comment, 7)
    assert len(expand_hostlist(info.nodes)) == 2
    assert info.start_time is not None
    assert info.end_time == info.start_time + 7 * 60


@BY_EACH_RUNNER
async def test_times_are_by_this_hosts_clock(jobs: Jobs, driver: SlurmDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands on a host whose clock is an hour behind ours, or ahead, say when a job ends by our clock."""
    jobid = await jobs.running(time=7)
    for ahead in (3600, -3600):
        ours = time.time() + ahead
        with monkeypatch.context() as patch:
            patch.setattr("gateway_slurm.slurm.driver.time.time", lambda ours=ours: ours)
            info = await driver.describe(jobid)
        assert info.end_time is not None
        assert 300 < info.end_time - ours <= 420


async def test_environment_reaches_the_job(jobs: Jobs, access_name: str, tmp_path: Path) -> None:
    """The job gets the variables of its spec, and neither this process's locale nor its time format."""
    out = tmp_path / "env"
    jobid = await jobs.submit(f"#!/bin/sh\nenv >{out}\n", env={"TOKEN": "a b\nc", "X": "='\""})
    await jobs.reaches(jobid, Meaning.OVER)
    lines = out.read_text().splitlines()
    assert {"TOKEN=a b", "c", "X=='\""} <= set(lines)
    assert not [line for line in lines if line.startswith(("LC_ALL=", "SLURM_TIME_FORMAT="))]
    # slurmrestd passes no environment on: the driver sets what a login would. The commands pass this process's on.
    login = {"PATH", "HOME", "USER", "LOGNAME", "SHELL"} if access_name == REST else {"PATH", "HOME"}
    assert {line.partition("=")[0] for line in lines} >= login


@pytest.mark.parametrize(
    ("access_name", "spec", "words"),
    [
        (COMMANDS, {"partition": "nope"}, "invalid partition specified: nope"),
        (COMMANDS, {"reservation": "zz"}, "Requested reservation is invalid"),
        (COMMANDS, {"gres": ["foo:1"]}, "Invalid generic resource (gres) specification"),
        (COMMANDS, {"script": "no script"}, "This does not look like a batch script"),
        (COMMANDS, {"memory": "lots"}, "Invalid --mem specification"),
        (SSH, {"partition": "nope"}, "invalid partition specified: nope"),
        (SSH, {"reservation": "zz"}, "Requested reservation is invalid"),
        (REST, {"partition": "nope"}, "Invalid partition name specified"),
        (REST, {"reservation": "zz"}, "Requested reservation is invalid"),
    ],
)
async def test_refused_in_slurms_words(jobs: Jobs, spec: dict[str, object], words: str) -> None:
    """A job that Slurm refuses is an error at once, in Slurm's words."""
    error = await failure(jobs.submit(**spec))  # type: ignore[arg-type]
    assert isinstance(error, SubmitRefused)
    assert words in str(error)


@BY_EACH_RUNNER
async def test_one_squeue_for_many(jobs: Jobs, driver: CommandLineDriver) -> None:
    """One squeue asks for all jobs; the answer has no job that Slurm does not know."""
    first, second = await jobs.submit(), await jobs.submit()
    before = driver.runner.counts["squeue"]
    found = await driver.jobs([first, second, "99999999"])
    assert set(found) == {first, second}
    assert driver.runner.counts["squeue"] == before + 1
    assert await driver.jobs(["99999999"]) == {}
    assert await driver.jobs([]) == {}


@BY_EACH_RUNNER
async def test_ids_are_compared_whole(jobs: Jobs, driver: CommandLineDriver) -> None:
    """A job's id that begins with another's is not that other's."""
    jobid = await jobs.running()
    assert set(await driver.jobs([jobid, f"{jobid}0"])) == {jobid}
    assert await driver.jobs([f"{jobid}0"]) == {}
    assert await driver.steps(f"{jobid}0") == []


@pytest.mark.parametrize(("script", "code", "signal"), [("exit 3", 3, None), ("kill -9 $$", 0, 9), ("exit 0", 0, None)])
async def test_how_a_job_ended(jobs: Jobs, script: str, code: int, signal: int | None) -> None:
    """A finished job's exit code or signal is known without an accounting database."""
    jobid = await jobs.submit(f"#!/bin/sh\n{script}\n")
    info = await jobs.reaches(jobid, Meaning.OVER)
    assert (info.exit_code, info.exit_signal) == (code, signal)
    assert info.end_time is not None


async def test_jobs_are_found_by_their_comment(jobs: Jobs, driver: SlurmDriver) -> None:
    """The user's own jobs whose comment begins so and that are not over, whatever their names."""
    over = await jobs.submit("#!/bin/sh\n", comment="ours:1")
    lives, _other = await jobs.submit(comment="ours:2"), await jobs.submit(name="ours", comment="another")
    await jobs.reaches(over, Meaning.OVER)
    assert set(await driver.find("ours")) == {lives}


async def test_cancel(jobs: Jobs, driver: SlurmDriver, access_name: str, tmp_path: Path) -> None:
    """A running script gets SIGTERM before its job ends; a job that is over or unknown can be cancelled as well."""
    ready, out = tmp_path / "ready", tmp_path / "out"
    jobid = await jobs.submit(f"#!/bin/sh\ntrap 'echo bye >{out}; exit' TERM\ntouch {ready}\nsleep 300 & wait\n")

    async def is_ready() -> bool:
        return ready.exists()

    await until(is_ready, bool)
    await driver.cancel(jobid)
    info = await jobs.reaches(jobid, Meaning.OVER)
    assert info.state == "CANCELLED"
    assert out.read_text() == "bye\n"
    await driver.cancel(jobid)
    await driver.cancel("99999999")


async def test_describe_refuses_what_cannot_be_adopted(
    jobs: Jobs, driver: SlurmDriver, cluster: PrivateCluster
) -> None:
    """An array, its task and an unknown job are each refused with the reason."""
    argv = ["sbatch", "--parsable", "--array=1-2", "--wrap=sleep 300"]
    array = (await asyncio.to_thread(slurm, *argv, cluster=cluster)).stdout.strip()
    jobs.ids.append(array)
    for jobid in (array, f"{array}_1"):
        error = await failure(driver.describe(jobid))
        assert type(error) is AllocationError
        assert "cannot be adopted yet" in str(error)
    assert isinstance(await failure(driver.describe("99999999")), UnknownJob)


@BY_EACH_RUNNER
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


@BY_EACH_RUNNER
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


@BY_EACH_RUNNER
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


@BY_COMMANDS
async def test_hostnames_as_slurm_expands_them(jobs: Jobs, driver: CommandLineDriver) -> None:
    """The host list of a real allocation expands as scontrol expands it."""
    jobid = await jobs.running(nodes=3)
    nodes = (await driver.describe(jobid)).nodes
    theirs = await asyncio.to_thread(
        subprocess.run, ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    assert expand_hostlist(nodes) == theirs.stdout.split()


async def test_watcher_on_the_real_thing(jobs: Jobs, driver: SlurmDriver) -> None:
    """The watcher reports the states of a job, and a job that Slurm does not know."""
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


@pytest.mark.parametrize(
    "access_name", [COMMANDS, *(pytest.param(name, marks=pytest.mark.slow) for name in (SSH, REST))]
)
async def test_controller_down(cluster: PrivateCluster, driver: SlurmDriver, access_name: str, jobs: Jobs) -> None:
    """Without the controller each request fails as "unavailable"; the job is there when the controller is back."""
    jobid = await jobs.running()
    await asyncio.to_thread(stop_daemon, cluster, "slurmctld")
    try:
        asked: list[Awaitable[object]] = [
            driver.submit(JobSpec(name="t", script=SLEEP, comment="t:1")),
            driver.jobs([jobid]),
            driver.describe(jobid),
            driver.find("t"),
            driver.cancel(jobid),
        ]
        if access_name != REST:
            asked.append(driver.steps(jobid))
        errors = await asyncio.gather(*map(failure, asked))
        if access_name == COMMANDS:
            impatient = CommandLineDriver(Runner(timeout=1))
            assert type(await failure(impatient.jobs([jobid]))) is Unanswered
    finally:
        await asyncio.to_thread(start_daemon, cluster, "slurmctld")
    assert [type(error) for error in errors] == [SlurmUnavailable] * len(asked)
    assert (await jobs.reaches(jobid, Meaning.USABLE)).jobid == jobid
