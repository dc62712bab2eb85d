"""A kernel's life by jupyter_client's managers: start, execute, interrupt, restart, stop."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from queue import Empty

import pytest
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from traitlets.config import Config

from helpers.kernel_clients import (
    PID,
    READY,
    async_execute,
    async_kernel,
    async_until_reply,
    commands_run,
    execute,
    job_state,
    jobid_of,
    poll_async,
    processes_of_job,
    running_kernel,
    until_printed,
    until_reply,
)
from helpers.private_slurm import jobs_of, poll

CONNECTION = ("transport", "ip", "key", "shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")
# Run with stop_on_error=False: else ipykernel aborts what comes too soon after the interrupted cell.
FOREVER = "import time\nkept = 5\nprint('begun', flush=True)\nwhile True: time.sleep(0.05)"


def address(manager):
    """What a client needs to find the kernel."""
    return {name: manager.get_connection_info()[name] for name in CONNECTION}


def test_the_blocking_manager_runs_a_kernel(service, kernel_name):
    """KernelManager, which has no running loop between calls, starts a kernel that computes."""
    with running_kernel(kernel_name) as (manager, client):
        assert execute(client, "print(6 * 7)") == "42"
        assert client.is_alive()
        assert manager.is_alive()


async def test_the_asynchronous_manager_runs_a_kernel(service, kernel_name):
    """AsyncKernelManager starts a kernel that computes."""
    async with async_kernel(kernel_name) as (manager, client):
        assert await async_execute(client, "print(6 * 7)") == "42"
        assert await manager.is_alive()


def test_the_heartbeat_channel_answers(service, kernel_name):
    """A client's heartbeat sees the kernel beating."""
    with running_kernel(kernel_name) as (_manager, client):
        assert poll(client.hb_channel.is_beating, timeout=READY)


async def test_input_asks_the_client(service, kernel_name):
    """``input()`` on the node reaches the client by the stdin channel, and the answer goes back."""
    async with async_kernel(kernel_name) as (_manager, client):
        msg_id = client.execute("assert input('name? ') == 'ada'", allow_stdin=True)
        request = await client.get_stdin_msg(timeout=READY)
        assert request["content"]["prompt"] == "name? "
        client.input("ada")
        assert (await async_until_reply(client, msg_id))["content"]["status"] == "ok"


def test_completion_inspection_and_history_are_answered(service, kernel_name):
    """Requests other than execute go through the shell channel, too."""
    with running_kernel(kernel_name) as (_manager, client):
        execute(client, "a_long_name = 1")
        assert until_reply(client, client.complete("a_lo", 4))["content"]["matches"] == ["a_long_name"]
        assert until_reply(client, client.inspect("len", 3))["content"]["found"]
        history = until_reply(client, client.history(hist_access_type="tail", n=5))
        assert history["content"]["status"] == "ok"


async def test_an_interrupt_is_a_keyboard_interrupt_and_the_state_is_kept(service, kernel_name):
    """interrupt_kernel ends the cell with KeyboardInterrupt; variables are still there."""
    async with async_kernel(kernel_name) as (manager, client):
        msg_id = client.execute(FOREVER, stop_on_error=False)
        await until_printed(client, "begun")
        await manager.interrupt_kernel()
        reply = await async_until_reply(client, msg_id)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        assert await async_execute(client, "print(kept)") == "5"
        assert await manager.is_alive()


def test_an_interrupt_by_the_blocking_manager_too(service):
    """The blocking manager's interrupt arrives although its loop does not run meanwhile."""
    with running_kernel("slurm") as (manager, client):
        msg_id = client.execute(FOREVER, stop_on_error=False)
        while "begun" not in str(client.get_iopub_msg(timeout=READY)["content"].get("text")):
            pass
        manager.interrupt_kernel()
        assert until_reply(client, msg_id)["content"]["ename"] == "KeyboardInterrupt"


@pytest.mark.parametrize("now", [False, True], ids=["restart", "restart-now"])
async def test_a_restart_keeps_job_and_addresses_and_asks_slurm_nothing(service, kernel_name, now):
    """State is gone; job, node and addresses stay, no Slurm command is run, and an open client goes on."""
    async with async_kernel(kernel_name) as (manager, client):
        await async_execute(client, "remembered = True")
        before = jobid_of(manager), address(manager), commands_run(service)
        pid = await async_execute(client, PID)
        await manager.restart_kernel(now=now)
        assert (jobid_of(manager), address(manager), commands_run(service)) == before
        await client.wait_for_ready(timeout=READY)
        assert await async_execute(client, "print('remembered' in globals())") == "False"
        assert await async_execute(client, PID) != pid
        assert await manager.is_alive()


def test_a_restart_by_the_blocking_manager_too(service, kernel_name):
    """The blocking manager restarts, and its open client reconnects and executes."""
    with running_kernel(kernel_name) as (manager, client):
        before = jobid_of(manager), address(manager)
        execute(client, "remembered = True")
        manager.restart_kernel()
        assert (jobid_of(manager), address(manager)) == before
        client.wait_for_ready(timeout=READY)
        assert execute(client, "print('remembered' in globals())") == "False"


