"""The gateway's HTTP server: a client without a valid token costs it neither memory nor descriptors.

A larger body is read only once the user of its request is known. Connections on which no user was known yet, and those
that wait for a next request, are counted; over a limit the oldest of them is closed, so that a new client gets in.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass, field
from http.client import responses
from typing import Any, Final, cast

from tornado.http1connection import HTTP1ServerConnection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    HTTPServerRequest,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream
from tornado.web import HTTPError

from gateway_slurm.budget import Budget, Holding
from gateway_slurm.gateway.http_errors import PlainHTTPError, message_of

FREE_BODY: Final = 16 << 10
"""Bytes of a body that is read before its user is known: the answer then reaches the client in any case."""
MAX_HEADER: Final = 32 << 10
"""Bytes of a request's headers."""
MAX_PER_USER: Final = 1024
"""Connections of a user, without websockets. Beyond them the oldest is closed."""
MAX_IDLE_PER_USER: Final = 64
"""Connections of a user that wait for a next request. Beyond them the oldest is closed."""
GRACE_SECONDS: Final = 1.0
"""A new connection is not closed for a newer one before that: many users may come at once, such as after a restart."""
RESERVE: Final = 0.25
"""Part of the process's descriptors that no client's connection gets: kernels, the store and files need them."""

Identify = Callable[[HTTPServerRequest], Awaitable[object | None]]


@dataclass(eq=False)
class Connection:
    """A client's connection until it ends, or becomes a websocket. ``user`` is the last one known on it.

    ``address`` is "" for a proxy's, and for those by a Unix socket.
    """

    stream: IOStream
    address: str
    user: str = ""
    is_idle: bool = True
    opened: float = field(default_factory=time.monotonic)
    is_open: bool = True
    deadline: asyncio.TimerHandle | None = field(default=None, repr=False)


@dataclass(eq=False)
class Door(HTTPServerConnectionDelegate):
    """Decides which connections stay open, and which bodies are read. Used on one loop.

    ``inner`` handles the requests that are let in. ``identify`` returns the user of a request or None, or raises
    HTTPError. ``is_proxy`` tells the addresses of proxies, whose connections are many users' and are not counted.
    ``request_timeout`` is the seconds that a new connection may take until the headers of its first request are here.
    """

    inner: HTTPServerConnectionDelegate
    identify: Identify
    _: KW_ONLY
    max_body_size: int
    request_timeout: float
    max_unknown: int
    max_unknown_per_address: int
    log: logging.Logger | logging.LoggerAdapter[Any]
    budget: Budget
    is_proxy: Callable[[object], bool] = lambda _address: False

    def __post_init__(self) -> None:
        self._connections: dict[IOStream, Connection] = {}  # in the order in which they were opened
        soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_descriptor = int(soft * (1 - RESERVE))

    # -- connections --

    def opened(self, stream: IOStream, address: object) -> bool:
        """A client has connected. False if its connection had to be closed."""
        made = Connection(stream, "" if self.is_proxy(address) else client_of(address))
        # The kernel gives the lowest free number: so many descriptors are in use.
        number = stream.socket.fileno()
        if number >= self._max_descriptor and not self._close_one():
            self.log.error("a connection is refused: the gateway has %d descriptors open", number)
            stream.close()
            return False
        self._connections[stream] = made
        made.deadline = asyncio.get_running_loop().call_later(self.request_timeout, self._close, made)
        unknown = [known for known in self._connections.values() if not known.user and known.address]
        of_address = [known for known in unknown if known.address == made.address]
        young = made.opened - GRACE_SECONDS
        for _ in range(len(of_address) - self.max_unknown_per_address):
            self._close_oldest([known for known in of_address if known.is_open and known.opened < young])
        for _ in range(sum(known.is_open for known in unknown) - self.max_unknown):
            self._close_unknown([known for known in unknown if known.is_open and known.opened < young])
        return True

    def admit(self, request: HTTPServerRequest, user: str) -> None:
        """The user of a request is known, and its connection is theirs from here on."""
        if found := self._connections.get(getattr(request.connection, "stream", None)):  # type: ignore[arg-type]
            if found.user == user:
                return
            found.user = user
            mine = [known for known in self._connections.values() if known.user == user and known.address]
            if len(mine) > MAX_PER_USER:
                self._close_oldest(mine)

    def on_close(self, server_conn: object) -> None:
        """The connection has ended, or is a websocket now, which is counted as one of its user's."""
        stream = cast(HTTP1ServerConnection, server_conn).stream
        if (found := self._connections.pop(stream, None)) and found.deadline is not None:
            found.deadline.cancel()

    def _close(self, connection: Connection) -> None:
        # Its entry goes at once: ``on_close`` comes in a later round of the loop.
        connection.is_open = False
        if self._connections.pop(connection.stream, None) and connection.deadline is not None:
            connection.deadline.cancel()
        connection.stream.close()

    def _close_oldest(self, candidates: list[Connection]) -> bool:
        """Close the oldest, where there is one that is idle the oldest of these."""
        oldest = next((known for known in candidates if known.is_idle), next(iter(candidates), None))
        if oldest is None:
            return False
        self._close(oldest)
        return True

    def _close_unknown(self, unknown: list[Connection]) -> bool:
        """Close the oldest connection of the address that has most of these."""
        counts = Counter(known.address for known in unknown)
        busiest = max(counts, key=lambda address: counts[address], default="")
        return self._close_oldest([known for known in unknown if known.address == busiest])

    def _close_one(self) -> bool:
        """Make room for a connection: one of an unknown client, else one that waits for a next request."""
        if self._close_unknown([known for known in self._connections.values() if not known.user]):
            return True
        idle = [known for known in self._connections.values() if known.is_idle]
        counts = Counter(known.user for known in idle)
        most = max(counts, key=lambda user: counts[user], default="")
        return self._close_oldest([known for known in idle if known.user == most])

    # -- requests --

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        """Called when a connection is open, and again when a request on it has been answered."""
        found = self._connections.get(cast(HTTP1ServerConnection, server_conn).stream)
        if found is not None:
            found.is_idle = True
            if found.user and found.address:
                mine = [known for known in self._connections.values() if known.user == found.user and known.is_idle]
                if len(mine) > MAX_IDLE_PER_USER:
                    self._close(mine[0])
        return Visit(self, self.inner.start_request(server_conn, request_conn), request_conn, found)

    async def body_holding(self, request: HTTPServerRequest, size: int) -> Holding:
        """A holding with the announced bytes of a body. Raises HTTPError where the body must not be read."""
        user = await self.identify(request)
        if user is None:
            reason = "the user of this request is not known, and its body is too large to be read without that"
            raise PlainHTTPError(403, reason)
        holding = self.budget.holding(str(getattr(user, "username", "")), "request")
        if not holding.try_add(size):
            holding.close()
            raise PlainHTTPError(429, holding.refusal())
        return holding


