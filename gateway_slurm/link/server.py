"""The response socket: launchers dial it, prove their identity, and get a link.

A peer that is not authenticated may send one small frame, has a short deadline, and takes one of a limited number of
places. When all places are taken, the oldest such peer is closed, so that silent peers cannot keep a launcher out. A
failure ends one connection, and never the listener.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway_slurm._util import Backoff, RatedLog
from gateway_slurm.errors import HandshakeError, MessageRefused
from gateway_slurm.link import bounds, envelope, flow, wire
from gateway_slurm.turns import Turns

HANDSHAKE_SECONDS = 5.0
# How long a peer may take to read the last message before its connection is closed.
GOODBYE_SECONDS = 5.0
UNAUTHENTICATED_PLACES = 128
# Without a configured port the system chooses one for IPv4, which may be taken for IPv6 by another process.
ANY_PORT_ATTEMPTS = 5
# Sealed bytes that may wait in the transport; the rest stays in the outbox, which chooses the order.
TRANSPORT_BACKLOG = 512 * 1024
# Bytes of messages that may wait for a launcher: a dozen STARTs with environments of 1 MiB. A launcher for which more
# wait does not read.
MAX_WAITING_MESSAGES = 16 * 1024 * 1024
# Frames and messages that a link handles in one of its user's turns.
LOOP_SLICE = 128
# Seconds after which such a turn ends all the same.
SLICE_SECONDS = 0.002
# The user, for turns, of peers that are not authenticated. No user has such a name.
STRANGERS = "?"
# Seconds of the processor's time that a link's messages beside DATA may take at once, and the share of a processor
# after that: meanwhile the link is not read. Ours take a few milliseconds a minute.
MESSAGES_BURST, MESSAGES_SHARE = 1.0, 0.02
# Seconds for which a launcher is kept out that broke the protocol: no launcher of ours does.
KEPT_OUT_SECONDS = 0.5, 60.0
# Seconds without a fault after which a launcher is kept out as shortly as at first.
FORGIVEN_SECONDS = 600.0
# Links of a launcher that may be made at once, and per second after that. Ours dials once a second at most.
LINKS_BURST, LINKS_RATE = 20.0, 1.0
# Look-ups at a time; more wait.
MAX_LOOKUPS = 8
# What the streams' credit and the turns bound.
_STREAMS = tuple(bytes([wire.MESSAGES[name][0]]) for name in ("DATA", "CREDIT"))
_LAUNCHER_ID = re.compile(r"[A-Za-z0-9-]{1,64}", re.ASCII)


# -- Launchers that this server does not expect --


@dataclass(frozen=True)
class Redirect:
    """The answer to a launcher that belongs to another server.

    The launcher gets it only if it proves one of ``tokens``, and its job is ``jobid`` (if that is known).
    """

    tokens: Sequence[bytes] = field(repr=False)
    jobid: str
    addresses: Sequence[str]
    epoch: int


Resolve = Callable[[str], Awaitable["bool | Redirect"]]
"""Resolves the id of an unexpected launcher: True if it is expected now (``expect`` was called), or a Redirect."""


@dataclass
class _Lookup:
    """The look-up of one launcher for ``peers`` connections; once it has ``begun`` it continues without them."""

    peers: int = 0
    begun: bool = False
    task: asyncio.Task[bool | Redirect] = field(init=False)


class Lookups:
    """Calls ``resolve``, which may raise anything, at most MAX_LOOKUPS times at once; ``limit`` calls may wait.

    The peers are not authenticated yet. Used on one loop; its owner calls ``close``.
    """

    def __init__(self, resolve: Resolve, *, limit: int, log: logging.Logger | RatedLog) -> None:
        self._resolve, self._limit, self.log = resolve, limit, log
        self._lookups: dict[str, _Lookup] = {}
        self._places = asyncio.Semaphore(MAX_LOOKUPS)

    def __len__(self) -> int:
        return len(self._lookups)

    def close(self) -> None:
        """Cancel all look-ups."""
        for lookup in self._lookups.values():
            lookup.task.cancel()

    async def ask(self, launcher_id: str, seconds: float) -> bool | Redirect:
        """Look an id up, once for all connections that name it. Raises HandshakeError if too many look-ups wait."""
        if not _LAUNCHER_ID.fullmatch(launcher_id):
            return False
        lookup = self._lookups.get(launcher_id)
        if lookup is None:
            if len(self._lookups) >= self._limit:
                raise HandshakeError("too many unexpected launchers wait for their look-up")
            lookup = self._lookups[launcher_id] = _Lookup()
            lookup.task = asyncio.ensure_future(self._ask(launcher_id, lookup, seconds))
        lookup.peers += 1
        try:
            # The connection may be closed meanwhile, at the handshake's deadline at the latest; the look-up goes on for
            # other connections.
            return await asyncio.shield(lookup.task)
        finally:
            lookup.peers -= 1
            if not lookup.peers and not lookup.begun:
                # Peers that have gone leave no queue behind.
                del self._lookups[launcher_id]
                lookup.task.cancel()

    async def _ask(self, launcher_id: str, lookup: _Lookup, seconds: float) -> bool | Redirect:
        async with self._places:
            lookup.begun = True
            try:
                return await asyncio.wait_for(self._resolve(launcher_id), seconds)
            except Exception as error:  # noqa: BLE001 - whatever fails in the store, this launcher dials again
                self.log.warning("response socket: launcher %s could not be looked up: %r", launcher_id, error)
                return False
            finally:
                del self._lookups[launcher_id]


# -- Expected launchers and their links --


class LinkHandler(Protocol):
    """The owner of a launcher at the server. All methods are called on the service's loop."""

    def link_up(self, link: Link, hello: dict[str, Any]) -> dict[str, Any]:
        """The launcher is authenticated. Return the fields of WELCOME, without the token.

        The handler may set ``link.outbox`` to its own outbox, which outlives the link.
        """

    def link_message(self, link: Link, name: str, payload: Any) -> None:
        """A message other than HEARTBEAT arrived, within its ``bounds``. Raises WireError where the link must end."""

    def link_down(self, link: Link, reason: str) -> None:
        """The link is gone; the launcher may come back with a new one."""

    def forgotten(self) -> None:
        """The server does not expect the launcher any more."""

    def complained(self, reason: str) -> None:
        """The launcher sent a complaint instead of HELLO."""

    def link_writable(self, link: Link) -> None:
        """The link took data: resume reading from tunnel clients."""


