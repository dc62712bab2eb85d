"""The driver for Slurm's REST interface, with a real slurmrestd, compared with the reports of Slurm's commands.

test_driver.py has what is common to all drivers.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from gateway_slurm.errors import SlurmUnavailable, SubmitRefused, UnknownJob
from gateway_slurm.slurm.driver import CommandLineDriver
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import JobSpec
from gateway_slurm.slurm.rest.driver import MAX_SINGLE_REQUESTS, RestDriver
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.testing import PrivateCluster
from helpers import rest_cluster
from helpers.daemons import kill_daemon, slurm_token
from helpers.driver_jobs import SLEEP, Jobs, failure, submitting
from helpers.slurm_versions import slurm_says


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    """In place of the session's cluster: one with slurmrestd."""
    with rest_cluster.cluster_by_rest() as private:
        yield private


@pytest.fixture
def token_file(cluster: PrivateCluster, tmp_path: Path) -> Path:
    """A token of the user's that is good for all of the test."""
    return rest_cluster.write_token(tmp_path / "token", slurm_token(cluster, rest_cluster.USER))


@pytest_asyncio.fixture
async def driver(cluster: PrivateCluster, token_file: Path) -> AsyncIterator[RestDriver]:
    """The driver on the private cluster."""
    async with rest_cluster.driver_for(cluster.rest_url, token_file) as driver:
        yield driver


@pytest.fixture
def by_commands(cluster: PrivateCluster) -> CommandLineDriver:
    """What Slurm's commands say of the same cluster."""
    return CommandLineDriver(Runner(slurm_conf=str(cluster.slurm_conf)))


@pytest_asyncio.fixture
async def jobs(driver: RestDriver) -> AsyncIterator[Jobs]:
    """Jobs that do not outlive the test."""
    async with submitting(driver) as jobs:
        yield jobs


@pytest.mark.parametrize(
    ("spec", "meaning"),
    [
        ({}, Meaning.USABLE),
        (
            {"nodes": 2, "gres": ["gpu:1"], "comment": "c;\n;d", "name": "a b'\"\nx,é", "time": "0-00:07"},
            Meaning.USABLE,
        ),
        ({"nodelist": "c3", "memory": "1G", "cpus": 2, "partition": "devel"}, Meaning.USABLE),
        ({"script": "#!/bin/sh\nexit 3\n"}, Meaning.OVER),
        ({"script": "#!/bin/sh\nkill -9 $$\n"}, Meaning.OVER),
        ({"time": "UNLIMITED"}, Meaning.WAITING),
    ],
)
async def test_it_says_what_squeue_says(
    jobs: Jobs, driver: RestDriver, by_commands: CommandLineDriver, spec: dict[str, object], meaning: Meaning
) -> None:
    """Of a job that runs, waits or is over, each field is the same by either way.

    One that can only wait is answered with an error beside its id, and is a job all the same.
    """
    jobid = await jobs.submit(**spec)  # type: ignore[arg-type]
    await jobs.reaches(jobid, meaning)
    said, squeues = await asyncio.gather(driver.describe(jobid), by_commands.describe(jobid))
    # squeue of newer releases adds which signal it was: RaisedSignal:9(Killed). REST's answers have no clock.
    assert replace(said, reason="") == replace(squeues, reason="", clock=None)
    assert squeues.reason.partition(":")[0] == said.reason.partition(":")[0]
    assert said.user == rest_cluster.USER


async def test_a_job_with_more_nodes_than_there_are(jobs: Jobs) -> None:
    """Some releases of Slurm let it wait without a limit, with an error beside its id; others refuse it."""
    if slurm_says("a job with more nodes than there are") == "refused":
        assert isinstance(await failure(jobs.submit(nodes=99)), SubmitRefused)
    else:
        await jobs.reaches(await jobs.submit(nodes=99), Meaning.WAITING)


