"""What a launcher keeps of a kernel's output: the ring, when it keeps, and how it is read over the tunnel."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_slurm.link import flow, wire
from launchers import output as output_module
from launchers.output import OVERHEAD, MessageRing, OutputBuffer
from launchers.reactor import Backoff, Reactor
from launchers.subscriber import DELIMITER, Message, encode_frame
from launchers.tunnel import Tunnel

LIMIT = 2**20


def message(msg_id: str, size: int = 10) -> Message:
    """A message that was kept."""
    return Message(msg_id, encode_frame(0, b"x" * size))


def in_ring(ring: MessageRing) -> tuple[list[str], int]:
    """The ids of the messages that are there, and how many are not."""
    header, messages = ring.snapshot()
    return [message.msg_id for message in messages], header["dropped"]


# -- the ring -------------------------------------------------------------------------------------


def test_what_is_acknowledged_is_let_go():
    """Up to and including the message that is named; the positions are remembered."""
    ring = MessageRing(LIMIT)
    for name in "abcd":
        ring.add(message(name))
    ring.acknowledge("b", {"session": "a"})
    assert in_ring(ring) == (["c", "d"], 0)
    assert ring.snapshot()[0] == {"dropped": 0, "positions": {"session": "a"}, "acked": "b"}
    ring.acknowledge("d", {})
    assert (in_ring(ring), ring.size) == (([], 0), 0)


def test_an_acknowledgement_may_come_before_the_message():
    """A client can be quicker than we are: what comes up to there is let go when it comes."""
    ring = MessageRing(LIMIT)
    ring.add(message("a"))
    ring.acknowledge("c", {})
    for name in "bcd":
        ring.add(message(name))
    assert in_ring(ring) == (["d"], 0)


def test_the_oldest_go_where_there_are_too_many_and_are_counted():
    """An ACK for one that has gone tells which of these clients have."""
    ring = MessageRing(10 * (OVERHEAD + 12))
    for number in range(30):
        ring.add(message(str(number)))
    assert in_ring(ring) == ([str(number) for number in range(20, 30)], 20)
    ring.acknowledge("14", {})
    assert in_ring(ring) == ([str(number) for number in range(20, 30)], 5)
    ring.acknowledge("20", {})
    assert in_ring(ring) == ([str(number) for number in range(21, 30)], 0)


def test_what_is_missing_between_messages_is_counted_until_it_is_acknowledged():
    """A message that was too large, and an interruption, have their place in the order."""
    ring = MessageRing(LIMIT)
    ring.add(message("a"))
    ring.add(Message("huge", None))
    ring.add(Message("", None))
    ring.add(message("b"))
    assert in_ring(ring) == (["a", "b"], 2)
    ring.acknowledge("a", {})
    assert in_ring(ring) == (["b"], 2)
    ring.acknowledge("huge", {})
    assert in_ring(ring) == (["b"], 1)
    ring.acknowledge("b", {})
    assert in_ring(ring) == ([], 0)


def test_many_small_messages_are_bounded_too():
    """Empty ones cost what they cost in memory; of those that went only so many are known by name."""
    ring = MessageRing(100 * OVERHEAD)
    for number in range(20_000):
        ring.add(message(str(number), 0))
    assert len(ring._messages) <= 100
    assert len(ring._dropped) == output_module.MAX_DROPPED_IDS
    assert in_ring(ring)[1] == 20_000 - len(ring._messages)


names = st.sampled_from("abcdefgh")
events = st.lists(st.tuples(st.sampled_from(["add", "ack", "huge"]), names, st.integers(0, 400)), max_size=60)


@given(events)
@settings(deadline=None, max_examples=300)
def test_nothing_that_was_published_is_neither_there_nor_acknowledged_nor_counted(steps):
    """Whatever comes in whatever order, also the same ids again, and never more than the bound."""
    ring = MessageRing(2000)
    added = 0
    for step, name, size in steps:
        if step == "ack":
            before = len(ring._messages) + len(ring._dropped)
            ring.acknowledge(name, {})
            added -= before - len(ring._messages) - len(ring._dropped)
        else:
            before, awaited = added, ring._awaited
            ring.add(message(name, size) if step == "add" else Message(name, None))
            added = 0 if name == awaited else before + 1
        assert ring.size <= 2000
        present, dropped = in_ring(ring)
        assert len(present) + dropped == added


# -- the keeper, with a publisher of libzmq's -------------------------------------------------------


class Kernel:
    """A publisher on a Unix socket, and the launcher's keeper for it."""

    def __init__(self, directory: Path) -> None:
        self.kernel_id = "k"
        self.path = directory / "c-2"
        self.context = zmq.Context()
        self.reactor = Reactor()
        self.linked = True
        self.over = False
        self.listen()
        self.output = OutputBuffer(
            self.reactor,
            connect=self.connect,
            linked=lambda: self.linked,
            is_over=lambda: self.over,
            limit=LIMIT,
        )
        self.number = 0

    def listen(self) -> None:
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.bind(f"ipc://{self.path}")

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.connect(str(self.path))
        return sock

    def turn_until(self, condition: Callable[[], Any], *, seconds: float = 10) -> None:
        """Let the reactor work until the condition is true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            self.reactor.later(0.002, lambda: None)
            self.reactor.run_once()

    def until_subscribed(self) -> None:
        self.turn_until(lambda: self.socket.poll(0))
        assert self.socket.recv() == b"\x01"

    def publish(self, *msg_ids: str, content: bytes = b"{}") -> None:
        for msg_id in msg_ids:
            header = json.dumps({"msg_id": msg_id}).encode()
            self.socket.send_multipart([b"stream", DELIMITER, b"sig", header, b"{}", b"{}", content])

    def seen(self) -> None:
        """Until all that was published so far has been read."""
        self.number += 1
        marker = f"marker-{self.number}"
        if self.output._wanted:
            self.publish(marker)
            self.turn_until(lambda: marker in self.output.ring._messages)
            del self.output.ring._messages[marker]
        else:
            self.turn_until_read(marker)

    def turn_until_read(self, marker: str) -> None:
        """Until a message without a reader has come through the socket, and been dropped."""
        subscriber, data = self.output._subscriber, bytearray()
        feed = subscriber.feed

        def feeding(more: bytes) -> Any:
            data.extend(more)
            return feed(more)

        subscriber.feed = feeding
        self.publish(marker)
        self.turn_until(lambda: marker.encode() in data)
        subscriber.feed = feed

    def ids(self) -> list[str]:
        return in_ring(self.output.ring)[0]

    def close(self) -> None:
        self.output.close()
        self.context.destroy(linger=0)


@pytest.fixture
def kernel(tmp_path) -> Iterator[Kernel]:
    """A kernel whose channels listen."""
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()
    signal.set_wakeup_fd(-1)


def test_output_is_kept_until_it_is_acknowledged(kernel):
    """From the first ACK on, which may say nothing but that others will follow."""
    kernel.output.begin()
    kernel.output.acknowledged({"kernel_id": "k", "upto": "", "positions": {}})
    kernel.until_subscribed()
    kernel.publish("a", "b", "c")
    kernel.seen()
    assert kernel.ids() == ["a", "b", "c"]
    kernel.output.acknowledged({"upto": "b", "positions": {"s": "a", "t": 5, "": "x"}})
    assert kernel.ids() == ["c"]
    assert kernel.output.ring.positions == {"s": "a"}


@pytest.mark.parametrize("fields", [{}, {"upto": 5}, {"upto": "x" * 1000, "positions": []}, {"positions": {"a": {}}}])
def test_an_acknowledgement_of_nonsense_lets_nothing_go(kernel, fields):
    """It is bounded, and checked."""
    kernel.linked = False
    kernel.output.begin()
    kernel.until_subscribed()
    kernel.publish("a")
    kernel.seen()
    kernel.output.acknowledged(fields)
    assert kernel.ids() == ["a"]
    assert kernel.output.ring.positions == {}


def test_a_server_that_never_acknowledges_wants_only_what_comes_while_it_is_away(kernel):
    """With the link nothing is kept; without it all is; and when the same server is back it has lost nothing."""
    kernel.output.begin()
    kernel.until_subscribed()
    kernel.publish("a")
    kernel.seen()
    assert kernel.ids() == []
    kernel.output.link_down()
    kernel.publish("b")
    kernel.seen()
    assert kernel.ids() == ["b"]
    kernel.output.link_up(same_server=True, limit=LIMIT)
    assert kernel.ids() == []
    kernel.publish("c")
    kernel.seen()
    assert kernel.ids() == []


def test_another_server_finds_what_came_before_it_was_there(kernel):
    """It is kept until it is read, and what comes after that it has by its own subscription."""
    kernel.output.begin()
    kernel.output.link_down()
    kernel.until_subscribed()
    kernel.publish("a")
    kernel.seen()
    kernel.output.link_up(same_server=False, limit=LIMIT)
    kernel.publish("b")
    kernel.seen()
    assert kernel.ids() == ["a", "b"]
    list(kernel.output.read())
    kernel.publish("c")
    kernel.seen()
    assert kernel.ids() == []


def test_a_client_is_welcomed_before_the_launcher_subscribes(kernel):
    """A kernel welcomes the first subscription only (JEP 65): clients that wait for it are not to wait for a nudge."""
    kernel.output.begin()
    client = kernel.context.socket(zmq.SUB)
    client.subscribe(b"")
    client.connect(f"ipc://{kernel.path}")
    kernel.until_subscribed()
    kernel.turn_until(lambda: kernel.output._subscriber is not None and kernel.output._subscriber.subscribed)
    assert kernel.socket.poll(0) == 0


def test_a_last_word_is_read_from_a_kernel_that_is_over(kernel):
    """What its socket still holds when a server reads the kept output belongs to that output."""
    kernel.linked = False
    kernel.output.begin()
    kernel.until_subscribed()
    kernel.publish("last")
    kernel.over = True
    kernel.context.destroy(linger=1000)
    data = b"".join(kernel.output.read())
    assert b'"last"' in data
    kernel.turn_until(lambda: kernel.output._socket is None)
    assert kernel.output.trouble == ""
    kernel.context = zmq.Context()


def test_an_interruption_is_counted(kernel):
    """A kernel that closes our connection and lives is subscribed to again, and something may be missing."""
    kernel.linked = False
    kernel.output.begin()
    kernel.until_subscribed()
    kernel.publish("a")
    kernel.seen()
    kernel.socket.close(linger=0)
    kernel.turn_until(lambda: kernel.output._socket is None)
    kernel.listen()
    kernel.until_subscribed()
    kernel.publish("b")
    kernel.seen()
    assert in_ring(kernel.output.ring) == (["a", "b"], 1)


def test_a_kernel_that_cannot_be_subscribed_to_is_given_up(kernel, monkeypatch):
    """After a number of tries; readers get the answer that nothing is kept."""
    monkeypatch.setattr(kernel.output, "_retry", Backoff(0.01, 0.01))
    kernel.socket.close(linger=0)
    kernel.linked = False
    kernel.output.begin()
    kernel.turn_until(lambda: kernel.output.trouble)
    header = json.loads(wire.FrameReader(LIMIT).feed(b"".join(kernel.output.read()))[0])
    assert header["keeps"] is False


def test_keeping_can_be_switched_off(kernel):
    """Then no connection is made at all."""
    kernel.output.ring.limit = 0
    kernel.linked = False
    kernel.output.begin()
    kernel.output.link_down()
    assert kernel.output._socket is None
    assert "kept_output" in kernel.output.trouble


# -- over the tunnel --------------------------------------------------------------------------------


class Reading:
    """A launcher's channels with one kernel, and what goes out of them."""

    def __init__(self, kernel: Kernel) -> None:
        self.outbox = flow.Outbox(flow.NODE_BACKLOG)
        self.outbox.hold()
        uplink: Any = SimpleNamespace(outbox=self.outbox, flush=lambda: None)
        find: Any = {"k": kernel}.get
        self.tunnel = Tunnel(kernel.reactor, uplink, find)
        self.tunnel.link_up({"session": "one", "streams": {}})

    def all(self, number: int) -> tuple[list[bytes], bool]:
        """The records of a stream, and whether it was closed; the server gives credit as it takes."""
        reader, records, closed = wire.FrameReader(2**30), [], False
        while (frame := self.outbox.next_frame()) is not None:
            for name, (stream, payload) in [wire.decode(body, wire.UP) for body in wire.unpack(frame)]:
                if name == "DATA" and stream == number:
                    records += reader.feed(payload)
                    self.tunnel.credit(number, len(payload).to_bytes(4, "big"))
                closed |= name == "CLOSE" and stream == number
            assert self.outbox.waiting(number) < flow.BACKLOG + 2 * LIMIT
            self.tunnel.read_on()
        return records, closed


