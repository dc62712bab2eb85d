"""The launcher's end of the link: dial, prove who we are, carry frames, dial again.

Addresses are tried in rounds (dialling); between rounds the wait grows, with jitter, and is reset when the link
is LIVE. Each server tells the addresses of the others that may take over; all are kept, the newest first.
A server whose taking over of this launcher is older than the newest it has seen is refused: it slept
through its lease. Messages that wait when a link breaks are dropped: REPORT tells the server the state of
every kernel on the next link. Tunnel streams wait in the outbox and go on where they were.
"""

from __future__ import annotations

import random
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from gateway_slurm.link import endpoints, flow, wire
from launchers.dial import Address, Round
from launchers.reactor import READ, WRITE, Reactor, Timer

FIRST_PAUSE = 0.05
# For the first minute without a link, in which a server that was restarted is back, one dials often: at most
# this pause (s) between rounds, and this wait for a server that says nothing. Later the second of each.
SOON = 60.0
LONGEST_PAUSES = 1.0, 3.0
HANDSHAKE_TIMEOUTS = 3.0, 10.0
# Addresses that are kept; those told first stay.
ADDRESS_LIMIT = 32
# Characters of what HELLO says of those that did not work, in all and of each: the frame is a small one.
TOLD_IN_ALL, TOLD_OF_EACH = 2000, 100
# Sealed bytes that may wait for the socket; what comes after stays in the outbox, where order is chosen.
SOCKET_BACKLOG = 512 * 1024
READ_SIZE = 256 * 1024


