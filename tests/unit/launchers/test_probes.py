"""The launcher's listening for a moment: who asks is answered, and the ports are free again afterwards."""

from __future__ import annotations

import signal
import socket
import time

import pytest
import zmq
import zmq.utils.monitor

from gateway_slurm.link import wire
from launchers import ports as probes
from launchers.ports import Probes
from launchers.reactor import Reactor

HERE = "127.0.0.1"
QUESTION, WORD = "fedcba9876543210" * 2, "0123456789abcdef" * 2


@pytest.fixture
def reactor():
    """A reactor; what it does to this process's signals is undone."""
    yield Reactor()
    signal.set_wakeup_fd(-1)


@pytest.fixture
def said():
    """What the launcher has said."""
    return []


@pytest.fixture
def launcher(reactor, said):
    """A launcher's probes; what is still open is closed."""
    made = Probes(reactor, lambda name, **fields: said.append((name, fields)))
    yield made
    for kernel_id in list(made._probes):
        made.close(kernel_id)


def asked(kernel_id="k", **fields):
    """PROBE."""
    words = {"question": QUESTION, "answer": WORD}
    return {"probe": "p", "kernel_id": kernel_id, **words, "ports": None, "port_range": None, **fields}


def turn_until(reactor, condition, seconds=10.0):
    """Let the launcher work."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        reactor.later(0.02, lambda: None)
        reactor.run_once()


def dial(reactor, port):
    """The answer to a client that asks."""
    with socket.create_connection((HERE, port), timeout=10) as sock:
        sock.sendall(QUESTION.encode())
        sock.setblocking(False)
        told = bytearray()

        def complete():
            try:
                told.extend(sock.recv(1000))
            except BlockingIOError:
                return False
            return len(told) >= len(WORD)

        turn_until(reactor, complete)
    return told.decode()


def can_be_taken(port):
    """Whether a kernel could listen there now."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HERE, port))
            sock.listen()
        except OSError:
            return False
    return True


def test_each_port_answers_again_and_again(launcher, reactor, said):
    """PROBED names a port for each channel, and every one of them answers."""
    launcher.listen(asked(), HERE)
    ((name, fields),) = said
    assert (name, fields["probe"], set(fields["ports"])) == ("PROBED", "p", set(wire.CHANNELS))
    for port in [*fields["ports"].values()] * 2:
        assert dial(reactor, port) == WORD


@pytest.mark.parametrize("said_first", [bytes([0xFF, *[0] * 7, 1, 0x7F]), QUESTION[:5].encode() + b"x", b"x" * 10_000])
def test_who_does_not_ask_is_told_nothing(launcher, reactor, said, said_first):
    """As a client of the kernel's, which says ZMTP's greeting: its connection ends, and it may try again."""
    launcher.listen(asked(), HERE)
    with socket.create_connection((HERE, said[0][1]["ports"]["shell"]), timeout=10) as sock:
        sock.setblocking(False)
        sock.send(said_first)
        ends = []

        def ended():
            try:
                ends.append(sock.recv(100))
            except BlockingIOError:
                return False
            except ConnectionResetError:
                ends.append(b"")
            return True

        turn_until(reactor, ended)
    assert ends == [b""]


def test_a_kernels_client_finds_it_after_the_probe(launcher, reactor, said):
    """A CurveZMQ client that tries the ports all the time, as at a restart, reaches what listens there next."""
    launcher.listen(asked(), HERE)
    port = said[0][1]["ports"]["shell"]
    with zmq.Context() as context, context.socket(zmq.DEALER) as client, context.socket(zmq.ROUTER) as kernel:
        public, secret = zmq.curve_keypair()
        kernel.curve_secretkey, kernel.curve_server = secret, True
        client.curve_publickey, client.curve_secretkey, client.curve_serverkey = public, secret, public
        client.linger = 0
        events = client.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        client.connect(f"tcp://{HERE}:{port}")
        seen = []

        def sent_away_twice():
            if events.poll(0):
                seen.append(zmq.utils.monitor.recv_monitor_message(events)["event"])
            return seen.count(zmq.EVENT_DISCONNECTED) >= 2

        turn_until(reactor, sent_away_twice)
        assert dial(reactor, port) == WORD
        launcher.close("k")
        kernel.bind(f"tcp://{HERE}:{port}")
        client.send(b"are you there?")
        assert kernel.poll(10_000)
        client.disable_monitor()
        events.close()


