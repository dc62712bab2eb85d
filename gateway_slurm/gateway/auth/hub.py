"""A JupyterHub that knows the users' tokens."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Final

from tornado.httpclient import HTTPClientError, HTTPRequest, HTTPResponse
from tornado.simple_httpclient import SimpleAsyncHTTPClient
from tornado.web import RequestHandler

from gateway_slurm.errors import IdentityUnavailable, NotAllowed
from gateway_slurm.gateway.auth.tokens import PREFIX, request_token
from gateway_slurm.gateway.auth.user import NAMES, GatewayUser, is_name

MAX_CACHED_USERS: Final = 1024
"""Users' tokens whose answers are kept, of those used last."""
MAX_CACHED_UNKNOWN: Final = 256
"""Tokens that are none of the hub's: whoever invents some takes no user's place."""
MAX_LOOKUPS: Final = 64
"""Under way at a time; the client asks ten of them at once, and the others wait within their timeout."""
_MAX_ANSWER_BYTES: Final = 1 << 20

Model = dict[str, Any]


class HubTokens:
    """Asks the hub at ``api_url`` whose a token is (``GET /user``), and remembers it for ``cache_seconds``.

    ``scopes``: the token must have one of them, if any are named. ``services``: hub services that may use
    the gateway, for others. Whoever made it calls ``close``, on the loop that it was used on.
    """

    def __init__(
        self,
        api_url: str,
        *,
        timeout: float,
        cache_seconds: float,
        scopes: Collection[str] = (),
        services: Collection[str] = (),
    ) -> None:
        self._url = api_url.rstrip("/") + "/user"
        self._timeout = timeout
        self._cache_seconds = cache_seconds
        self._scopes = scopes
        self._services = services
        # By the token's hash, so that what is kept lets nobody in. A model of None: no token of the hub's.
        self._users: OrderedDict[str, tuple[float, Model | None]] = OrderedDict()
        self._unknown: OrderedDict[str, tuple[float, Model | None]] = OrderedDict()
        self._asking: dict[str, asyncio.Task[Model | None]] = {}
        self._client: SimpleAsyncHTTPClient | None = None

    async def authenticate(self, handler: RequestHandler) -> GatewayUser | None:
        """Raises IdentityUnavailable when the hub does not say, NotAllowed when its user may not come here."""
        token = request_token(handler.request)
        # The gateway's own tokens are none of the hub's business.
        if token is None or token.startswith(PREFIX):
            return None
        model = await self._model(token)
        return None if model is None else self._user(model)

    def close(self) -> None:
        """Give up what is being asked, and the connections."""
        for task in self._asking.values():
            task.cancel()
        if self._client is not None:
            self._client.close()
            self._client = None

    async def _model(self, token: str) -> Model | None:
        """From the cache, from a question that is under way already, or from the hub."""
        key = hashlib.sha256(token.encode()).hexdigest()
        for kept in (self._users, self._unknown):
            until, model = kept.get(key, (0.0, None))
            if time.monotonic() < until:
                kept.move_to_end(key)
                return model
        if key not in self._asking:
            if len(self._asking) >= MAX_LOOKUPS:
                raise IdentityUnavailable("too many tokens are being asked about at the JupyterHub; try again")
            task = self._asking[key] = asyncio.ensure_future(self._ask(key, token))
            task.add_done_callback(lambda task: self._asked(key, task))
        # One caller's going away is not the others'.
        return await asyncio.shield(self._asking[key])

    def _asked(self, key: str, task: asyncio.Task[Model | None]) -> None:
        self._asking.pop(key, None)
        if not task.cancelled():
            task.exception()  # is whoever's waits, and nobody may be left who does

    async def _ask(self, key: str, token: str) -> Model | None:
        model = _parse(await self._fetch(token))
        users = self._users, MAX_CACHED_USERS
        unknown = self._unknown, MAX_CACHED_UNKNOWN
        (kept, most), (other, _) = (unknown, users) if model is None else (users, unknown)
        other.pop(key, None)
        kept[key] = time.monotonic() + self._cache_seconds, model
        kept.move_to_end(key)
        while len(kept) > most:
            kept.popitem(last=False)
        return model

    async def _fetch(self, token: str) -> HTTPResponse:
        if self._client is None:
            self._client = SimpleAsyncHTTPClient(force_instance=True, max_body_size=_MAX_ANSWER_BYTES)
        request = HTTPRequest(
            self._url,
            headers={"Authorization": f"token {token}", "Accept": "application/json"},
            connect_timeout=self._timeout,
            request_timeout=self._timeout,
            # A redirect could carry the token to somebody else.
            follow_redirects=False,
        )
        try:
            return await self._client.fetch(request, raise_error=False)
        except (OSError, HTTPClientError, ValueError) as error:
            raise IdentityUnavailable(f"the JupyterHub does not answer: {type(error).__name__}") from error

    def _user(self, model: Model) -> GatewayUser:
        name, kind = model.get("name"), model.get("kind", "user")
        if kind == "service" and name not in self._services:
            raise NotAllowed("this service of the JupyterHub may not use the gateway", field="hub_services")
        if kind not in ("user", "service") or not is_name(name):
            raise NotAllowed(f"the JupyterHub's name for you cannot be used here; allowed are {NAMES}", field="name")
        if not self._scopes_suffice(model.get("scopes")):
            raise NotAllowed(f"your token lacks the scope {' or '.join(self._scopes)}", field="scopes")
        return GatewayUser(str(name), service=kind == "service")

    def _scopes_suffice(self, scopes: object) -> bool:
        """A scope without a filter includes the filtered ones (JupyterHub's "Scopes in JupyterHub")."""
        have = set(map(str, scopes)) if isinstance(scopes, list) else set()
        return not self._scopes or any(one in have or one.partition("!")[0] in have for one in self._scopes)


def _parse(response: HTTPResponse) -> Model | None:
    """The user's model; None where the hub says that there is no such token. Raises IdentityUnavailable."""
    if response.code in (401, 403):
        return None
    if response.code != 200:
        raise IdentityUnavailable(
            f"the JupyterHub answered {response.code} to the question whose a token is; try again, or check hub_api_url"
        )
    try:
        model = json.loads(response.body)
    except (ValueError, RecursionError) as error:
        raise IdentityUnavailable("the JupyterHub's answer is not JSON; check hub_api_url") from error
    if not isinstance(model, dict):
        raise IdentityUnavailable("the JupyterHub's answer is no user; check hub_api_url")
    return model
