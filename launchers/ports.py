"""Ports and sockets on this node: free ports, listeners, and probes of the way from the server to the node.

The listeners are read from the operating system, without connecting to them. A probe listens briefly on the ports of a
direct kernel, so that the server can test whether it reaches the node.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from gateway_slurm.link import wire
from launchers.reactor import READ, Reactor

_TCP_LISTEN = "0A"
# linux/netlink.h, linux/sock_diag.h, net/tcp_states.h
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3
_STATE_LISTEN = 10
_UNIX_ACCEPTS = 0x10000  # __SO_ACCEPTCON in the flags column of /proc/net/unix
ATTEMPTS = 200
# Until a listener on this node takes a connection. It takes none while its backlog is full, and the launcher waits.
CONNECT_SECONDS = 0.1

# A probe ends after this time, or at its kernel's START.
PROBE_SECONDS = 5.0
# Probes at a time; each has five listeners, and up to MAX_CONNECTIONS connections.
MAX_PROBES = 64
MAX_CONNECTIONS = 256
MAX_WORD = 64  # bytes of the question and of the answer
# Connections that wait to be accepted; beyond it a peer waits a second for its next attempt.
BACKLOG = 128


def choose_ports(ip: str, port_range: Sequence[int] | None) -> dict[str, int]:
    """Five different ports that are free on ``ip`` now, one for each channel.

    They are bound together, so that they differ, and closed together. Another process may take one before the kernel
    does; the caller starts the kernel again then.
    """
    held = hold_ports(ip, port_range)
    ports = {channel: sock.getsockname()[1] for channel, sock in held.items()}
    for sock in held.values():
        sock.close()
    return ports


def hold_ports(
    ip: str, port_range: Sequence[int] | None, ports: Mapping[str, int] | None = None
) -> dict[str, socket.socket]:
    """Bound sockets, one for each channel: on ``ports`` if given, else on free ones. Raises OSError."""
    held: dict[str, socket.socket] = {}
    try:
        for channel in wire.CHANNELS:
            held[channel] = _bind(ip, ports[channel], reuse=True) if ports else _bind_one(ip, port_range)
    except OSError:
        for sock in held.values():
            sock.close()
        raise
    return held


def _bind_one(ip: str, port_range: Sequence[int] | None) -> socket.socket:
    for _attempt in range(ATTEMPTS if port_range else 1):
        port = random.randint(port_range[0], port_range[1]) if port_range else 0  # noqa: S311
        with contextlib.suppress(OSError):
            return _bind(ip, port, reuse=bool(port_range))
    raise OSError(f"no free port on {ip}" + (f" from {port_range[0]} to {port_range[1]}" if port_range else ""))


def _bind(ip: str, port: int, *, reuse: bool) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
    try:
        if reuse:
            # As ZMQ does: closed connections of an ended kernel (tcp(7), TIME_WAIT) must not block the ports of a
            # small range. With this option only listening prevents a second bind of the port (socket(7)).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port))
        if reuse:
            sock.listen(1)
    except OSError:
        sock.close()
        raise
    return sock


class Listener(NamedTuple):
    """A TCP socket that listens: the user it belongs to, and its inode, by which /proc/PID/fd names it."""

    uid: int
    inode: int


_Row = tuple[bytes, int, Listener]  # the packed address and the port on which it listens


def tcp_listening(ip: str, ports: Collection[int]) -> dict[int, Listener]:
    """The listeners that get a connection to ``ip`` on one of ``ports``, by port.

    A listener at another address of this node, which may belong to another user, is none of them.

    The answer comes from Linux's socket diagnosis, which lists listeners only. /proc/net/tcp lists every connection,
    which takes 12 ms with two thousand connections: too long for frequent checks.
    """
    wanted = set(ports)
    address = ipaddress.ip_address(ip)
    accepting = {address.packed, bytes(16)}  # a socket at :: takes IPv4 connections, too (ipv6(7), IPV6_V6ONLY)
    if address.version == 4:
        accepting |= {bytes(4), bytes(10) + b"\xff\xff" + address.packed}
    found: dict[int, Listener] = {}
    # IPv4 first: beside a listener at an IPv4 address, one at :: on the same port gets no IPv4 connection.
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            rows = _diagnose(family)
        except OSError:  # some sandboxes lack this netlink family
            rows = _proc_listeners(family)
        for local, port, listener in rows:
            if port in wanted and local in accepting:
                found.setdefault(port, listener)
    return found


def connect_to_own(ip: str, port: int) -> socket.socket:
    """A non-blocking socket that is connected to a listener of this process's own user on this node.

    Raises OSError if another user listens there. The same listener is there before and after, so it is the one that
    took the connection; no byte has been sent.
    """
    before = tcp_listening(ip, [port]).get(port)
    if before is None or before.uid != os.getuid():
        owner = "no process" if before is None else f"another user (uid {before.uid})"
        raise ConnectionRefusedError(f"{owner} listens on {ip}:{port}")
    sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
    try:
        # Linux connects sockets of one node within connect(2), unless the listener's backlog is full.
        sock.settimeout(CONNECT_SECONDS)
        sock.connect((ip, port))
        if tcp_listening(ip, [port]).get(port) != before:
            raise ConnectionRefusedError(f"another process listens on {ip}:{port} now")
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock


def _diagnose(family: int) -> list[_Row]:
    """All TCP listeners of an address family: one dump of sock_diag(7)."""
    header = struct.pack("=IHHII", 72, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0)
    request = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, 1 << _STATE_LISTEN)
    listeners: list[_Row] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(1.0)
        sock.send(header + request)
        while True:
            data = sock.recv(65536)
            start = 0
            while start + 16 <= len(data):
                length, kind = struct.unpack_from("=IH", data, start)
                if kind == _DONE or length < 16:
                    return listeners
                if kind == _ERROR:
                    raise OSError("socket diagnosis was refused")
                # struct inet_diag_msg: the socket id begins with the port, its own and the far one's address follow;
                # uid and inode are the last fields.
                (port,) = struct.unpack_from("!H", data, start + 20)
                local = data[start + 24 : start + 24 + (4 if family == socket.AF_INET else 16)]
                listeners.append((local, port, Listener(*struct.unpack_from("=II", data, start + 80))))
                start += (length + 3) & ~3


def _proc_listeners(family: int) -> list[_Row]:
    """The same from /proc/net/tcp (proc(5)), which has addresses as words of 32 bits in this machine's byte order."""
    listeners: list[_Row] = []
    for line in _lines("/proc/net/tcp" if family == socket.AF_INET else "/proc/net/tcp6"):
        fields = line.split(None, 10)
        if len(fields) > 9 and fields[3] == _TCP_LISTEN:
            digits, _, port = fields[1].rpartition(":")
            words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
            local = struct.pack(f"={len(words)}I", *words)
            listeners.append((local, int(port, 16), Listener(int(fields[7]), int(fields[9]))))
    return listeners


