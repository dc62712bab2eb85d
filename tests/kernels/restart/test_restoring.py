"""Kernels outlive their server process: the next server has them again, by each access to Slurm.

A test with ``access`` or ``deployment`` runs by Slurm's commands, over SSH and by REST, unless its decorator names one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.errors import AllocationEnded
from gateway_slurm.kernels.model import Phase
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import free_port, job_processes
from helpers.dying_servers import adopt, answer_of, call, driven_server
from helpers.failing_starts import all_nodes_taken, jobs_of_ours
from helpers.kernel_clients import PID, READY, async_execute, install_kernelspec, poll_async
from helpers.login_node import LoginNode, sessions
from helpers.private_slurm import jobs_of, poll, slurm, state_of
from helpers.rest_cluster import cluster_with_rest
from helpers.restarting_servers import LastingFrontend, lasting_server
from helpers.slurm_accesses import BY_COMMANDS, BY_SSH, COMMANDS, EACH_ACCESS_AND_MODE, REST, SSH
from helpers.tcp_proxy import tcp_proxy_to

DEPLOYMENT = "tests"
COUNT = "import time\nfor number in range({}):\n    print(number, flush=True)\n    time.sleep(0.02)\n"
KEEPING = "--ServerApp.kernel_manager_class=gateway_slurm.SlurmMappingKernelManager"


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    """A cluster with slurmrestd, in place of the session's."""
    with cluster_with_rest() as private:
        yield private


