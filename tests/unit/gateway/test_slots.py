"""Requests of one user are handled so many at once, in their order, and kernelspecs are read user by user."""

from __future__ import annotations

import asyncio
import threading
import weakref

import pytest

from gateway_slurm.gateway import slots
from gateway_slurm.gateway.slots import TooManyRequests, UserSlots
from gateway_slurm.gateway.specs.reader import SpecReader


@pytest.fixture
def reader():
    """A reader, closed afterwards."""
    made = SpecReader()
    yield made
    made.close()


async def test_more_requests_of_a_user_wait_in_order_and_those_of_others_do_not(monkeypatch):
    """A place that is given back goes to the first that waits; a cancelled one is passed over."""
    monkeypatch.setattr(slots, "MAX_WAITING", 3)
    places, entered = UserSlots(), []

    async def enter(name):
        await places.enter("alice", 2)
        entered.append(name)

    tasks = [asyncio.ensure_future(enter(number)) for number in range(5)]
    await asyncio.sleep(0)
    assert entered == [0, 1]
    await asyncio.wait_for(places.enter("bob", 2), 1)
    with pytest.raises(TooManyRequests):
        await places.enter("alice", 2)
    tasks[2].cancel()
    await asyncio.gather(tasks[2], return_exceptions=True)
    places.leave("alice")
    places.leave("alice")
    await asyncio.gather(tasks[3], tasks[4])
    assert entered == [0, 1, 3, 4]
    for user in ("alice", "alice", "bob"):
        places.leave(user)
    assert (dict(places._under_way), dict(places._waiting)) == ({}, {})


async def test_a_place_is_given_back_with_its_request(monkeypatch):
    """Also where the request has ended in no known way."""
    places = UserSlots()

    class Request:
        pass

    request = Request()
    await places.enter("alice", 1)
    weakref.finalize(request, places.leave, "alice")
    del request
    await asyncio.wait_for(places.enter("alice", 1), 1)


async def test_a_users_reads_take_one_thread(reader):
    """While one user's is stuck, another user's is done."""
    stuck = threading.Event()
    first = [asyncio.ensure_future(reader.run("alice", stuck.wait, 30)) for _ in range(20)]
    assert await asyncio.wait_for(reader.run("bob", lambda: 3), 10) == 3
    assert not any(task.done() for task in first)
    stuck.set()
    await asyncio.gather(*first)


async def test_those_who_wait_for_the_same_share_what_is_read_next(reader):
    """Who asks while it is read gets a later result: it may have changed since."""
    calls, begun, go = [], threading.Event(), threading.Event()

    def read():
        calls.append(0)
        begun.set()
        go.wait(30)
        return len(calls)

    early = [asyncio.ensure_future(reader.run_shared("alice", read)) for _ in range(10)]
    await asyncio.to_thread(begun.wait, 30)
    late = [asyncio.ensure_future(reader.run_shared("alice", read)) for _ in range(10)]
    await asyncio.sleep(0)
    go.set()
    assert set(await asyncio.gather(*early)) == {1}
    assert set(await asyncio.gather(*late)) == {2}
