"""The other gateways of the deployment: which of them has a kernel, and whether it lives.

Several gateways share one store. One gateway has each kernel, session and allocation. Another gateway forwards a
request for it (``forward``), in the name of its user and at most once. The ``directory`` has the records of
all gateways.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeVar

from gateway_slurm._util import LogOnce
from gateway_slurm.gateway.peers.directory import KERNELS, DirectoryUnavailable, Location, Peer, StoreDirectory

T = TypeVar("T")

CACHED_SECONDS: Final = 2.0
"""How long a kernel's location is cached: a frontend asks for a kernel many times a second."""
MAX_CACHED: Final = 4096
WATCH_SECONDS: Final = 2.0
SERVICE_RESTART: Final = 1012
"""WebSocket close code: the client should connect again (IANA's registry; RFC 6455 section 7.4.2)."""

_STORE: Final = "store"


class Peers:
    """Finds the gateway that has a kernel, with a short cache, and ends websockets to gateways that are gone.

    Its owner calls ``close``, on its loop.
    """

    def __init__(self, directory: StoreDirectory, *, log: logging.Logger) -> None:
        self.directory = directory
        self._log = log
        self._known: OrderedDict[tuple[str, str], tuple[float, Location]] = OrderedDict()
        self._others: tuple[float, list[Peer]] = (0.0, [])
        self._websockets: dict[Callable[[int, str], None], Peer] = {}
        self._watching: asyncio.Task[None] | None = None
        self._complaints = LogOnce(log)
        self._is_silent = False  # the store, at the last question

    @property
    def server_id(self) -> str:
        return self.directory.server_id

    # -- Which gateway has what --

    async def others(self, *, fresh: bool = False) -> list[Peer]:
        """The other gateways; while the store does not answer, those of its last answer."""
        until, known = self._others
        if not fresh and time.monotonic() < until:
            return known
        known = await self._answer(self.directory.others(), known)
        self._others = time.monotonic() + CACHED_SECONDS, known
        return known

    async def lives(self, peer: Peer) -> bool:
        """Whether a gateway lives. A gateway that is not on record is dead, and others have taken over its kernels.

        While the store does not answer, no gateway can take over: one that the last answer did not have lives.
        """
        others = await self.others()
        known = next((other for other in others if other.server_id == peer.server_id), None)
        return self._is_silent if known is None else known.lives

    async def find(self, collection: str, key: str, *, fresh: bool = False) -> Location | None:
        """The gateway that has a kernel or session on record. Without ``fresh`` the answer may be CACHED_SECONDS old.

        While the store does not answer, the last answer is used. Raises DirectoryUnavailable if there is none.
        """
        until, found = self._known.get((collection, key), (0.0, None))
        if found is not None and not fresh and time.monotonic() < until:
            return found
        try:
            found = await (self.directory.kernel(key) if collection == KERNELS else self.directory.session(key))
        except DirectoryUnavailable as error:
            self._store_is_silent(error)
            if found is None:
                raise
            return found
        self._store_answers()
        self._known.pop((collection, key), None)
        if found is not None:  # otherwise another gateway may have it the next moment
            self._known[collection, key] = time.monotonic() + CACHED_SECONDS, found
            while len(self._known) > MAX_CACHED:
                self._known.popitem(last=False)
        return found

    async def session_at(self, owner: str, path: str) -> Location | None:
        """The gateway that has this user's session of this document now; None also while the store does not answer."""
        return await self._answer(self.directory.session_at(owner, path), None)

    async def owners(self) -> Mapping[str, str]:
        """The owners of the other gateways' kernels, by kernel id; empty while the store does not answer."""
        return await self._answer(self.directory.owners(), {})

    async def preferred_peer(self, *key: str) -> Peer | None:
        """The gateway that all gateways choose for a key, for what must be made only once; None for this gateway.

        Each gateway computes a weight of each living one for the key, and the heaviest is chosen (rendezvous hashing).
        A gateway that comes or goes changes the choice for few keys.
        """
        others = [peer for peer in await self.others() if peer.can_be_asked]
        first = max(others, key=lambda peer: _weight(peer.server_id, key), default=None)
        if first is None or _weight(self.server_id, key) > _weight(first.server_id, key):
            return None
        return first

    async def _answer(self, query: Awaitable[T], otherwise: T) -> T:
        """The store's answer, or ``otherwise`` while the store does not answer."""
        try:
            answer = await query
        except DirectoryUnavailable as error:
            self._store_is_silent(error)
            return otherwise
        self._store_answers()
        return answer

    def _store_is_silent(self, error: DirectoryUnavailable) -> None:
        self._is_silent = True
        self._complaints.warning(_STORE, "other gateways' kernels cannot be looked up: %s", error)

    def _store_answers(self) -> None:
        self._is_silent = False
        if self._complaints.clear(_STORE):
            self._log.info("other gateways' kernels can be looked up again")

    def unreachable(self, peer: Peer, why: str) -> None:
        """A peer did not answer. The log has it once, until the peer answers again."""
        self._complaints.warning(peer.server_id, "the gateway at %s does not answer: %s", peer.url, why)

    def reachable(self, peer: Peer) -> None:
        if self._complaints.clear(peer.server_id):
            self._log.info("the gateway at %s answers again", peer.url)

    # -- Forwarded websockets --

    def watch(self, peer: Peer, end: Callable[[int, str], None]) -> None:
        """Call ``end``, which closes a websocket with a code and a reason, when the peer is gone, until ``unwatch``."""
        self._websockets[end] = peer
        if self._watching is None or self._watching.done():
            self._watching = asyncio.ensure_future(self._watch())

    def unwatch(self, end: Callable[[int, str], None]) -> None:
        self._websockets.pop(end, None)

    async def _watch(self) -> None:
        while self._websockets:
            await asyncio.sleep(WATCH_SECONDS)
            for end, peer in list(self._websockets.items()):
                if not await self.lives(peer):
                    end(SERVICE_RESTART, "the kernel's gateway is gone; connect again")

    def close(self) -> None:
        """End the forwarded websockets."""
        if self._watching is not None:
            self._watching.cancel()
        for end in list(self._websockets):
            end(SERVICE_RESTART, "this gateway ends; connect again")


def _weight(server_id: str, key: tuple[str, ...]) -> bytes:
    return hashlib.sha256("\0".join((server_id, *key)).encode(errors="surrogatepass")).digest()