def unix_listening(directory: str) -> dict[str, int]:
    """The Unix sockets under ``directory`` that accept connections, as path -> inode (proc(5), /proc/net/unix)."""
    found = {}
    for line in _lines("/proc/net/unix"):
        if directory in line:
            fields = line.split(None, 7)
            if len(fields) > 7 and int(fields[3], 16) & _UNIX_ACCEPTS:
                found[fields[7].rstrip("\n")] = int(fields[6])
    return found


def _lines(path: str) -> list[str]:
    try:
        with open(path, errors="replace") as table:
            return table.readlines()[1:]
    except FileNotFoundError:  # a kernel without IPv6 has no tcp6
        return []


def ipc_path(prefix: str, port: int, listening: Collection[str]) -> str | None:
    """The path of the Unix socket of channel ``port`` under ``prefix``; None if the kernel does not listen there.

    ipykernel and xeus join address and port with a hyphen, IRkernel and IJulia with a colon (``transport://ip:port``).
    """
    return next((path for path in (f"{prefix}-{port}", f"{prefix}:{port}") if path in listening), None)


# -- Probes --


class Probe:
    """Listeners on the ports of a kernel before its start. ``close`` ends them and their connections."""

    def __init__(self, reactor: Reactor, held: dict[str, socket.socket], question: bytes, answer: bytes) -> None:
        self._reactor, self._question, self._answer = reactor, question, answer
        self._received: dict[socket.socket, bytes] = {}  # by connection
        self._listeners = list(held.values())
        self.ports = {channel: sock.getsockname()[1] for channel, sock in held.items()}
        for sock in self._listeners:
            sock.setblocking(False)
            sock.listen(BACKLOG)
            reactor.watch(sock, READ, partial(self._accept, sock))
        self._timer = reactor.later(PROBE_SECONDS, self.close)

    def _accept(self, listener: socket.socket, _events: int) -> None:
        try:
            sock, _peer = listener.accept()
        except OSError:  # the peer has closed the connection already
            return
        if len(self._received) >= MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        self._received[sock] = b""
        self._reactor.watch(sock, READ, partial(self._read, sock))

    def _read(self, sock: socket.socket, _events: int) -> None:
        try:
            data = sock.recv(MAX_WORD)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        received = self._received[sock] = self._received[sock] + data
        if not data or not self._question.startswith(received):
            del self._received[sock]
            self._reset(sock)
        elif received == self._question:
            with contextlib.suppress(OSError):
                sock.send(self._answer)  # a few bytes into an empty buffer

    def _reset(self, sock: socket.socket) -> None:
        """Close a connection by a reset, which leaves nothing at the port: the kernel binds it next (socket(7))."""
        self._reactor.forget(sock)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    def close(self) -> None:
        """Free the ports."""
        self._timer.cancel()
        for sock in self._received:
            self._reset(sock)
        for sock in self._listeners:
            self._reactor.forget(sock)
            sock.close()
        self._listeners.clear()
        self._received.clear()


class Probes:
    """The launcher's probes, by kernel id; ``send`` sends a message to the server."""

    def __init__(self, reactor: Reactor, send: Callable[..., None]) -> None:
        self._reactor, self._send = reactor, send
        self._probes: dict[str, Probe] = {}

    def listen(self, fields: dict[str, Any], ip: str) -> None:
        """Take PROBE: listen on ``ip``, on the given ports or on free ones; PROBED names the ports or the error."""
        kernel_id = str(fields["kernel_id"])
        question, answer = (str(fields[name])[:MAX_WORD].encode() for name in ("question", "answer"))
        self.close(kernel_id)
        while len(self._probes) >= MAX_PROBES:
            self.close(next(iter(self._probes)))
        port_range = fields.get("port_range")
        try:
            try:
                held = hold_ports(ip, port_range, fields.get("ports"))
            except OSError:
                # Another process has taken one of the ports since the kernel's last process ended.
                held = hold_ports(ip, port_range)
            probe = self._probes[kernel_id] = Probe(self._reactor, held, question, answer)
            self._send("PROBED", probe=fields["probe"], ports=probe.ports)
        except OSError as error:
            self._send("PROBED", probe=fields["probe"], error=str(error))

    def close(self, kernel_id: str) -> None:
        """End the kernel's probe, if there is one."""
        probe = self._probes.pop(kernel_id, None)
        if probe is not None:
            probe.close()
