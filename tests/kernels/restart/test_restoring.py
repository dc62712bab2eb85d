"""Kernels outlive their server process: the next one has them again, whatever happened in between."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from gateway_slurm.errors import AllocationEnded
from gateway_slurm.kernels.model import Phase
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.testing.processes import job_processes
from helpers.dying_servers import adopt, answer_of, call, driven_server
from helpers.kernel_clients import PID, READY, async_execute, install_kernelspec, job_state, poll_async
from helpers.private_slurm import poll, slurm

DEPLOYMENT = "tests"


@pytest.fixture
def deployment(admin_settings, tmp_path, monkeypatch):
    """The service of a deployment with a store of its own; servers in other processes are of the same one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return admin_settings(deployment=DEPLOYMENT)


async def restored_by(service):
    """What it restores."""
    return await service.run(service.restore())


async def client_of(manager):
    """A client that is ready."""
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=READY)
    return client


async def is_over(jobid):
    """Whether the job and its processes went within a while."""
    conf = Path(os.environ["SLURM_CONF"])
    return await asyncio.to_thread(poll, lambda: job_state(jobid) == "" and not job_processes(conf), timeout=READY)


@pytest.mark.parametrize("how", ["killed", "left"])
async def test_the_next_process_has_the_kernels_again(deployment, kernel_name, how):
    """It executes, interrupts, restarts where the kernel was, and shuts it down, as if it had started the kernel."""
    with driven_server() as first:
        known = await call(first, "start", name=kernel_name, slurm_fields={"cpus": 1})
        assert await call(first, "execute", kernel_id=known["kernel_id"], code="x = 41") == "ok"
        if how == "killed":
            first.signal(signal.SIGKILL)
        else:
            await call(first, "close", leave=True)
            first.end()
    assert job_state(known["jobid"]) == "RUNNING"
    (restored,) = await restored_by(deployment)
    assert restored.record.kernel_id == known["kernel_id"]
    assert restored.record.manager["seen"] == "by the first server"
    manager = adopt(restored, kernel_name)
    assert (manager.provisioner.jobid, manager.provisioner.node) == (known["jobid"], known["node"])
    connect = manager.provisioner.connect
    why = {"slurm": "does not declare CurveZMQ", "slurm-direct": "node c1 can be dialled at"}[kernel_name]
    assert (connect["mode"], why in connect["why"]) == ("direct" if "direct" in kernel_name else "tunnel", True)
    assert await manager.provisioner.poll() is None
    client = await client_of(manager)
    # A direct kernel's clients do not need its launcher.
    assert await poll_async(lambda: restored.handle.process.phase is Phase.RUNNING, timeout=READY)
    assert await async_execute(client, "print(x + 1)") == "42"
    await manager.interrupt_kernel()
    await manager.restart_kernel()
    await client.wait_for_ready(timeout=READY)
    assert await async_execute(client, PID) != str(known["pid"])
    assert await async_execute(client, "print('x' in globals())") == "False"
    client.stop_channels()
    await manager.shutdown_kernel()
    assert await is_over(known["jobid"])
    assert deployment.registry.kernels() == deployment.registry.launchers() == deployment.registry.allocations() == []


async def test_a_direct_kernel_is_restarted_where_its_clients_are_connected(deployment, kernelspecs, monkeypatch):
    """Also where its launcher comes to the next process from another address of its node."""
    also_listen = ResponseSocket.also_listen
    monkeypatch.setattr(
        ResponseSocket, "also_listen", lambda self, _hosts, port: also_listen(self, ["127.0.0.1"], port)
    )
    with driven_server() as first:
        known = await call(first, "start", name="slurm-direct")
        first.signal(signal.SIGKILL)
    (restored,) = await restored_by(deployment)
    manager = adopt(restored, "slurm-direct")
    client = await client_of(manager)
    assert await poll_async(lambda: restored.handle.process.phase is Phase.RUNNING, timeout=READY)
    assert restored.handle.process.launcher.peer == "127.0.0.1"
    was = manager.get_connection_info()
    await manager.restart_kernel()
    assert manager.get_connection_info() == was
    await client.wait_for_ready(timeout=READY)
    assert await async_execute(client, PID) != str(known["pid"])
    client.stop_channels()
    await manager.shutdown_kernel()
    assert await is_over(known["jobid"])


async def test_a_server_that_dies_before_a_launcher_came_to_it_costs_nothing(deployment, kernelspecs):
    """Launchers know the address of the one before: the next listens there, too."""
    with driven_server() as first, driven_server() as second:
        known = await call(first, "start", name="slurm")
        launcher = psutil.Process(known["pid"]).parent()
        launcher.suspend()
        first.signal(signal.SIGKILL)
        assert await call(second, "restore") == [known["kernel_id"]]
        assert await call(second, "recorded") is None
        second.signal(signal.SIGKILL)
        (restored,) = await restored_by(deployment)
        launcher.resume()
    assert await poll_async(lambda: restored.handle.process.phase is Phase.RUNNING, timeout=READY)
    await deployment.run(restored.handle.release())
    assert await is_over(known["jobid"])