async def test_what_is_asked_for_reaches_slurm(jobs: Jobs, cluster: PrivateCluster) -> None:
    """As scontrol shows it: not requeued after a node's failure, its nodes, memory, GPUs, time."""
    jobid = await jobs.submit(nodes=2, gres=["gpu:1"], memory="300M", cpus=2, time=7, signal_seconds=60)
    await jobs.reaches(jobid, Meaning.USABLE)
    argv = ["scontrol", "--oneliner", "show", "job", jobid]
    env = {"PATH": "/usr/bin:/bin", **cluster.environment()}
    shown = await asyncio.to_thread(subprocess.run, argv, env=env, check=True, capture_output=True, text=True)
    said = dict(item.partition("=")[::2] for item in shown.stdout.split())
    wanted = {
        "Requeue": "0",
        "NumNodes": "2",
        "NumTasks": "2",
        "CPUs/Task": "2",
        "MinMemoryNode": "300M",
        "TimeLimit": "00:07:00",
        "StdOut": "/dev/null",
        "WorkDir": "/",
        "TresPerNode": slurm_says("scontrol's TresPerNode of one GPU"),
    }
    assert {name: said.get(name) for name in wanted} == wanted


async def test_a_few_are_asked_about_one_by_one_and_many_by_one_list(jobs: Jobs, driver: RestDriver) -> None:
    """A job that is not known is not in the answer; of none nothing is asked."""
    first, second = await jobs.submit(), await jobs.submit()
    counts = driver.rest.client.counts
    assert await driver.jobs([]) == {}
    assert counts["slurmrestd GET job"] == 0
    assert set(await driver.jobs([first, second, "99999999"])) == {first, second}
    assert (counts["slurmrestd GET job"], counts["slurmrestd GET jobs"]) == (3, 0)
    many = [first, second, *(str(number) for number in range(99_999_000, 99_999_000 + MAX_SINGLE_REQUESTS))]
    assert set(await driver.jobs(many)) == {first, second}
    assert (counts["slurmrestd GET job"], counts["slurmrestd GET jobs"]) == (3, 1)
    assert await driver.jobs(["99999999"]) == {}
    assert isinstance(await failure(driver.describe("99999999")), UnknownJob)


async def test_an_answer_that_is_lost_costs_no_job(jobs: Jobs, cluster: PrivateCluster, token_file: Path) -> None:
    """A job whose submission's answer was lost is found by its comment, and is there once."""
    port = int(cluster.rest_url.rpartition(":")[2])
    lost: list[bytes] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                if source is far_reader and submitting:
                    lost.append(data)
                    break
                sink.write(data)
                await sink.drain()

        head = await reader.readuntil(b"\r\n\r\n")
        submitting = head.startswith(b"POST")
        far_writer.write(head)
        up = asyncio.ensure_future(pump(reader, far_writer))
        try:
            await pump(far_reader, writer)
        finally:
            up.cancel()
            far_writer.close()
            writer.close()

    proxy = await asyncio.start_server(forward, "127.0.0.1", 0)
    url = f"rest+http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    try:
        async with rest_cluster.driver_for(url, token_file) as driver:
            spec = JobSpec(name="lost", comment="lost:1", script=SLEEP, time=5)
            jobid = await driver.submit(spec)
            jobs.ids.append(jobid)
            assert len(lost) == 1
            assert set(await driver.find("lost")) == {jobid}
    finally:
        proxy.close()


async def test_a_slow_slurmrestd_is_unavailable(cluster: PrivateCluster, token_file: Path) -> None:
    """One that is stopped says nothing about any job; when it goes on, it answers again."""
    async with rest_cluster.driver_for(cluster.rest_url, token_file, timeout=1) as impatient:
        assert await impatient.jobs(["99999999"]) == {}
        kill_daemon(cluster, "slurmrestd", signal.SIGSTOP)
        try:
            error = await failure(impatient.jobs(["99999999"]))
        finally:
            kill_daemon(cluster, "slurmrestd", signal.SIGCONT)
        assert isinstance(error, SlurmUnavailable)
        assert "within 1 s" in str(error)
        assert await impatient.jobs(["99999999"]) == {}
