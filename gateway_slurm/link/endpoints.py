"""Endpoints as text: ``host:port``, or ``[address]:port`` for an IPv6 address (RFC 3986, 3.2.2)."""

from __future__ import annotations


def parse_endpoint(text: str) -> tuple[str, int] | None:
    """``host:port`` or ``[v6]:port`` as a pair; None if it is neither."""
    host, _colon, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 65536):
        return None
    if host.startswith("[") and host.endswith("]") and ":" in host:
        return host[1:-1], int(port)
    return None if not host or any(character in host for character in ":[]") else (host, int(port))


def format_endpoint(host: str, port: int) -> str:
    """The text for a host name or an address and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
