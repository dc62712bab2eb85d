"""Kernels, jobs, launchers and daemons that die: who hears of it, when, and what goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from jupyter_client import KernelManager

from gateway_slurm.errors import KernelStartError
from gateway_slurm.kernels.model import Phase
from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from helpers.daemons import kill_daemon, start_daemon
from helpers.failing_starts import nothing_left, python_script, script, spec
from helpers.kernel_clients import IPYKERNEL, PID, READY, execute, job_state, jobid_of, process_of, running_kernel
from helpers.private_slurm import poll, slurm


def kernel_process(manager):
    """The kernel's process: on this machine, which is every node."""
    return psutil.Process(process_of(manager).pid)


def launcher_process(manager):
    """The launcher that started the kernel."""
    return kernel_process(manager).parent()


def watch_end(manager):
    """Note when the service hears of the kernel's end; ``poll`` is asked in that moment."""
    process, heard = process_of(manager), []
    original = process.on_exit

    def on_exit(ended):
        heard.append((time.monotonic(), ended.returncode))
        original(ended)

    process.on_exit = on_exit
    return heard


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_kernel_is_known_at_once(service, kernel_name, number):
    """The end of a kernel, and how it ended, are in memory as soon as the link brings them."""
    with running_kernel(kernel_name) as (manager, _client):
        heard = watch_end(manager)
        kernel_process(manager).send_signal(number)
        assert poll(lambda: not manager.is_alive(), timeout=10, interval=0.005)
        known = time.monotonic()
        assert heard[0][1] == -number
        assert known - heard[0][0] < 0.1
        assert number.name in manager.provisioner.exit_reason


def test_a_kernel_that_exits_by_itself_tells_its_code(service, kernel_name):
    """``os._exit(7)`` in a cell is exit code 7."""
    with running_kernel(kernel_name) as (manager, client):
        client.execute("import os; os._exit(7)")
        assert poll(lambda: not manager.is_alive(), timeout=10)
        assert process_of(manager).returncode == 7
        assert manager.provisioner.exit_reason == "exit code 7"


def test_what_a_kernel_printed_last_is_known(service, kernel_name):
    """The last lines of a dead kernel's output are kept as the reason of its death."""
    code = "import os; os.write(2, b'out of memory, said the program\\n'); os._exit(1)"
    with running_kernel(kernel_name) as (manager, client):
        client.execute(code)
        assert poll(lambda: not manager.is_alive(), timeout=10)
        assert "out of memory, said the program" in process_of(manager).output_tail


def test_a_dead_kernel_is_restarted_in_its_job(service, kernel_name):
    """After kill -9 a restart finds the same job, and the client's channels work again."""
    with running_kernel(kernel_name) as (manager, client):
        job, pid = jobid_of(manager), execute(client, PID)
        kernel_process(manager).kill()
        assert poll(lambda: not manager.is_alive(), timeout=10)
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=READY)
        assert execute(client, PID) != pid
        assert jobid_of(manager) == job


