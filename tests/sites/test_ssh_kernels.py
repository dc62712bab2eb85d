"""Kernels by way of a login node that forwards nothing: Slurm's commands over SSH, launchers by the relay there."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.kernels.model import Phase
from gateway_slurm.service import SlurmService
from helpers.failing_starts import nothing_left, script, start_error
from helpers.kernel_clients import (
    PID,
    READY,
    async_kernel,
    execute,
    jobid_of,
    processes_of_job,
    running_kernel,
    until_printed,
    until_reply,
)
from helpers.login_node import LoginNode, sessions
from helpers.private_slurm import jobs_of, poll
from helpers.tcp_proxy import TcpProxy, tcp_proxy_to

KILLED_FOR = 20.0  # seconds


@pytest.fixture
def line(node: LoginNode) -> Iterator[TcpProxy]:
    """What lies between the server and the login node."""
    with tcp_proxy_to(node.port) as line:
        yield line


@pytest.fixture
def by_ssh(
    node: LoginNode, line: TcpProxy, admin_settings: Callable[..., SlurmService]
) -> Iterator[Callable[..., SlurmService]]:
    """``by_ssh(relay="never")`` returns a service that logs in to the node; after the test nothing of it is left."""

    def make(**traits: object) -> SlurmService:
        return admin_settings(**{"relay": "always", **node.settings(line.port), **traits})

    yield make
    if SlurmService._instance is not None:
        SlurmService._instance.close()
    assert poll(lambda: sessions(node) == [], timeout=15), sessions(node)


@contextmanager
def unreachable(service: SlurmService) -> Iterator[None]:
    """No process answers at the server's own address."""
    service.submit(service.open()).result(READY)
    service.addresses.direct = ["127.0.0.1:9"]
    yield


def relay_of(service: SlurmService) -> Any:
    """The server's end of the relay."""
    return service.access.relay  # type: ignore[attr-defined]


async def test_100_mb_of_output_arrive_whole(by_ssh):
    """Through the SSH session's own channel, while the interrupt still gets there."""
    by_ssh()
    async with async_kernel("slurm") as (manager, client):
        msg_id = client.execute("for n in range(100): print('x' * 999_999)")
        size = 0
        while True:
            message = await client.get_iopub_msg(timeout=READY)
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            if message["msg_type"] == "stream":
                size += len(message["content"]["text"])
            elif message["content"].get("execution_state") == "idle":
                break
        assert size == 100_000_000
        client.execute("while True: print('x' * 100_000, flush=True)")
        await until_printed(client, "x")
        began = time.monotonic()
        await manager.interrupt_kernel()
        assert (await client.get_shell_msg(timeout=READY))["content"]["status"] in ("ok", "error")
        assert time.monotonic() - began < 20


class Lines:
    """What a cell prints, as it comes."""

    def __init__(self, client: Any, msg_id: str) -> None:
        self._client, self._msg_id = client, msg_id
        self.text = ""

    def until(self, wanted: str | None) -> None:
        """Read until it was printed, or for None to the cell's end."""
        while wanted is None or wanted not in self.text:
            message = self._client.get_iopub_msg(timeout=READY)
            if message["parent_header"].get("msg_id") != self._msg_id:
                continue
            if message["msg_type"] == "stream":
                self.text += message["content"]["text"]
            elif message["content"].get("execution_state") == "idle":
                return


@pytest.mark.slow
def test_a_cell_goes_on_while_the_connection_is_killed_for_20_s(by_ssh, line, caplog):
    """All its lines come once, in order; launchers come back by the same port; Slurm is reached again."""
    service = by_ssh()
    with running_kernel("slurm") as (manager, client):
        process, port = manager.provisioner._handle.process, relay_of(service).port
        pid = execute(client, PID)
        code = "import time\nfor n in range(250): print(n, flush=True); time.sleep(0.1)"
        msg_id = client.execute(code)
        lines = Lines(client, msg_id)
        lines.until("\n20\n")
        line.cut()
        began = time.monotonic()
        assert poll(lambda: process.phase is Phase.LOST, timeout=10)
        assert poll(lambda: time.monotonic() - began > KILLED_FOR, timeout=KILLED_FOR + 1)
        line.mend()
        lines.until(None)
        assert lines.text.split() == [str(n) for n in range(250)]
        assert until_reply(client, msg_id)["content"]["status"] == "ok"
        assert process.phase is Phase.RUNNING
        assert execute(client, PID) == pid
        assert relay_of(service).port == port
        assert "the connection to the login node was lost" in caplog.text or "link is down" in caplog.text


def test_a_relay_that_dies_is_there_again(by_ssh, node):
    """Its port stays the same, and the launcher finds it over the same connection."""
    service = by_ssh()
    with running_kernel("slurm") as (manager, client):
        relay, process = relay_of(service), manager.provisioner._handle.process
        execute(client, "kept = 1")
        port, pid = relay.port, relay._process["pid"]
        os.kill(pid, signal.SIGKILL)
        assert poll(lambda: process.phase is Phase.LOST, timeout=10)
        assert poll(lambda: process.phase is Phase.RUNNING, timeout=20)
        assert execute(client, "print(kept)") == "1"
        assert relay.port == port
        assert relay._process["pid"] != pid
        assert service.runner.connection.counts["connect"] == 1


