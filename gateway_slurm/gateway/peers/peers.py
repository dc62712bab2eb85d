"""The other gateways of the deployment: which of them has a kernel, and whether it lives.

Several gateways share one store. Each kernel, session and allocation is one gateway's; a request that comes
to another one is passed on (``forwarder``), with the client's own credentials, and at most once. What is known
of the others comes from a ``Directory``, which is the store's in a deployment.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from gateway_slurm.errors import GatewaySlurmError

T = TypeVar("T")

KERNELS: Final = "kernels"
SESSIONS: Final = "sessions"
ALLOCATIONS: Final = "allocations"

CACHED_SECONDS: Final = 2.0
"""For so long it is not asked again whose a kernel is: a frontend asks for it many times a second."""
MAX_CACHED: Final = 4096
WATCH_SECONDS: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A gateway of this deployment; ``lives`` is False once its lease is over, or it has ended."""

    server_id: str
    url: str
    lives: bool = True

    @property
    def can_be_asked(self) -> bool:
        """Whether a request can be passed on to it: one without an address cannot be reached by its peers."""
        return self.lives and bool(self.url)


@dataclass(frozen=True, kw_only=True)
class Location:
    """Which gateway has something, and which user owns it ("" where that is not known)."""

    peer: Peer
    owner: str = ""


@dataclass(frozen=True, kw_only=True)
class PeerRecords:
    """What is on record of other gateways: the models of their kernels and sessions, each with its owner and maker."""

    kernels: tuple[tuple[str, str, dict[str, Any]], ...] = ()
    sessions: tuple[tuple[str, str, dict[str, Any]], ...] = ()


class Directory(Protocol):
    """What is written down of who has what. Every method may raise DirectoryUnavailable, and blocks no loop."""

    @property
    def server_id(self) -> str:
        """The gateway's own; "" before it has one."""

    async def others(self) -> list[Peer]:
        """The deployment's other gateways; dead ones as long as nobody has taken over what they had."""

    async def kernel(self, kernel_id: str) -> Location | None:
        """Whose kernel that is: another gateway's or this one's; None for one that nobody has on record."""

    async def session(self, session_id: str) -> Location | None:
        """Whose session that is."""

    async def session_at(self, owner: str, path: str) -> Location | None:
        """Who has this user's session of this document."""

    async def owners(self) -> Mapping[str, str]:
        """The kernels of all other gateways, starting ones included: their ids, and the users who own them."""

    async def records_of(self, server_ids: Collection[str]) -> PeerRecords:
        """What is on record of these gateways."""

    def close(self) -> None:
        """Nobody asks any more."""


class DirectoryUnavailable(GatewaySlurmError):
    """The store does not answer: nobody knows now whose a kernel is."""


class ForwardedWebsocket(Protocol):
    """A websocket that is passed on to a peer."""

    kernel_id: str
    peer: Peer

    def end(self, code: int, reason: str) -> None:
        """Close it; the client connects again and lands where its kernel is then."""