async def test_restarts_one_after_another_all_work(service, kernel_name):
    """Five restarts on a row leave one kernel process and the same job."""
    async with async_kernel(kernel_name) as (manager, client):
        jobid = jobid_of(manager)
        for number in range(5):
            await manager.restart_kernel(now=bool(number % 2))
            await client.wait_for_ready(timeout=READY)
        pid = int(await async_execute(client, PID))
        kernels = [process for process in processes_of_job(jobid) if "kernel.json" in str(process.cmdline())]
        assert [process.pid for process in kernels] == [pid]
        assert jobid_of(manager) == jobid


async def test_a_killed_kernel_is_restarted_in_its_job(service, kernel_name):
    """After kill -9 of the kernel Jupyter's restarter starts it again in the same job; the client goes on."""
    manager = AsyncIOLoopKernelManager(
        kernel_name=kernel_name, config=Config(KernelRestarter={"time_to_dead": 0.3, "debug": False})
    )
    restarts = []
    await manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        manager.add_restart_callback(lambda: restarts.append(1), "restart")
        await client.wait_for_ready(timeout=READY)
        before = jobid_of(manager), address(manager), commands_run(service)
        os.kill(int(await async_execute(client, PID)), signal.SIGKILL)
        assert await poll_async(lambda: restarts, timeout=READY)
        # That is called before the restart begins; a client that finds its kernel dead gives up.
        deadline = time.monotonic() + READY
        while not await manager.is_alive():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await client.wait_for_ready(timeout=READY)
        assert await async_execute(client, "print(6 * 7)") == "42"
        assert (jobid_of(manager), address(manager), commands_run(service)) == before
    finally:
        client.stop_channels()
        await manager.shutdown_kernel()


async def test_a_killed_kernel_is_seen_at_once(service, kernel_name):
    """Poll knows the signal of a kernel that was killed, without asking Slurm."""
    async with async_kernel(kernel_name) as (manager, client):
        commands = commands_run(service)
        os.kill(int(await async_execute(client, PID)), signal.SIGKILL)
        deadline = time.monotonic() + READY
        while (returncode := await manager.provisioner.poll()) is None:
            assert time.monotonic() < deadline
        assert returncode == -signal.SIGKILL
        assert "SIGKILL" in manager.provisioner.exit_reason
        assert commands_run(service) == commands


@pytest.mark.parametrize("now", [False, True], ids=["shutdown", "shutdown-now"])
async def test_a_shutdown_leaves_nothing(service, cluster, kernel_name, now):
    """The job leaves the queue and no process of it stays, whatever the kernel had started."""
    async with async_kernel(kernel_name) as (manager, client):
        jobid = jobid_of(manager)
        detached = "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)"
        await async_execute(client, detached)
        # Popen returns a moment before the new program's environment can be read.
        assert poll(lambda: any(process.name() == "sleep" for process in processes_of_job(jobid)), timeout=5)
        await manager.shutdown_kernel(now=now)
    assert poll(lambda: job_state(jobid) == "", timeout=15)
    assert poll(lambda: not processes_of_job(jobid), timeout=15), processes_of_job(jobid)
    assert jobs_of(cluster) == []


async def test_a_kernel_that_exits_by_itself_can_be_shut_down(service, kernel_name):
    """``exit()`` in a cell ends the kernel with code 0, and the shutdown after it relinquishes the job."""
    async with async_kernel(kernel_name) as (manager, client):
        jobid = jobid_of(manager)
        client.execute("exit()")
        assert await manager.provisioner.wait() == 0
        await manager.shutdown_kernel()
    assert poll(lambda: job_state(jobid) == "", timeout=15)


def test_one_slurm_command_makes_an_allocation_and_at_most_one_ends_it(service, kernel_name):
    """A start costs one sbatch and a stop one squeue at most; running costs nothing."""
    with running_kernel(kernel_name) as (manager, client):
        execute(client, "print(1)")
        started = dict(service.runner.counts)
        manager.shutdown_kernel()
    # While the job waits, Slurm is asked about it, seldom; the private one starts it at its next tick.
    assert started.pop("squeue", 0) <= 2
    assert started == {"sbatch": 1}
    assert service.runner.counts["squeue"] <= 3
    assert set(service.runner.counts) <= {"sbatch", "squeue"}


def test_a_start_costs_one_command_when_the_job_runs_at_once(admin_settings, kernel_name):
    """With the first look at a waiting job put off, sbatch is all that a start needs."""
    service = admin_settings(watch_interval=60.0)
    with running_kernel(kernel_name) as (manager, client):
        execute(client, "print(1)")
        assert dict(service.runner.counts) == {"sbatch": 1}
        manager.shutdown_kernel()
    assert dict(service.runner.counts) == {"sbatch": 1, "squeue": 1}


async def test_much_output_arrives_whole_and_in_order(service, kernel_name):
    """Megabytes of output arrive whole, while the shell channel still answers."""
    async with async_kernel(kernel_name) as (_manager, client):
        msg_id = client.execute("for n in range(2000): print(f'{n:06}' + 'x' * 2000)")
        numbers, text = [], ""
        while len(numbers) < 2000:
            try:
                message = await client.get_iopub_msg(timeout=READY)
            except Empty:
                raise AssertionError(f"only {len(numbers)} of 2000 lines arrived") from None
            if message["msg_type"] == "stream":
                text += message["content"]["text"]
                *lines, text = text.split("\n")
                numbers += [int(line[:6]) for line in lines if len(line) == 2006]
        assert numbers == list(range(2000))
        assert (await async_until_reply(client, msg_id))["content"]["status"] == "ok"