@dataclass
class Expected:
    """A launcher that may dial the response socket: its valid tokens, its job, its handler, its user."""

    launcher_id: str
    tokens: list[bytes]
    jobid: asyncio.Future[str]
    handler: LinkHandler
    user: str = ""
    log: RatedLog = field(kw_only=True, repr=False)
    link: Link | None = field(default=None, repr=False)
    refused: str = ""  # why the last connection with its id was refused; "" after a success
    kept_out_until: float = 0.0  # by the loop's clock
    links_left: float = LINKS_BURST
    linked_at: float = 0.0  # by the loop's clock
    _kept_out: Backoff = field(default_factory=lambda: Backoff(*KEPT_OUT_SECONDS), repr=False)

    def keep_out(self) -> None:
        """The launcher broke the protocol: refuse it for a while, each time for longer."""
        self.kept_out_until = asyncio.get_running_loop().time() + self._kept_out.next()

    def count_link(self) -> None:
        """The launcher has a new link; one that has too many in a short time is kept out."""
        now = asyncio.get_running_loop().time()
        if now > max(self.linked_at, self.kept_out_until) + FORGIVEN_SECONDS:
            self._kept_out.reset()
        self.links_left = min(LINKS_BURST, self.links_left + LINKS_RATE * (now - self.linked_at)) - 1
        self.linked_at = now
        if self.links_left < 0:
            self.keep_out()


