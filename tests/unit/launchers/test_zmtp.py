"""One end of a ZMTP connection: against a real publisher, and against bytes that no peer sends."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers.readers import DELIMITER
from launchers.zmtp import COMMAND, MAX_FRAME, MORE, Peer, ProtocolError, encode_frame, split

LIMIT = 4 * 1024 * 1024


def jupyter_message(msg_id: str, content: bytes, *, topic: bytes = b"stream.stdout") -> list[bytes]:
    """A message's frames, as a kernel publishes them."""
    header = json.dumps({"msg_id": msg_id, "msg_type": "stream", "username": '"msg_id": "x"'}).encode()
    return [topic, DELIMITER, b"signature", header, b"{}", b"{}", content, b"buffer"]


class Publisher:
    """A publisher of libzmq's, and our connection to it."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(endpoint)
        address = self.socket.getsockopt(zmq.LAST_ENDPOINT).decode()
        if address.startswith("ipc://"):
            self.connection = socket.socket(socket.AF_UNIX)
            self.connection.connect(address[len("ipc://") :])
        else:
            self.connection = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        self.connection.settimeout(10)

    def read(self, reader: Peer, count: int, *, at_a_time: int = 65536) -> list[bytes | None]:
        """Answer the handshake, and read until so many messages have come."""
        messages: list[bytes | None] = []
        while not reader.ready or reader.outgoing or len(messages) < count:
            if reader.outgoing:
                self.connection.sendall(reader.outgoing)
                reader.outgoing.clear()
                continue
            data = self.connection.recv(at_a_time)
            assert data, "it hung up"
            was_ready = reader.ready
            messages += reader.feed(data)
            if reader.ready and not was_ready:
                reader.outgoing += encode_frame(0, b"\x01")
        return messages

    def subscribe(self, reader: Peer, *, at_a_time: int = 65536) -> None:
        """Shake hands, and wait until the publisher knows of the subscription, to everything."""
        assert self.read(reader, 0, at_a_time=at_a_time) == []
        assert self.socket.poll(10_000)
        assert self.socket.recv() == b"\x01"

    def close(self) -> None:
        self.connection.close()
        self.context.destroy(linger=0)


def bodies(messages: list[bytes | None]) -> list[list[bytes]]:
    """The frames of messages that are whole."""
    return [split(message or b"", 1000) for message in messages]


WAYS = ["ipc", "tcp"]


@pytest.fixture(params=WAYS)
def publisher(request) -> Iterator[Publisher]:
    """A publisher by each transport that kernels behind the tunnel have."""
    with tempfile.TemporaryDirectory(prefix="gs-", dir="/tmp") as directory:
        endpoint = f"ipc://{Path(directory) / 'c-2'}" if request.param == "ipc" else "tcp://127.0.0.1:*"
        publisher = Publisher(endpoint)
        yield publisher
        publisher.close()


def test_a_real_publisher_is_subscribed_to_by_every_way(publisher):
    """Everything that it publishes comes, with its id and frames, whatever their sizes."""
    reader = Peer(b"SUB", LIMIT)
    publisher.subscribe(reader)
    sizes = (0, 1, 200, 222, 223, 255, 256, 70_000, 1_000_000)
    sent = [jupyter_message(f"id-{size}", b"x" * size) for size in sizes]
    for frames in sent:
        publisher.socket.send_multipart(frames)
    messages = publisher.read(reader, len(sent))
    assert bodies(messages) == sent


def test_any_cut_of_the_bytes_gives_the_same(publisher):
    """One byte at a time, from the greeting on."""
    reader = Peer(b"SUB", LIMIT)
    publisher.subscribe(reader, at_a_time=1)
    sent = [jupyter_message("a", b"x" * 300), [b"no jupyter message"], jupyter_message("b", b"", topic=b"")]
    for frames in sent:
        publisher.socket.send_multipart(frames)
    assert bodies(publisher.read(reader, 3, at_a_time=1)) == sent


def test_a_message_over_the_bound_is_passed_over(publisher):
    """It takes no memory to speak of, and those around it come."""
    reader = Peer(b"SUB", 100_000)
    publisher.subscribe(reader)
    huge = jupyter_message("huge", b"x" * 5_000_000)
    for frames in (jupyter_message("a", b"1"), huge, [b"x" * 200_000, b"y" * 10], jupyter_message("b", b"2")):
        publisher.socket.send_multipart(frames)
    messages: list[bytes | None] = []
    most = 0
    while len(messages) < 4:
        messages += publisher.read(reader, 1)
        most = max(most, held(reader))
    assert [message is None for message in messages] == [False, True, True, False]
    assert (split(messages[0], 9)[6], split(messages[3], 9)[6]) == (b"1", b"2")
    assert most <= 100_000 + 65536


def test_a_heartbeat_between_messages_is_answered():
    """A publisher that pings (ZMQ_HEARTBEAT_IVL) and gets no answer would hang up."""
    publisher = Publisher("tcp://127.0.0.1:*")
    publisher.socket.unbind(publisher.socket.getsockopt(zmq.LAST_ENDPOINT))
    publisher.connection.close()
    publisher.socket.setsockopt(zmq.HEARTBEAT_IVL, 50)
    publisher.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 500)
    publisher.socket.bind("tcp://127.0.0.1:*")
    port = int(publisher.socket.getsockopt(zmq.LAST_ENDPOINT).rpartition(b":")[2])
    publisher.connection = socket.create_connection(("127.0.0.1", port))
    publisher.connection.settimeout(10)
    reader = Peer(b"SUB", LIMIT)
    publisher.subscribe(reader)
    for _ in range(30):  # 1.5 s: three times what the publisher waits for an answer
        reader.feed(publisher.connection.recv(65536))
        publisher.connection.sendall(reader.outgoing)
        reader.outgoing.clear()
    publisher.socket.send_multipart(jupyter_message("a", b"1"))
    assert bodies(publisher.read(reader, 1)) == [jupyter_message("a", b"1")]
    publisher.close()


# -- bytes that no publisher sends ----------------------------------------------------------------


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = encode_frame(COMMAND, b"\x05READY" + b"\x0bSocket-Type\x00\x00\x00\x03PUB")


def ready_reader(limit: int = 10_000) -> Peer:
    """One whose handshake is over."""
    reader = Peer(b"SUB", limit)
    reader.feed(GREETING + READY)
    assert reader.ready
    reader.outgoing.clear()
    return reader


def held(reader: Peer) -> int:
    """The bytes that it has in memory."""
    return len(reader._buffer)


@given(st.lists(st.binary(max_size=3000), max_size=8))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_refused_or_read_within_the_bound(pieces):
    """Whatever comes after the handshake: a protocol error, or messages, and never more memory than the bound."""
    reader = ready_reader()
    try:
        for piece in pieces:
            reader.feed(piece)
            assert held(reader) <= 10_000 + 3000
    except ProtocolError:
        pass


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_any_greeting_or_handshake_is_refused_or_waited_for(data):
    """Before the handshake is over a peer gets little room."""
    for start in (b"", GREETING, GREETING.replace(b"NULL\0", b"CURVE")):
        reader = Peer(b"SUB", 10_000)
        try:
            reader.feed(start + data)
        except ProtocolError:
            continue
        assert held(reader) <= len(start + data)


def test_a_publisher_with_another_mechanism_is_refused():
    """The launcher knows NULL only."""
    with pytest.raises(ProtocolError, match="CURVE"):
        Peer(b"SUB", 10_000).feed(GREETING.replace(b"NULL\0", b"CURVE"))


frames_of_messages = st.lists(st.lists(st.binary(max_size=600), min_size=1, max_size=6), min_size=1, max_size=5)


@given(frames_of_messages, st.lists(st.integers(1, 700), min_size=1, max_size=20), st.booleans())
@settings(deadline=None, max_examples=200)
def test_messages_come_out_as_they_went_in(messages, cuts, pings):
    """However they are cut, and with heartbeats between their frames."""
    data = b""
    for frames in messages:
        for number, frame in enumerate(frames):
            if pings:
                data += encode_frame(COMMAND, b"\x04PING\x00\x10context")
            data += encode_frame(MORE if number < len(frames) - 1 else 0, frame)
    reader = ready_reader(LIMIT)
    found, at, step = [], 0, 0
    while at < len(data):
        size = cuts[step % len(cuts)]
        found += reader.feed(data[at : at + size])
        at, step = at + size, step + 1
    assert bodies(found) == messages
    pongs = bytes(reader.outgoing).count(b"\x04PONGcontext")
    assert pongs == (sum(map(len, messages)) if pings else 0)


def test_a_publisher_that_says_an_error_is_told_apart():
    """Its own words are in the reason."""
    reader = Peer(b"SUB", 10_000)
    with pytest.raises(ProtocolError, match="go away"):
        reader.feed(GREETING + encode_frame(COMMAND, b"\x05ERROR\x07go away"))


def test_a_frame_of_no_message_is_refused():
    """A size that no publisher can mean would be waited for without an end."""
    with pytest.raises(ProtocolError, match="bytes"):
        ready_reader().feed(b"\x02" + (2 * MAX_FRAME).to_bytes(8, "big"))


def test_a_message_of_more_frames_than_wanted_has_none():
    """A million empty frames would take a hundred times their bytes."""
    message = encode_frame(MORE, b"") * 1000 + encode_frame(0, b"")
    assert split(message, 1000) == []
    assert len(split(message, 1001)) == 1001
