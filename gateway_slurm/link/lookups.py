"""Launchers that dial and that this server does not expect: whose they are is asked elsewhere, within bounds."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from gateway_slurm.errors import HandshakeError

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
