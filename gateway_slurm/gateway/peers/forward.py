"""Requests for a kernel, session or allocation of another gateway: they are forwarded, and the client gets its answer.

This gateway authenticates the client, names the user to the other gateway, and proves itself to it (``auth.peer``). A
forwarded request is never forwarded again, so that none goes round in a circle.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, cast

from tornado import web
from tornado.httpclient import HTTPResponse
from tornado.web import RequestHandler

from gateway_slurm.gateway.auth.user import GatewayUser
from gateway_slurm.gateway.peers.client import FORWARDED_BY, ForwardedRequest, PeerClient, PeerUnreachable
from gateway_slurm.gateway.peers.directory import ALLOCATIONS, KERNELS, SESSIONS, DirectoryUnavailable, Location, Peer
from gateway_slurm.gateway.peers.peers import WATCH_SECONDS, Peers
from gateway_slurm.service import SlurmService

ASK_SECONDS: Final = 3.0
"""How long the peers may take to say whether they have what is not on record yet."""
WAIT_SECONDS: Final = 5.0
"""How long a request waits while its kernel or session is being taken over."""
POLL_SECONDS: Final = 0.25
RETRY_AFTER: Final = "1"

MOVED_STATUSES: Final = (404, 409)
"""A peer that no longer has a kernel may answer with one of these."""

# For each argument of a route: the collection that it is a key of.
_COLLECTIONS: Final = {"kernel_id": KERNELS, "session_id": SESSIONS, "jobid": ALLOCATIONS}
# The headers that the client gets from the peer's answer. This gateway sets all others itself.
_ANSWER_HEADERS: Final = ("Location", "Retry-After", "WWW-Authenticate", "Cache-Control")
TRY_AGAIN: Final = (
    "the gateway that has this does not answer; if it is gone, another gateway takes over from it: try again"
)


class Forwarder:
    """Finds the gateway that has something, and forwards requests to it. The application calls ``close``."""

    def __init__(self, peers: Peers, client: PeerClient) -> None:
        self.peers, self.client = peers, client

    def close(self) -> None:
        self.peers.close()
        self.client.close()
        self.peers.directory.close()

    # -- Which gateway has it --

    async def find(self, handler: RequestHandler, collection: str, key: str, *, fresh: bool = False) -> Location | None:
        """The gateway that has it on record; if no record names it, the peer that has it when asked.

        A kernel that was made a moment ago is not on record yet. Raises HTTPError 503 if the store does not answer.
        """
        if collection == ALLOCATIONS:
            return await self._ask_all(handler, collection, key)
        try:
            found = await self.peers.find(collection, key, fresh=fresh)
        except DirectoryUnavailable as error:
            found = await self._ask_all(handler, collection, key)
            if found is None:
                raise web.HTTPError(503, f"it is not known now which gateway has this: {error}") from error
        if found is None:
            return await self._ask_all(handler, collection, key)
        # The peer decides; a request that it must refuse is not forwarded.
        user: Any = handler.current_user
        may_see = not found.owner or user.admin or user.service or user.username == found.owner
        return found if may_see else None

    async def _ask_all(self, handler: RequestHandler, collection: str, key: str) -> Location | None:
        # Look the gateways up again: one of them may have just started.
        peers = [peer for peer in await self.peers.others(fresh=True) if peer.can_be_asked]
        request = self.request_of(handler).get(f"api/{collection}/{key}")
        asking = [asyncio.ensure_future(self._has(peer, request)) for peer in peers]
        try:
            for answered in asyncio.as_completed(asking):
                peer = await answered
                if peer is not None:
                    return Location(peer=peer)
        finally:
            for task in asking:
                task.cancel()
        return None

    async def _has(self, peer: Peer, request: ForwardedRequest) -> Peer | None:
        try:
            answer = await self.client.send(peer, request, timeout=ASK_SECONDS)
        except PeerUnreachable:
            return None
        return peer if answer.code == 200 else None

    # -- Forwarding --

    def request_of(self, handler: RequestHandler) -> ForwardedRequest:
        """The handler's request, in the form in which it is sent to a peer."""
        base_url: str = handler.settings.get("base_url", "/")
        user = handler.current_user
        assert isinstance(user, GatewayUser)
        return ForwardedRequest.of(handler.request, user, base_url, self.peers.server_id)

    async def wait_for_holder(
        self, is_here: Callable[[], bool], find: Callable[[bool], Awaitable[Location | None]]
    ) -> tuple[bool, Peer | None]:
        """Whether this gateway has it, and else the living peer that has it; (False, None) if no gateway has it.

        ``find`` gets True to look without a cache. A takeover from a dead gateway is awaited. Raises HTTPError 503
        after WAIT_SECONDS.
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
        """``wait_for_holder`` for a kernel, session or allocation by its id."""
        return await self.wait_for_holder(
            lambda: is_here(handler, collection, key),
            lambda again: self.find(handler, collection, key, fresh=fresh or again),
        )

    async def send(self, peer: Peer, request: ForwardedRequest) -> HTTPResponse | None:
        """The peer's answer; None if the peer has not received the request.

        Raises HTTPError 503 if it is not known whether the peer has acted on the request.
        """
        try:
            answer = await self._answer_of(peer, request)
        except PeerUnreachable as error:
            self.peers.unreachable(peer, str(error))
            if error.sent and request.method != "GET":
                raise web.HTTPError(503, TRY_AGAIN) from error
            return None
        self.peers.reachable(peer)
        return answer

    async def _answer_of(self, peer: Peer, request: ForwardedRequest) -> HTTPResponse:
        """Wait for the answer as long as the peer lives: the lease of a peer that hangs soon expires."""
        sending = asyncio.ensure_future(self.client.send(peer, request))
        try:
            while True:
                done, _pending = await asyncio.wait({sending}, timeout=WATCH_SECONDS)
                if done:
                    return sending.result()
                if not await self.peers.lives(peer):
                    raise PeerUnreachable(f"{peer.url}: its lease has expired", sent=True)
        finally:
            sending.cancel()


def is_forwarded(handler: RequestHandler) -> bool:
    """Whether another gateway has forwarded the request to this one."""
    return FORWARDED_BY in handler.request.headers


def is_here(handler: RequestHandler, collection: str, key: str) -> bool:
    """Whether this gateway has the kernel, session or allocation."""
    if collection == KERNELS:
        return key in handler.settings["kernel_manager"]
    if collection == SESSIONS:
        return handler.settings["session_manager"].find(key) is not None
    return any(row["jobid"] == key for row in SlurmService.instance().allocations_of(None))


class ForwardsRequests(web.RequestHandler):
    """A handler whose routes name a kernel, session or allocation that another gateway may have."""

    @property
    def forwarder(self) -> Forwarder:
        return cast(Forwarder, self.settings["forwarder"])

    async def forward_to_holder(self) -> None:
        """Forward the request and relay the answer, if a peer has what the route names."""
        named = next((name for name in _COLLECTIONS if name in self.path_kwargs), None)
        if named is None or is_forwarded(self) or not isinstance(self.current_user, GatewayUser):
            return
        collection, key = _COLLECTIONS[named], self.path_kwargs[named]
        if not is_here(self, collection, key):
            answer = await self._answer_of_holder(collection, key)
            if answer is not None:
                self.relay_answer(answer)

    async def _answer_of_holder(self, collection: str, key: str) -> HTTPResponse | None:
        """The answer of the peer that has it; None if no peer has it. Raises HTTPError 503."""
        request, deadline = self.forwarder.request_of(self), time.monotonic() + WAIT_SECONDS
        asked: Peer | None = None
        answer: HTTPResponse | None = None
        while True:
            here, peer = await self.forwarder.find_holder(self, collection, key, fresh=asked is not None)
            if here:
                return None
            if peer is None or (peer == asked and answer is not None):
                return answer
            answer = await self.forwarder.send(peer, request)
            # It may have moved a moment ago: look it up once more.
            if answer is not None and (answer.code not in MOVED_STATUSES or asked is not None):
                return answer
            asked = peer
            if answer is None:
                if time.monotonic() > deadline:
                    raise web.HTTPError(503, TRY_AGAIN)
                await asyncio.sleep(POLL_SECONDS)

    def relay_answer(self, answer: HTTPResponse, status: int | None = None) -> None:
        """Send the peer's answer to the client, with ``status`` in place of its own if there is one."""
        self.set_status(status or answer.code, answer.reason if status is None else None)
        for name in _ANSWER_HEADERS:
            if name in answer.headers:
                self.set_header(name, answer.headers[name])
        if answer.code == 204 or not answer.body:
            self.finish()
        else:
            kind = answer.headers.get("Content-Type", "application/json")
            self.finish(answer.body, set_content_type=kind)  # type: ignore[call-arg] # APIHandler has it

    # -- Sessions --

    async def forward_session(self, owner: str, path: str, kernel_id: str) -> bool:
        """Forward POST /api/sessions and relay the answer; False if this gateway must handle the request.

        It goes to the gateway that has the document's session, or the named kernel; else to the preferred peer, so
        that two gateways do not make two sessions at the same time.
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
        """A peer's answer to POST /api/sessions for a kernel that the peer has; None if no peer has the kernel.

        Forwarded requests are allowed: this is a new request, which the peer does not forward. Raises HTTPError with
        the peer's status if the peer refuses.
        """
        if not kernel_id:
            return None
        _here, peer = await self.forwarder.find_holder(self, KERNELS, kernel_id)
        if peer is None:
            return None
        request = replace(
            self.forwarder.request_of(self), method="POST", path="api/sessions", body=json.dumps(body).encode()
        )
        answer = await self.forwarder.send(peer, request)
        if answer is None:
            raise web.HTTPError(503, TRY_AGAIN)
        if answer.code != 201:
            raise web.HTTPError(answer.code, f"the kernel's gateway answers: {answer.reason}")
        return answer


async def check_deployment_limits(handler: ForwardsRequests, owner: str) -> None:
    """Raise HTTPError 429 if all gateways together have as many kernels as the limits allow."""
    manager = handler.settings["kernel_manager"]
    if manager.max_kernels or manager.max_kernels_per_user:
        manager.check_limits(owner, await handler.forwarder.peers.owners())


async def refuse_taken_id(handler: ForwardsRequests, kernel_id: str) -> None:
    """Raise HTTPError 409 for an id that a kernel of another gateway has, and 503 if the store does not answer."""
    peers = handler.forwarder.peers
    try:
        found = await peers.find(KERNELS, kernel_id, fresh=True)
    except DirectoryUnavailable as error:
        raise web.HTTPError(
            503, f"it is not known now whether there is a kernel {kernel_id} already: {error}"
        ) from error
    if found is not None and found.peer.server_id != peers.server_id:
        raise web.HTTPError(409, f"there is a kernel {kernel_id} already")