async def test_a_kernel_that_ends_while_nobody_is_there_is_dead_with_its_last_words(deployment, kernel_name, tmp_path):
    """Exit code and the end of its standard error are told to the next process; its place is given up."""
    sign = tmp_path / "go"
    dying = f"""
import os, threading, time
def die():
    while not os.path.exists({str(sign)!r}):
        time.sleep(0.02)
    os.write(2, b"my last words\\n")
    os._exit(7)
threading.Thread(target=die).start()
"""
    with driven_server() as first:
        known = await call(first, "start", name=kernel_name)
        await call(first, "execute", kernel_id=known["kernel_id"], code=dying)
        first.signal(signal.SIGKILL)
    sign.touch()
    assert await poll_async(lambda: not os.path.exists(f"/proc/{known['pid']}"), timeout=READY)
    (restored,) = await restored_by(deployment)
    assert await deployment.run(restored.handle.process.wait()) == 7
    assert restored.handle.process.reason == "exit code 7"
    assert restored.handle.process.output_tail.endswith("my last words")
    # It can be started again where it was.
    manager = adopt(restored, kernel_name)
    await manager.restart_kernel(now=True)
    client = await client_of(manager)
    assert await async_execute(client, "print(1)") == "1"
    client.stop_channels()
    await manager.shutdown_kernel(now=True)
    assert await is_over(known["jobid"])


async def test_a_kernel_whose_job_ended_meanwhile_is_dead_with_slurms_word(deployment, kernel_name, cluster):
    """No launcher comes: Slurm is asked, and says that the job is over."""
    with driven_server() as first:
        known = await call(first, "start", name=kernel_name)
        first.signal(signal.SIGKILL)
    slurm("scancel", known["jobid"], cluster=cluster)
    assert await is_over(known["jobid"])
    (restored,) = await restored_by(deployment)
    manager = adopt(restored, kernel_name)
    reason = await manager.provisioner.until_over()
    assert f"job {known['jobid']}" in reason
    assert await manager.provisioner.poll() == -signal.SIGKILL
    with pytest.raises(AllocationEnded):
        await manager.restart_kernel(now=True)
    await manager.shutdown_kernel(now=True)
    assert deployment.registry.kernels() == deployment.registry.launchers() == deployment.registry.allocations() == []


async def test_several_kernels_of_one_job_are_back_together(deployment, cluster):
    """A further kernel of the owner's shares the job, too, and the job ends with the last of them."""
    with driven_server() as first:
        shared = {"slurm_fields": {"share": True}, "slurm_owner": "ada"}
        one = await call(first, "start", name="slurm", **shared)
        two = await call(first, "start", name="slurm-direct", **shared)
        isolated = {"slurm_fields": {"jobid": one["jobid"], "isolate": True, "cpus": 1}, "slurm_owner": "ada"}
        three = await call(first, "start", name="slurm", **isolated)
        assert one["jobid"] == two["jobid"] == three["jobid"]
        first.signal(signal.SIGKILL)
    names = {one["kernel_id"]: "slurm", two["kernel_id"]: "slurm-direct", three["kernel_id"]: "slurm"}
    restored = await restored_by(deployment)
    assert {each.record.kernel_id for each in restored} == set(names)
    assert [row["owner"] for row in deployment.allocations_of(None)] == ["ada"]
    managers = {each.record.kernel_id: adopt(each, names[each.record.kernel_id]) for each in restored}
    for kernel_id, manager in managers.items():
        client = await client_of(manager)
        assert await async_execute(client, "print(1)") == "1"
        client.stop_channels()
        if kernel_id == three["kernel_id"]:
            await manager.shutdown_kernel()
    assert job_state(one["jobid"]) == "RUNNING"
    for kernel_id in (one["kernel_id"], two["kernel_id"]):
        await managers[kernel_id].shutdown_kernel()
    assert await is_over(one["jobid"])


@pytest.mark.parametrize("how", ["killed", "left"])
async def test_a_start_that_waits_in_the_queue_is_given_up_with_its_job(deployment, kernelspecs, cluster, how):
    """Whoever asked for the kernel cannot be told that it is there: nothing waits for nobody."""
    filler = slurm(
        "sbatch", "--parsable", "--exclusive", "-N4", "-o/dev/null", "--wrap", "sleep 300", cluster=cluster
    ).stdout.strip()
    assert await asyncio.to_thread(poll, lambda: job_state(filler) == "RUNNING", timeout=READY)

    def waiting():
        found = slurm("squeue", "--noheader", "--name=gateway_slurm", "--format=%i", cluster=cluster).stdout.split()
        return len(found) == 1

    with driven_server() as first:
        await call(first, "begin", name="slurm")
        assert await asyncio.to_thread(poll, waiting, timeout=READY)
        if how == "killed":
            first.signal(signal.SIGKILL)
        else:
            await call(first, "close", leave=True)
            first.end()
    if how == "killed":
        assert await restored_by(deployment) == []
    gone = "squeue", "--noheader", "--name=gateway_slurm"
    assert await asyncio.to_thread(poll, lambda: slurm(*gone, cluster=cluster).stdout == "", timeout=READY)
    slurm("scancel", filler, cluster=cluster)


