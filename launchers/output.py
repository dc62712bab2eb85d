"""What a kernel publishes, kept on its node until its server says that every client has it.

Messages are a ring: where they are more than its bound the oldest go, and are counted. So a cell that runs
while no server is there, or while one is replaced by another, loses no output that fits.
"""

from __future__ import annotations

import json
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from gateway_slurm.link import flow, wire
from launchers.reactor import READ, WRITE, Reactor, Timer
from launchers.subscriber import Message, ProtocolError, Subscriber

# What a message costs beside its bytes, so that many small ones are bounded, too.
OVERHEAD = 256
# Messages whose going is remembered one by one: an ACK may still come for one of them.
GONE_KNOWN = 10_000
POSITIONS_KNOWN = 1024
ID_LIMIT = 200
# A position is the server's own text: an id, and what it knows of the session's cells.
POSITION_LIMIT = 4096
READ_SIZE = 256 * 1024
# A kernel that is over has left at most what its socket's buffers hold; one that still publishes has no end.
DRAIN_READS = 256
# The first subscription to everything is answered by a welcome (JEP 65), for which clients wait: one of them is
# to come first. It has by the first ACK, or by now (s); without a server there is nobody to wait for.
SUBSCRIBE_AFTER = 1.0
FIRST_PAUSE, LONGEST_PAUSE, ATTEMPTS = 0.05, 5.0, 20


