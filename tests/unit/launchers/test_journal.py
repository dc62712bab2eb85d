"""The journal of a kernel in its launcher: the ring, the subscription, and what its readers are sent."""

from __future__ import annotations

import contextlib
import hmac
import itertools
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
from launchers import journal as journal_module
from launchers import zmtp
from launchers.journal import MARKER, MIN_LIMIT, OVERHEAD, Journal
from launchers.reactor import Backoff, Reactor
from launchers.readers import DELIMITER, MAX_BATCH, MAX_JOINED
from launchers.tunnel import Tunnel

KEY = "a key of the kernel's"
CONNECTION = {"key": KEY, "signature_scheme": "hmac-sha256"}


def frames_of(msg_type: str, content: dict[str, Any], *, parent: str = "cell", number: int = 0) -> list[bytes]:
    """A message as a kernel signs it."""
    parts = [
        json.dumps(part).encode()
        for part in ({"msg_id": f"id-{number}", "msg_type": msg_type}, {"msg_id": parent}, {}, content)
    ]
    signature = hmac.digest(KEY.encode(), b"".join(parts), "sha256").hex().encode()
    return [f"topic.{msg_type}".encode(), DELIMITER, signature, *parts]


def stream(text: str, name: str = "stdout", **more: Any) -> list[bytes]:
    """A message with printed text."""
    return frames_of("stream", {"name": name, "text": text}, **more)


def small_ring(limit: int) -> Journal:
    """A journal of fewer bytes than an admin can set."""
    journal = Journal(Reactor(), 0)
    journal._limit = limit
    return journal


def numbers(journal: Journal) -> list[int]:
    """The numbers of the messages that are there."""
    first, entries = journal.entries(1, 10**6)
    return [number for number, entry in enumerate(entries, first) if entry is not None]


@pytest.fixture(autouse=True)
def no_wakeup() -> Iterator[None]:
    """Take the reactor's file for signals away again."""
    yield
    signal.set_wakeup_fd(-1)


# -- the ring -------------------------------------------------------------------------------------


def test_the_oldest_messages_go_and_their_numbers_with_them():
    """A lost message takes a number, too; the newest message stays whatever its size is."""
    journal = small_ring(10 * (OVERHEAD + 10))
    for _ in range(30):
        journal.add([b"x" * 10])
    assert (numbers(journal), journal.oldest, journal.next) == (list(range(21, 31)), 21, 31)
    journal.add([None, b"y" * 10])
    assert numbers(journal) == [*range(23, 31), 32]
    journal.add([b"z" * 5000])
    assert (numbers(journal), journal.next) == ([33], 34)
    journal.make_room()
    assert numbers(journal) == [33]


steps = st.lists(st.one_of(st.none(), st.integers(0, 600)), max_size=400)


@given(steps)
@settings(deadline=None, max_examples=100)
def test_every_number_is_a_message_or_lost(sizes):
    """Whatever comes, the ring holds the newest messages in their order, and never more than its limit."""
    journal = small_ring(2000)
    for number, size in enumerate(sizes, 1):
        journal.add([None if size is None else str(number).encode().ljust(size, b"x")])
        assert journal.size <= 2000
        first, entries = journal.entries(0, 10**6)
        assert (first, first + len(entries)) == (journal.oldest, journal.next)
        for n, entry in enumerate(entries, first):
            expected = sizes[n - 1]
            assert entry == (None if expected is None else str(n).encode().ljust(expected, b"x"))


def test_many_small_messages_are_bounded_and_cheap():
    """A hundred thousand empty ones; the list of them does not grow with those that were dropped."""
    journal = small_ring(100 * OVERHEAD)
    for _ in range(1000):
        journal.add([b""] * 100)
    assert len(journal._entries) < 3000
    assert (journal.next, journal.oldest) == (100_001, 99_901)


def test_the_ring_has_a_least_size():
    """With 0, too: a reader is always a little late."""
    assert Journal(Reactor(), 0)._limit == MIN_LIMIT
    assert Journal(Reactor(), 2 * MIN_LIMIT)._limit == 2 * MIN_LIMIT