def test_a_question_in_pieces_is_a_question(launcher, reactor, said):
    """TCP may cut it anywhere."""
    launcher.listen(asked(), HERE)
    with socket.create_connection((HERE, said[0][1]["ports"]["shell"]), timeout=10) as sock:
        for letter in QUESTION.encode():
            sock.send(bytes([letter]))
            turn_until(reactor, lambda: True)
        turn_until(reactor, lambda: QUESTION.encode() in launcher._probes["k"]._received.values())
        assert sock.recv(100).decode() == WORD


def test_the_ports_are_the_kernels_after_its_start(launcher, reactor, said):
    """What listens and who is connected is gone once START closes the probe."""
    launcher.listen(asked(), HERE)
    ports = said[0][1]["ports"].values()
    client = socket.create_connection((HERE, next(iter(ports))), timeout=10)
    assert dial(reactor, next(iter(ports))) == WORD
    launcher.close("k")
    assert all(map(can_be_taken, ports))
    client.close()


def test_it_ends_by_itself(launcher, reactor, said, monkeypatch):
    """A server that says nothing more leaves no port taken."""
    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.1)
    launcher.listen(asked(), HERE)
    ports = said[0][1]["ports"].values()
    assert not any(map(can_be_taken, ports))
    turn_until(reactor, lambda: all(map(can_be_taken, ports)))


def test_a_kernels_ports_are_kept_where_they_are_free(launcher, said):
    """A restart keeps the ports; if another process has taken one, all are new."""
    launcher.listen(asked(), HERE)
    launcher.close("k")
    before = said[0][1]["ports"]
    launcher.listen(asked(ports=before), HERE)
    assert said[1][1]["ports"] == before
    launcher.close("k")
    with socket.socket() as other:
        other.bind((HERE, before["stdin"]))
        other.listen()
        launcher.listen(asked(ports=before), HERE)
        assert set(said[2][1]["ports"]) == set(wire.CHANNELS)
        assert before["stdin"] not in said[2][1]["ports"].values()


def test_a_range_without_free_ports_is_said(launcher, said):
    """PROBED has the reason."""
    with socket.socket() as other:
        other.bind((HERE, 0))
        other.listen()
        port = other.getsockname()[1]
        launcher.listen(asked(port_range=[port, port]), HERE)
    assert "no free port" in said[0][1]["error"]


def test_there_are_only_so_many(launcher, said, monkeypatch):
    """The oldest goes."""
    monkeypatch.setattr(probes, "MAX_PROBES", 2)
    for number in range(3):
        launcher.listen(asked(f"k{number}"), HERE)
    first, _second, third = ([*fields["ports"].values()] for _name, fields in said)
    assert all(map(can_be_taken, first))
    assert not any(map(can_be_taken, third))


def test_who_connects_too_often_is_sent_away(launcher, reactor, said, monkeypatch):
    """Connections that stay are bounded, and none of them holds back the answer to the server's dialling."""
    monkeypatch.setattr(probes, "MAX_CONNECTIONS", 2)
    launcher.listen(asked(), HERE)
    port = said[0][1]["ports"]["shell"]
    staying = [socket.create_connection((HERE, port), timeout=10) for _ in range(3)]
    staying[2].setblocking(False)

    def sent_away():
        try:
            return staying[2].recv(100) == b""
        except BlockingIOError:
            return False

    turn_until(reactor, sent_away)
    staying.pop().close()
    staying.pop().close()
    turn_until(reactor, lambda: len(launcher._probes["k"]._received) == 1)
    assert dial(reactor, port) == WORD
    staying.pop().close()
