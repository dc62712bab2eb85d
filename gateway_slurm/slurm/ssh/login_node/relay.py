"""Relays connections between a port of the login node and the channel, for nodes that reach nothing else.

Each ``LISTEN`` is answered by ``LISTENING``, or ``FAILED``; each connection begins with ``OPEN``, and has WINDOW
bytes under way at most in each direction (``DATA``, ``CREDIT``, ``CLOSE``). Bytes are carried as they are: what they
say is sealed between the launcher and the server. The relay ends with its channel.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from typing import Any

from gateway_slurm.slurm.ssh.login_node.common import (
    CLOSE,
    CREDIT,
    DATA,
    FAILED,
    LENGTH,
    LISTEN,
    LISTENING,
    OPEN,
    PING,
    PONG,
    READ_SIZE,
    WINDOW,
    Frames,
    count_of,
    frame,
    pack,
    start_ticks,
    unpack,
)

MAX_CONNECTIONS = 900  # below the usual limit of 1024 open files
STDOUT_BACKLOG = 1 << 20  # bytes that may wait for the channel before nothing is read any more
GOODBYE_SECONDS = 2.0
CLOSING_SECONDS = 5.0  # a node that takes nothing more holds none of the places for longer


class Connection:
    """One connection of a node's."""

    def __init__(self, number: int, sock: socket.socket) -> None:
        self.number, self.sock = number, sock
        self.out = bytearray()
        self.credit = WINDOW  # that we may still send up
        self.owed = 0  # that was written to the node, and not credited yet
        self.closing = False
        self.deadline = float("inf")  # for a node to take what was said last


