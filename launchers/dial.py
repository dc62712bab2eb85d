"""One round of dialling: several addresses, of which some may never answer.

As in RFC 8305, each address gets a short head start over the next one, and the first connection wins. After a failure
the next address follows at once. A child process looks up a host name, so that a resolver that does not answer does not
block the launcher. It is a forked process and not a thread, because the launcher also forks kernels.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from launchers.reactor import READ, WRITE, Reactor, Timer

Address = tuple[str, int]
# Seconds. RFC 8305, section 5, recommends 0.25 for the first; a lost SYN is sent again after 1 s (RFC 6298).
HEAD_START = 0.25
CONNECT_TIMEOUT = 3.0
RESOLVE_SECONDS = 10
# Addresses of one name that are tried, and bytes of the child's answer.
MAX_ADDRESSES, MAX_ANSWER = 8, 4096


class Round:
    """Dials ``addresses``; its owner calls ``close``.

    At the first connection it calls ``connected(address, socket, untried)``: the socket belongs to the owner then, and
    ``untried`` are the addresses without a result. If no address connects it calls ``failed()``. Before that it calls
    ``address_failed(address, reason)`` for each address that did not work.
    """

    def __init__(
        self,
        reactor: Reactor,
        addresses: list[Address],
        *,
        connected: Callable[[Address, socket.socket, list[Address]], None],
        failed: Callable[[], None],
        address_failed: Callable[[Address, str], None],
    ) -> None:
        self._reactor, self._connected, self._failed = reactor, connected, failed
        self._address_failed = address_failed
        self._addresses = addresses
        # Each with the host to dial: first as given, and for a name then the addresses of the name.
        self._waiting = deque((address, address[0]) for address in addresses)
        self._sockets: dict[socket.socket, tuple[Address, Timer]] = {}
        self._lookups: dict[int, tuple[Address, int]] = {}  # pipe -> address, process id of the child
        self._over = False
        self._planned = reactor.later(0.0, self._next)

    def close(self) -> None:
        """Close the connections that are being made, and end the look-ups."""
        self._over = True
        self._planned.cancel()
        for sock in list(self._sockets):
            self._forget(sock)
            sock.close()
        for pipe in list(self._lookups):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._lookups[pipe][1], signal.SIGKILL)
            self._end_lookup(pipe)

    def _next(self) -> None:
        """Try the next address; without one, and without a pending attempt, the round has failed."""
        self._planned.cancel()
        if self._over:
            return
        if not self._waiting:
            if not self._sockets and not self._lookups:
                self._over = True
                self._failed()
            return
        address, host = self._waiting.popleft()
        self._planned = self._reactor.later(HEAD_START, self._next)
        try:
            # A numeric address needs no resolver, also with a scope (fe80::1%eth0).
            resolved = socket.getaddrinfo(host, address[1], type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except OSError:
            self._look_up(address)
            return
        self._connect(address, resolved[0])

    def _fail(self, address: Address, reason: str) -> None:
        self._address_failed(address, reason)
        self._planned.cancel()
        self._planned = self._reactor.later(0.0, self._next)

    # -- connecting -------------------------------------------------------------------------

    def _connect(self, address: Address, resolved: tuple[Any, ...]) -> None:
        family, kind, proto, _name, target = resolved
        try:
            sock = socket.socket(family, kind, proto)
        except OSError as error:
            self._fail(address, str(error))
            return
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BlockingIOError):
                sock.connect(target)
        except OSError as error:
            sock.close()
            self._fail(address, error.strerror or str(error))
            return
        self._sockets[sock] = address, self._reactor.later(CONNECT_TIMEOUT, lambda: self._on_silence(address, sock))
        self._reactor.watch(sock, WRITE, lambda _events: self._on_ready(address, sock))

    def _forget(self, sock: socket.socket) -> None:
        self._reactor.forget(sock)
        self._sockets.pop(sock)[1].cancel()

    def _on_silence(self, address: Address, sock: socket.socket) -> None:
        self._forget(sock)
        sock.close()
        self._fail(address, f"no answer within {CONNECT_TIMEOUT:g} s")

    def _on_ready(self, address: Address, sock: socket.socket) -> None:
        self._forget(sock)
        status = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            sock.close()
            self._fail(address, os.strerror(status))
            return
        pending = {other for other, _rest in [*self._sockets.values(), *self._lookups.values(), *self._waiting]}
        untried = [other for other in self._addresses if other in pending and other != address]
        self.close()
        self._connected(address, sock, untried)

    # -- names ------------------------------------------------------------------------------

    def _look_up(self, address: Address) -> None:
        pipe, end = os.pipe()
        pid = os.fork()
        if pid == 0:
            _answer(end, *address)
        os.close(end)
        os.set_blocking(pipe, False)
        self._lookups[pipe] = address, pid
        self._reactor.watch(pipe, READ, lambda _events: self._on_answer(address, pipe))

    def _on_answer(self, address: Address, pipe: int) -> None:
        hosts = os.read(pipe, MAX_ANSWER).decode(errors="replace").split()[:MAX_ADDRESSES]
        self._end_lookup(pipe)
        if not hosts:
            self._fail(address, "the host name was not found")
            return
        # All addresses of the name are tried before the next entry of the list.
        self._waiting.extendleft((address, host) for host in reversed(hosts))
        self._next()

    def _end_lookup(self, pipe: int) -> None:
        self._reactor.forget(pipe)
        os.close(pipe)
        with contextlib.suppress(ChildProcessError):  # the launcher collects all children
            os.waitpid(self._lookups.pop(pipe)[1], 0)


def _answer(end: int, host: str, port: int) -> None:
    """In the child: look the name up, write its addresses, one a line, and exit."""
    try:
        # Close the launcher's files: its connections must end when the launcher closes them. Reset its signal handlers.
        os.closerange(3, end)
        os.closerange(end + 1, 1 << 16)
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGALRM, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        signal.alarm(RESOLVE_SECONDS)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        hosts = dict.fromkeys(str(target[0]) for *_kind, target in found[:MAX_ADDRESSES])
        os.write(end, "\n".join(hosts).encode())
    finally:
        os._exit(0)
