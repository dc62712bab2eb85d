"""The relay's end on this side: connections that it carries become links of the response socket.

One channel carries them all, with credit for each connection and direction, so that one that is slow holds up no
other, and what waits is bounded. What is carried is sealed between launcher and server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from gateway_slurm.errors import ConfigError, GatewaySlurmError, SshError
from gateway_slurm.slurm.access import AcceptLauncher, LauncherLink
from gateway_slurm.slurm.ssh.connection import SshConnection
from gateway_slurm.slurm.ssh.login_node.common import (
    CLOSE,
    CREDIT,
    DATA,
    FAILED,
    LENGTH,
    LISTEN,
    LISTENING,
    OPEN,
    WINDOW,
    count_of,
    pack,
    unpack,
)
from gateway_slurm.slurm.ssh.remote import Frame, RemoteProgram

LISTEN_SECONDS: Final = 15.0
REFUSALS: Final = 20
"""How often a port that somebody else has is tried, over about a minute and a half."""
MAX_PORTS: Final = 8
"""Ports at once: the relay's own, and the newest of those that launchers know from before."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds
_PIECE: Final = 256 << 10  # bytes of a frame's payload
_HIGH_WATER: Final = 512 << 10  # bytes that wait for credit before a link is told to wait; as for its TCP sockets
GOODBYE_SECONDS: Final = 2.0


