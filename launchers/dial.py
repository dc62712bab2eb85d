"""One round of dialling: several addresses, of which some may never answer.

As in RFC 8305 each address gets a short head start over the next one, and the first that takes the connection wins;
what fails at once is not waited for. A name is looked up by a child process: a resolver that does not answer must
not keep the launcher from its kernels. It is forked, not a thread, because kernels are forked, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from launchers.reactor import READ, WRITE, Reactor, Timer

Address = tuple[str, int]
# Seconds. RFC 8305, section 5, wants 0.25 for the first; a lost SYN is sent again after 1 s (RFC 6298).
HEAD_START = 0.25
CONNECT_TIMEOUT = 3.0
RESOLVE_SECONDS = 10
# Addresses of one name that are tried, and bytes of the answer.
NAME_LIMIT, ANSWER_LIMIT = 8, 4096


class Round:
    """Dials ``addresses``; its owner calls ``close``.

    ``connected(address, socket, left)`` is called once, with the first that is there, which is the owner's then, and
    the addresses of which nothing is known yet; or ``failed()`` when none is. ``told(address, why)`` hears of each that
    did not work.
    """

    def __init__(
        self,
        reactor: Reactor,
        addresses: list[Address],
        *,
        connected: Callable[[Address, socket.socket, list[Address]], None],
        failed: Callable[[], None],
        told: Callable[[Address, str], None],
    ) -> None:
        self._reactor, self._connected, self._failed, self._told = reactor, connected, failed, told
        self._addresses = addresses
        # With the host to be dialled: a name's address, once it is known.
        self._waiting = deque((address, address[0]) for address in addresses)
        self._sockets: dict[socket.socket, tuple[Address, Timer]] = {}
        self._lookups: dict[int, tuple[Address, int]] = {}  # by the pipe's end: the child's process id, too
        self._over = False
        self._planned = reactor.later(0.0, self._next)

    def close(self) -> None:
        """Give up what is under way."""
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
        """Begin with one more; the last that fails ends the round."""
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
            # A number needs no resolver; one with a scope (fe80::1%eth0) is a number, too.
            found = socket.getaddrinfo(host, address[1], type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except OSError:
            self._look_up(address)
            return
        self._connect(address, found[0])

    def _fail(self, address: Address, why: str) -> None:
        self._told(address, why)
        self._planned.cancel()
        self._planned = self._reactor.later(0.0, self._next)

    # -- connecting -------------------------------------------------------------------------

    def _connect(self, address: Address, found: tuple[Any, ...]) -> None:
        family, kind, proto, _name, where = found
        try:
            sock = socket.socket(family, kind, proto)
        except OSError as error:
            self._fail(address, str(error))
            return
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            status = sock.connect_ex(where)
        except OSError as error:
            sock.close()
            self._fail(address, str(error))
            return
        if status not in (0, errno.EINPROGRESS):
            sock.close()
            self._fail(address, os.strerror(status))
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
        under_way = {each for each, _rest in [*self._sockets.values(), *self._lookups.values(), *self._waiting]}
        left = [each for each in self._addresses if each in under_way and each != address]
        self.close()
        self._connected(address, sock, left)

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
        hosts = os.read(pipe, ANSWER_LIMIT).decode(errors="replace").split()[:NAME_LIMIT]
        self._end_lookup(pipe)
        if not hosts:
            self._fail(address, "this name was not found")
            return
        # Each address of the name has its turn, before what is behind the name.
        self._waiting.extendleft((address, host) for host in reversed(hosts))
        self._next()

    def _end_lookup(self, pipe: int) -> None:
        self._reactor.forget(pipe)
        os.close(pipe)
        _address, pid = self._lookups.pop(pipe)
        with contextlib.suppress(ChildProcessError):  # the launcher collects all children
            os.waitpid(pid, 0)


def _answer(end: int, host: str, port: int) -> None:
    """In the child: look the name up, write what was found, one address a line, and end."""
    try:
        # Connections and pipes end when the launcher closes them, also while this goes on; its handlers are its own.
        os.closerange(3, end)
        os.closerange(end + 1, 1 << 16)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(RESOLVE_SECONDS)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        hosts = dict.fromkeys(str(each[4][0]) for each in found[:NAME_LIMIT])
        os.write(end, "\n".join(hosts).encode())
    finally:
        os._exit(0)
