"""The two ends of the relay, each by itself: the login node's program through pipes, the server's end with a stub."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_slurm.link import server
from gateway_slurm.slurm.ssh.login_node.protocol import (
    CLOSE,
    CREDIT,
    DATA,
    FAILED,
    LENGTH,
    LISTEN,
    LISTENING,
    OPEN,
    PING,
    PONG,
    WINDOW,
    Frames,
    frame,
    pack,
    unpack,
)
from gateway_slurm.slurm.ssh.relay import RelayedConnection
from gateway_slurm.slurm.ssh.remote import bootstrap, program_text


class RemoteProgram:
    """The program as a login node's shell starts it, at the other end of pipes."""

    def __init__(self, silence: float = 30.0) -> None:
        entry = "sys.modules['gateway_slurm.slurm.ssh.login_node.main'].main"
        text = f"{program_text()}\n{entry}('MARK', 'relay', {silence})\n"
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", bootstrap(sys.executable)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        data = text.encode()
        self.write(f"{len(data)}\n".encode() + data)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"\n"
        assert self.process.stdout.readline() == b"MARK\n"
        self._frames = Frames()
        self._found: list[tuple[int, int, bytes]] = []
        self.info = unpack(self.expect(4)[2])[0]

    def write(self, data: bytes) -> None:
        """Write all of it."""
        assert self.process.stdin is not None
        while data:
            data = data[self.process.stdin.write(data) :]

    def expect(self, kind: int, *, timeout: float = 20) -> tuple[int, int, bytes]:
        """The next frame of this kind."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while True:
            for at, each in enumerate(self._found):
                if each[0] == kind:
                    return self._found.pop(at)
            left = deadline - time.monotonic()
            assert left > 0, f"no frame of kind {kind}, only {[each[0] for each in self._found]}"
            if select.select([self.process.stdout], [], [], left)[0]:
                data = os.read(self.process.stdout.fileno(), 1 << 20)
                assert data, "the program has ended"
                self._found += self._frames.feed(data)

    def listen(self, *ports: int, end: tuple[dict[str, Any], ...] = ()) -> int:
        """Make the program listen; return the port."""
        self.write(frame(LISTEN, 0, pack({"ports": list(ports) or [0], "end": end})))
        return int(unpack(self.expect(LISTENING)[2])[0]["port"])

    def end(self) -> int:
        """Close the program's channel and wait for its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        status = self.process.wait(20)
        self.process.stdout.close()
        return status


@pytest.fixture
def program() -> Iterator[RemoteProgram]:
    """A program that the fixture ends."""
    program = RemoteProgram()
    yield program
    if program.process.poll() is None:
        program.end()


def dial(port: int) -> socket.socket:
    """Connect as a launcher does."""
    sock = socket.create_connection(("127.0.0.1", port), 20)
    sock.settimeout(20)
    return sock


def test_bytes_go_both_ways_as_they_are(program: RemoteProgram) -> None:
    """OPEN for the connection, then DATA, until one side closes."""
    with dial(program.listen()) as node:
        _kind, number, peer = program.expect(OPEN)
        assert peer.endswith(b"127.0.0.1")
        node.sendall(b"up \x00\xff")
        assert program.expect(DATA) == (DATA, number, b"up \x00\xff")
        program.write(frame(DATA, number, b"down \x00\xff"))
        assert node.recv(100) == b"down \x00\xff"
        program.write(frame(CLOSE, number))
        assert node.recv(100) == b""


def test_a_connection_that_a_node_closes_is_told(program: RemoteProgram) -> None:
    """Its last data comes first."""
    with dial(program.listen()) as node:
        number = program.expect(OPEN)[1]
        node.sendall(b"last words")
    assert program.expect(DATA) == (DATA, number, b"last words")
    assert program.expect(CLOSE) == (CLOSE, number, b"")


