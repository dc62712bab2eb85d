"""A server has a job of ours again, or a step in one, although what it knew it by has changed or is gone."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from gateway_slurm.kernels.model import Phase
from helpers.dying_servers import adopt, call
from helpers.dying_servers import driven_server as deployed_server
from helpers.failing_starts import cut_links, nothing_left, spec
from helpers.kernel_clients import JOB, PID, READY, async_execute, async_kernel, job_state, jobid_of, poll_async
from helpers.private_slurm import slurm
from helpers.server_processes import launcher_said, on_record, server


@pytest.fixture
def state(service, tmp_path, monkeypatch) -> Path:
    """The directory of a store of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


async def test_a_job_that_its_user_renamed_is_the_same_one(state, admin_settings, cluster):
    """The next server process asks Slurm about it, and has its kernel again."""
    service = admin_settings(deployment="tests")
    with deployed_server() as first:
        known = await call(first, "start", name="slurm")
        assert await call(first, "execute", kernel_id=known["kernel_id"], code="x = 41") == "ok"
        slurm("scontrol", "update", f"JobId={known['jobid']}", "JobName=mine", cluster=cluster)
        launcher = psutil.Process(known["pid"]).parent()
        launcher.suspend()  # until Slurm has been asked
        first.signal(signal.SIGKILL)
    (restored,) = await service.run(service.restore())
    allocation = restored.handle.allocation
    assert await poll_async(lambda: allocation.info is not None or allocation.ended.done(), timeout=READY)
    launcher.resume()
    assert await poll_async(lambda: restored.handle.process.phase is Phase.RUNNING, timeout=READY)
    manager = adopt(restored, "slurm")
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=READY)
    assert await async_execute(client, "print(x + 1)") == "42"
    client.stop_channels()
    await manager.shutdown_kernel()
    assert await asyncio.to_thread(nothing_left, cluster)


async def test_a_kernel_whose_srun_was_killed_outlives_a_break_of_its_link(service, kernelspecs, cluster, monkeypatch):
    """Its step runs on without: it is over when Slurm says so."""
    said = slurm("salloc", "--no-shell", "-t5", cluster=cluster).stderr
    jobid = said.split("Granted job allocation ")[1].split()[0]
    async with async_kernel(spec(kernelspecs, jobid=jobid)) as (manager, client):
        await async_execute(client, "kept = 41")
        process, pid = manager.provisioner._handle.process, await async_execute(client, PID)
        children = psutil.Process().children(recursive=True)
        sruns = [one for one in children if f"--jobid={jobid}" in one.cmdline()]
        assert sruns
        for srun in sruns:
            srun.kill()
        assert await poll_async(lambda: not any(srun.is_running() for srun in sruns), timeout=READY)
        phases, enter = [], process._enter
        monkeypatch.setattr(process, "_enter", lambda phase: [enter(phase), phases.append(phase)])
        for times in (1, 2):
            assert await asyncio.to_thread(cut_links) == 1
            assert await poll_async(lambda times=times: len(phases) == 2 * times, timeout=READY)
        assert phases == [Phase.LOST, Phase.RUNNING] * 2
        await client.wait_for_ready(timeout=READY)
        assert await async_execute(client, "print(kept + 1)") == "42"
        psutil.Process(int(pid)).parent().kill()
        assert await poll_async(lambda: process.phase is Phase.DEAD, timeout=READY)
    assert await asyncio.to_thread(nothing_left, cluster)


async def test_a_job_of_ours_of_which_the_record_is_lost_is_adopted_by_its_jobid(
    state, admin_settings, kernelspecs, cluster
):
    """Its old launcher, which no server accepts again, ends its own kernel after a while, and not the new one's job."""
    admin_settings(orphan_timeout=1.0, heartbeat=0.3)
    with server() as one:
        launcher = psutil.Process(one.kernel).parent()
        launcher.suspend()  # until another step runs in the job
        one.end("SIGKILL")
    shutil.rmtree(state)
    async with async_kernel(spec(kernelspecs, jobid=one.jobid)) as (manager, client):
        assert await async_execute(client, JOB) == jobid_of(manager) == one.jobid
        assert [(record.jobid, record.ours) for _server, record in on_record()] == [(one.jobid, False)]
        launcher.resume()
        assert await poll_async(lambda: not psutil.pid_exists(one.kernel), timeout=READY)
        assert await asyncio.to_thread(launcher_said, one.jobid, "there is no server, but other steps run in the job")
        assert job_state(one.jobid) == "RUNNING"
        assert await async_execute(client, JOB) == one.jobid
    assert await asyncio.to_thread(nothing_left, cluster)