def test_a_kernel_that_ignores_sigterm_ends_with_its_job(service, cluster, kernel_name):
    """scancel ends a kernel that ignores SIGTERM, too."""
    with running_kernel(kernel_name) as (manager, client):
        execute(client, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
        slurm("scancel", jobid_of(manager), cluster=cluster)
        assert poll(lambda: not manager.is_alive(), timeout=20)
        assert poll(lambda: "CANCELLED" in manager.provisioner.exit_reason, timeout=15)
    assert nothing_left(cluster)


WRAPPER = """#!/bin/sh
"{python}" -m ipykernel_launcher -f "$2"
echo the wrapper goes on
"""


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_no_kernel_outlives_its_launcher(service, cluster, kernelspecs, tmp_path, wrapped):
    """kill -9 of the launcher ends its kernels on the node, also behind a shell; Slurm says FAILED."""
    wrapper = script(tmp_path / "kernel.sh", WRAPPER.format(python=sys.executable))
    argv = [wrapper, "-f", "{connection_file}"] if wrapped else IPYKERNEL
    with running_kernel(spec(kernelspecs, kernel_argv=argv)) as (manager, client):
        kernel = psutil.Process(int(execute(client, PID)))
        directory = Path(os.readlink(f"/proc/{kernel.pid}/cwd"))
        assert directory.is_dir()
        launcher_process(manager).kill()
        assert poll(lambda: not kernel.is_running() or kernel.status() == "zombie", timeout=5)
        assert poll(lambda: not manager.is_alive(), timeout=20)
        assert "FAILED" in manager.provisioner.exit_reason
    assert nothing_left(cluster)


def test_a_stopped_launcher_is_not_a_dead_kernel(admin_settings, cluster):
    """A launcher that says nothing for three heartbeats is out of reach, not dead; it comes back."""
    admin_settings(heartbeat=0.3)
    with running_kernel("slurm") as (manager, client):
        execute(client, "kept = 11")
        launcher = launcher_process(manager)
        launcher.suspend()
        assert poll(lambda: process_of(manager).phase is Phase.LOST, timeout=10)
        assert manager.is_alive()
        launcher.resume()
        assert poll(lambda: process_of(manager).phase is Phase.RUNNING, timeout=20)
        assert execute(client, "print(kept)") == "11"


def test_a_kernel_lives_on_without_its_slurmd(service, cluster, kernel_name):
    """kill -9 of the node's slurmd is nothing to the kernel; it is stopped in good order afterwards."""
    with running_kernel(kernel_name) as (manager, client):
        node = process_of(manager).launcher.node
        kill_daemon(cluster, node)
        try:
            assert execute(client, "print('still here')") == "still here"
            assert manager.is_alive()
            assert process_of(manager).phase is Phase.RUNNING
        finally:
            start_daemon(cluster, node)
    assert poll(lambda: cluster.status().nodes.get(node) == "idle", timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_node_that_fails_for_slurm_only_keeps_its_kernel(admin_settings, kernelspecs, caplog):
    """NODE_FAIL does not kill what answers; when slurmd is back and ends the job, NODE_FAIL is the reason."""
    with tempfile.TemporaryDirectory(prefix="gst-", dir="/tmp") as base:
        lines = "SlurmdTimeout=5\nSlurmctldTimeout=10"
        with PrivateCluster(Path(base) / "n", nodes=1, extra_conf=lines) as private:
            admin_settings(slurm_conf=str(private.slurm_conf))
            with running_kernel("slurm") as (manager, client):
                state = ["squeue", "--states=all", "--noheader", "--format=%T", "--jobs", jobid_of(manager)]
                kill_daemon(private, "c1")
                assert poll(lambda: "NODE_FAIL" in slurm(*state, cluster=private).stdout, timeout=60)
                assert execute(client, "print('still here')") == "still here"
                assert manager.is_alive()
                start_daemon(private, "c1")
                assert poll(lambda: not manager.is_alive(), timeout=30)
                assert poll(lambda: "NODE_FAIL" in manager.provisioner.exit_reason, timeout=15)
                assert "NODE_FAIL" in caplog.text
            SlurmService.instance().close()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_time_limit_is_announced_and_told(admin_settings, cluster, kernelspecs, caplog):
    """Before the time limit there is a warning with the time left; after it the reason is TIMEOUT."""
    admin_settings(walltime_warnings=[0.75])
    with running_kernel(spec(kernelspecs, runtime=1)) as (manager, _client):
        job = jobid_of(manager)
        assert poll(lambda: "reaches its time limit in 4" in caplog.text, timeout=60)
        assert process_of(manager).walltime_end is not None
        assert manager.is_alive()
        assert job_state(job) == "RUNNING"
        assert poll(lambda: not manager.is_alive(), timeout=120)
        assert poll(lambda: "TIMEOUT" in manager.provisioner.exit_reason, timeout=30)
        assert re.search(rf"job {job}.*TIMEOUT", caplog.text)
    assert nothing_left(cluster)


def test_a_process_that_a_kernel_leaves_behind_ends_with_the_job(service, cluster, kernel_name):
    """What a cell started in a session of its own is gone when the kernel's job is over."""
    leave = "import subprocess as s; p = s.Popen(['sleep', '4711'], start_new_session=True); print(p.pid)"
    with running_kernel(kernel_name) as (_manager, client):
        left = psutil.Process(int(execute(client, leave)))
        assert left.is_running()
    assert poll(lambda: not left.is_running() or left.status() == "zombie", timeout=10)


def test_a_kernel_that_dies_in_the_moment_of_its_start_is_not_lost(service, cluster, kernelspecs, tmp_path):
    """A kernel that listens and dies at once is either a start error or a dead kernel, never a living one."""
    code = f"import subprocess as s, sys, time\np = s.Popen([{sys.executable!r}, *{IPYKERNEL[1:-1]!r}, sys.argv[1]])\n"
    wait = "import glob\nwhile p.poll() is None:\n    time.sleep(0.01)\n    if time.monotonic() > end: p.kill()\n"
    argv = [python_script(tmp_path / "k", code + "end = time.monotonic() + 1.0\n" + wait), "{connection_file}"]
    manager = KernelManager(kernel_name=spec(kernelspecs, kernel_argv=argv))
    with contextlib.suppress(KernelStartError):
        manager.start_kernel()
        assert poll(lambda: not manager.is_alive(), timeout=20)
        manager.shutdown_kernel()
    assert nothing_left(cluster)
