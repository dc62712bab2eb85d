"""Kernels by each access to Slurm: Slurm's commands here, a login node over SSH, slurmrestd.

test_life.py has more of a kernel's life by Slurm's commands; test_rest.py and sites/test_ssh_kernels.py have what is
special to the other accesses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.errors import AllocationError, SubmitRefused
from gateway_slurm.testing import PrivateCluster
from helpers.failing_starts import all_nodes_taken, jobs_of_ours, nothing_left
from helpers.kernel_clients import (
    IPYKERNEL,
    JOB,
    PID,
    READY,
    async_execute,
    async_kernel,
    async_until_reply,
    commands_run,
    install_kernelspec,
    jobid_of,
    poll_async,
    running_kernel,
    until_printed,
)
from helpers.private_slurm import jobs_of, poll, slurm, state_of, steps_of
from helpers.rest_cluster import cluster_with_rest
from helpers.slurm_accesses import COMMANDS, EACH_ACCESS_AND_MODE, REST, SSH

LOGS = ".local/state/gateway_slurm"
NODE = "import os; print(os.environ['SLURMD_NODENAME'])"
GPUS = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'none'))"
# Run with stop_on_error=False: else ipykernel aborts what comes too soon after the interrupted cell.
LONG = "import time\nprint('begun', flush=True)\nwhile True: time.sleep(0.05)"
# The commands that a server may run during a kernel's life; with REST only the one that prints tokens.
MAY_RUN = {
    COMMANDS: {"sbatch", "squeue", "scancel"},
    SSH: {"sbatch", "squeue", "scancel"},
    REST: {sys.executable},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    """A cluster with slurmrestd, in place of the session's."""
    with cluster_with_rest() as private:
        yield private


async def test_a_kernels_life(access, cluster, kernel_name):
    """Start, execute, interrupt, restart, shut down; a restart asks Slurm nothing, and in the end nothing is left.

    The job has the notebook's name, without what a shell or a terminal would act on.
    """
    service = access.service()
    session = {**os.environ, "JPY_SESSION_NAME": "work/-Übung 3$(id)\n.ipynb"}
    async with async_kernel(kernel_name, env=session) as (manager, client):
        jobid = jobid_of(manager)
        assert f"{jobid} RUNNING Übung_3__id__.ipynb" in jobs_of(cluster)
        assert await async_execute(client, JOB) == jobid
        assert state_of(cluster, jobid) == "RUNNING"
        pid = await async_execute(client, PID)
        assert await async_execute(client, "x = 6; print(x * 7)") == "42"
        msg_id = client.execute(LONG, stop_on_error=False)
        await until_printed(client, "begun")
        await manager.interrupt_kernel()
        assert (await async_until_reply(client, msg_id))["content"]["ename"] == "KeyboardInterrupt"
        assert await async_execute(client, "print(x)") == "6"
        before = commands_run(service)
        await manager.restart_kernel()
        await client.wait_for_ready(timeout=READY)
        assert await async_execute(client, PID) != pid
        assert await async_execute(client, "print('x' in globals())") == "False"
        assert jobid_of(manager) == jobid
        assert commands_run(service) == before
        if access.name == SSH:
            assert service.access.relay.was_used
        await manager.shutdown_kernel()
    assert await poll_async(lambda: state_of(cluster, jobid) == "", timeout=15)
    assert nothing_left(cluster)
    assert {name for name in service.runner.counts if not name.startswith("slurmrestd")} <= MAY_RUN[access.name]


