"""The server's end of the relay: each relayed connection becomes a launcher's link.

One SSH channel carries all connections, with credit per connection and direction. So a slow connection does not delay
the others, and the amount of waiting data is limited. The data is encrypted between launcher and server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from gateway_slurm._util import Backoff, TaskSet
from gateway_slurm.errors import GatewaySlurmError, SshError
from gateway_slurm.slurm.access import AcceptLauncher, LauncherLink
from gateway_slurm.slurm.ssh.connection import SshConnection
from gateway_slurm.slurm.ssh.login_node import protocol
from gateway_slurm.slurm.ssh.remote import Frame, RemoteProgram
from gateway_slurm.slurm.url import host_and_port

LISTEN_TIMEOUT: Final = 15.0  # seconds
MAX_LISTEN_ATTEMPTS: Final = 20
"""Attempts to listen on a former port that another process has, over about a minute and a half."""
MAX_PORTS: Final = 8
"""Ports at a time: the relay's current one, and the newest of its former ones."""
CLOSE_TIMEOUT: Final = 2.0  # seconds
_RETRY_DELAY, _MAX_RETRY_DELAY, _JITTER = 0.2, 5.0, 0.3  # seconds, seconds, fraction
_MAX_PAYLOAD: Final = 256 << 10  # bytes of one frame
_HIGH_WATER: Final = 512 << 10  # bytes that wait for credit before a link must pause; the same as for its TCP sockets


