"""Servers that reach Slurm by a login node end, and the next ones have their kernels: by the same relay's port."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gateway_slurm.kernels.model import Phase
from gateway_slurm.service import SlurmService
from gateway_slurm.testing.processes import free_port
from helpers.dying_servers import adopt, call, driven_server
from helpers.kernel_clients import PID, READY, async_execute, job_state, poll_async, write_admin_settings
from helpers.login_node import LoginNode, login_node, sessions
from helpers.private_slurm import jobs_of, poll
from helpers.restarting_servers import LastingFrontend, lasting_server
from helpers.tcp_proxy import tcp_proxy_to

COUNT = "import time\nfor number in range({}):\n    print(number, flush=True)\n    time.sleep(0.02)\n"
KEEPING = "--ServerApp.kernel_manager_class=gateway_slurm.SlurmMappingKernelManager"


@pytest.fixture(scope="module")
def node() -> Iterator[LoginNode]:
    """A login node that forwards nothing."""
    with login_node() as node:
        yield node


@pytest.fixture
def by_ssh(
    node: LoginNode, admin_settings: Callable[..., SlurmService], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., SlurmService]]:
    """``by_ssh(heartbeat=1)`` is the service of a deployment that launchers reach by the relay alone.

    Servers in other processes are of the same deployment. At the end nothing of any is left on the login node.
    """
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def make(**traits: object) -> SlurmService:
        return admin_settings(**{"relay": "always", "deployment": "tests", **node.settings(), **traits})

    yield make
    if SlurmService._instance is not None:
        SlurmService._instance.close()
    assert poll(lambda: sessions(node) == [], timeout=15), sessions(node)


def relays(node: LoginNode) -> list[psutil.Process]:
    """Those of them that listen."""
    found = []
    for one in sessions(node):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if any(each.status == "LISTEN" for each in one.net_connections()):
                found.append(one)
    return found


async def restored_kernel(service: SlurmService, known: dict[str, object]) -> None:
    """The kernel is this service's, runs as before, and is shut down."""
    (restored,) = await service.run(service.restore())
    manager = adopt(restored, "slurm")
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=READY)
    assert restored.handle.process.phase is Phase.RUNNING
    assert await async_execute(client, PID) == str(known["pid"])
    client.stop_channels()
    await manager.shutdown_kernel()
    assert await poll_async(lambda: job_state(str(known["jobid"])) == "", timeout=READY)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
async def test_a_cell_runs_through_the_servers_restart_with_all_of_its_output(
    node, gateway_environment, kernelspecs, cluster, signum
):
    """No port is set. Every number comes, once or, after a kill, some twice; the session and the kernel stay."""
    settings = write_admin_settings(**{"relay": "always", **node.settings()})
    with lasting_server(gateway_environment / f"ssh-{signum}", KEEPING) as lasting:
        me = lasting.of("me")
        body = {"path": "c.ipynb", "name": "c.ipynb", "type": "notebook", "kernel": {"name": "slurm"}}
        session = await me.json("POST", "/api/sessions", body)
        frontend = LastingFrontend(me, session["kernel"]["id"])
        pid = (await frontend.execute(PID))[1]
        cell = await frontend.send(COUNT.format(400))
        await frontend.until(lambda one: "30\n" in one.printed(cell))
        await asyncio.to_thread(lasting.restart, signum)
        if signum == signal.SIGKILL:  # and once more, before a launcher may have come
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
    settings.unlink()


async def test_a_relay_that_does_not_know_that_its_server_died_is_ended_by_the_next_ones(by_ssh, node):
    """sshd may not have noticed, as when the server's machine went down: it has the port that launchers dial."""
    service = by_ssh()
    with driven_server() as first:
        known = await call(first, "start", name="slurm")
        (old,) = relays(node)
        sshd = old.parent()
        assert sshd is not None
        sshd.suspend()
        try:
            first.signal(signal.SIGKILL)
            await restored_kernel(service, known)
            assert await poll_async(lambda: not old.is_running() or old.status() == psutil.STATUS_ZOMBIE, timeout=10)
        finally:
            sshd.resume()


async def test_a_port_that_is_set_is_had_again_from_a_relay_that_does_not_know(by_ssh, node):
    """The same with one port only, which nothing else can take the place of."""
    service = by_ssh(relay_port=str(free_port()))
    with driven_server() as first:
        known = await call(first, "start", name="slurm")
        sshd = relays(node)[0].parent()
        assert sshd is not None
        sshd.suspend()
        try:
            first.signal(signal.SIGKILL)
            await restored_kernel(service, known)
        finally:
            sshd.resume()


async def test_another_server_that_is_there_answers_at_the_dead_ones_port(by_ssh, node):
    """It has a relay of its own, with a port of its own, which stays as it is."""
    service = by_ssh()
    claimed: list[object] = []
    service.on_claimed = claimed.extend
    assert await service.run(service.restore()) == []
    await service.run(service.access.wait_ready())
    relay = service.access.relay
    own = relay.port
    with driven_server() as first:
        assert await call(first, "restore") == []
        known = await call(first, "start", name="slurm")
        first.signal(signal.SIGKILL)
        assert await poll_async(lambda: claimed, timeout=READY)
    manager = adopt(claimed[0], "slurm")
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=READY)
    assert await async_execute(client, PID) == str(known["pid"])
    client.stop_channels()
    assert relay.port == own
    assert len(relay.records) == 2
    await manager.shutdown_kernel()
    assert await poll_async(lambda: job_state(str(known["jobid"])) == "", timeout=READY)


@pytest.mark.parametrize("how", ["killed", "silent"])
async def test_nothing_of_a_server_that_is_gone_stays_on_the_login_node(by_ssh, node, cluster, how):
    """Killed, or unplugged so that nobody is told: its programs end, and so does srun after ``orphan_timeout``."""
    with tcp_proxy_to(node.port) as line:
        by_ssh(heartbeat=1.0, orphan_timeout=4, **node.settings(line.port))
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
    assert await poll_async(lambda: job_state(known["jobid"]) == "", timeout=READY)
    assert await poll_async(lambda: _sruns(cluster) == [], timeout=READY)


def _sruns(cluster) -> list[psutil.Process]:
    found = [one for one in psutil.process_iter(["name"]) if one.info["name"] == "srun"]
    return [one for one in found if str(cluster.slurm_conf) in _environment(one)]


def _environment(process: psutil.Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
    except OSError:
        return ""
