"""Authentication by a JupyterHub, which knows its users' tokens."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final
from weakref import WeakValueDictionary

from tornado.httpclient import HTTPClientError, HTTPRequest, HTTPResponse
from tornado.httputil import HTTPServerRequest
from tornado.simple_httpclient import SimpleAsyncHTTPClient

from gateway_slurm._util import USER_NAMES, is_user_name
from gateway_slurm.errors import IdentityUnavailable, NotAllowed
from gateway_slurm.gateway.auth.tokens import PREFIX, request_token
from gateway_slurm.gateway.auth.user import GatewayUser

MAX_CACHED_USERS: Final = 1024
"""How many users' tokens the cache keeps: those used last."""
MAX_CACHED_UNKNOWN: Final = 256
"""How many unknown tokens the cache keeps, apart from the users': invented tokens evict no user's."""
MAX_LOOKUPS: Final = 64
"""Unknown tokens of one address that wait for the hub. More are refused: they may be invented."""
MAX_ALL_LOOKUPS: Final = 1024
"""Unknown tokens of all addresses that wait."""
LOOKUPS_PER_ADDRESS: Final = 4
"""Unknown tokens of one address that the hub is asked for at once. The HTTP client sends ten at once, in order."""
_MAX_ANSWER_BYTES: Final = 1 << 20

Model = dict[str, Any]


