"""The one connection to a login node, which all requests share and which is made again after it breaks.

All methods are called on one loop; blocking work runs in worker threads.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import paramiko

from gateway_slurm._util import Backoff, run_in_thread
from gateway_slurm.errors import GatewaySlurmError, HostKeyRefused, LoginRefused, SshError, SshTurnedAway
from gateway_slurm.slurm.ssh.config import Destination
from gateway_slurm.slurm.ssh.login import Credentials, dial, log_in
from gateway_slurm.slurm.ssh.remote import Frame, RemoteProgram

# Delays between attempts: the first and the longest, in seconds.
RETRY_DELAY: Final = (0.25, 5.0)
# Many hosts count refused logins and lock accounts.
REFUSED_RETRY_DELAY: Final = (5.0, 60.0)
# sshd turned the connection away. The longest delay exceeds MAX_WAIT, so that callers of a busy host fail at once.
BUSY_RETRY_DELAY: Final = (4.0, 10.0)
# Within one attempt, a connection that sshd turned away is repeated after these delays.
TURNED_AWAY_DELAYS: Final = (0.5, 1.0, 2.0)
MAX_WAIT: Final = 6.0
"""Seconds for which a caller waits for the next attempt; with a longer delay ahead the caller gets the last error."""
_JITTER: Final = 0.3


@dataclass
class TransportChain:
    """The transports of one connection: those to the jump hosts, then the login node's."""

    transports: list[paramiko.Transport] = field(default_factory=list)
    peer: str = ""

    @property
    def transport(self) -> paramiko.Transport:
        """The login node's transport."""
        return self.transports[-1]

    def close(self) -> None:
        """Close all transports; blocks for a moment."""
        for transport in reversed(self.transports):
            transport.close()


