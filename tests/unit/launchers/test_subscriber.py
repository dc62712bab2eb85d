"""The launcher's own subscription to iopub: against a real publisher, and against bytes that no publisher sends."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_slurm.link.zmtp_frames import COMMAND, DELIMITER, MORE, encode_frame
from launchers.curve import Box, Curve, decode_z85, hsalsa20
from launchers.subscriber import Message, Null, ProtocolError, Subscriber

LIMIT = 4 * 1024 * 1024


def jupyter_message(msg_id: str, content: bytes, *, topic: bytes = b"stream.stdout") -> list[bytes]:
    """A message's frames, as a kernel publishes them."""
    header = json.dumps({"msg_id": msg_id, "msg_type": "stream", "username": '"msg_id": "x"'}).encode()
    return [topic, DELIMITER, b"signature", header, b"{}", b"{}", content, b"buffer"]


class Publisher:
    """A publisher of libzmq's, and our connection to it."""

    def __init__(self, endpoint: str, *, curve: bool) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.XPUB)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.public, secret = zmq.curve_keypair()
        if curve:
            self.socket.curve_secretkey, self.socket.curve_publickey, self.socket.curve_server = secret, self.public, 1
        self.socket.bind(endpoint)
        address = self.socket.getsockopt(zmq.LAST_ENDPOINT).decode()
        if address.startswith("ipc://"):
            self.connection = socket.socket(socket.AF_UNIX)
            self.connection.connect(address[len("ipc://") :])
        else:
            self.connection = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        self.connection.settimeout(10)

    def read(self, reader: Subscriber, count: int, *, at_a_time: int = 65536) -> list[Message]:
        """Answer the handshake, and read until so many messages have come."""
        messages: list[Message] = []
        while not reader.subscribed or reader.outgoing or len(messages) < count:
            if reader.outgoing:
                self.connection.sendall(reader.outgoing)
                reader.outgoing.clear()
                continue
            data = self.connection.recv(at_a_time)
            assert data, "it hung up"
            messages += reader.feed(data)
        return messages

    def subscribe(self, reader: Subscriber, *, at_a_time: int = 65536) -> None:
        """Shake hands, and wait until the publisher knows of the subscription, to everything."""
        assert self.read(reader, 0, at_a_time=at_a_time) == []
        assert self.socket.poll(10_000)
        assert self.socket.recv() == b"\x01"

    def close(self) -> None:
        self.connection.close()
        self.context.destroy(linger=0)


WAYS = ["ipc", "tcp", "curve"]


@pytest.fixture(params=WAYS)
def publisher(request) -> Iterator[tuple[Publisher, Callable[[], Any]]]:
    """A publisher by each way that kernels have, and what makes the mechanism for it."""
    with tempfile.TemporaryDirectory(prefix="gs-", dir="/tmp") as directory:
        endpoint = f"ipc://{Path(directory) / 'c-2'}" if request.param == "ipc" else "tcp://127.0.0.1:*"
        publisher = Publisher(endpoint, curve=request.param == "curve")
        key = publisher.public.decode()
        yield publisher, (lambda: Curve(decode_z85(key))) if request.param == "curve" else Null
        publisher.close()


def test_a_real_publisher_is_subscribed_to_by_every_way(publisher):
    """Everything that it publishes comes, with its id and frames, whatever their sizes."""
    published, mechanism = publisher
    reader = Subscriber(mechanism(), LIMIT)
    published.subscribe(reader)
    sizes = (0, 1, 200, 222, 223, 255, 256, 70_000, 1_000_000)
    sent = [jupyter_message(f"id-{size}", b"x" * size) for size in sizes]
    for frames in sent:
        published.socket.send_multipart(frames)
    messages = published.read(reader, len(sent))
    assert [message.msg_id for message in messages] == [f"id-{size}" for size in sizes]
    assert [message.frames() for message in messages] == sent