def test_what_is_kept_goes_over_a_stream_of_its_own(kernel):
    """A header, the messages' frames in their order, and the end; it can be read again."""
    kernel.linked = False
    kernel.output.begin()
    kernel.output.acknowledged({"upto": "", "positions": {"s": "x"}})
    kernel.until_subscribed()
    ids = [str(number) for number in range(100)]
    kernel.publish(*ids, content=b"x" * 5000)
    kernel.seen()
    reading = Reading(kernel)
    for number in (1, 2):
        reading.tunnel.open(number, b"k\0kept")
        (header, *messages), closed = reading.all(number)
        assert json.loads(header) == {"dropped": 0, "positions": {"s": "x"}, "acked": "", "keeps": True}
        frames = [wire.unpack(record) for record in messages]
        assert [json.loads(parts[3])["msg_id"] for parts in frames] == ids
        assert {len(parts[6]) for parts in frames} == {5000}
        assert closed
        reading.tunnel.close(number)
    assert reading.tunnel._output_readings == {}


def test_a_kernel_that_is_not_there_has_kept_nothing(kernel):
    """The stream is closed at once."""
    reading = Reading(kernel)
    reading.tunnel.open(1, b"other\0kept")
    assert reading.all(1) == ([], True)


def test_one_reading_a_kernel_is_enough(kernel):
    """A second ends the first: what is read is held in memory."""
    kernel.linked = False
    kernel.output.begin()
    kernel.until_subscribed()
    kernel.publish(*map(str, range(9)), content=b"x" * 100_000)
    kernel.seen()
    reading = Reading(kernel)
    reading.tunnel.open(1, b"k\0kept")
    reading.tunnel.open(2, b"k\0kept")
    assert list(reading.tunnel._output_readings) == [2]
    records, closed = reading.all(2)
    assert (len(records), closed) == (10, True)
    reading.tunnel.link_up({"session": "two", "streams": {}})
    assert reading.tunnel._output_readings == {}
