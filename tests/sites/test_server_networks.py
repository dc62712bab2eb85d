"""Where the server stands: behind a NAT, in another network, on IPv6 alone, known by name only, on several interfaces.

Servers that launchers cannot reach by themselves are in a network namespace of the test's own, and reach Slurm by a
login node; the nodes are this machine. The doctor's path check reports what a kernel's start would meet.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway_slurm.service import SlurmService
from gateway_slurm.testing.processes import free_port
from helpers.doctor_cli import REQUEST, PathCheckOutput, check_path, failed_at
from helpers.failing_starts import nothing_left, start_error
from helpers.kernel_clients import AUTO_KERNEL, execute, install_auto, running_kernel, write_admin_settings
from helpers.namespaces import IsolatedNetwork, forward_into, forward_out, isolated_network, silent_port
from launchers.dial import HEAD_START

Settings = Callable[..., SlurmService]


@pytest.fixture(scope="module")
def network() -> Iterator[IsolatedNetwork]:
    """Where the server stands: nothing leads there, and nothing out."""
    with isolated_network() as network:
        yield network


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> None:
    """A store of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def check_apart(network, node, cluster, service) -> Iterator[Callable[..., PathCheckOutput]]:
    """Run the path check in that network, with these settings; only the login node can be reached from it."""
    written: list[Path] = []
    with forward_out(network, node.port) as way_out:

        def check_there(*, arguments: tuple[str, ...] = REQUEST, **settings: object) -> PathCheckOutput:
            # The nodes try the server's port at their own addresses, too: here, no other process may have it.
            common = {**node.settings(way_out.port), "link_timeout": 10.0, "response_port": str(free_port())}
            written.append(write_admin_settings(**{**common, **settings}))
            return check_path(*arguments, inside=network.inside)

        yield check_there
    written[0].unlink()


# -- in another network -----------------------------------------------------------------------------------


def test_a_server_that_nodes_cannot_dial_is_told_why_at_each_of_its_addresses(check_apart, cluster):
    """One that does not answer, those without a listener, the host's name; what to change; no job is left."""
    with silent_port() as silent:
        output = check_apart(relay="never", response_address=f"127.0.0.1:{silent}")
    assert failed_at(output, "dial", f"127.0.0.1:{silent}: no answer within 3 s", "Connection refused", "relay")
    assert f"{socket.gethostname()}:" in output.said("dial")
    assert nothing_left(cluster)


def test_nodes_that_reach_only_the_relay_take_it_and_what_failed_before_is_told(check_apart, node, cluster):
    """The server's own addresses are tried, in vain, in the same second."""
    output = check_apart(relay="auto")
    assert output.is_good, output.steps
    assert "\nno connection to 127.0.0.1:" in output.said("dial")
    assert "Connection refused" in output.said("dial")
    assert "through the tunnel" in output.said("kernel")
    assert nothing_left(cluster)


def test_behind_a_nat_the_announced_address_is_not_the_bound_one(check_apart, network, cluster):
    """A port of another machine leads to the server's; it is the only way."""
    bound = network.call(free_port)
    with forward_into(network, bound) as nat:
        assert nat.port != bound
        address = f"127.0.0.1:{nat.port}"
        output = check_apart(relay="never", response_address=address, response_port=str(bound))
        assert output.is_good, output.steps
        assert f"to {address}" in output.said("dial")
        assert nat.passed == 1


def test_a_host_name_and_a_port_will_do(check_apart, network, cluster):
    """Where the nodes' resolver knows the server by a name, and each of its own addresses is another network's."""
    bound = network.call(free_port)
    with forward_into(network, bound) as nat:
        output = check_apart(relay="never", response_address=f"localhost:{nat.port}", response_port=str(bound))
    assert output.is_good, output.steps
    assert f"to localhost:{nat.port}" in output.said("dial")


