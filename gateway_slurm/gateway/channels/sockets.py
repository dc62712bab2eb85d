"""ZMQ sockets to a kernel, read as fast as the kernel writes: a frontend's, and the one that follows its activity.

A kernel's iopub holds 1000 messages for each subscriber and drops the rest. ZMQStream reads one message in each round
of the event loop, which is slower than a kernel that prints.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import zmq
from jupyter_client.connect import channel_socket_types

from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.acks import OutputAcks
from gateway_slurm.gateway.channels.messages import MessageError
from gateway_slurm.gateway.jupyter_compat import channel_url

# Messages that ZMQ itself may hold for one socket, of any size; the server's own queues count bytes.
RECEIVE_MARK = 64
SEND_MARK = 10_000
# Seconds that reading one socket may hold the event loop before other tasks get their turn.
LOOP_SLICE = 0.005


class KernelSocket:
    """A connected socket; ``on_message`` gets each message's frames. ``close`` ends it."""

    def __init__(self, kernel: Any, channel: str, identity: bytes, on_message: Callable[[list[bytes]], None]) -> None:
        self._socket = _connect(kernel, channel, identity)
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self._next_read: asyncio.Handle | None = None
        # ZMQ's descriptor signals changes only (zmq_getsockopt(3), ZMQ_FD): messages are read until there are none.
        self._descriptor = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._descriptor, self._read)
        self._schedule_read()

    def send(self, frames: list[bytes]) -> None:
        """Send a message; raises MessageError if ``SEND_MARK`` messages wait for the kernel already."""
        if self._socket.closed:
            return
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again as error:
            raise MessageError(f"{SEND_MARK} messages wait for the kernel already") from error
        self._schedule_read()  # sending, too, clears a change that the descriptor signalled

    def pause(self) -> None:
        """Read no more messages until ``resume``."""
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._schedule_read()

    def close(self) -> None:
        if self._socket.closed:
            return
        if self._next_read is not None:
            self._next_read.cancel()
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=0)

    def _schedule_read(self) -> None:
        if self._next_read is None and not self._socket.closed:
            self._next_read = self._loop.call_soon(self._read)

    def _read(self) -> None:
        if self._next_read is not None:
            self._next_read.cancel()
            self._next_read = None
        until = time.monotonic() + LOOP_SLICE
        while not self._paused and not self._socket.closed:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(frames)
            if time.monotonic() > until:
                self._schedule_read()
                return


def raise_socket_limit(context: zmq.Context[Any]) -> None:
    """Let the context, before its first socket, have as many sockets as ZMQ supports.

    Its default of 1023 is enough for 500 kernels: each takes two, and each frontend five.
    """
    context.max_sockets = context.get(zmq.SOCKET_LIMIT)


def _connect(kernel: Any, channel: str, identity: bytes) -> zmq.Socket[bytes]:
    """A socket of the plain class, connected as the kernel manager connects those of the asyncio class."""
    connected: zmq.Socket[bytes] = kernel.context.socket(channel_socket_types[channel], socket_class=zmq.Socket)
    connected.linger = 0
    connected.rcvhwm = RECEIVE_MARK
    connected.sndhwm = SEND_MARK
    if identity:
        connected.identity = identity
    if kernel.curve_publickey is not None:
        connected.curve_secretkey = kernel.curve_secretkey
        connected.curve_publickey = connected.curve_serverkey = kernel.curve_publickey
    connected.connect(channel_url(kernel, channel))
    if channel == "iopub":
        connected.subscribe(b"")
    return connected


class Activity(KernelSocket):
    """Keeps a kernel's ``execution_state`` and ``last_activity`` from its iopub.

    ``manager`` is the server's kernel manager. ``acks`` acknowledges the state, and the output without a session.
    """

    def __init__(self, manager: Any, kernel: Any, acks: OutputAcks | None = None) -> None:
        self._manager, self._kernel, self._acks = manager, kernel, acks
        kernel.reason, kernel.last_activity = "", datetime.now(timezone.utc)
        super().__init__(kernel, "iopub", b"", self._on_iopub)

    def _on_iopub(self, frames: list[bytes]) -> None:
        parts = messages.parts_of(frames)
        kernel, tracks = self._kernel, self._manager.track_message_type
        header, parent = messages.header_of(parts), messages.parent_header_of(parts)
        msg_type, parent_type = header.get("msg_type"), parent.get("msg_type")
        if tracks(msg_type) or tracks(parent_type) or kernel.execution_state == "busy":
            self._manager.last_kernel_activity = kernel.last_activity = datetime.now(timezone.utc)
        if self._acks is not None:
            self._acks.published_unheard(messages.id_of(parts))
        if msg_type != "status":
            return
        state = str(messages.content_of(parts).get("execution_state", ""))
        if tracks(parent_type):
            kernel.execution_state = state
            if self._acks is not None:
                self._acks.set_state(state)
        elif kernel.execution_state in ("starting", "unknown") and state != "starting":
            kernel.execution_state = "idle"  # also after a request of an untracked type
