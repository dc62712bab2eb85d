"""How a launcher dials several addresses of which some never answer, and names that a resolver is slow with."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from helpers.namespaces import silent_port
from launchers import dial as dialling
from launchers.dial import Address, Round
from launchers.reactor import Reactor


class Dialled:
    """One round, turned until it is over."""

    def __init__(self, *addresses: Address) -> None:
        self.reactor = Reactor()
        self.reached: Address | None = None
        self.left: list[Address] = []
        self.failed = False
        self.why: dict[Address, str] = {}
        began = time.monotonic()
        self.round = Round(
            self.reactor,
            list(addresses),
            connected=self._connected,
            failed=self._failed,
            address_failed=self.why.__setitem__,
        )
        while self.reached is None and not self.failed:
            assert time.monotonic() - began < 20
            self.reactor.run_once()
        self.seconds = time.monotonic() - began
        signal.set_wakeup_fd(-1)

    def _connected(self, address: Address, sock: socket.socket, left: list[Address]) -> None:
        self.reached, self.peer, self.left = address, sock.getpeername(), left
        sock.close()

    def _failed(self) -> None:
        self.failed = True


@pytest.fixture
def server() -> Iterator[Address]:
    """A server that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()


@pytest.fixture
def silent() -> Iterator[Address]:
    """An address that a dialler hears nothing from."""
    with silent_port() as port:
        yield "127.0.0.1", port


@pytest.fixture
def closed() -> Address:
    """An address without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()


def test_addresses_that_do_not_answer_cost_a_head_start_each_and_no_timeout(silent, server):
    """Four of them take a second, where waiting for each would take twelve."""
    dialled = Dialled(silent, silent, silent, silent, server)
    assert dialled.reached == server
    assert 4 * dialling.HEAD_START <= dialled.seconds < 4 * dialling.HEAD_START + 0.5


def test_an_address_that_fails_at_once_is_not_waited_for(closed, server):
    """The next one is dialled in the same moment; the reasons of the other failures are reported."""
    dialled = Dialled(closed, ("192.0.2.1%nosuch", 1), closed, server)
    assert dialled.reached == server
    assert dialled.seconds < dialling.HEAD_START + 0.3
    assert dialled.why[closed] == "Connection refused"


def test_the_first_one_that_is_there_is_taken(server, silent, closed):
    """Those behind it are not even dialled; those not known to be dead are reported, in case it is no good."""
    dialled = Dialled(server, silent)
    assert (dialled.reached, dialled.left) == (server, [silent])
    behind = ("192.0.2.1", 9)
    dialled = Dialled(closed, silent, server, behind)
    assert (dialled.reached, dialled.left) == (server, [silent, behind])


def test_a_round_without_an_answer_ends(silent, closed, monkeypatch):
    """With the reason for each."""
    monkeypatch.setattr(dialling, "CONNECT_TIMEOUT", 0.5)
    dialled = Dialled(silent, closed, silent)
    assert dialled.failed
    assert dialled.why == {silent: "no answer within 0.5 s", closed: "Connection refused"}
    assert dialled.seconds < 0.5 + 2 * dialling.HEAD_START + 0.3


def resolver(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int], Any]) -> None:
    """Names get what ``answer(port)`` returns or raises; numbers are read as ever."""
    original = socket.getaddrinfo

    def look_up(host: str, port: int, **options: Any) -> Any:
        return original(host, port, **options) if options.get("flags") else answer(port)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_every_address_of_a_name_is_tried(server, monkeypatch):
    """The first of them may be one that leads nowhere, as an IPv6 one of a host that listens on IPv4 only."""
    both = [(socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")]
    resolver(monkeypatch, lambda port: [(family, None, None, "", (host, port)) for family, host in both])
    dialled = Dialled(("the-server", server[1]))
    assert dialled.reached == ("the-server", server[1])
    assert dialled.peer == server


def test_a_name_that_is_not_found_is_told_of_and_the_next_address_is_tried(closed, server, monkeypatch):
    """As any other that does not work."""

    def nothing(_port: int) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    resolver(monkeypatch, nothing)
    dialled = Dialled(("no-such-host", 1), closed)
    assert dialled.failed
    assert dialled.why == {("no-such-host", 1): "the host name was not found", closed: "Connection refused"}
    assert Dialled(("no-such-host", 1), server).reached == server


def test_a_resolver_that_hangs_delays_no_dialling(server, monkeypatch):
    """Numbers behind the name are dialled meanwhile, other work goes on, and the child that asks is ended."""
    before = set(psutil.Process().children())
    resolver(monkeypatch, lambda _port: time.sleep(600))
    dialled = Dialled(("slow", 1), server)
    assert dialled.reached == server
    assert dialled.seconds < dialling.HEAD_START + 0.5
    assert set(psutil.Process().children()) <= before
