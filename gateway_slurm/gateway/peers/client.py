"""Requests to another gateway, over HTTP(S), signed by this gateway, and without the client's credentials."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode, urlsplit

from tornado.httpclient import HTTPClientError, HTTPRequest, HTTPResponse
from tornado.httputil import HTTPServerRequest
from tornado.simple_httpclient import HTTPStreamClosedError, HTTPTimeoutError, SimpleAsyncHTTPClient
from tornado.websocket import WebSocketClientConnection, WebSocketError, websocket_connect

from gateway_slurm.errors import ConfigError, GatewaySlurmError, IdentityUnavailable
from gateway_slurm.gateway.auth.peer import PeerProof
from gateway_slurm.gateway.auth.user import GatewayUser
from gateway_slurm.gateway.peers.directory import Peer

FORWARDED_BY: Final = "Gateway-Slurm-Forwarded-By"
"""The header of a forwarded request, with the id of the gateway that forwarded it. It is not forwarded again."""

CONNECT_SECONDS: Final = 3.0
MAX_ANSWER_SECONDS: Final = 300.0
"""How long a restart or the end of a kernel may take at the other gateway."""
UPGRADE_SECONDS: Final = 15.0
"""How long a websocket may take to open. It does not wait for the kernel."""
_MAX_REQUESTS: Final = 1000
_UNPROVEN: Final = "its answer has no proof that it is a gateway of this deployment"
_MAX_MESSAGE_BYTES: Final = 1 << 30
"""Of one message or answer. The kernel's own gateway applies the real limit."""

# Not the client's credentials, nor Origin: this gateway has checked them. Not Host, which is the peer's own.
_HEADERS: Final = ("Content-Type", "Accept", "User-Agent")


class PeerUnreachable(GatewaySlurmError):
    """The other gateway did not answer. With ``sent`` it may have received the request, and acted on it."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


@dataclass(frozen=True, kw_only=True)
class ForwardedRequest:
    """A client's request in the form in which it is sent to a peer."""

    method: str
    path: str
    """Below the base URL, with the query. A token is in a header instead."""
    headers: Mapping[str, str]
    user: GatewayUser
    body: bytes | None = None

    @classmethod
    def of(cls, request: HTTPServerRequest, user: GatewayUser, base_url: str, server_id: str) -> ForwardedRequest:
        """``user``: whom this gateway has authenticated."""
        headers = {name: request.headers[name] for name in _HEADERS if name in request.headers}
        headers |= {FORWARDED_BY: server_id or "gateway", "X-Forwarded-For": str(request.remote_ip)}
        # Authentication has removed the token from these.
        query = urlencode([(name, value) for name, values in request.query_arguments.items() for value in values])
        path = request.path[len(base_url) :].lstrip("/")
        return cls(
            method=request.method or "GET",
            path=f"{path}?{query}" if query else path,
            headers=headers,
            user=user,
            body=request.body if request.method in ("POST", "PUT", "PATCH") else None,
        )

    def get(self, path: str) -> ForwardedRequest:
        """A GET request for another path, of the same user."""
        return ForwardedRequest(method="GET", path=path, headers=self.headers, user=self.user)


class PeerClient:
    """Sends requests to peers, signed by ``proof``.

    ``ca_file`` has the authorities for their certificates; "" for the system's authorities. Raises ConfigError for a
    file that cannot be used. Its owner calls ``close``, on the loop that it was used on.
    """

    def __init__(self, proof: PeerProof, ca_file: str = "") -> None:
        self._proof = proof
        try:
            self._tls = ssl.create_default_context(cafile=ca_file or None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"SlurmGatewayApp.peer_cafile={ca_file!r} cannot be used: {error}") from error
        self._client: SimpleAsyncHTTPClient | None = None

    async def send(
        self, peer: Peer, forwarded: ForwardedRequest, *, timeout: float = MAX_ANSWER_SECONDS
    ) -> HTTPResponse:
        """The peer's answer, whatever its status. Raises PeerUnreachable after ``timeout`` seconds or earlier."""
        if self._client is None:
            self._client = SimpleAsyncHTTPClient(
                force_instance=True,
                max_clients=_MAX_REQUESTS,
                max_buffer_size=_MAX_MESSAGE_BYTES,
                max_body_size=_MAX_MESSAGE_BYTES,
            )
        url, headers = self._signed(peer, forwarded)
        request = HTTPRequest(
            url,
            method=forwarded.method,
            headers=headers,
            body=forwarded.body,
            connect_timeout=min(CONNECT_SECONDS, timeout),
            request_timeout=timeout,
            ssl_options=self._tls,
            follow_redirects=False,  # a redirect would carry the credentials to another host
            decompress_response=False,
            allow_nonstandard_methods=True,
        )
        try:
            answer = await self._client.fetch(request, raise_error=False)
        except HTTPTimeoutError as error:
            raise PeerUnreachable(f"{peer.url}: {error}", sent="connecting" not in str(error)) from error
        except (HTTPStreamClosedError, HTTPClientError) as error:
            raise PeerUnreachable(f"{peer.url}: {error}", sent=True) from error
        except (OSError, ValueError) as error:
            raise PeerUnreachable(f"{peer.url}: {error}", sent=False) from error
        if not self._proof.is_answer(headers, answer.headers):
            raise PeerUnreachable(f"{peer.url}: {_UNPROVEN} (status {answer.code})", sent=True)
        return answer

    def _signed(self, peer: Peer, forwarded: ForwardedRequest) -> tuple[str, dict[str, str]]:
        """The URL and the headers of a request. Raises PeerUnreachable before the store is open."""
        url = _url(peer, forwarded.path)
        parts = urlsplit(url)
        uri = f"{parts.path}?{parts.query}" if parts.query else parts.path
        try:
            proof = self._proof.sign(peer.server_id, forwarded.method, uri, forwarded.user, forwarded.body)
        except IdentityUnavailable as error:
            raise PeerUnreachable(f"{peer.url}: {error}", sent=False) from error
        return url, {**forwarded.headers, **proof}

    async def websocket(
        self, peer: Peer, forwarded: ForwardedRequest, subprotocols: list[str]
    ) -> WebSocketClientConnection:
        """A websocket that the peer has accepted.

        Raises HTTPClientError with the status of a refusal, and PeerUnreachable.
        """
        url, headers = self._signed(peer, forwarded)
        request = HTTPRequest(
            "ws" + url.removeprefix("http"),
            headers=headers,
            connect_timeout=CONNECT_SECONDS,
            request_timeout=UPGRADE_SECONDS,
            ssl_options=self._tls,
        )
        try:
            connection = await websocket_connect(
                request, subprotocols=subprotocols or None, max_message_size=_MAX_MESSAGE_BYTES
            )
        except HTTPClientError as error:
            if error.code == 599:
                raise PeerUnreachable(f"{peer.url}: {error}", sent=False) from error
            raise
        except (OSError, ValueError, WebSocketError, asyncio.IncompleteReadError) as error:
            raise PeerUnreachable(f"{peer.url}: {error}", sent=False) from error
        if not self._proof.is_answer(headers, connection.headers or {}):
            connection.close()
            raise PeerUnreachable(f"{peer.url}: {_UNPROVEN}", sent=True)
        assert connection.protocol is not None
        stream = connection.protocol.stream
        assert stream is not None
        stream.max_buffer_size = _MAX_MESSAGE_BYTES
        stream.set_nodelay(True)
        return connection

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def _url(peer: Peer, path: str) -> str:
    return f"{peer.url.rstrip('/')}/{path}"
