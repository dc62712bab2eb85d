"""The output of a kernel behind the tunnel, kept on its node until the server says that every client has it.

The messages are in a ring of a limited size: the oldest are dropped, and counted. So a cell that runs while there is no
server, or while one server replaces another, loses no output that fits.
"""

from __future__ import annotations

import json
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from gateway_slurm.link import flow, wire
from launchers.reactor import READ, WRITE, Backoff, Reactor, Timer
from launchers.subscriber import Message, ProtocolError, Subscriber

# The cost of a message beside its bytes, so that the limit also holds for many small messages.
OVERHEAD = 256
# Dropped messages that are remembered by their ids: an ACK may still name one of them.
MAX_DROPPED_IDS = 10_000
MAX_POSITIONS = 1024
MAX_ID = 200  # characters
# A position is the server's own text: a message id, and the progress of the session's cells.
MAX_POSITION = 4096
READ_SIZE = 256 * 1024
# The buffers of an ended kernel's socket hold less than this many reads; a living kernel may publish without end.
MAX_DRAIN_READS = 256
# A kernel welcomes its first subscriber only (JEP 65), and clients wait for the welcome. So a client subscribes first:
# it has done so by the first ACK, or after this time (s). Without a server there is no client to wait for.
SUBSCRIBE_DELAY = 1.0
RETRY_DELAY, MAX_RETRY_DELAY, MAX_ATTEMPTS = 0.05, 5.0, 20


