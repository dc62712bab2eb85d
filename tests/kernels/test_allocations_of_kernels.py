"""Which job a kernel runs in: its own, one shared by jobid, one that the user made; and which node."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from gateway_slurm.errors import AllocationEnded, KernelStartError, RequestError
from helpers.kernel_clients import (
    JOB,
    READY,
    async_execute,
    async_kernel,
    commands_run,
    execute,
    forget_service,
    install_kernelspec,
    job_state,
    jobid_of,
    processes_of_job,
    running_kernel,
)
from helpers.private_slurm import poll, slurm, steps_of
from helpers.server_processes import allocations

NODE = "import os; print(os.environ['SLURMD_NODENAME'])"


def job_node(jobid, cluster):
    """The first node of a running job."""
    argv = ["squeue", "--noheader", f"--jobs={jobid}", "--format=%B"]
    return slurm(*argv, cluster=cluster).stdout.strip()


@pytest.fixture
def salloc_job(cluster) -> Iterator[str]:
    """A job of two nodes as a user makes it in a terminal: ``salloc --no-shell``."""
    said = slurm("salloc", "--no-shell", "-N2", "-t5", "-J", "mine", cluster=cluster).stderr
    jobid = said.split("Granted job allocation ")[1].split()[0]
    yield jobid
    slurm("scancel", jobid, cluster=cluster, check=False)


@pytest.fixture
def sbatch_job(cluster) -> Iterator[str]:
    """A running batch job of the user's own: ``sbatch --wrap 'sleep'``."""
    jobid = slurm(
        "sbatch", "--parsable", "-t5", "-o", "/dev/null", "--wrap", "sleep 300", cluster=cluster
    ).stdout.strip()
    assert poll(lambda: job_state(jobid) == "RUNNING", timeout=READY)
    yield jobid
    slurm("scancel", jobid, cluster=cluster, check=False)


async def test_a_second_kernel_by_jobid_costs_no_slurm_command(service, kernelspecs, kernel_name):
    """Two kernels share a job; the first one's stop keeps it, the last one's relinquishes it."""
    async with async_kernel(kernel_name) as (first, _client):
        jobid = jobid_of(first)
        before = commands_run(service)
        install_kernelspec(kernelspecs, "join", config_overrides={"jobid": jobid})
        async with async_kernel("join") as (second, client):
            assert commands_run(service) == before
            assert await async_execute(client, JOB) == jobid == jobid_of(second)
            await first.shutdown_kernel()
            assert job_state(jobid) == "RUNNING"
            assert await async_execute(client, JOB) == jobid
            assert commands_run(service) == before
    assert poll(lambda: job_state(jobid) == "", timeout=15)


async def test_kernels_that_share_a_job_restart_and_die_alone(service, kernelspecs):
    """Restarting one kernel of a job, now or not, does not touch the other's state."""
    async with async_kernel("slurm") as (first, first_client):
        await async_execute(first_client, "kept = 'by the first'")
        install_kernelspec(kernelspecs, "join", config_overrides={"jobid": jobid_of(first)})
        async with async_kernel("join") as (second, second_client):
            for now in (False, True):
                await second.restart_kernel(now=now)
                await second_client.wait_for_ready(timeout=READY)
            await async_execute(second_client, "import os, signal; os.kill(os.getppid(), 0)")
            await second.interrupt_kernel()
            assert await async_execute(first_client, "print(kept)") == "by the first"
            assert await async_execute(second_client, JOB) == jobid_of(first)


def test_a_jobid_that_is_not_there_is_an_error_that_names_it(service, kernelspecs):
    """A kernel for a job that Slurm does not know is not started, and the error says why."""
    install_kernelspec(kernelspecs, "join", config_overrides={"jobid": "99999999"})
    with pytest.raises(Exception, match="99999999"), running_kernel("join"):
        pass


