"""The launcher's event loop and its link, where one callback takes away what another one waits for."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import pytest

from launchers.reactor import READ, Reactor
from launchers.uplink import Uplink


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """A reactor; what it does to this process's signals is undone."""
    yield Reactor()
    signal.set_wakeup_fd(-1)


def test_a_callback_may_close_what_is_ready_in_the_same_round(reactor):
    """The round goes on when a socket whose turn comes next was closed, and its callback is not called."""
    pairs = [socket.socketpair() for _ in range(2)]
    called = []

    def close_all(_events):
        called.append(1)
        for ours, _theirs in pairs:
            reactor.forget(ours)
            ours.close()

    for ours, theirs in pairs:
        theirs.send(b"x")
        reactor.watch(ours, READ, close_all)
    reactor.run_once()
    assert called == [1]


def test_a_new_socket_is_not_taken_for_the_closed_one_whose_number_it_got(reactor):
    """An event of a socket that was closed in this round is not given to the one that has its number now."""
    pairs = [socket.socketpair() for _ in range(2)]
    called, kept = [], []

    def replace(_events):
        called.append("old")
        for ours, _theirs in pairs:
            reactor.forget(ours)
            ours.close()
        kept.extend(socket.socketpair())
        for new in kept:
            reactor.watch(new, READ, lambda _events: called.append("new"))

    for ours, theirs in pairs:
        theirs.send(b"x")
        reactor.watch(ours, READ, replace)
    reactor.run_once()
    assert called == ["old"]


def test_a_link_that_is_dropped_twice_is_dialled_once(reactor):
    """Two reasons to drop the link in one moment do not make two links."""
    dialled = []
    uplink = Uplink(
        reactor,
        launcher_id="L",
        jobid="1",
        token=b"",
        addresses=[("127.0.0.1", 1)],
        hello=dict,
        on_message=lambda _name, _payload: None,
        on_down=lambda: None,
        on_writable=lambda: None,
    )
    uplink.dial = lambda: dialled.append(1)  # type: ignore[method-assign]
    uplink.drop("one")
    uplink.drop("two")
    for _ in range(3):
        reactor.later(0.1, lambda: None)
        reactor.run_once()
    assert dialled == [1]