class MessageRing:
    """Messages in their order, of at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.acked = ""
        self.positions: dict[str, str] = {}
        self._messages: OrderedDict[str, Message] = OrderedDict()
        self._dropped: OrderedDict[str, None] = OrderedDict()
        self._dropped_before = 0  # messages dropped before the oldest of ``_dropped``
        self._awaited = ""  # acknowledged, and not received here yet
        self._number = 0

    def add(self, message: Message) -> None:
        """Add a message, or one without frames in the place of missing ones, whose number may be unknown."""
        self._number += 1
        is_new = message.msg_id and message.msg_id not in self._messages and message.msg_id not in self._dropped
        key = message.msg_id if is_new else f"#{self._number}"
        self._messages[key] = message
        self.size += OVERHEAD + message.size
        if key == self._awaited:
            self._release_upto(key)
        self.shrink()

    def shrink(self) -> None:
        """Drop the oldest messages until the rest fits the limit."""
        while self.size > self.limit and self._messages:
            self._dropped[self._pop()] = None
        while len(self._dropped) > MAX_DROPPED_IDS:
            self._dropped.popitem(last=False)
            self._dropped_before += 1

    def _pop(self) -> str:
        key, message = self._messages.popitem(last=False)
        self.size -= OVERHEAD + message.size
        return key

    def acknowledge(self, upto: str, positions: dict[str, str]) -> None:
        """Clients have all messages up to ``upto``, which may have been dropped already, or may still come."""
        self.acked, self.positions = upto, positions
        self._awaited = upto
        if upto in self._messages or upto in self._dropped:
            self._release_upto(upto)

    def _release_upto(self, upto: str) -> None:
        self._awaited, self._dropped_before = "", 0
        if upto not in self._messages:
            while self._dropped.popitem(last=False)[0] != upto:
                pass
            return
        self._dropped.clear()
        while self._pop() != upto:
            pass

    def clear(self) -> None:
        """Remove all messages; none of them counts as dropped."""
        self._messages.clear()
        self._dropped.clear()
        self.size = self._dropped_before = 0

    def snapshot(self) -> tuple[dict[str, Any], list[Message]]:
        """The header for a reader (see ``OutputBuffer.read``), and the messages."""
        whole = [message for message in self._messages.values() if message.is_whole]
        dropped = self._dropped_before + len(self._dropped) + len(self._messages) - len(whole)
        return {"dropped": dropped, "positions": self.positions, "acked": self.acked}, whole


class OutputBuffer:
    """Subscribes to one kernel's iopub and keeps its messages. ``close()`` ends the subscription and drops them.

    ``connect`` returns a socket that is connecting to the channel, or raises OSError. ``linked`` tells whether there is
    a server. A server that never acknowledges gets only the messages that came while there was none. ``is_over`` tells
    whether the kernel has ended; its messages stay. ``trouble`` is the reason if nothing is kept from the start.
    """

    def __init__(
        self,
        reactor: Reactor,
        *,
        connect: Callable[[], socket.socket],
        linked: Callable[[], bool],
        is_over: Callable[[], bool],
        limit: int,
        trouble: str = "",
    ) -> None:
        self._reactor, self._connect = reactor, connect
        self._linked, self._is_over = linked, is_over
        self.ring = MessageRing(limit)
        self._begun = False  # the kernel listens
        self._asked = False  # a subscription was tried
        self._closed = False
        self._stands = False  # a subscription has succeeded at least once
        self._interrupted = False  # the subscription was lost, and messages with it
        self._acknowledges = False  # the server sends ACKs
        self._away = False  # there was no server, and the next one has not read the messages since
        self._socket: socket.socket | None = None
        self._subscriber: Subscriber | None = None
        self._plan: Timer | None = None
        self._attempts = 0
        self._retry = Backoff(RETRY_DELAY, MAX_RETRY_DELAY)
        self.trouble = trouble  # why nothing is kept

    # -- when messages are kept ------------------------------------------------------------

    def begin(self) -> None:
        """The kernel listens on its channels."""
        self._begun = True
        if self.trouble:
            return
        if self.ring.limit <= 0:
            self._give_up("SlurmService.kept_output is 0")
        elif self._linked():
            self._plan = self._reactor.later(SUBSCRIBE_DELAY, self._subscribe)
        else:
            self.link_down()

    def link_down(self) -> None:
        """The server is gone: keep the messages from now on."""
        self._away = True
        self._update()

    def link_up(self, *, same_server: bool, limit: int) -> None:
        """A server is there. If it is the same one, its tunnel streams have lost nothing."""
        self.ring.limit = limit
        self.ring.shrink()
        if limit <= 0 and not self.trouble:
            self._give_up("SlurmService.kept_output is 0")
        if same_server:
            self._no_longer_away()

    def acknowledged(self, fields: dict[str, Any]) -> None:
        """ACK came; its server acknowledges from now on."""
        self._acknowledges = True
        self._update()
        self.ring.acknowledge(*_checked_ack(fields))

    def _no_longer_away(self) -> None:
        self._away = False
        if not self._acknowledges:
            self.ring.clear()
        self._update()

    @property
    def _wanted(self) -> bool:
        return self._acknowledges or self._away

    def _update(self) -> None:
        if self._subscriber is not None:
            self._subscriber.wanted = self._wanted
        elif self._begun and not self._asked:
            self._subscribe()

    def close(self) -> None:
        self._closed = True
        self._hang_up()
        self.ring.clear()

    # -- reading the messages --------------------------------------------------------------

    def read(self) -> Iterator[bytes]:
        """The kept messages for a tunnel stream: records, each behind its length.

        The first record is a header in JSON (``dropped``, ``positions``, ``acked``, ``keeps``). Each of the others
        holds the frames of one message. A piece has many small records, about flow.CHUNK bytes together.
        """
        for _ in range(MAX_DRAIN_READS):
            if not self._read():
                break
        header, messages = self.ring.snapshot()
        header["keeps"] = self._stands and not self.trouble
        waiting = bytearray(wire.frame(json.dumps(header, separators=(",", ":")).encode()))
        for message in messages:
            if len(waiting) >= flow.CHUNK:
                yield bytes(waiting)
                waiting.clear()
            waiting += wire.frame(wire.pack(message.frames()))
        yield bytes(waiting)
        self._no_longer_away()

    # -- the subscription ------------------------------------------------------------------

    def _subscribe(self) -> None:
        if self._plan is not None:
            self._plan.cancel()
        if self._closed or self.trouble or self._is_over():
            return
        self._asked = True
        self._attempts += 1
        try:
            self._socket = self._connect()
        except OSError as error:
            self._lost(str(error))
            return
        self._subscriber = Subscriber(self.ring.limit)
        self._subscriber.wanted = self._wanted
        self._reactor.watch(self._socket, READ | WRITE, self._on_ready)

    def _on_ready(self, events: int) -> None:
        if events & WRITE:
            self._write()
        if events & READ:
            self._read()

    def _write(self) -> None:
        if self._socket is None or self._subscriber is None:
            return
        outgoing = self._subscriber.outgoing
        try:
            if outgoing:
                del outgoing[: self._socket.send(outgoing)]
            self._reactor.watch(self._socket, READ | WRITE if outgoing else READ, self._on_ready)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(str(error))

    def _read(self) -> bool:
        """Read once; False if there was nothing to read, or there is no connection any more."""
        if self._socket is None or self._subscriber is None:
            return False
        try:
            data = self._socket.recv(READ_SIZE)
            if not data:
                self._lost("the kernel closed the connection")
                return False
            messages = self._subscriber.feed(data)
        except BlockingIOError:
            return False
        except (OSError, ProtocolError) as error:
            self._lost(str(error))
            return False
        if self._subscriber.subscribed:
            self._attempts, self._stands = 0, True
            self._retry.reset()
            if self._interrupted and self._wanted:
                self.ring.add(Message("", None))
            self._interrupted = False
        for message in messages:
            self.ring.add(message)
        if self._subscriber.outgoing:
            self._write()
        return True

    def _lost(self, reason: str) -> None:
        """Subscribe again after a pause, MAX_ATTEMPTS times."""
        self._interrupted |= self._subscriber is not None and self._subscriber.subscribed
        self._hang_up()
        if self._attempts >= MAX_ATTEMPTS and not self._is_over():
            self._give_up(f"the launcher cannot subscribe to its iopub: {reason}")
            return
        self._plan = self._reactor.later(self._retry.next(), self._subscribe)

    def _give_up(self, reason: str) -> None:
        self.trouble = reason
        self._hang_up()
        self.ring.clear()
        print(f"launcher: a kernel's output is not kept: {reason}", file=sys.stderr, flush=True)

    def _hang_up(self) -> None:
        if self._plan is not None:
            self._plan.cancel()
        if self._socket is not None:
            self._reactor.forget(self._socket)
            self._socket.close()
        self._socket = self._subscriber = None


def _checked_ack(fields: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The message id and the positions of an ACK; invalid ones are left out."""
    given = fields.get("positions")
    pairs = list(given.items())[:MAX_POSITIONS] if isinstance(given, dict) else []
    positions = {key: value for key, value in pairs if _is_text(key, MAX_ID) and _is_text(value, MAX_POSITION)}
    upto = fields.get("upto")
    return (upto if isinstance(upto, str) and _is_text(upto, MAX_ID) else ""), positions


def _is_text(value: Any, limit: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= limit
