"""Each user gets a turn, however much work another has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator

import pytest

from gateway_slurm.turns import SLICE_SECONDS, Turns


def busy(seconds: float) -> None:
    """Use the processor for so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_one_piece_of_work_waits_for_one_of_another_users_and_not_for_all() -> None:
    """Behind 500 pieces of a busy user, the first of another is done after a few."""
    order: list[str] = []

    def work(user: str) -> None:
        order.append(user)
        busy(0.0005)

    async def scenario() -> None:
        turns = Turns()
        flood = [asyncio.ensure_future(turns.run("mallory", work, "mallory")) for _ in range(500)]
        await flood[10]
        await turns.run("bob", work, "bob")
        assert order.index("bob") < 30
        await asyncio.gather(*flood)
        assert turns.waiting == 0

    asyncio.run(scenario())


def test_users_share_time_and_not_pieces() -> None:
    """One whose pieces take ten times as long gets a tenth of the pieces."""
    done = {"slow": 0, "quick": 0}

    async def keep_busy(turns: Turns, user: str, seconds: float) -> None:
        while True:
            await turns.run(user, busy, seconds)
            done[user] += 1

    async def scenario() -> None:
        turns = Turns()
        tasks = [
            asyncio.ensure_future(keep_busy(turns, user, seconds))
            for user, seconds, many in (("slow", 0.002, 5), ("quick", 0.0002, 50))
            for _ in range(many)
        ]
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())
    assert 3 < done["quick"] / done["slow"] < 20


def test_a_user_alone_leaves_the_loop_to_others_after_each_slice() -> None:
    """Work that one task gives without end does not hold the loop."""

    async def scenario() -> None:
        turns = Turns()

        async def endless() -> None:
            while True:
                await turns.run("mallory", busy, SLICE_SECONDS / 4)

        task = asyncio.ensure_future(endless())
        rounds = 0
        until = time.monotonic() + 5
        while rounds < 50 and time.monotonic() < until:
            await asyncio.sleep(0)
            rounds += 1
        task.cancel()
        assert rounds == 50

    asyncio.run(scenario())


def test_what_work_raises_comes_to_its_caller_and_what_waits_is_cancelled_at_the_end() -> None:
    """An error ends no other work, and ``close`` leaves no caller waiting."""

    def fail() -> None:
        raise KeyError("here")

    async def scenario() -> None:
        turns = Turns()
        tasks = [asyncio.ensure_future(turns.run("alice", busy, SLICE_SECONDS)) for _ in range(3)]
        failing = asyncio.ensure_future(turns.run("alice", fail))
        last = asyncio.ensure_future(turns.run("alice", busy, 0.0))
        await asyncio.gather(*tasks, last)
        with pytest.raises(KeyError):
            await failing
        waiting = [asyncio.ensure_future(turns.run("bob", busy, SLICE_SECONDS)) for _ in range(3)]
        await asyncio.sleep(0)
        turns.close()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert any(isinstance(one, asyncio.CancelledError) for one in found)

    asyncio.run(scenario())


def test_posted_work_is_done_in_turns_and_its_errors_are_logged() -> None:
    """From within a turn it waits for its own; no caller waits for its result."""
    done: list[str] = []
    errors: list[object] = []

    def fail() -> None:
        raise ValueError("posted")

    def work(turns: Turns) -> None:
        turns.post("alice", done.append, "inner")
        turns.post("alice", fail)
        done.append("outer")

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context["exception"]))
        turns = Turns()
        turns.post("alice", work, turns)
        assert done == ["outer"]
        await turns.run("alice", done.append, "later")
        assert done == ["outer", "inner", "later"]
        assert [str(error) for error in errors] == ["posted"]

    asyncio.run(scenario())


def test_a_long_piece_of_work_is_done_in_steps_between_which_others_have_turns() -> None:
    """A generator of 100 steps ends with its result, and another user's work is done meanwhile."""
    order: list[str] = []

    def steps() -> Generator[None, None, str]:
        for _ in range(100):
            busy(0.0005)
            yield
        return "result"

    async def scenario() -> None:
        turns = Turns()
        long = asyncio.ensure_future(turns.run_steps("mallory", steps()))
        await asyncio.sleep(0)
        await turns.run("bob", order.append, "bob")
        assert not long.done()
        assert await long == "result"

    asyncio.run(scenario())
