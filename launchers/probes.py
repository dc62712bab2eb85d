"""Listening for a moment where a direct kernel would, so that the server can try whether it gets there.

Server and launcher agree over the link on a question and its answer, drawn for that moment: so the server knows that
it has reached this node, and not another service, or another machine with the same address. Who does not ask is told
nothing: at a restart the kernel's clients try the same ports, and ZeroMQ gives up for good where it hears what is no
ZMTP.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from launchers import listening
from launchers.reactor import READ, Reactor

# A probe ends by itself after so many seconds, or with its kernel's START.
PROBE_SECONDS = 5.0
# At once; each has five listeners, and so many connections.
PROBES_LIMIT = 64
CONNECTIONS_LIMIT = 256
WORD_LIMIT = 64
# Of connections that wait to be accepted; one that overflows costs its peer a second.
BACKLOG = 128


class Probe:
    """The listeners of one kernel that is to be started. ``close`` ends them, and their connections."""

    def __init__(self, reactor: Reactor, held: dict[str, socket.socket], question: bytes, answer: bytes) -> None:
        self._reactor, self._question, self._answer = reactor, question, answer
        self._heard: dict[socket.socket, bytes] = {}  # by connection
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
        except OSError:  # it went away again
            return
        if len(self._heard) >= CONNECTIONS_LIMIT:
            sock.close()
            return
        sock.setblocking(False)
        self._heard[sock] = b""
        self._reactor.watch(sock, READ, partial(self._read, sock))

    def _read(self, sock: socket.socket, _events: int) -> None:
        try:
            data = sock.recv(WORD_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        heard = self._heard[sock] = self._heard[sock] + data
        if not data or not self._question.startswith(heard):
            del self._heard[sock]
            self._reset(sock)
        elif heard == self._question:
            with contextlib.suppress(OSError):
                sock.send(self._answer)  # a few bytes into an empty buffer

    def _reset(self, sock: socket.socket) -> None:
        """Close a connection so that nothing of it stays at the port, which its kernel binds next (socket(7))."""
        self._reactor.forget(sock)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    def close(self) -> None:
        """The ports are free again."""
        self._timer.cancel()
        for sock in self._heard:
            self._reset(sock)
        for sock in self._listeners:
            self._reactor.forget(sock)
            sock.close()
        self._listeners.clear()
        self._heard.clear()


class Probes:
    """The launcher's probes, by kernel id; ``say`` sends a message to the server."""

    def __init__(self, reactor: Reactor, say: Callable[..., None]) -> None:
        self._reactor, self._say = reactor, say
        self._probes: dict[str, Probe] = {}

    def listen(self, fields: dict[str, Any], ip: str) -> None:
        """PROBE: listen on ``ip``, on the ports that are named or on free ones; PROBED says on which, or why not."""
        kernel_id = str(fields["kernel_id"])
        question, answer = (str(fields[name])[:WORD_LIMIT].encode() for name in ("question", "answer"))
        self.close(kernel_id)
        while len(self._probes) >= PROBES_LIMIT:
            self.close(next(iter(self._probes)))
        try:
            probe = Probe(self._reactor, self._hold(fields, ip), question, answer)
        except OSError as error:
            self._say("PROBED", probe=fields["probe"], error=str(error))
            return
        self._probes[kernel_id] = probe
        self._say("PROBED", probe=fields["probe"], ports=probe.ports)

    @staticmethod
    def _hold(fields: dict[str, Any], ip: str) -> dict[str, socket.socket]:
        kept, port_range = fields.get("ports"), fields.get("port_range")
        try:
            return listening.hold_ports(ip, port_range, kept)
        except OSError:
            if not kept:
                raise
        # Somebody else has taken one since the kernel's last process ended.
        return listening.hold_ports(ip, port_range)

    def close(self, kernel_id: str) -> None:
        """The kernel's probe is over, if there is one."""
        probe = self._probes.pop(kernel_id, None)
        if probe is not None:
            probe.close()
