"""The addresses that the response socket is announced with: what launchers try, in this order."""

from __future__ import annotations

import ipaddress
import re
import socket

import psutil

from gateway_slurm.errors import ConfigError
from gateway_slurm.link.endpoints import format_endpoint, parse_endpoint


def interface_addresses(name: str) -> list[str]:
    """The IP addresses of a network interface, or ``name`` itself where it is an address.

    Raises ConfigError for an interface that this machine does not have, or that has no address others could dial.
    """
    try:
        return [str(ipaddress.ip_address(name))]
    except ValueError:
        pass
    known = psutil.net_if_addrs()
    if name not in known:
        raise ConfigError(
            f"SlurmService.response_interface: this machine has no interface {name!r}; "
            f"it has {', '.join(sorted(known))}"
        )
    found = [address for address in map(_ip, known[name]) if address]
    if not found:
        raise ConfigError(
            f"SlurmService.response_interface: {name!r} has no IP address that other hosts can dial (link-local ones "
            "are none); is it up?"
        )
    return found


def check_address(text: str) -> str:
    """A host's name or IP address, perhaps with a port, as ``response_address`` has it; ValueError for what is none.

    An IPv6 address with a port stands in brackets; alone it may.
    """
    host, _port = parse_endpoint(text) or (text[1:-1] if re.fullmatch(r"\[.*\]", text) else text, 0)
    if not text or _NAME.fullmatch(host):
        return text
    if ipaddress.ip_address(host).is_link_local:
        raise ValueError("a link-local address means another host on each node")
    return text


# A host's name, or an IPv4 address (RFC 1123; underscores are common).
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_.])?", re.ASCII)


def _ip(entry: object) -> str | None:
    """An interface's entry as an address that other hosts can dial; None for link-local and hardware ones."""
    if getattr(entry, "family", None) not in (socket.AF_INET, socket.AF_INET6):
        return None
    text = str(getattr(entry, "address", ""))
    return None if "%" in text or ipaddress.ip_address(text).is_link_local else text


def all_addresses() -> list[str]:
    """The machine's addresses: the default routes' first, IPv4 before IPv6, loopback last."""
    found = {text for entries in psutil.net_if_addrs().values() for text in map(_ip, entries) if text}
    first = {_route_address(socket.AF_INET, "192.0.2.1"), _route_address(socket.AF_INET6, "2001:db8::1")}

    def rank(text: str) -> tuple[bool, bool, bool, str]:
        address = ipaddress.ip_address(text)
        return address.is_loopback, text not in first, address.version == 6, text

    return sorted(found, key=rank)


def _route_address(family: socket.AddressFamily, out: str) -> str:
    # A connected UDP socket sends nothing; the kernel only picks the route (udp(7)). RFC 5737 and 3849 addresses.
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((out, 9))
            return str(probe.getsockname()[0])
    except OSError:  # no route out: a cluster's inner network, or none at all
        return ""


def endpoints(configured: str, listening_on: list[str] | None, port: int) -> list[str]:
    """``host:port`` texts, the configured one first, the host's name last (it may need a resolver)."""
    hosts = list(listening_on) if listening_on else all_addresses()
    texts = [format_endpoint(host, port) for host in [*hosts, socket.gethostname()]]
    if configured:
        texts.insert(0, configured if parse_endpoint(configured) else format_endpoint(configured.strip("[]"), port))
    return list(dict.fromkeys(texts))


def dialled_in_vain(log: str, addresses: list[str]) -> list[str]:
    """``address: why not`` for each of ``addresses`` that a launcher's log names; none where it says nothing."""
    why: dict[str, str] = {}
    for line in log.splitlines():
        for address in addresses:
            if line.startswith(f"link: {address}: "):
                why[address] = line.removeprefix("link: ")[:300]
    return [why.get(address, f"{address}: not tried") for address in addresses] if why else []