class SshRelay:
    """Keeps a relay running on the login node, on the same port if possible. Its owner calls ``close``.

    The relay listens on the first free port of ``ports`` (0: any). Launchers dial ``address`` first, if given;
    ``changed`` is called each time the relay listens, since its endpoints may have changed. All methods are called on
    one loop.
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
        """Whether a launcher has proved its identity over the relay."""
        self._hosts: list[str] = []
        self._program: RemoteProgram | None = None
        self._process: dict[str, Any] | None = None  # the last program's own information
        self._connections: dict[int, RelayedConnection] = {}
        # Former ports, which older launchers dial, with the dead relay that may still have each; empty if none has.
        self._former_ports: dict[int, dict[str, Any]] = {}
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._numbers = itertools.count(1)
        self._listening = asyncio.Event()
        self._attempted = asyncio.Event()  # the relay listens, or an attempt has failed
        self._down: asyncio.Future[None] | None = None
        self._last_error: GatewaySlurmError | None = None
        self._tasks = TaskSet()
        self._tasks.create_task(self._keep_running())

    @property
    def endpoints(self) -> list[str]:
        """``host:port`` texts for launchers; empty until the relay has listened for the first time."""
        hosts = [self._address, *self._hosts] if self._address else self._hosts
        return [host_and_port(host, self.port) for host in dict.fromkeys(hosts)]

    async def wait_ready(self) -> None:
        """Return once the relay listens. Raises the error of the last attempt."""
        while not self._listening.is_set():
            self._attempted.clear()
            await self._attempted.wait()
            if not self._listening.is_set() and self._last_error is not None:
                raise self._last_error

    @property
    def records(self) -> list[dict[str, Any]]:
        """The relay's ports and the process that has each, which a later server passes to ``adopt``."""
        current = {} if self._process is None else {name: self._process[name] for name in ("boot", "pid", "ticks")}
        found = [{"port": self.port, **current}] if current else []
        return found + [{"port": port, **(process or current)} for port, process in self._former_ports.items()]

    def adopt(self, relays: Iterable[dict[str, Any]]) -> None:
        """Listen also on the ports of dead servers' relays, which the launchers of those servers dial."""
        ports = {int(record["port"]): record for record in relays if int(record["port"]) != self.port}
        self._former_ports = dict(list({**ports, **self._former_ports}.items())[: MAX_PORTS - 1])
        if self._program is not None and self._listening.is_set():
            self._listen_on_former_ports(self._program, ports.keys() & self._former_ports.keys())

    async def close(self) -> None:
        """End the relay; data that was written to the links is sent first."""
        await self._tasks.close()
        program, down = self._program, self._down
        if program is not None and down is not None and not program.ended:
            program.close()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(down), CLOSE_TIMEOUT)

    # -- Keeping the relay running --

    async def _keep_running(self) -> None:
        backoff, logged = Backoff(_RETRY_DELAY, _MAX_RETRY_DELAY, jitter=_JITTER), ""
        while True:
            try:
                down = await self._start()
                backoff.reset()
                logged = ""
                await asyncio.shield(down)
            except GatewaySlurmError as error:
                # Without the time to the next attempt, which differs each time.
                message = str(self._connection.last_error or error)
                if message != logged:
                    self.log.warning("relay: %s", message)
                logged, self._last_error = message, error
                self._attempted.set()
            self._listening.clear()
            await backoff.sleep()

    async def _start(self) -> asyncio.Future[None]:
        """Start the relay; return a future that is done when the relay is down again. Raises SshError."""
        loop = asyncio.get_running_loop()
        down = self._down = loop.create_future()

        def ended(error: SshError) -> None:
            self._ended(error)
            if not down.done():
                down.set_result(None)

        program = await self._connection.start_program("relay", on_frames=self._received, on_end=ended)
        self._program = program
        ports = list(self._ports)
        predecessors = [*([self._process] if self._process is not None else []), *self._former_ports.values()]
        kind, _number, payload = await self._listen(program, [self.port] if self.port else ports, predecessors)
        if kind == protocol.FAILED and self.port and ports != [self.port]:
            # Another process has the port and may free it. New launchers get another port meanwhile.
            self._former_ports = dict(list({self.port: {}, **self._former_ports}.items())[: MAX_PORTS - 1])
            kind, _number, payload = await self._listen(program, ports, [])
        if kind == protocol.FAILED:
            program.close()
            numbers = "-".join(map(str, dict.fromkeys((ports[0], ports[-1]))))
            raise SshError(
                f"the relay cannot listen on the login node {program.info['host']}, port {numbers}: "
                f"{payload.decode(errors='replace')}; see SlurmService.relay_port"
            )
        try:
            self._now_listening(program, protocol.unpack(payload)[0])
        except (ValueError, KeyError, TypeError) as error:
            program.close()
            raise SshError(f"the relay on the login node did not report its address: {error!r}") from error
        return down

    async def _listen(self, program: RemoteProgram, ports: list[int], predecessors: list[dict[str, Any]]) -> Frame:
        """Make the relay listen on the first free one of ``ports``, after it has ended ``predecessors``.

        Returns the relay's answer. Raises SshError.
        """
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        on_this_host = [process for process in predecessors if process.get("boot") == program.info["boot"]]
        program.send(protocol.LISTEN, number, protocol.pack({"ports": ports, "end": on_this_host}))
        try:
            return await asyncio.wait_for(answer, LISTEN_TIMEOUT)
        except asyncio.TimeoutError:
            program.close()
            raise SshError("the relay on the login node did not listen in time") from None
        finally:
            self._answers.pop(number, None)

    def _listen_on_former_ports(self, program: RemoteProgram, ports: Iterable[int]) -> None:
        for port in ports:
            self._tasks.create_task(self._listen_on_former_port(program, port))

    async def _listen_on_former_port(self, program: RemoteProgram, port: int) -> None:
        """Try for a while to listen on a former port, for the launchers that dial it."""
        backoff, reason = Backoff(_RETRY_DELAY, _MAX_RETRY_DELAY, jitter=_JITTER), ""
        for _attempt in range(MAX_LISTEN_ATTEMPTS):
            process = self._former_ports.get(port)
            if process is None or program.ended:
                return
            if process and process.get("boot") != program.info["boot"]:
                reason = "it was on another login node, or the login node was rebooted"
                break
            try:
                kind, _number, payload = await self._listen(program, [port], [process])
            except SshError:  # the next program tries again
                return
            if kind == protocol.LISTENING:
                self._former_ports[port] = {}  # this relay has the port now
                self._changed()
                self.log.info("relay: listening on former port %d of the login node, too", port)
                return
            reason = payload.decode(errors="replace")
            await backoff.sleep()
        self._former_ports.pop(port, None)
        self.log.warning("relay: launchers that know only port %d of the login node cannot reconnect: %s", port, reason)

    def _now_listening(self, program: RemoteProgram, fields: dict[str, Any]) -> None:
        if self._process is not None and self._process["boot"] != program.info["boot"]:
            self.log.warning(
                "relay: it was on another machine before, and launchers that dialled it there cannot reconnect. Name "
                "one login node in SlurmService.cluster, not several under one name"
            )
        self._process = program.info
        self.port = int(fields["port"])
        self._hosts = [*map(str, fields["addresses"]), str(program.info["host"])]
        self._last_error = None
        self._former_ports.pop(self.port, None)
        self._listening.set()
        self._attempted.set()
        self._listen_on_former_ports(program, list(self._former_ports))
        self._changed()
        self.log.info("relay: listening on the login node, announced as %s", ", ".join(self.endpoints))

    def _ended(self, error: SshError) -> None:
        self._listening.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(error)
        for connection in list(self._connections.values()):
            connection.lost(error)
        self._connections.clear()

    # -- Frames --

    def _received(self, frames: list[Frame]) -> None:
        for received in frames:
            kind, number, payload = received
            if kind in (protocol.LISTENING, protocol.FAILED):
                answer = self._answers.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(received)
            elif kind == protocol.OPEN and self._program is not None:
                peer = payload.decode(errors="replace")
                connection = self._connections[number] = RelayedConnection(self, self._program, number, peer)
                connection.link = self._accept(connection)
            elif number in self._connections:
                self._connections[number].received(kind, payload)

    def forget(self, number: int) -> None:
        self._connections.pop(number, None)


