"""Where a kernel's output comes from: the journal on its node, or, for a kernel without one, its iopub by ZMQ."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from gateway_slurm._util import Backoff
from gateway_slurm.budget import Holding
from gateway_slurm.errors import LinkError
from gateway_slurm.gateway.channels.sockets import KernelSocket, Post
from gateway_slurm.link.journal import JournalHeader, JournalReading, Record
from gateway_slurm.provisioner import SlurmProvisioner

# Bytes of the window. Of what has left it, a journal's kernel has the rest on its node; any other has no more.
JOURNAL_WINDOW, SOCKET_WINDOW = 16 << 20, 128 << 20
# Seconds between two attempts to read a journal whose launcher is gone: a restart may bring another one.
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.05, 5.0
# Messages that are taken in one turn: some milliseconds.
BATCH = 64

Take = Callable[[Iterable[Record]], None]


class JournalSource:
    """Reads a kernel's journal once for all, and again where reading ended. ``close`` ends it.

    ``turn`` awaits a turn of the kernel's owner, and calls a function in it; ``check`` checks large messages. ``wait``
    is awaited after each batch. ``holding`` makes what counts the bytes of a reading, and ``on_skipped`` gets the size
    of a message that is left out, and the reason. ``next_number`` returns where to go on; None: where an earlier server
    was.
    """

    window_bytes = JOURNAL_WINDOW

    def __init__(
        self,
        provisioner: SlurmProvisioner,
        *,
        next_number: Callable[[], int | None],
        on_header: Callable[[JournalHeader], None],
        holding: Callable[[Callable[[str], None]], Holding],
        on_skipped: Callable[[int, str], None],
        take: Take,
        wait: Callable[[], Awaitable[None]],
        turn: Callable[..., Awaitable[Any]],
        check: Callable[[list[Record]], Awaitable[list[Record]]],
        log: logging.Logger,
    ) -> None:
        self._wait, self._turn, self._check, self._next_number = wait, turn, check, next_number
        self._read_journal = partial(provisioner.read_journal, holding=holding, skipped=on_skipped, turn=turn)
        self._on_header, self._take, self.log = on_header, take, log
        self._wake = asyncio.Event()
        self._delays = Backoff(RETRY_SECONDS, MAX_RETRY_SECONDS)
        self._task = asyncio.ensure_future(self._run())

    def read(self, start: int, upto: int) -> JournalReading:
        """Read these numbers once more. Raises LinkError where there is no launcher."""
        return self._read_journal(start, upto)

    async def _run(self) -> None:
        while True:
            try:
                await self._read()
            except LinkError as error:  # the kernel has ended, or is being restarted in another job
                self.log.debug("a kernel's journal is not read: %s", error)
            except Exception:
                # What a launcher or a kernel sends must not end the reading for good.
                self.log.exception("a kernel's journal is read again")
            self._wake.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._delays.next())

    async def _read(self) -> None:
        reading = self._read_journal(self._next_number())
        try:
            self._on_header(await reading.header())
            async for records in reading:
                self._delays.reset()
                records = await self._check(records)
                for start in range(0, len(records), BATCH):
                    await self._turn(self._take, records[start : start + BATCH])
                await self._wait()
        finally:
            reading.close()

    def kernel_listens(self) -> None:
        """The kernel was started or restarted."""
        self._delays.reset()
        self._wake.set()

    def pace(self, lag: int) -> None:
        """The journal waits on the node."""

    def close(self) -> None:
        self._task.cancel()


class SocketSource:
    """Subscribes to a kernel's iopub, and numbers its messages. ``close`` ends it.

    ``on_renewed`` is called where a connection was ended by a malformed or an oversized message and made again.
    """

    window_bytes = SOCKET_WINDOW

    def __init__(
        self,
        kernel: Any,
        *,
        first: int,
        take: Take,
        holding: Holding,
        on_renewed: Callable[[], None],
        post: Post,
    ) -> None:
        self._next, self._take, self._on_renewed = first, take, on_renewed
        self._socket = KernelSocket(kernel, "iopub", b"", self._on_message, holding, self._renewed, post=post)

    def read(self, start: int, upto: int) -> JournalReading:
        raise LinkError(f"messages {start} to {upto} of a kernel without a journal are gone")

    def _on_message(self, frames: list[bytes]) -> None:
        number, self._next = self._next, self._next + 1
        self._take([Record(number, number, frames)])

    def _renewed(self) -> None:
        self._next += 1  # one message at least is lost
        self._on_renewed()

    def kernel_listens(self) -> None:
        """The socket connects again by itself; the new process is heard, also where a frontend is behind."""
        self._socket.resume()

    def pace(self, lag: int) -> None:
        """Read on while the fastest frontend lacks at most ``lag`` bytes of it: the rest waits in the kernel."""
        if lag > SOCKET_WINDOW // 2:
            self._socket.pause()
        elif lag < SOCKET_WINDOW // 4:
            self._socket.resume()

    def close(self) -> None:
        self._socket.close()
