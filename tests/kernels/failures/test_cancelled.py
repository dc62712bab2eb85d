"""Starts that are given up while they wait: for the queue, for sbatch, for the kernel."""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import psutil
import pytest
from jupyter_client import AsyncKernelManager, KernelManager
from jupyter_client.multikernelmanager import AsyncMultiKernelManager

from gateway_slurm.errors import QueueTimeout
from gateway_slurm.kernels.held import KernelHandle
from helpers.failing_starts import all_nodes_taken, jobs_of_ours, nothing_left, spec, start_error, wrapped_command
from helpers.kernel_clients import execute, poll_async, running_kernel
from helpers.private_slurm import jobs_of, poll, slurm

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


async def cancel(task):
    """Cancel a task and see that it is."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)


async def test_a_cancelled_manager_can_start_again(service, cluster):
    """After a cancelled start the same manager starts a kernel."""
    manager = AsyncKernelManager(kernel_name="slurm")
    with all_nodes_taken(cluster):
        task = asyncio.ensure_future(manager.start_kernel())
        assert await poll_async(lambda: jobs_of_ours(cluster), timeout=10)
        await cancel(task)
    await manager.start_kernel()
    assert await manager.is_alive()
    await manager.shutdown_kernel()


async def test_a_start_that_is_cancelled_during_sbatch_takes_its_job_along(admin_settings, cluster, tmp_path):
    """A job whose id is not yet known when the start is cancelled is cancelled as soon as it is."""
    mark = tmp_path / "asked"
    admin_settings(slurm_path=wrapped_command(tmp_path / "bin", "sbatch", f"touch {mark}; sleep 1"))
    before = all_jobs(cluster).keys()
    task = asyncio.ensure_future(AsyncKernelManager(kernel_name="slurm").start_kernel())
    assert await poll_async(mark.exists, timeout=10)
    await cancel(task)

    def made():
        return [state for jobid, state in all_jobs(cluster).items() if jobid not in before]

    assert await poll_async(made, timeout=10), "sbatch was not let finish"
    assert await poll_async(lambda: made() == ["CANCELLED"], timeout=10)
    assert nothing_left(cluster)


def all_jobs(cluster):
    """Each job that the controller still remembers, and its state."""
    argv = ["squeue", "--states=all", "--noheader", "--format=%i %T"]
    return dict(line.split() for line in slurm(*argv, cluster=cluster).stdout.splitlines())


@pytest.mark.parametrize("moment", [0.0, 0.3, 0.6, 0.9, 1.2])
async def test_a_start_may_be_cancelled_at_any_moment(service, cluster, moment):
    """Whenever a start is cancelled, in the end there is neither job nor process."""
    task = asyncio.ensure_future(AsyncKernelManager(kernel_name="slurm").start_kernel())
    await asyncio.wait([task], timeout=moment)
    if not task.done():
        await cancel(task)
        assert nothing_left(cluster, timeout=25)


async def test_a_start_that_is_cancelled_while_the_kernel_starts_ends_the_kernel(service, cluster, kernelspecs):
    """Cancelling a start whose kernel's process is there, but does not listen, leaves neither."""
    manager = AsyncKernelManager(kernel_name=spec(kernelspecs, kernel_argv=SLEEPER))
    task = asyncio.ensure_future(manager.start_kernel())
    assert await poll_async(lambda: sleepers(), timeout=20)
    await cancel(task)
    assert await poll_async(lambda: not sleepers(), timeout=10)
    assert nothing_left(cluster)


async def test_a_start_that_is_cancelled_in_its_last_moment_ends_the_kernel(service, cluster, monkeypatch):
    """Cancelling a start whose kernel runs already, while the manager takes it over, leaves nothing."""
    reached = threading.Event()

    async def never(_held):
        reached.set()
        await asyncio.sleep(600)

    monkeypatch.setattr(KernelHandle, "confirm", never)
    manager = AsyncKernelManager(kernel_name="slurm")
    task = asyncio.ensure_future(manager.start_kernel())
    assert await poll_async(reached.is_set, timeout=40)
    await cancel(task)
    assert manager.ready.done()
    assert not manager.has_kernel
    assert nothing_left(cluster, timeout=8)  # sooner than post_launch_timeout would end it


def sleepers():
    """Kernels of SLEEPER that run."""
    return [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:] == SLEEPER[1:]]


async def test_a_pending_kernel_of_a_server_can_be_given_up(service, cluster):
    """A multi-kernel manager that drops a pending start leaves no job."""
    with all_nodes_taken(cluster):
        managers = AsyncMultiKernelManager()
        managers.use_pending_kernels = True
        kernel_id = await managers.start_kernel(kernel_name="slurm")
        assert await poll_async(lambda: jobs_of_ours(cluster), timeout=10)
        managers._pending_kernels[kernel_id].cancel()
        assert await poll_async(lambda: not jobs_of_ours(cluster), timeout=10)
        await asyncio.wait_for(managers.shutdown_kernel(kernel_id), 10)
    assert nothing_left(cluster)


def test_a_job_that_waits_too_long_is_given_up(admin_settings, cluster):
    """After queue_timeout the start fails with Slurm's reason for the wait, and the job is cancelled."""
    admin_settings(queue_timeout=1.5, watch_interval=0.3)
    with all_nodes_taken(cluster) as other:
        error, seconds = start_error("slurm")
        assert poll(lambda: [line.split()[0] for line in jobs_of(cluster)] == [other], timeout=10)
    assert isinstance(error, QueueTimeout)
    assert "Resources" in str(error) or "Priority" in str(error)
    assert "SlurmService.queue_timeout" in str(error)
    assert 1.5 <= seconds < 5


def test_a_job_that_is_cancelled_in_the_queue_is_told(service, cluster):
    """scancel of a pending job by another process is a start error that says CANCELLED."""
    errors = []
    with all_nodes_taken(cluster):
        thread = threading.Thread(target=lambda: errors.append(start_error("slurm")))
        thread.start()
        assert poll(lambda: jobs_of_ours(cluster), timeout=10)
        slurm("scancel", *jobs_of_ours(cluster), cluster=cluster)
        thread.join(timeout=20)
    assert not thread.is_alive()
    assert "CANCELLED" in str(errors[0][0])


def test_a_job_that_waits_starts_when_there_is_room(service, cluster):
    """A start whose job is pending for a while succeeds as soon as the nodes are free."""
    with all_nodes_taken(cluster):
        manager = KernelManager(kernel_name="slurm")
        thread = threading.Thread(target=manager.start_kernel)
        thread.start()
        assert poll(lambda: jobs_of_ours(cluster), timeout=10)
        time.sleep(1.5)  # long enough to have been looked at
        assert thread.is_alive()
    thread.join(timeout=30)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    assert execute(client, "print(1)") == "1"
    client.stop_channels()
    manager.shutdown_kernel()


def test_a_process_that_was_given_up_while_waiting_leaves_room(service, cluster, kernelspecs):
    """The kernel after a start that failed works: nothing of the failure stays in the service."""
    start_error(spec(kernelspecs, directory="/no/such"))
    with running_kernel("slurm") as (_manager, client):
        assert execute(client, "print(1)") == "1"