class SshConnection:
    """The connection to one login node, as one user. Its owner calls ``close``.

    ``timeout`` (seconds) limits each step of a login; ``heartbeat`` (seconds) is the time between signs of life.
    ``counts`` holds the numbers of attempts, of connections, of channels and of requests.
    """

    def __init__(
        self,
        destination: Destination,
        credentials: Credentials,
        *,
        python: str,
        timeout: float,
        heartbeat: float,
        log: logging.Logger,
    ) -> None:
        self.destination, self.log = destination, log
        self.counts: Counter[str] = Counter()
        self.last_error: GatewaySlurmError | None = None
        """The error of the last attempt; None if it succeeded."""
        self._credentials, self._python = credentials, python
        self._timeout, self._heartbeat = timeout, heartbeat
        self._chain: TransportChain | None = None
        self._connecting: asyncio.Task[TransportChain] | None = None
        self._peer = ""
        self._retry = Backoff(*RETRY_DELAY, jitter=_JITTER)
        self._refused_retry = Backoff(*REFUSED_RETRY_DELAY, jitter=_JITTER)
        self._busy_retry = Backoff(*BUSY_RETRY_DELAY, jitter=_JITTER)
        self._not_before = 0.0
        self._closed = False

    async def start_program(
        self, mode: str, *, on_frames: Callable[[list[Frame]], None], on_end: Callable[[SshError], None]
    ) -> RemoteProgram:
        """Start a program on the login node, over the existing connection or a new one. Raises SshError."""
        chain = await self._connected()
        program = RemoteProgram(
            chain.transport, heartbeat=self._heartbeat, on_frames=on_frames, on_end=on_end, log=self.log
        )
        self.counts["channel"] += 1
        await run_in_thread(lambda: program.open(mode, python=self._python, timeout=self._timeout))
        program.start()
        return program

    async def close(self) -> None:
        """Close the connection, which ends the programs on the login node."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        chain, self._chain = self._chain, None
        if chain is not None:
            await run_in_thread(chain.close)

    # -- Connecting --

    async def _connected(self) -> TransportChain:
        if self._closed:
            raise SshError("the service has ended")
        if self._chain is not None and self._chain.transport.is_active():
            return self._chain
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.ensure_future(self._connect())
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> TransportChain:
        loop = asyncio.get_running_loop()
        delay = self._not_before - loop.time()
        if delay > MAX_WAIT and self.last_error is not None:
            raise SshError(f"{self.last_error} (the next attempt is in {delay:.0f} s)")
        if delay > 0:
            await asyncio.sleep(delay)
        old, self._chain = self._chain, None
        if old is not None:
            await run_in_thread(old.close)
        # Only the first login prompts the user: later logins happen while the user does something else.
        may_prompt = self.counts["connected"] == 0
        try:
            chain = await self._attempt(may_prompt=may_prompt)
        except GatewaySlurmError as error:
            self._failed(error)
            raise
        if self._closed:
            await run_in_thread(chain.close)
            raise SshError("the service has ended")
        self.counts["connected"] += 1
        for backoff in (self._retry, self._refused_retry, self._busy_retry):
            backoff.reset()
        self._not_before, self.last_error = 0.0, None
        self._chain, self._peer = chain, chain.peer
        self.log.info("SSH: logged in to %s", self.destination)
        return chain

    async def _attempt(self, *, may_prompt: bool) -> TransportChain:
        """Log in. Try again if sshd turns the connection away, which it does at random under load (MaxStartups)."""
        began = time.monotonic()
        delays = () if self.last_error is not None else TURNED_AWAY_DELAYS
        for delay in (*delays, None):
            self.counts["connect"] += 1
            try:
                return await run_in_thread(lambda: self._log_in(may_prompt=may_prompt))
            except SshTurnedAway:
                if delay is None or self._closed or time.monotonic() - began > MAX_WAIT:
                    raise
            await asyncio.sleep(delay * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311 - jitter
        raise AssertionError("the last attempt returns or raises")

    def _failed(self, error: GatewaySlurmError) -> None:
        if isinstance(error, (HostKeyRefused, LoginRefused)):
            backoff = self._refused_retry
        else:
            backoff = self._busy_retry if isinstance(error, SshTurnedAway) else self._retry
        self._not_before = asyncio.get_running_loop().time() + backoff.next()
        if str(error) != str(self.last_error):
            self.log.warning("SSH: %s", error)
        self.last_error = error

    def _log_in(self, *, may_prompt: bool) -> TransportChain:
        """Connect and log in, through the jump hosts. Blocks. Raises SshError or ConfigError."""
        answers = self._credentials.answers(may_prompt=may_prompt)
        chain = TransportChain()
        try:
            hops = [*self.destination.jumps, self.destination]
            # If one name means several hosts, prefer the host that has this server's relay and processes.
            sock: Any = dial(hops[0].host, hops[0].port, self._timeout, preferred=self._peer)
            chain.peer = sock.getpeername()[0]
            for number, hop in enumerate(hops):
                chain.transports.append(log_in(sock, hop, answers, timeout=self._timeout))
                if number + 1 < len(hops):
                    next_hop = hops[number + 1]
                    sock = self._open_next(chain.transport, hop, next_hop)
        except GatewaySlurmError:
            chain.close()
            raise
        except (paramiko.SSHException, OSError, EOFError) as error:
            chain.close()
            message = str(error) or type(error).__name__
            raise SshError(f"the login to {self.destination} failed: {message}") from error
        chain.transport.set_keepalive(int(self._heartbeat) or 1)
        if self._closed:  # ``close`` came meanwhile and does not wait for this thread
            chain.close()
        return chain

    def _open_next(self, transport: paramiko.Transport, hop: Destination, next_hop: Destination) -> paramiko.Channel:
        """Connect from a jump host to the next host. Raises SshError."""
        target = (next_hop.host, next_hop.port)
        try:
            return transport.open_channel("direct-tcpip", target, ("", 0), timeout=self._timeout)
        except paramiko.ChannelException as error:  # the code and words of RFC 4254, section 5.1
            raise SshError(
                f"no connection from {hop} to {next_hop.host}, port {next_hop.port}: {error.text or error.code}; "
                "either the jump host forwards nothing (AllowTcpForwarding), or a firewall or the next host refuses it"
            ) from error
