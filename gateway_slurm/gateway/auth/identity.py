"""Authentication of requests: by the gateway's own tokens, a JupyterHub and a reverse proxy, in any combination.

Each authenticator has ``async def authenticate(handler) -> GatewayUser | None``. It returns the user of a request, or
None if it does not know the user; it raises NotAllowed for a request that must be refused, and IdentityUnavailable
when it cannot tell. This module chooses the HTTP statuses.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

from jupyter_server.auth import IdentityProvider, User
from tornado.httputil import HTTPServerRequest
from tornado.web import HTTPError, RequestHandler
from traitlets import Bool, CFloat, Enum, List, TraitError, Unicode, default, validate

from gateway_slurm.errors import ConfigError, IdentityUnavailable, NotAllowed
from gateway_slurm.events import Events
from gateway_slurm.gateway.auth.hub import HubTokens
from gateway_slurm.gateway.auth.peer import ANSWER_PROOF, PeerProof
from gateway_slurm.gateway.auth.proxy import TrustedHeader
from gateway_slurm.gateway.auth.tokens import PREFIX, TokenFile, UserTokens, request_token, take_url_token
from gateway_slurm.gateway.auth.user import GatewayUser

# Events of refused logins in so many seconds; those beyond are counted with the next one.
MAX_REFUSALS, REFUSAL_SECONDS = 30, 60.0
IDENTITY_THREADS: Final = 4
HOW_TO_SEND: Final = "send it as 'Authorization: token …' (GatewayClient.auth_token of a Jupyter server)"
# Schemes that clients send by mistake: any other word may be the token itself, which the answer must not repeat.
OTHER_SCHEMES: Final = frozenset({"basic", "digest", "negotiate", "none", "ntlm"})


def http_url(trait: str, url: str) -> str:
    """``url``, which may be empty. Raises TraitError for a URL of another scheme."""
    if url and not url.startswith(("http://", "https://")):
        raise TraitError(f"{trait} must begin with http:// or https://, not {url!r}")
    return url


class RefusedLogins:
    """Reports requests whose token or header was refused, at most MAX_REFUSALS a minute, as events."""

    def __init__(self) -> None:
        self.events: Events | None = None
        self._seen: WeakSet[HTTPServerRequest] = WeakSet()
        self._recent: deque[float] = deque(maxlen=MAX_REFUSALS)
        self._suppressed = 0

    def report(self, request: HTTPServerRequest, reason: str) -> None:
        """Report a request, once."""
        if self.events is None or request in self._seen:
            return
        self._seen.add(request)
        now = time.monotonic()
        if len(self._recent) == MAX_REFUSALS and now - self._recent[0] < REFUSAL_SECONDS:
            self._suppressed += 1
            return
        self._recent.append(now)
        address, suppressed, self._suppressed = request.remote_ip, self._suppressed or None, 0
        self.events.emit("login_refused", address=address, reason=reason, suppressed=suppressed)


class GatewayIdentityProvider(IdentityProvider):
    """Knows users by tokens, a JupyterHub or a proxy. It sets no cookies and has no login page."""

    tokens_file = Unicode(
        "",
        config=True,
        help="""Path of the file with the hashes of the users' tokens, which ``jupyter slurm token`` writes;
        only the gateway's user may read it. Default: none; the gateway has no tokens of its own.""",
    )
    hub_api_url = Unicode(
        config=True,
        help="""URL of a JupyterHub's API, such as ``https://hub.example/hub/api``, which knows the user of a
        token. Default: JUPYTERHUB_API_URL, which a hub sets for its services; if empty, no hub is asked.""",
    )
    hub_timeout = CFloat(
        10.0,
        config=True,
        help="""Seconds that the hub may take to answer. Then the request fails with status 503, and the client
        may repeat it.""",
    )
    hub_cache_seconds = CFloat(
        60.0,
        config=True,
        help="""Seconds for which the gateway uses the hub's answer about a token again. A revoked token still
        works for as long.""",
    )
    hub_scopes = List(
        Unicode(),
        config=True,
        help="""Scopes of which a hub's token must have one, such as ``access:services!service=NAME``. Without
        them a token that its user gave to another service works here, too. Default: those that a hub sets for
        its services (JUPYTERHUB_OAUTH_ACCESS_SCOPES), or none.""",
    )
    hub_services = List(
        Unicode(),
        config=True,
        help="""Names of hub services that may start kernels for other users. Default: none; the tokens of
        services are refused.""",
    )
    trusted_header = Unicode(
        "",
        config=True,
        help="""Header in which a reverse proxy names the user, such as ``X-Remote-User``; the proxy must
        remove it from what clients send. Default: none.""",
    )
    trusted_proxies = List(
        Unicode(),
        config=True,
        help="""Addresses and networks of the proxies that may send ``trusted_header``; ``unix`` for a Unix
        socket. A request with the header from any other address is refused.""",
    )
    admins = List(
        Unicode(),
        config=True,
        help="""Users who may see and end all users' kernels, besides those with an admin's token. A hub's
        admins must be named here, too.""",
    )
    metrics_users = List(
        Unicode(),
        config=True,
        help="""Users who may read ``/metrics``, besides admins, such as the name of Prometheus's token. Others are
        refused, unless ``ServerApp.authenticate_prometheus`` is False.""",
    )
    allow_token_in_url = Bool(
        False,
        config=True,
        help="""Accept ``?token=`` when a websocket is opened, for clients that can set no headers there:
        browsers and VS Code. A proxy in front of the gateway may write the token to its log.""",
    )
    token = Enum([""], "", config=True, help="Not used: each user has a token of their own.")
    updatable_fields = List(Unicode(), [], help="Not used: the gateway stores no user profiles.")

    @default("hub_api_url")
    def _default_hub_api_url(self) -> str:
        return os.environ.get("JUPYTERHUB_API_URL", "")

    @default("hub_scopes")
    def _default_hub_scopes(self) -> list[str]:
        scopes = json.loads(os.environ.get("JUPYTERHUB_OAUTH_ACCESS_SCOPES") or "[]")
        return [str(scope) for scope in scopes]

    @validate("updatable_fields")
    def _validate_updatable_fields(self, proposal: Any) -> list[str]:
        if proposal["value"]:
            raise TraitError(
                "GatewayIdentityProvider.updatable_fields must be empty: the gateway stores no user profiles"
            )
        return []

    @validate("hub_api_url")
    def _valid_url(self, proposal: Any) -> str:
        return http_url("GatewayIdentityProvider.hub_api_url", proposal["value"])

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The user of each request that is being answered; jupyter_server asks more than once.
        self._users: WeakKeyDictionary[RequestHandler, GatewayUser] = WeakKeyDictionary()
        self._unknown: WeakKeyDictionary[RequestHandler, str] = WeakKeyDictionary()
        self._refusals = RefusedLogins()
        # Called with each request whose user is known, and the user's name.
        self.on_user: Callable[[HTTPServerRequest, str], None] = lambda _request, _user: None
        # Of its own: what others run in threads, such as reading kernelspecs, does not hold up requests.
        self._threads = ThreadPoolExecutor(IDENTITY_THREADS, "identity")
        self.peers: PeerProof | None = None
        """Checks the requests that other gateways forward. The application sets it."""
        self._token_file = TokenFile(Path(self.tokens_file).expanduser()) if self.tokens_file else None
        self._hub: HubTokens | None = None
        # In the order in which they are asked. The proxy is first: its header is never ignored.
        self.authenticators: list[TrustedHeader | UserTokens | HubTokens] = []
        if self.trusted_header:
            self.authenticators.append(TrustedHeader(self.trusted_header, self.trusted_proxies))
        if self._token_file is not None:
            self.authenticators.append(UserTokens(self._token_file, self.log, self._threads))
        if self.hub_api_url:
            self._hub = HubTokens(
                self.hub_api_url,
                timeout=self.hub_timeout,
                cache_seconds=self.hub_cache_seconds,
                scopes=self.hub_scopes,
                services=self.hub_services,
            )
            self.authenticators.append(self._hub)

    def may_read_metrics(self, user: Any) -> bool:
        """Whether this user, if there is one, may read ``/metrics``."""
        return isinstance(user, GatewayUser) and (user.admin or user.username in self.metrics_users)

    def report_to(self, events: Events) -> None:
        """Report refused logins as events."""
        self._refusals.events = events

    def close(self) -> None:
        """Close the connections to the hub, and the threads. The application calls this at its end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._hub is not None:
            self._hub.close()

    # -- Called by jupyter_server --

    async def get_user(self, handler: RequestHandler) -> User | None:
        """The user of a request; with None jupyter_server refuses the request where a user is needed."""
        if handler in self._users:
            return self._users[handler]
        user = await self.find_user(handler.request, lambda: self._refuse_other_sites(handler))
        if user is not None:
            self._users[handler] = user
            for name, value in self.answer_headers(handler.request).items():
                handler.set_header(name, value)
        elif handler not in self._unknown:
            self._unknown[handler] = reason = await self._why_unknown(handler.request)
            if request_token(handler.request) is not None:
                self._refusals.report(handler.request, reason)
        return user

    async def find_user(
        self, request: HTTPServerRequest, check_header: Callable[[], None] = lambda: None
    ) -> GatewayUser | None:
        """The user of a request of which only the headers are here. Raises HTTPError 403 or 503.

        ``check_header`` is called for a user whom a proxy has named, and may raise HTTPError.
        """
        try:
            self._take_url_token(request)
            user = await self._authenticate(request, check_header)
        except NotAllowed as error:
            self._refusals.report(request, str(error))
            raise HTTPError(403, str(error)) from None
        except IdentityUnavailable as error:
            raise HTTPError(503, str(error)) from None
        if user is not None:
            user.admin = user.admin or user.username in self.admins
            self.on_user(request, user.username)
        return user

    async def find_user_again(self, request: HTTPServerRequest) -> GatewayUser | None:
        """``find_user`` for an earlier request, without a cache. It reports no refused login."""
        if self._hub is not None:
            self._hub.expire(request)
        try:
            return await self._authenticate(request, lambda: None)
        except NotAllowed as error:
            raise HTTPError(403, str(error)) from None
        except IdentityUnavailable as error:
            raise HTTPError(503, str(error)) from None

    def is_proxy(self, address: object) -> bool:
        """Whether a TCP peer, as the socket module has its address, is one of ``trusted_proxies``."""
        family = socket.AF_INET6 if isinstance(address, tuple) and len(address) > 2 else socket.AF_INET
        return any(isinstance(known, TrustedHeader) and known.trusts(family, address) for known in self.authenticators)

    def answer_headers(self, request: HTTPServerRequest) -> dict[str, str]:
        """The headers with which an answer proves this gateway to another one; none for a client."""
        proof = self.peers.answer_to(request) if self.peers is not None else ""
        return {ANSWER_PROOF: proof} if proof else {}

    def refusal_of(self, handler: RequestHandler) -> str:
        """Why the request's user is not known, for the answer; "" where that is not the case."""
        return self._unknown.get(handler, "")

    async def _why_unknown(self, request: HTTPServerRequest) -> str:
        """Why no authenticator knows the user. Only a client with the whole token learns that it has expired."""
        token = request_token(request)
        if token is None:
            scheme = request.headers.get("Authorization", "").partition(" ")[0]
            if scheme.lower() in OTHER_SCHEMES:
                return f"the scheme {scheme} of the header Authorization is not accepted: {HOW_TO_SEND}"
            return f"the request has no token: {HOW_TO_SEND}"
        if not token.startswith(PREFIX) or self._token_file is None:
            origin = "the JupyterHub knows" if self._hub is not None else "this gateway gave"
            return f"the token is none that {origin}: copy it again, or ask the gateway's admin for one"
        expired = await asyncio.get_running_loop().run_in_executor(self._threads, self._token_file.expired_since, token)
        if expired is not None:
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(expired))
            return f"the token expired at {when}: ask the gateway's admin for a new one"
        return (
            "the gateway does not know this token: it was removed, is another gateway's, or was not copied as a whole"
        )

    async def _authenticate(self, request: HTTPServerRequest, check_header: Callable[[], None]) -> GatewayUser | None:
        if self.peers is not None and (forwarded := await self.peers.authenticate(request)) is not None:
            return forwarded
        for authenticator in self.authenticators:
            user = await authenticator.authenticate(request)
            if user is not None:
                if isinstance(authenticator, TrustedHeader):
                    check_header()
                return user
        return None

    def _take_url_token(self, request: HTTPServerRequest) -> None:
        """Move a token from the URL to the header, where it is accepted. Raises NotAllowed where it is not."""
        token = take_url_token(request)
        if token is None:
            return
        if not self.allow_token_in_url or request.headers.get("Upgrade", "").lower() != "websocket":
            raise NotAllowed("a token in a URL is not accepted: send it as 'Authorization: token …'")
        if request_token(request) is None:
            request.headers["Authorization"] = f"token {token}"

    def _refuse_other_sites(self, handler: RequestHandler) -> None:
        """Raise HTTPError 403 for a request from a page of another site.

        A proxy may know the user by a cookie, which a browser also sends for a page of another site. Browsers name
        that site in Origin for all requests that change something, and for websockets.
        """
        if handler.request.method != "OPTIONS" and not handler.check_origin(None):  # type: ignore[attr-defined]
            raise HTTPError(403, "a page of another site may not use the gateway")

    def is_token_authenticated(self, handler: RequestHandler) -> bool:
        """Whether the request needs no _xsrf cookie: true for all with a user, which no other site can forge."""
        return handler in self._users

    def get_token(self, handler: RequestHandler) -> str | None:
        return request_token(handler.request)

    async def get_user_token(self, handler: RequestHandler) -> User | None:
        """As ``get_user``: every user is known by a token or a header."""
        return await self.get_user(handler)

    def get_user_cookie(self, handler: RequestHandler) -> None:
        """None, and the next two methods do nothing: there are no cookies."""

    def set_login_cookie(self, handler: RequestHandler, user: User) -> None: ...

    def clear_login_cookie(self, handler: RequestHandler) -> None: ...

    def process_login_form(self, handler: RequestHandler) -> User | None:
        raise HTTPError(403, "log in with a token in the Authorization header; the gateway has no login page")

    login_available = logout_available = False

    def validate_security(self, app: Any, ssl_options: dict[str, Any] | None = None) -> None:
        """Called before the server listens. Raises ConfigError if no user could be known, or a file is not safe."""
        super().validate_security(app, ssl_options)
        if not self.authenticators:
            raise ConfigError(
                "no user could use the gateway: set GatewayIdentityProvider.tokens_file, hub_api_url, or trusted_header"
            )
        if self.trusted_header and not self.trusted_proxies:
            raise ConfigError(
                "GatewayIdentityProvider.trusted_header needs trusted_proxies, the addresses that may send it"
            )
        if any(isinstance(proxy, TrustedHeader) and proxy.trusts_this_host for proxy in self.authenticators):
            self.log.warning(
                "every user of this host can name any user in the header %s: let the proxy use a Unix "
                "socket (SlurmGatewayApp.sock) and set trusted_proxies = ['unix']",
                self.trusted_header,
            )
        if self._token_file is not None and not self._token_file.records():
            self.log.warning("there are no tokens in %s; make one: jupyter slurm token add", self.tokens_file)
        if self._hub is not None and not self.hub_scopes:
            self.log.warning("any token of the JupyterHub's is accepted: set GatewayIdentityProvider.hub_scopes")
        if not ssl_options and not app.sock and app.ip not in ("localhost", "127.0.0.1", "::1"):
            self.log.warning("requests are not encrypted, unless a proxy in front of the gateway speaks HTTPS")
