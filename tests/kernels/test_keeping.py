"""Allocations that are kept, by request or by the command, and handed back: whatever becomes of their server."""

from __future__ import annotations

import asyncio
import json

import psutil
import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.errors import KernelStartError
from helpers.failing_starts import nothing_left, spec
from helpers.kernel_clients import (
    IPYKERNEL,
    READY,
    async_kernel,
    install_kernelspec,
    job_state,
    jobid_of,
    poll_async,
    running_kernel,
)
from helpers.private_slurm import jobs_of, poll, slurm
from helpers.server_processes import allocations, launcher_said, marks, noticed, on_record, server


@pytest.fixture(autouse=True)
def state(service, tmp_path, monkeypatch) -> None:
    """Records and marks of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def quick(admin_settings):
    """Servers that look at marks three times a second, and launchers that miss them after a second."""
    return admin_settings(heartbeat=0.3, orphan_timeout=1.0)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "in good order"])
def test_a_job_that_the_command_keeps_outlives_its_server(quick, cluster, how):
    """The server notices by itself; when it is gone the kernel ends, the job stays, and ``release`` ends it."""
    with server() as one:
        allocations("keep", one.jobid)
        assert noticed(one.jobid, keep=True)
        one.end(how)
    assert launcher_said(one.jobid, "the job is kept")
    assert poll(lambda: not psutil.pid_exists(one.kernel), timeout=READY)
    assert job_state(one.jobid) == "RUNNING"
    (row,) = json.loads(allocations("--json"))
    assert (row["jobid"], row["kept"], row["kernel_ids"]) == (one.jobid, True, [])
    assert f"job {one.jobid} is cancelled" in allocations("release", "--yes", one.jobid)
    assert marks() == set()
    assert nothing_left(cluster)


def test_a_server_that_ends_looks_at_the_marks_once_more(admin_settings, cluster):
    """A job that was marked in the last moment is kept, too."""
    admin_settings(heartbeat=60.0, orphan_timeout=1.0)
    with server() as one:
        allocations("keep", one.jobid)
        one.end("in good order")
    assert launcher_said(one.jobid, "the job is kept")
    assert job_state(one.jobid) == "RUNNING"
    allocations("release", one.jobid)
    assert nothing_left(cluster)


def test_a_job_kept_by_request_outlives_its_server_and_is_used_again(quick, cluster, kernelspecs):
    """The next server's kernel joins it by jobid, leaves it standing, and it ends when it is released."""
    with server(spec(kernelspecs, keep_allocation=True)) as one:
        assert marks() == {one.jobid}
        one.end("SIGKILL")
    assert launcher_said(one.jobid, "the job is kept")
    with running_kernel(spec(kernelspecs, jobid=one.jobid)) as (manager, _client):
        assert jobid_of(manager) == one.jobid
        (row,) = json.loads(allocations("--json"))
        assert row["kernel_ids"] == [manager.kernel_id]
    assert job_state(one.jobid) == "RUNNING"
    allocations("release", "--yes", one.jobid)
    assert nothing_left(cluster)


def test_a_released_job_without_its_server_ends_with_the_last_kernel(quick, cluster, kernelspecs):
    """Who uses what a dead server had kept ends it, once it is released."""
    with server(spec(kernelspecs, keep_allocation=True)) as one:
        one.end("SIGKILL")
    with running_kernel(spec(kernelspecs, jobid=one.jobid)):
        assert "will end with the last of its kernels" in allocations("release", one.jobid)
        assert job_state(one.jobid) == "RUNNING"
    assert nothing_left(cluster)


def test_a_release_gives_the_launcher_its_timeout_again(quick, cluster):
    """A job that was kept, and is not any more, ends as an orphan does."""
    with server() as one:
        allocations("keep", one.jobid)
        assert noticed(one.jobid, keep=True)
        allocations("release", one.jobid)
        assert noticed(one.jobid, keep=False)
        one.end("SIGKILL")
    assert nothing_left(cluster, timeout=READY)


async def test_release_wins_over_keep_allocation(service, kernelspecs, cluster):
    """The last word counts: a job that a request wanted kept ends with its last kernel when it is released."""
    install_kernelspec(kernelspecs, "keeper", config_overrides={"keep_allocation": True})
    async with async_kernel("keeper") as (manager, _client):
        jobid = jobid_of(manager)
        said = await asyncio.to_thread(allocations, "release", jobid)
        assert "will end with the last of its kernels" in said
        assert job_state(jobid) == "RUNNING"
    assert await poll_async(lambda: not jobs_of(cluster), timeout=READY)
    async with async_kernel("keeper") as (manager, _client):
        jobid = jobid_of(manager)
    assert job_state(jobid) == "RUNNING"
    assert "is cancelled" in await asyncio.to_thread(allocations, "release", jobid)
    assert await poll_async(lambda: not jobs_of(cluster), timeout=READY)


async def test_a_long_command_is_on_record_in_short(service, kernelspecs):
    """Records stay small enough to be read, however long a kernel's command is."""
    argv = [*IPYKERNEL, *["x" * 100_000] * 9]
    install_kernelspec(kernelspecs, "long", config_overrides={"kernel_argv": argv})
    async with async_kernel("long") as (manager, _client):
        (record,) = [record for _server, record in on_record()]
        assert record.kernel_ids == [manager.kernel_id]
        assert record.config["partition"] == "batch"
        assert len(json.dumps(record.config)) < 5000


async def test_a_mark_goes_when_the_job_is_over(service, kernelspecs, cluster):
    """The server that has the job removes it, so that a later job with that id is not kept."""
    install_kernelspec(kernelspecs, "keeper", config_overrides={"keep_allocation": True})
    async with async_kernel("keeper") as (manager, _client):
        jobid = jobid_of(manager)
        assert marks() == {jobid}
        slurm("scancel", jobid, cluster=cluster)
        assert await poll_async(lambda: not marks(), timeout=READY)


async def test_a_start_that_fails_keeps_nothing(service, kernelspecs, cluster):
    """``keep_allocation`` is for kernels that came up."""
    overrides = {"keep_allocation": True, "kernel_argv": ["false"]}
    install_kernelspec(kernelspecs, "keeper", config_overrides=overrides)
    with pytest.raises(KernelStartError):
        await AsyncKernelManager(kernel_name="keeper").start_kernel()
    assert await poll_async(lambda: not jobs_of(cluster), timeout=READY)
    assert marks() == set()


async def test_a_disk_that_takes_no_mark_still_keeps(service, kernelspecs, cluster, tmp_path, caplog):
    """The server remembers what it could not put on record, and says so."""
    registry = tmp_path / "state" / "gateway_slurm" / "registry"
    registry.mkdir(parents=True)
    (registry / "keep").touch()  # where the directory should be
    install_kernelspec(kernelspecs, "keeper", config_overrides={"keep_allocation": True})
    async with async_kernel("keeper") as (manager, _client):
        jobid = jobid_of(manager)
    assert job_state(jobid) == "RUNNING"
    assert "which jobs must be kept is not known" in caplog.text
    slurm("scancel", jobid, cluster=cluster)
    (registry / "keep").unlink()
