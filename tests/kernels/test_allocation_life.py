"""Allocations that are shared, split, kept, waited for, suspended and taken away."""

from __future__ import annotations

import asyncio
import os
import pwd
import shlex
import time

import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.errors import AllocationEnded, AllocationError
from gateway_slurm.kernels.model import Phase
from helpers.failing_starts import all_nodes_taken, jobs_of_ours, script
from helpers.kernel_clients import (
    JOB,
    READY,
    async_execute,
    async_kernel,
    commands_run,
    install_kernelspec,
    job_state,
    jobid_of,
)
from helpers.private_slurm import jobs_of, poll, slurm

GPUS = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'none'))"
CPUS = "import os; print(os.environ['SLURM_CPUS_PER_TASK'])"


def node_of(manager) -> str:
    """The node that a kernel runs on, as the server knows it."""
    return manager.provisioner._handle.process.launcher.node


async def until(condition, timeout: float = READY) -> None:
    """Wait for a condition with the loop running."""
    assert await asyncio.to_thread(poll, condition, timeout=timeout)


async def test_a_kernel_that_may_share_joins_instead_of_queueing(service, kernelspecs):
    """``share`` takes a fitting allocation without asking Slurm; one that asks for more gets its own."""
    install_kernelspec(kernelspecs, "sharer", config_overrides={"share": True})
    install_kernelspec(kernelspecs, "larger", config_overrides={"share": True, "gpus": 2})
    async with async_kernel("slurm") as (first, _client):
        before = commands_run(service)
        async with async_kernel("sharer") as (second, client):
            assert await async_execute(client, JOB) == jobid_of(first) == jobid_of(second)
            assert commands_run(service) == before
        async with async_kernel("larger") as (third, client):
            assert jobid_of(third) != jobid_of(first)


async def test_kernels_that_share_at_once_share_one_queued_job(service, kernelspecs):
    """A second start joins a job that still waits in the queue."""
    install_kernelspec(kernelspecs, "sharer", config_overrides={"share": True})
    first, second = (AsyncKernelManager(kernel_name="sharer") for _ in range(2))
    start = asyncio.ensure_future(first.start_kernel())
    await until(lambda: bool(service.runner.counts["sbatch"]))
    await asyncio.gather(start, second.start_kernel())
    assert jobid_of(first) == jobid_of(second)
    assert service.runner.counts["sbatch"] == 1
    await first.shutdown_kernel()
    await second.shutdown_kernel()


async def test_isolated_kernels_have_exact_slices_and_a_third_hears_at_once_that_none_is_free(service, kernelspecs):
    """Two isolated kernels on a node with two GPUs see one each; when one goes its share is free again."""
    install_kernelspec(kernelspecs, "holder", config_overrides={"gpus": 2, "cpus": 4})
    async with async_kernel("holder") as (holder, holder_client):
        slice_ = {"jobid": jobid_of(holder), "isolate": True, "gpus": 1, "cpus": 1}
        install_kernelspec(kernelspecs, "slice", config_overrides=slice_)
        async with async_kernel("slice") as (one, one_client), async_kernel("slice") as (_two, two_client):
            seen = {await async_execute(client, GPUS) for client in (one_client, two_client)}
            assert seen == {"0", "1"}
            assert await async_execute(one_client, CPUS) == "1"
            third = AsyncKernelManager(kernel_name="slice")
            began = time.monotonic()
            with pytest.raises(AllocationError, match=r"no such share free now.*nodes are busy"):
                await third.start_kernel()
            assert time.monotonic() - began < 10
            await one.shutdown_kernel()
            async with async_kernel("slice") as (_four, four_client):
                assert await async_execute(four_client, GPUS) in ("0", "1")
                assert await async_execute(two_client, "print('still here')") == "still here"
        assert await async_execute(holder_client, GPUS) == "0,1"