def test_something_on_the_way_that_changes_bytes_is_told(check_apart, network, cluster):
    """A client that cannot prove that it is the launcher is refused; the rest of the path works."""

    def spoil(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    bound = network.call(free_port)
    with forward_into(network, bound, change=spoil) as nat:
        address = f"127.0.0.1:{nat.port}"
        output = check_apart(relay="never", response_address=address, response_port=str(bound))
    assert failed_at(output, "crypto", "was not accepted", "response_address")
    assert nothing_left(cluster)


# -- addresses --------------------------------------------------------------------------------------------


def test_a_server_that_is_reached_by_ipv6_only_is_dialled_there(check_apart, network, kernelspecs, cluster):
    """By its interface's unique local address (RFC 4193), in brackets; the link-local one is not announced."""
    with network.joined("fd00:6773::1/64", "fd00:6773::2/64") as interface:
        install_auto(kernelspecs)
        spec = ("--kernelspec", AUTO_KERNEL)  # which clients cannot dial there
        output = check_apart(arguments=spec, relay="never", response_interface=interface)
        assert output.is_good, output.steps
        assert "to [fd00:6773::2]:" in output.said("dial")
        assert "fe80" not in output.said("server")
        assert "IPv4 addresses only" in output.said("kernel")


def test_an_ipv6_address_may_be_set_without_brackets(check_apart, network, cluster):
    """It is dialled first, at the port that is bound; nothing else was tried before."""
    bound = network.call(free_port)
    with network.joined("fd00:6773::1/64", "fd00:6773::2/64"):
        output = check_apart(relay="never", response_address="fd00:6773::2", response_port=str(bound))
    assert output.is_good, output.steps
    assert f"to [fd00:6773::2]:{bound} |" in output.said("dial")


def test_of_a_range_the_first_free_port_is_taken(admin_settings, cluster):
    """Several users' servers on one login node; when all are taken the error names the range, and no job is made."""
    low = free_range(3)
    with socket.create_server(("127.0.0.1", low)):
        service = admin_settings(response_port=f"{low}-{low + 2}")
        with running_kernel("slurm") as (_manager, client):
            assert execute(client, "print(1)") == "1"
            assert service._socket.port == low + 1
        admin_settings(response_port=f"{low}-{low + 2}")  # the one that listened is closed
        with socket.create_server(("127.0.0.1", low + 1)), socket.create_server(("127.0.0.1", low + 2)):
            error, _seconds = start_error("slurm")
    assert [w for w in (f"{low}-{low + 2}", "in use", "SlurmService.response_port") if w not in str(error)] == []
    assert nothing_left(cluster)


def free_range(count: int) -> int:
    """The first of so many ports that follow each other and are free."""
    while True:
        low = free_port()
        try:
            for port in range(low, low + count):
                socket.create_server(("127.0.0.1", port)).close()
        except (OSError, OverflowError):
            continue
        return low


# -- several interfaces -------------------------------------------------------------------------------------


def test_interfaces_that_swallow_what_is_sent_cost_a_head_start_each(admin_settings, monkeypatch, cluster):
    """Four addresses that never answer before the one that does: a second, not a timeout for each of them."""
    usual, _reached = timed_start(admin_settings())
    with silent_port() as silent:
        dead = [f"127.0.0.1:{silent}", f"127.0.0.2:{silent}", f"[::ffff:127.0.0.1]:{silent}", f"127.0.0.3:{silent}"]
        original = SlurmService._listen

        async def listen(service: SlurmService) -> None:
            await original(service)
            service.addresses.direct = [*dead, *service.addresses.direct]

        monkeypatch.setattr(SlurmService, "_listen", listen)
        service = admin_settings()
        seconds, reached = timed_start(service)
    assert service.addresses.direct[:4] == dead
    assert reached == service.addresses.direct[4]
    assert 4 * HEAD_START < seconds < usual + 2.5


def timed_start(service: SlurmService) -> tuple[float, str]:
    """How long a start took, until the kernel had answered, and the address by which its launcher came."""
    began = time.monotonic()
    with running_kernel("slurm") as (_manager, client):
        assert execute(client, "print(6 * 7)") == "42"
        return time.monotonic() - began, service.kernels.handles()[0].process.launcher.reached