class RelayProgram:
    """Carries connections between a port of this machine and the channel; one loop, nothing in it blocks."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, Connection] = {}
        self._listeners: list[socket.socket] = []
        self._stdout = bytearray()
        self._last = 0
        self._listening = True

    def run(self, silence: float) -> None:
        """Until the channel ends, or nothing has come for ``silence`` seconds; what came still goes out."""
        frames = Frames()
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
                        self._goodbye()
                        return
                    deadline = time.monotonic() + silence
                    for each in frames.feed(data):
                        self._take(*each)
                elif key.fd != 1:
                    self._serve(key, events)
            self._write_up()
            now = time.monotonic()
            for connection in [one for one in self._connections.values() if one.deadline < now]:
                self._drop(connection, tell=False)

    def _step(self, timeout: float) -> list[tuple[selectors.SelectorKey, int]]:
        self._watch(1, selectors.EVENT_WRITE if self._stdout else 0)
        may_read = len(self._stdout) < STDOUT_BACKLOG
        for each in self._connections.values():
            reads = selectors.EVENT_READ if may_read and each.credit > 0 and not each.closing else 0
            self._watch(each.sock, reads | (selectors.EVENT_WRITE if each.out else 0), each)
        if any(each.closing for each in self._connections.values()):
            timeout = min(timeout, 1.0)
        return self._selector.select(max(0.0, timeout))

    def _watch(self, what: Any, events: int, data: Any = None) -> None:
        known = self._selector.get_map().get(what)
        if known is None:
            if events:
                self._selector.register(what, events, data)
        elif not events:
            self._selector.unregister(what)
        elif known.events != events:
            self._selector.modify(what, events, data)

    def _up(self, kind: int, number: int, payload: bytes = b"") -> None:
        self._stdout += frame(kind, number, payload)

    def _write_up(self) -> None:
        while self._stdout:
            try:
                with memoryview(self._stdout) as view:
                    sent = os.write(1, view[:READ_SIZE])
            except BlockingIOError:
                return
            del self._stdout[:sent]

    # -- what the server says ----------------------------------------------------------------------------

    def _take(self, kind: int, number: int, payload: bytes) -> None:
        if kind == PING:
            self._up(PONG, number)
        elif kind == LISTEN:
            self._listen(number, unpack(payload)[0])
        connection = None if kind in (PING, LISTEN) else self._connections.get(number)
        if connection is None:
            return
        if kind == DATA:
            connection.out += payload
            self._write_down(connection)
        elif kind == CREDIT:
            connection.credit += count_of(payload)
        elif kind == CLOSE:
            connection.closing = True
            connection.deadline = time.monotonic() + CLOSING_SECONDS
            self._write_down(connection)

    def _listen(self, number: int, fields: dict[str, Any]) -> None:
        try:
            end_earlier(fields["end"])
            listener = listen(fields["ports"])
        except OSError as error:
            self._up(FAILED, number, str(error).encode())
            return
        listener.setblocking(False)
        self._listeners.append(listener)
        self._selector.register(listener, selectors.EVENT_READ)
        self._up(LISTENING, number, pack({"port": listener.getsockname()[1], "addresses": addresses()}))

    # -- what the nodes do ---------------------------------------------------------------------------------

    def _serve(self, key: selectors.SelectorKey, events: int) -> None:
        if key.data is None:
            self._accept(key.fileobj)  # type: ignore[arg-type]
            return
        if events & selectors.EVENT_WRITE:
            self._write_down(key.data)
        if events & selectors.EVENT_READ and key.data.number in self._connections:
            self._read_up(key.data)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, peer = listener.accept()
        except OSError:  # it went away again
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._last = self._last % 0xFFFFFFFF + 1
        self._connections[self._last] = Connection(self._last, sock)
        self._up(OPEN, self._last, str(peer[0]).encode())

    def _read_up(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(min(READ_SIZE, connection.credit))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection, tell=True)
            return
        connection.credit -= len(data)
        self._up(DATA, connection.number, data)

    def _write_down(self, connection: Connection) -> None:
        try:
            while connection.out:
                with memoryview(connection.out) as view:
                    sent = connection.sock.send(view[:READ_SIZE])
                del connection.out[:sent]
                connection.owed += sent
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection, tell=not connection.closing)
            return
        if connection.closing and not connection.out:
            self._drop(connection, tell=False)
        elif connection.owed >= WINDOW // 4:
            self._up(CREDIT, connection.number, LENGTH.pack(connection.owed))
            connection.owed = 0

    def _drop(self, connection: Connection, *, tell: bool) -> None:
        self._watch(connection.sock, 0)
        connection.sock.close()
        del self._connections[connection.number]
        if tell:
            self._up(CLOSE, connection.number)

    def _goodbye(self) -> None:
        """The server is gone: what it said last still reaches the nodes, as far as they take it."""
        deadline = time.monotonic() + GOODBYE_SECONDS
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections.values()):
            with contextlib.suppress(OSError):
                connection.sock.settimeout(max(0.01, deadline - time.monotonic()))
                connection.sock.sendall(connection.out)
            connection.sock.close()


def _read(descriptor: int) -> bytes | None:
    """None when there is nothing to read yet; empty at the end."""
    try:
        return os.read(descriptor, READ_SIZE)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def end_earlier(relays: list[dict[str, Any]]) -> None:
    """End relays whose connections broke, if sshd has not noticed yet: they have the ports that we want."""
    deadline = time.monotonic() + 2
    for relay in relays:
        while start_ticks(relay["pid"]) == relay["ticks"] and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                os.kill(relay["pid"], signal.SIGTERM)
            time.sleep(0.02)


def listen(ports: list[int]) -> socket.socket:
    """Listen on the first of ``ports`` that is free (0: any), on IPv6 and IPv4. Raises OSError."""
    trouble: OSError = OSError("the range of ports is empty")
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
                trouble = error
    raise trouble


def addresses() -> list[str]:
    """The machine's own addresses: private ones first, which nodes reach rather than public ones; loopback last."""
    found = []
    for family, where in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # A connected UDP socket sends nothing; the system only picks the route (udp(7)). RFC 5737, RFC 3849.
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((where, 9))
            found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError), open("/proc/net/fib_trie") as file:
        lines = file.read().splitlines()
        found += [line.split()[-1] for line, after in zip(lines, lines[1:]) if "/32 host LOCAL" in after]
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:
        for fields in map(str.split, file):
            if fields[3] == "00":  # global scope
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(fields[0])))
    private = ("10.", "192.168.", *(f"172.{second}." for second in range(16, 32)))
    unique = dict.fromkeys(found)
    return sorted(unique, key=lambda text: (text.startswith("127."), not text.startswith(private)))
