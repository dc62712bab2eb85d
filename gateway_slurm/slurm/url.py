"""One URL says how Slurm is reached: by its commands here, by SSH on a login node, or by its REST interface."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Literal

SHAPES: Final = "'local:', 'ssh://[user@]login[:port]' or 'rest+http(s)://host:port'"

_SCHEMES: Final = {"local", "ssh", "rest+http", "rest+https"}
# What POSIX calls portable, and no leading "-": it goes into no command line, but into messages and %-tokens.
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}", re.ASCII)
# Names of ~/.ssh/config, too, which may hold underscores.
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?", re.ASCII)
_AUTHORITY: Final = re.compile(r"(?:(?P<user>.*)@)?(?:\[(?P<ip>[^\]]*)\]|(?P<host>[^:]*))(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class ClusterUrl:
    """A parsed ``SlurmService.cluster``; ``str()`` is its text again.

    ``host`` is a name, or an IP address without brackets; empty for ``local``. ``port`` is None, and ``user``
    empty, where the URL leaves them to ``~/.ssh/config`` and its defaults; a REST URL has a port always.
    """

    kind: Literal["local", "ssh", "rest"]
    host: str = ""
    port: int | None = None
    user: str = ""
    tls: bool = False
    """Whether the REST interface is spoken to by HTTPS; SSH is none of it."""

    def __str__(self) -> str:
        scheme = {"local": "local:", "ssh": "ssh://"}.get(self.kind, f"rest+{self.http_scheme}://")
        user = f"{self.user}@" if self.user else ""
        return f"{scheme}{user}{self._authority}"

    @property
    def http_scheme(self) -> str:
        """``http`` or ``https``."""
        return "https" if self.tls else "http"

    @property
    def base(self) -> str:
        """The REST interface's address, ``http(s)://host:port``, without a slash at the end."""
        return f"{self.http_scheme}://{self._authority}"

    @property
    def _authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"


def parse_cluster_url(text: str) -> ClusterUrl:
    """Return what ``text`` says; ``""`` is ``local:``.

    Raises ValueError, whose text says what is wrong with it. A password has no place in it: the URL is shown in
    messages and stands in a file that others may read.
    """
    scheme, colon, rest = (text.strip() or "local:").partition(":")
    if not colon or scheme not in _SCHEMES:
        raise ValueError(f"a cluster is {SHAPES}, not {_shown(text)}")
    if scheme == "local":
        if rest:
            raise ValueError(f"nothing may follow 'local:', as it does in {_shown(text)}")
        return ClusterUrl("local")
    found = _AUTHORITY.fullmatch(rest[2:].removesuffix("/")) if rest.startswith("//") else None
    if found is None:
        raise ValueError(f"a cluster is {SHAPES}, not {_shown(text)}")
    user, port = found["user"] or "", None if found["port"] is None else int(found["port"])
    host = _host(found["host"], found["ip"])
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"{port} is no TCP port")
    if scheme == "ssh":
        if found["user"] is not None and not _USER.fullmatch(user):
            raise ValueError("the part before @ must be a user's name, without a password")
        return ClusterUrl("ssh", host, port, user)
    if found["user"] is not None:
        raise ValueError("a REST interface knows its users by tokens; none is named in the URL")
    tls = scheme == "rest+https"
    return ClusterUrl("rest", host, port or (443 if tls else 6820), tls=tls)


def _host(name: str | None, address: str | None) -> str:
    """Return the host as it is dialled. Raises ValueError."""
    if address is not None:
        try:
            return str(ipaddress.IPv6Address(address))
        except ValueError:
            raise ValueError("what stands in brackets must be an IPv6 address") from None
    if not _HOST.fullmatch(name or ""):
        raise ValueError("a host's name, or its IP address (IPv6 in brackets), is missing or not valid")
    return str(name)


def _shown(text: str) -> str:
    """Quote ``text`` without what might be a password in it."""
    return repr(re.sub(r"//[^/]*@", "//…@", text[:200]))
