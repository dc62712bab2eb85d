"""Which servers a launcher dials, in which order and how often, and which it refuses."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gateway_slurm.link import endpoints, envelope, wire
from launchers import uplink as uplink_module
from launchers.reactor import Reactor
from launchers.uplink import Uplink

TOKEN = b"t" * 32


class Server:
    """A response socket's listener, by hand: one connection at a time."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.connection: socket.socket | None = None
        self.name = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.dials = 0

    def accepts(self) -> bool:
        """Whether a launcher dialled; it gets a greeting."""
        try:
            self.connection, _peer = self.listener.accept()
        except BlockingIOError:
            return False
        self.dials += 1
        self.connection.setblocking(False)
        self._key = envelope.ReceiverKey()
        self.connection.sendall(wire.preamble(self._key.public))
        self._frames = wire.FrameReader(wire.OPENING_LIMIT)
        self._seal: Any = None
        return True

    def said_hello(self) -> bool:
        """Whether the launcher has said a good HELLO."""
        assert self.connection is not None
        try:
            frames = self._frames.feed(self.connection.recv(65536))
        except BlockingIOError:
            return False
        if not frames:
            return False
        _hello, self._seal, _unseal = self._key.open_hello(wire.Opening.decode(frames[0]), [TOKEN])
        return True

    def say(self, *bodies: bytes) -> None:
        """Messages in one frame."""
        assert self.connection is not None
        self.connection.sendall(wire.frame(self._seal(wire.pack(list(bodies)))))

    def close(self) -> None:
        self.listener.close()
        if self.connection is not None:
            self.connection.close()


class Launcher:
    """An uplink that records the messages to it; it handles WELCOME and the like as the launcher does."""

    def __init__(self, *addresses: str) -> None:
        self.reactor = Reactor()
        self.messages: list[str] = []
        self.uplink = Uplink(
            self.reactor,
            launcher_id="L1",
            jobid="12",
            token=TOKEN,
            addresses=[endpoint for endpoint in map(endpoints.parse_endpoint, addresses) if endpoint],
            hello=self._hello,
            on_message=self._on_message,
            on_down=lambda: None,
            on_writable=lambda: None,
        )
        self.uplink.dial()

    def _hello(self) -> dict[str, Any]:
        self.said_hello = self.uplink.dialled()
        return {}

    def _on_message(self, name: str, payload: Any) -> None:
        self.messages.append(name)
        actions = {"WELCOME": self.uplink.welcome, "REDIRECT": self.uplink.redirected, "HEARTBEAT": self.uplink.learn}
        if name in actions:
            actions[name](payload)

    def turn_until(self, condition: Any, *, seconds: float = 10) -> None:
        """Let it work until the condition is true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            self.reactor.later(0.005, lambda: None)
            self.reactor.run_once()

    def known(self) -> list[str]:
        """The addresses that it knows, in their order."""
        return [f"{host}:{port}" for host, port in self.uplink._addresses]


def welcome(epoch: int | None = None, addresses: list[Any] | None = None) -> bytes:
    """A WELCOME as a server says it; one that knows of no epochs says none."""
    fields = {} if epoch is None else {"epoch": epoch}
    return wire.encode("WELCOME", token=TOKEN.hex(), addresses=addresses or [], **fields)


def link(launcher: Launcher, server: Server, *bodies: bytes) -> None:
    """Wait for the launcher to dial the server and prove itself, then say something."""
    launcher.turn_until(server.accepts)
    launcher.turn_until(server.said_hello)
    server.say(*bodies)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    """Three servers that do not know one another."""
    servers = [Server() for _ in range(3)]
    yield servers
    for server in servers:
        server.close()
    signal.set_wakeup_fd(-1)


def test_a_launcher_goes_on_at_the_server_that_it_was_told_of(servers):
    """The address in WELCOME is dialled once the first server is gone."""
    first, second, _third = servers
    launcher = Launcher(first.name)
    link(launcher, first, welcome(1, [first.name, second.name]))
    launcher.turn_until(lambda: launcher.uplink.live)
    first.close()
    link(launcher, second, welcome(2))
    launcher.turn_until(lambda: launcher.uplink.live)
    assert launcher.known() == [second.name, first.name]


def test_the_address_that_works_is_dialled_first_and_none_is_forgotten(servers):
    """HEARTBEAT brings new ones; the earlier ones, and those of the start, stay behind them, to a bound."""
    first, second, third = servers
    launcher = Launcher(first.name)
    link(launcher, first, welcome(0, [second.name]))
    launcher.turn_until(lambda: launcher.uplink.live)
    many = [f"192.0.2.1:{port}" for port in range(1, 100)]
    for told in ([third.name, "nonsense", 5, "x:0"], None, "x", [first.name], many):
        launcher.messages.clear()
        first.say(wire.encode("HEARTBEAT", addresses=told))
        launcher.turn_until(lambda: launcher.messages)
        if told != many:
            assert launcher.known() == [first.name, third.name, second.name]
    assert launcher.known() == [first.name, *many][: uplink_module.MAX_ADDRESSES]


def test_a_server_that_slept_through_its_lease_is_refused(servers):
    """An epoch lower than the highest seen is no WELCOME, and nothing that comes with it is done."""
    first, second, _third = servers
    launcher = Launcher(first.name, second.name)
    link(launcher, first, welcome(7))
    launcher.turn_until(lambda: launcher.uplink.live)
    first.close()
    for stale in (6, None):
        launcher.messages.clear()
        link(launcher, second, welcome(stale), wire.encode("RELEASE"))
        launcher.turn_until(lambda: launcher.messages)
        launcher.turn_until(lambda: launcher.uplink._socket is None)
        assert (launcher.messages, launcher.uplink.live) == (["WELCOME"], False)
    link(launcher, second, welcome(7))
    launcher.turn_until(lambda: launcher.uplink.live)


def test_a_launcher_dials_where_it_is_redirected(servers):
    """REDIRECT's address is the next, and its epoch counts; one with an older epoch is not followed."""
    first, second, third = servers
    launcher = Launcher(first.name)
    link(launcher, first, wire.encode("REDIRECT", addresses=[second.name], epoch=5))
    link(launcher, second, wire.encode("REDIRECT", addresses=[third.name], epoch=4))
    link(launcher, first, welcome(4))
    link(launcher, second, welcome(5))
    launcher.turn_until(lambda: launcher.uplink.live)
    assert third.dials == 0
    assert third.name not in launcher.known()


