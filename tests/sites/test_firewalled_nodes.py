"""``connect = auto`` on a real network: direct where the node can be dialled, else the tunnel, with the reason."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socketserver
import threading
from contextlib import suppress

import psutil
import pytest

import gateway_slurm.allocations.start
from gateway_slurm.errors import NodeUnreachable, OutOfReach
from gateway_slurm.link.program import launcher_program
from gateway_slurm.testing.processes import job_processes
from helpers.doctor_cli import REQUEST, check_path, failed_at
from helpers.failing_starts import start_error
from helpers.firewall import HIGH, KERNEL_PORTS, LOW, firewall
from helpers.gateway_process import start, stop
from helpers.kernel_clients import (
    AUTO_KERNEL,
    CURVE,
    PID,
    READY,
    async_execute,
    async_kernel,
    execute,
    forget_service,
    install_auto,
    install_kernelspec,
    poll_async,
    running_kernel,
    write_admin_settings,
)
from helpers.login_node import login_node
from helpers.notebook_server import Frontend, running_server
from helpers.private_slurm import jobs_of, poll

GATEWAY_KERNELS = "--ServerApp.kernel_manager_class=gateway_slurm.SlurmMappingKernelManager"
REJECTIONS = {"tcp reset": "Connection refused", "icmpx admin-prohibited": "No route to host"}


@pytest.fixture(autouse=True)
def auto_kernel(kernelspecs):
    """``slurm-auto``, beside those that force a way."""
    install_auto(kernelspecs)


@pytest.fixture
def network(admin_settings):
    """A firewall before the ports of direct kernels; the service uses these."""
    admin_settings(kernel_ports=KERNEL_PORTS)
    with firewall() as made:
        yield made


@pytest.fixture
def must_be_direct(kernelspecs):
    """A kernelspec that asks for ``connect = direct``."""
    install_kernelspec(kernelspecs, "must", config_overrides={"connect": "direct"}, spec_overrides=CURVE)
    return "must"


@pytest.fixture
def another_service():
    """The port of a server that speaks first to each client, as many do."""

    class Greets(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"220 welcome to another machine, which is not the node\r\n")

    with socketserver.ThreadingTCPServer(("", 0), Greets) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def way(manager):
    """How clients get to it, as its model tells, and the transport that they have been given."""
    told = manager.provisioner.connect
    transport = {"tcp": "direct", "ipc": "tunnel"}[manager.get_connection_info()["transport"]]
    assert told["mode"] == transport
    return told["mode"], told["why"]


async def test_a_node_that_can_be_dialled_is(network, caplog):
    """The kernel is direct, on ports of the range; the log and what the provisioner tells say why."""
    caplog.set_level("INFO")
    async with async_kernel(AUTO_KERNEL) as (manager, client):
        info = manager.get_connection_info()
        assert way(manager) == ("direct", f"node c1 can be dialled at {info['ip']}")
        assert all(LOW <= info[f"{channel}_port"] <= HIGH for channel in ("shell", "iopub", "hb"))
        assert await async_execute(client, "print(6 * 7)") == "42"
        assert (await manager.provisioner.get_provisioner_info())["connect"]["mode"] == "direct"
    assert f"kernel {manager.kernel_id}: direct: node c1 can be dialled at" in caplog.text


@pytest.mark.parametrize("words", REJECTIONS)
def test_a_node_that_refuses_is_reached_through_the_tunnel(network, caplog, words):
    """The firewall's answer is the reason."""
    caplog.set_level("INFO")
    network.reject(words)
    with running_kernel(AUTO_KERNEL) as (manager, client):
        mode, why = way(manager)
        assert mode == "tunnel"
        assert re.fullmatch(rf"node c1 could not be dialled at [\d.]+:\d{{4}}: {REJECTIONS[words]}", why)
        assert execute(client, "print(6 * 7)") == "42"
        assert "curve_publickey" not in manager.get_connection_info()
    assert f"kernel {manager.kernel_id}: tunnel: {why}" in caplog.text


def test_a_node_that_swallows_packets_costs_one_start_a_second(network):
    """The tunnel is used once the dialling timed out; the next start does not dial, and says when it will."""
    network.drop()
    with running_kernel(AUTO_KERNEL) as (manager, client):
        mode, why = way(manager)
        assert mode == "tunnel"
        assert re.fullmatch(r"node c1 could not be dialled at [\d.]+:\d{4}: timed out", why)
        assert execute(client, "print(6 * 7)") == "42"
        seen = network.packets
        assert seen >= 5
        with running_kernel(AUTO_KERNEL) as (other, _client):
            mode, again = way(other)
            assert mode == "tunnel"
            assert again.startswith(why)
            assert re.search(r"next attempt is possible in \d+ s", again)
        assert network.packets == seen


def test_another_service_at_that_address_is_not_taken_for_the_node(network, another_service):
    """Something that accepts connections, and speaks, and does not know the word, is no kernel."""
    network.redirect(another_service)
    with running_kernel(AUTO_KERNEL) as (manager, client):
        mode, why = way(manager)
        assert (mode, "the process that listens there is not its launcher" in why) == ("tunnel", True)
        assert execute(client, "print(6 * 7)") == "42"


