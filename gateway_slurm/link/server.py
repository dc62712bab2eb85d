"""The response socket: where launchers dial in, prove who they are, and get a link.

An unauthenticated peer gets one small frame, a short deadline and a place among a bounded number;
when all places are taken the oldest goes, so that silent peers cannot keep a launcher out. Every
failure ends that one connection, never the listener.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from gateway_slurm.errors import HandshakeError

if TYPE_CHECKING:
    pass
from collections import OrderedDict, deque

from gateway_slurm.link import envelope, flow, wire

# Launchers that are looked up at a time; more wait, for as long as somebody waits for them.
LOOKUPS_AT_A_TIME = 8
_LAUNCHER_ID = re.compile(r"[A-Za-z0-9-]{1,64}", re.ASCII)


@dataclass(frozen=True)
class Redirect:
    """What a launcher is told that belongs to another server.

    Only one that proves one of ``tokens`` is told, and is of job ``jobid``, where that is known.
    """

    tokens: Sequence[bytes] = field(repr=False)
    jobid: str
    addresses: Sequence[str]
    epoch: int


Unknown = Callable[[str], Awaitable["bool | Redirect"]]
"""Asked of a launcher that is not expected: True once it is (``expect`` was called), or where it belongs."""


@dataclass
class _Lookup:
    """A launcher that is looked up, for ``peers`` connections; once it has ``begun`` it goes on without them."""

    peers: int = 0
    begun: bool = False
    task: asyncio.Task[bool | Redirect] = field(init=False)


class Lookups:
    """Asks ``unknown``, which may raise anything, at most LOOKUPS_AT_A_TIME times at once; ``limit`` may wait.

    Who asks has proved nothing yet. Made and used on one loop; whoever made it calls ``close``.
    """

    def __init__(self, unknown: Unknown, *, limit: int, log: logging.Logger) -> None:
        self._unknown, self._limit, self.log = unknown, limit, log
        self._lookups: dict[str, _Lookup] = {}
        self._places = asyncio.Semaphore(LOOKUPS_AT_A_TIME)

    def __len__(self) -> int:
        return len(self._lookups)

    def close(self) -> None:
        """Ask no more."""
        for lookup in self._lookups.values():
            lookup.task.cancel()

    async def ask(self, launcher_id: str, seconds: float) -> bool | Redirect:
        """Ask once for all connections that say this id. Raises HandshakeError for what is no id, and for too many."""
        if not _LAUNCHER_ID.fullmatch(launcher_id):
            return False
        lookup = self._lookups.get(launcher_id)
        if lookup is None:
            if len(self._lookups) >= self._limit:
                raise HandshakeError("too many launchers that are not expected have come")
            lookup = self._lookups[launcher_id] = _Lookup()
            lookup.task = asyncio.ensure_future(self._ask(launcher_id, lookup, seconds))
        lookup.peers += 1
        try:
            # Cancelled with its connection, at the handshake's deadline at the latest; others may wait for the same.
            return await asyncio.shield(lookup.task)
        finally:
            lookup.peers -= 1
            if not lookup.peers and not lookup.begun:
                # Peers that came and went leave no queue behind.
                del self._lookups[launcher_id]
                lookup.task.cancel()

    async def _ask(self, launcher_id: str, lookup: _Lookup, seconds: float) -> bool | Redirect:
        async with self._places:
            lookup.begun = True
            try:
                return await asyncio.wait_for(self._unknown(launcher_id), seconds)
            except Exception as error:  # noqa: BLE001 - whatever the store's trouble is, this launcher dials again
                self.log.warning("response socket: launcher %s could not be looked up: %r", launcher_id, error)
                return False
            finally:
                del self._lookups[launcher_id]


# -- What the response socket wants of whoever owns a launcher. --


class LinkHandler(Protocol):
    """Who owns a launcher on the server's side; all methods are called on the service's loop."""

    def link_up(self, link: Link, hello: dict[str, Any]) -> dict[str, Any]:
        """A launcher is authenticated; return the WELCOME's fields (without the token).

        The handler may set ``link.outbox`` to one of its own, which outlives the link.
        """

    def link_message(self, link: Link, name: str, payload: Any) -> None:
        """A message other than HEARTBEAT arrived."""

    def link_down(self, link: Link, reason: str) -> None:
        """The link is gone; it may be replaced by a new one."""

    def forgotten(self) -> None:
        """The launcher is let in no more."""

    def complained(self, reason: str) -> None:
        """The launcher could not even say HELLO."""

    def link_writable(self, link: Link) -> None:
        """The link took data: tunnel streams may be read on."""


# -- The response socket: where launchers dial in, prove who they are, and get a link. --


HANDSHAKE_SECONDS = 5.0
# How long a peer may take to read what it was told last.
GOODBYE_SECONDS = 5.0
UNAUTHENTICATED_PLACES = 128
# Where any port will do, one that IPv4 was given may be taken for IPv6, or by somebody else meanwhile.
ANY_PORT_ATTEMPTS = 5
# Sealed bytes that may wait in the transport; what comes after stays in the outbox, where order is chosen.
TRANSPORT_BACKLOG = 512 * 1024
# Bytes of messages that may wait for a launcher: a dozen STARTs with environments of 1 MiB. One that lets more wait
# does not read.
MESSAGES_LIMIT = 16 * 1024 * 1024
# Frames and messages that are taken at a time, before others have their turn: a frame may hold 200,000 messages.
TAKEN_AT_A_TIME = 128


@dataclass
class Expected:
    """A launcher that may dial in: its valid tokens, its job, its handler."""

    launcher_id: str
    tokens: list[bytes]
    jobid: asyncio.Future[str]
    handler: LinkHandler
    link: Link | None = field(default=None, repr=False)
    refused: str = ""  # why the last that came under its name was not let in, unless it was


class ResponseSocket:
    """The listeners and the launchers they expect. ``close()`` ends them and all links.

    ``unknown`` is awaited when a launcher dials that is not expected; it may raise anything, which ends
    that one connection.
    """

    def __init__(self, *, log: logging.Logger, unknown: Unknown | None = None) -> None:
        self.log = log
        # As many as a few times the places: those that come in the place of others wait for the same answers.
        limit = 4 * UNAUTHENTICATED_PLACES
        self._lookups = Lookups(unknown, limit=limit, log=log) if unknown is not None else None
        self._servers: list[asyncio.Server] = []
        self._expected: dict[str, Expected] = {}
        self._strangers: OrderedDict[Link, None] = OrderedDict()
        self._links: set[Link] = set()
        self.port = 0

    async def listen(self, hosts: list[str] | None, ports: range) -> None:
        """Listen on the first free port of ``ports`` (0: any); raise OSError when none is free."""
        error: OSError | None = None
        for port in [each for each in ports for _attempt in range(1 if each else ANY_PORT_ATTEMPTS)]:
            try:
                server = await self._listen_on(hosts, port)
            except OSError as failure:
                error = failure
                continue
            self._servers.append(server)
            self.port = server.sockets[0].getsockname()[1]
            return
        raise error or OSError("the port range is empty")

    async def also_listen(self, hosts: list[str] | None, port: int) -> None:
        """Listen on one more port, as of a server that is gone; raise OSError when it is not free."""
        self._servers.append(await self._listen_on(hosts, port))

    async def _listen_on(self, hosts: list[str] | None, port: int) -> asyncio.Server:
        server = await asyncio.get_running_loop().create_server(lambda: Link(self), hosts, port, backlog=1024)
        given = [sock.getsockname()[1] for sock in server.sockets]
        if len(set(given)) == 1:
            return server
        # IPv4 and IPv6 were given different free ports: take the first for both.
        server.close()
        return await self._listen_on(hosts, given[0])

    def connected(self, transport: asyncio.Transport) -> Link:
        """A launcher has come by another way than a listener of ours; return what takes what it says."""
        link = Link(self)
        link.connection_made(transport)
        return link

    def expect(self, launcher_id: str, tokens: Sequence[bytes], handler: LinkHandler) -> Expected:
        """Let this launcher in; its ``jobid`` is to be set as soon as Slurm has told it.

        ``tokens`` are its launch token and the successor, which the first WELCOME tells it; both were
        drawn when the launcher was made, so that every server that has its record can let it in.
        """
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        expected = Expected(launcher_id, list(tokens), future, handler)
        self._expected[launcher_id] = expected
        return expected

    def forget(self, launcher_id: str) -> None:
        """Let this launcher in no more, and close its link."""
        expected = self._expected.pop(launcher_id, None)
        if expected is not None:
            expected.jobid.cancel()
            if expected.link is not None:
                expected.link.close("forgotten")
            expected.handler.forgotten()

    async def close(self) -> None:
        """Stop listening and close every link; what was sent before still goes out."""
        for server in self._servers:
            server.close()
        if self._lookups is not None:
            self._lookups.close()
        for link in [*self._strangers, *self._links]:
            link.close("the server ends")
        for expected in self._expected.values():
            expected.handler.forgotten()
        self._expected.clear()

    # -- what links call --------------------------------------------------------------------

    def arrived(self, link: Link) -> None:
        # After a restart all launchers that are expected may dial at once.
        while len(self._strangers) >= UNAUTHENTICATED_PLACES + len(self._expected):
            oldest, _none = self._strangers.popitem(last=False)
            oldest.close("too many peers that have not said who they are")
        self._strangers[link] = None

    def gone(self, link: Link) -> None:
        self._strangers.pop(link, None)
        self._links.discard(link)

    async def authenticate(
        self, link: Link, opening: wire.Opening, key: envelope.ReceiverKey
    ) -> tuple[Expected | Redirect, dict[str, Any], envelope.Sealing, envelope.Sealing]:
        """Prove the opening; raise HandshakeError when it is not what its launcher would send."""
        known = self._expected.get(opening.launcher_id) or await self._look_up(opening.launcher_id)
        if opening.kind == wire.COMPLAINT:
            self._take_complaint(known, opening, key)
            raise HandshakeError(f"the launcher cannot say HELLO: {opening.reason}")
        if isinstance(known, Expected):
            known.refused = "what it said was no HELLO that its token opens"
        hello, seal, unseal = key.open_hello(opening, known.tokens)
        # The job may say HELLO before sbatch has told us its id; the handshake's deadline bounds the wait.
        jobid = known.jobid if isinstance(known, Redirect) else await asyncio.shield(known.jobid)
        if jobid and not wire.same(jobid.encode(), opening.jobid.encode()):
            raise HandshakeError(f"launcher {opening.launcher_id} is of job {jobid}, not {opening.jobid}")
        return known, hello, seal, unseal

    async def _look_up(self, launcher_id: str) -> Expected | Redirect:
        """Ask ``unknown``, once for all connections that say this id; raise HandshakeError when it does not know."""
        answer = self._lookups is not None and await self._lookups.ask(launcher_id, HANDSHAKE_SECONDS)
        if isinstance(answer, Redirect):
            return answer
        if launcher_id not in self._expected:
            raise HandshakeError("an opening from a launcher that is not expected")
        return self._expected[launcher_id]

    @staticmethod
    def _take_complaint(known: Expected | Redirect, opening: wire.Opening, key: envelope.ReceiverKey) -> None:
        arguments = (key.public, opening.launcher_id, opening.jobid, opening.reason)
        if not any(wire.same(wire.complaint_tag(token, *arguments), opening.proof) for token in known.tokens):
            raise HandshakeError("a complaint that none of the launcher's tokens proves")
        if isinstance(known, Expected):
            known.handler.complained(opening.reason)

    def admit(self, link: Link, expected: Expected) -> bytes:
        """Make ``link`` the launcher's one link; return the token that is its own from now on."""
        self._strangers.pop(link, None)
        self._links.add(link)
        older, expected.link = expected.link, link
        if older is not None:
            older.close("a newer link of the same launcher", at_once=True)
        # Both stay valid until the launcher's next message says that it took the successor.
        return expected.tokens[-1]