def test_any_cut_of_the_bytes_gives_the_same(publisher):
    """One byte at a time, from the greeting on."""
    published, mechanism = publisher
    reader = Subscriber(mechanism(), LIMIT)
    published.subscribe(reader, at_a_time=1)
    sent = [jupyter_message("a", b"x" * 300), [b"no jupyter message"], jupyter_message("b", b"", topic=b"")]
    for frames in sent:
        published.socket.send_multipart(frames)
    messages = published.read(reader, 3, at_a_time=1)
    assert [(message.msg_id, message.frames()) for message in messages] == list(zip(("a", "", "b"), sent, strict=True))


def test_a_message_over_the_bound_is_passed_over_by_its_id(publisher):
    """It takes no memory to speak of, and those around it come."""
    published, mechanism = publisher
    reader = Subscriber(mechanism(), 100_000)
    published.subscribe(reader)
    huge = jupyter_message("huge", b"x" * 5_000_000)
    for frames in (jupyter_message("a", b"1"), huge, [b"x" * 200_000, b"y" * 10], jupyter_message("b", b"2")):
        published.socket.send_multipart(frames)
    messages: list[Message] = []
    most = 0
    while len(messages) < 4:
        messages += published.read(reader, 1)
        most = max(most, len(reader._buffer))
    assert [(message.msg_id, message.is_whole) for message in messages] == [
        ("a", True),
        ("huge", False),
        ("", False),
        ("b", True),
    ]
    assert most <= 100_000 + 65536


def test_what_nobody_wants_is_not_kept(publisher):
    """While it is not wanted it is read, so that the kernel drops nothing, and that is all."""
    published, mechanism = publisher
    reader = Subscriber(mechanism(), LIMIT)
    published.subscribe(reader)
    reader.wanted = False
    published.socket.send_multipart(jupyter_message("a", b"x" * 100_000))
    published.socket.send_multipart(jupyter_message("b", b"y" * 100_000))
    received = 0
    while received < 200_000 or reader._buffer:
        data = published.connection.recv(65536)
        received += len(data)
        assert reader.feed(data) == []
    reader.wanted = True
    published.socket.send_multipart(jupyter_message("c", b"z"))
    assert [message.msg_id for message in published.read(reader, 1)] == ["c"]


@pytest.mark.parametrize("way", ["tcp", "curve"])
def test_a_heartbeat_between_messages_is_answered(way):
    """A publisher that pings (ZMQ_HEARTBEAT_IVL) and gets no answer would hang up."""
    published = Publisher("tcp://127.0.0.1:*", curve=way == "curve")
    published.socket.unbind(published.socket.getsockopt(zmq.LAST_ENDPOINT))
    published.connection.close()
    published.socket.setsockopt(zmq.HEARTBEAT_IVL, 50)
    published.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 500)
    published.socket.bind("tcp://127.0.0.1:*")
    port = int(published.socket.getsockopt(zmq.LAST_ENDPOINT).rpartition(b":")[2])
    published.connection = socket.create_connection(("127.0.0.1", port))
    published.connection.settimeout(10)
    reader = Subscriber(Curve(decode_z85(published.public.decode())) if way == "curve" else Null(), LIMIT)
    published.subscribe(reader)
    for _ in range(30):  # 1.5 s: three times what the publisher waits for an answer
        reader.feed(published.connection.recv(65536))
        published.connection.sendall(reader.outgoing)
        reader.outgoing.clear()
    published.socket.send_multipart(jupyter_message("a", b"1"))
    assert [message.msg_id for message in published.read(reader, 1)] == ["a"]
    published.close()


def test_a_publisher_with_another_key_is_not_believed():
    """CURVE's handshake ends there."""
    published = Publisher("tcp://127.0.0.1:*", curve=True)
    other, _secret = zmq.curve_keypair()
    reader = Subscriber(Curve(decode_z85(other.decode())), LIMIT)
    # It cannot open our HELLO, and hangs up.
    with pytest.raises(AssertionError, match="hung up"):
        published.subscribe(reader)
    assert not reader.subscribed
    published.close()