def logs(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``jupyter slurm logs …`` as its user runs it."""
    argv = [sys.executable, "-m", "gateway_slurm.cli.app", "logs", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=READY, check=False)


def follow(kernel: str, file: Path) -> None:
    """``jupyter slurm logs --follow`` prints what is added to the log, until Ctrl-C."""
    argv = [sys.executable, "-m", "gateway_slurm.cli.app", "logs", "--follow", kernel]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "said before\n" in iter(process.stdout.readline, "")
        with file.open("a") as log:
            log.write("\x1b[2Jadded\n")
        assert "\\x1b[2Jadded\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130


async def test_a_kernels_logs_are_found_by_its_notebook_and_empty_ones_are_removed(access, cluster, kernelspecs):
    """What the kernel prints outside its cells is listed and shown; a kernel that prints nothing leaves no file."""
    access.service()
    environment = {"env": {"IPYTHONDIR": str(kernelspecs.parent / "ipython-on-node")}}
    says = ["/bin/sh", "-c", 'echo "said before"; exec "$0" "$@"', *IPYKERNEL]
    install_kernelspec(kernelspecs, "saying", config_overrides={"kernel_argv": says}, spec_overrides=environment)
    silent = ["/bin/sh", "-c", 'exec "$0" "$@" >/dev/null 2>&1', *IPYKERNEL]
    install_kernelspec(kernelspecs, "silent", config_overrides={"kernel_argv": silent}, spec_overrides=environment)
    session = {**os.environ, "JPY_SESSION_NAME": "work/my plan.ipynb"}
    async with async_kernel("saying", env=session) as (manager, _client):
        jobid, kernel_id = jobid_of(manager), manager.kernel_id
        name = f"kernel-{jobid}-{kernel_id}-my_plan.ipynb.log"
        shown = await asyncio.to_thread(logs, "work/my plan.ipynb")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert f"==> {name} <==\nsaid before\n" in shown.stdout
        if access.name == COMMANDS:
            await asyncio.to_thread(follow, kernel_id[:8], Path(os.environ["HOME"], LOGS, name))
        listed = (await asyncio.to_thread(logs)).stdout.splitlines()
        assert listed[0].split() == ["CHANGED", "JOB", "KERNEL", "NOTEBOOK", "SIZE"]
        assert any(line.split()[2:5] == [jobid, kernel_id, "my_plan.ipynb"] for line in listed)
        await manager.shutdown_kernel()
    async with async_kernel("silent", env=session) as (manager, _client):
        silent_kernel = manager.kernel_id
        await manager.shutdown_kernel()
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)
    listed = (await asyncio.to_thread(logs)).stdout.splitlines()
    # Other clusters of this home had a job with the same number.
    assert [line.split()[2] for line in listed if kernel_id in line.split()] == [jobid]
    assert not [line for line in listed if silent_kernel in line.split()]
    refused = await asyncio.to_thread(logs, "other.ipynb")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "there is no log" in refused.stderr


async def test_further_kernels_in_the_job(access, cluster, kernelspecs):
    """By jobid: beside the first kernel; on another node; with its own share. The last two run in steps."""
    service = access.service()

    def spec(name, **fields):
        environment = {"env": {"IPYTHONDIR": str(kernelspecs.parent / "ipython-on-node")}}
        install_kernelspec(kernelspecs, name, config_overrides=fields, spec_overrides=environment)

    spec("two", nodes="2", gpus="1", runtime="5")
    async with contextlib.AsyncExitStack() as stack:
        manager, client = await stack.enter_async_context(async_kernel("two"))
        jobid, node, pid = jobid_of(manager), await async_execute(client, NODE), await async_execute(client, PID)
        before = dict(service.runner.counts)
        spec("beside", jobid=jobid, node=node)
        _manager, beside = await stack.enter_async_context(async_kernel("beside"))
        assert await async_execute(beside, NODE) == node
        assert steps_of(cluster, jobid) == []
        other = next(name for name in service.allocations_of("")[0]["nodes"] if name != node)
        spec("other", jobid=jobid, node=other)
        _manager, on_other = await stack.enter_async_context(async_kernel("other"))
        assert await async_execute(on_other, NODE) == other
        assert len(steps_of(cluster, jobid)) == 1
        spec("apart", jobid=jobid, node=node, isolate=True, gpus="1", cpus=1, memory="200M")
        apart, isolated = await stack.enter_async_context(async_kernel("apart"))
        assert jobid_of(apart) == jobid
        assert await async_execute(isolated, GPUS) in ("0", "1")
        assert await async_execute(isolated, PID) != pid
        assert len(steps_of(cluster, jobid)) == 2
        # With REST the job's own launcher starts the steps, and slurmrestd gets no request.
        if access.name == REST:
            assert dict(service.runner.counts) == before
        else:
            assert service.runner.counts["srun"] == 2
            assert service.runner.counts["sbatch"] == before["sbatch"] == 1
        await apart.shutdown_kernel()
        assert await poll_async(lambda: len(steps_of(cluster, jobid)) == 1, timeout=READY)
        assert await async_execute(on_other, JOB) == jobid
    assert await poll_async(lambda: state_of(cluster, jobid) == "", timeout=READY)
    assert nothing_left(cluster)


async def test_a_start_that_is_cancelled_in_the_queue_takes_its_job_along(access, cluster):
    """A cancelled start whose job is pending leaves no job, and ``ready`` resolves with the reason."""
    service = access.service()
    with all_nodes_taken(cluster):
        manager = AsyncKernelManager(kernel_name="slurm")
        task = asyncio.ensure_future(manager.start_kernel())
        assert await poll_async(lambda: jobs_of_ours(cluster), timeout=10)
        assert await poll_async(lambda: [row["state"] for row in service.allocations_of("")] == ["PENDING"], timeout=10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
        with pytest.raises(Exception, match="cancelled"):
            await asyncio.wait_for(asyncio.wrap_future(manager.ready), 5)
        assert await poll_async(lambda: not jobs_of_ours(cluster), timeout=10)
        assert not manager.has_kernel
    assert nothing_left(cluster)


def test_a_refusal_is_reported_in_slurms_words(access, cluster, kernelspecs):
    """An unknown partition fails at once, and leaves no job."""
    access.service()
    install_kernelspec(kernelspecs, "nowhere", config_overrides={"partition": "nowhere"})
    words = "Invalid partition name specified" if access.name == REST else "nvalid partition name"
    with pytest.raises(SubmitRefused, match=words), running_kernel("nowhere"):
        pass
    assert jobs_of_ours(cluster) == []


def test_a_job_that_can_never_start_is_refused(access, cluster, kernelspecs):
    """Slurm queues a job of 99 nodes in a partition of 4: the start fails within seconds, and the job is cancelled."""
    access.service()
    install_kernelspec(kernelspecs, "large", config_overrides={"nodes": 99})
    began = time.monotonic()
    never = r"Partition(Config|NodeLimit): ask for .*nodes|node configuration is not available"
    with pytest.raises((AllocationError, SubmitRefused), match=never), running_kernel("large"):
        pass
    assert time.monotonic() - began < 15
    assert poll(lambda: jobs_of_ours(cluster) == [], timeout=10)


@EACH_ACCESS_AND_MODE
def test_a_cancelled_job_ends_its_kernel(access, cluster, kernel_name, caplog):
    """After scancel by another process the kernel is dead at once, with Slurm's report as the reason."""
    service = access.service()
    with running_kernel(kernel_name) as (manager, _client):
        job = jobid_of(manager)
        began = time.monotonic()
        slurm("scancel", job, cluster=cluster)
        assert poll(lambda: not manager.is_alive(), timeout=10)
        assert time.monotonic() - began < 5
        assert poll(lambda: "CANCELLED" in manager.provisioner.exit_reason, timeout=15)
        assert re.search(rf"job {job}.*CANCELLED", caplog.text)
        assert re.search(rf"job {job}: Slurm is ending it", caplog.text)
        assert poll(lambda: service.allocations_of("") == [], timeout=READY)
        with pytest.raises(Exception, match=f"job {job}"):
            manager.restart_kernel(now=True)
    assert nothing_left(cluster)