class ResponseSocket:
    """The listeners and the launchers that they expect. ``close()`` ends them and all links.

    ``resolve`` is awaited when an unexpected launcher dials. It may raise anything; that ends one connection.
    """

    def __init__(self, *, log: logging.Logger, resolve: Resolve | None = None) -> None:
        self.log = log
        self.strangers_log = RatedLog(log)
        # A few times the places: connections that replace closed ones wait for the same answers.
        limit = 4 * UNAUTHENTICATED_PLACES
        self._lookups = Lookups(resolve, limit=limit, log=self.strangers_log) if resolve is not None else None
        self._servers: list[asyncio.Server] = []
        self._expected: dict[str, Expected] = {}
        self._unauthenticated: OrderedDict[Link, None] = OrderedDict()
        self._links: set[Link] = set()
        self.turns = Turns()
        """The order in which the messages of all users' launchers are handled."""
        self.port = 0

    async def listen(self, hosts: list[str] | None, ports: range) -> None:
        """Listen on the first free port of ``ports`` (0: any); raise OSError if none is free."""
        error = OSError("the port range is empty")
        for port in [wanted for wanted in ports for _attempt in range(1 if wanted else ANY_PORT_ATTEMPTS)]:
            try:
                self.port = await self.also_listen(hosts, port)
                return
            except OSError as failure:
                error = failure
        raise error

    async def listen_on(self, sockets: Sequence[socket.socket]) -> None:
        """Listen on copies of these sockets, on which a service manager listens already. Raises OSError."""
        for listening in sockets:
            server = await asyncio.get_running_loop().create_server(
                lambda: Link(self), sock=listening.dup(), backlog=1024
            )
            self._servers.append(server)
        self.port = int(sockets[0].getsockname()[1])

    async def also_listen(self, hosts: list[str] | None, port: int) -> int:
        """Listen on one more port, such as the port of an earlier server; raise OSError if it is not free."""
        server = await asyncio.get_running_loop().create_server(lambda: Link(self), hosts, port, backlog=1024)
        chosen = [int(sock.getsockname()[1]) for sock in server.sockets]
        if len(set(chosen)) > 1:
            # The system chose different free ports for IPv4 and IPv6: use the first for both.
            server.close()
            return await self.also_listen(hosts, chosen[0])
        self._servers.append(server)
        return chosen[0]

    def connected(self, transport: asyncio.Transport) -> Link:
        """A launcher has connected by another way (a relay) than the listeners; return its protocol object."""
        link = Link(self)
        link.connection_made(transport)
        return link

    def expect(self, launcher_id: str, tokens: Sequence[bytes], handler: LinkHandler, *, user: str = "") -> Expected:
        """Expect this launcher from now on. The caller sets the result's ``jobid`` as soon as Slurm has assigned it.

        ``tokens`` are its launch token and the successor, which the launcher gets with its first WELCOME. Both were
        drawn when the launcher was created, so that every server with its record can authenticate it.
        """
        jobid: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        expected = self._expected[launcher_id] = Expected(
            launcher_id, list(tokens), jobid, handler, user, log=RatedLog(self.log)
        )
        return expected

    def forget(self, launcher_id: str) -> None:
        """Do not expect this launcher any more, and close its link."""
        expected = self._expected.pop(launcher_id, None)
        if expected is not None:
            expected.jobid.cancel()
            if expected.link is not None:
                expected.link.close("forgotten")
            expected.handler.forgotten()

    async def close(self) -> None:
        """Stop listening and close every link; data that was written before still goes out."""
        for server in self._servers:
            server.close()
        if self._lookups is not None:
            self._lookups.close()
        for link in [*self._unauthenticated, *self._links]:
            link.close("the server is shutting down")
        for expected in self._expected.values():
            expected.handler.forgotten()
        self._expected.clear()
        self.turns.close()

    # -- called by links --------------------------------------------------------------------

    def arrived(self, link: Link) -> None:
        # After a restart all launchers that are expected may dial at once.
        while len(self._unauthenticated) >= UNAUTHENTICATED_PLACES + len(self._expected):
            oldest, _none = self._unauthenticated.popitem(last=False)
            oldest.close("too many peers that are not authenticated")
        self._unauthenticated[link] = None

    def gone(self, link: Link) -> None:
        self._unauthenticated.pop(link, None)
        self._links.discard(link)

    async def authenticate(
        self, link: Link, opening: wire.Opening, key: envelope.ReceiverKey
    ) -> tuple[Expected | Redirect, dict[str, Any], envelope.Sealing, envelope.Sealing]:
        """Check an opening; raise HandshakeError if its launcher did not send it."""
        known = self._expected.get(opening.launcher_id) or await self._look_up(opening.launcher_id)
        if opening.kind == wire.COMPLAINT:
            self._take_complaint(known, opening, key)
            raise HandshakeError(f"the launcher cannot send HELLO: {opening.reason}")
        if isinstance(known, Expected):
            if known.kept_out_until > asyncio.get_running_loop().time():
                raise HandshakeError(
                    f"launcher {opening.launcher_id} has to wait: it broke the protocol, or dialled too often"
                )
            known.refused = "none of its tokens opens its HELLO"
        hello, seal, unseal = await self.turns.run(STRANGERS, key.open_hello, opening, known.tokens)
        # HELLO may come before sbatch has returned the job id; the handshake's deadline limits the wait.
        jobid = known.jobid if isinstance(known, Redirect) else await asyncio.shield(known.jobid)
        if jobid and not wire.same(jobid.encode(), opening.jobid.encode()):
            raise HandshakeError(f"launcher {opening.launcher_id} belongs to job {jobid}, not {opening.jobid}")
        return known, hello, seal, unseal

    async def _look_up(self, launcher_id: str) -> Expected | Redirect:
        """Resolve an unexpected id, once for all connections that name it; raise HandshakeError if it is unknown."""
        answer = self._lookups is not None and await self._lookups.ask(launcher_id, HANDSHAKE_SECONDS)
        if isinstance(answer, Redirect):
            return answer
        if launcher_id not in self._expected:
            raise HandshakeError("an opening from an unexpected launcher")
        return self._expected[launcher_id]

    @staticmethod
    def _take_complaint(known: Expected | Redirect, opening: wire.Opening, key: envelope.ReceiverKey) -> None:
        arguments = (key.public, opening.launcher_id, opening.jobid, opening.reason)
        if not any(wire.same(wire.complaint_tag(token, *arguments), opening.proof) for token in known.tokens):
            raise HandshakeError("a complaint that none of the launcher's tokens proves")
        if isinstance(known, Expected):
            known.handler.complained(opening.reason)

    def admit(self, link: Link, expected: Expected) -> bytes:
        """Make ``link`` the launcher's only link; return its next token."""
        self._unauthenticated.pop(link, None)
        self._links.add(link)
        expected.count_link()
        older, expected.link = expected.link, link
        if older is not None:
            older.close("a newer link of the same launcher", at_once=True)
        # Both tokens stay valid until the launcher's REPORT shows that it has the successor.
        return expected.tokens[-1]


