"""A request for what another gateway has is passed on to it, and its answer is the client's.

The other gateway asks anew who the client is: nobody is believed because a peer says so. A request that was
passed on once is answered by whom it has reached, so that none goes round.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

from tornado import web
from tornado.httpclient import HTTPResponse
from tornado.web import RequestHandler

from gateway_slurm.gateway.auth.user import GatewayUser
from gateway_slurm.gateway.peers.client import FORWARDED_BY, ForwardedRequest, PeerClient, PeerUnreachable
from gateway_slurm.gateway.peers.peers import (
    ALLOCATIONS,
    KERNELS,
    SESSIONS,
    WATCH_SECONDS,
    DirectoryUnavailable,
    Location,
    Peer,
    Peers,
)
from gateway_slurm.service import SlurmService

ASK_SECONDS: Final = 3.0
"""For so long all peers are asked whether they have what no record names yet."""
WAIT_SECONDS: Final = 5.0
"""For so long a request waits while what it is for is being taken over."""
POLL_SECONDS: Final = 0.25
RETRY_AFTER: Final = "1"

MOVED_STATUSES: Final = (404, 409)
"""Statuses by which a peer may say that it no longer has a kernel."""

# The argument of a route, and where such things are.
_COLLECTIONS: Final = {"kernel_id": KERNELS, "session_id": SESSIONS, "jobid": ALLOCATIONS}
# The headers of an answer that are the client's; the others this gateway sets itself.
_ANSWER_HEADERS: Final = ("Location", "Retry-After", "WWW-Authenticate", "Cache-Control")
TRY_AGAIN: Final = "the gateway that has this does not answer; another one takes over from one that is gone: try again"


class Forwarder:
    """What the gateway's handlers share for passing on; one per gateway, made by the application."""

    def __init__(self, peers: Peers, client: PeerClient, *, proof: tuple[str, ...] = ()) -> None:
        self.peers, self.client, self.proof = peers, client, proof

    def close(self) -> None:
        """The gateway ends."""
        self.peers.close()
        self.client.close()
        self.peers.directory.close()

    # -- who has it ---------------------------------------------------------------------------------

    async def find(self, handler: RequestHandler, collection: str, key: str, *, fresh: bool = False) -> Location | None:
        """Who has it: as the records say, or, where they do not know, who says so when asked.

        A kernel that was made a moment ago is on nobody's record yet. Raises HTTPError 503.
        """
        if collection == ALLOCATIONS:
            return await self._ask_all(handler, collection, key)
        try:
            found = await self.peers.find(collection, key, fresh=fresh)
        except DirectoryUnavailable as error:
            found = await self._ask_all(handler, collection, key)
            if found is None:
                raise web.HTTPError(503, f"nobody knows now whose this is: {error}") from error
        if found is None:
            return await self._ask_all(handler, collection, key)
        return found if may_see(handler.current_user, found) else None

    async def _ask_all(self, handler: RequestHandler, collection: str, key: str) -> Location | None:
        # One that has just been started is among them.
        peers = [peer for peer in await self.peers.others(fresh=True) if peer.can_be_asked]
        passed = self.request_of(handler).at(f"api/{collection}/{key}")
        asking = [asyncio.ensure_future(self._has(peer, passed)) for peer in peers]
        try:
            for answered in asyncio.as_completed(asking):
                peer = await answered
                if peer is not None:
                    return Location(peer=peer)
        finally:
            for task in asking:
                task.cancel()
        return None

    async def _has(self, peer: Peer, passed: ForwardedRequest) -> Peer | None:
        try:
            answer = await self.client.send(peer, passed, timeout=ASK_SECONDS)
        except PeerUnreachable:
            return None
        return peer if answer.code == 200 else None

    # -- passing on ---------------------------------------------------------------------------------

    def request_of(self, handler: RequestHandler) -> ForwardedRequest:
        """The handler's request, as it goes to a peer."""
        base_url: str = handler.settings.get("base_url", "/")
        return ForwardedRequest.of(handler.request, base_url, self.peers.server_id, proof=self.proof)

    async def wait_for_holder(
        self, is_here: Callable[[], bool], find: Callable[[bool], Awaitable[Location | None]]
    ) -> tuple[bool, Peer | None]:
        """Whether it is here, or else which living peer has it; (False, None) is nobody.

        ``find`` is told whether it is to look anew. What is just being taken over, from a dead gateway or by
        this one, is waited for, shortly. Raises HTTPError 503 where that takes longer.
        """
        deadline, fresh = time.monotonic() + WAIT_SECONDS, False
        while not is_here():
            found = await find(fresh)
            if found is None:
                return is_here(), None
            if found.peer.can_be_asked and found.peer.server_id != self.peers.server_id:
                return False, found.peer
            without_address = found.peer.lives and found.peer.server_id != self.peers.server_id
            if without_address or time.monotonic() > deadline:
                raise web.HTTPError(503, TRY_AGAIN)
            await asyncio.sleep(POLL_SECONDS)
            fresh = True
        return True, None

    async def find_holder(
        self, handler: RequestHandler, collection: str, key: str, *, fresh: bool = False
    ) -> tuple[bool, Peer | None]:
        """``settled`` for a kernel, a session or an allocation by its id."""
        return await self.wait_for_holder(
            lambda: is_here(handler, collection, key),
            lambda again: self.find(handler, collection, key, fresh=fresh or again),
        )

    async def send(self, peer: Peer, passed: ForwardedRequest) -> HTTPResponse | None:
        """The peer's answer, or None from one that has not had the request.

        Raises HTTPError 503 when it is not known whether the peer has done what was asked.
        """
        try:
            answer = await self._answer_of(peer, passed)
        except PeerUnreachable as error:
            self.peers.unreachable(peer, str(error))
            if error.sent and passed.method != "GET":
                raise web.HTTPError(503, TRY_AGAIN) from error
            return None
        self.peers.reachable(peer)
        return answer

    async def _answer_of(self, peer: Peer, passed: ForwardedRequest) -> HTTPResponse:
        """What takes long is waited for as long as the peer lives: one that hangs has a lease that is soon over."""
        sending = asyncio.ensure_future(self.client.send(peer, passed))
        try:
            while True:
                done, _pending = await asyncio.wait({sending}, timeout=WATCH_SECONDS)
                if done:
                    return sending.result()
                if not await self.peers.lives(peer):
                    raise PeerUnreachable(f"{peer.url}: it has not been heard of for too long", sent=True)
        finally:
            sending.cancel()