class Link(asyncio.Protocol):
    """One connection: a stranger until its HELLO is opened, then a launcher's link."""

    def __init__(self, socket: ResponseSocket) -> None:
        self._socket = socket
        self.log = socket.log
        self._reader = wire.FrameReader(wire.OPENING_LIMIT)
        self._task: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._key: envelope.ReceiverKey | None = None
        self._seal: envelope.Sealing | None = None
        self._unseal: envelope.Sealing | None = None
        self._writable = True
        self._flush_due = False
        # What has come and is not taken yet: frames, and the messages of the one before them.
        self._frames: deque[bytes] = deque()
        self._messages: deque[bytes] = deque()
        self._taking = False  # more of them in the loop's next round, and nothing is read until then
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
        """The address that it comes from; the relay's word for one that came by it. Empty where there is none."""
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
        self._key = envelope.ReceiverKey()
        transport.write(wire.preamble(self._key.public))

    def data_received(self, data: bytes) -> None:
        self.last_heard = self._loop.time()
        try:
            self._frames.extend(self._reader.feed(data))
        except wire.WireError as error:
            self.close(str(error))
        if not self._taking:
            self._take_some()

    def connection_lost(self, error: Exception | None) -> None:
        self._deadline.cancel()
        self._lost = f"lost: {error}" if error else "the launcher closed it"
        if not self._taking:
            self.close(self._lost)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self.flush()

    # -- handshake --------------------------------------------------------------------------

    def _take_frame(self, frame: bytes) -> None:
        if self._unseal is not None:
            self._messages.extend(wire.unpack(self._unseal(frame)))
        elif self._task is None:
            opening = wire.Opening.decode(frame)
            self._task = self._loop.create_task(self._authenticate(opening))
        else:
            # A launcher waits for WELCOME before it says more.
            raise wire.WireError("a second frame before the first was answered")

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
        self._reader.limit = wire.FRAME_LIMIT + 1024
        if isinstance(known, Redirect):
            self.send("REDIRECT", addresses=list(known.addresses), epoch=known.epoch)
            self.close(f"launcher {opening.launcher_id} belongs to another server, and was told so")
            return
        token = self._socket.admit(self, known)
        self.expected = known
        try:
            welcome = known.handler.link_up(self, hello)
        except Exception:
            # Nothing watches over a link that has not begun.
            self.log.exception("launcher %s: its HELLO could not be taken", known.launcher_id)
            self.close("its HELLO could not be taken")
            return
        self.send("WELCOME", token=token.hex(), **welcome)

    # -- messages ---------------------------------------------------------------------------

    def _take_some(self) -> None:
        """Take what has come, in its order; of much the rest in the loop's next rounds, with nothing read meanwhile."""
        assert self._transport is not None
        was_taking, self._taking = self._taking, False
        try:
            for _each in range(TAKEN_AT_A_TIME):
                if self.closed:
                    return
                if self._messages:
                    self._take_message(*wire.decode(self._messages.popleft(), wire.UP))
                elif self._frames:
                    self._take_frame(self._frames.popleft())
                else:
                    break
        except wire.WireError as error:
            self.close(str(error))
            return
        if self._messages or self._frames:
            self._taking = True
            self._transport.pause_reading()
            self._loop.call_soon(self._take_some)
        elif self._lost:
            self.close(self._lost)
        elif was_taking:
            self._transport.resume_reading()

    def _take_message(self, name: str, payload: Any) -> None:
        assert self.expected is not None
        if name == "REPORT":
            if self._reported:
                raise wire.WireError("a second REPORT on one link")
            self._reported = True
            del self.expected.tokens[:-1]
        if name == "HEARTBEAT":
            return
        try:
            self.expected.handler.link_message(self, name, payload)
        except Exception:
            # One bad message must not end the link that carries the others.
            self.log.exception("launcher %s: %s could not be handled", self.expected.launcher_id, name)

    def send(self, name: str, **fields: Any) -> None:
        """Queue a message."""
        self.outbox.message(wire.encode(name, **fields))
        if self.outbox.messages_size > MESSAGES_LIMIT:
            # Not within what its handler is doing with it.
            self._loop.call_soon(lambda: self.close("it does not read what it is told", at_once=True))
        self.flush()

    def flush(self) -> None:
        """Write soon: together with what else is queued in this round of the loop."""
        if not self._flush_due and not self.closed:
            self._flush_due = True
            self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        """Seal and write while the transport takes it."""
        self._flush_due = False
        if self._seal is None or self.closed or self._transport is None:
            return
        moved = False
        while self._writable:
            body = self.outbox.next_frame()
            if body is None:
                break
            moved = True
            self._transport.write(wire.frame(self._seal(body)))
        if moved and self.expected is not None:
            self.expected.handler.link_writable(self)

    def close(self, reason: str, *, at_once: bool = False) -> None:
        """End this connection, once; what was written before still goes out, to a peer that takes it soon.

        With ``at_once`` it does not: the peer is gone, or does not read.
        """
        if self.closed:
            return
        if not at_once:
            self._flush_now()
        self.closed = True
        # The handler's own serves the next link; what is still said to this one is lost.
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
            self.log.info("response socket: a connection was closed: %s", reason)
            return
        if self.expected.link is self:
            self.expected.link = None
        self.expected.handler.link_down(self, reason)
