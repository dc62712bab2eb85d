"""Authentication by a reverse proxy, which names the user in a header."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from tornado.httputil import HTTPServerRequest

from gateway_slurm._util import USER_NAMES, is_user_name
from gateway_slurm.errors import ConfigError, NotAllowed
from gateway_slurm.gateway.auth.user import GatewayUser

UNIX = "unix"
"""In the list of proxies: every client that connects by a Unix socket."""


class TrustedHeader:
    """Accepts ``header`` from the TCP peers in ``proxies`` (addresses, networks, or ``unix``).

    Raises ConfigError for an entry that is none of these.
    """

    def __init__(self, header: str, proxies: Sequence[str]) -> None:
        self._header = header
        self._unix = UNIX in proxies
        try:
            self._networks = [ipaddress.ip_network(text) for text in proxies if text != UNIX]
        except ValueError as error:
            raise ConfigError(
                f"trusted_proxies={list(proxies)}: {error}. Write addresses, networks such as 10.1.0.0/24, or {UNIX!r}"
            ) from error

    @property
    def trusts_this_host(self) -> bool:
        """Whether proxies may connect by this host's loopback address; every user of the host can then do so."""
        loopback = [ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")]
        return any(network.is_loopback or any(address in network for address in loopback) for network in self._networks)

    async def authenticate(self, request: HTTPServerRequest) -> GatewayUser | None:
        """The user in the header. Raises NotAllowed for the header from any other client: it would pose as a user."""
        values = request.headers.get_list(self._header)
        if not values:
            return None
        if not self._is_proxy(request):
            raise NotAllowed(f"the header {self._header} is not accepted from this address", field=self._header)
        if len(values) > 1 or not is_user_name(values[0]):
            message = f"the header {self._header} is not one user's name; allowed are {USER_NAMES}"
            raise NotAllowed(message, field=self._header)
        return GatewayUser(values[0])

    def trusts(self, family: object, address: object) -> bool:
        """Whether a peer with this address, as the socket module has it, is one of the proxies."""
        if family == socket.AF_UNIX:
            return self._unix
        if family not in (socket.AF_INET, socket.AF_INET6) or not isinstance(address, tuple) or not address:
            return False
        peer = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if isinstance(peer, ipaddress.IPv6Address) and peer.ipv4_mapped:
            peer = peer.ipv4_mapped
        return any(peer in network for network in self._networks)

    def _is_proxy(self, request: HTTPServerRequest) -> bool:
        """Check the peer of the connection itself: ``remote_ip`` may come from X-Forwarded-For."""
        context = getattr(request.connection, "context", None)
        return self.trusts(getattr(context, "address_family", None), getattr(context, "address", None))
