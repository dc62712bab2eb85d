"""How much of a login node is used: one connection for all users, few sessions, and patience where it is busy."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from gateway_slurm.errors import SshError, SshLost
from gateway_slurm.service import SlurmService
from helpers.failing_starts import nothing_left, script, start_error
from helpers.kernel_clients import PID, READY, async_execute, async_kernel, execute, running_kernel, until_printed
from helpers.login_node import LoginNode, login_node
from helpers.private_slurm import jobs_of, poll
from helpers.ssh_login import logged_in
from helpers.tcp_proxy import tcp_proxy_to


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user who runs the tests may have SSH keys."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
def by_ssh(admin_settings: Callable[..., SlurmService]) -> Iterator[Callable[..., SlurmService]]:
    """``by_ssh(node)`` returns a service that is reached by the relay of this login node alone."""

    def make(node: LoginNode, port: int = 0, **traits: object) -> SlurmService:
        settings = node.settings(port) if port else node.settings()
        return admin_settings(**{"relay": "always", **settings, **traits})

    yield make
    if SlurmService._instance is not None:
        SlurmService._instance.close()


def test_all_owners_and_kernels_share_one_connection_of_two_sessions(by_ssh, cluster):
    """As sshd counts them; ``MaxSessions 2`` is enough, also for srun."""
    with login_node(options=("MaxSessions 2",)) as node:
        service = by_ssh(node)
        with ExitStack() as stack:
            clients = [
                stack.enter_context(running_kernel("slurm", slurm_owner=owner))[1] for owner in ("ada", "bob", "bob")
            ]
            assert len({execute(client, PID) for client in clients}) == 3
            assert node.log.count("Accepted publickey") == 1
            assert service.runner.connection.counts["channel"] == 2
            assert len(node.connections()) == 1
        assert nothing_left(cluster)
        assert node.log.count("Accepted publickey") == 1


def test_a_start_takes_the_round_trips_that_it_needs(by_ssh):
    """Counted on the wire: a cold one logs in and starts two programs there; a warm one asks for its job."""
    with login_node() as node, tcp_proxy_to(node.port) as line:
        by_ssh(node, line.port, relay="auto", watch_interval=60.0, heartbeat=60)
        with running_kernel("slurm"):
            cold = line.round_trips
            # The greeting, three for the keys, the user with one key, a service; each program's channel, start, word.
            assert 10 <= cold <= 16
            with running_kernel("slurm-direct"):
                # A channel's window may be widened meanwhile.
                assert 1 <= line.round_trips - cold <= 2


def test_an_sshd_that_allows_one_session_only_is_an_error_with_its_setting(by_ssh, cluster):
    """No job is submitted whose launcher could not come."""
    with login_node(options=("MaxSessions 1",)) as node:
        by_ssh(node)
        error, _seconds = start_error("slurm")
        assert isinstance(error, SshError)
        assert "MaxSessions" in str(error)
        assert jobs_of(cluster) == []


def at_the_door(node: LoginNode) -> socket.socket:
    """The connections that sshd waits for to log in; there were no others before."""
    found: list[socket.socket] = []

    def let_in() -> bool:
        stranger = socket.create_connection(("127.0.0.1", node.port))
        if stranger.recv(4) != b"SSH-":
            stranger.close()
            return False
        found.append(stranger)
        return True

    assert poll(let_in, timeout=20)
    return found[0]


def test_a_busy_sshd_is_tried_again():
    """It turns us away as long as others are at its door (``MaxStartups``)."""
    with login_node(options=("MaxStartups 1",)) as node:
        stranger = at_the_door(node)
        turned_away = len(node.log)

        def leave() -> None:
            assert poll(lambda: "MaxStartups" in node.log[turned_away:], timeout=20)
            stranger.close()

        leaving = threading.Thread(target=leave)
        leaving.start()
        assert logged_in(node.url, identities=(node.key,), known=node.known_hosts())
        leaving.join()


def test_an_sshd_that_stays_busy_is_an_error_after_a_few_seconds():
    """In which it is named what may be the matter."""
    with login_node(options=("MaxStartups 1",)) as node:
        with at_the_door(node):
            began = time.monotonic()
            with pytest.raises(SshError, match="MaxStartups"):
                logged_in(node.url, identities=(node.key,), known=node.known_hosts())
            assert time.monotonic() - began < 15
        assert logged_in(node.url, identities=(node.key,), known=node.known_hosts())


def test_a_submission_that_was_cut_off_before_it_was_made_leaves_no_job(by_ssh, cluster, tmp_path):
    """The connection breaks while sbatch has not reached Slurm: it is killed there; the error says what was lost."""
    begun = tmp_path / "begun"
    script(tmp_path / "sbatch", f'#!/bin/sh\ntouch {begun}; sleep 600; exec {shutil.which("sbatch")} "$@"\n')
    with login_node() as node, tcp_proxy_to(node.port) as line:
        by_ssh(node, line.port, slurm_path=f"{tmp_path}:{os.environ['PATH']}")

        def cut_then() -> None:
            assert poll(begun.exists, timeout=READY)
            line.cut()
            line.mend()

        cutting = threading.Thread(target=cut_then)
        cutting.start()
        error, seconds = start_error("slurm")
        cutting.join()
        assert isinstance(error, SshLost)
        assert seconds < 20
        assert jobs_of(cluster) == []


async def test_a_client_that_does_not_read_holds_up_no_other(by_ssh):
    """Its kernel floods the one channel that all share; another kernel answers as before, and so does an interrupt."""
    with login_node() as node:
        by_ssh(node)
        async with async_kernel("slurm") as (manager, slow), async_kernel("slurm") as (_other, client):
            slow.execute("for n in range(200): print('x' * 1_000_000, flush=True)\nimport time; time.sleep(600)")
            await until_printed(slow, "x")
            took = []
            for number in range(20):
                began = time.monotonic()
                assert await async_execute(client, f"print({number})") == str(number)
                took.append(time.monotonic() - began)
                await asyncio.sleep(0.05)
            assert sorted(took)[10] < 1.0, took
            await manager.interrupt_kernel()
            reply = await slow.get_shell_msg(timeout=READY)
            assert reply["content"]["ename"] == "KeyboardInterrupt"
