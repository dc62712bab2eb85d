"""A kernel's output is acknowledged to its launcher when every frontend has it, and not before."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_slurm.gateway.channels.acks import ACK_INTERVAL, STATE_KEY, OutputAcks, Position
from helpers.kernel_clients import poll_async

IDS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="@"), min_size=1, max_size=40)
MARKS = st.sampled_from(["-", "+", "ok:3", "error:", "aborted:"])


class Launcher:
    """Records the acknowledgements that a launcher gets."""

    def __init__(self):
        self.said = []

    def __call__(self, upto, positions):
        self.said.append((upto, positions))

    async def next(self):
        """The next acknowledgement."""
        before = len(self.said)
        assert await poll_async(lambda: len(self.said) > before, timeout=5, interval=ACK_INTERVAL / 4)
        return self.said[-1]


@pytest.fixture
def launcher():
    """A launcher that records acknowledgements."""
    return Launcher()


def publish(acks, *msg_ids):
    """The kernel publishes these."""
    for msg_id in msg_ids:
        acks.published(msg_id)


async def test_what_is_acknowledged_is_what_the_slowest_frontend_has(launcher):
    """One that is away holds it up; when it is given up the others count."""
    acks = OutputAcks(launcher)
    acks.join("quick")
    acks.join("slow")
    publish(acks, "1", "2", "3")
    acks.sent("quick", "3")
    acks.sent("slow", "1")
    upto, positions = await launcher.next()
    assert upto == "1"
    assert [Position.parse(positions[one]).msg_id for one in ("quick", "slow")] == ["3", "1"]
    acks.leave("slow")
    assert (await launcher.next())[0] == "3"


async def test_many_messages_are_one_acknowledgement(launcher):
    """They are put together for a moment."""
    acks = OutputAcks(launcher)
    acks.join("one")
    for number in range(1000):
        acks.published(str(number))
        acks.sent("one", str(number))
    assert (await launcher.next())[0] == "999"
    assert len(launcher.said) == 1


async def test_a_kernel_that_never_had_a_frontend_is_not_acknowledged(launcher):
    """Its launcher keeps nothing while the link is there; after the last frontend it would keep everything."""
    acks = OutputAcks(launcher)
    acks.published_unheard("1")
    await asyncio.sleep(2 * ACK_INTERVAL)
    assert launcher.said == []
    acks.join("one")
    assert (await launcher.next())[0] == ""
    acks.leave("one")
    acks.published_unheard("2")
    assert (await launcher.next())[0] == "2"


async def test_sessions_of_an_earlier_server_go_on_from_where_they_were(launcher):
    """What was kept is in the kernel's order, for whichever session reads it first."""
    acks = OutputAcks(launcher)
    acks.join("ahead", Position("7"))
    acks.join("behind", Position("5"))
    acks.add_kept("ahead", ["5", "6", "7", "8"])
    acks.add_kept("behind", ["5", "6", "7", "8"])
    acks.sent("ahead", "8")
    assert (await launcher.next())[0] == "5"
    acks.sent("behind", "6")
    assert (await launcher.next())[0] == "6"


async def test_cells_and_the_kernels_state_are_sent_with_the_positions(launcher):
    """The next server knows what waits for an answer, and whether the kernel computes."""
    acks = OutputAcks(launcher)
    acks.join("one")
    acks.set_cells("one", {"cell": "+"})
    acks.set_state("busy")
    _upto, positions = await launcher.next()
    assert positions[STATE_KEY] == "busy"
    assert Position.parse(positions["one"]).cells == {"cell": "+"}


async def test_a_session_that_is_new_waits_for_nothing_that_was_before(launcher):
    """It does not hold up what others have."""
    acks = OutputAcks(launcher)
    acks.join("old")
    publish(acks, "1", "2")
    acks.join("new")
    acks.sent("old", "2")
    assert (await launcher.next())[0] == "2"


@given(msg_id=IDS | st.just(""), cells=st.dictionaries(IDS, MARKS, max_size=5))
def test_a_position_is_a_text_and_back(msg_id, cells):
    """It is never an empty one, and has no space at its ends."""
    text = str(Position(msg_id, cells))
    assert text
    assert Position.parse(text) == Position(msg_id, cells)