class Uplink:
    """One launcher's link to its server; ``on_message(name, payload)`` gets what comes down."""

    def __init__(
        self,
        reactor: Reactor,
        *,
        launcher_id: str,
        jobid: str,
        token: bytes,
        addresses: list[Address],
        hello: Callable[[], dict[str, Any]],
        on_message: Callable[[str, Any], None],
        on_down: Callable[[], None],
        on_writable: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._id, self._jobid, self.token = launcher_id, jobid, token
        self._addresses = addresses
        self._left: list[Address] = []  # of this round, when one that answered turns out to be none of ours
        self._dialled: Address | None = None
        self._round: Round | None = None
        self._in_vain: dict[Address, str] = {}  # since the last link: addresses that did not work, and why
        self._epoch = 0  # the highest that a server has said
        self._waiting = False  # dropped, and the next dial is planned
        self._hello = hello
        self._on_message, self._on_down, self._on_writable = on_message, on_down, on_writable
        self._pause = FIRST_PAUSE
        self._due = False
        reactor.before_wait = self._flush_if_due
        self._socket: socket.socket | None = None
        self._deadline: Timer | None = None
        self.live = False
        self.outbox = flow.Outbox(flow.NODE_BACKLOG)
        self.last_heard = self.last_live = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self.outbox.hold()
        self._early = b""
        self._reader = wire.FrameReader(wire.FRAME_LIMIT)
        self._sealed = bytearray()
        self._seal: Callable[[bytes], bytes] | None = None
        self._unseal: Callable[[bytes], bytes] | None = None

    # -- dialling ---------------------------------------------------------------------------

    def dial(self) -> None:
        """Try the addresses that are left of this round, or all of them."""
        self._waiting = False
        self._clear()
        self._in_vain = {where: why for where, why in self._in_vain.items() if where in self._addresses}
        self._round = Round(
            self._reactor,
            self._left or self._addresses,
            connected=self._on_connected,
            failed=self._on_failed,
            told=self._on_told,
        )

    @property
    def _is_long(self) -> bool:
        return time.monotonic() - self.last_live > SOON

    def _on_told(self, address: Address, why: str) -> None:
        self._in_vain[address] = why
        print(f"link: {endpoints.format_endpoint(*address)}: {why}", file=sys.stderr, flush=True)

    def _on_failed(self) -> None:
        self._left = []
        self.drop("no address could be reached")

    def _on_connected(self, address: Address, sock: socket.socket, left: list[Address]) -> None:
        self._round = None
        self._socket, self._dialled, self._left = sock, address, left
        self._set_deadline(HANDSHAKE_TIMEOUTS[self._is_long], self._on_silence)
        self._reactor.watch(self._socket, READ, self._on_ready)

    def _set_deadline(self, seconds: float, action: Callable[[], None]) -> None:
        if self._deadline:
            self._deadline.cancel()
        self._deadline = self._reactor.later(seconds, action)

    def _on_silence(self) -> None:
        """A server that hangs takes connections and says nothing: its other addresses, of the same port, wait."""
        assert self._dialled is not None
        port = self._dialled[1]
        self._left = [each for each in self._left if each[1] != port] or self._left
        self.drop("the server did not finish the handshake")

    def drop(self, reason: str) -> None:
        """Close this connection and dial again after a pause; once dropped, a second reason changes nothing."""
        if self._waiting:
            return
        self._waiting = True
        print(f"link: {reason}", file=sys.stderr, flush=True)
        was_live, was_dialled = self.live, self._dialled if self._socket is not None else None
        self.close()
        self._clear()
        if was_live:
            self.last_live = time.monotonic()
            self._on_down()
        elif was_dialled is not None:
            self._in_vain[was_dialled] = reason
        # All addresses of a round follow one another at once; the pause is between rounds.
        pause = 0.0
        if not self._left:
            pause = self._pause * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
            self._pause = min(self._pause * 2, LONGEST_PAUSES[self._is_long])
        self._reactor.later(pause, self.dial)

    def close(self) -> None:
        self.live = False
        if self._deadline:
            self._deadline.cancel()
        if self._round is not None:
            self._round.close()
            self._round = None
        if self._socket is not None:
            self._reactor.forget(self._socket)
            self._socket.close()
            self._socket = None

    def welcome(self, fields: dict[str, Any]) -> bool:
        """The server knows us: the link is LIVE, and the token it sent is the one from now on.

        False, and the link dropped, when another server has taken us over since it did.
        """
        if not self._is_newest(fields):
            return False
        if self._deadline:
            self._deadline.cancel()
        self.token = bytes.fromhex(fields["token"])
        self.live = True
        self._in_vain.clear()
        self._pause = FIRST_PAUSE
        self.learn(fields)
        return True

    def redirected(self, fields: dict[str, Any]) -> None:
        """Another server has taken us over: dial there next."""
        if not self._is_newest(fields):
            return
        self._keep_addresses(_endpoints(fields))
        self._left = []
        self.drop("the server says that another one has taken over")

    def _is_newest(self, fields: dict[str, Any]) -> bool:
        epoch = int(fields.get("epoch", 0))
        if epoch < self._epoch:
            self.drop(f"refused: the server has epoch {epoch}, and one with {self._epoch} has taken over since")
            return False
        self._epoch = epoch
        return True

    def learn(self, fields: dict[str, Any]) -> None:
        """Keep the addresses that WELCOME and HEARTBEAT tell, behind the one that works."""
        told = _endpoints(fields)
        if self.live and self._dialled:
            self._keep_addresses([self._dialled, *told])
            self._left = []

    def _keep_addresses(self, first: list[Address]) -> None:
        self._addresses = list(dict.fromkeys([*first, *self._addresses]))[:ADDRESS_LIMIT]

    def dialled(self) -> dict[str, Any]:
        """For the server: the address that worked, and those that did not since the last link, with the reasons."""
        assert self._dialled is not None
        told: list[list[str]] = []
        for where, why in self._in_vain.items():
            one = [endpoints.format_endpoint(*where), why[:TOLD_OF_EACH]]
            if where != self._dialled and sum(map(len, sum(told, one))) < TOLD_IN_ALL:
                told.append(one)
        return {"reached": endpoints.format_endpoint(*self._dialled), "in_vain": told}

    def local_ip(self) -> str:
        """The node's own address on the way to the server."""
        assert self._socket is not None
        return str(self._socket.getsockname()[0])

    # -- frames -----------------------------------------------------------------------------

    def _on_ready(self, events: int) -> None:
        if events & WRITE:
            self.flush()
        if events & READ and self._socket is not None:
            self._read()

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self.drop(f"lost: {error}")
            return
        if not data:
            self.drop("the server closed it")
            return
        self.last_heard = time.monotonic()
        try:
            self._take(data)
        except wire.WireError as error:
            self.drop(str(error))
        self.flush()

    def _take(self, data: bytes) -> None:
        if self._unseal is None:
            self._early += data
            if len(self._early) < wire.PREAMBLE_BYTES:
                return
            self._greet(wire.parse_preamble(self._early[: wire.PREAMBLE_BYTES]))
            data = self._early[wire.PREAMBLE_BYTES :]
        for sealed in self._reader.feed(data):
            if self._unseal is None:  # a message before it dropped the link
                return
            for body in wire.unpack(self._unseal(sealed)):
                name, payload = wire.decode(body, wire.DOWN)
                # Nothing is done for a server that was refused, or that has not let us in.
                if self.live or name in ("WELCOME", "REDIRECT"):
                    self._on_message(name, payload)

    def _greet(self, public_key: bytes) -> None:
        try:
            from gateway_slurm.link import envelope
        except ImportError as error:
            self._complain(public_key, f"{sys.executable} on this node has no pycryptodome >= 3.23 ({error})")
            raise wire.WireError("complained that pycryptodome is missing") from error
        opening, self._seal, self._unseal = envelope.seal_hello(
            public_key, self.token, self._id, self._jobid, self._hello()
        )
        self._send_all(wire.frame(opening.encode()))

    def _complain(self, public_key: bytes, reason: str) -> None:
        tag = wire.complaint_tag(self.token, public_key, self._id, self._jobid, reason)
        opening = wire.Opening(wire.COMPLAINT, self._id, self._jobid, tag, reason)
        self._send_all(wire.frame(opening.encode()))
        print(f"link: {reason}", file=sys.stderr, flush=True)
        raise SystemExit(3)

    def _send_all(self, data: bytes) -> None:
        # A few hundred bytes into the empty buffer of a new connection: it does not block.
        assert self._socket is not None
        self._socket.sendall(data)

    def send(self, name: str, **fields: Any) -> None:
        """Queue a message; without a live link it is dropped (REPORT makes up for it)."""
        if self.live:
            self.outbox.message(wire.encode(name, **fields))
            self.flush()

    def flush(self) -> None:
        """Send soon: together with what else is queued until the reactor waits again."""
        self._due = True

    def _flush_if_due(self) -> None:
        if self._due:
            self._flush_now()

    def _flush_now(self) -> None:
        """Seal and send while the socket takes it."""
        self._due = False
        if self._socket is None or self._seal is None:
            return
        try:
            self._fill_and_send()
        except BlockingIOError:
            pass
        except OSError as error:
            self.drop(f"lost: {error}")
            return
        wanted = READ | WRITE if self._sealed else READ
        self._reactor.watch(self._socket, wanted, self._on_ready)
        self._on_writable()

    def _fill_and_send(self) -> None:
        assert self._socket is not None
        assert self._seal is not None
        while True:
            while len(self._sealed) < SOCKET_BACKLOG:
                body = self.outbox.next_frame()
                if body is None:
                    break
                self._sealed += wire.frame(self._seal(body))
            if not self._sealed:
                return
            sent = self._socket.send(self._sealed)
            del self._sealed[:sent]

    def finish(self, seconds: float) -> None:
        """Send what waits, for at most ``seconds``, then close."""
        deadline = time.monotonic() + seconds
        while self.live and time.monotonic() < deadline:
            self._flush_now()
            if not self._sealed:
                break
            time.sleep(0.005)
        self.close()


def _endpoints(fields: dict[str, Any]) -> list[Address]:
    """The addresses in a message; what is none is left out."""
    told = fields.get("addresses")
    texts = [text for text in told if isinstance(text, str)] if isinstance(told, list) else []
    return [endpoint for endpoint in map(endpoints.parse_endpoint, texts[:ADDRESS_LIMIT]) if endpoint]