class MessageRing:
    """Messages in their order, of at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.acked = ""
        self.positions: dict[str, str] = {}
        self._messages: OrderedDict[str, Message | None] = OrderedDict()  # None for one that is missing here
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._gone_before = 0  # these
        self._awaited = ""  # acknowledged, and not arrived here yet
        self._number = 0

    def add(self, message: Message) -> None:
        self._put(message.msg_id, message if message.is_whole else None)

    def gap(self) -> None:
        """Here something is missing, and nobody knows how much."""
        self._put("", None)

    def _put(self, msg_id: str, message: Message | None) -> None:
        self._number += 1
        is_new = msg_id and msg_id not in self._messages and msg_id not in self._gone
        key = msg_id if is_new else f"#{self._number}"
        self._messages[key] = message
        self.size += _cost(message)
        if key == self._awaited:
            self._let_go(key)
        self.shrink()

    def shrink(self) -> None:
        """The oldest go where there are too many."""
        while self.size > self.limit and self._messages:
            self._gone[self._pop()] = None
        while len(self._gone) > GONE_KNOWN:
            self._gone.popitem(last=False)
            self._gone_before += 1

    def _pop(self) -> str:
        key, message = self._messages.popitem(last=False)
        self.size -= _cost(message)
        return key

    def acknowledge(self, upto: str, positions: dict[str, str]) -> None:
        """Clients have everything up to the message ``upto``; it may have gone already, or be still to come."""
        self.acked, self.positions = upto, positions
        self._awaited = ""
        if upto in self._messages or upto in self._gone:
            self._let_go(upto)
        else:
            self._awaited = upto

    def _let_go(self, upto: str) -> None:
        self._awaited, self._gone_before = "", 0
        if upto not in self._messages:
            while self._gone.popitem(last=False)[0] != upto:
                pass
            return
        self._gone.clear()
        while self._pop() != upto:
            pass

    def clear(self) -> None:
        """Nobody wants what is here."""
        self._messages.clear()
        self._gone.clear()
        self.size = self._gone_before = 0

    def snapshot(self) -> tuple[dict[str, Any], list[Message]]:
        """What is to be known of it, and the messages."""
        whole = [message for message in self._messages.values() if message is not None]
        dropped = self._gone_before + len(self._gone) + len(self._messages) - len(whole)
        return {"dropped": dropped, "positions": self.positions, "acked": self.acked}, whole


def _cost(message: Message | None) -> int:
    return OVERHEAD + (message.size if message is not None else 0)


class OutputBuffer:
    """Subscribes to one kernel's iopub and keeps what it says. ``close()`` ends it and forgets.

    ``connect`` returns a socket on its way to the channel or raises OSError. ``linked`` tells whether there is
    a server: one that never acknowledges wants only what comes while it is away. ``is_over`` tells whether the
    kernel has ended; what it said stays here. ``trouble`` is why nothing is kept from the start.
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
        self._asked = False  # for the subscription
        self._closed = False
        self._stands = False  # the subscription did, at least once
        self._interrupted = False  # something was published that we did not get
        self._acknowledges = False  # its server does
        self._away = False  # there was no server, and the next has not read what came meanwhile
        self._socket: socket.socket | None = None
        self._subscriber: Subscriber | None = None
        self._plan: Timer | None = None
        self._attempts = 0
        self._pause = FIRST_PAUSE
        self.trouble = trouble  # why nothing is kept

    # -- when -------------------------------------------------------------------------------

    def begin(self) -> None:
        """The kernel's channels listen."""
        self._begun = True
        if self.trouble:
            return
        if self.ring.limit <= 0:
            self._give_up("SlurmService.kept_output is 0")
        elif self._linked():
            self._plan = self._reactor.later(SUBSCRIBE_AFTER, self._subscribe)
        else:
            self.link_down()

    def link_down(self) -> None:
        """The server is gone: what comes from now on is kept."""
        self._away = True
        self._update()

    def link_up(self, *, same_server: bool, limit: int) -> None:
        """A server is there. Its streams have gone on where they were, if it is the same one."""
        self.ring.limit = limit
        self.ring.shrink()
        if limit <= 0 and not self.trouble:
            self._give_up("SlurmService.kept_output is 0")
        if same_server:
            self._no_longer_away()

    def acknowledged(self, fields: dict[str, Any]) -> None:
        """ACK came: its server acknowledges, from now on."""
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

    # -- reading it -------------------------------------------------------------------------

    def read(self) -> Iterator[bytes]:
        """What is kept, for the tunnel's stream: records, each behind its length.

        The first is a header in JSON, each of the others a message's frames.
        """
        self._drain()
        header, messages = self.ring.snapshot()
        header["keeps"] = self._stands and not self.trouble
        yield from _in_chunks(_records(header, messages))
        self._no_longer_away()

    def _drain(self) -> None:
        for _ in range(DRAIN_READS):
            if not self._read():
                return

    # -- the connection ---------------------------------------------------------------------

    def _subscribe(self) -> None:
        if self._plan is not None:
            self._plan.cancel()
        if self._closed or self.trouble or self._is_over():
            return
        self._asked = True
        self._attempts += 1
        try:
            self._socket = self._connect()
            self._subscriber = Subscriber(self.ring.limit)
        except OSError as error:
            self._lost(str(error))
            return
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
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(str(error))
            return
        self._reactor.watch(self._socket, READ | WRITE if outgoing else READ, self._on_ready)

    def _read(self) -> bool:
        """Read once; False when there was nothing, or there is no connection any more."""
        if self._socket is None or self._subscriber is None:
            return False
        try:
            data = self._socket.recv(READ_SIZE)
            if not data:
                self._lost("the kernel closed it")
                return False
            messages = self._subscriber.feed(data)
        except BlockingIOError:
            return False
        except (OSError, ProtocolError) as error:
            self._lost(str(error))
            return False
        if self._subscriber.subscribed:
            self._subscribed()
        for message in messages:
            self.ring.add(message)
        if self._subscriber.outgoing:
            self._write()
        return True

    def _subscribed(self) -> None:
        self._attempts, self._pause, self._stands = 0, FIRST_PAUSE, True
        if self._interrupted and self._wanted:
            self.ring.gap()
        self._interrupted = False

    def _lost(self, reason: str) -> None:
        """Subscribe again, a few times."""
        self._interrupted |= self._subscriber is not None and self._subscriber.subscribed
        self._hang_up()
        if self._attempts >= ATTEMPTS and not self._is_over():
            self._give_up(f"its iopub cannot be subscribed to: {reason}")
            return
        self._plan = self._reactor.later(self._pause, self._subscribe)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

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


def _records(header: dict[str, Any], messages: list[Message]) -> Iterator[bytes]:
    yield wire.frame(json.dumps(header, separators=(",", ":")).encode())
    for message in messages:
        yield wire.frame(wire.pack(message.frames()))


def _in_chunks(records: Iterator[bytes]) -> Iterator[bytes]:
    """Small ones go together."""
    waiting = bytearray()
    for record in records:
        waiting += record
        if len(waiting) >= flow.CHUNK:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


def _checked_ack(fields: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """ACK's message id and positions, as far as they are ones."""
    told = fields.get("positions")
    pairs = list(told.items())[:POSITIONS_KNOWN] if isinstance(told, dict) else []
    positions = {key: value for key, value in pairs if _is_id(key) and _is_id(value, POSITION_LIMIT)}
    upto = fields.get("upto")
    return (upto if isinstance(upto, str) and _is_id(upto) else ""), positions


def _is_id(text: Any, limit: int = ID_LIMIT) -> bool:
    return isinstance(text, str) and 0 < len(text) <= limit
