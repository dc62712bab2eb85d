"""When Jupyter's restarter hears that a kernel died: as soon as the link says so, by whatever manager."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

import pytest
from jupyter_client.ioloop import AsyncIOLoopKernelManager, IOLoopKernelManager
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.web import HTTPError
from traitlets.config import Config

from gateway_slurm import SlurmMappingKernelManager
from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.kernels import held
from gateway_slurm.kernels.model import Phase
from helpers.failing_starts import nothing_left
from helpers.kernel_clients import READY, poll_async, process_of
from helpers.private_slurm import poll, slurm

SOON = 0.1  # seconds; the restarter's own time is 3


def times_of_ends(kernel):
    """When the service hears of the kernel's ends."""
    process, heard = process_of(kernel), []
    original = process.on_exit

    def on_exit(ended):
        heard.append(time.monotonic())
        original(ended)

    process.on_exit = on_exit
    return heard


async def started_by(manager_class, directory):
    """Start a kernel by a manager of this class: its own manager, and the coroutine that ends it."""
    if manager_class is AsyncIOLoopKernelManager:
        kernel = manager_class(kernel_name="slurm")
        await kernel.start_kernel()
        return kernel, kernel.shutdown_kernel
    managers = manager_class(root_dir=str(directory))
    kernel_id = await managers.start_kernel(kernel_name="slurm")
    kernel = managers._kernels[kernel_id]
    assert await poll_async(lambda: kernel_id in managers._kernel_ports, timeout=READY)
    return kernel, lambda: managers.shutdown_kernel(kernel_id)


MANAGERS = [AsyncIOLoopKernelManager, AsyncMappingKernelManager, SlurmMappingKernelManager]


@pytest.mark.parametrize("manager_class", MANAGERS)
async def test_the_restarter_knows_of_a_killed_kernel_at_once(service, cluster, tmp_path, manager_class):
    """From the link's word to the restart's beginning there is less than 0.1 s; each restart is one, in its job."""
    kernel, shut_down = await started_by(manager_class, tmp_path)
    heard, restarted, job = times_of_ends(kernel), [], kernel.provisioner.jobid
    kernel.add_restart_callback(lambda: restarted.append(time.monotonic()))
    for generation in (2, 3, 4):
        os.kill(process_of(kernel).pid, signal.SIGKILL)
        assert await poll_async(lambda expected=generation: is_back(kernel, expected), timeout=READY)
    assert min(told - said for said, told in zip(heard, restarted, strict=True)) < SOON
    assert kernel._restarter._restart_count == 3  # none of them was stable: its own rules go on
    assert kernel.provisioner.jobid == job
    await shut_down()
    assert len(restarted) == 3
    assert nothing_left(cluster)


def is_back(kernel, generation):
    """Whether the kernel was started so often, and its restarter watches it again."""
    process = process_of(kernel)
    there = process.generation == generation and process.phase is Phase.RUNNING
    return there and kernel.ready.done() and kernel._restarter._restarting and kernel._restarter._pcallback is not None


def test_the_restarter_of_the_blocking_manager_knows_at_once(service, cluster):
    """On the loop on which it looks, while that runs."""
    manager = IOLoopKernelManager(kernel_name="slurm")
    manager.start_kernel()
    loop = manager._restarter._pcallback.io_loop.asyncio_loop
    heard, restarted = times_of_ends(manager), []
    manager.add_restart_callback(lambda: restarted.append(time.monotonic()))
    for generation in (2, 3, 4):
        os.kill(process_of(manager).pid, signal.SIGKILL)
        # The first of its restarters looks on this loop, the later ones on that of a thread of jupyter_core's.
        back = poll_async(lambda expected=generation: is_back(manager, expected), timeout=READY)
        assert loop.run_until_complete(back)
    assert min(told - said for said, told in zip(heard, restarted, strict=True)) < SOON
    manager.shutdown_kernel()
    assert len(restarted) == 3
    assert nothing_left(cluster)


@pytest.mark.parametrize("now", [False, True], ids=["in good order", "now"])
async def test_an_end_that_was_asked_for_is_no_death(service, cluster, now):
    """Neither a restart nor a shutdown has the restarter start anything."""
    kernel = AsyncIOLoopKernelManager(kernel_name="slurm")
    await kernel.start_kernel()
    restarted = []
    kernel.add_restart_callback(lambda: restarted.append(1))
    heard = times_of_ends(kernel)
    await kernel.restart_kernel(now=now)
    process = process_of(kernel)
    await kernel.shutdown_kernel(now=now)
    assert len(heard) == 2
    assert (restarted, process.generation) == ([], 2)
    assert nothing_left(cluster)


def test_a_shutdown_of_a_dead_kernel_starts_none(service, cluster):
    """A blocking program whose loop has not run since the kernel died shuts it down: no restart comes first."""
    manager = IOLoopKernelManager(kernel_name="slurm")
    manager.start_kernel()
    process, restarted = process_of(manager), []
    manager.add_restart_callback(lambda: restarted.append(1))
    os.kill(process.pid, signal.SIGKILL)
    assert poll(lambda: process.phase is Phase.DEAD, timeout=READY)
    manager.shutdown_kernel()
    assert (restarted, process.generation) == ([], 1)
    assert nothing_left(cluster)