class SshRelay:
    """Keeps a relay on the login node, on the same port if that can be. Its owner calls ``close``.

    ``ports`` is the range of which the first free one is taken (0: any). ``address`` is what nodes are told to dial
    first, where the login node does not know it; ``changed`` is called when it listens, maybe elsewhere than before.
    All methods are called on one loop.
    """

    def __init__(
        self,
        connection: SshConnection,
        accept: AcceptLauncher,
        *,
        ports: range,
        address: str,
        changed: Callable[[], None],
        log: logging.Logger,
    ) -> None:
        self._connection, self._accept, self._ports, self._address = connection, accept, ports, address
        self._changed, self.log = changed, log
        self.port = 0
        self.was_used = False
        """Whether a launcher has come by it."""
        self._hosts: list[str] = []
        self._program: RemoteProgram | None = None
        self._previous: dict[str, Any] | None = None
        self._relayed: dict[int, RelayedConnection] = {}
        # Ports that launchers know from before, with the process that may still have one; empty: none of ours.
        self._earlier: dict[int, dict[str, Any]] = {}
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._numbers = itertools.count(1)
        self._up = asyncio.Event()
        self._tried = asyncio.Event()
        self._down: asyncio.Future[None] | None = None
        self._trouble: GatewaySlurmError | None = None
        self._tasks = {asyncio.ensure_future(self._keep())}

    @property
    def endpoints(self) -> list[str]:
        """``host:port`` texts for launchers; none before it listened for the first time."""
        hosts = [self._address, *self._hosts] if self._address else self._hosts
        return [f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}" for host in dict.fromkeys(hosts)]

    async def wait_ready(self) -> None:
        """Return once it listens; raise what was in the way of that at the last attempt."""
        while not self._up.is_set():
            self._tried.clear()
            up, tried = (asyncio.ensure_future(event.wait()) for event in (self._up, self._tried))
            await asyncio.wait([up, tried], return_when=asyncio.FIRST_COMPLETED)
            up.cancel()
            tried.cancel()
            if not self._up.is_set() and self._trouble is not None:
                raise self._trouble

    @property
    def records(self) -> list[dict[str, Any]]:
        """What a later server needs for ``inherit``: the ports, and who has each of them."""
        own = {} if self._previous is None else {name: self._previous[name] for name in ("boot", "pid", "ticks")}
        found = [{"port": self.port, **own}] if own else []
        return found + [{"port": port, **(facts or own)} for port, facts in self._earlier.items()]

    def adopt(self, relays: Iterable[dict[str, Any]]) -> None:
        """Listen on these ports of dead servers' relays, too: their launchers dial them."""
        known = {int(facts["port"]): facts for facts in relays if int(facts["port"]) != self.port}
        self._earlier = dict(list({**known, **self._earlier}.items())[: MAX_PORTS - 1])
        if self._program is not None and self._up.is_set():
            self._listen_on_earlier(self._program, known.keys() & self._earlier.keys())

    async def close(self) -> None:
        """End it; what was written to the links goes out first."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        program, down = self._program, self._down
        if program is not None and down is not None and not program.ended:
            program.close()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(down), GOODBYE_SECONDS)

    # -- keeping it -----------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        pause, said = _FIRST_PAUSE, ""
        while True:
            try:
                down = await self._start()
                pause, said = _FIRST_PAUSE, ""
                await asyncio.shield(down)
            except GatewaySlurmError as error:
                words = str(
                    self._connection.last_error or error
                )  # the same, though the time to the next try is another
                if words != said:
                    self.log.warning("relay: %s", words)
                said, self._trouble = words, error
                self._tried.set()
            self._up.clear()
            await asyncio.sleep(pause * random.uniform(0.7, 1.3))  # noqa: S311 - jitter
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _start(self) -> asyncio.Future[None]:
        """Have it listen; return what is done when it is down again. Raises SshError."""
        loop = asyncio.get_running_loop()
        down = self._down = loop.create_future()

        def ended(error: SshError) -> None:
            self._ended(error)
            if not down.done():
                down.set_result(None)

        program = await self._connection.start_program("relay", on_frames=self._took, on_end=ended)
        self._program = program
        ports = list(self._ports)
        before = [*([self._previous] if self._previous is not None else []), *self._earlier.values()]
        kind, _number, payload = await self._ask(program, [self.port] if self.port else ports, before)
        if kind == FAILED and self.port and ports != [self.port]:
            # Somebody else has it now, and may give it back; what starts meanwhile is told another one.
            self._earlier = dict(list({self.port: {}, **self._earlier}.items())[: MAX_PORTS - 1])
            kind, _number, payload = await self._ask(program, ports, [])
        if kind == FAILED:
            program.close()
            raise SshError(
                f"the relay cannot listen on the login node {program.info['host']}, port {_range(ports)}: "
                f"{payload.decode(errors='replace')}; see SlurmService.relay_port"
            )
        try:
            self._listens(program, unpack(payload)[0])
        except (ValueError, KeyError, TypeError) as error:
            program.close()
            raise SshError(f"the relay on the login node does not say where it listens: {error!r}") from error
        return down

    async def _ask(self, program: RemoteProgram, ports: list[int], before: list[dict[str, Any]]) -> Frame:
        """Have it listen on the first free one of ``ports``, once these processes have ended. Raises SshError."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        here = [facts for facts in before if facts.get("boot") == program.info["boot"]]
        program.send(LISTEN, number, pack({"ports": ports, "end": here}))
        try:
            return await asyncio.wait_for(answer, LISTEN_SECONDS)
        except asyncio.TimeoutError:
            program.close()
            raise SshError("the relay on the login node did not listen in time") from None
        finally:
            self._answers.pop(number, None)

    def _listen_on_earlier(self, program: RemoteProgram, ports: Iterable[int]) -> None:
        for port in ports:
            task = asyncio.ensure_future(self._listen_too(program, port))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _listen_too(self, program: RemoteProgram, port: int) -> None:
        """Try for a while to have a port of before, for the launchers that know it."""
        pause, words = _FIRST_PAUSE, ""
        for _attempt in range(REFUSALS):
            facts = self._earlier.get(port)
            if facts is None or program.ended:
                return
            if facts and facts.get("boot") != program.info["boot"]:
                words = "it was on another login node, or that one was started anew since"
                break
            try:
                kind, _number, payload = await self._ask(program, [port], [facts])
            except SshError:  # with the next program it is tried again
                return
            if kind == LISTENING:
                self._earlier[port] = {}  # it is ours
                self._changed()
                self.log.info("relay: listening on port %d of the login node, too, as launchers know it", port)
                return
            words = payload.decode(errors="replace")
            await asyncio.sleep(pause * random.uniform(0.7, 1.3))  # noqa: S311 - jitter
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._earlier.pop(port, None)
        self.log.warning("relay: launchers that know only port %d of the login node cannot come back: %s", port, words)

    def _listens(self, program: RemoteProgram, fields: dict[str, Any]) -> None:
        if self._previous is not None and self._previous["boot"] != program.info["boot"]:
            self.log.warning(
                "relay: it was on another machine before: launchers that dialled it there cannot come back. Name one "
                "login node in SlurmService.cluster, not several under one name"
            )
        self._previous = program.info
        self.port = int(fields["port"])
        self._hosts = [*map(str, fields["addresses"]), str(program.info["host"])]
        self._trouble = None
        self._earlier.pop(self.port, None)
        self._up.set()
        self._listen_on_earlier(program, list(self._earlier))
        self._changed()
        self.log.info("relay: listening on the login node, announced as %s", ", ".join(self.endpoints))

    def _ended(self, error: SshError) -> None:
        self._up.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        for relayed in list(self._relayed.values()):
            relayed.lost(error)
        self._relayed.clear()

    # -- frames ----------------------------------------------------------------------------------------------

    def _took(self, frames: list[Frame]) -> None:
        for each in frames:
            kind, number, payload = each
            if kind in (LISTENING, FAILED):
                answer = self._answers.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(each)
            elif kind == OPEN and self._program is not None:
                self._relayed[number] = RelayedConnection(self, self._program, number, payload.decode(errors="replace"))
                self._relayed[number].begin(self._accept)
            elif number in self._relayed:
                self._relayed[number].took(kind, payload)

    def forget(self, number: int) -> None:
        """The connection of this number is over."""
        self._relayed.pop(number, None)


