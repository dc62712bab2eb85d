"""A message that a kernel begins and does not end is noticed before libzmq has all of it."""

from __future__ import annotations

import socket
import threading

import pytest
import zmq

from gateway_slurm.link import zmtp
from gateway_slurm.link.zmtp import MAX_FRAMES, MAX_MESSAGE, MessageSizes

GREETING = b"\xff" + bytes(8) + b"\x7f\x03" + bytes(53)
GREETING_2 = b"\xff" + bytes(8) + b"\x7f\x01\x05"


def head(length: int, flags: int) -> bytes:
    """The head of a frame, in the long form."""
    return bytes([flags | 2]) + length.to_bytes(8, "big")


@pytest.mark.parametrize("greeting", [GREETING, GREETING_2])
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_one_frame_or_many_that_are_too_large_are_noticed_at_the_head(greeting: bytes, step: int) -> None:
    """In pieces of any size, and not after messages that are complete."""

    def feed(data: bytes) -> str:
        sizes = MessageSizes()
        pieces = [data[start : start + step] for start in range(0, len(data), step)]
        return next(filter(None, map(sizes.feed, pieces)), "")

    whole = head(3, 1) + b"abc" + bytes([0, 2]) + b"de"
    assert feed(greeting + 3 * whole) == ""
    assert "MiB" in feed(greeting + whole + head(MAX_MESSAGE + 1, 0))
    assert "MiB" in feed(greeting + head(3, 1) + b"abc" + head(MAX_MESSAGE - 2, 1))
    assert feed(greeting + head(3, 0) + b"abc" + head(MAX_MESSAGE - 2, 1)) == ""
    assert "frames" in feed(greeting + b"\x01\x00" * (MAX_FRAMES + 1))


def test_an_old_protocol_whose_frames_are_others_is_refused() -> None:
    """Before version 2 a connection begins with a length."""
    assert "before version" in MessageSizes().feed(b"\x01\x00")


def test_what_libzmq_sends_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a real connection: greeting, commands, messages of several frames, short and long."""
    monkeypatch.setattr(zmtp, "MAX_MESSAGE", 300_000)
    listener = socket.create_server(("127.0.0.1", 0))
    context = zmq.Context()
    sizes, found = MessageSizes(), []

    def relay(source: socket.socket, target: socket.socket, *, is_followed: bool) -> None:
        while data := source.recv(1000):
            if is_followed and (trouble := sizes.feed(data)):
                found.append(trouble)
                break
            target.sendall(data)
        for end in (source, target):
            end.close()

    receiver = context.socket(zmq.PULL)
    port = receiver.bind_to_random_port("tcp://127.0.0.1")
    sender = context.socket(zmq.PUSH)
    sender.linger = receiver.linger = 0
    sender.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
    client, _address = listener.accept()
    onward = socket.create_connection(("127.0.0.1", port))
    threads = [
        threading.Thread(target=relay, args=(client, onward), kwargs={"is_followed": True}),
        threading.Thread(target=relay, args=(onward, client), kwargs={"is_followed": False}),
    ]
    for thread in threads:
        thread.start()
    for _number in range(20):
        sender.send_multipart([b"x" * 10, b"", b"y" * 200_000, b"z" * 300])
        assert receiver.poll(10_000)
        assert len(receiver.recv_multipart()) == 4
    assert found == []
    sender.send_multipart([b"x" * 200_000, b"y" * 200_000])
    threads[0].join(10)
    assert found == ["a message of more than 0 MiB"]
    context.destroy(linger=0)
    listener.close()
    threads[1].join(10)