def test_a_kernel_without_curve_is_not_dialled(network):
    """It goes through the tunnel, and that is the reason."""
    network.drop()
    with running_kernel("slurm") as (manager, _client):
        assert way(manager) == ("tunnel", "the kernel does not declare CurveZMQ (supported_encryption)")
        assert network.packets == 0


def test_the_network_of_each_start_counts(network):
    """A node that stops accepting, and accepts again: each start falls to what is there."""
    for change, mode in ((network.open, "direct"), (lambda: network.reject("tcp reset"), "tunnel")) * 2:
        change()
        with running_kernel(AUTO_KERNEL) as (manager, client):
            assert way(manager)[0] == mode
            assert execute(client, "print(6 * 7)") == "42"


@pytest.mark.parametrize("how", ["drop", "reject"])
async def test_direct_and_not_to_be_dialled_is_an_error_with_nothing_left(network, must_be_direct, cluster, how):
    """The start says node, address and ports, and what to do; its job goes, and no kernel is left."""
    network.drop() if how == "drop" else network.reject("tcp reset")
    with pytest.raises(NodeUnreachable) as raised:
        async with async_kernel(must_be_direct):
            pass
    words = str(raised.value)
    assert re.search(r"node c1 could not be dialled at [\d.]+:\d{4}: (timed out|Connection refused)", words)
    assert KERNEL_PORTS in words
    assert "connect = auto or tunnel" in words
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)


def test_direct_and_to_be_dialled_is_direct(network, must_be_direct):
    """What was asked for, and that it was tried, is the reason."""
    with running_kernel(must_be_direct) as (manager, _client):
        mode, why = way(manager)
        assert (mode, why.startswith("connect = direct, and node c1 can be dialled")) == ("direct", True)


# -- connections to this server, and from it to Slurm --------------------------------------------------------------

NO_ANSWER, REFUSED = "no answer: the host is down, or a firewall drops", "refused: no program listens there"


@pytest.mark.parametrize(("how", "words"), [("drop", NO_ANSWER), ("reject", REFUSED)])
def test_a_start_names_the_port_that_nodes_must_reach_and_whether_anything_answered(
    admin_settings, cluster, how, words
):
    """The launcher's log is the source; a port whose packets are dropped is not a port that refuses."""
    admin_settings(response_port=str(LOW), link_timeout=5.0 if how == "drop" else 2.0)
    with firewall() as network:
        network.drop() if how == "drop" else network.reject("tcp reset")
        error, _seconds = start_error("slurm")
    assert isinstance(error, OutOfReach)
    assert words in str(error)
    assert re.search(rf"the compute nodes (connect|sends?) to TCP port {LOW} of ", str(error)), str(error)
    assert poll(lambda: jobs_of(cluster) == [], timeout=READY)


@pytest.mark.parametrize("url", ["ssh://127.0.0.1:{port}", "rest+http://127.0.0.1:{port}"])
def test_the_doctor_says_whether_the_way_to_slurm_refuses_or_does_not_answer(service, tmp_path, url):
    """With the port to open, for a login node and for slurmrestd."""
    settings = {"cluster": url.format(port=LOW), "ssh_timeout": 1.0, "command_timeout": 1.0}
    if url.startswith("rest"):
        settings["rest_token_command"] = ["echo", "eyJhbGciOiJIUzI1NiJ9.eyJzdW4iOiJyb290In0.x"]
    write_admin_settings(**settings)
    with firewall() as network:
        for close, words in ((network.drop, NO_ANSWER), (lambda: network.reject("tcp reset"), REFUSED)):
            close()
            assert failed_at(check_path(*REQUEST), "login", words, f"to TCP port {LOW} of 127.0.0.1")


# -- restarts -----------------------------------------------------------------------------------------------------


async def test_a_restart_keeps_a_direct_kernels_ports(network):
    """It is tried at the same ports, and clients that are connected go on."""
    async with async_kernel(AUTO_KERNEL) as (manager, client):
        before = manager.get_connection_info()
        pid = await async_execute(client, PID)
        await manager.restart_kernel()
        await client.wait_for_ready(timeout=READY)
        assert await async_execute(client, PID) != pid
        assert manager.get_connection_info() == before


@pytest.mark.parametrize("now", [False, True], ids=["restart", "restart-now"])
async def test_a_restart_falls_back_where_the_node_can_no_longer_be_dialled(network, now):
    """A client that is made after it reaches the kernel by the tunnel, and a later restart stays there."""
    async with async_kernel(AUTO_KERNEL) as (manager, _client):
        jobid = manager.provisioner.jobid
        network.drop()
        await manager.restart_kernel(now=now)
        mode, why = way(manager)
        assert (mode, why.endswith("timed out")) == ("tunnel", True)
        network.open()
        for _restart in range(2):
            client = manager.client()
            client.start_channels()
            await client.wait_for_ready(timeout=READY)
            assert await async_execute(client, "print(6 * 7)") == "42"
            client.stop_channels()
            await manager.restart_kernel()
            assert way(manager) == (mode, why)
        assert manager.provisioner.jobid == jobid