async def test_an_isolated_kernel_may_have_a_job_of_its_own(service, kernelspecs):
    """Without a job to join, one is made for it, and goes with it."""
    install_kernelspec(kernelspecs, "alone", config_overrides={"isolate": True, "gpus": 1})
    async with async_kernel("alone") as (manager, client):
        jobid = jobid_of(manager)
        assert await async_execute(client, JOB) == jobid
        assert await async_execute(client, GPUS) == "0"
        await manager.restart_kernel()
        await client.wait_for_ready(timeout=READY)
        assert await async_execute(client, JOB) == jobid
    await until(lambda: job_state(jobid) == "")


async def test_kernels_of_one_job_spread_over_its_nodes(service, kernelspecs):
    """A kernel that names no node goes where the fewest are; one that names a node goes there."""
    install_kernelspec(kernelspecs, "two-nodes", config_overrides={"nodes": 2})
    async with async_kernel("two-nodes") as (first, _client):
        jobid = jobid_of(first)
        install_kernelspec(kernelspecs, "join", config_overrides={"jobid": jobid})
        async with async_kernel("join") as (second, _client), async_kernel("join") as (third, _client):
            nodes = [node_of(first), node_of(second)]
            assert len(set(nodes)) == 2
            install_kernelspec(kernelspecs, "there", config_overrides={"jobid": jobid, "node": nodes[1]})
            async with async_kernel("there") as (fourth, client):
                assert node_of(fourth) == nodes[1]
                assert await async_execute(client, "import os; print(os.environ['SLURMD_NODENAME'])") == nodes[1]
            elsewhere = next(f"c{number}" for number in range(1, 5) if f"c{number}" not in nodes)
            install_kernelspec(kernelspecs, "elsewhere", config_overrides={"jobid": jobid, "node": elsewhere})
            with pytest.raises(AllocationError, match=f"node {elsewhere} is not in job {jobid}.*{nodes[0]}"):
                await AsyncKernelManager(kernel_name="elsewhere").start_kernel()
            await third.shutdown_kernel()


async def test_a_kept_allocation_outlives_its_last_kernel(service, kernelspecs, cluster):
    """``keep_allocation`` holds the nodes for the next kernel, also for another server's."""
    install_kernelspec(kernelspecs, "keeper", config_overrides={"keep_allocation": True})
    async with async_kernel("keeper") as (manager, _client):
        jobid = jobid_of(manager)
    assert job_state(jobid) == "RUNNING"
    install_kernelspec(kernelspecs, "join", config_overrides={"jobid": jobid})
    async with async_kernel("join") as (manager, client):
        assert await async_execute(client, JOB) == jobid
    assert job_state(jobid) == "RUNNING"
    slurm("scancel", jobid, cluster=cluster)


async def test_an_idle_allocation_waits_for_the_next_kernel_and_then_goes(admin_settings, kernelspecs):
    """``idle_timeout`` keeps an allocation for a while after its last kernel."""
    service = admin_settings(idle_timeout=3)
    install_kernelspec(kernelspecs, "sharer", config_overrides={"share": True})
    async with async_kernel("sharer") as (first, _client):
        jobid = jobid_of(first)
    assert job_state(jobid) == "RUNNING"
    async with async_kernel("sharer") as (second, _client):
        assert jobid_of(second) == jobid
    assert service.runner.counts["sbatch"] == 1
    await until(lambda: job_state(jobid) == "")


async def test_an_idle_allocation_that_is_kept_meanwhile_stays(admin_settings, kernelspecs, cluster, caplog):
    """The mark counts when the time is up, not only when the last kernel stopped."""
    caplog.set_level("INFO")
    service = admin_settings(idle_timeout=2, heartbeat=0.3)
    async with async_kernel("slurm") as (manager, _client):
        jobid = jobid_of(manager)
        looked = asyncio.Event()
        allocations = service.owners.of("")
        keep_flags, is_kept = allocations.keep_flags, allocations.keep_flags.is_kept
    await service.run(service.keep_allocation("", jobid))

    async def noted(allocation):
        kept = await is_kept(allocation)
        loop.call_soon_threadsafe(looked.set)
        return kept

    loop = asyncio.get_running_loop()
    keep_flags.is_kept = noted
    await asyncio.wait_for(looked.wait(), READY)
    assert job_state(jobid) == "RUNNING"
    await service.run(service.release_allocation("", jobid))
    await until(lambda: job_state(jobid) == "")