def test_numbers_go_on_over_the_kernels_processes():
    """A marker begins each of them; another launcher's numbers begin behind those that clients have."""
    journal = Journal(Reactor(), 0)
    journal.begin(CONNECTION, 1)
    journal.add([b"a"])
    journal.begin(CONNECTION, 2)
    assert (numbers(journal), journal.entries(1, 9)[1]) == ([1, 2, 3], [MARKER, b"a", MARKER])
    other = Journal(Reactor(), 0)
    other.begin(CONNECTION, 700)
    assert (numbers(other), other.oldest, other.next) == ([700], 700, 701)


def test_an_acknowledgement_is_kept_for_the_next_server():
    """Positions are replaced, notes are merged, and nonsense is left out."""
    journal = Journal(Reactor(), 0)
    journal.acknowledge(
        {"positions": {"s": 3, "t": -1, "u": "x", "v": True, "": 1}, "notes": {"a": "1", "b": "2", "c": 5}}
    )
    journal.acknowledge({"positions": {" read": 4}, "notes": {"a": None, "d": "x" * 5000, "e": "3"}})
    assert (journal.positions, journal.notes) == ({" read": 4}, {"b": "2", "e": "3"})
    journal.acknowledge({"notes": {f"n{number}": "x" * 4000 for number in range(2000)}})
    assert len(json.dumps(journal.notes)) <= 2 * wire.MAX_NOTES_SIZE
    assert (list(journal.notes)[-1], journal.positions) == ("n1999", {})
    journal.acknowledge({"positions": [], "notes": []})


# -- the subscription, with a publisher of libzmq's -------------------------------------------------


class Node:
    """A publisher on a Unix socket, its journal, and the launcher's tunnel to a server that the test is."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "c-2"
        self.context = zmq.Context()
        self.reactor = Reactor()
        self.over = False
        self.listen()
        self.journal = Journal(self.reactor, 0)
        self.journal.begin(CONNECTION, 0)
        self.outbox = flow.Outbox()
        self.outbox.hold()
        self.due = False
        uplink: Any = SimpleNamespace(outbox=self.outbox, flush=self.flush)
        find: Any = {"k": self.journal}.get
        self.tunnel = Tunnel(self.reactor, uplink, lambda _kernel_id: None, find)
        self.tunnel.link_up({"session": "one", "streams": {}})
        self.bytes: dict[int, bytes] = {}
        self.closed: set[int] = set()

    def flush(self) -> None:
        self.due = True

    def listen(self) -> None:
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.bind(f"ipc://{self.path}")

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.connect(str(self.path))
        return sock

    def subscribe(self) -> None:
        self.journal.subscribe(self.connect, lambda: self.over)

    def until_subscribed(self) -> None:
        """Also after an earlier subscription has ended."""
        self.turn_until(lambda: self.socket.poll(0) and self.socket.recv() == b"\x01")

    def turn_until(self, condition: Callable[[], Any], *, seconds: float = 10) -> None:
        """Let the reactor work until the condition is true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            self.reactor.later(0.002, lambda: None)
            self.reactor.run_once()

    def add(self, *messages: list[bytes]) -> None:
        """Put these into the journal as if the kernel had published them."""
        self.journal.add([zmtp.encode(frames) for frames in messages])
        self.journal.pump()

    def publish(self, *messages: list[bytes]) -> None:
        """Publish, and wait until they are in the journal."""
        expected = self.journal.next + len(messages)
        for frames in messages:
            self.socket.send_multipart(frames)
        self.turn_until(lambda: self.journal.next >= expected)

    def pass_on(self, *, credit: bool = True) -> None:
        """Take what goes out now, as the link and the server do: readers are pumped again after each sending."""
        while self.due:
            self.due = False
            while (frame := self.outbox.next_frame()) is not None:
                for name, (number, payload) in [wire.decode(body, wire.UP) for body in wire.unpack(frame)]:
                    if name == "DATA":
                        self.bytes[number] = self.bytes.get(number, b"") + payload
                        if credit:
                            self.tunnel.credit(number, len(payload).to_bytes(4, "big"))
                            self.due = True
                    elif name == "CLOSE":
                        self.closed.add(number)
            self.tunnel.read_on()

    def read(
        self, number: int, start: Any = "", upto: int = 0
    ) -> tuple[dict[str, Any], list[tuple[int, int, list[bytes]]]]:
        """A server's reading: the header, and the records so far."""
        self.tunnel.open(number, f"k\0{wire.JOURNAL}{start}:{upto}".encode())
        self.pass_on()
        return self.records(number)

    def records(self, number: int) -> tuple[dict[str, Any], list[tuple[int, int, list[bytes]]]]:
        header, *bodies = wire.FrameReader(2**30).feed(self.bytes[number])
        return json.loads(header), [
            (int.from_bytes(body[:8], "big"), int.from_bytes(body[8:16], "big"), wire.unpack(body[16:]))
            for body in bodies
        ]

    def close(self) -> None:
        self.journal.close()
        self.context.destroy(linger=0)


