"""Relays connections between a port of the login node and the channel, for nodes that cannot connect to the server.

``LISTENING`` or ``FAILED`` answers each ``LISTEN``. A connection begins with ``OPEN`` and has at most WINDOW bytes
under way in each direction (``DATA``, ``CREDIT``, ``CLOSE``). The launcher and the server encrypt the bytes; the relay
passes them on unread. It ends with its channel.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from typing import Any

from gateway_slurm.slurm.ssh.login_node import protocol

MAX_CONNECTIONS = 900  # below the usual limit of 1024 open files
MAX_STDOUT_BACKLOG = 1 << 20  # bytes that may wait for the channel before the relay stops reading
SHUTDOWN_TIMEOUT = 2.0  # seconds
CLOSE_TIMEOUT = 5.0  # seconds for which a node may delay the close of its connection


class Connection:
    """One connection from a node."""

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number, self.sock = number, sock
        self.out = bytearray()
        self.credit = protocol.WINDOW  # bytes that may still be sent to the server
        self.owed = 0  # bytes that were written to the node and not credited yet
        self.closing = False
        self.deadline = float("inf")  # for writing the last bytes to the node


class RelayProgram:
    """Carries connections between ports of this machine and the channel; one loop, in which nothing blocks."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, Connection] = {}
        self._listeners: list[socket.socket] = []
        self._stdout = bytearray()
        self._last_number = 0

    def run(self, silence: float) -> None:
        """Serve until the channel ends, or until no frame has come for ``silence`` seconds."""
        frames = protocol.Frames()
        os.set_blocking(0, False)
        os.set_blocking(1, False)
        self._selector.register(0, selectors.EVENT_READ)
        deadline = time.monotonic() + silence
        while time.monotonic() < deadline:
            for key, events in self._step(deadline - time.monotonic()):
                if key.fd == 0:
                    data = _read(0)
                    if not data:
                        if data is None:
                            continue
                        self._shut_down()
                        return
                    deadline = time.monotonic() + silence
                    for received in frames.feed(data):
                        self._handle(*received)
                elif key.fd != 1:
                    self._serve(key, events)
            self._flush()
            now = time.monotonic()
            for connection in list(self._connections.values()):
                if connection.deadline < now:
                    self._drop(connection, notify=False)

    def _step(self, timeout: float) -> list[tuple[selectors.SelectorKey, int]]:
        self._watch(1, selectors.EVENT_WRITE if self._stdout else 0)
        may_read = len(self._stdout) < MAX_STDOUT_BACKLOG
        for connection in self._connections.values():
            reads = may_read and connection.credit > 0 and not connection.closing
            events = (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if connection.out else 0)
            self._watch(connection.sock, events, connection)
        if any(connection.closing for connection in self._connections.values()):
            timeout = min(timeout, 1.0)
        return self._selector.select(max(0.0, timeout))

    def _watch(self, file: Any, events: int, data: Any = None) -> None:
        known = self._selector.get_map().get(file)
        if known is None:
            if events:
                self._selector.register(file, events, data)
        elif not events:
            self._selector.unregister(file)
        elif known.events != events:
            self._selector.modify(file, events, data)

    def _send(self, kind: int, number: int, payload: bytes = b"") -> None:
        self._stdout += protocol.frame(kind, number, payload)

    def _flush(self) -> None:
        while self._stdout:
            try:
                with memoryview(self._stdout) as view:
                    sent = os.write(1, view[: protocol.READ_SIZE])
            except BlockingIOError:
                return
            del self._stdout[:sent]

    # -- Frames from the server --

    def _handle(self, kind: int, number: int, payload: bytes) -> None:
        if kind == protocol.PING:
            self._send(protocol.PONG, number)
        elif kind == protocol.LISTEN:
            self._listen(number, protocol.unpack(payload)[0])
        connection = None if kind in (protocol.PING, protocol.LISTEN) else self._connections.get(number)
        if connection is None:
            return
        if kind == protocol.DATA:
            connection.out += payload
            self._write_to_node(connection)
        elif kind == protocol.CREDIT:
            connection.credit += protocol.count_of(payload)
        elif kind == protocol.CLOSE:
            connection.closing = True
            connection.deadline = time.monotonic() + CLOSE_TIMEOUT
            self._write_to_node(connection)

    def _listen(self, number: int, fields: dict[str, Any]) -> None:
        try:
            end_predecessors(fields["end"])
            listener = listen(fields["ports"])
        except OSError as error:
            self._send(protocol.FAILED, number, str(error).encode())
            return
        listener.setblocking(False)
        self._listeners.append(listener)
        self._selector.register(listener, selectors.EVENT_READ)
        self._send(
            protocol.LISTENING, number, protocol.pack({"port": listener.getsockname()[1], "addresses": addresses()})
        )

    # -- Connections from nodes --

    def _serve(self, key: selectors.SelectorKey, events: int) -> None:
        if key.data is None:
            self._accept(key.fileobj)  # type: ignore[arg-type]
            return
        if events & selectors.EVENT_WRITE:
            self._write_to_node(key.data)
        if events & selectors.EVENT_READ and key.data.number in self._connections:
            self._read_from_node(key.data)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, peer = listener.accept()
        except OSError:  # the node has closed it already
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number = self._last_number = self._last_number % 0xFFFFFFFF + 1
        self._connections[number] = Connection(number, sock)
        self._send(protocol.OPEN, number, str(peer[0]).encode())

    def _read_from_node(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(min(protocol.READ_SIZE, connection.credit))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection, notify=True)
            return
        connection.credit -= len(data)
        self._send(protocol.DATA, connection.number, data)

    def _write_to_node(self, connection: Connection) -> None:
        try:
            while connection.out:
                with memoryview(connection.out) as view:
                    sent = connection.sock.send(view[: protocol.READ_SIZE])
                del connection.out[:sent]
                connection.owed += sent
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection, notify=not connection.closing)
            return
        if connection.closing and not connection.out:
            self._drop(connection, notify=False)
        elif connection.owed >= protocol.WINDOW // 4:
            self._send(protocol.CREDIT, connection.number, protocol.LENGTH.pack(connection.owed))
            connection.owed = 0

    def _drop(self, connection: Connection, *, notify: bool) -> None:
        self._watch(connection.sock, 0)
        connection.sock.close()
        del self._connections[connection.number]
        if notify:
            self._send(protocol.CLOSE, connection.number)

    def _shut_down(self) -> None:
        """Write the server's last bytes to the nodes, for a limited time, and close all connections."""
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connection.sock.settimeout(max(0.01, deadline - time.monotonic()))
                connection.sock.sendall(connection.out)
            connection.sock.close()