def test_servers_that_send_a_launcher_to_each_other_are_not_flooded(servers):
    """Between redirections it waits longer and longer."""
    first, second, _third = servers
    launcher = Launcher(first.name)
    for here, other in [(first, second), (second, first)] * 2:
        link(launcher, here, wire.encode("REDIRECT", addresses=[other.name], epoch=0))
        launcher.turn_until(lambda: launcher.uplink._socket is None)
    assert launcher.uplink._retry._wait == uplink_module.RETRY_DELAY * 2**4


def test_in_the_first_minute_without_a_server_it_is_looked_for_often(servers, monkeypatch):
    """Pauses between rounds grow to a second, and to three when it lasts."""
    for server in servers:
        server.close()
    launcher = Launcher(servers[0].name)
    monkeypatch.setattr("random.uniform", lambda _low, _high: 0.0)
    launcher.turn_until(lambda: launcher.uplink._retry._wait == uplink_module.MAX_RETRY_DELAYS[0])
    launcher.uplink.last_live -= uplink_module.FIRST_MINUTE
    launcher.turn_until(lambda: launcher.uplink._retry._wait == uplink_module.MAX_RETRY_DELAYS[1])


def test_of_a_server_that_hangs_only_one_address_is_waited_for(servers, monkeypatch):
    """It takes connections and says nothing: the next one is dialled at another server's port."""
    monkeypatch.setattr(uplink_module, "HANDSHAKE_TIMEOUTS", (0.2, 0.2))
    hung, other = servers[:2]
    port = hung.name.rpartition(":")[2]
    launcher = Launcher(hung.name, f"127.0.0.2:{port}", f"127.0.0.3:{port}", other.name)
    launcher.turn_until(other.accepts, seconds=2)
    launcher.turn_until(other.said_hello)
    other.say(welcome())
    launcher.turn_until(lambda: launcher.uplink.live)
    launcher.uplink.close()


def test_a_slow_server_is_tried_again_when_the_fast_one_is_none_of_ours(servers):
    """Another service took the connection first: what was under way is not lost for that."""
    ours, _second, stranger = servers
    launcher = Launcher("127.0.0.1:9", stranger.name, ours.name)
    launcher.turn_until(stranger.accepts)
    launcher.turn_until(lambda: launcher.uplink._dialled is not None)
    assert launcher.uplink._untried == [("127.0.0.1", int(ours.name.rpartition(":")[2]))]
    stranger.connection.close()
    link(launcher, ours, welcome())
    launcher.turn_until(lambda: launcher.uplink.live)
    told = launcher.said_hello["in_vain"]
    assert [where for where, _why in told] == ["127.0.0.1:9", stranger.name]
    launcher.uplink.close()


def test_what_hello_says_of_addresses_is_bounded(servers):
    """HELLO is one small frame, whatever was tried."""
    launcher = Launcher(servers[0].name)
    launcher.turn_until(servers[0].accepts)
    launcher.turn_until(lambda: launcher.uplink._dialled is not None)
    launcher.uplink._failures = {("x" * 250, port): "why " * 100 for port in range(1, 100)}
    told = launcher.uplink.dialled()
    assert told["reached"] == servers[0].name
    assert 0 < sum(len(text) for pair in told["in_vain"] for text in pair) < uplink_module.MAX_FAILURES
    launcher.uplink.close()