@pytest.fixture
def node(tmp_path) -> Iterator[Node]:
    """A kernel whose channels listen."""
    node = Node(tmp_path)
    yield node
    node.close()


def test_what_the_kernel_publishes_is_in_the_journal(node):
    """Also its last words, which its socket holds when it has ended."""
    node.subscribe()
    node.until_subscribed()
    node.publish(stream("a"), stream("b"))
    assert (numbers(node.journal), node.journal.subscribed) == ([1, 2, 3], True)
    node.socket.send_multipart(stream("last"))
    node.over = True
    node.context.destroy(linger=1000)
    node.journal.drain()
    assert b"last" in (node.journal.entries(4, 1)[1][0] or b"")
    node.turn_until(lambda: node.journal._socket is None)
    assert node.journal.trouble == ""
    node.context = zmq.Context()


def test_an_interruption_takes_a_number(node):
    """A kernel that closes the connection and lives is subscribed to again, and something may be missing."""
    node.subscribe()
    node.until_subscribed()
    node.publish(stream("a"))
    node.socket.close(linger=0)
    node.turn_until(lambda: node.journal._socket is None)
    node.listen()
    node.until_subscribed()
    node.publish(stream("b"))
    assert numbers(node.journal) == [1, 2, 4]


def test_garbage_on_iopub_ends_the_subscription_after_some_attempts(node, monkeypatch):
    """The reason is in the header, and readers are not held up."""
    node.socket.close(linger=0)
    node.path.unlink(missing_ok=True)
    monkeypatch.setattr(node.journal, "_retry", Backoff(0.001, 0.001))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node.path))
        listener.listen()
        listener.setblocking(False)
        connections = []

        def spoil() -> str:
            try:
                connections.append(listener.accept()[0])
                greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
                connections[-1].sendall(greeting + zmtp.encode_frame(zmtp.COMMAND, b"\x05READY") + b"\xff" * 100)
            except BlockingIOError:
                pass
            return node.journal.trouble

        node.subscribe()
        node.turn_until(spoil)
        for connection in connections:
            connection.close()
    assert len(connections) == journal_module.MAX_ATTEMPTS
    header, records = node.read(1, 1)
    assert "cannot subscribe" in header["trouble"]
    assert records == [(1, 1, [])]


def test_a_launcher_without_memory_drops_half_of_the_ring_and_goes_on(node, monkeypatch):
    """The message that did not fit is lost by its number."""
    node.subscribe()
    node.until_subscribed()
    node.publish(*[stream("x" * 100)] * 10)
    feed, failures = zmtp.Peer.feed, iter([True])

    def feed_without_memory(peer: zmtp.Peer, data: bytes) -> list[bytes | None]:
        if peer.ready and next(failures, False):
            raise MemoryError
        return feed(peer, data)

    monkeypatch.setattr(zmtp.Peer, "feed", feed_without_memory)
    node.socket.send_multipart(stream("lost"))
    node.turn_until(lambda: node.journal._socket is None)
    assert numbers(node.journal) == list(range(7, 12))
    node.until_subscribed()
    node.publish(stream("next"))
    assert numbers(node.journal)[-2:] == [11, 13]


