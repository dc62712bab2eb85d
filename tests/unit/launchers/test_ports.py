"""Who listens on this node: the kernel's diagnosis and /proc say the same."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from launchers import ports as listening

Look = Callable[[str, "list[int]"], "dict[int, listening.Listener]"]


@pytest.fixture(params=["diagnosis", "proc"])
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Look:
    """The list of listeners from Linux's socket diagnosis, and from /proc, as in a sandbox without netlink."""

    def refuse(_family: int) -> None:
        raise PermissionError("no netlink here")

    if request.param == "proc":
        monkeypatch.setattr(listening, "_diagnose", refuse)
    return listening.tcp_listening


@pytest.fixture
def listen() -> Iterator[Callable[..., int]]:
    """Listens at an address, on a free or a given port, and returns the port."""
    with contextlib.ExitStack() as stack:

        def start(ip: str, port: int = 0) -> int:
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            sock = stack.enter_context(socket.create_server((ip, port), family=family, dualstack_ipv6=ip == "::"))
            return int(sock.getsockname()[1])

        yield start


def test_listeners_are_found_with_their_owner_and_nothing_else(look: Look, listen: Callable[..., int]) -> None:
    """A bound port that does not listen, a connected one, and a listener at another address are no listeners there."""
    own, everywhere, other = listen("127.0.0.1"), listen("::"), listen("127.0.0.2")
    with socket.socket() as bound, socket.create_connection(("127.0.0.1", own)) as connected:
        bound.bind(("127.0.0.1", 0))
        ports = [own, everywhere, other, bound.getsockname()[1], connected.getsockname()[1]]
        found = look("127.0.0.1", ports)
    assert {port: listener.uid for port, listener in found.items()} == {own: os.getuid(), everywhere: os.getuid()}
    targets = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if is_link(name)}
    assert {f"socket:[{listener.inode}]" for listener in found.values()} <= targets
    assert set(look("127.0.0.2", ports)) == {everywhere, other}
    assert set(look("::1", [*ports, six := listen("::1")])) == {everywhere, six}


def is_link(name: str) -> bool:
    """Whether the descriptor is still open; the listing itself had one."""
    return os.path.lexists(f"/proc/self/fd/{name}")


OTHER_USER = """
import os, socket, sys, time
os.setuid(65534)
sock = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(sock.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a process of another user")
def test_no_byte_goes_to_a_listener_of_another_user(look: Look, listen: Callable[..., int]) -> None:
    """Another user may take a kernel's port when the kernel has closed it, also between two looks at it."""
    own = listen("127.0.0.1")
    listening.connect_to_own("127.0.0.1", own).close()
    argv = [sys.executable, "-c", OTHER_USER, "0"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        taken = int(process.stdout.readline())
        with pytest.raises(ConnectionRefusedError, match=r"another user \(uid 65534\) listens"):
            listening.connect_to_own("127.0.0.1", taken)
        process.communicate()
    with pytest.raises(ConnectionRefusedError, match="no process listens"):
        listening.connect_to_own("127.0.0.1", taken)


def test_a_listener_that_changes_while_it_is_dialled_is_refused(
    monkeypatch: pytest.MonkeyPatch, listen: Callable[..., int]
) -> None:
    """The one that took the connection may be neither the one before nor the one after."""
    port = listen("127.0.0.1")
    found = [{port: listening.Listener(os.getuid(), inode)} for inode in (1, 2)]
    monkeypatch.setattr(listening, "tcp_listening", lambda _ip, _ports: found.pop(0))
    with pytest.raises(ConnectionRefusedError, match="another process listens"):
        listening.connect_to_own("127.0.0.1", port)


def test_five_ports_differ_and_are_in_the_range() -> None:
    """Chosen together, so that no two channels get the same."""
    ports = listening.choose_ports("127.0.0.1", (42000, 42999))
    assert len(set(ports.values())) == 5
    assert all(42000 <= port <= 42999 for port in ports.values())