class RelayedConnection(asyncio.Transport):
    """One connection of a launcher's that came by the relay; its link closes it."""

    def __init__(self, relay: SshRelay, program: RemoteProgram, number: int, peer: str) -> None:
        super().__init__({"peername": (peer, 0)})
        self._relay, self._program, self._number = relay, program, number
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._credit = WINDOW
        self._owed = 0
        self._high = _HIGH_WATER
        self._paused = self._closing = self._over = False
        self._reads = True
        self._link: LauncherLink | None = None

    def begin(self, accept: AcceptLauncher) -> None:
        """Serve it as a launcher's link."""
        self._link = accept(self)

    # -- from the relay ----------------------------------------------------------------------------------------

    def took(self, kind: int, payload: bytes) -> None:
        """Take one frame of this connection."""
        if kind == DATA:
            self._data(payload)
        elif kind == CREDIT:
            self._credit += count_of(payload)
            self._pump()
        elif kind == CLOSE:
            self._relay.forget(self._number)
            self.lost(None)

    def _data(self, payload: bytes) -> None:
        if self._over or self._link is None:
            return
        if not self._closing:
            self._link.data_received(payload)
            if self._link.is_authenticated:
                self._relay.was_used = True
        self._owed += len(payload)
        self._give_credit()

    def _give_credit(self) -> None:
        if self._owed >= WINDOW // 4 and (self._reads or self._closing) and not self._over:
            self._program.send(CREDIT, self._number, LENGTH.pack(self._owed))
            self._owed = 0

    def lost(self, error: Exception | None) -> None:
        """The connection is gone."""
        if self._over:
            return
        self._over = self._closing = True
        self._waiting.clear()
        if self._link is not None:
            self._loop.call_soon(self._link.connection_lost, error)

    # -- asyncio.Transport ---------------------------------------------------------------------------------------

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = _HIGH_WATER if high is None else high

    def get_write_buffer_size(self) -> int:
        return self._size

    def pause_reading(self) -> None:
        """Give no credit: what is under way may still come."""
        self._reads = False

    def resume_reading(self) -> None:
        """Give credit again, what is owed first."""
        self._reads = True
        self._give_credit()

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Send as far as there is credit; what has none waits, and its link is told when that is much."""
        if self._closing:
            return
        for at in range(0, len(data), _PIECE):
            piece = bytes(data[at : at + _PIECE])
            self._waiting.append(piece)
            self._size += len(piece)
        self._pump()

    def close(self) -> None:
        """Close, once what was written has gone out."""
        if not self._closing:
            self._closing = True
            self._pump()

    def abort(self) -> None:
        """Close now."""
        self._closing = True
        self._waiting.clear()
        self._pump()

    def _pump(self) -> None:
        while self._waiting and self._credit >= len(self._waiting[0]) and not self._over:
            piece = self._waiting.popleft()
            self._size -= len(piece)
            self._credit -= len(piece)
            self._program.send(DATA, self._number, piece)
        if self._closing and not self._waiting and not self._over:
            self._program.send(CLOSE, self._number)
            self._relay.forget(self._number)
            self.lost(None)
        elif self._link is not None and not self._closing and self._paused != (self._size > self._high):
            self._paused = not self._paused
            if self._paused:
                self._link.pause_writing()
            else:
                self._link.resume_writing()


def _range(ports: list[int]) -> str:
    return str(ports[0]) if len(ports) == 1 else f"{ports[0]}-{ports[-1]}"


def check_relay_address(address: str) -> str:
    """A host name or IP address, without a port. Raises ConfigError."""
    if address and (address.startswith("[") or any(each in address for each in "/@ ")):
        raise ConfigError(f"SlurmService.relay_address must be a host name or an IP address, not {address!r}")
    return address
