"""Warnings of the job's end that are due while no server is there, or one that is gone has heard."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from launchers.node import Walltime
from launchers.reactor import Reactor


class Node:
    """A launcher's clock, and the server that it speaks to, or none."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.linked = True
        self.said: list[float] = []
        self.walltime = Walltime(self.reactor, send=self.say, is_linked=lambda: self.linked)

    def say(self, name: str, *, kind: str, remaining: float) -> None:
        assert (name, kind) == ("NOTICE", "walltime")
        if self.linked:
            self.said.append(remaining)

    def plan(self, remaining: float) -> None:
        """The first WELCOME; a warning is due a minute before the end."""
        self.walltime.link_up({"remaining": remaining, "warn_minutes": [1]}, same_server=False)

    def until_due(self) -> None:
        deadline = time.monotonic() + 10
        while not self.walltime._was_due:
            assert time.monotonic() < deadline
            self.reactor.later(0.01, lambda: None)
            self.reactor.run_once()


@pytest.fixture
def node() -> Iterator[Node]:
    """One that has no server yet."""
    yield Node()
    signal.set_wakeup_fd(-1)


def test_a_warning_that_no_server_heard_is_said_on_the_next_link(node):
    """To the same server or another; and once."""
    node.plan(60.1)
    node.linked = False
    node.until_due()
    assert node.said == []
    node.linked = True
    for _link in range(2):
        node.walltime.link_up({}, same_server=True)
    assert node.said == pytest.approx([60], abs=5)


def test_a_new_server_is_told_what_the_one_before_it_knew(node):
    """The same server process is not told again."""
    node.plan(60.1)
    node.until_due()
    node.walltime.link_up({}, same_server=True)
    assert node.said == pytest.approx([60], abs=5)
    node.walltime.link_up({}, same_server=False)
    assert node.said == pytest.approx([60, 60], abs=5)


def test_nothing_is_due_any_more_once_the_end_was_moved(node):
    """Slurm's new word counts, for new servers, too."""
    node.plan(60.1)
    node.until_due()
    node.said.clear()
    node.walltime.set_end_time({"remaining": 3600})
    node.walltime.link_up({}, same_server=False)
    assert node.said == []
