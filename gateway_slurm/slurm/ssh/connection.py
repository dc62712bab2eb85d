"""The one connection to a login node: kept, shared by all that is asked there, and made again when it breaks.

All methods are called on one loop; what blocks runs in worker threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import paramiko

from gateway_slurm.errors import GatewaySlurmError, HostKeyRefused, LoginRefused, SshError, SshTurnedAway
from gateway_slurm.slurm.ssh.config import Target
from gateway_slurm.slurm.ssh.login import Credentials, dial, log_in
from gateway_slurm.slurm.ssh.remote import Frame, RemoteProgram

T = TypeVar("T")

FIRST_PAUSE: Final = 0.25  # seconds
LONGEST_PAUSE: Final = 5.0
# A host that refused us is not asked again and again: many count that, and lock accounts.
REFUSED_PAUSE: Final = (5.0, 60.0)
PATIENCE: Final = 6.0  # seconds of a pause that a caller waits for
TURNED_AWAY_PAUSES: Final = (0.5, 1.0, 2.0)
TURNED_AWAY_LONGEST: Final = 10.0  # longer than PATIENCE: a host that stays busy is left alone, and callers are told so


@dataclass
class TransportChain:
    """A connection that is up: the transports over the jump hosts, the login node's last."""

    transports: list[paramiko.Transport] = field(default_factory=list)
    peer: str = ""

    @property
    def transport(self) -> paramiko.Transport:
        """The login node's."""
        return self.transports[-1]

    def close(self) -> None:
        """Close all; blocks for a moment."""
        for transport in reversed(self.transports):
            transport.close()


async def run_in_thread(act: Callable[[], T]) -> T:
    """Run what blocks in a thread of its own, which the end of the process does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value: T | None = None
        error: BaseException | None = None
        try:
            value = act()
        except BaseException as trouble:  # noqa: BLE001 - it is raised where it is awaited
            error = trouble
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="gateway_slurm-ssh", daemon=True).start()
    return await future


class SshConnection:
    """To one login node, as one user. Its owner calls ``close``.

    ``timeout`` (seconds) bounds each step of a login, ``heartbeat`` (seconds) is the time between signs of life.
    ``counts`` says how often was connected, and how many channels were opened.
    """

    def __init__(
        self,
        target: Target,
        credentials: Credentials,
        *,
        python: str,
        timeout: float,
        heartbeat: float,
        log: logging.Logger,
    ) -> None:
        self.target, self.log = target, log
        self.counts: Counter[str] = Counter()
        self.trouble: GatewaySlurmError | None = None
        """Why the last attempt failed; None when it did not."""
        self._credentials, self._python = credentials, python
        self._timeout, self._heartbeat = timeout, heartbeat
        self._session: TransportChain | None = None
        self._connecting: asyncio.Task[TransportChain] | None = None
        self._peer = ""
        self._failures = 0
        self._not_before = 0.0
        self._closed = False

    async def program(
        self, mode: str, *, on_frames: Callable[[list[Frame]], None], on_end: Callable[[SshError], None]
    ) -> RemoteProgram:
        """Start a program on the login node, over the connection that is there or a new one. Raises SshError."""
        session = await self._up()
        program = RemoteProgram(session.transport, on_frames=on_frames, on_end=on_end, log=self.log)
        self.counts["channel"] += 1
        await run_in_thread(
            lambda: program.open(mode, python=self._python, heartbeat=self._heartbeat, timeout=self._timeout)
        )
        program.start(self._heartbeat)
        return program

    async def close(self) -> None:
        """End it, and what runs at its other end."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        session, self._session = self._session, None
        if session is not None:
            await run_in_thread(session.close)

    # -- connecting ----------------------------------------------------------------------------------------

    async def _up(self) -> TransportChain:
        if self._closed:
            raise SshError("the service has ended")
        if self._session is not None and self._session.transport.is_active():
            return self._session
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.ensure_future(self._connect())
            self._connecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> TransportChain:
        loop = asyncio.get_running_loop()
        pause = self._not_before - loop.time()
        if pause > PATIENCE and self.trouble is not None:
            raise SshError(f"{self.trouble} (it is tried again in {pause:.0f} s)")
        if pause > 0:
            await asyncio.sleep(pause)
        old, self._session = self._session, None
        if old is not None:
            await run_in_thread(old.close)
        # A user is asked at the first login only: later ones come in the middle of something else.
        may_ask = self.counts["connected"] == 0
        try:
            session = await self._make_patiently(may_ask=may_ask)
        except GatewaySlurmError as error:
            self._failed(error)
            raise
        if self._closed:
            await run_in_thread(session.close)
            raise SshError("the service has ended")
        self.counts["connected"] += 1
        self._failures, self._not_before, self.trouble = 0, 0.0, None
        self._session, self._peer = session, session.peer
        self.log.info("SSH: logged in to %s", self.target)
        return session

    async def _make_patiently(self, *, may_ask: bool) -> TransportChain:
        """Try again when sshd turns us away at the door, as it does at random when many log in (MaxStartups)."""
        began = time.monotonic()
        for pause in (*(() if self._failures else TURNED_AWAY_PAUSES), None):
            self.counts["connect"] += 1
            try:
                return await run_in_thread(lambda: self._make(may_ask=may_ask))
            except SshTurnedAway:
                if pause is None or self._closed or time.monotonic() - began > PATIENCE:
                    raise
            await asyncio.sleep(pause * random.uniform(0.7, 1.3))  # noqa: S311 - jitter
        raise AssertionError("the last attempt returns or raises")

    def _failed(self, error: GatewaySlurmError) -> None:
        refused = isinstance(error, (HostKeyRefused, LoginRefused))
        first, longest = REFUSED_PAUSE if refused else (FIRST_PAUSE, LONGEST_PAUSE)
        if isinstance(error, SshTurnedAway):
            longest = TURNED_AWAY_LONGEST
            self._failures = max(self._failures, len(TURNED_AWAY_PAUSES) + 1)
        pause = min(longest, first * 2 ** min(self._failures, 10)) * random.uniform(0.7, 1.3)  # noqa: S311 - jitter
        self._failures += 1
        self._not_before = asyncio.get_running_loop().time() + pause
        if str(error) != str(self.trouble):
            self.log.warning("SSH: %s", error)
        self.trouble = error

    def _make(self, *, may_ask: bool) -> TransportChain:
        """Connect, over the jump hosts. Blocks; raises SshError or ConfigError."""
        answers = self._credentials.answers(may_ask=may_ask)
        session = TransportChain()
        try:
            hops = [*self.target.jumps, self.target]
            # A name with several hosts behind it: the one that our relay and our processes are on.
            sock: Any = dial(hops[0].host, hops[0].port, self._timeout, first=self._peer)
            session.peer = sock.getpeername()[0]
            for number, hop in enumerate(hops):
                session.transports.append(log_in(sock, hop, answers, timeout=self._timeout))
                if number + 1 < len(hops):
                    after = hops[number + 1]
                    sock = session.transport.open_channel(
                        "direct-tcpip", (after.host, after.port), ("", 0), timeout=self._timeout
                    )
        except GatewaySlurmError:
            session.close()
            raise
        except (paramiko.SSHException, OSError, EOFError) as error:
            session.close()
            words = str(error) or type(error).__name__
            raise SshError(f"the login node {self.target} cannot be logged in to: {words}") from error
        session.transport.set_keepalive(int(self._heartbeat) or 1)
        if self._closed:  # meanwhile, and nobody awaits us
            session.close()
        return session