def test_a_flood_arrives_whole_and_in_order(node):
    """Reading at intervals loses nothing; the first message of a flood does not wait."""
    node.subscribe()
    node.until_subscribed()
    node.read(1)
    node.publish(stream("first"))
    node.pass_on()
    assert [record[2][-1] for record in node.records(1)[1]] == [stream("first")[-1]]
    for number in range(20_000):
        node.socket.send_multipart(stream(f"{number} ", number=number))
    node.turn_until(lambda: node.journal.next == 20_003)
    node.turn_until(lambda: (node.pass_on(), node.records(1)[1][-1][1] == 20_002)[1])
    texts = "".join(json.loads(frames[-1])["text"] for _first, _number, frames in node.records(1)[1])
    assert texts == "first" + "".join(f"{number} " for number in range(20_000))


# -- the server's readings ----------------------------------------------------------------------------


def test_a_reading_begins_where_it_is_told(node):
    """A start that is gone begins at the oldest, one from the future at the next, none where a server was."""
    node.journal._limit = 500
    node.add(*[frames_of("display_data", {"n": number}) for number in range(10)])
    oldest = node.journal.oldest
    assert oldest > 1
    for number, (start, expected) in enumerate([(1, oldest), (11, 11), (500, 12), ("", 12)], 1):
        header, records = node.read(number, start)
        assert (header["oldest"], header["start"], header["next"]) == (oldest, expected, 12)
        assert [record[0] for record in records] == list(range(expected, 12))
        assert number not in node.closed
    node.journal.acknowledge({"positions": {" read": 10, "s": 4}, "notes": {"m": "text"}})
    header, records = node.read(9)
    assert (header["start"], header["positions"], header["notes"]) == (11, {" read": 10, "s": 4}, {"m": "text"})
    assert [frames for _first, _number, frames in records] == [frames_of("display_data", {"n": 9})]


def test_a_bounded_reading_ends(node):
    """After its last number, or after the last message there is; an endless one gets what comes later."""
    node.add(*[frames_of("display_data", {"n": number}) for number in range(10)])
    assert [record[0] for record in node.read(1, 3, 5)[1]] == [3, 4, 5]
    assert [record[0] for record in node.read(2, 9, 10**9)[1]] == [9, 10, 11]
    assert node.read(3, 12, 11)[1] == []
    assert node.closed == {1, 2, 3}
    node.read(4, 11)
    node.add(stream("later"))
    node.pass_on()
    assert [record[0] for record in node.records(4)[1]] == [11, 12]


@pytest.mark.parametrize(
    "channel", [b"journal:", b"journal:x:0", b"journal:1", b"journal:1:2:3", b"journal:-:", b"other"]
)
def test_a_reading_that_cannot_be_is_closed(node, channel):
    """So is one of a kernel that has no journal, and one too many."""
    node.tunnel.open(1, b"k\0" + channel)
    node.tunnel.open(2, b"other\0journal:1:0")
    for number in range(3, 3 + journal_module.MAX_READERS + 1):
        node.tunnel.open(number, b"k\0journal:1:0")
    node.pass_on()
    assert node.closed == {1, 2, 3 + journal_module.MAX_READERS}


def test_readers_end_with_their_server_and_with_the_journal(node):
    """Another server knows none of them; a journal that is dropped closes them."""
    node.read(1, 1)
    node.tunnel.link_up({"session": "two", "streams": {}})
    assert node.journal.readers == {}
    node.read(2, 1)
    node.tunnel.close(2)
    assert node.journal.readers == {}
    node.read(3, 1)
    node.journal.close_later(0.01, node.journal.close)
    node.turn_until(lambda: not node.journal.readers)
    node.pass_on()
    assert 3 in node.closed


