"""The URL of a cluster: Slurm's commands on this machine, commands over SSH on a login node, or the REST interface."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Literal

from gateway_slurm._util import is_user_name

URL_FORMS: Final = "'local:', 'ssh://[user@]login[:port]' or 'rest+http(s)://host:port'"

_SCHEMES: Final = {"local", "ssh", "rest+http", "rest+https"}
# Includes names in ~/.ssh/config, which may hold underscores.
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?", re.ASCII)
_AUTHORITY: Final = re.compile(r"(?:(?P<user>.*)@)?(?:\[(?P<ip>[^\]]*)\]|(?P<host>[^:]*))(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class ClusterUrl:
    """A parsed ``SlurmService.cluster``; ``str()`` gives its text.

    ``host`` is a name, or an IP address without brackets; empty for ``local``. In an SSH URL ``port`` is None and
    ``user`` is empty if ``~/.ssh/config`` and its defaults decide; a REST URL always has a port.
    """

    kind: Literal["local", "ssh", "rest"]
    host: str = ""
    port: int | None = None
    user: str = ""
    tls: bool = False
    """Whether the REST interface is used over HTTPS; False for the other kinds."""

    def __str__(self) -> str:
        scheme = {"local": "local:", "ssh": "ssh://"}.get(self.kind, f"rest+{self.http_scheme}://")
        user = f"{self.user}@" if self.user else ""
        return f"{scheme}{user}{host_and_port(self.host, self.port)}"

    @property
    def http_scheme(self) -> str:
        return "https" if self.tls else "http"

    @property
    def base(self) -> str:
        """The REST interface's URL, ``http(s)://host:port``, without a slash at the end."""
        return f"{self.http_scheme}://{host_and_port(self.host, self.port)}"


def host_and_port(host: str, port: int | None) -> str:
    """Return ``host:port``, with brackets around an IPv6 address (RFC 3986, 3.2.2); without the port if it is None."""
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def parse_cluster_url(text: str) -> ClusterUrl:
    """Parse a cluster URL; ``""`` means ``local:``.

    Raises ValueError with the reason. A password is refused: the URL is shown in messages and stands in a file that
    other users may read.
    """
    scheme, colon, rest = (text.strip() or "local:").partition(":")
    if not colon or scheme not in _SCHEMES:
        raise ValueError(f"a cluster is {URL_FORMS}, not {_without_password(text)}")
    if scheme == "local":
        if rest:
            raise ValueError(f"nothing may follow 'local:', as in {_without_password(text)}")
        return ClusterUrl("local")
    found = _AUTHORITY.fullmatch(rest[2:].removesuffix("/")) if rest.startswith("//") else None
    if found is None:
        raise ValueError(f"a cluster is {URL_FORMS}, not {_without_password(text)}")
    user, port = found["user"] or "", None if found["port"] is None else int(found["port"])
    host = _host(found["host"], found["ip"])
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"{port} is not a TCP port")
    if scheme == "ssh":
        if found["user"] is not None and not is_user_name(user):
            raise ValueError("the part before @ must be a user's name, without a password")
        return ClusterUrl("ssh", host, port, user)
    if found["user"] is not None:
        raise ValueError("the URL of a REST interface names no user: a token identifies the user")
    tls = scheme == "rest+https"
    return ClusterUrl("rest", host, port or (443 if tls else 6820), tls=tls)


def _host(name: str | None, address: str | None) -> str:
    """Return the host name or the normalised address. Raises ValueError."""
    if address is not None:
        try:
            return str(ipaddress.IPv6Address(address))
        except ValueError:
            raise ValueError("the text in brackets must be an IPv6 address") from None
    if not _HOST.fullmatch(name or ""):
        raise ValueError("the host name or IP address (IPv6 in brackets) is missing or not valid")
    return str(name)


def _without_password(text: str) -> str:
    """Quote ``text`` without the part that may be a password."""
    return repr(re.sub(r"//[^/]*@", "//…@", text[:200]))