async def test_a_job_with_too_little_time_left_is_refused(admin_settings, kernelspecs, cluster):
    """A kernel that would be killed in a moment is not started."""
    admin_settings(min_time_left=600)
    jobid = slurm("sbatch", "--parsable", "-t1", "-o/dev/null", "--wrap", "sleep 60", cluster=cluster).stdout.strip()
    await until(lambda: job_state(jobid) == "RUNNING")
    install_kernelspec(kernelspecs, "join", config_overrides={"jobid": jobid})
    with pytest.raises(AllocationError, match=f"job {jobid} .*ends in .* s: too soon"):
        await AsyncKernelManager(kernel_name="join").start_kernel()
    assert job_state(jobid) == "RUNNING"
    slurm("scancel", jobid, cluster=cluster)


async def test_a_start_that_waits_says_why_and_where_it_stands(service, kernelspecs, cluster):
    """State, reason and place in the queue of a waiting start are there to be shown."""
    fillers = [
        slurm("sbatch", "--parsable", "--exclusive", "-N4", "-o/dev/null", "--wrap", "sleep 60", cluster=cluster)
        for _ in range(2)
    ]
    jobs = [filler.stdout.strip() for filler in fillers]
    await until(lambda: job_state(jobs[0]) == "RUNNING")
    manager = AsyncKernelManager(kernel_name="slurm", kernel_id="waiter")
    start = asyncio.ensure_future(manager.start_kernel())
    await until(lambda: getattr(service.waiting("waiter"), "queue_place", None) is not None)
    waiting = service.waiting("waiter")
    assert waiting.state == "PENDING"
    assert waiting.reason in ("Resources", "Priority")
    assert waiting.queue_place == 2
    slurm("scancel", *jobs, cluster=cluster)
    await start
    assert service.waiting("waiter") is None
    await manager.shutdown_kernel()


async def test_a_pending_job_is_adopted_and_waited_for(service, kernelspecs, cluster):
    """A jobid that still waits in the queue is good: the kernel starts when the job does."""
    argv = ("sbatch", "--parsable", "--hold", "-t5", "-o/dev/null", "--wrap", "sleep 300")
    jobid = slurm(*argv, cluster=cluster).stdout.strip()
    install_kernelspec(kernelspecs, "join", config_overrides={"jobid": jobid})
    manager = AsyncKernelManager(kernel_name="join", kernel_id="patient")
    start = asyncio.ensure_future(manager.start_kernel())
    await until(lambda: getattr(service.waiting("patient"), "reason", "") == "JobHeldUser")
    slurm("scontrol", "release", jobid, cluster=cluster)
    await start
    assert jobid_of(manager) == jobid
    await manager.shutdown_kernel()
    slurm("scancel", jobid, cluster=cluster)


async def test_a_job_of_salloc_is_adopted_while_it_waits(service, kernelspecs, cluster):
    """A user's salloc that still waits for its nodes is accepted, too."""
    with all_nodes_taken(cluster):
        waiting = await asyncio.create_subprocess_exec("salloc", "--no-shell", "-N2", "-t5", "-J", "mine")
        await until(lambda: any(line.endswith("PENDING mine") for line in jobs_of(cluster)))
        (jobid,) = [line.split()[0] for line in jobs_of(cluster) if line.endswith("mine")]
        install_kernelspec(kernelspecs, "join", config_overrides={"jobid": jobid})
        manager = AsyncKernelManager(kernel_name="join", kernel_id="patient")
        start = asyncio.ensure_future(manager.start_kernel())
        await until(lambda: service.waiting("patient") is not None)
    await start
    assert await asyncio.wait_for(waiting.wait(), READY) == 0
    assert jobid_of(manager) == jobid
    await manager.shutdown_kernel()
    await until(lambda: job_state(jobid) == "")


