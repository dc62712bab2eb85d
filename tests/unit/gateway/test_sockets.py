"""A connection that libzmq gives up is made again; no send on the loop waits."""

from __future__ import annotations

import asyncio
import time
from functools import partial

import pytest
import zmq
import zmq.asyncio

from gateway_slurm.budget import Budget
from gateway_slurm.gateway.channels.messages import MessageError
from gateway_slurm.gateway.channels.sockets import GIVEN_UP_SECONDS, MAX_WAITING, KernelSocket, prepare_context
from helpers.kernel_clients import poll_async

MAX_MESSAGE = 1000  # bytes
HOLDING = partial(Budget(0, 0).holding, "alice", "to_kernel")
# RFC 23 (ZMTP 3): the greeting with the mechanism NULL, and a READY command without properties.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x06\x05READY"
# Frames that end a connection for good: an impossible length, and one that is over the limit.
FATAL = {"malformed": b"\xff" * 32, "huge": b"\x02" + (1 << 40).to_bytes(8, "big") + bytes(10)}


class Kernel:
    """A kernel's manager, with the address of a peer that speaks ZMTP by hand."""

    kernel_id, curve_publickey = "kernel-1", None

    def __init__(self, directory):
        self.context, self._directory = zmq.asyncio.Context(), directory
        prepare_context(self.context, MAX_MESSAGE)

    def _make_url(self, channel):
        return f"ipc://{self._directory}/{channel}"


@pytest.fixture
async def kernel(tmp_path):
    """A kernel's manager."""
    made = Kernel(tmp_path)
    yield made
    made.context.destroy(linger=0)


class Peer:
    """Accepts connections, and keeps the writers of those that are greeted."""

    def __init__(self):
        self.writers = []

    async def __call__(self, reader, writer):
        writer.write(GREETING)
        await reader.readexactly(len(GREETING))
        writer.write(READY)
        self.writers.append(writer)

    def say(self, data):
        self.writers[-1].write(data)


@pytest.mark.parametrize("channel", ["iopub", "shell"])
@pytest.mark.parametrize("kind", sorted(FATAL))
async def test_a_connection_that_libzmq_gives_up_is_made_again(kernel, tmp_path, channel, kind):
    """What was read before is delivered, then what the new connection brings; the owner is called once for each."""
    peer, arrived, renewed = Peer(), [], []
    async with await asyncio.start_unix_server(peer, tmp_path / channel):
        socket = KernelSocket(kernel, channel, b"me", arrived.append, HOLDING(), lambda: renewed.append(len(arrived)))
        for number in (1, 2, 3):
            assert await poll_async(lambda number=number: len(peer.writers) == number, timeout=10)
            peer.say(b"\x00\x02%02d" % number)
            assert await poll_async(lambda number=number: len(arrived) == number, timeout=10)
            peer.say(FATAL[kind])
        assert await poll_async(lambda: len(renewed) == 3, timeout=10)
        assert (arrived, renewed) == ([[b"01"], [b"02"], [b"03"]], [1, 2, 3])
        socket.close()


async def test_a_connection_that_a_kernel_closed_is_libzmqs_own_to_make_again(kernel, tmp_path):
    """A kernel that restarts loses nothing that waits for it, and what it breaks later is found as soon as before."""
    peer, renewed = Peer(), []
    async with await asyncio.start_unix_server(peer, tmp_path / "shell"):
        socket = KernelSocket(kernel, "shell", b"me", print, HOLDING(), lambda: renewed.append(True))
        for number in (1, 2, 3):
            assert await poll_async(lambda number=number: len(peer.writers) == number, timeout=10)
            peer.writers[-1].close()
        assert await poll_async(lambda: len(peer.writers) == 4, timeout=10)
        assert renewed == []
        began = time.monotonic()
        peer.say(FATAL["malformed"])
        assert await poll_async(lambda: len(renewed) == 1, timeout=10)
        assert time.monotonic() - began < GIVEN_UP_SECONDS + 1
        socket.close()


async def test_a_send_never_waits(kernel, tmp_path):
    """A message for a connection that was given up goes by the new one; one too many for a silent kernel is refused."""
    peer = Peer()
    async with await asyncio.start_unix_server(peer, tmp_path / "shell"):
        socket = KernelSocket(kernel, "shell", b"me", print, HOLDING())
        assert await poll_async(lambda: len(peer.writers) == 1, timeout=10)
        peer.say(FATAL["malformed"])
        # libzmq takes what is sent before it knows; after that each of these is refused, or goes to the next peer.
        for _ in range(1000):
            socket.send([b"x"])
            await asyncio.sleep(0)
        assert await poll_async(lambda: len(peer.writers) == 2, timeout=10)

        def flood() -> None:
            for _ in range(2 * MAX_WAITING):
                socket.send([b"x" * 1000])

        with pytest.raises(MessageError, match=f"{MAX_WAITING} messages"):
            flood()
        socket.close()


async def test_what_a_kernel_does_not_read_is_counted_in_bytes(kernel):
    """Up to the user's limit, whatever ZMQ has of it; once the kernel reads it has all in order, and nothing counts."""
    budget, size = Budget(40 << 20, 0), 3 << 20
    router = kernel.context.socket(zmq.ROUTER, socket_class=zmq.Socket)
    router.maxmsgsize, router.rcvhwm = -1, 1
    socket = KernelSocket(kernel, "shell", b"me", print, budget.holding("alice", "to_kernel"))
    sent = 0

    def flood():
        nonlocal sent
        while True:
            socket.send([b"%04d" % sent, bytes(size)])
            sent += 1

    with pytest.raises(MessageError, match="memory_per_user is 40 MiB"):
        flood()
    assert 38 << 20 < budget.used("alice") <= 40 << 20
    router.bind(kernel._make_url("shell"))
    read = []

    def has_read():
        while router.poll(0):
            read.append(router.recv_multipart()[1])
        return len(read) == sent

    assert await poll_async(has_read, timeout=20)
    assert read == [b"%04d" % number for number in range(sent)]
    assert await poll_async(lambda: budget.used("alice") == 0, timeout=10)
    socket.send([bytes(size)])
    socket.close()
    assert budget.used() == 0
    router.close()


async def test_all_sockets_of_the_context_inherit_the_limits(kernel):
    """Those that jupyter_client makes, too: no send on one that has no peer waits."""
    made = kernel.context.socket(zmq.DEALER)
    assert (made.sndtimeo, made.linger, made.maxmsgsize) == (0, 0, MAX_MESSAGE)
    with pytest.raises(zmq.Again):
        zmq.Socket.shadow(made.underlying).send(b"x")
    made.close()
    unlimited = zmq.Context()
    prepare_context(unlimited, 0)
    with unlimited.socket(zmq.DEALER) as made:
        assert made.maxmsgsize == -1
    unlimited.term()
