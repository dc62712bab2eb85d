"""Which mechanism the ports of a kernel speak, read from the greeting of real ZeroMQ sockets."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from launchers import greeting
from launchers.greeting import CurveCheck, Refusal
from launchers.reactor import Reactor

Bind = Callable[..., int]


@pytest.fixture
def bind() -> Iterator[Bind]:
    """Binds a ZeroMQ server of a kind to a free port, with or without keys; returns the port."""
    context = zmq.Context()
    bound = []

    def on_a_free_port(kind: int, *, curve: bool) -> int:
        sock = context.socket(kind)
        bound.append(sock)  # a socket that is collected is closed
        if curve:
            sock.curve_publickey, sock.curve_secretkey = zmq.curve_keypair()
            sock.curve_server = True
        return sock.bind_to_random_port("tcp://127.0.0.1")

    yield on_a_free_port
    context.destroy(linger=0)


@pytest.fixture(autouse=True)
def no_wakeup_fd() -> Iterator[None]:
    """A reactor's pipe is not written to after its test."""
    yield
    signal.set_wakeup_fd(-1)


def check(*ports: int) -> Refusal | None:
    """What the check says of ports at 127.0.0.1."""
    reactor, said = Reactor(), list[Refusal | None]()
    CurveCheck(reactor, "127.0.0.1", {f"channel{number}": port for number, port in enumerate(ports)}, said.append)
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        reactor.run_once()
    assert len(said) == 1
    return said[0]


def test_five_channels_with_keys_pass(bind):
    """The sockets of a kernel that has the keys, of each kind that Jupyter uses."""
    assert check(*(bind(kind, curve=True) for kind in (zmq.ROUTER, zmq.XPUB, zmq.PUB, zmq.REP))) is None


def test_one_channel_in_plain_text_is_found(bind):
    """It is named, with its mechanism."""
    ports = [bind(zmq.ROUTER, curve=True), bind(zmq.PUB, curve=False)]
    assert check(*ports) == ("plain", "channel1 speaks ZMTP with the mechanism 'NULL'")


def test_a_port_without_a_listener_does_not_pass():
    """The kernel has ended meanwhile, for example."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert check(port) == ("no_greeting", "channel0: Connection refused")


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "plain"),
        (b"\xff" + bytes(8) + b"\x7f\x01\x00", "plain"),
        (b"", "no_greeting"),
    ],
)
def test_what_is_not_zmtp_3_does_not_pass(words, kind):
    """Nor does a listener that hangs up; that one has not shown what it speaks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        reactor, said = Reactor(), list[Refusal | None]()
        CurveCheck(reactor, "127.0.0.1", {"shell": server.getsockname()[1]}, said.append)
        peer, _address = server.accept()
        peer.sendall(words)
        peer.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            reactor.run_once()
        peer.close()
    assert said[0] is not None
    assert said[0].kind == kind


def test_a_silent_listener_does_not_pass(monkeypatch):
    """The check ends by itself, and does not say that the listener speaks plain text: its node may be stopped."""
    monkeypatch.setattr(greeting, "ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert check(server.getsockname()[1]) == ("no_greeting", "no greeting within 0.1 s")