def test_no_more_than_a_window_is_read_without_credit(program: RemoteProgram) -> None:
    """A node's further data waits on the node; credit lets as much more through."""
    with dial(program.listen()) as node:
        number = program.expect(OPEN)[1]
        node.setblocking(False)
        sent = received = 0
        deadline = time.monotonic() + 20
        while received < WINDOW:
            assert time.monotonic() < deadline
            if select.select([], [node], [], 0)[1]:
                sent += node.send(b"x" * (1 << 16))
            if select.select([program.process.stdout], [], [], 0)[0]:
                received += len(program.expect(DATA)[2])
            while program._found and program._found[0][0] == DATA:
                received += len(program.expect(DATA)[2])
        while select.select([], [node], [], 0.2)[1]:
            sent += node.send(b"x" * (1 << 16))
        assert sent > WINDOW == received
        program.write(frame(PING, 7))
        assert program.expect(PONG) == (PONG, 7, b"")
        assert not any(each[0] == DATA for each in program._found)
        program.write(frame(CREDIT, number, LENGTH.pack(1000)))
        assert len(program.expect(DATA)[2]) == 1000


def test_a_node_that_reads_nothing_holds_up_no_other(program: RemoteProgram) -> None:
    """Credit is given only for data that the node has taken."""
    port = program.listen()
    with dial(port) as slow, dial(port) as other:
        first, second = program.expect(OPEN)[1], program.expect(OPEN)[1]
        other.sendall(b"o")
        assert program.expect(DATA)[2] == b"o"
        for _ in range(WINDOW >> 18):
            program.write(frame(DATA, first, b"x" * (1 << 18)))
        program.write(frame(DATA, second, b"y"))
        assert other.recv(10) == b"y"
        taken = 0
        while taken < WINDOW:
            taken += len(slow.recv(1 << 20))
        credited = 0
        while credited < WINDOW * 3 // 4:
            credited += LENGTH.unpack(program.expect(CREDIT)[2])[0]
        assert credited <= WINDOW


def test_what_was_said_last_reaches_the_node_when_the_channel_ends(program: RemoteProgram) -> None:
    """A launcher gets its release, and the program ends."""
    with dial(program.listen()) as node:
        number = program.expect(OPEN)[1]
        program.write(frame(DATA, number, b"x" * (1 << 20)))
        assert program.end() == 0
        taken = 0
        while data := node.recv(1 << 20):
            taken += len(data)
    assert taken == 1 << 20


def test_a_port_that_is_taken_is_told(program: RemoteProgram) -> None:
    """In a range, the first free port is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program.write(frame(LISTEN, 0, pack({"ports": [port], "end": []})))
        assert b"in use" in program.expect(FAILED)[2]
        assert program.listen(port, 0) not in (0, port)


def test_an_earlier_relay_gives_its_port_up_to_the_next() -> None:
    """It may not have noticed that its connection broke."""
    first, second = RemoteProgram(), RemoteProgram()
    try:
        port = first.listen()
        stranger = {**first.info, "ticks": "1"}
        second.write(frame(LISTEN, 0, pack({"ports": [port], "end": [stranger]})))
        assert b"in use" in second.expect(FAILED)[2], "another process with that id was ended"
        assert second.listen(port, end=(first.info,)) == port
        first.process.wait(20)
    finally:
        first.end()
        second.end()


def test_a_relay_whose_server_is_silent_ends() -> None:
    """For the case that sshd does not notice the lost connection."""
    program = RemoteProgram(silence=0.5)
    program.listen()
    assert program.process.wait(20) == 0
    program.end()


def test_a_node_that_takes_nothing_holds_no_place_after_a_close(program: RemoteProgram) -> None:
    """It has a few seconds for the last data; the number of connections is limited."""
    descriptors = f"/proc/{program.process.pid}/fd"
    with dial(program.listen()):
        number = program.expect(OPEN)[1]
        for _ in range(WINDOW >> 18):
            program.write(frame(DATA, number, b"x" * (1 << 18)))
        program.write(frame(CLOSE, number))
        program.write(frame(PING, 7))
        program.expect(PONG)
        before = len(os.listdir(descriptors))
        deadline = time.monotonic() + 20
        while len(os.listdir(descriptors)) == before:
            assert time.monotonic() < deadline, "the connection is still there"
            time.sleep(0.1)
    assert program.end() == 0


# -- our end ------------------------------------------------------------------------------------------------


class Notes:
    """A program that notes the frames sent to it."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, bytes]] = []

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        self.sent.append((kind, number, payload))

    def size(self) -> int:
        return sum(len(payload) for kind, _number, payload in self.sent if kind == DATA)


