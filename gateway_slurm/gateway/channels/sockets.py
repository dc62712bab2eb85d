"""ZMQ sockets to a kernel, read as fast as the kernel writes.

A kernel's iopub holds 1000 messages for each subscriber and drops the rest. ZMQStream reads one message in each round
of the event loop, which is slower than a kernel that prints.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq
from jupyter_client.connect import channel_socket_types
from zmq.utils.monitor import parse_monitor_message

from gateway_slurm._util import Backoff
from gateway_slurm.budget import Holding
from gateway_slurm.gateway.channels.messages import MessageError
from gateway_slurm.gateway.channels.window import OVERHEAD
from gateway_slurm.gateway.jupyter_compat import channel_url

# Messages that ZMQ itself may hold for one socket, of any size; the server's own queues count bytes.
RECEIVE_MARK = 16
SEND_MARK = 16
# Messages that wait for a kernel which does not read.
MAX_WAITING = 10_000
# Bytes of a part that ZMQ sends without a copy, and says when it has; seconds between two looks whether it has.
TRACKED, LOOK_SECONDS = 1024, 0.25
# Seconds that reading one socket takes in one turn.
LOOP_SLICE = 0.002
# Seconds in which libzmq, where it connects again, has reported that it does; longer after each time that it did not.
GIVEN_UP_SECONDS, MAX_GIVEN_UP_SECONDS = 0.2, 10.0
# Bytes of one part of a message, unless the admin sets another limit. JupyterLab itself shows far less.
DEFAULT_MAX_MESSAGE = 128 << 20
_monitors = itertools.count()

Post = Callable[[Callable[[], object]], object]


class KernelSocket:
    """A connected socket; ``on_message`` gets each message's frames. ``close`` ends it, and its ``holding``.

    What the kernel has not read waits in a queue, whose bytes are counted in ``holding``, with those that ZMQ has.

    ``post`` calls a function in the turn of the kernel's owner; by default, at once.

    After a malformed or an oversized frame libzmq gives a connection up: it closes it and connects no more, and neither
    a read nor a send says so. Such a socket is replaced by a new one, and ``on_renewed`` is called.
    """

    def __init__(
        self,
        kernel: Any,
        channel: str,
        identity: bytes,
        on_message: Callable[[list[bytes]], None],
        holding: Holding,
        on_renewed: Callable[[], None] = lambda: None,
        *,
        post: Post = lambda function: function(),
    ) -> None:
        self._kernel, self._channel, self._identity = kernel, channel, identity
        self._on_message, self._on_renewed, self._holding = on_message, on_renewed, holding
        # Messages, each with the bytes that are counted for it: those that wait, and large ones that ZMQ has.
        self._waiting: deque[tuple[list[bytes], int]] = deque()
        self._sent: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._next_look: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._post, self._is_due, self._paused = post, False, False
        self._next_read: asyncio.Handle | None = None
        # Runs while the connection is broken and libzmq has not begun to connect again.
        self._broken: asyncio.TimerHandle | None = None
        self._given_up = False
        self._delays = Backoff(GIVEN_UP_SECONDS, MAX_GIVEN_UP_SECONDS)
        self._delay = self._delays.next()
        self._open()

    def _open(self) -> None:
        self._opened_at = self._loop.time()
        self._socket, self._monitor = _connect(self._kernel, self._channel, self._identity)
        # ZMQ's descriptor signals changes only (zmq_getsockopt(3), ZMQ_FD): messages are read until there are none.
        self._descriptor = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._descriptor, self._read)
        self._monitor_descriptor = int(self._monitor.get(zmq.FD))
        self._loop.add_reader(self._monitor_descriptor, self._read_events)
        self._schedule_read()
        self._read_events()

    def send(self, frames: list[bytes]) -> None:
        """Send a message; raises MessageError if too much waits for the kernel already."""
        if self._socket.closed:
            return
        if len(self._waiting) >= MAX_WAITING:
            raise MessageError(f"{MAX_WAITING} messages wait for the kernel already")
        size = OVERHEAD + sum(map(len, frames))
        if not self._holding.try_add(size):
            raise MessageError(self._holding.refusal())
        self._waiting.append((frames, size))
        self._write()
        self._schedule_read()  # sending, too, clears a change that the descriptor signalled

    def _write(self) -> None:
        """Give ZMQ the messages that wait, as far as it takes them: it signals when it takes more."""
        while self._waiting:
            frames, size = self._waiting[0]
            try:
                trackers = self._try_send(frames)
            except zmq.Again:
                break
            self._waiting.popleft()
            if trackers:
                self._sent.append((zmq.MessageTracker(*trackers), size))
            else:
                self._holding.remove(size)
        self._count_sent()

    def _try_send(self, frames: list[bytes]) -> list[zmq.MessageTracker]:
        try:
            return self._send_frames(frames)
        except zmq.Again:
            self._read_events()
            if self._broken is None:
                raise
            self._renew()
            return self._send_frames(frames)

    def _send_frames(self, frames: list[bytes]) -> list[zmq.MessageTracker]:
        """Send a message without a copy of its large parts; the trackers say when ZMQ does not need them any more."""
        tracked = [zmq.Frame(frame, track=True, copy=False) if len(frame) >= TRACKED else frame for frame in frames]
        self._socket.send_multipart(tracked, zmq.NOBLOCK)
        return [frame.tracker for frame in tracked if isinstance(frame, zmq.Frame)]

    def _count_sent(self) -> None:
        """Count no more what ZMQ has sent, and look again where it has not."""
        while self._sent and self._sent[0][0].done:
            self._holding.remove(self._sent.popleft()[1])
        if self._sent and self._next_look is None:
            self._next_look = self._loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._next_look = None
        self._count_sent()

    def pause(self) -> None:
        """Read no more messages until ``resume``."""
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._schedule_read()

    def close(self) -> None:
        self._waiting.clear()
        self._holding.close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._socket.closed:
            return
        for handle in (self._next_read, self._broken, self._next_look):
            if handle is not None:
                handle.cancel()
        self._next_read = self._broken = self._next_look = None
        while self._sent:  # ZMQ drops them
            self._holding.remove(self._sent.popleft()[1])
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_reader(self._monitor_descriptor)
        self._socket.monitor(None, 0)
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def _schedule_read(self) -> None:
        if self._next_read is None and not self._socket.closed:
            self._next_read = self._loop.call_soon(self._read)

    def _read(self) -> None:
        if self._next_read is not None:
            self._next_read.cancel()
            self._next_read = None
        if not self._is_due:
            self._is_due = True
            self._post(self._read_some)

    def _read_some(self) -> None:
        self._is_due = False
        until = time.monotonic() + LOOP_SLICE
        while not self._paused and not self._socket.closed:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                if self._given_up:  # all that came before has been read
                    self._renew()
                self._write()
                return
            self._on_message(frames)
            if time.monotonic() > until:
                self._schedule_read()
                return

    # -- a connection that libzmq has given up ------------------------------------------------------

    def _read_events(self) -> None:
        while not self._socket.closed:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if self._broken is not None:
                self._broken.cancel()
            self._broken, self._given_up = None, False
            # Where libzmq connects again, it reports that at once.
            if event == zmq.EVENT_DISCONNECTED:
                self._broken = self._loop.call_later(self._delay, self._give_up)

    def _give_up(self) -> None:
        self._given_up = True
        self._schedule_read()

    def _renew(self) -> None:
        if self._loop.time() > self._opened_at + 2 * MAX_GIVEN_UP_SECONDS:
            self._delays.reset()
        self._delay = self._delays.next()
        self._disconnect()
        self._given_up = False
        self._open()
        self._on_renewed()


def prepare_context(context: zmq.Context[Any], max_message_size: int) -> None:
    """Set, before the context's first socket, what all of its sockets inherit; ``max_message_size`` 0 is no limit.

    No send waits: jupyter_client sends on the loop, through a blocking shadow of the asyncio socket, and a connection
    that libzmq has given up takes no message any more. Nor does the end of the process wait for unsent messages.
    ZMQ's default of 1023 sockets is enough for 200 kernels: each takes a few, and each frontend twelve.
    """
    context.max_sockets = context.get(zmq.SOCKET_LIMIT)
    context.sndtimeo = context.linger = 0
    context.maxmsgsize = max_message_size or -1


def _connect(kernel: Any, channel: str, identity: bytes) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """A socket of the plain class, connected as the kernel manager connects those of the asyncio class.

    The second socket receives the events of its connection.
    """
    connected: zmq.Socket[bytes] = kernel.context.socket(channel_socket_types[channel], socket_class=zmq.Socket)
    connected.linger = 0
    connected.rcvhwm = RECEIVE_MARK
    connected.sndhwm = SEND_MARK
    if identity:
        connected.identity = identity
    if kernel.curve_publickey is not None:
        connected.curve_secretkey = kernel.curve_secretkey
        connected.curve_publickey = connected.curve_serverkey = kernel.curve_publickey
    address = f"inproc://monitor-{next(_monitors)}"
    connected.monitor(address, zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CONNECTED)
    monitor: zmq.Socket[bytes] = kernel.context.socket(zmq.PAIR, socket_class=zmq.Socket)
    monitor.linger = 0
    monitor.connect(address)
    connected.connect(channel_url(kernel, channel))
    if channel == "iopub":
        connected.subscribe(b"")
    return connected, monitor
