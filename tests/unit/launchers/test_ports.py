"""Who listens on this node: the kernel's diagnosis and /proc say the same."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from launchers import ports as listening


@pytest.fixture
def listeners() -> Iterator[dict[int, int]]:
    """Listeners on both families, as port -> uid."""
    sockets = [socket.create_server(("127.0.0.1", 0)), socket.create_server(("::1", 0), family=socket.AF_INET6)]
    yield {sock.getsockname()[1]: os.getuid() for sock in sockets}
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize("look", [listening.tcp_listening, listening._proc_listening])
def test_listeners_are_found_with_their_owner_and_nothing_else(look, listeners):
    """A bound port that does not listen, and a connected one, are no listeners."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    connected = socket.create_connection(("127.0.0.1", next(iter(listeners))))
    others = [bound.getsockname()[1], connected.getsockname()[1]]
    assert look([*listeners, *others]) == listeners
    bound.close()
    connected.close()


def test_without_socket_diagnosis_proc_is_read(monkeypatch, listeners):
    """A sandbox without netlink still starts kernels."""

    def refuse(_family: int) -> list[tuple[int, int]]:
        raise PermissionError("no netlink here")

    monkeypatch.setattr(listening, "_diagnose", refuse)
    assert listening.tcp_listening(list(listeners)) == listeners


def test_five_ports_differ_and_are_in_the_range(listeners):
    """Chosen together, so that no two channels get the same."""
    ports = listening.choose_ports("127.0.0.1", (42000, 42999))
    assert len(set(ports.values())) == 5
    assert all(42000 <= port <= 42999 for port in ports.values())