def _read(descriptor: int) -> bytes | None:
    """Read without blocking: None if there is nothing to read yet, empty at the end."""
    try:
        return os.read(descriptor, protocol.READ_SIZE)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def end_predecessors(relays: list[dict[str, Any]]) -> None:
    """End relays whose connection broke and which still run because sshd has not noticed: they hold the ports."""
    deadline = time.monotonic() + 2
    for relay in relays:
        while protocol.start_ticks(relay["pid"]) == relay["ticks"] and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                os.kill(relay["pid"], signal.SIGTERM)
            time.sleep(0.02)


def listen(ports: list[int]) -> socket.socket:
    """Listen on the first free port of ``ports`` (0: any), on IPv6 and IPv4. Raises OSError."""
    last_error: OSError = OSError("the range of ports is empty")
    for port in ports:
        for family, host in ((socket.AF_INET6, "::"), (socket.AF_INET, "")):
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                sock.bind((host, port))
                sock.listen(128)
                return sock
            except OSError as error:
                last_error = error
    raise last_error


def addresses() -> list[str]:
    """Return this machine's addresses: private ones first, which nodes are more likely to reach; loopback last."""
    found = []
    for family, destination in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # Connecting a UDP socket sends nothing; the system only chooses the route (udp(7)). RFC 5737, RFC 3849.
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((destination, 9))
            found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError), open("/proc/net/fib_trie") as file:
        lines = file.read().splitlines()
        found += [line.split()[-1] for line, following in zip(lines, lines[1:]) if "/32 host LOCAL" in following]
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:
        for fields in map(str.split, file):
            if fields[3] == "00":  # global scope
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(fields[0])))
    private = ("10.", "192.168.", *(f"172.{second}." for second in range(16, 32)))
    unique = dict.fromkeys(found)
    return sorted(unique, key=lambda text: (text.startswith("127."), not text.startswith(private)))
