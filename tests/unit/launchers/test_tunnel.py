"""A launcher's streams between a kernel's sockets and links that come and go."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_slurm.link import flow, wire
from launchers.reactor import Reactor
from launchers.tunnel import Tunnel


class Node:
    """Tunnel of a kernel whose ends are sockets of the test's; the uplink's outbox is the real one."""

    def __init__(self) -> None:
        self.outbox = flow.Outbox(shared_backlog=4 * flow.WINDOW)
        self.outbox.hold()
        self.kernel_ends: list[socket.socket] = []
        self.ours: list[socket.socket] = []
        self.reactor = Reactor()
        self.kernel = kernel = SimpleNamespace(connect=self.connect, runs=True)
        uplink: Any = SimpleNamespace(outbox=self.outbox, flush=lambda: None)
        find: Any = {"k": kernel}.get
        self.tunnel = Tunnel(self.reactor, uplink, find, lambda _kernel_id: None)

    def connect(self, _channel: str) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.settimeout(10)
        self.ours.append(ours)
        self.kernel_ends.append(theirs)
        return ours

    def turn_until(self, condition: Callable[[], bool]) -> None:
        """Let the reactor work until the condition is true."""
        for _ in range(1000):
            if condition():
                return
            self.reactor.later(0.01, lambda: None)
            self.reactor.run_once()
        raise AssertionError("it did not come true")

    def sent(self) -> list[tuple[str, Any]]:
        """What goes out now."""
        messages = []
        while (frame := self.outbox.next_frame()) is not None:
            messages += [wire.decode(body, wire.UP) for body in wire.unpack(frame)]
        return messages

    def link_down(self) -> None:
        self.outbox.hold()
        self.tunnel.read_on()

    def read_all(self, number: int = 0) -> bytes:
        """What the kernel's end of a connection gets, until it is closed."""
        data = b""
        while chunk := self.kernel_ends[number].recv(65536):
            data += chunk
        return data


@pytest.fixture
def node() -> Iterator[Node]:
    """A node with a link to a server that has opened nothing yet."""
    node = Node()
    assert node.tunnel.link_up({"session": "one", "streams": {}}) == {"streams": {}, "opened": 0}
    yield node
    for sock in [*node.kernel_ends, *node.ours]:
        sock.close()
    signal.set_wakeup_fd(-1)


def test_a_kernel_connection_outlives_the_link(node):
    """What the kernel wrote without a link goes out on the next, behind what the server lacks."""
    node.tunnel.open(5, b"k\0iopub")
    node.kernel_ends[0].sendall(b"one")
    node.turn_until(lambda: node.outbox._streams[5].sending.size == 3)
    assert node.sent() == [("DATA", (5, b"one"))]
    node.link_down()
    node.kernel_ends[0].sendall(b"two")
    node.turn_until(lambda: node.outbox._streams[5].sending.size == 3)
    assert node.sent() == []
    report = node.tunnel.link_up({"session": "one", "streams": {"5": [1, 0]}})
    assert report == {"streams": {"5": [0, 0]}, "opened": 5}
    assert node.sent() == [("DATA", (5, b"ne")), ("DATA", (5, b"two"))]


def test_without_a_link_output_is_read_on_to_a_bound(node):
    """A kernel can print more than a window into an outage, and is held up only where memory is to end."""
    node.tunnel.open(1, b"k\0iopub")
    kernel = node.kernel_ends[0]
    kernel.setblocking(False)
    node.link_down()

    def flood() -> bool:
        try:
            kernel.send(bytes(65536))
        except BlockingIOError:
            return node.outbox._streams[1].sending.size >= 4 * flow.WINDOW
        return False

    node.turn_until(flood)
    assert node.outbox._streams[1].sending.size < 4 * flow.WINDOW + flow.CHUNK


def test_a_new_server_process_gets_new_streams(node):
    """Connections for the clients of an earlier one are closed, and its numbers are free again."""
    node.tunnel.open(5, b"k\0shell")
    node.link_down()
    report = node.tunnel.link_up({"session": "two", "streams": {"5": [0, 0]}})
    assert report == {"streams": {}, "opened": 0}
    assert node.read_all() == b""
    node.tunnel.open(1, b"k\0shell")
    assert node.outbox.may_read(1)


def test_a_client_that_left_meanwhile_is_seen_to_leave(node):
    """What it had sent still reaches the kernel, then its connection is closed."""
    node.tunnel.open(1, b"k\0shell")
    node.tunnel.data(1, b"last request")
    node.link_down()
    node.tunnel.link_up({"session": "one", "streams": {}})
    assert node.read_all() == b"last request"
    assert node.sent() == []


def test_a_kernel_connection_that_ended_meanwhile_ends_at_the_server(node):
    """Its last words go first."""
    node.tunnel.open(1, b"k\0iopub")
    node.link_down()
    node.kernel_ends[0].sendall(b"last words")
    node.kernel_ends[0].close()
    node.turn_until(lambda: node.outbox._streams[1].closing)
    node.tunnel.link_up({"session": "one", "streams": {"1": [0, 0]}})
    assert node.sent() == [("DATA", (1, b"last words")), ("CLOSE", (1, b""))]
    node.tunnel.close(1)
    assert node.outbox._streams == {}


def test_a_kernel_that_is_not_there_is_said_so_on_the_next_link_too(node):
    """The refusal of a connection is not lost with the link."""
    node.tunnel.open(1, b"nobody\0shell")
    assert node.sent() == [("CLOSE", (1, b""))]
    node.link_down()
    node.tunnel.link_up({"session": "one", "streams": {"1": [0, 0]}})
    assert node.sent() == [("CLOSE", (1, b""))]


def test_the_streams_of_a_process_end_with_it(node):
    """A process that it left behind may hold the connection: nothing more goes there, and its last words are read."""
    node.tunnel.open(1, b"k\0shell")
    node.kernel_ends[0].sendall(b"last words")
    node.tunnel.close_ended()
    assert node.outbox.may_read(1)
    node.kernel.runs = False
    node.tunnel.close_ended()
    node.tunnel.data(1, b"the next cell")
    assert node.read_all() == b""
    assert node.sent() == [("DATA", (1, b"last words")), ("CLOSE", (1, b""))]