@dataclass(eq=False)
class HubTokens:
    """Asks the hub at ``api_url`` which user owns a token (``GET /user``), and keeps the answer for ``cache_seconds``.

    ``scopes``: the token must have one of them, if there are any. ``services``: the hub services that may use the
    gateway, for other users. Its owner calls ``close``, on the loop that it was used on.
    """

    api_url: str
    _: KW_ONLY
    timeout: float
    cache_seconds: float
    scopes: Collection[str] = ()
    services: Collection[str] = ()

    def __post_init__(self) -> None:
        # By the token's hash: the cache holds no usable token. A model of None stands for a token unknown to the hub.
        self._users: OrderedDict[str, tuple[float, Model | None]] = OrderedDict()
        self._unknown: OrderedDict[str, tuple[float, Model | None]] = OrderedDict()
        self._asking: dict[str, asyncio.Task[Model | None]] = {}
        # How many unknown tokens of each address wait, and the turns of those that do.
        self._waiting: Counter[str] = Counter()
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        # Tokens that the hub knew at an earlier time have a client of their own: invented ones do not delay them.
        self._clients: dict[bool, SimpleAsyncHTTPClient] = {}

    async def authenticate(self, request: HTTPServerRequest) -> GatewayUser | None:
        """The token's user. Raises IdentityUnavailable if the hub is silent, NotAllowed for a user without access."""
        token = request_token(request)
        # The gateway's own tokens are not sent to the hub.
        if token is None or token.startswith(PREFIX):
            return None
        model = await self._model(token, str(request.remote_ip))
        return None if model is None else self._user(model)

    def expire(self, request: HTTPServerRequest) -> None:
        """Ask the hub about the request's token the next time, whatever the cache says."""
        if token := request_token(request):
            key = hashlib.sha256(token.encode()).hexdigest()
            if key in self._users:
                self._users[key] = 0.0, self._users[key][1]

    def close(self) -> None:
        """Cancel the requests to the hub, and close the connections."""
        for task in self._asking.values():
            task.cancel()
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    async def _model(self, token: str, address: str = "") -> Model | None:
        """The answer from the cache, from a request that is under way, or from the hub."""
        key = hashlib.sha256(token.encode()).hexdigest()
        for kept in (self._users, self._unknown):
            until, model = kept.get(key, (0.0, None))
            if time.monotonic() < until:
                kept.move_to_end(key)
                return model
        if key not in self._asking:
            was_known = key in self._users
            if not was_known and (self._waiting[address] >= MAX_LOOKUPS or self._waiting.total() >= MAX_ALL_LOOKUPS):
                raise IdentityUnavailable("too many tokens wait for the JupyterHub's answer; try again")
            asking = self._ask(key, token) if was_known else self._ask_in_turn(key, token, address)
            task = self._asking[key] = asyncio.ensure_future(asking)
            task.add_done_callback(lambda task: self._asked(key, task))
            if not was_known:
                self._waiting[address] += 1
                task.add_done_callback(lambda _task: self._has_waited(address))
        # A caller that is cancelled does not cancel the request for the others.
        return await asyncio.shield(self._asking[key])

    def _asked(self, key: str, task: asyncio.Task[Model | None]) -> None:
        self._asking.pop(key, None)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: all callers may have gone

    def _has_waited(self, address: str) -> None:
        self._waiting[address] -= 1
        if not self._waiting[address]:
            del self._waiting[address]

    async def _ask_in_turn(self, key: str, token: str, address: str) -> Model | None:
        """Ask for a token that was not known before: one address cannot take all the turns."""
        async with self._turns.setdefault(address, asyncio.Semaphore(LOOKUPS_PER_ADDRESS)):
            return await self._ask(key, token)

    async def _ask(self, key: str, token: str) -> Model | None:
        model = _parse(await self._fetch(token, was_known=key in self._users))
        users = self._users, MAX_CACHED_USERS
        unknown = self._unknown, MAX_CACHED_UNKNOWN
        (kept, most), (other, _most) = (unknown, users) if model is None else (users, unknown)
        other.pop(key, None)
        kept[key] = time.monotonic() + self.cache_seconds, model
        kept.move_to_end(key)
        while len(kept) > most:
            kept.popitem(last=False)
        return model

    async def _fetch(self, token: str, *, was_known: bool) -> HTTPResponse:
        client = self._clients.get(was_known)
        if client is None:
            client = SimpleAsyncHTTPClient(force_instance=True, max_body_size=_MAX_ANSWER_BYTES)
            self._clients[was_known] = client
        request = HTTPRequest(
            self.api_url.rstrip("/") + "/user",
            headers={"Authorization": f"token {token}", "Accept": "application/json"},
            connect_timeout=self.timeout,
            request_timeout=self.timeout,
            # A redirect could carry the token to another host.
            follow_redirects=False,
        )
        try:
            return await client.fetch(request, raise_error=False)
        except (OSError, HTTPClientError, ValueError) as error:
            raise IdentityUnavailable(f"the JupyterHub does not answer: {type(error).__name__}") from error

    def _user(self, model: Model) -> GatewayUser:
        name, kind = model.get("name"), model.get("kind", "user")
        if kind == "service" and name not in self.services:
            raise NotAllowed("this service of the JupyterHub may not use the gateway", field="hub_services")
        if kind not in ("user", "service") or not is_user_name(name):
            raise NotAllowed(
                f"the JupyterHub's name for you cannot be used here; allowed are {USER_NAMES}", field="name"
            )
        if not self._scopes_suffice(model.get("scopes")):
            raise NotAllowed(f"your token lacks the scope {' or '.join(self.scopes)}", field="scopes")
        return GatewayUser(str(name), service=kind == "service")

    def _scopes_suffice(self, scopes: object) -> bool:
        # A scope without a filter includes the filtered ones (JupyterHub's documentation, "Scopes in JupyterHub").
        have = set(map(str, scopes)) if isinstance(scopes, list) else set()
        return not self.scopes or any(scope in have or scope.partition("!")[0] in have for scope in self.scopes)


def _parse(response: HTTPResponse) -> Model | None:
    """The user's model; None if the hub does not know the token. Raises IdentityUnavailable."""
    if response.code in (401, 403):
        return None
    if response.code != 200:
        raise IdentityUnavailable(
            f"the JupyterHub answered {response.code} when asked for a token's user; try again, or check hub_api_url"
        )
    try:
        model = json.loads(response.body)
    except (ValueError, RecursionError) as error:
        raise IdentityUnavailable("the JupyterHub's answer is not JSON; check hub_api_url") from error
    if not isinstance(model, dict):
        raise IdentityUnavailable("the JupyterHub's answer does not describe a user; check hub_api_url")
    return model
