"""The tests' own networks: what is let through gets through, and nothing is left of them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import HELPERS
from helpers.networks import Flow, Network, network

NAMESPACES = Path("/run/netns")
MADE_AND_KILLED = (
    "import os, signal; from helpers.networks import Network; Network('a').up(); os.kill(os.getpid(), signal.SIGKILL)"
)


@pytest.fixture
def net() -> Iterator[Network]:
    """Two hosts, and a listener on each's port 5000 and 5001."""
    with network("a", "b") as made:
        listeners = []
        for host in ("a", "b"):
            with made.entered(host):
                listeners += [socket.create_server(("", port)) for port in (5000, 5001)]
        yield made
        for listener in listeners:
            listener.close()


def reached(net: Network) -> set[tuple[str, str, int]]:
    """Which host reaches which port of which other one."""
    found = set()
    for source, target in (("a", "b"), ("b", "a")):
        for port in (5000, 5001):
            with net.entered(source), socket.socket() as probe:
                probe.settimeout(0.3)
                if probe.connect_ex((net.hosts[target], port)) == 0:
                    found.add((source, target, port))
    return found


def test_only_what_is_allowed_gets_through(net):
    """Nothing at first; then one port, in one direction; or a range."""
    assert reached(net) == set()
    assert net.dropped() > 0
    net.allow(Flow("a", "b", "5000"))
    assert reached(net) == {("a", "b", 5000)}
    net.allow(Flow("b", "a", "5000-5009"))
    assert reached(net) == {("b", "a", 5000), ("b", "a", 5001)}


def test_a_cut_loses_packets_of_connections_that_stand(net):
    """Bytes that are sent meanwhile come when it is over."""
    net.allow(Flow("a", "b", "6000"))
    with net.entered("b"):
        listener = socket.create_server(("", 6000))
    with net.entered("a"):
        near = socket.create_connection((net.hosts["b"], 6000))
    far, _peer = listener.accept()
    with listener, near, far:
        far.settimeout(0.5)
        with net.cut(Flow("a", "b", "6000")):
            near.sendall(b"late")
            with pytest.raises(TimeoutError):
                far.recv(4)
            assert net.dropped() > 0
        far.settimeout(20)
        assert far.recv(4) == b"late"


def test_a_host_that_is_away_is_back_afterwards(net):
    """Nothing gets to it or from it, and then what is allowed does."""
    net.allow(Flow("a", "b", "5000"), Flow("b", "a", "5000"))
    with net.away("a"):
        assert reached(net) == set()
    assert reached(net) == {("a", "b", 5000), ("b", "a", 5000)}


def test_processes_are_told_by_their_host(net):
    """One that was started there is there, and nowhere else."""
    with net.entered("a"):
        process = subprocess.Popen(["sleep", "600"])
    try:
        assert net.pids("a") == {process.pid}
        assert net.pids("b") == set()
    finally:
        process.kill()
        process.wait()
    assert net.pids("a") == set()


def test_what_a_killed_run_has_left_is_removed_by_the_next_one():
    """Its namespaces have its process's number in their names."""
    done = subprocess.Popen([sys.executable, "-c", MADE_AND_KILLED], cwd=HELPERS.parent)
    assert done.wait(30) == -signal.SIGKILL
    assert list(NAMESPACES.glob(f"*-{done.pid}-*"))
    with network("a"):
        assert not list(NAMESPACES.glob(f"*-{done.pid}-*"))
    assert not list(NAMESPACES.glob(f"*-{Path('/proc/self').resolve().name}-*"))