@pytest.fixture
def join(access, tmp_path, monkeypatch):
    """``join(heartbeat=1)`` is the service of a deployment with its own store; servers in other processes join it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return lambda **changed: access.service(**{"deployment": DEPLOYMENT, **changed})


@pytest.fixture
def deployment(join):
    """The service of a deployment with its own store; servers in other processes join it."""
    return join()


async def restored_by(service):
    """The kernels that the service restores."""
    return await service.run(service.restore())


async def client_of(manager):
    """A client that is ready."""
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=READY)
    return client


async def is_over(cluster, jobid):
    """Whether the job and all processes of jobs end within ``READY`` seconds."""

    def is_gone():
        return state_of(cluster, jobid) == "" and not job_processes(cluster.slurm_conf)

    return await asyncio.to_thread(poll, is_gone, timeout=READY)


def is_empty(registry):
    """Whether the store has no row of a kernel, a launcher or an allocation."""
    return registry.kernels() == registry.launchers() == registry.allocations() == []


# -- By each access -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "mode", "how"),
    [
        *((COMMANDS, mode, how) for mode in ("tunnel", "direct") for how in ("killed", "left")),
        *((access, mode, how) for access in (SSH, REST) for mode, how in (("tunnel", "killed"), ("direct", "left"))),
    ],
    indirect=["access"],
)
async def test_the_next_process_has_the_kernels_again(deployment, cluster, kernel_name, how):
    """The next process executes, interrupts, restarts and shuts down the kernel as if it had started it."""
    with driven_server() as first:
        known = await call(first, "start", name=kernel_name, slurm_fields={"cpus": 1})
        assert await call(first, "execute", kernel_id=known["kernel_id"], code="x = 41") == "ok"
        if how == "killed":
            first.signal(signal.SIGKILL)
        else:
            await call(first, "close", leave=True)
            first.end()
    assert state_of(cluster, known["jobid"]) == "RUNNING"
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
    assert await is_over(cluster, known["jobid"])
    assert is_empty(deployment.registry)


@EACH_ACCESS_AND_MODE
async def test_a_kernel_whose_job_ended_meanwhile_is_dead_with_slurms_word(deployment, cluster, kernel_name):
    """No launcher connects: the server asks Slurm, which reports that the job is over."""
    with driven_server() as first:
        known = await call(first, "start", name=kernel_name)
        first.signal(signal.SIGKILL)
    slurm("scancel", known["jobid"], cluster=cluster)
    assert await is_over(cluster, known["jobid"])
    (restored,) = await restored_by(deployment)
    manager = adopt(restored, kernel_name)
    reason = await manager.provisioner.until_over()
    assert f"job {known['jobid']}" in reason
    assert await manager.provisioner.poll() == -signal.SIGKILL
    with pytest.raises(AllocationEnded):
        await manager.restart_kernel(now=True)
    await manager.shutdown_kernel(now=True)
    assert is_empty(deployment.registry)


async def test_several_kernels_of_one_job_are_back_together(deployment, cluster, kernelspecs):
    """One shares the job and one has its own step; the next server adds one, and the job ends with the last."""
    shared = {"slurm_fields": {"share": True, "cpus": 2, "memory": "500M"}, "slurm_owner": "ada"}
    with driven_server() as first:
        one = await call(first, "start", name="slurm", **shared)
        two = await call(first, "start", name="slurm-direct", **shared)
        fields = {"jobid": one["jobid"], "isolate": True, "cpus": 1, "memory": "200M"}
        isolated = {"slurm_fields": fields, "slurm_owner": "ada"}
        three = await call(first, "start", name="slurm", **isolated)
        assert one["jobid"] == two["jobid"] == three["jobid"]
        assert await call(first, "execute", kernel_id=three["kernel_id"], code="x = 41") == "ok"
        first.signal(signal.SIGKILL)
    names = {one["kernel_id"]: "slurm", two["kernel_id"]: "slurm-direct", three["kernel_id"]: "slurm"}
    restored = await restored_by(deployment)
    assert {kernel.record.kernel_id for kernel in restored} == set(names)
    assert [row["owner"] for row in deployment.allocations_of(None)] == ["ada"]
    managers = {kernel.record.kernel_id: adopt(kernel, names[kernel.record.kernel_id]) for kernel in restored}
    for known in (one, two, three):
        client = await client_of(managers[known["kernel_id"]])
        assert await async_execute(client, PID) == str(known["pid"])
        if known is three:
            assert await async_execute(client, "print(x + 1)") == "42"
        client.stop_channels()
    further = AsyncKernelManager(kernel_name="slurm")
    await further.start_kernel(**isolated)
    assert further.provisioner.jobid == one["jobid"]
    for manager in (further, managers[three["kernel_id"]]):
        await manager.shutdown_kernel()
        assert state_of(cluster, one["jobid"]) == "RUNNING"
    for known in (one, two):
        await managers[known["kernel_id"]].shutdown_kernel()
    assert await is_over(cluster, one["jobid"])


@pytest.mark.parametrize("how", ["killed", "left"])
async def test_a_start_that_waits_in_the_queue_is_given_up_with_its_job(deployment, cluster, kernelspecs, how):
    """No client waits for the kernel any more, so its job must not wait either."""
    with all_nodes_taken(cluster) as filler:
        with driven_server() as first:
            await call(first, "begin", name="slurm")
            assert await asyncio.to_thread(poll, lambda: len(jobs_of_ours(cluster)) == 1, timeout=READY)
            if how == "killed":
                first.signal(signal.SIGKILL)
            else:
                await call(first, "close", leave=True)
                first.end()
        if how == "killed":
            assert await restored_by(deployment) == []
        assert await asyncio.to_thread(poll, lambda: jobs_of_ours(cluster) == [], timeout=READY)
        assert state_of(cluster, filler) == "RUNNING"


async def test_a_kept_job_without_kernels_is_back_too(deployment, cluster, kernelspecs):
    """The next process lists the job, and ends it when the user releases it."""
    with driven_server() as first:
        known = await call(first, "start", name="slurm", slurm_fields={"keep_allocation": True})
        await call(first, "shutdown", kernel_id=known["kernel_id"])
        first.signal(signal.SIGKILL)
    assert await restored_by(deployment) == []
    (row,) = deployment.allocations_of("")
    assert (row["jobid"], row["kept"], row["kernel_ids"]) == (known["jobid"], True, [])
    await deployment.run(deployment.release_allocation("", known["jobid"]))
    assert await is_over(cluster, known["jobid"])


@EACH_ACCESS_AND_MODE
async def test_another_server_of_the_deployment_takes_over_while_it_runs(deployment, access, cluster, kernel_name):
    """A running server finds that another one died, and takes its kernels without a restart.

    Over SSH its relay keeps its port, and listens on the port of the dead server's relay as well.
    """
    claimed = []
    deployment.on_claimed = claimed.extend
    assert await restored_by(deployment) == []
    await deployment.run(deployment.access.wait_ready())
    port = deployment.access.relay.port if access.name == SSH else None
    with driven_server() as first:
        assert await call(first, "restore") == []
        known = await call(first, "start", name=kernel_name)
        first.signal(signal.SIGKILL)
        assert await poll_async(lambda: claimed, timeout=READY)
    manager = adopt(claimed[0], kernel_name)
    client = await client_of(manager)
    assert await async_execute(client, PID) == str(known["pid"])
    client.stop_channels()
    if access.name == SSH:
        assert deployment.access.relay.port == port
        assert len(deployment.access.relay.records) == 2
    await manager.shutdown_kernel()
    assert await is_over(cluster, known["jobid"])


# -- By Slurm's commands: what does not depend on the access -------------------------------------------------


@BY_COMMANDS
async def test_a_direct_kernel_is_restarted_where_its_clients_are_connected(
    deployment, cluster, kernelspecs, monkeypatch
):
    """The launcher may connect to the next process from another address of its node."""
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
    assert await is_over(cluster, known["jobid"])


@BY_COMMANDS
async def test_a_server_that_dies_before_a_launcher_came_to_it_costs_nothing(deployment, cluster, kernelspecs):
    """Launchers know the address of the first server: the next servers listen there, too."""
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
    assert await is_over(cluster, known["jobid"])


@BY_COMMANDS
async def test_a_kernel_that_ends_without_a_server_is_dead_with_its_last_words(
    deployment, cluster, kernel_name, tmp_path
):
    """The next process gets the exit code and the end of standard error; the kernel can start again in its place."""
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
    manager = adopt(restored, kernel_name)
    await manager.restart_kernel(now=True)
    client = await client_of(manager)
    assert await async_execute(client, "print(1)") == "1"
    client.stop_channels()
    await manager.shutdown_kernel(now=True)
    assert await is_over(cluster, known["jobid"])


@BY_COMMANDS
async def test_a_server_that_slept_through_its_lease_ends_nothing(join, cluster, store_url):
    """Another server has the kernel: the sleeper finds that out when it wakes, drops the kernel, and can close."""
    deployment = join(store_url=store_url)
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
    assert await is_over(cluster, known["jobid"])


@BY_COMMANDS
async def test_a_launcher_that_dials_the_wrong_server_is_redirected(deployment, cluster, kernelspecs):
    """Its server lives: the other server finds the launcher in the store, and answers with that server's address."""
    assert await restored_by(deployment) == []
    registry = deployment.registry
    with driven_server() as first:
        assert await call(first, "restore") == []
        known = await call(first, "start", name="slurm")
        (kernel,) = [record for _server, record in await asyncio.to_thread(registry.store.all_kernels)]
        found = await asyncio.to_thread(registry.store.find_launcher, kernel.launcher_id)
        assert found is not None
        its_server, record = found
        name, fields = await answer_of(deployment._socket.port, record)
        assert (name, fields["addresses"]) == ("REDIRECT", list(its_server.addresses))
        assert await call(first, "execute", kernel_id=known["kernel_id"], code="1") == "ok"
        await call(first, "shutdown", kernel_id=known["kernel_id"])
    assert await is_over(cluster, known["jobid"])


