"""A network namespace beside this machine's network, which only a test's own forwarding connects; directories that
only one process and its children have.

Both need root. See ip-netns(8), setns(2), unshare(1).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
# Changes data on its way to the server, or returns it unchanged.
Change = Callable[[bytes], bytes]


def run(*argv: str) -> None:
    """Run a command; raise CalledProcessError if it fails."""
    subprocess.run(argv, check=True, capture_output=True, timeout=30)


def with_own_directories(parent: Path, *names: str) -> list[str]:
    """The prefix of a command that alone has these directories in ``parent``, an empty directory of the machine.

    As on a laptop, whose files no node sees.
    """
    program = 'mount -t tmpfs laptop "$0" && (cd "$0" && mkdir -p $NAMES) && unset NAMES && exec "$@"'
    environment = ["env", f"NAMES={' '.join(names)}"]
    return ["unshare", "--mount", "--propagation=private", *environment, "sh", "-c", program, str(parent)]


class IsolatedNetwork:
    """A namespace with a loopback interface only; ``inside`` is the prefix of commands that run in it."""

    def __init__(self) -> None:
        self.name = f"gs-apart-{os.getpid()}"
        self.inside = ("ip", "netns", "exec", self.name)

    def up(self) -> None:
        """Make the namespace."""
        run("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    def down(self) -> None:
        """Remove the namespace and its cables."""
        run("ip", "netns", "del", self.name)

    def ip(self, *arguments: str) -> None:
        """Change links and addresses of the namespace."""
        run("ip", "-n", self.name, *arguments)

    @contextmanager
    def joined(self, near_address: str, far_address: str) -> Iterator[str]:
        """A cable from this machine to the namespace, with an ``address/length`` at each end; gives the far interface.

        Neither side forwards packets.
        """
        near, far = (f"gs-{end}-{os.getpid()}" for end in ("h", "t"))
        run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", self.name)
        try:
            run("ip", "address", "add", near_address, "dev", near, "nodad")
            self.ip("address", "add", far_address, "dev", far, "nodad")
            run("ip", "link", "set", near, "up")
            self.ip("link", "set", far, "up")
            yield far
        finally:
            run("ip", "link", "del", near)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in the namespace; sockets that it makes belong to the namespace."""

        def within() -> T:
            _enter(f"/run/netns/{self.name}")
            return function()

        # The thread stays in the namespace, and ends.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(within).result()


def _enter(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(descriptor)


@contextmanager
def isolated_network() -> Iterator[IsolatedNetwork]:
    """A namespace that exists during the block."""
    made = IsolatedNetwork()
    made.up()
    try:
        yield made
    finally:
        made.down()


class NatForwarder:
    """Forwards connections from ``listener`` by ``connect``, as a NAT does; ``change`` may alter the data."""

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket], change: Change) -> None:
        self.port = int(listener.getsockname()[1])
        self.passed = 0
        self._listener, self._connect, self._change = listener, connect, change
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        # Closing alone would leave accept() waiting.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _peer = self._listener.accept()
            except OSError:
                return
            try:
                far = self._connect()
            except OSError:
                near.close()
                continue
            self.passed += 1
            for source, sink, change in ((near, far, self._change), (far, near, bytes)):
                threading.Thread(target=_carry, args=(source, sink, change), daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket, change: Change) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 18):
            sink.sendall(change(data))
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


@contextmanager
def forward_into(
    network: IsolatedNetwork, port: int, *, at: tuple[str, int] = ("127.0.0.1", 0), change: Change = bytes
) -> Iterator[NatForwarder]:
    """Forward from this machine to a port of the namespace's loopback."""
    forwarder = NatForwarder(
        _listen(at), lambda: network.call(lambda: socket.create_connection(("127.0.0.1", port), 5)), change
    )
    try:
        yield forwarder
    finally:
        forwarder.close()


@contextmanager
def forward_out(network: IsolatedNetwork, port: int) -> Iterator[NatForwarder]:
    """Forward from the namespace's loopback to a port of this machine."""
    listener = network.call(lambda: _listen(("127.0.0.1", 0)))
    forwarder = NatForwarder(listener, lambda: socket.create_connection(("127.0.0.1", port), 5), bytes)
    try:
        yield forwarder
    finally:
        forwarder.close()


def _listen(where: tuple[str, int]) -> socket.socket:
    return socket.create_server(where, family=socket.AF_INET6 if ":" in where[0] else socket.AF_INET)


@contextmanager
def silent_port() -> Iterator[int]:
    """A port of this machine's loopback with a full queue: a client gets no answer (listen(2))."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield int(listener.getsockname()[1])
        for client in waiting:
            client.close()