def test_a_changed_byte_is_found_when_the_message_is_read():
    """What is only kept is not decrypted; nobody gets to read what the kernel has not sent."""
    published = Publisher("tcp://127.0.0.1:*", curve=True)
    reader = Subscriber(Curve(decode_z85(published.public.decode())), LIMIT)
    published.subscribe(reader)
    published.socket.send_multipart(jupyter_message("a", b"x" * 5000))
    data = b""
    while len(data) < 5000:
        data += published.connection.recv(65536)
    (message,) = reader.feed(data[:-500] + bytes([data[-500] ^ 1]) + data[-499:])
    with pytest.raises(ProtocolError, match="does not open"):
        message.frames()
    published.close()


def test_a_message_that_is_played_again_ends_the_connection():
    """Nonces only grow (RFC 26)."""
    published = Publisher("tcp://127.0.0.1:*", curve=True)
    reader = Subscriber(Curve(decode_z85(published.public.decode())), LIMIT)
    published.subscribe(reader)
    published.socket.send_multipart([b"one", b"two"])
    data = b""
    while len(data) < 2 * (2 + 8 + 8 + 16 + 1 + 3):  # frame, name, nonce, MAC, flags, text
        data += published.connection.recv(65536)
    assert len(reader.feed(data)) == 1
    with pytest.raises(ProtocolError, match="used before"):
        reader.feed(data)
    published.close()


def test_hsalsa20_is_the_papers():
    """The second example of *Cryptography in NaCl* (section 8): the first key, from which the box's is made."""
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    first = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    second = bytes.fromhex("dc908dda0b9344a953629b733820778880f3ceb421bb61b91cbd4c3e66256ce4")
    assert hsalsa20(shared, bytes(16)) == first
    assert hsalsa20(first, bytes.fromhex("69696ee955b62b73cd62bda875fc73d6")) == second


def test_what_is_sealed_is_opened_and_nothing_else():
    """A box opens at the other end, and not when it was touched."""
    ours, theirs = Curve(b"\x09" + bytes(31)), Curve(b"\x09" + bytes(31))
    public = [key._short.public_key().export_key(format="raw") for key in (ours, theirs)]
    seal, open_ = Box(ours._short, public[1], b"n" * 16), Box(theirs._short, public[0], b"n" * 16)
    sealed = seal.seal(b"12345678", b"some text")
    assert open_.open(b"12345678", sealed) == b"some text"
    for nonce, box in ((b"12345679", sealed), (b"12345678", sealed[:-1]), (b"12345678", b"")):
        with pytest.raises(ProtocolError):
            open_.open(nonce, box)


def test_keys_are_read_as_connection_files_have_them():
    """The RFC's example, and texts that are none."""
    assert decode_z85("HelloWorld") == bytes.fromhex("864fd26fb559f75b")
    for text in ("Hell", "Hel o", "#####", "\\aaaa"):
        with pytest.raises(ValueError, match=r"."):
            decode_z85(text)


# -- bytes that no publisher sends ----------------------------------------------------------------


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = encode_frame(COMMAND, b"\x05READY" + b"\x0bSocket-Type\x00\x00\x00\x03PUB")


def ready_reader(limit: int = 10_000) -> Subscriber:
    """One whose handshake is over."""
    reader = Subscriber(Null(), limit)
    reader.feed(GREETING + READY)
    assert reader.subscribed
    reader.outgoing.clear()
    return reader


def held(reader: Subscriber) -> int:
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
    for mechanism in (Null(), Curve(b"\x09" + bytes(31))):
        for start in (b"", GREETING, GREETING.replace(b"NULL\0", b"CURVE")):
            reader = Subscriber(mechanism, 10_000)
            try:
                reader.feed(start + data)
            except ProtocolError:
                continue
            assert held(reader) <= len(start + data)


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
    assert [message.frames() for message in found] == messages
    pongs = bytes(reader.outgoing).count(b"\x04PONGcontext")
    assert pongs == (sum(map(len, messages)) if pings else 0)


def test_a_publisher_that_says_an_error_is_told_apart():
    """Its own words are in the reason."""
    reader = Subscriber(Null(), 10_000)
    with pytest.raises(ProtocolError, match="go away"):
        reader.feed(GREETING + encode_frame(COMMAND, b"\x05ERROR\x07go away"))