class Link:
    """The response socket's part of a connection."""

    is_authenticated = False

    def __init__(self) -> None:
        self.said: list[str] = []
        self.taken = b""

    def data_received(self, data: bytes) -> None:
        self.taken += data

    def pause_writing(self) -> None:
        self.said.append("pause")

    def resume_writing(self) -> None:
        self.said.append("resume")

    def connection_lost(self, _error: Exception | None) -> None:
        self.said.append("lost")


class Owner:
    """The relay and the response socket of one connection."""

    worked = False

    def __init__(self) -> None:
        self.link = Link()

    def accept(self, _transport: asyncio.Transport) -> Link:
        return self.link

    def forget(self, _number: int) -> None:
        """Nothing to do."""


def relayed() -> tuple[RelayedConnection, Notes, Link]:
    """A connection that has begun."""
    owner, notes = Owner(), Notes()
    connection = RelayedConnection(owner, notes, 5, "192.0.2.1")  # type: ignore[arg-type]
    connection.link = owner.accept(connection)
    return connection, notes, owner.link


async def test_our_end_sends_no_more_than_a_window_without_credit() -> None:
    """The link pauses and resumes; no data is lost or reordered."""
    connection, notes, link = relayed()
    data = os.urandom(1 << 20)
    for _ in range(6):
        connection.write(data)
    assert WINDOW - (1 << 18) < notes.size() <= WINDOW
    assert connection.get_write_buffer_size() == (6 << 20) - notes.size()
    assert link.said == ["pause"]
    connection.received(CREDIT, LENGTH.pack(WINDOW))
    assert link.said == ["pause", "resume"]
    assert b"".join(payload for _kind, _number, payload in notes.sent) == data * 6


async def test_our_end_gives_credit_for_what_the_link_took() -> None:
    """In quarters of a window, to save frames."""
    connection, notes, link = relayed()
    for _ in range(8):
        connection.received(DATA, b"x" * (1 << 18))
    assert len(link.taken) == 2 << 20
    assert [LENGTH.unpack(payload)[0] for kind, _number, payload in notes.sent if kind == CREDIT] == [1 << 20] * 2


async def test_our_end_closes_when_all_has_gone_out() -> None:
    """A close does not lose data that waits for credit."""
    connection, notes, _link = relayed()
    connection.write(b"x" * (WINDOW + 1))
    connection.close()
    assert CLOSE not in [kind for kind, _number, _payload in notes.sent]
    connection.received(CREDIT, LENGTH.pack(WINDOW))
    assert notes.sent[-1] == (CLOSE, 5, b"")
    assert notes.size() == WINDOW + 1
    connection.write(b"too late")
    assert notes.sent[-1] == (CLOSE, 5, b"")


async def test_our_end_gives_no_credit_while_its_link_takes_nothing() -> None:
    """Data under way still arrives, and no more than that; then credit is given again."""
    connection, notes, link = relayed()
    connection.pause_reading()
    for _ in range(16):
        connection.received(DATA, b"x" * (1 << 18))
    assert len(link.taken) == WINDOW
    assert notes.sent == []
    connection.resume_reading()
    assert notes.sent == [(CREDIT, 5, LENGTH.pack(WINDOW))]


async def test_our_end_is_closed_at_once_when_it_is_aborted() -> None:
    """Also after a close that waits for credit: no more data is sent."""
    connection, notes, link = relayed()
    connection.write(b"x" * (2 * WINDOW))
    connection.close()
    connection.abort()
    assert notes.sent[-1] == (CLOSE, 5, b"")
    assert notes.size() <= WINDOW
    await asyncio.sleep(0)
    assert link.said == ["pause", "lost"]


async def test_a_link_by_the_relay_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with TCP, it has a limited time for the last data after a close."""
    monkeypatch.setattr(server, "GOODBYE_SECONDS", 0.1)
    socket, notes = server.ResponseSocket(log=logging.getLogger("test.relay")), Notes()
    lost = asyncio.Event()
    connection = RelayedConnection(SimpleNamespace(forget=lambda _number: lost.set()), notes, 5, "192.0.2.1")  # type: ignore[arg-type]
    connection.link = socket.connected(connection)
    connection.write(b"x" * (2 * WINDOW))
    await socket.close()
    assert CLOSE not in [kind for kind, _number, _payload in notes.sent]
    await asyncio.wait_for(lost.wait(), 10)
    assert notes.sent[-1] == (CLOSE, 5, b"")