def test_a_full_ring_waits_for_a_reader_that_is_behind(node):
    """The kernel is not read meanwhile; once the reader has moved on it is, and nothing is lost."""
    node.subscribe()
    node.until_subscribed()
    node.tunnel.open(1, b"k\0journal:1:0")
    for number in range(300):
        node.socket.send_multipart(frames_of("display_data", {"n": number, "x": "x" * 100_000}))
    node.turn_until(lambda: (node.pass_on(credit=False), node.journal._is_paused)[1])
    assert node.journal.size < 2 * MIN_LIMIT
    assert node.journal.next < 200
    node.tunnel.credit(1, len(node.bytes[1]).to_bytes(4, "big"))
    node.flush()
    node.turn_until(lambda: (node.pass_on(), node.records(1)[1][-1][1] == 301)[1], seconds=30)
    assert [number for _first, number, _frames in node.records(1)[1]] == list(range(1, 302))


def test_a_reader_that_takes_nothing_misses_what_the_ring_drops(node, monkeypatch):
    """After some patience the bound holds for it, too: a jump in the numbers is the count of what was dropped."""
    monkeypatch.setattr(journal_module, "PATIENCE", 0)
    node.tunnel.open(1, b"k\0journal:1:0")
    for number in range(500):
        node.add(frames_of("display_data", {"n": number, "x": "x" * 100_000}))
        node.pass_on(credit=False)
        assert node.outbox.waiting(1) <= flow.BACKLOG + flow.CHUNK
    assert len(node.bytes[1]) <= flow.WINDOW
    node.tunnel.credit(1, len(node.bytes[1]).to_bytes(4, "big"))
    node.flush()
    node.pass_on()
    found = [json.loads(frames[-1])["n"] for _first, _number, frames in node.records(1)[1] if frames]
    jumps = [(a, b) for a, b in itertools.pairwise(found) if b != a + 1]
    assert len(jumps) == 1
    assert jumps[0][1] == node.journal.oldest - 2
    assert found[-1] == 499


def test_a_large_message_is_sent_in_pieces_over_a_broken_link(node):
    """10 MB: the link breaks in the middle, and the stream goes on by bytes; other readers are not held up."""
    large = frames_of("display_data", {"x": "x" * 10_000_000})
    node.journal.set_limit(64 << 20)
    node.add(large, stream("after"))
    node.tunnel.open(1, b"k\0journal:1:0")
    for _ in range(20):
        frame = node.outbox.next_frame()
        assert frame is not None
        for _name, (number, payload) in [wire.decode(body, wire.UP) for body in wire.unpack(frame)]:
            node.bytes[number] = node.bytes.get(number, b"") + payload
            node.tunnel.credit(number, len(payload).to_bytes(4, "big"))
        node.tunnel.read_on()
        assert node.outbox.waiting(1) <= flow.BACKLOG + flow.CHUNK
    received = len(node.bytes[1])
    assert node.outbox.next_frame() is not None  # lost with the link
    node.outbox.hold()
    node.tunnel.link_up({"session": "one", "streams": {"1": [received, received]}})
    node.pass_on()
    assert [frames for _first, _number, frames in node.records(1)[1]] == [[], large, stream("after")]


def test_a_message_that_is_too_large_is_lost_by_its_number(node, monkeypatch):
    """And so is one of too many frames; what is around them comes."""
    monkeypatch.setattr(journal_module, "MIN_MESSAGE", 1_000_000)
    monkeypatch.setattr(wire, "MAX_RECORD_FRAMES", 100)
    node.journal._limit = 1_000_000
    node.subscribe()
    node.until_subscribed()
    many = [*stream("many"), *[b"buffer"] * 200]
    node.publish(stream("a"), frames_of("display_data", {"x": "x" * 2_000_000}), many, stream("b"))
    _header, records = node.read(1, 1)
    assert [(first, number) for first, number, _frames in records] == [(1, 1), (2, 2), (5, 5)]


# -- joining ------------------------------------------------------------------------------------------


