"""The launcher's end of the link: dial, authenticate, carry frames, dial again.

The launcher tries its addresses in rounds (``dial``). The wait between rounds grows, with jitter, and is reset when the
link is live. Each server names the addresses of the other servers that may take over; the launcher keeps all, the
newest first. Every takeover of this launcher has a number (epoch). The launcher refuses a server with a lower epoch
than the highest it has seen: that server slept through its lease.

Messages that wait when a link breaks are dropped: on the next link REPORT gives the server the state of every kernel.
Tunnel streams wait in the outbox and continue where they were.
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
from launchers.reactor import READ, WRITE, Backoff, Reactor, Timer

RETRY_DELAY = 0.05  # seconds
# In the first minute without a link, in which a restarted server is back, the launcher dials often. Seconds of the
# longest wait between rounds, and of the handshake: the first value in that minute, the second one later.
FIRST_MINUTE = 60.0
MAX_RETRY_DELAYS = 1.0, 3.0
HANDSHAKE_TIMEOUTS = 3.0, 10.0
# The newest addresses stay.
MAX_ADDRESSES = 32
# Characters about failed addresses in HELLO, in total and for each: HELLO must fit a small frame.
MAX_FAILURES, MAX_FAILURE = 2000, 100
# Sealed bytes that may wait for the socket; the rest stays in the outbox, which chooses the order.
SOCKET_BACKLOG = 512 * 1024
READ_SIZE = 256 * 1024


class Uplink:
    """One launcher's link to its server; ``on_message(name, payload)`` gets each message of the server."""

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
        self._untried: list[Address] = []  # of this round: the next ones if the server that answered is not ours
        self._dialled: Address | None = None
        self._round: Round | None = None
        self._failures: dict[Address, str] = {}  # since the last link: address -> why it did not work
        self._epoch = 0  # the highest epoch of a server
        self._waiting = False  # the link was dropped, and the next dial is planned
        self._hello = hello
        self._on_message, self._on_down, self._on_writable = on_message, on_down, on_writable
        self._retry = Backoff(RETRY_DELAY, MAX_RETRY_DELAYS[0])
        self._due = False
        reactor.before_wait = self._flush_due
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
        """Dial the untried addresses of this round, or all addresses."""
        self._waiting = False
        self._clear()
        self._failures = {address: why for address, why in self._failures.items() if address in self._addresses}
        self._round = Round(
            self._reactor,
            self._untried or self._addresses,
            connected=self._on_connected,
            failed=self._on_failed,
            address_failed=self._on_address_failed,
        )

    @property
    def _is_long(self) -> bool:
        return time.monotonic() - self.last_live > FIRST_MINUTE

    def _on_address_failed(self, address: Address, reason: str) -> None:
        self._failures[address] = reason
        print(f"link: {endpoints.format_endpoint(*address)}: {reason}", file=sys.stderr, flush=True)

    def _on_failed(self) -> None:
        self._untried = []
        self.drop("no address could be reached")

    def _on_connected(self, address: Address, sock: socket.socket, untried: list[Address]) -> None:
        self._round = None
        self._socket, self._dialled, self._untried = sock, address, untried
        self._deadline = self._reactor.later(HANDSHAKE_TIMEOUTS[self._is_long], self._on_silence)
        self._reactor.watch(self._socket, READ, self._on_ready)

    def _on_silence(self) -> None:
        """The server accepts connections and sends nothing: it hangs. Skip its other addresses (same port)."""
        assert self._dialled is not None
        other_ports = [address for address in self._untried if address[1] != self._dialled[1]]
        self._untried = other_ports or self._untried
        self.drop("the server did not finish the handshake")

    def drop(self, reason: str) -> None:
        """Close this connection and dial again after a pause; a second call before that changes nothing."""
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
            self._failures[was_dialled] = reason
        # The pause is between rounds; within a round the next address follows at once.
        pause = 0.0
        if not self._untried:
            self._retry.longest = MAX_RETRY_DELAYS[self._is_long]
            pause = self._retry.next() * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
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
        """WELCOME came: the link is live, and its token is valid from now on.

        Returns False, and drops the link, if another server has taken this launcher over in the meantime.
        """
        if not self._is_newest(fields):
            return False
        if self._deadline:
            self._deadline.cancel()
        self.token = bytes.fromhex(fields["token"])
        self.live = True
        self._failures.clear()
        self._retry.reset()
        self.learn(fields)
        return True

    def redirected(self, fields: dict[str, Any]) -> None:
        """REDIRECT came: another server has taken this launcher over, and is dialled next."""
        if not self._is_newest(fields):
            return
        self._keep_addresses(_endpoints(fields))
        self._untried = []
        self.drop("the server says that another one has taken over")

    def _is_newest(self, fields: dict[str, Any]) -> bool:
        epoch = int(fields.get("epoch", 0))
        if epoch < self._epoch:
            self.drop(f"refused: the server has epoch {epoch}, and another one has taken over with {self._epoch}")
            return False
        self._epoch = epoch
        return True

    def learn(self, fields: dict[str, Any]) -> None:
        """Keep the addresses in WELCOME and HEARTBEAT, after the one that works."""
        if self.live and self._dialled:
            self._keep_addresses([self._dialled, *_endpoints(fields)])
            self._untried = []

    def _keep_addresses(self, first: list[Address]) -> None:
        self._addresses = list(dict.fromkeys([*first, *self._addresses]))[:MAX_ADDRESSES]

    def dialled(self) -> dict[str, Any]:
        """For HELLO: the address that worked, and the failures since the last link."""
        assert self._dialled is not None
        failures: list[list[str]] = []
        room = MAX_FAILURES
        for address, reason in self._failures.items():
            failure = [endpoints.format_endpoint(*address), reason[:MAX_FAILURE]]
            if address != self._dialled and room > (size := sum(map(len, failure))):
                failures.append(failure)
                room -= size
        return {"reached": endpoints.format_endpoint(*self._dialled), "in_vain": failures}

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
            if self._unseal is None:  # an earlier message of this read dropped the link
                return
            for body in wire.unpack(self._unseal(sealed)):
                name, payload = wire.decode(body, wire.DOWN)
                # Before WELCOME, and after a refusal, the server's other messages are ignored.
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
        self._send_opening(opening)

    def _complain(self, public_key: bytes, reason: str) -> None:
        tag = wire.complaint_tag(self.token, public_key, self._id, self._jobid, reason)
        opening = wire.Opening(wire.COMPLAINT, self._id, self._jobid, tag, reason)
        self._send_opening(opening)
        print(f"link: {reason}", file=sys.stderr, flush=True)
        raise SystemExit(3)

    def _send_opening(self, opening: wire.Opening) -> None:
        # A few hundred bytes fit the empty buffer of a new connection: this does not block.
        assert self._socket is not None
        self._socket.sendall(wire.frame(opening.encode()))

    def send(self, name: str, **fields: Any) -> None:
        """Queue a message; without a live link it is dropped (the next REPORT has the same information)."""
        if self.live:
            self.outbox.message(wire.encode(name, **fields))
            self.flush()

    def flush(self) -> None:
        """Send soon, together with everything that is queued before the reactor waits again."""
        self._due = True

    def _flush_due(self) -> bool:
        """Send what is due; True if that made room for more, which has been queued."""
        if self._due:
            self._flush_now()
        return self._due

    def _flush_now(self) -> None:
        """Seal and send while the socket takes it."""
        self._due = False
        if self._socket is None or self._seal is None:
            return
        try:
            while True:
                while len(self._sealed) < SOCKET_BACKLOG and (body := self.outbox.next_frame()) is not None:
                    self._sealed += wire.frame(self._seal(body))
                if not self._sealed:
                    break
                del self._sealed[: self._socket.send(self._sealed)]
        except BlockingIOError:
            pass
        except OSError as error:
            self.drop(f"lost: {error}")
            return
        wanted = READ | WRITE if self._sealed else READ
        self._reactor.watch(self._socket, wanted, self._on_ready)
        self._on_writable()

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
    """The valid addresses in a message."""
    given = fields.get("addresses")
    texts = [text for text in given if isinstance(text, str)] if isinstance(given, list) else []
    return [endpoint for endpoint in map(endpoints.parse_endpoint, texts[:MAX_ADDRESSES]) if endpoint]