async def test_a_kept_job_without_kernels_is_back_too(deployment, kernelspecs):
    """It is listed, and ends when it is released."""
    with driven_server() as first:
        known = await call(first, "start", name="slurm", slurm_fields={"keep_allocation": True})
        await call(first, "shutdown", kernel_id=known["kernel_id"])
        first.signal(signal.SIGKILL)
    assert await restored_by(deployment) == []
    (row,) = deployment.allocations_of("")
    assert (row["jobid"], row["kept"], row["kernel_ids"]) == (known["jobid"], True, [])
    await deployment.run(deployment.release_allocation("", known["jobid"]))
    assert await is_over(known["jobid"])


async def test_another_server_of_the_deployment_takes_over_while_it_runs(deployment, kernel_name):
    """No restart is needed: a server that is there finds that another one died, and has its kernels."""
    claimed = []
    deployment.on_claimed = claimed.extend
    assert await restored_by(deployment) == []
    with driven_server() as first:
        assert await call(first, "restore") == []
        known = await call(first, "start", name=kernel_name)
        first.signal(signal.SIGKILL)
        assert await poll_async(lambda: claimed, timeout=READY)
    manager = adopt(claimed[0], kernel_name)
    client = await client_of(manager)
    assert await async_execute(client, PID) == str(known["pid"])
    client.stop_channels()
    await manager.shutdown_kernel()
    assert await is_over(known["jobid"])


async def test_a_server_that_slept_through_its_lease_ends_nothing(deployment, admin_settings, store_url):
    """The other one has the kernel; the sleeper finds that out when it wakes, lets go, and even ends in good order."""
    deployment = admin_settings(deployment=DEPLOYMENT, store_url=store_url)
    claimed = []
    deployment.on_claimed = claimed.extend
    assert await restored_by(deployment) == []
    with driven_server() as sleeper:
        assert await call(sleeper, "restore") == []
        known = await call(sleeper, "start", name="slurm")
        sleeper.signal(signal.SIGSTOP)
        assert await poll_async(lambda: claimed, timeout=READY)
        sleeper.signal(signal.SIGCONT)
        for _attempt in range(600):
            if await call(sleeper, "lost") == [known["kernel_id"]]:
                break
            await asyncio.sleep(0.1)
        assert await call(sleeper, "lost") == [known["kernel_id"]]
        await call(sleeper, "close", leave=False)
        sleeper.end()
    manager = adopt(claimed[0], "slurm")
    client = await client_of(manager)
    assert await async_execute(client, PID) == str(known["pid"])
    assert await manager.provisioner.poll() is None
    client.stop_channels()
    await manager.shutdown_kernel()
    assert await is_over(known["jobid"])


async def test_a_launcher_that_dials_the_wrong_server_is_told_the_right_one(deployment, kernelspecs):
    """Its server lives: the other one knows from the store who it is, and where it belongs."""
    assert await restored_by(deployment) == []
    registry = deployment.registry
    with driven_server() as first:
        assert await call(first, "restore") == []
        known = await call(first, "start", name="slurm")
        (kernel,) = [one for _server, one in await asyncio.to_thread(registry.store.all_kernels)]
        found = await asyncio.to_thread(registry.store.find_launcher, kernel.launcher_id)
        assert found is not None
        its_server, record = found
        name, fields = await answer_of(deployment._socket.port, record)
        assert (name, fields["addresses"]) == ("REDIRECT", list(its_server.addresses))
        assert await call(first, "execute", kernel_id=known["kernel_id"], code="1") == "ok"
        await call(first, "shutdown", kernel_id=known["kernel_id"])
    assert await is_over(known["jobid"])


async def test_a_server_of_another_deployment_takes_nothing(deployment, kernelspecs, admin_settings):
    """Kernels of a plain process are left to their user, who can attach."""
    with driven_server() as first:
        known = await call(first, "start", name="slurm")
        first.signal(signal.SIGKILL)
    other = admin_settings(deployment="another")
    assert await restored_by(other) == []
    assert job_state(known["jobid"]) == "RUNNING"
    (restored,) = await other.run(other.take_over([known["kernel_id"]]))
    await other.run(restored.handle.release())
    assert await is_over(known["jobid"])


def test_a_restored_kernels_spec_may_be_gone(deployment, kernelspecs):
    """Whoever cannot make a manager for it can still end it."""
    install_kernelspec(kernelspecs, "short-lived")
    with driven_server() as first:
        known = first.call("start", name="short-lived")
        first.signal(signal.SIGKILL)
    (restored,) = deployment.submit(deployment.restore()).result(READY)
    deployment.submit(restored.handle.release()).result(READY)
    assert poll(lambda: job_state(known["jobid"]) == "", timeout=READY)
