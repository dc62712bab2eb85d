"""Who is asking: tokens of the gateway's own, a JupyterHub's, or a reverse proxy's word, in any combination.

Each way is a class with ``async def authenticate(handler) -> GatewayUser | None``, which says who a request
comes from, or that it does not know; it raises NotAllowed for a request that is to be refused, and
IdentityUnavailable when it could not find out. HTTP statuses are chosen here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from jupyter_server.auth import IdentityProvider, User
from tornado.httputil import HTTPServerRequest
from tornado.web import HTTPError, RequestHandler
from traitlets import Bool, CFloat, Enum, List, TraitError, Unicode, default, validate

from gateway_slurm.errors import ConfigError, IdentityUnavailable, NotAllowed
from gateway_slurm.gateway.auth.hub import HubTokens
from gateway_slurm.gateway.auth.proxy import TrustedHeader
from gateway_slurm.gateway.auth.tokens import TokenFile, UserTokens, request_token, take_url_token
from gateway_slurm.gateway.auth.user import GatewayUser, is_name, kernel_owner

__all__ = ["Authenticator", "GatewayIdentityProvider", "GatewayUser", "is_name", "kernel_owner"]

_NO_LOGIN = "log in with a token in the Authorization header; the gateway has no login page"


class Authenticator(Protocol):
    """A way to know users."""

    async def authenticate(self, handler: RequestHandler) -> GatewayUser | None:
        """Who the request comes from, or None. Raises NotAllowed and IdentityUnavailable."""


class GatewayIdentityProvider(IdentityProvider):
    """Knows users by tokens, a hub or a proxy; sets no cookies and has no login page."""

    tokens_file = Unicode(
        "",
        config=True,
        help="""Path of the file with the hashes of the users' tokens, which ``jupyter slurm token`` writes;
        only the gateway's user may read it. Default: none, no tokens of the gateway's own.""",
    )
    hub_api_url = Unicode(
        config=True,
        help="""URL of a JupyterHub's API, such as ``https://hub.example/hub/api``, which says whose a token
        is. Default: JUPYTERHUB_API_URL, which a hub sets for its services; empty: no hub is asked.""",
    )
    hub_timeout = CFloat(
        10.0,
        config=True,
        help="""Seconds that the hub may take; then the request fails with status 503, and its client may
        repeat it.""",
    )
    hub_cache_seconds = CFloat(
        60.0,
        config=True,
        help="""Seconds for which the hub's answer about a token is used again; as long a token that was
        revoked still works.""",
    )
    hub_scopes = List(
        Unicode(),
        config=True,
        help="""Scopes of which a hub's token must have one, such as ``access:services!service=NAME``; else a
        token that its user gave to another service will do here, too. Default: those that a hub sets for
        its services (JUPYTERHUB_OAUTH_ACCESS_SCOPES), or none.""",
    )
    hub_services = List(
        Unicode(),
        config=True,
        help="""Names of hub services that may start kernels for other users. Default: none; a service's
        token is refused.""",
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
        help="""Addresses and networks of the proxies whose ``trusted_header`` counts, ``unix`` for a Unix
        socket. From anybody else a request with the header is refused.""",
    )
    admins = List(
        Unicode(),
        config=True,
        help="""Users who may see and end everybody's kernels, besides those with an admin's token. A hub's
        admins are not among them by themselves.""",
    )
    allow_token_in_url = Bool(
        False,
        config=True,
        help="""Accept ``?token=`` when a websocket is opened, for clients that can set no headers there:
        browsers and VS Code. A proxy before the gateway may write it to its log.""",
    )
    token = Enum([""], "", config=True, help="Not used: there is no token for everybody.")
    updatable_fields = List(Unicode(), [], help="Not used: the gateway keeps nothing about users.")

    @default("hub_api_url")
    def _default_hub_api_url(self) -> str:
        return os.environ.get("JUPYTERHUB_API_URL", "")

    @default("hub_scopes")
    def _default_hub_scopes(self) -> list[str]:
        scopes = json.loads(os.environ.get("JUPYTERHUB_OAUTH_ACCESS_SCOPES") or "[]")
        return [str(scope) for scope in scopes]

    @default("token")
    def _token_default(self) -> str:
        return ""

    @default("updatable_fields")
    def _default_updatable_fields(self) -> list[str]:
        return []

    @validate("updatable_fields")
    def _validate_updatable_fields(self, proposal: Any) -> list[str]:
        if proposal["value"]:
            raise TraitError("GatewayIdentityProvider.updatable_fields must be empty: nothing is kept about users")
        return []

    @validate("hub_api_url")
    def _valid_url(self, proposal: Any) -> str:
        url = str(proposal["value"])
        if url and not url.startswith(("http://", "https://")):
            raise TraitError(f"GatewayIdentityProvider.hub_api_url must begin with http:// or https://, not {url!r}")
        return url

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The user of each request that is being answered; jupyter_server asks more than once.
        self._users: WeakKeyDictionary[RequestHandler, GatewayUser] = WeakKeyDictionary()
        self._complaint = ""
        self._token_file = TokenFile(Path(self.tokens_file).expanduser()) if self.tokens_file else None
        self._hub = self._make_hub() if self.hub_api_url else None
        self.authenticators: list[Authenticator] = self._make_authenticators()

    def _make_hub(self) -> HubTokens:
        return HubTokens(
            self.hub_api_url,
            timeout=self.hub_timeout,
            cache_seconds=self.hub_cache_seconds,
            scopes=self.hub_scopes,
            services=self.hub_services,
        )

    def _make_authenticators(self) -> list[Authenticator]:
        """In the order in which they are asked; the proxy first, since its header is never to be overlooked."""
        ways: list[Authenticator] = []
        if self.trusted_header:
            ways.append(TrustedHeader(self.trusted_header, self.trusted_proxies))
        if self._token_file is not None:
            ways.append(UserTokens(self._token_file, self._complain))
        if self._hub is not None:
            ways.append(self._hub)
        return ways

    def close(self) -> None:
        """Close the connections to the hub; called by the application at its end."""
        if self._hub is not None:
            self._hub.close()

    def _complain(self, complaint: str) -> None:
        """Once for each thing that is wrong, not once a request."""
        if complaint != self._complaint:
            self.log.error("%s", complaint)
        self._complaint = complaint

    # -- what jupyter_server asks ---------------------------------------------------------------

    async def get_user(self, handler: RequestHandler) -> User | None:
        """Who a request comes from; None lets jupyter_server refuse it where a user is needed."""
        known = self._users.get(handler)
        if known is not None:
            return known
        self._take_url_token(handler.request)
        try:
            user, way = await self._authenticate(handler)
        except NotAllowed as error:
            raise HTTPError(403, str(error)) from None
        except IdentityUnavailable as error:
            raise HTTPError(503, str(error)) from None
        if user is None or way is None:
            return None
        if isinstance(way, TrustedHeader):
            self._refuse_other_sites(handler)
        user.admin = user.admin or user.username in self.admins
        self._users[handler] = user
        return user

    async def _authenticate(self, handler: RequestHandler) -> tuple[GatewayUser | None, Authenticator | None]:
        for way in self.authenticators:
            user = await way.authenticate(handler)
            if user is not None:
                return user, way
        return None, None

    def _take_url_token(self, request: HTTPServerRequest) -> None:
        """Where it is accepted a token in the URL moves to where all others are."""
        token = take_url_token(request)
        if token is None:
            return
        if not self.allow_token_in_url or request.headers.get("Upgrade", "").lower() != "websocket":
            raise HTTPError(403, "a token in a URL is not accepted: send it as 'Authorization: token …'")
        if request_token(request) is None:
            request.headers["Authorization"] = f"token {token}"

    def _refuse_other_sites(self, handler: RequestHandler) -> None:
        """What a proxy knows may come from its cookie, which a browser sends for a page of another site, too.

        Browsers name that site in Origin for whatever changes something, and for websockets.
        """
        if handler.request.method != "OPTIONS" and not handler.check_origin(None):  # type: ignore[attr-defined]
            raise HTTPError(403, "a page of another site may not use the gateway")

    def is_token_authenticated(self, handler: RequestHandler) -> bool:
        """Whether the request can be no other site's forgery, so that it needs no _xsrf cookie: all with a user."""
        return handler in self._users

    def get_token(self, handler: RequestHandler) -> str | None:
        return request_token(handler.request)

    async def get_user_token(self, handler: RequestHandler) -> User | None:
        """As ``get_user``: nobody is known by anything else."""
        return await self.get_user(handler)

    def get_user_cookie(self, handler: RequestHandler) -> None:
        """Nobody: there are no cookies."""

    def set_login_cookie(self, handler: RequestHandler, user: User) -> None:
        """Set none."""

    def clear_login_cookie(self, handler: RequestHandler) -> None:
        """Clear none."""

    def process_login_form(self, handler: RequestHandler) -> User | None:
        raise HTTPError(403, _NO_LOGIN)

    @property
    def login_available(self) -> bool:
        return False

    @property
    def logout_available(self) -> bool:
        return False

    def validate_security(self, app: Any, ssl_options: dict[str, Any] | None = None) -> None:
        """Called before the server listens. Raises ConfigError where nobody could get in, or a file is not safe."""
        super().validate_security(app, ssl_options)
        if not self.authenticators:
            raise ConfigError(
                "nobody could use the gateway: set GatewayIdentityProvider.tokens_file, hub_api_url, or trusted_header"
            )
        if self.trusted_header and not self.trusted_proxies:
            raise ConfigError("GatewayIdentityProvider.trusted_header needs trusted_proxies: who may send it?")
        if any(isinstance(way, TrustedHeader) and way.trusts_this_machine for way in self.authenticators):
            self.log.warning(
                "whoever can log in on this machine can name any user in the header %s: let the proxy use a Unix "
                "socket (SlurmGatewayApp.sock) and set trusted_proxies = ['unix']",
                self.trusted_header,
            )
        if self._token_file is not None and not self._token_file.records():
            self.log.warning("there are no tokens in %s; make one: jupyter slurm token add", self.tokens_file)
        if self._hub is not None and not self.hub_scopes:
            self.log.warning("any token of the JupyterHub's is accepted: set GatewayIdentityProvider.hub_scopes")
        if not ssl_options and not app.sock and app.ip not in ("localhost", "127.0.0.1", "::1"):
            self.log.warning("requests come in the clear, unless a proxy before the gateway speaks HTTPS")
