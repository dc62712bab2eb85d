"""Kernels that no client ends: the cases in which jupyter_client calls nothing, and processes that go."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
from jupyter_client import KernelManager
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from traitlets.config import Config

from gateway_slurm.errors import AllocationEnded
from helpers.failing_starts import all_nodes_taken, jobs_of_ours, nothing_left, spec
from helpers.kernel_clients import poll_async, running_kernel, write_admin_settings
from helpers.private_slurm import jobs_of, poll


def test_a_connection_file_that_cannot_be_written_takes_the_kernel_along(admin_settings, cluster, tmp_path):
    """The kernel runs, the manager fails after it and says nothing: soon there is neither kernel nor job."""
    admin_settings(post_launch_timeout=0.5)
    (tmp_path / "file").touch()
    manager = KernelManager(kernel_name="slurm", connection_file=str(tmp_path / "file" / "kernel.json"))
    with pytest.raises(OSError, match=r"kernel\.json"):
        manager.start_kernel()
    assert manager.ready.done()
    assert nothing_left(cluster, timeout=20)


def test_a_manager_that_fails_after_the_launch_takes_the_kernel_along(admin_settings, cluster):
    """A manager that raises between launch_kernel and post_launch leaves nothing."""
    admin_settings(post_launch_timeout=0.5)

    class Failing(KernelManager):
        def _reconcile_connection_info(self, info):
            raise RuntimeError("another extension")

    with pytest.raises(RuntimeError, match="extension"):
        Failing(kernel_name="slurm").start_kernel()
    assert nothing_left(cluster, timeout=20)


async def test_a_restarter_that_gives_up_leaves_no_job(admin_settings, cluster):
    """With restart_limit=0 a dead kernel is dropped without a word; after release_grace its job is over."""
    admin_settings(release_grace=0.5)
    config = Config()
    config.KernelRestarter.restart_limit = 0
    config.KernelRestarter.time_to_dead = 0.2
    manager = AsyncIOLoopKernelManager(kernel_name="slurm", config=config)
    dead = []
    await manager.start_kernel()
    manager.add_restart_callback(lambda: dead.append(1), "dead")
    psutil.Process(manager.provisioner._handle.process.pid).kill()
    assert await poll_async(lambda: dead, timeout=20)
    assert await poll_async(lambda: not jobs_of(cluster), timeout=20)
    manager.stop_restarter()
    assert nothing_left(cluster)


async def test_a_kernel_that_dies_again_and_again_leaves_no_job(admin_settings, cluster, kernelspecs):
    """A kernel that lives for a moment each time is restarted restart_limit times, in one job, then given up."""
    admin_settings(release_grace=1.0)
    code = "import os, sys, threading; threading.Timer(1.5, os._exit, [3]).start(); "
    code += "from ipykernel.kernelapp import launch_new_instance; launch_new_instance()"
    argv = [sys.executable, "-c", code, "-f", "{connection_file}"]
    config = Config()
    config.KernelRestarter.restart_limit = 2
    config.KernelRestarter.time_to_dead = 0.2
    config.KernelRestarter.stable_start_time = 60.0
    manager = AsyncIOLoopKernelManager(kernel_name=spec(kernelspecs, kernel_argv=argv), config=config)
    dead, restarts = [], []
    await manager.start_kernel()
    job = manager.provisioner.jobid
    manager.add_restart_callback(lambda: restarts.append(manager.provisioner.jobid))
    manager.add_restart_callback(lambda: dead.append(1), "dead")
    assert await poll_async(lambda: dead, timeout=40)
    assert restarts == [job, job]
    assert await poll_async(lambda: not jobs_of(cluster), timeout=20)
    manager.stop_restarter()
    assert nothing_left(cluster)


def test_a_place_that_was_given_up_is_not_taken_again_in_silence(admin_settings, cluster):
    """A restart after release_grace is an error that says what to do: a new job is not taken unasked."""
    admin_settings(release_grace=0.2)
    with running_kernel("slurm") as (manager, _client):
        psutil.Process(manager.provisioner._handle.process.pid).kill()
        assert poll(lambda: not jobs_of(cluster), timeout=20)
        with pytest.raises(AllocationEnded, match="start it again"):
            manager.restart_kernel(now=True)


# -- processes that go ----------------------------------------------------------------------------

START = """
    import os, signal, sys, threading
    from jupyter_client import KernelManager
    manager = KernelManager(kernel_name="slurm")
    manager.start_kernel()
    print(manager.provisioner._handle.process.pid, flush=True)
"""


def child(body, start=START):
    """A Python process that starts a kernel, tells its process id, and goes on with ``body``."""
    code = textwrap.dedent(start) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("body", "status"),
    [("", 0), ("sys.exit(4)", 4), ("raise ValueError('unhandled')", 1), ("del manager", 0)],
    ids=["end", "sys.exit", "exception", "forgotten"],
)
def test_a_process_that_ends_takes_its_kernels_along(service, cluster, body, status):
    """However a Python program ends, without a word to its manager: no kernel and no job are left."""
    process = child(body)
    kernel = int(process.stdout.readline())
    out, err = process.communicate(timeout=40)
    assert (process.returncode, out) == (status, ""), err
    assert poll(lambda: not psutil.pid_exists(kernel), timeout=10)
    assert nothing_left(cluster)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_killed_leaves_its_kernel_an_orphan_for_a_while(admin_settings, cluster, number):
    """A launcher that hears of no server for orphan_timeout ends its kernels and its job."""
    admin_settings(orphan_timeout=1.0)
    process = child("signal.pause()")
    kernel = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == -number
    assert poll(lambda: not psutil.pid_exists(kernel), timeout=30)
    assert nothing_left(cluster, timeout=30)


def test_a_process_that_ends_while_its_job_waits_takes_the_job_along(service, cluster):
    """A program that exits while its start is in the queue leaves no job there."""
    start = """
        import os, sys, threading, time
        from jupyter_client import KernelManager
        thread = threading.Thread(target=KernelManager(kernel_name="slurm").start_kernel, daemon=True)
        thread.start()
    """
    with all_nodes_taken(cluster):
        process = child("sys.stdin.readline()", start)
        try:
            assert poll(lambda: jobs_of_ours(cluster), timeout=20)
            process.stdin.write("\n")
            process.stdin.flush()
            process.wait(timeout=40)
            assert poll(lambda: not jobs_of_ours(cluster), timeout=10)
        finally:
            process.kill()
            process.communicate()


def test_settings_for_the_child_are_read_by_the_child(admin_settings, cluster):
    """The settings that these tests write reach a process of its own."""
    path = write_admin_settings(nosuch=1)
    process = child("")
    _out, err = process.communicate(timeout=40)
    assert f"{path}: there is no setting SlurmService.nosuch" in err
    path.unlink()
