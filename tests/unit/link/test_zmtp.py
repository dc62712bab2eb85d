"""Messages of ours on a kernel's iopub: between two of the kernel's, or not at all, and nothing else changes."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from jupyter_client.session import Session

from gateway_slurm.kernels.process import StderrLine
from gateway_slurm.link import zmtp
from gateway_slurm.link import zmtp_frames as zmtpframe

KEY = {"key": "a-key", "signature_scheme": "hmac-sha256"}
OURS = [b"ours", b"x" * 300, b""]
# Sizes on both sides of LONG, empty frames and frames that look like something else.
MESSAGES = [[b"a"], [b"", b""], [b"x" * 255, b"\x04"], [b"t", b"x" * 256], [b"\xff" * 70_000, b"<IDS|MSG>", b"1", b"2"]]


class Recorder:
    """A Unix socket before a ZMQ socket, which keeps what passes it in both directions."""

    def __init__(self, directory: Path) -> None:
        self.seen = {"kernel": b"", "client": b""}
        self._behind = str(directory / "kernel")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "client"))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        client, _address = self._listener.accept()
        kernel = socket.socket(socket.AF_UNIX)
        kernel.connect(self._behind)
        ways = ((kernel, client, "kernel"), (client, kernel, "client"))
        pumps = [threading.Thread(target=self._pump, args=way) for way in ways]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        client.close()
        kernel.close()

    def _pump(self, source: socket.socket, target: socket.socket, side: str) -> None:
        with contextlib.suppress(OSError):  # the other side went first
            while data := source.recv(65536):
                self.seen[side] += data
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._threads[0].join(timeout=10)
        self._listener.close()


@cache
def captured(kind: int) -> tuple[bytes, bytes, tuple[tuple[bytes, ...], ...]]:
    """What a real publisher and a real subscriber said to each other, and the publisher's messages."""
    session = Session(key=KEY["key"].encode())
    cell = session.msg("execute_request", {"code": "1"})
    begin = session.serialize(session.msg("execute_input", {"code": "1"}, parent=cell), ident=b"kernel.1.execute_input")
    busy = session.serialize(session.msg("status", {"execution_state": "busy"}, parent=cell), ident=b"status")
    messages = (*MESSAGES, busy, begin, *MESSAGES)
    context = zmq.Context()
    with TemporaryDirectory(dir="/tmp") as name:
        recorder = Recorder(Path(name))
        publisher, subscriber = context.socket(kind), context.socket(zmq.SUB)
        publisher.bind(f"ipc://{name}/kernel")
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.connect(f"ipc://{name}/client")
        while not subscriber.poll(10):  # until the subscription has arrived
            publisher.send(b"first")
        while subscriber.poll(100):
            subscriber.recv()
        for message in messages:
            publisher.send_multipart(message)
        for message in messages:
            assert subscriber.recv_multipart() == list(message)
        context.destroy(linger=0)
        recorder.close()
    return recorder.seen["kernel"], recorder.seen["client"], tuple(map(tuple, messages))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """``data`` in pieces, as a socket may deliver it."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def subscribed(client: bytes, last_cell: zmtp.LastCell | None = None) -> zmtp.Iopub:
    """A connection whose client has subscribed to everything."""
    iopub = zmtp.Iopub(last_cell or zmtp.LastCell())
    iopub.from_client(client)
    return iopub


def messages_in(stream: bytes) -> list[list[bytes]]:
    """The messages of a stream by a reader that holds all of it: the reference."""
    messages, frames, at = [], [], zmtpframe.GREETING_BYTES
    while at < len(stream):
        flags = stream[at]
        width = 8 if flags & zmtpframe.LONG else 1
        size = int.from_bytes(stream[at + 1 : at + 1 + width], "big")
        body = stream[at + 1 + width : at + 1 + width + size]
        assert len(body) == size
        at += 1 + width + size
        if not flags & zmtpframe.COMMAND:
            frames.append(body)
            if not flags & zmtpframe.MORE:
                messages.append(frames)
                frames = []
    assert frames == []
    return messages


kinds = pytest.mark.parametrize("kind", [zmq.PUB, zmq.XPUB], ids=["PUB", "XPUB"])
places = st.lists(st.integers(0, 200_000) | st.integers(0, 700), max_size=30)


@kinds
@given(places=places)
@settings(deadline=None)
def test_bytes_pass_unchanged_where_nothing_is_put_in(kind, places):
    """However the stream is cut, and the client's, the client gets the kernel's bytes."""
    kernel, client, _messages = captured(kind)
    iopub = zmtp.Iopub(zmtp.LastCell())
    for piece in cut(client, places):
        iopub.from_client(piece)
    assert b"".join(map(iopub.from_kernel, cut(kernel, places))) == kernel


@kinds
@given(places=places, which=st.integers(0, 40))
@settings(deadline=None)
def test_a_message_of_ours_goes_between_two_of_the_kernels(kind, places, which):
    """Put in after any piece, it comes whole at the next end of a message; the others stay as they are."""
    kernel, client, _messages = captured(kind)
    iopub = subscribed(client)
    pieces = cut(kernel, places)
    out = b""
    for number, piece in enumerate(pieces):
        out += iopub.from_kernel(piece)
        if number == which % len(pieces):
            out += iopub.insert(lambda _parent: OURS) or b""
    found = messages_in(out)
    assert found.count(OURS) == 1
    found.remove(OURS)
    assert found == messages_in(kernel)


@kinds
def test_it_waits_for_the_end_of_a_message_and_no_longer(kind):
    """Byte by byte: ours is written at the very end of the message during which it was asked for."""
    kernel, client, messages = captured(kind)
    end = len(kernel) - sum(len(zmtp.encode_message(message)) for message in messages)
    size = len(zmtp.encode_message(messages[0]))
    for into in range(size + 1):
        iopub = subscribed(client)
        iopub.from_kernel(kernel[: end + into])
        now = iopub.insert(lambda _parent: OURS)
        if into in (0, size):
            assert now == zmtp.encode_message(OURS)
            continue
        assert now == b""
        out = iopub.from_kernel(kernel[end + into : end + size + 5])
        assert out == kernel[end + into : end + size] + zmtp.encode_message(OURS) + kernel[end + size : end + size + 5]


@kinds
@given(places=places)
@settings(deadline=None)
def test_the_parent_is_the_last_cell_that_began(kind, places):
    """The parent header of the last execute_input is given, to a connection that came later, too."""
    kernel, client, messages = captured(kind)
    begin = next(message for message in messages if b"kernel.1.execute_input" in message)
    last_cell = zmtp.LastCell()
    iopub = subscribed(client, last_cell)
    for piece in cut(kernel, places):
        iopub.from_kernel(piece)
    parents = []
    iopub.insert(lambda parent: parents.append(parent) or OURS)
    assert parents == [begin[4]]
    later = subscribed(client, last_cell)
    later.from_kernel(kernel[: len(kernel) - sum(len(zmtp.encode_message(message)) for message in messages)])
    later.insert(lambda parent: parents.append(parent) or OURS)
    assert parents == [begin[4]] * 2


@kinds
def test_a_client_that_did_not_subscribe_to_everything_gets_none(kind):
    """Nothing before the subscription, none for one topic only, none after it was taken back."""
    kernel, client, _messages = captured(kind)
    iopub = zmtp.Iopub(zmtp.LastCell())
    iopub.from_kernel(kernel)
    assert iopub.insert(lambda _parent: OURS) is None
    iopub.from_client(client)
    assert iopub.insert(lambda _parent: OURS) == zmtp.encode_message(OURS)
    iopub.from_client(b"\4\7\6CANCEL")
    assert iopub.insert(lambda _parent: OURS) is None
    iopub.from_client(b"\0\2\1k")
    assert iopub.insert(lambda _parent: OURS) is None
    iopub.from_client(b"\0\1\1")  # as ZMTP 3.0 has it
    assert iopub.insert(lambda _parent: OURS) == zmtp.encode_message(OURS)


def test_a_heartbeat_inside_a_message_is_no_end_of_it():
    """PING between two frames of a message: ours waits for the last frame."""
    kernel, client, _messages = captured(zmq.PUB)
    iopub = subscribed(client)
    iopub.from_kernel(kernel + b"\1\1a" + b"\4\7\4PING\0\0")
    assert iopub.insert(lambda _parent: OURS) == b""
    assert iopub.from_kernel(b"\0\1b") == b"\0\1b" + zmtp.encode_message(OURS)


def test_only_so_many_wait():
    """During a message without end the oldest warnings give way."""
    kernel, client, _messages = captured(zmq.PUB)
    iopub = subscribed(client)
    iopub.from_kernel(kernel + b"\1\1a")
    for number in range(100):
        assert iopub.insert(lambda _parent, number=number: [b"%d" % number]) == b""
    waited = iopub.from_kernel(b"\0\1b")[3:]
    assert waited == b"".join(zmtp.encode_message([b"%d" % number]) for number in range(92, 100))


@given(noise=st.binary(max_size=400), places=places, greeted=st.sampled_from(["no", "greeting", "handshake"]))
@settings(deadline=None, max_examples=300)
def test_what_is_not_understood_passes_untouched(noise, places, greeted):
    """Noise from the start, after a greeting, or in place of messages: the bytes pass, nothing is kept."""
    kernel, client, messages = captured(zmq.XPUB)
    shaken = len(kernel) - sum(len(zmtp.encode_message(message)) for message in messages)
    stream = kernel[: {"no": 0, "greeting": zmtpframe.GREETING_BYTES, "handshake": shaken}[greeted]] + noise
    iopub = subscribed(client + noise)
    assert b"".join(map(iopub.from_kernel, cut(stream, places))) == stream
    walk = iopub._to_client
    assert len(walk._head) < zmtpframe.GREETING_BYTES
    assert len(walk._kept or b"") <= zmtp.HEADER_LIMIT
    if greeted == "no" and len(noise) >= zmtpframe.GREETING_BYTES:
        assert not walk.understood
        assert iopub.insert(lambda _parent: OURS) is None


@pytest.mark.parametrize(
    "greeting",
    [
        b"\xff" + bytes(8) + b"\x7f\1" + bytes(53),  # ZMTP 2
        b"\xff" + bytes(8) + b"\x7f\3\1" + b"CURVE".ljust(52, b"\0"),
        b"HTTP/1.1 200 OK\r\n".ljust(64),
    ],
)
def test_other_versions_and_mechanisms_are_left_alone(greeting):
    """What we could not write into is never written into."""
    kernel, client, _messages = captured(zmq.PUB)
    iopub = subscribed(client)
    stream = greeting + kernel[zmtpframe.GREETING_BYTES :]
    assert iopub.from_kernel(stream) == stream
    assert iopub.insert(lambda _parent: OURS) is None


@pytest.mark.parametrize(
    ("parent", "expected"), [(b"", {}), (b"\x81\xa1", {}), (b"[1]", {}), (b'{"msg_id": "1"}', {"msg_id": "1"})]
)
def test_the_line_is_a_signed_stream_message(parent, expected):
    """A client's session accepts it by the kernel's key, with the parent that it was made for."""
    session = Session(key=KEY["key"].encode())
    frames = list(StderrLine("save your work\n", KEY).frames(parent))
    idents, rest = session.feed_identities(frames)
    message = session.deserialize(rest)
    assert idents == [b"stream.stderr"]
    assert (message["msg_type"], message["content"]) == ("stream", {"name": "stderr", "text": "save your work\n"})
    assert message["parent_header"] == expected