@BY_COMMANDS
async def test_a_server_of_another_deployment_takes_nothing(join, cluster, kernelspecs):
    """Kernels of another deployment stay as they are; their user can attach to them."""
    with driven_server() as first:
        known = await call(first, "start", name="slurm")
        first.signal(signal.SIGKILL)
    other = join(deployment="another")
    assert await restored_by(other) == []
    assert state_of(cluster, known["jobid"]) == "RUNNING"
    (restored,) = await other.run(other.take_over([known["kernel_id"]]))
    await other.run(restored.handle.release())
    assert await is_over(cluster, known["jobid"])


@BY_COMMANDS
def test_a_restored_kernels_spec_may_be_gone(deployment, cluster, kernelspecs):
    """A server that cannot make a manager for the kernel can still end it."""
    install_kernelspec(kernelspecs, "short-lived")
    with driven_server() as first:
        known = first.call("start", name="short-lived")
        first.signal(signal.SIGKILL)
    (restored,) = deployment.submit(deployment.restore()).result(READY)
    deployment.submit(restored.handle.release()).result(READY)
    assert poll(lambda: state_of(cluster, known["jobid"]) == "", timeout=READY)


# -- Over SSH: relays and other processes on the login node --------------------------------------------------


def relays(node: LoginNode) -> list[psutil.Process]:
    """The processes on the login node that listen on a port."""
    found = []
    for process in sessions(node):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if any(connection.status == "LISTEN" for connection in process.net_connections()):
                found.append(process)
    return found


