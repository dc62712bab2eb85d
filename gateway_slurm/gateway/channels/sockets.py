"""One ZMQ socket of a frontend's to its kernel, read as fast as its kernel writes.

A kernel's iopub drops what a subscriber does not take: 1000 messages wait there at most. Reading one
message a round of the event loop, as ZMQStream does, is slower than a kernel that prints.
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
from gateway_slurm.gateway.channels.acks import Delivery
from gateway_slurm.gateway.channels.messages import MessageError
from gateway_slurm.gateway.jupyter_compat import channel_url

# Messages that ZMQ itself may hold for one socket, whatever their size; ours are the queues that count bytes.
RECEIVE_MARK = 64
SEND_MARK = 10_000
# Seconds for which one socket is read before all else on the loop has its turn.
TURN = 0.005


class KernelSocket:
    """A connected socket; ``on_message`` gets each message's frames. ``close`` ends it."""

    def __init__(self, kernel: Any, channel: str, identity: bytes, on_message: Callable[[list[bytes]], None]) -> None:
        self._socket = _connected(kernel, channel, identity)
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self._again: asyncio.Handle | None = None
        # ZMQ's descriptor tells of changes only (zmq_getsockopt(3), ZMQ_FD): what is there is read to its end.
        self._descriptor = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._descriptor, self._read)
        self._soon()

    def send(self, frames: list[bytes]) -> None:
        """Send a message; raises MessageError where so many wait for the kernel that no more are taken."""
        if self._socket.closed:
            return
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again as error:
            raise MessageError(f"{SEND_MARK} messages wait for the kernel already") from error
        self._soon()  # sending, too, uses up a change that the descriptor told of

    def pause(self) -> None:
        """Read no further for now."""
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._soon()

    def close(self) -> None:
        if self._socket.closed:
            return
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=0)

    def _soon(self) -> None:
        if self._again is None and not self._socket.closed:
            self._again = self._loop.call_soon(self._read_again)

    def _read_again(self) -> None:
        self._again = None
        self._read()

    def _read(self) -> None:
        until = time.monotonic() + TURN
        while not self._paused and not self._socket.closed:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(frames)
            if time.monotonic() > until:
                self._soon()
                return


def raise_socket_limit(context: zmq.Context[Any]) -> None:
    """Let the context, before its first socket, have as many sockets as ZMQ supports.

    Its default of 1023 is enough for 500 kernels: each takes two, and each frontend five.
    """
    context.max_sockets = context.get(zmq.SOCKET_LIMIT)


def _connected(kernel: Any, channel: str, identity: bytes) -> zmq.Socket[bytes]:
    """A plain socket, connected as the kernel manager connects its asynchronous ones."""
    made: zmq.Socket[bytes] = kernel.context.socket(channel_socket_types[channel], socket_class=zmq.Socket)
    made.linger = 0
    made.rcvhwm = RECEIVE_MARK
    made.sndhwm = SEND_MARK
    if identity:
        made.identity = identity
    if kernel.curve_publickey is not None:
        made.curve_secretkey = kernel.curve_secretkey
        made.curve_publickey = made.curve_serverkey = kernel.curve_publickey
    made.connect(channel_url(kernel, channel))
    if channel == "iopub":
        made.subscribe(b"")
    return made


# -- What a kernel does, read from its iopub: whether it is busy, and when it last was. --


class Activity(KernelSocket):
    """Keeps a kernel's ``execution_state`` and ``last_activity``; ``manager`` is the mapping kernel manager.

    ``delivery`` hears of what is published while there is no frontend, and of the state.
    """

    def __init__(self, manager: Any, kernel: Any, delivery: Delivery | None = None) -> None:
        self._manager, self._kernel, self._delivery = manager, kernel, delivery
        kernel.reason, kernel.last_activity = "", datetime.now(timezone.utc)
        super().__init__(kernel, "iopub", b"", self._heard)

    def _heard(self, frames: list[bytes]) -> None:
        parts = messages.parts_of(frames)
        kernel, tracks = self._kernel, self._manager.track_message_type
        msg_type, asked_by = messages.header_of(parts).get("msg_type"), messages.parent_header_of(parts).get("msg_type")
        if tracks(msg_type) or tracks(asked_by) or kernel.execution_state == "busy":
            self._manager.last_kernel_activity = kernel.last_activity = datetime.now(timezone.utc)
        if self._delivery is not None:
            self._delivery.unwanted(messages.id_of(parts))
        if msg_type != "status":
            return
        state = str(messages.content_of(parts).get("execution_state", ""))
        if tracks(asked_by):
            kernel.execution_state = state
            if self._delivery is not None:
                self._delivery.state(state)
        elif kernel.execution_state in ("starting", "unknown") and state != "starting":
            kernel.execution_state = "idle"  # whatever it says of a request that does not count
