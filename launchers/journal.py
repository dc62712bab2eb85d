"""The journal of a kernel: the messages on its iopub, numbered, in a ring of a limited size in the launcher's memory.

There is one sequence of numbers for each kernel id, which goes on over the kernel's processes. A number that is in no
record is a lost message. A marker takes a number, too: what follows it is from the kernel's next process. The launcher
subscribes to the kernel once, and every reader has a cursor in the ring (``readers``).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from gateway_slurm.link import wire
from launchers import zmtp
from launchers.reactor import READ, WRITE, Backoff, Reactor, Timer

# The cost of a message beside its bytes, so that the limit also holds for many small messages.
OVERHEAD = 96
# A ring of fewer bytes would lose output whenever a reader is a little late.
MIN_LIMIT = 8 << 20
# The newest message stays whatever the limit is, if it is not larger than this.
MIN_MESSAGE = 128 << 20
READ_SIZE = 256 * 1024
# The buffers of an ended kernel's socket hold less than this many reads; a living kernel may publish without end.
MAX_DRAIN_READS = 256
# A kernel drops messages once 1000 of them wait for the launcher. So in a flood the launcher lets few of them wait: it
# reads every few milliseconds (s), and sends what it has less often. The first messages after a pause go at once.
FLOOD_INTERVAL, PUMP_INTERVAL, ALLOWANCE, MAX_BURST_READS = 0.004, 0.02, 32.0, 16
# Bytes of one turn from which on the messages are large ones: an interval would fill the socket's buffer.
MANY_BYTES = 64 * 1024
RETRY_DELAY, MAX_RETRY_DELAY, MAX_ATTEMPTS = 0.05, 5.0, 20
# Seconds after which a subscription counts as one that works: the attempts are counted from the start again.
STABLE_SECONDS = 10.0
# A kernel that welcomes subscribers (JEP 65) does so in its first messages.
MAX_BEFORE_WELCOME = 32
MAX_READERS = 64
# A full ring waits for a reader that is behind, and the kernel's own queue fills meanwhile; but no longer than these
# seconds for one that takes nothing.
PATIENCE = 10.0
MARKER = b""


class Reader(Protocol):
    """A tunnel stream that takes messages from the journal.

    ``cursor`` is the next message's number, and ``moved_at`` when that changed, by the monotonic clock. A full
    ring waits for a reader with ``is_live``.
    """

    cursor: int
    moved_at: float

    @property
    def is_live(self) -> bool:
        """Whether it reads on without an end."""

    def pump(self) -> None:
        """Queue what is there, as far as the stream has room."""

    def end(self) -> None:
        """Close the stream behind what is queued."""


class Journal:
    """One kernel's messages, and the subscription that they come from. ``close()`` ends the readers, too.

    ``limit`` is the ring's size in bytes. ``is_linked`` tells whether there is a server, whose readers a full ring
    waits for. ``positions`` and ``notes`` are the server's own, kept for the next server.
    """

    def __init__(self, reactor: Reactor, limit: int, is_linked: Callable[[], bool] = lambda: True) -> None:
        self._reactor, self._is_linked = reactor, is_linked
        self.readers: dict[int, Reader] = {}
        self.positions: dict[str, int] = {}
        self._notes = wire.Notes()
        self.trouble = ""  # why there are no messages
        self.subscribed = False  # a message of the present process has come
        self.welcome: bytes | None = None  # the present process's
        self.next = 1
        self.size = 0
        # The message of number n, MARKER, or None for a lost one is at n - _first; those before _head are dropped.
        self._entries: list[bytes | None] = []
        self._first, self._head = 1, 0
        self._signer: hmac.HMAC | None = None  # with the kernel's key
        self._seen = 0  # messages of the present process
        self._connect: Callable[[], socket.socket] | None = None
        self._is_over: Callable[[], bool] = lambda: True
        self._socket: socket.socket | None = None
        self._peer: zmtp.Peer | None = None
        self._ready_at: float | None = None  # when the subscription began, by the monotonic clock
        self._interrupted = False  # a subscription was lost, and messages with it
        # Reads that may follow at once, and when the last one and the last pumping were, by the monotonic clock.
        self._allowance, self._taken_at, self._pumped_at = ALLOWANCE, 0.0, 0.0
        self._received = 0  # bytes
        self._plan: Timer | None = None
        self._expiry: Timer | None = None
        self._attempts = 0
        self._retry = Backoff(RETRY_DELAY, MAX_RETRY_DELAY)
        self._is_paused = False  # the ring is full, and waits for a reader
        self._patience: Timer | None = None
        self.set_limit(limit)

    # -- the ring ----------------------------------------------------------------------------

    def set_limit(self, limit: int) -> None:
        self._limit = max(limit, MIN_LIMIT)
        self._shrink(self._limit)

    @property
    def oldest(self) -> int:
        """The number of the oldest message; ``next`` where there is none."""
        return self._first + self._head

    def add(self, messages: list[bytes | None]) -> None:
        """Number these messages; None is a lost one."""
        self._entries += messages
        self.next += len(messages)
        self.size += sum(map(len, filter(None, messages))) + OVERHEAD * len(messages)
        if self.size > self._limit:
            self._keep_limit()

    def _keep_limit(self) -> None:
        """Drop the oldest messages; where a reader lacks them, read no more from the kernel until it has moved on."""
        self._shrink(self._limit, self._first_lacking())
        must_wait = self.size > self._limit and self.oldest < self.next - 1
        if must_wait and self._patience is None:
            self._patience = self._reactor.later(PATIENCE / 4, self._look_again)
        if must_wait != self._is_paused:
            self._is_paused = must_wait
            self._write()

    def _first_lacking(self) -> int:
        """The number of the first message that a live reader lacks."""
        since = time.monotonic() - PATIENCE
        live = self.readers.values() if self._is_linked() else ()
        return min((reader.cursor for reader in live if reader.is_live and reader.moved_at > since), default=self.next)

    def _look_again(self) -> None:
        self._patience = None
        self.moved_on()

    def moved_on(self) -> None:
        """A reader has moved on, or the link has changed: perhaps the ring need not wait for it any more."""
        if self._is_paused:
            self._is_paused = False
            self._keep_limit()
            if not self._is_paused:
                self._write()

    def _shrink(self, limit: int, upto: int | None = None) -> None:
        """Drop the oldest messages, before the number ``upto``, until the others fit; the newest one stays."""
        entries, head = self._entries, self._head
        last = len(entries) - 1 if upto is None else min(len(entries) - 1, upto - self._first)
        while self.size > limit and head < last:
            self.size -= OVERHEAD + len(entries[head] or b"")
            entries[head] = None
            head += 1
        if head > 1024 and head > len(entries) // 2:
            del entries[:head]
            self._first, head = self._first + head, 0
        self._head = head

    def make_room(self) -> None:
        """Drop the older half of the messages: the launcher's memory is used up."""
        self._shrink(self.size // 2)

    def entries(self, number: int, count: int) -> tuple[int, list[bytes | None]]:
        """At most ``count`` messages from this number on, or from the oldest, and the number of their first."""
        begin = max(number, self.oldest)
        at = begin - self._first
        return begin, self._entries[at : at + count]

    # -- the kernel's processes --------------------------------------------------------------

    def begin(self, connection: dict[str, Any], journal_from: int) -> None:
        """A new process of the kernel is started; its messages have numbers of at least ``journal_from``."""
        if self._expiry is not None:
            self._expiry.cancel()
        self.drain()
        self._hang_up()
        self._is_paused = False
        key, digest = str(connection.get("key", "")).encode(), str(connection.get("signature_scheme"))[len("hmac-") :]
        self._signer = hmac.new(key, digestmod=digest) if key and digest in hashlib.algorithms_guaranteed else None
        if journal_from > self.next:
            self._entries.clear()
            self._head = self.size = 0
            self.next = self._first = journal_from
        self.subscribed = self._interrupted = False
        self.welcome, self._seen, self._attempts, self.trouble = None, 0, 0, ""
        self._retry.reset()
        self.add([MARKER])
        self.pump()

    def sign(self, parts: list[bytes]) -> bytes:
        """The signature of these four frames, as Jupyter's messages have it; b"" where the kernel signs nothing."""
        if self._signer is None:
            return b""
        signer = self._signer.copy()
        signer.update(b"".join(parts))
        return signer.hexdigest().encode()

    def subscribe(self, connect: Callable[[], socket.socket], is_over: Callable[[], bool]) -> None:
        """The process listens. ``connect`` returns a socket that is connecting to its iopub, or raises OSError."""
        self._connect, self._is_over = connect, is_over
        self._subscribe()

    def close_later(self, seconds: float, close: Callable[[], None]) -> None:
        """Call ``close`` after this time, unless a new process of the kernel begins."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = self._reactor.later(seconds, close)

    def close(self) -> None:
        self._hang_up()
        for reader in list(self.readers.values()):
            reader.end()
        self._entries.clear()
        self._first, self._head, self.size = self.next, 0, 0

    def pump(self) -> None:
        for reader in list(self.readers.values()):
            reader.pump()

    # -- ACK ---------------------------------------------------------------------------------

    def acknowledge(self, fields: dict[str, Any]) -> None:
        """Keep the server's positions and its changed notes for the next server."""
        positions, notes = fields.get("positions"), fields.get("notes")
        self.positions = wire.checked_positions(positions)
        self._notes.change(notes)

    @property
    def notes(self) -> dict[str, str]:
        """The server's notes, by their keys."""
        return self._notes.texts

    def header(self, start: int) -> bytes:
        """The first frame for a server that reads from the number ``start``, in JSON."""
        names = ("oldest", "next", "positions", "notes", "subscribed", "trouble")
        fields = {name: getattr(self, name) for name in names}
        return json.dumps({**fields, "start": start}, separators=(",", ":")).encode()

    # -- the subscription --------------------------------------------------------------------

    def _subscribe(self) -> None:
        self._plan = None
        if self._connect is None or self._is_over():
            return
        self._attempts += 1
        try:
            self._socket = self._connect()
        except OSError as error:
            self._lost(str(error))
            return
        self._peer = zmtp.Peer(b"SUB", min(max(self._limit, MIN_MESSAGE), wire.MAX_RECORD))
        self._reactor.watch(self._socket, READ | WRITE, self._on_ready)

    def _on_ready(self, events: int) -> None:
        if events & WRITE:
            self._write()
        if events & READ:
            self._take_in()

    def _take_in(self) -> None:
        """Read what has come and pass it on. In a flood this is done at intervals, which costs much less CPU time."""
        reads, before = 0, self._received
        while reads < MAX_BURST_READS and not self._is_paused and self._read():
            reads += 1
        now = time.monotonic()
        earned = (now - self._taken_at) / FLOOD_INTERVAL
        self._allowance = max(-1.0, min(ALLOWANCE, self._allowance + earned) - 1)
        self._taken_at = now
        is_flood = self._allowance < 0 and self._socket is not None and self._received - before < MANY_BYTES
        if is_flood:
            sock = self._socket
            self._reactor.forget(sock)
            self._reactor.later(FLOOD_INTERVAL, lambda: self._resume() if sock is self._socket else None)
        if not is_flood or not reads or now - self._pumped_at >= PUMP_INTERVAL:
            self._pumped_at = now
            self.pump()

    def _resume(self) -> None:
        self._write()  # which watches the socket again
        self._take_in()

    def _write(self) -> None:
        if self._socket is None or self._peer is None:
            return
        outgoing = self._peer.outgoing
        try:
            if outgoing:
                del outgoing[: self._socket.send(outgoing)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost(str(error))
            return
        wanted = (WRITE if outgoing else 0) | (0 if self._is_paused else READ)
        self._reactor.watch(self._socket, wanted, self._on_ready)

    def drain(self) -> None:
        """Read what the kernel has sent already; no more than the ring takes, while the kernel lives."""
        for _ in range(MAX_DRAIN_READS):
            if (self._is_paused and not self._is_over()) or not self._read():
                break

    def _read(self) -> bool:
        """Read once; False if there was nothing to read, or there is no connection any more."""
        if self._socket is None or self._peer is None:
            return False
        peer = self._peer
        try:
            data = self._socket.recv(READ_SIZE)
            if not data:
                self._lost("the kernel closed the connection")
                return False
            self._received += len(data)
            self._take(self._feed(peer, data))
        except BlockingIOError:
            return False
        except (OSError, zmtp.ProtocolError) as error:
            self._lost(str(error))
            return False
        except MemoryError:
            self.make_room()
            self._lost("the launcher's memory is used up")
            return False
        if peer.outgoing:
            self._write()
        return True

    def _feed(self, peer: zmtp.Peer, data: bytes) -> list[bytes | None]:
        was_ready = peer.ready
        messages = peer.feed(data)
        if peer.ready and not was_ready:
            # In ZMTP 3.0 a message: 1 and the topic, of which every topic is a beginning.
            peer.outgoing += zmtp.encode_frame(0, b"\x01")
            self._ready_at = time.monotonic()
            if self._interrupted:
                messages.insert(0, None)
            self._interrupted = False
        return messages

    def _take(self, messages: list[bytes | None]) -> None:
        if not messages:
            return
        self.subscribed = True
        if self._seen < MAX_BEFORE_WELCOME:
            self._seen += len(messages)
            found = [message for message in messages if message and b'"iopub_welcome"' in message[:2048]]
            self.welcome = found[0] if found else self.welcome
        self.add(messages)

    def _lost(self, reason: str) -> None:
        """Subscribe again after a pause, MAX_ATTEMPTS times."""
        if self._ready_at is not None:
            self._interrupted = True
            if time.monotonic() - self._ready_at > STABLE_SECONDS:
                self._attempts = 0
                self._retry.reset()
        self._hang_up()
        if self._is_over():
            return
        if self._attempts >= MAX_ATTEMPTS:
            self.trouble = f"the launcher cannot subscribe to its iopub: {reason}"[:1000]
            print(f"launcher: a kernel's output is lost: {self.trouble}", file=sys.stderr, flush=True)
            for reader in list(self.readers.values()):  # the next reading's header says so
                reader.end()
            return
        self._plan = self._reactor.later(self._retry.next(), self._subscribe)

    def _hang_up(self) -> None:
        if self._plan is not None:
            self._plan.cancel()
        if self._socket is not None:
            self._reactor.forget(self._socket)
            self._socket.close()
        self._socket = self._peer = self._plan = self._ready_at = None