async def restored_and_shut_down(service, cluster, known):
    """Restore the kernel, check that it is the one that ran before, and shut it down."""
    (restored,) = await restored_by(service)
    manager = adopt(restored, "slurm")
    client = await client_of(manager)
    assert restored.handle.process.phase is Phase.RUNNING
    assert await async_execute(client, PID) == str(known["pid"])
    client.stop_channels()
    await manager.shutdown_kernel()
    assert await is_over(cluster, known["jobid"])


@BY_SSH
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
async def test_a_cell_runs_through_the_servers_restart_with_all_of_its_output(
    access, node, gateway_environment, kernelspecs, cluster, signum
):
    """No port is set. Every number comes once; after a kill a few come twice. The session and the kernel stay."""
    access.service()
    with lasting_server(gateway_environment / f"ssh-{signum}", KEEPING) as lasting:
        me = lasting.of("me")
        body = {"path": "c.ipynb", "name": "c.ipynb", "type": "notebook", "kernel": {"name": "slurm"}}
        session = await me.json("POST", "/api/sessions", body)
        frontend = LastingFrontend(me, session["kernel"]["id"])
        pid = (await frontend.execute(PID))[1]
        cell = await frontend.send(COUNT.format(400))
        await frontend.until(lambda one: "30\n" in one.printed(cell))
        await asyncio.to_thread(lasting.restart, signum)
        if signum == signal.SIGKILL:  # and again, perhaps before a launcher has connected
            await asyncio.to_thread(lasting.restart, signum)
        reply, printed = await frontend.result(cell)
        assert reply["status"] == "ok"
        lines = printed.split()
        assert list(dict.fromkeys(lines)) == [str(number) for number in range(400)]
        assert len(lines) - 400 <= (10 if signum == signal.SIGKILL else 0)
        assert (await frontend.execute(PID))[1] == pid
        assert len(relays(node)) == 1
        await frontend.close()
        await me.request("DELETE", f"/api/sessions/{session['id']}")
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)
    assert await poll_async(lambda: sessions(node) == [], timeout=15)


@BY_SSH
async def test_a_relay_that_does_not_know_that_its_server_died_is_ended_by_the_next_one(deployment, cluster, node):
    """If the server's machine went down, sshd has not noticed, and the old relay holds the port that launchers dial."""
    with driven_server() as first:
        known = await call(first, "start", name="slurm")
        (old,) = relays(node)
        sshd = old.parent()
        assert sshd is not None
        sshd.suspend()
        try:
            first.signal(signal.SIGKILL)
            await restored_and_shut_down(deployment, cluster, known)
            assert await poll_async(lambda: not old.is_running() or old.status() == psutil.STATUS_ZOMBIE, timeout=10)
        finally:
            sshd.resume()


@BY_SSH
async def test_the_one_port_of_the_settings_is_taken_from_a_relay_that_does_not_know(join, cluster, node):
    """The old relay must free its port, since the settings allow no other."""
    deployment = join(relay_port=str(free_port()))
    with driven_server() as first:
        known = await call(first, "start", name="slurm")
        sshd = relays(node)[0].parent()
        assert sshd is not None
        sshd.suspend()
        try:
            first.signal(signal.SIGKILL)
            await restored_and_shut_down(deployment, cluster, known)
        finally:
            sshd.resume()


@BY_SSH
@pytest.mark.parametrize("how", ["killed", "silent"])
async def test_nothing_of_a_server_that_is_gone_stays_on_the_login_node(join, node, cluster, how):
    """The server is killed or unplugged: its programs end, and srun ends after ``orphan_timeout``."""
    with tcp_proxy_to(node.port) as line:
        join(heartbeat=1.0, orphan_timeout=4, **node.settings(line.port))
        with driven_server() as first:
            known = await call(first, "start", name="slurm")
            isolated = {"jobid": known["jobid"], "isolate": True, "cpus": 1}
            await call(first, "start", name="slurm", slurm_fields=isolated)
            assert len(sessions(node)) >= 3
            if how == "killed":
                first.signal(signal.SIGKILL)
            else:
                line.freeze()
            assert await poll_async(lambda: relays(node) == [], timeout=15)
            if how == "silent":
                first.signal(signal.SIGKILL)
                line.cut()
    assert await poll_async(lambda: sessions(node) == [], timeout=15)
    assert await is_over(cluster, known["jobid"])
    assert await poll_async(lambda: _sruns(cluster) == [], timeout=READY)


def _sruns(cluster) -> list[psutil.Process]:
    found = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "srun"]
    return [process for process in found if str(cluster.slurm_conf) in _environment(process)]


def _environment(process: psutil.Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
    except OSError:
        return ""