async def test_a_restart_that_must_be_direct_says_why_it_is_not(admin_settings, must_be_direct, cluster):
    """The error is a start's, and the kernel's place in its job is given up as after any restart that failed."""
    admin_settings(kernel_ports=KERNEL_PORTS, release_grace=0.5)
    with firewall() as network:
        async with async_kernel(must_be_direct) as (manager, _client):
            network.drop()
            with pytest.raises(NodeUnreachable, match="timed out"):
                await manager.restart_kernel(now=True)
            assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)


@pytest.mark.parametrize("how", ["asked for", "died"])
async def test_frontends_go_on_when_a_restart_falls_back(network, jupyter_base, how):
    """Through our kernel manager's websockets a restart that changes the way is as any other, by itself too."""
    write_admin_settings(kernel_ports=KERNEL_PORTS, kept_output=0)  # which would need the tunnel
    with running_server(jupyter_base, GATEWAY_KERNELS) as server:
        kernel_id = await start(server, AUTO_KERNEL)
        frontend = await Frontend.connect(server, kernel_id)
        _reply, pid = await frontend.execute(PID)
        assert (await server.json("GET", f"/api/kernels/{kernel_id}"))["slurm"]["connect"]["mode"] == "direct"
        network.reject("tcp reset")
        if how == "asked for":
            await server.request("POST", f"/api/kernels/{kernel_id}/restart")
        else:
            os.kill(int(pid), signal.SIGKILL)
            await until_tunnelled(server, kernel_id)
        await asyncio.wait_for(frontend.until_ready(), READY)
        assert (await frontend.execute(PID))[1] != pid
        model = await server.json("GET", f"/api/kernels/{kernel_id}")
        assert model["slurm"]["connect"]["mode"] == "tunnel"
        assert "Connection refused" in model["slurm"]["connect"]["why"]
        assert model["execution_state"] == "idle"
        await stop(server, kernel_id)


async def until_tunnelled(server, kernel_id):
    """Poll the kernel's model until it says that its way is the tunnel."""
    for _ in range(10 * READY):
        if (await server.json("GET", f"/api/kernels/{kernel_id}"))["slurm"]["connect"]["mode"] == "tunnel":
            return
        await asyncio.sleep(0.1)
    raise AssertionError("it was not restarted through the tunnel")


# -- others -------------------------------------------------------------------------------------------------------


def test_a_launcher_of_an_older_version_is_not_asked(network, monkeypatch, must_be_direct):
    """One that would break its link for a message that it does not know: the tunnel, or direct as it was before."""
    program = launcher_program()
    news = ['            "probes": True,  # this launcher understands PROBE\n', '    "PROBE": (14, DOWN, JSON)']
    assert all(program.count(each) == 1 for each in news)
    older = program.replace(news[0], "").replace(news[1], "    # ")
    monkeypatch.setattr(gateway_slurm.allocations.start, "launcher_program", lambda: older)
    with running_kernel(AUTO_KERNEL) as (manager, client):
        mode, why = way(manager)
        assert (mode, "of an older version" in why) == ("tunnel", True)
        assert execute(client, "print(6 * 7)") == "42"
    with running_kernel(must_be_direct) as (manager, client):
        mode, why = way(manager)
        assert (mode, "of an older version" in why) == ("direct", True)
        assert execute(client, "print(6 * 7)") == "42"


@pytest.mark.parametrize("mode", ["direct", "tunnel"])
def test_by_way_of_a_login_node_it_is_tried_as_well(admin_settings, mode):
    """The relay says where a launcher comes from; nodes that swallow what comes from here are reached by the tunnel."""
    with login_node() as node, firewall() as network:
        admin_settings(kernel_ports=KERNEL_PORTS, relay="always", **node.settings(node.port))
        if mode == "tunnel":
            network.drop()
        with running_kernel(AUTO_KERNEL) as (manager, client):
            assert way(manager)[0] == mode
            assert execute(client, "print(6 * 7)") == "42"
        forget_service()


def test_nothing_listens_after_a_start_that_used_the_tunnel(network, cluster):
    """The launcher's listeners are gone when its kernel runs."""
    network.reject("tcp reset")
    with running_kernel(AUTO_KERNEL):
        assert poll(lambda: _listening(cluster) == [], timeout=READY)


def _listening(cluster):
    """In that range, and of the cluster's jobs: what else is on the machine may have any port."""
    ports = []
    for process in job_processes(cluster.slurm_conf):
        with suppress(psutil.Error):  # it has just ended
            ports += [one.laddr.port for one in psutil.Process(process.pid).net_connections() if one.status == "LISTEN"]
    return [port for port in ports if LOW <= port <= HIGH]