def test_an_old_relay_that_does_not_know_that_its_connection_broke_is_ended(by_ssh, line):
    """sshd may not have noticed: it would hold the port without a limit."""
    service = by_ssh()
    with running_kernel("slurm") as (manager, client):
        relay, process = relay_of(service), manager.provisioner._handle.process
        old = psutil.Process(relay._process["pid"])
        sshd = old.parent()
        assert sshd is not None
        sshd.suspend()  # it hears of nothing
        try:
            line.cut()
            assert poll(lambda: process.phase is Phase.LOST, timeout=10)
            assert old.is_running()
            line.mend()
            assert poll(lambda: process.phase is Phase.RUNNING, timeout=20)
            assert execute(client, "print(6)") == "6"
            assert poll(lambda: not old.is_running() or old.status() == psutil.STATUS_ZOMBIE, timeout=10)
        finally:
            sshd.resume()


def test_a_warm_start_needs_no_new_connection_channel_or_round_trip_but_slurms_commands(by_ssh):
    """Counted: sbatch is one request, each look at the waiting job one more, and that is all."""
    service = by_ssh(watch_interval=60.0)
    counts = service.runner.connection.counts
    with running_kernel("slurm") as (_manager, client):
        execute(client, "print(1)")
        assert dict(counts) == {"connect": 1, "connected": 1, "channel": 2, "request": 1}
        with running_kernel("slurm-direct") as (_other, second):
            execute(second, "print(2)")
            assert dict(counts) == {"connect": 1, "connected": 1, "channel": 2, "request": 2}
            assert dict(service.runner.counts) == {"sbatch": 2}


def test_launchers_that_reach_the_server_do_not_take_the_relay(by_ssh):
    """``auto``: the server's own addresses come first, and all that the relay costs is a process that waits."""
    service = by_ssh(relay="auto")
    with running_kernel("slurm") as (_manager, client):
        assert execute(client, "print(1)") == "1"
        relay = relay_of(service)
        assert not relay.was_used
        endpoints = service.access.endpoints(["own:1"])
        assert endpoints[0] == "own:1"
        assert set(relay.endpoints) < set(endpoints)
        relay.was_used = True
        assert service.access.endpoints(["own:1"])[-1] == "own:1"


def test_launchers_that_reach_only_the_login_node_find_it(by_ssh):
    """``auto``, with a server's address that does not answer: the relay's addresses are tried after it."""
    service = by_ssh(relay="auto")
    with unreachable(service), running_kernel("slurm") as (_manager, client):
        assert execute(client, "print(1)") == "1"
        assert relay_of(service).was_used


def test_without_a_relay_launchers_dial_the_server_itself(by_ssh):
    """``never``: no further program runs on the login node."""
    service = by_ssh(relay="never")
    with running_kernel("slurm") as (_manager, client):
        assert execute(client, "print(1)") == "1"
        assert relay_of(service) is None
        assert service.runner.connection.counts["channel"] == 1


def test_a_job_whose_submission_was_not_answered_is_found(by_ssh, line, cluster, tmp_path):
    """The connection breaks between the job's making and sbatch's answer: the start goes on, with that one job."""
    made = tmp_path / "made"
    script(
        tmp_path / "sbatch",
        f'#!/bin/sh\n{shutil.which("sbatch")} "$@" >{made}.part && mv {made}.part {made}; sleep 600\n',
    )
    service = by_ssh(slurm_path=f"{tmp_path}:{os.environ['PATH']}")

    def cut_then() -> None:
        assert poll(made.exists, timeout=READY)
        line.cut()
        line.mend()

    cutting = threading.Thread(target=cut_then)
    cutting.start()
    with running_kernel("slurm") as (manager, client):
        cutting.join()
        assert execute(client, "print(6)") == "6"
        assert jobid_of(manager) == made.read_text().strip()
        assert service.runner.counts["sbatch"] == 1
    assert nothing_left(cluster)


def test_a_port_that_is_taken_is_an_error_with_the_setting(by_ssh, node, cluster):
    """``always``: no job is submitted whose launcher could not come."""
    by_ssh(relay_port=str(node.port))
    error, _seconds = start_error("slurm")
    assert "relay_port" in str(error)
    assert "Address already in use" in str(error)
    assert jobs_of(cluster) == []


def test_a_login_node_that_is_away_is_an_error_and_no_job(by_ssh, line, cluster):
    """The message names the host; nothing hangs."""
    line.cut()
    service = by_ssh()
    error, seconds = start_error("slurm")
    assert isinstance(error, GatewaySlurmError)
    assert f"127.0.0.1:{line.port}" in str(error)
    assert seconds < 20
    assert str(line.port) in service.submit(service.why_not_ready()).result(READY)
    assert jobs_of(cluster) == []


def test_a_server_that_is_killed_leaves_nothing_on_the_login_node(by_ssh, node, line):
    """Its programs there end with their channels."""
    by_ssh()
    with running_kernel("slurm") as (_manager, client):
        execute(client, "print(1)")
        assert sessions(node)
        line.cut()
        assert poll(lambda: sessions(node) == [], timeout=15), sessions(node)
        line.mend()
        assert execute(client, "print(2)") == "2"


def test_what_travels_by_the_relay_is_sealed(by_ssh, node):
    """Its process on the login node never holds what a cell says; here: what it reads from the launcher's socket."""
    service = by_ssh()
    seen: list[bytes] = []
    with running_kernel("slurm") as (_manager, client):
        relay = relay_of(service)
        original = relay._received
        relay._program._on_frames = lambda frames: (seen.extend(each[2] for each in frames), original(frames))
        assert execute(client, "print('open ' + 'sesame')") == "open sesame"
    assert seen
    assert not any(b"sesame" in each for each in seen)


def test_the_token_is_in_no_command_line(by_ssh):
    """Not on the login node, not in the job."""
    by_ssh()
    with running_kernel("slurm") as (manager, client):
        execute(client, "print(1)")
        jobs = processes_of_job(jobid_of(manager))
        assert jobs
        lines = [" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
        assert not any("GATEWAY_SLURM_TOKEN" in each for each in lines)
