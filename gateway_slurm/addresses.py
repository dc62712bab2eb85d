"""The addresses of the response socket that launchers try, in order."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from typing import Any

import psutil

from gateway_slurm._util import dial_advice
from gateway_slurm.errors import ConfigError
from gateway_slurm.link.endpoints import format_endpoint, parse_endpoint


def interface_addresses(name: str) -> list[str]:
    """The IP addresses of a network interface; ``name`` may be an address itself.

    Raises ConfigError for an interface that does not exist, or that has no address which other hosts can dial.
    """
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(name))]
    known = psutil.net_if_addrs()
    if name not in known:
        raise ConfigError(
            f"SlurmService.response_interface: this machine has no interface {name!r}; "
            f"it has {', '.join(sorted(known))}"
        )
    found = [address for address in map(_ip, known[name]) if address]
    if not found:
        raise ConfigError(
            f"SlurmService.response_interface: {name!r} has no IP address that other hosts can dial (link-local "
            "addresses do not count); is it up?"
        )
    return found


def check_address(text: str) -> str:
    """Check a host name or IP address with an optional port, as in ``response_address``; return it. Raises ValueError.

    An IPv6 address with a port must be in brackets; without a port it may be.
    """
    host, _port = parse_endpoint(text) or (text[1:-1] if re.fullmatch(r"\[.*\]", text) else text, 0)
    if not text or _NAME.fullmatch(host):
        return text
    if ipaddress.ip_address(host).is_link_local:
        raise ValueError("a link-local address is not valid: on each node it means another host")
    return text


# A host name or an IPv4 address (RFC 1123; underscores are common).
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9_.])?", re.ASCII)


def _ip(entry: Any) -> str | None:
    """The address in an interface's entry; None for a link-local or a hardware address."""
    if entry.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    text = str(entry.address)
    return None if "%" in text or ipaddress.ip_address(text).is_link_local else text


def all_addresses() -> list[str]:
    """The addresses of this machine: those of the default routes first, IPv4 before IPv6, loopback last."""
    found = {text for entries in psutil.net_if_addrs().values() for text in map(_ip, entries) if text}
    # Destinations of RFC 5737 and RFC 3849, which are on no network.
    first = {_route_address(socket.AF_INET, "192.0.2.1"), _route_address(socket.AF_INET6, "2001:db8::1")}

    def rank(text: str) -> tuple[bool, bool, bool, str]:
        address = ipaddress.ip_address(text)
        return address.is_loopback, text not in first, address.version == 6, text

    return sorted(found, key=rank)


def _route_address(family: socket.AddressFamily, destination: str) -> str:
    """The address from which this machine would send to ``destination``; empty without a route."""
    # Connecting a UDP socket sends nothing: the kernel only picks the route (udp(7)).
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((destination, 9))
            return str(probe.getsockname()[0])
    except OSError:  # no default route, as in a cluster's internal network
        return ""


def endpoints(configured: str, listening_on: list[str] | None, port: int) -> list[str]:
    """The addresses as ``host:port``: the configured one first, the host name last, since it may need a resolver."""
    hosts = list(listening_on) if listening_on else all_addresses()
    texts = [format_endpoint(host, port) for host in [*hosts, socket.gethostname()]]
    if configured:
        texts.insert(0, configured if parse_endpoint(configured) else format_endpoint(configured.strip("[]"), port))
    return list(dict.fromkeys(texts))


def failed_dials(log: str, addresses: list[str]) -> list[str]:
    """For each address, the reason in a launcher's log why it could not be dialled; empty if the log has none."""
    why = {
        address: line.removeprefix(f"link: {address}: ")[:300]
        for line in log.splitlines()
        for address in addresses
        if line.startswith(f"link: {address}: ")
    }
    return [f"{address}: {failed_dial(address, why.get(address, 'not tried'))}" for address in addresses] if why else []


def failed_dial(address: str, reason: str) -> str:
    """The reason why a launcher could not dial one address, and what to open."""
    host, port = parse_endpoint(address) or (address, 0)
    advice = dial_advice(reason, f"TCP port {port} of {host}", "the compute nodes")
    return f"{reason} ({advice})" if advice else reason