def test_a_job_that_is_over_is_not_adopted(service, kernelspecs, cluster):
    """The jobid of a finished job is refused with its state, and no new job is taken instead."""
    jobid = slurm("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "true", cluster=cluster).stdout.strip()
    assert poll(lambda: job_state(jobid) == "", timeout=READY)
    install_kernelspec(kernelspecs, "join", config_overrides={"jobid": jobid})
    with pytest.raises(AllocationEnded, match="COMPLETED"), running_kernel("join"):
        pass
    assert service.runner.counts["sbatch"] == 0


async def test_an_allocation_made_by_salloc_is_adopted(service, kernelspecs, salloc_job, mode):
    """A kernel runs, restarts and is interrupted in a job made in a terminal; its stop relinquishes the job."""
    name = f"join-{mode}"
    install_kernelspec(kernelspecs, name, config_overrides={"jobid": salloc_job, "connect": None})
    if mode == "direct":
        curve = {"metadata": {"supported_encryption": ["curve"]}}
        install_kernelspec(kernelspecs, name, config_overrides={"jobid": int(salloc_job)}, spec_overrides=curve)
    async with async_kernel(name) as (manager, client):
        assert await async_execute(client, JOB) == salloc_job
        commands = commands_run(service)
        await manager.restart_kernel()
        await client.wait_for_ready(timeout=READY)
        assert await async_execute(client, JOB) == salloc_job
        assert commands_run(service) == commands
    assert service.runner.counts["sbatch"] == 0
    assert poll(lambda: job_state(salloc_job) == "", timeout=15)


def test_a_batch_job_outlives_its_last_kernel(service, kernelspecs, sbatch_job, cluster, caplog):
    """A kernel runs beside the user's batch script, and neither its stop nor `release` ends that script's job."""
    install_kernelspec(kernelspecs, "join", config_overrides={"jobid": sbatch_job, "keep_allocation": True})
    with running_kernel("join") as (_manager, client):
        assert execute(client, JOB) == sbatch_job
    assert "stays" in allocations("release", sbatch_job)
    install_kernelspec(kernelspecs, "join", config_overrides={"jobid": sbatch_job})
    with running_kernel("join") as (_manager, client):
        assert execute(client, JOB) == sbatch_job
    assert poll(lambda: service.allocations_of("") == [], timeout=READY)  # it is not asked about any more
    assert f"job {sbatch_job} stays after its last kernel: its batch script is not ours" in caplog.text
    forget_service()
    assert poll(lambda: steps_of(cluster, sbatch_job) == [], timeout=READY)
    assert job_state(sbatch_job) == "RUNNING"


def test_a_job_in_which_the_user_works_is_not_ended(service, kernelspecs, salloc_job, cluster):
    """While another step of the user's runs in the adopted job, the last kernel's stop keeps the job."""
    step = subprocess.Popen(["srun", f"--jobid={salloc_job}", "--overlap", "-n1", "-N1", "sleep", "300"])
    try:
        listed = ["squeue", "--steps", "--noheader", f"--jobs={salloc_job}", "--format=%j"]
        assert poll(lambda: "sleep" in slurm(*listed, cluster=cluster).stdout, timeout=READY)
        install_kernelspec(kernelspecs, "join", config_overrides={"jobid": salloc_job})
        with running_kernel("join") as (_manager, client):
            assert execute(client, JOB) == salloc_job
        assert job_state(salloc_job) == "RUNNING"
        assert "sleep" in slurm(*listed, cluster=cluster).stdout
        forget_service()  # nor does the end of the process end it
        assert job_state(salloc_job) == "RUNNING"
        assert step.poll() is None
    finally:
        step.terminate()
        step.wait(timeout=30)


def test_a_start_that_fails_leaves_the_adopted_job(service, kernelspecs, salloc_job):
    """A mistake in kernel_argv does not cost the job that the user made and waited for."""
    config = {"jobid": salloc_job, "kernel_argv": ["/nonexistent/python", "{connection_file}"]}
    install_kernelspec(kernelspecs, "join", config_overrides=config)
    with pytest.raises(KernelStartError, match="/nonexistent/python"), running_kernel("join"):
        pass
    assert poll(lambda: not processes_of_job(salloc_job), timeout=15)
    assert job_state(salloc_job) == "RUNNING"
    install_kernelspec(kernelspecs, "join", config_overrides={"jobid": salloc_job})
    with running_kernel("join") as (_manager, client):
        assert execute(client, JOB) == salloc_job


def test_node_picks_the_node_of_an_adopted_job(service, kernelspecs, salloc_job, cluster):
    """Two kernels in a job of two nodes run on the node that each names."""
    nodes = slurm("squeue", "--noheader", f"--jobs={salloc_job}", "--format=%N", cluster=cluster).stdout.strip()
    names = slurm("scontrol", "show", "hostnames", nodes, cluster=cluster).stdout.split()
    assert len(names) == 2
    for name in names:
        install_kernelspec(kernelspecs, f"on-{name}", config_overrides={"jobid": salloc_job, "node": name})
    with running_kernel(f"on-{names[0]}") as (_one, first), running_kernel(f"on-{names[1]}") as (_two, second):
        assert [execute(client, NODE) for client in (first, second)] == names


def test_node_picks_another_node_of_our_own_job(admin_settings, kernelspecs, cluster):
    """A kernel by jobid and node runs on the second node of a job that another kernel has made."""
    admin_settings(watch_interval=60.0)  # nothing has been asked of Slurm about the job
    install_kernelspec(kernelspecs, "two", config_overrides={"nodes": "2"})
    with running_kernel("two") as (manager, client):
        jobid, here = jobid_of(manager), execute(client, NODE)
        names = slurm("scontrol", "show", "hostnames", execute(client, NODELIST), cluster=cluster).stdout.split()
        assert len(names) == 2
        (other,) = set(names) - {here}
        install_kernelspec(kernelspecs, "other", config_overrides={"jobid": jobid, "node": other})
        with running_kernel("other") as (_manager, second):
            assert execute(second, NODE) == other
            assert execute(second, JOB) == jobid
        assert job_state(jobid) == "RUNNING"
        assert execute(client, NODE) == here


NODELIST = "import os; print(os.environ['SLURM_JOB_NODELIST'])"


def test_node_picks_the_node_of_a_new_job(service, kernelspecs):
    """A new allocation with ``node`` is made on that node."""
    install_kernelspec(kernelspecs, "on-c3", config_overrides={"node": "c3"})
    with running_kernel("on-c3") as (_manager, client):
        assert execute(client, NODE) == "c3"


def test_nodes_and_gpus_reach_slurm(service, kernelspecs):
    """Nodes = 2 with one GPU each: the kernel sees the node list, and Slurm's CUDA_VISIBLE_DEVICES."""
    install_kernelspec(kernelspecs, "gpu", config_overrides={"nodes": 2, "gpus": "1"})
    code = "import os; print(os.environ['SLURM_JOB_NUM_NODES'], os.environ.get('CUDA_VISIBLE_DEVICES'))"
    with running_kernel("gpu") as (_manager, client):
        assert execute(client, code) == "2 0"


def test_time_cpus_and_memory_reach_slurm(service, kernelspecs, cluster):
    """The job is made with the time limit, CPUs and memory that the kernelspec asks for."""
    asked = {"time": "0:20:00", "cpus": "2", "memory": "300M"}
    install_kernelspec(kernelspecs, "more", config_overrides=asked)
    with running_kernel("more") as (manager, _client):
        argv = ["squeue", "--noheader", f"--jobs={jobid_of(manager)}", "--format=%l %C %m"]
        assert slurm(*argv, cluster=cluster).stdout.split() == ["20:00", "2", "300M"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("nodes", "two"), ("partition", "-p x"), ("jobid", "12;rm"), ("kernel_argv", "python"), ("sbatch", "x")],
)
def test_an_invalid_field_is_named_and_runs_nothing(service, kernelspecs, field, value):
    """A kernelspec that asks for something invalid gets an error with the field's name; Slurm is not asked."""
    install_kernelspec(kernelspecs, "wrong", config_overrides={field: value})
    with pytest.raises(RequestError, match=field), running_kernel("wrong"):
        pass
    assert commands_run(service) == 0