class RelayedConnection(asyncio.Transport):
    """One launcher's connection through the relay; its link closes it."""

    def __init__(self, relay: SshRelay, program: RemoteProgram, number: int, peer: str) -> None:
        super().__init__({"peername": (peer, 0)})
        self._relay, self._program, self._number = relay, program, number
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._credit = protocol.WINDOW
        self._owed = 0
        self._high = _HIGH_WATER
        self._paused = self._closing = self._closed = False
        self._reading = True
        self.link: LauncherLink | None = None
        """The protocol that serves the connection."""

    # -- Frames from the relay --

    def received(self, kind: int, payload: bytes) -> None:
        if kind == protocol.DATA:
            self._data(payload)
        elif kind == protocol.CREDIT:
            self._credit += protocol.count_of(payload)
            self._pump()
        elif kind == protocol.CLOSE:
            self._relay.forget(self._number)
            self.lost(None)

    def _data(self, payload: bytes) -> None:
        if self._closed or self.link is None:
            return
        if not self._closing:
            self.link.data_received(payload)
            if self.link.is_authenticated:
                self._relay.was_used = True
        self._owed += len(payload)
        self._give_credit()

    def _give_credit(self) -> None:
        if self._owed >= protocol.WINDOW // 4 and (self._reading or self._closing) and not self._closed:
            self._program.send(protocol.CREDIT, self._number, protocol.LENGTH.pack(self._owed))
            self._owed = 0

    def lost(self, error: Exception | None) -> None:
        """End the connection and tell the link."""
        if self._closed:
            return
        self._closed = self._closing = True
        self._waiting.clear()
        if self.link is not None:
            self._loop.call_soon(self.link.connection_lost, error)

    # -- asyncio.Transport --

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = _HIGH_WATER if high is None else high

    def get_write_buffer_size(self) -> int:
        return self._size

    def pause_reading(self) -> None:
        """Give no more credit; data that is under way may still arrive."""
        self._reading = False

    def resume_reading(self) -> None:
        """Give credit again, including the credit that is due."""
        self._reading = True
        self._give_credit()

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Send as much as the credit allows and queue the rest; the link pauses if the queue is long."""
        if self._closing:
            return
        for start in range(0, len(data), _MAX_PAYLOAD):
            payload = bytes(data[start : start + _MAX_PAYLOAD])
            self._waiting.append(payload)
            self._size += len(payload)
        self._pump()

    def close(self) -> None:
        """Close after the queued data was sent."""
        if not self._closing:
            self._closing = True
            self._pump()

    def abort(self) -> None:
        self._closing = True
        self._waiting.clear()
        self._pump()

    def _pump(self) -> None:
        while self._waiting and self._credit >= len(self._waiting[0]) and not self._closed:
            payload = self._waiting.popleft()
            self._size -= len(payload)
            self._credit -= len(payload)
            self._program.send(protocol.DATA, self._number, payload)
        if self._closing and not self._waiting and not self._closed:
            self._program.send(protocol.CLOSE, self._number)
            self._relay.forget(self._number)
            self.lost(None)
        elif self.link is not None and not self._closing and self._paused != (self._size > self._high):
            self._paused = not self._paused
            if self._paused:
                self.link.pause_writing()
            else:
                self.link.resume_writing()