class Peers:
    """Looks owners up, with a short memory, and ends the websockets whose kernel has moved.

    ``is_here`` says whether this gateway has a kernel. Whoever made it calls ``close``, on its loop.
    """

    def __init__(self, directory: Directory, *, log: logging.Logger) -> None:
        self.directory = directory
        self._log = log
        self._known: OrderedDict[tuple[str, str], tuple[float, Location]] = OrderedDict()
        self._others: tuple[float, list[Peer]] = (0.0, [])
        self._websockets: set[ForwardedWebsocket] = set()
        self._watching: asyncio.Task[None] | None = None
        self._silent: set[str] = set()
        self._trouble = ""

    @property
    def server_id(self) -> str:
        return self.directory.server_id

    # -- who has what -------------------------------------------------------------------------------

    async def others(self, *, fresh: bool = False) -> list[Peer]:
        """The other gateways; those known last while the store does not answer."""
        until, known = self._others
        if not fresh and time.monotonic() < until:
            return known
        known = await self._asked(self.directory.others(), known)
        self._others = time.monotonic() + CACHED_SECONDS, known
        return known

    async def lives(self, peer: Peer) -> bool:
        """Whether a gateway lives; one that is not named at all is dead, and what it had is taken over."""
        return any(one.server_id == peer.server_id and one.lives for one in await self.others())

    async def find(self, collection: str, key: str, *, fresh: bool = False) -> Location | None:
        """Who has a kernel or a session on record, as it was up to two seconds ago unless ``fresh``.

        What was known before is still good for a request while the store does not answer.
        Raises DirectoryUnavailable where nothing was known.
        """
        until, found = self._known.get((collection, key), (0.0, None))
        if found is not None and not fresh and time.monotonic() < until:
            return found
        look = self.directory.kernel if collection == KERNELS else self.directory.session
        try:
            found = await look(key)
        except DirectoryUnavailable as error:
            self._complain(str(error))
            if found is None:
                raise
            return found
        self._complain("")
        self._remember(collection, key, found)
        return found

    async def session_at(self, owner: str, path: str) -> Location | None:
        """Who has this user's session of this document, as it is now; None also while the store does not answer."""
        return await self._asked(self.directory.session_at(owner, path), None)

    async def owners(self) -> Mapping[str, str]:
        """The others' kernels and who owns them; none while the store does not answer."""
        return await self._asked(self.directory.owners(), {})

    def _remember(self, collection: str, key: str, found: Location | None) -> None:
        self._known.pop((collection, key), None)
        if found is None:
            return  # the next moment somebody may have it
        self._known[collection, key] = time.monotonic() + CACHED_SECONDS, found
        while len(self._known) > MAX_CACHED:
            self._known.popitem(last=False)

    async def preferred_peer(self, *key: str) -> Peer | None:
        """The gateway that all agree upon for what must be made only once; None is this one.

        Each gateway that lives is weighed against the key, and the heaviest has it (rendezvous hashing), so
        one that comes or goes moves few keys.
        """
        others = [peer for peer in await self.others() if peer.can_be_asked]
        first = max(others, key=lambda peer: _weight(peer.server_id, key), default=None)
        if first is None or _weight(self.server_id, key) > _weight(first.server_id, key):
            return None
        return first

    async def _asked(self, question: Awaitable[T], otherwise: T) -> T:
        """The store's answer, or ``otherwise`` while it does not answer, which is told once."""
        try:
            answer = await question
        except DirectoryUnavailable as error:
            self._complain(str(error))
            return otherwise
        self._complain("")
        return answer

    def _complain(self, trouble: str) -> None:
        if trouble and not self._trouble:
            self._log.warning("other gateways' kernels cannot be looked up: %s", trouble)
        elif self._trouble and not trouble:
            self._log.info("other gateways' kernels can be looked up again")
        self._trouble = trouble

    def unreachable(self, peer: Peer, why: str) -> None:
        """A peer did not answer: told once, until it answers again."""
        if peer.server_id not in self._silent:
            self._log.warning("the gateway at %s does not answer: %s", peer.url, why)
        self._silent.add(peer.server_id)

    def reachable(self, peer: Peer) -> None:
        """A peer has answered."""
        if peer.server_id in self._silent:
            self._log.info("the gateway at %s answers again", peer.url)
        self._silent.discard(peer.server_id)

    # -- websockets that are passed on ----------------------------------------------------------------

    def watch(self, websocket: ForwardedWebsocket) -> None:
        """End it when its kernel's gateway is gone, until ``unwatch``."""
        self._websockets.add(websocket)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.ensure_future(self._watch())

    def unwatch(self, websocket: ForwardedWebsocket) -> None:
        self._websockets.discard(websocket)

    async def _watch(self) -> None:
        while self._websockets:
            await asyncio.sleep(WATCH_SECONDS)
            for websocket in list(self._websockets):
                if not await self.lives(websocket.peer):
                    websocket.end(SERVICE_RESTART, "its gateway is gone; connect again")

    def close(self) -> None:
        """The gateway ends: so do the websockets that it passes on."""
        if self._watching is not None:
            self._watching.cancel()
        for websocket in list(self._websockets):
            websocket.end(SERVICE_RESTART, "this gateway ends; connect again")


SERVICE_RESTART: Final = 1012
"""WebSocket close code: the client should connect again (IANA's registry; RFC 6455 section 7.4.2)."""


def _weight(server_id: str, key: tuple[str, ...]) -> bytes:
    return hashlib.sha256("\0".join((server_id, *key)).encode(errors="surrogatepass")).digest()