@pytest.mark.parametrize("manager_class", MANAGERS)
async def test_a_cancelled_job_is_a_death_and_no_restart(service, cluster, tmp_path, manager_class):
    """The restarter of any manager reports the death and restarts nothing, also if it had to restart before."""
    kernel, shut_down = await started_by(manager_class, tmp_path)
    restarted, dead, job = [], [], kernel.provisioner.jobid
    os.kill(process_of(kernel).pid, signal.SIGKILL)
    assert await poll_async(lambda: is_back(kernel, 2), timeout=READY)
    kernel.add_restart_callback(lambda: restarted.append(1))
    kernel.add_restart_callback(lambda: dead.append(time.monotonic()), "dead")
    heard = times_of_ends(kernel)
    slurm("scancel", job, cluster=cluster)
    assert await poll_async(lambda: dead, timeout=READY)
    assert dead[0] - heard[0] < SOON
    assert await kernel.provisioner.poll() is not None
    reason = await asyncio.wait_for(kernel.provisioner.until_over(), READY)
    assert f"job {job} ended: CANCELLED" in reason
    assert "start it again" in reason
    assert (restarted, kernel._restarter._pcallback) == ([], None)
    with contextlib.suppress(HTTPError):  # a plain server has removed the kernel
        await shut_down()
    await kernel.shutdown_kernel(now=True)
    assert nothing_left(cluster)


async def test_a_job_of_which_slurm_says_nothing_is_over_all_the_same(service, cluster, monkeypatch):
    """Slurm's word is waited for only so long; then the reason is what the launcher knew."""
    monkeypatch.setattr(held, "REASON_SECONDS", 0.1)
    kernel = AsyncIOLoopKernelManager(kernel_name="slurm")
    await kernel.start_kernel()
    driver = service.owners.of("")._driver
    driver.jobs = silent
    slurm("scancel", kernel.provisioner.jobid, cluster=cluster)
    reason = await asyncio.wait_for(kernel.provisioner.until_over(), READY)
    assert reason.startswith(f"Slurm is ending job {kernel.provisioner.jobid}; ")
    del driver.jobs
    await kernel.shutdown_kernel(now=True)
    assert nothing_left(cluster)


async def silent(_jobids):
    """A Slurm that does not answer."""
    raise SlurmUnavailable("the test wants no answer now")


async def test_a_kernel_without_a_restarter_is_dead_at_once_and_restartable(admin_settings, cluster, tmp_path):
    """With ``autorestart`` off it is shown dead, its place is kept for release_grace, and a restart by hand works."""
    service = admin_settings(release_grace=4.0)
    manager = SlurmMappingKernelManager(root_dir=str(tmp_path), config=Config(KernelManager={"autorestart": False}))
    kernel, shut_down = await started_by(lambda **_directory: manager, tmp_path)
    (kernel_id,) = manager.list_kernel_ids()
    job = kernel.provisioner.jobid
    for generation in (2, 3):
        os.kill(process_of(kernel).pid, signal.SIGSEGV)
        assert await poll_async(lambda: kernel.execution_state == "dead", timeout=READY, interval=0.01)
        assert "SIGSEGV" in kernel.reason
        assert f"job {job} is kept for 4 s" in kernel.reason
        assert process_of(kernel).phase is Phase.DEAD
        await manager.restart_kernel(kernel_id)
        assert (process_of(kernel).generation, kernel.execution_state) == (generation, "idle")
    os.kill(process_of(kernel).pid, signal.SIGSEGV)
    assert await poll_async(lambda: service.kernels.handles() == [], timeout=READY)
    assert await poll_async(lambda: "start it again" in kernel.reason, timeout=READY)
    with pytest.raises(HTTPError, match=r"was released.*start it again"):
        await manager.restart_kernel(kernel_id)
    assert kernel.execution_state == "dead"
    await shut_down()
    assert nothing_left(cluster)


async def test_a_server_is_told_of_a_cancelled_job_with_slurms_word_and_no_restart(service, cluster, tmp_path):
    """A manager that waits for the job's end shows the kernel dead, with the reason and what to do."""
    manager = SlurmMappingKernelManager(root_dir=str(tmp_path))
    kernel_id = await manager.start_kernel(kernel_name="slurm")
    kernel, states = manager._kernels[kernel_id], []
    kernel.add_restart_callback(lambda: states.append("restarting"))
    assert await poll_async(lambda: kernel.execution_state == "idle", timeout=READY)
    slurm("scancel", kernel.provisioner.jobid, cluster=cluster)
    assert await poll_async(lambda: kernel.execution_state == "dead", timeout=READY)
    assert "CANCELLED" in kernel.reason
    assert "start it again" in kernel.reason
    assert states == []
    await manager.shutdown_kernel(kernel_id)
    assert nothing_left(cluster)