async def test_a_job_that_is_held_in_the_queue_waits_and_says_so(service, kernelspecs, cluster):
    """``scontrol hold`` of a start's own job is no end of it: the start goes on when the job is released."""
    manager = AsyncKernelManager(kernel_name="slurm", kernel_id="held")
    with all_nodes_taken(cluster):
        start = asyncio.ensure_future(manager.start_kernel())
        await until(lambda: jobs_of_ours(cluster))
        (jobid,) = jobs_of_ours(cluster)
        slurm("scontrol", "hold", jobid, cluster=cluster)
        await until(lambda: getattr(service.waiting("held"), "reason", "").startswith("JobHeld"))
    assert not start.done()
    slurm("scontrol", "release", jobid, cluster=cluster)
    await start
    assert jobid_of(manager) == jobid
    await manager.shutdown_kernel()


async def test_a_job_of_another_user_is_refused(admin_settings, kernelspecs, cluster, tmp_path):
    """Slurm's report decides who owns the job; nothing is started in it, and no new job is submitted instead."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    path = os.environ["PATH"]
    script(tmp_path / "squeue", f'#!/bin/sh\nPATH={shlex.quote(path)}\nsqueue "$@" | sed s/{user}/another/g\n')
    service = admin_settings(slurm_path=f"{tmp_path}:{path}")
    jobid = slurm("sbatch", "--parsable", "-t5", "-o/dev/null", "--wrap", "sleep 60", cluster=cluster).stdout.strip()
    install_kernelspec(kernelspecs, "join", config_overrides={"jobid": jobid})
    with pytest.raises(AllocationError, match=f"{jobid} is not a job of yours"):
        await AsyncKernelManager(kernel_name="join").start_kernel()
    assert service.runner.counts["sbatch"] == service.runner.counts["srun"] == 0
    slurm("scancel", jobid, cluster=cluster)


async def test_a_suspended_kernel_is_lost_and_comes_back(admin_settings, kernelspecs, cluster):
    """Suspended is not dead: its link falls silent, and the kernel goes on where it was."""
    admin_settings(heartbeat=0.5)
    async with async_kernel("slurm") as (manager, client):
        await async_execute(client, "kept = 41")
        slurm("scontrol", "suspend", jobid_of(manager), cluster=cluster)
        process = manager.provisioner._handle.process
        await until(lambda: process.phase is Phase.LOST)
        assert await manager.is_alive()
        slurm("scontrol", "resume", jobid_of(manager), cluster=cluster)
        await until(lambda: process.phase is Phase.RUNNING)
        await client.wait_for_ready(timeout=READY)
        assert await async_execute(client, "print(kept + 1)") == "42"


async def test_a_requeued_job_ends_its_kernels(service, kernelspecs, cluster):
    """An adopted job that is put back into the queue has lost its kernels, and the reason says so."""
    argv = ("sbatch", "--parsable", "--requeue", "-t5", "-o/dev/null", "--wrap", "sleep 300")
    jobid = slurm(*argv, cluster=cluster).stdout.strip()
    await until(lambda: job_state(jobid) == "RUNNING")
    install_kernelspec(kernelspecs, "join", config_overrides={"jobid": jobid})
    manager = AsyncKernelManager(kernel_name="join")
    await manager.start_kernel()
    slurm("scontrol", "requeuehold", jobid, cluster=cluster)
    process = manager.provisioner._handle.process
    await until(lambda: process.phase is Phase.DEAD)
    with pytest.raises((AllocationEnded, Exception), match=jobid):
        await manager.restart_kernel()
    slurm("scancel", jobid, cluster=cluster)
    await manager.provisioner.cleanup()


async def test_a_step_of_the_users_own_keeps_the_job(service, kernelspecs, cluster):
    """The last kernel's stop does not end what another step of the user's still uses."""
    async with async_kernel("slurm") as (manager, client):
        jobid = jobid_of(manager)
        await async_execute(client, "import subprocess; work = subprocess.Popen(['srun', '--overlap', 'sleep', '120'])")
        await until(lambda: f"{jobid}.0" in slurm("squeue", "--steps", "-h", "-j", jobid, cluster=cluster).stdout)
        other = slurm("srun", f"--jobid={jobid}", "--overlap", "true", cluster=cluster)
        assert other.returncode == 0
    slurm("scancel", jobid, cluster=cluster)