def is_forwarded(handler: RequestHandler) -> bool:
    """Whether another gateway has sent the request here."""
    return FORWARDED_BY in handler.request.headers


def is_here(handler: RequestHandler, collection: str, key: str) -> bool:
    """Whether this gateway has it."""
    if collection == KERNELS:
        return key in handler.settings["kernel_manager"]
    if collection == SESSIONS:
        return handler.settings["session_manager"].find(key) is not None
    return any(row["jobid"] == key for row in SlurmService.instance().allocations_of(None))


def may_see(user: Any, found: Location) -> bool:
    """Whether it is worth asking for this user: the peer judges, but others' are not even waited for."""
    return not found.owner or user.admin or user.service or user.username == found.owner


class ForwardsRequests(web.RequestHandler):
    """A handler whose routes name a kernel, a session or an allocation, which may be at another gateway."""

    @property
    def forwarder(self) -> Forwarder:
        forwarder: Forwarder = self.settings["forwarder"]
        return forwarder

    async def forward_to_holder(self) -> None:
        """Answer with the peer's answer; nothing is done where this gateway, or nobody, has it."""
        named = next((name for name in _COLLECTIONS if name in self.path_kwargs), None)
        if named is None or is_forwarded(self) or not isinstance(self.current_user, GatewayUser):
            return
        collection, key = _COLLECTIONS[named], self.path_kwargs[named]
        if not is_here(self, collection, key):
            answer = await self._answer_of_holder(collection, key)
            if answer is not None:
                self.relay_answer(answer)

    async def _answer_of_holder(self, collection: str, key: str) -> HTTPResponse | None:
        """The answer of whoever has it; None where that is this gateway, or nobody. Raises HTTPError 503."""
        passed, deadline = self.forwarder.request_of(self), time.monotonic() + WAIT_SECONDS
        asked: Peer | None = None
        answer: HTTPResponse | None = None
        while True:
            here, peer = await self.forwarder.find_holder(self, collection, key, fresh=asked is not None)
            if here:
                return None
            if peer is None or (peer == asked and answer is not None):
                return answer
            answer = await self.forwarder.send(peer, passed)
            # It may have moved a moment ago: once more it is asked whose it is.
            if answer is not None and (answer.code not in MOVED_STATUSES or asked is not None):
                return answer
            asked = peer
            if answer is None:
                if time.monotonic() > deadline:
                    raise web.HTTPError(503, TRY_AGAIN)
                await asyncio.sleep(POLL_SECONDS)

    def relay_answer(self, answer: HTTPResponse, status: int | None = None) -> None:
        """The peer's answer is the client's, with another ``status`` if there is one."""
        self.set_status(status or answer.code, answer.reason if status is None else None)
        for name in _ANSWER_HEADERS:
            if name in answer.headers:
                self.set_header(name, answer.headers[name])
        kind = answer.headers.get("Content-Type", "application/json")
        if answer.code == 204 or not answer.body:
            self.finish()
        else:
            self.finish(answer.body, set_content_type=kind)  # type: ignore[call-arg] # APIHandler has it

    # -- sessions -------------------------------------------------------------------------------------

    async def forward_session(self, owner: str, path: str, kernel_id: str) -> bool:
        """Whether POST /api/sessions was answered by a peer.

        By the one that has the document's session, or the kernel that is named; else by the one that all
        agree upon, so that two gateways asked at the same time do not make two sessions.
        """
        sessions, forwarder = self.settings["session_manager"], self.forwarder
        if is_forwarded(self):
            return False
        here, peer = await forwarder.wait_for_holder(
            lambda: sessions.at(path, owner) is not None, lambda _again: forwarder.peers.session_at(owner, path)
        )
        if peer is None and not here and kernel_id:
            here, peer = await forwarder.find_holder(self, KERNELS, kernel_id)
        elif peer is None and not here:
            peer = await forwarder.peers.preferred_peer(owner, path)
        answer = None if here or peer is None else await forwarder.send(peer, forwarder.request_of(self))
        if answer is None:
            return False
        self.relay_answer(answer)
        return True

    async def create_session_at_peer(self, kernel_id: str, body: dict[str, Any]) -> HTTPResponse | None:
        """A peer's answer to POST /api/sessions for a kernel of its own; None for a kernel that is no peer's.

        Also for a request that was passed on: this is another one, and goes no further. Raises HTTPError with
        the peer's status where it refuses.
        """
        if not kernel_id:
            return None
        _here, peer = await self.forwarder.find_holder(self, KERNELS, kernel_id)
        if peer is None:
            return None
        question = replace(
            self.forwarder.request_of(self), method="POST", path="api/sessions", body=json.dumps(body).encode()
        )
        answer = await self.forwarder.send(peer, question)
        if answer is None:
            raise web.HTTPError(503, TRY_AGAIN)
        if answer.code != 201:
            raise web.HTTPError(answer.code, f"the kernel's gateway answers: {answer.reason}")
        return answer


async def check_deployment_limits(handler: ForwardsRequests, owner: str) -> None:
    """Raise HTTPError 429 where the kernels at all gateways are as many as may be."""
    manager = handler.settings["kernel_manager"]
    if manager.max_kernels or manager.max_kernels_per_user:
        manager.check_limits(owner, await handler.forwarder.peers.owners())


async def refuse_taken_id(handler: ForwardsRequests, kernel_id: str) -> None:
    """Raise HTTPError 409 for an id that a kernel of another gateway has, whoever's it is."""
    peers = handler.forwarder.peers
    try:
        found = await peers.find(KERNELS, kernel_id, fresh=True)
    except DirectoryUnavailable as error:
        raise web.HTTPError(503, f"nobody knows now whether there is a kernel {kernel_id} already: {error}") from error
    if found is not None and found.peer.server_id != peers.server_id:
        raise web.HTTPError(409, f"there is a kernel {kernel_id} already")