@dataclass(eq=False)
class Visit(HTTPMessageDelegate):
    """One request. It passes to ``inner``, the application, unless it is refused by its headers."""

    door: Door
    inner: HTTPMessageDelegate
    request_conn: HTTPConnection
    connection: Connection | None
    is_refused: bool = False
    holding: Holding | None = None

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        """Called with the headers; the body is read when the result is done."""
        if self.connection is not None:
            self.connection.is_idle = False
            if self.connection.deadline is not None:
                self.connection.deadline.cancel()
        size = announced_size(headers)
        if size is not None and size > self.door.max_body_size:
            self._refuse(413, f"the body has {size} bytes, and at most {self.door.max_body_size} are read")
            return None
        if size is not None and size <= FREE_BODY:
            return self.inner.headers_received(start_line, headers)
        # A body in chunks counts as the largest that is read.
        counted = self.door.max_body_size if size is None else size
        return self._identify_first(cast(RequestStartLine, start_line), headers, counted)

    async def _identify_first(self, start_line: RequestStartLine, headers: HTTPHeaders, size: int) -> None:
        request = HTTPServerRequest(connection=self.request_conn, start_line=start_line, headers=headers)
        try:
            self.holding = await self.door.body_holding(request, size)
        except HTTPError as error:
            self._refuse(error.status_code, message_of(error))
            return
        if (result := self.inner.headers_received(start_line, headers)) is not None:
            await result

    def _refuse(self, status: int, reason: str) -> None:
        """Answer, and close the connection without reading the body."""
        self.is_refused = True
        body = json.dumps({"message": reason, "reason": responses.get(status, "")}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        start = ResponseStartLine("HTTP/1.1", status, responses.get(status, "Refused"))
        # A client that is gone already needs no answer; the stream keeps the error.
        self.request_conn.write_headers(start, HTTPHeaders(headers), body).add_done_callback(
            lambda sent: None if sent.cancelled() else sent.exception()
        )
        self.request_conn.finish()

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        return None if self.is_refused else self.inner.data_received(chunk)

    def finish(self) -> None:
        if not self.is_refused:
            self.inner.finish()
        self._release()

    def _release(self) -> None:
        if self.holding is not None:
            self.holding.close()
            self.holding = None

    def on_connection_close(self) -> None:
        self._release()
        if not self.is_refused:
            self.inner.on_connection_close()


class GatewayHTTPServer(HTTPServer):
    """tornado's server with a door. ``Door.opened`` sees each connection before a byte of it is read."""

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        door = self.request_callback
        if not isinstance(door, Door) or door.opened(stream, address):
            super().handle_stream(stream, address)

    def on_close(self, server_conn: object) -> None:
        super().on_close(server_conn)
        if isinstance(self.request_callback, Door):
            self.request_callback.on_close(server_conn)


def announced_size(headers: HTTPHeaders) -> int | None:
    """Bytes of a request's body by its headers; None where they do not say. Tornado refuses what is malformed."""
    if "Transfer-Encoding" in headers:
        return None
    text = headers.get("Content-Length", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def client_of(address: object) -> str:
    """The client that a peer's address stands for, "" for a Unix socket; in IPv6 a client has a whole /64 network."""
    if not isinstance(address, tuple) or not address:
        return ""
    peer = ipaddress.ip_address(str(address[0]).partition("%")[0])
    if isinstance(peer, ipaddress.IPv6Address):
        if peer.ipv4_mapped:
            return str(peer.ipv4_mapped)
        return str(ipaddress.ip_network((peer, 64), strict=False))
    return str(peer)
