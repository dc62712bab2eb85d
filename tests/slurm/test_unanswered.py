"""An sbatch that gives no answer may have made a job: it is found, or on record until it is known to be none."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
from pathlib import Path

import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.allocations import manager, release
from gateway_slurm.allocations.recovery import recover
from gateway_slurm.errors import SubmitRefused, Unanswered
from gateway_slurm.slurm.driver import CommandLineDriver
from gateway_slurm.slurm.model import JobSpec
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.store import Registry
from helpers.failing_starts import jobs_of_ours, nothing_left, on_loop, script, spec
from helpers.kernel_clients import JOB, READY, async_execute, async_kernel, forget_service, jobid_of, poll_async
from helpers.private_slurm import jobs_of
from helpers.server_processes import on_record

TIMED_OUT = "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1"


@pytest.fixture(autouse=True)
def state(service, tmp_path, monkeypatch) -> None:
    """A store of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def an_sbatch(directory: Path, lines: str) -> str:
    """A ``slurm_path`` with these shell lines as its sbatch, in which ``submit`` is Slurm's own one."""
    directory.mkdir(exist_ok=True)
    path = os.environ["PATH"]
    script(
        directory / "sbatch",
        f'#!/bin/bash\nPATH={shlex.quote(path)}\nargv=("$@")\nsubmit() {{ sbatch "${{argv[@]}}"; }}\n{lines}\n',
    )
    return f"{directory}:{path}"


async def test_a_job_whose_sbatch_was_timed_out_is_the_kernels(admin_settings, cluster, tmp_path):
    """Slurm made it, and could not say so in time: it is found by its comment."""
    service = admin_settings(slurm_path=an_sbatch(tmp_path / "bin", f"submit >/dev/null; {TIMED_OUT}"))
    async with async_kernel("slurm") as (manager, client):
        assert jobs_of_ours(cluster) == [jobid_of(manager)]
        assert await async_execute(client, JOB) == jobid_of(manager)
        assert service.runner.counts["sbatch"] == 1
    assert await asyncio.to_thread(nothing_left, cluster)


@pytest.mark.parametrize("after", ["sleep 600", "echo thank you", "kill -9 $$"])
async def test_a_job_is_found_however_its_sbatch_ended(cluster, tmp_path, after):
    """Killed after a while, by another process, or with words that are no id."""
    path = an_sbatch(tmp_path / "bin", f"submit >/dev/null\n{after}")
    driver = CommandLineDriver(Runner(search_path=path, timeout=3))
    jobid = await driver.submit(JobSpec(name="found", comment=f"mine {after}", script="#!/bin/sh\nsleep 300\n"))
    try:
        assert (await driver.describe(jobid)).comment == f"mine {after}"
    finally:
        await driver.cancel(jobid)


async def test_a_job_that_comes_after_its_start_has_failed_is_cancelled(admin_settings, cluster, tmp_path, monkeypatch):
    """It stays on record until then."""
    monkeypatch.setattr(release, "LATE_JOB_RETRY_DELAY", 0.2)
    late = tmp_path / "late"
    lines = f"script=$(cat); (until test -e {late}; do sleep 0.1; done; submit <<<$script) </dev/null >/dev/null 2>&1 &"
    lines = lines.replace("<<<$script", '<<<"$script"')
    admin_settings(slurm_path=an_sbatch(tmp_path / "bin", f"set -m\n{lines}\n{TIMED_OUT}"))
    with pytest.raises(Unanswered, match="Socket timed out"):
        await AsyncKernelManager(kernel_name="slurm").start_kernel()
    assert [(record.jobid, record.ours) for _server, record in on_record()] == [(None, True)]
    late.touch()
    assert await poll_async(lambda: not on_record(), timeout=READY)
    assert await asyncio.to_thread(nothing_left, cluster)


async def test_a_start_that_is_cancelled_twice_takes_its_job_with_it(admin_settings, cluster, tmp_path):
    """Its sbatch is not killed, which would leave a job that no server knows."""
    go = tmp_path / "go"
    slow = f"id=$(submit); until test -e {go}; do sleep 0.1; done; echo $id"
    service = admin_settings(slurm_path=an_sbatch(tmp_path / "bin", slow))
    start = asyncio.ensure_future(AsyncKernelManager(kernel_name="slurm").start_kernel())
    assert await poll_async(lambda: jobs_of_ours(cluster), timeout=READY)
    for _time in range(3):
        await asyncio.to_thread(on_loop, lambda: [one.cancel() for one in service.kernels._starting])
    go.touch()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert await asyncio.to_thread(nothing_left, cluster)


async def test_a_submission_that_the_servers_end_cuts_off_is_on_record(
    admin_settings, cluster, tmp_path, monkeypatch, caplog
):
    """The next server finds its job, and cancels it."""
    monkeypatch.setattr(manager, "SUBMIT_TIMEOUT", 0.5)
    admin_settings(slurm_path=an_sbatch(tmp_path / "bin", "submit >/dev/null; sleep 600"))
    start = asyncio.ensure_future(AsyncKernelManager(kernel_name="slurm").start_kernel())
    assert await poll_async(lambda: jobs_of_ours(cluster), timeout=READY)
    await asyncio.to_thread(forget_service)
    await asyncio.wait({start}, timeout=READY)
    assert start.done()
    assert [record.jobid for _server, record in on_record()] == [None]
    with contextlib.closing(Registry.default()) as registry:
        assert await recover(registry, CommandLineDriver(Runner()), logging.getLogger("test")) != []
    assert not on_record()
    assert await asyncio.to_thread(nothing_left, cluster)


async def test_starts_that_may_share_and_come_together_share_one_job(service, kernelspecs, cluster):
    """None of them is waiting when the first one submits."""
    spec(kernelspecs, share=True)
    managers = [AsyncKernelManager(kernel_name="asked") for _ in range(4)]
    await asyncio.gather(*(manager.start_kernel() for manager in managers))
    assert service.runner.counts["sbatch"] == 1
    assert len({jobid_of(manager) for manager in managers}) == 1
    await asyncio.gather(*(manager.shutdown_kernel(now=True) for manager in managers))
    assert await asyncio.to_thread(nothing_left, cluster)


async def test_starts_that_may_share_each_hear_that_their_job_is_refused(service, kernelspecs, cluster):
    """A submission that fails delays no other."""
    spec(kernelspecs, share=True, partition="nope")
    starts = (AsyncKernelManager(kernel_name="asked").start_kernel() for _ in range(3))
    errors = await asyncio.wait_for(asyncio.gather(*starts, return_exceptions=True), READY)
    assert [type(error) for error in errors] == [SubmitRefused] * 3
    assert jobs_of(cluster) == []