def test_texts_of_one_stream_that_wait_are_sent_as_one(node):
    """With the first one's header, all texts, and the kernel's signature; a message that waits alone is unchanged."""
    alone = stream("alone")
    node.add(alone)
    _header, records = node.read(1, 2)
    assert records == [(2, 2, alone)]
    node.add(*[stream(f"é{number}\n", number=number) for number in range(100)])
    node.pass_on()
    (_, (first, number, frames)) = node.records(1)[1]
    assert (first, number) == (3, 102)
    assert frames[:2] + frames[3:6] == stream("é0\n")[:2] + stream("é0\n")[3:6]
    assert json.loads(frames[6]) == {"name": "stdout", "text": "".join(f"é{number}\n" for number in range(100))}
    assert frames[2] == hmac.digest(KEY.encode(), b"".join(frames[3:]), "sha256").hex().encode()


OTHERS = {
    "another cell's": stream("b", parent="other"),
    "stderr": stream("b", "stderr"),
    "no stream": frames_of("display_data", {"name": "stdout", "text": '"stream"'}),
    "a buffer": [*stream("b"), b"buffer"],
    "a key more": frames_of("stream", {"name": "stdout", "text": "b", "x": 1}),
    "no text": frames_of("stream", {"name": "stdout", "text": 5}),
    "no JSON": [*stream("b")[:-1], b"{"],
    "another topic": [b"other", *stream("b")[1:]],
    "a wrong signature": [*stream("b")[:2], b"0" * 64, *stream("b")[3:]],
    "long": stream("b" * MAX_JOINED),
    "no Jupyter message": [b'"stream"'],
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_what_does_not_belong_together_is_not_joined(node, other):
    """Each of these ends a run, is sent as it came, and begins no run."""
    a = stream("a")
    node.add(a, other, a, a)
    _header, records = node.read(1, 2)
    assert [(first, number) for first, number, _frames in records] == [(2, 2), (3, 3), (4, 5)]
    assert [frames for _first, _number, frames in records[:2]] == [a, other]


def test_a_lost_message_and_a_marker_are_not_hidden_by_joining(node):
    """The range of a record has no hole, and one process's text does not continue another's."""
    node.add(stream("a"))
    node.journal.add([None])
    node.add(stream("a"), stream("a"))
    node.journal.begin(CONNECTION, 0)
    node.add(stream("a"))
    ranges = [(first, number) for first, number, _frames in node.read(1, 1)[1]]
    assert ranges == [(1, 1), (2, 2), (4, 5), (6, 6), (7, 7)]


texts = st.lists(st.tuples(st.text(max_size=40), st.sampled_from(["stdout", "stderr"])), max_size=60)


@given(texts)
@settings(deadline=None, max_examples=60)
def test_joining_changes_no_text(pairs):
    """Whatever is printed: every character comes once, in its order, on its stream; surrogates too."""
    from launchers.readers import batch

    journal = Journal(Reactor(), 0)
    journal.begin(CONNECTION, 0)
    journal.add([zmtp.encode(stream(text + "\ud83d", name)) for text, name in pairs])
    cursor, found, covered = 2, [], 2
    while cursor < journal.next:
        cursor, messages = batch(journal, cursor, wire.MAX_NUMBER)
        assert len(messages) <= MAX_BATCH
        for first, number, message in messages:
            assert first == covered
            covered = number + 1
            content = json.loads(zmtp.split(message, 9)[-1])
            found += [(character, content["name"]) for character in content["text"]]
    signal.set_wakeup_fd(-1)
    assert found == [(character, name) for text, name in pairs for character in text + "\ud83d"]
    assert covered == journal.next


# -- clients' streams -----------------------------------------------------------------------------------


class Client:
    """A subscriber of libzmq's, behind a listener that stands for the server's end of the tunnel."""

    def __init__(self, node: Node, directory: Path, number: int, topic: bytes = b"") -> None:
        self.node, self.number = node, number
        self.listener = socket.socket(socket.AF_UNIX)
        path = directory / f"client-{number}"
        self.listener.bind(str(path))
        self.listener.listen()
        self.socket = node.context.socket(zmq.SUB)
        self.socket.subscribe(topic)
        self.socket.connect(f"ipc://{path}")
        self.connection = self.listener.accept()[0]
        node.tunnel.open(number, b"k\0iopub")

    def move(self) -> None:
        """Carry what waits, both ways."""
        with contextlib.suppress(BlockingIOError):
            self.node.tunnel.data(self.number, self.connection.recv(65536, socket.MSG_DONTWAIT))
        self.node.pass_on()
        self.connection.sendall(self.node.bytes.pop(self.number, b""))

    def receive(self) -> list[bytes]:
        """The next message."""
        self.node.turn_until(lambda: (self.move(), self.socket.poll(0))[1])
        return self.socket.recv_multipart()

    def until_subscribed(self) -> None:
        reader = self.node.tunnel._readers[self.number]
        self.node.turn_until(lambda: (self.move(), reader._topics)[1])

    def close(self) -> None:
        self.socket.close(linger=0)
        self.connection.close()
        self.listener.close()


def test_a_client_subscribes_to_the_journal_as_to_a_kernel(node, tmp_path):
    """A real subscriber gets what is published from its subscription on, by the beginnings of its topics."""
    node.add(stream("before"))
    everything, displays = Client(node, tmp_path, 1), Client(node, tmp_path, 2, b"topic.display")
    for client in (everything, displays):
        client.until_subscribed()
    display, large = frames_of("display_data", {"n": 1}), frames_of("display_data", {"x": "x" * 3_000_000})
    node.add(stream("a"), stream("b"), display, large)
    assert json.loads(everything.receive()[-1]) == {"name": "stdout", "text": "ab"}
    assert [everything.receive(), everything.receive()] == [display, large]
    assert [displays.receive(), displays.receive()] == [display, large]
    node.journal.begin(CONNECTION, 0)
    node.add(display)
    assert everything.receive() == display
    displays.socket.unsubscribe(b"topic.display")
    node.turn_until(lambda: (displays.move(), not node.tunnel._readers[2]._topics)[1])
    for client in (everything, displays):
        client.close()


def test_a_client_hears_how_many_messages_it_missed(node, tmp_path):
    """Before the next message and under its cell, with the kernel's signature."""
    client = Client(node, tmp_path, 1)
    client.until_subscribed()
    node.add(stream("a"))
    assert client.receive() == stream("a")
    node.journal.add([None, None])
    node.add(frames_of("display_data", {"n": 1}))
    notice = client.receive()
    assert "gateway_slurm: 2 messages were dropped here" in json.loads(notice[-1])["text"]
    assert notice[2] == hmac.digest(KEY.encode(), b"".join(notice[3:]), "sha256").hex().encode()
    assert client.receive() == frames_of("display_data", {"n": 1})
    client.close()


def test_each_client_is_welcomed_once_by_a_kernel_that_welcomes(node, tmp_path):
    """The welcome names the client's topic, has the kernel's signature, and an id of its own."""
    welcome = frames_of("iopub_welcome", {"subscription": ""})
    node.subscribe()
    node.until_subscribed()
    node.publish([b"", *welcome[1:]], stream("a"))
    ids = set()
    for number, topic in enumerate([b"", b"", b"topic"], 1):
        client = Client(node, tmp_path, number, topic)
        frames = client.receive()
        assert frames[0] == topic
        assert json.loads(frames[6]) == {"subscription": topic.decode()}
        assert frames[2] == hmac.digest(KEY.encode(), b"".join(frames[3:]), "sha256").hex().encode()
        ids.add(json.loads(frames[3])["msg_id"])
        node.add(stream("b"))
        assert client.receive() == stream("b")
        client.close()
    assert len(ids) == 3


@given(st.lists(st.binary(max_size=400), max_size=6))
@settings(deadline=None, max_examples=60)
def test_whatever_a_client_sends_ends_its_stream_alone_or_is_a_subscription(pieces):
    """And takes little memory."""
    from launchers.readers import ClientReader

    journal, outbox = Journal(Reactor(), 0), flow.Outbox()
    outbox.open(1)
    reader = ClientReader(journal, outbox, lambda: None, 1)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    for piece in [greeting + zmtp.encode_frame(zmtp.COMMAND, b"\x05READY"), *pieces]:
        reader.data(piece)
    assert len(reader._peer._buffer) < 10_000
    signal.set_wakeup_fd(-1)