class Link(asyncio.Protocol):
    """One connection: of an unauthenticated peer until its HELLO is opened, then a launcher's link."""

    def __init__(self, response_socket: ResponseSocket) -> None:
        self._socket = response_socket
        self.log = response_socket.log
        self._reader = wire.FrameReader(wire.OPENING_LIMIT)
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._key: envelope.ReceiverKey | None = None
        self._seal: envelope.Sealing | None = None
        self._unseal: envelope.Sealing | None = None
        self._writable = True
        self._flush_due = False
        # Received and not handled yet: the messages of one frame, and the frames after it.
        self._frames: deque[bytes] = deque()
        self._messages: deque[bytes] = deque()
        self._handling = False  # the next slice waits for its user's turn
        self._paused = False  # reading is paused until all is handled
        self._left_out = 0  # messages that could not be taken; the log has the first one
        self._allowance, self._counted_at = MESSAGES_BURST, 0.0  # seconds, and when they were counted
        self._lost = ""  # how the connection ended
        self._reported = False
        self.outbox = flow.Outbox()
        self.expected: Expected | None = None
        self.last_heard = 0.0
        self.closed = False

    @property
    def is_authenticated(self) -> bool:
        """Whether the launcher has proved its identity."""
        return self.expected is not None

    @property
    def peer(self) -> str:
        """The peer's address, as the relay reports it for a relayed connection; "" if there is none."""
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return str(name[0]) if isinstance(name, tuple) else ""

    # -- asyncio.Protocol -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        transport.set_write_buffer_limits(high=TRANSPORT_BACKLOG)
        self._socket.arrived(self)
        self._deadline = self._loop.call_later(HANDSHAKE_SECONDS, self.close, "no HELLO in time")
        self._socket.turns.post(STRANGERS, self._greet)

    def _greet(self) -> None:
        if not self.closed and self._transport is not None:
            self._key = envelope.ReceiverKey()
            self._transport.write(wire.preamble(self._key.public))

    def data_received(self, data: bytes) -> None:
        self.last_heard = self._loop.time()
        try:
            self._frames.extend(self._reader.feed(data))
        except wire.WireError as error:
            self._break(str(error))
            return
        if not self._handling:
            self._handle_later()
        elif not self._paused and self._transport is not None:
            # The link is ahead of its user's turn.
            self._paused = True
            self._transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._deadline.cancel()
        self._lost = f"lost: {error}" if error else "the launcher closed it"
        if not self._handling:
            self.close(self._lost)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self.flush()

    # -- handshake --------------------------------------------------------------------------

    @property
    def _user(self) -> str:
        return self.expected.user if self.expected is not None else STRANGERS

    def _handle_frame(self, frame: bytes) -> None:
        if self._unseal is not None:
            self._messages.extend(wire.unpack(self._unseal(frame), limit=bounds.MAX_MESSAGES))
        elif self._task is None:
            opening = wire.Opening.decode(frame)
            self._task = self._loop.create_task(self._authenticate(opening))
        else:
            # A launcher waits for WELCOME before it sends more.
            raise wire.WireError("a second frame before the answer to the first")

    async def _authenticate(self, opening: wire.Opening) -> None:
        assert self._key is not None
        try:
            known, hello, seal, unseal = await self._socket.authenticate(self, opening, self._key)
        except (HandshakeError, wire.WireError) as error:
            self.close(str(error))
            return
        if self.closed:
            return
        self._deadline.cancel()
        self._key = None
        self._seal, self._unseal = seal, unseal
        self._reader.limit = bounds.FRAME_LIMIT
        if isinstance(known, Redirect):
            self.send("REDIRECT", addresses=list(known.addresses), epoch=known.epoch)
            self.close(f"launcher {opening.launcher_id} belongs to another server and was redirected")
            return
        token = self._socket.admit(self, known)
        self.expected = known
        try:
            welcome = known.handler.link_up(self, bounds.hello(hello))
        except Exception:
            # Without this close the connection would stay open, without a link.
            known.log.exception("launcher %s: its HELLO could not be handled", known.launcher_id)
            self.close("its HELLO could not be handled")
            return
        self.send("WELCOME", token=token.hex(), **welcome)

    # -- messages ---------------------------------------------------------------------------

    def _handle_later(self) -> None:
        """Handle more in the user's turn, once the link's messages may take time again."""
        self._handling = True
        self._spend(0.0)  # what the link has gained since
        turns, user = self._socket.turns, self._user
        if self._allowance < 0:
            self._loop.call_later(-self._allowance / MESSAGES_SHARE, turns.post, user, self._handle_slice)
        else:
            turns.post(user, self._handle_slice)

    def _handle_slice(self) -> None:
        """Handle up to LOOP_SLICE frames and messages, in their order; pause reading while more wait."""
        assert self._transport is not None
        self._handling, until = False, time.monotonic() + SLICE_SECONDS
        try:
            for _ in range(LOOP_SLICE):
                if self.closed:
                    return
                if not self._handle_next() or time.monotonic() > until:
                    break
        except wire.WireError as error:
            self._break(str(error))
            return
        if self._messages or self._frames:
            if not self._paused:
                self._paused = True
                self._transport.pause_reading()
            self._handle_later()
        elif self._lost:
            self.close(self._lost)
        elif self._paused:
            self._paused = False
            self._transport.resume_reading()

    def _handle_next(self) -> bool:
        """Handle one message or frame; return whether there was one."""
        if self._messages:
            self._handle_message(self._messages.popleft())
        elif self._frames:
            self._handle_frame(self._frames.popleft())
        else:
            return False
        return True

    def _handle_message(self, body: bytes) -> None:
        is_data = body[:1] in _STREAMS
        begin = 0.0 if is_data else time.thread_time()
        assert self.expected is not None
        try:
            name, payload = bounds.decode(body)
            if name == "REPORT":
                if self._reported:
                    raise wire.WireError("a second REPORT on one link")
                self._reported = True
                del self.expected.tokens[:-1]
            if name != "HEARTBEAT":
                self.expected.handler.link_message(self, name, payload)
        except wire.WireError:
            raise
        except MessageRefused as error:
            self._left_out += 1
            if self._left_out == 1:
                self.expected.log.warning("launcher %s: %s", self.expected.launcher_id, error)
        except Exception:
            # One bad message must not end the link, which carries the messages of other kernels.
            self._left_out += 1
            if self._left_out == 1:
                self.expected.log.exception("launcher %s: a message could not be handled", self.expected.launcher_id)
        if not is_data:
            self._spend(time.thread_time() - begin)

    def _spend(self, seconds: float) -> None:
        """Count the processor's time of a message; where the allowance is used up, the next slice waits."""
        now = self._loop.time()
        gained = MESSAGES_SHARE * (now - self._counted_at)
        self._allowance, self._counted_at = min(MESSAGES_BURST, self._allowance + gained) - seconds, now

    def _break(self, reason: str) -> None:
        """The peer broke the protocol."""
        if self.expected is not None:
            self.expected.keep_out()
        self.close(reason)

    def send(self, name: str, **fields: Any) -> None:
        """Queue a message."""
        self.outbox.message(wire.encode(name, **fields))
        if self.outbox.messages_size > MAX_WAITING_MESSAGES:
            # Later: the caller is still using the link.
            self._loop.call_soon(lambda: self.close("the launcher does not read its messages", at_once=True))
        self.flush()

    def flush(self) -> None:
        """Write soon, together with everything that is queued in this round of the loop."""
        if not self._flush_due and not self.closed:
            self._flush_due = True
            self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        """Seal and write frames while the transport takes them."""
        self._flush_due = False
        if self._seal is None or self.closed or self._transport is None:
            return
        moved = False
        while self._writable and (body := self.outbox.next_frame()) is not None:
            moved = True
            self._transport.write(wire.frame(self._seal(body)))
        if moved and self.expected is not None:
            self.expected.handler.link_writable(self)

    def close(self, reason: str, *, at_once: bool = False) -> None:
        """End this connection, once. Data that was written before still goes out, for GOODBYE_SECONDS.

        With ``at_once`` it does not: the peer is gone, or does not read.
        """
        if self.closed:
            return
        if not at_once:
            self._flush_now()
        self.closed = True
        # The handler's outbox serves the next link; messages that are still sent to this link are lost.
        self.outbox = flow.Outbox()
        self._deadline.cancel()
        self._socket.gone(self)
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._frames.clear()
        self._messages.clear()
        if self._transport is not None:
            self._transport.abort() if at_once else self._transport.close()
            if not self._lost:
                self._deadline = self._loop.call_later(GOODBYE_SECONDS, self._transport.abort)
        if self.expected is None:
            self._socket.strangers_log.info("response socket: a connection was closed: %s", reason)
            return
        if self.expected.link is self:
            self.expected.link = None
        if self._left_out > 1:
            self.expected.log.warning(
                "launcher %s: %d more messages left out", self.expected.launcher_id, self._left_out - 1
            )
        self.expected.handler.link_down(self, reason)
