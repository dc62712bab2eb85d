"""One frontend's queue: in order, counted in bytes, each message once, and no more than the limit."""

from __future__ import annotations

import asyncio
import json

import pytest

from gateway_slurm.gateway.channels import queue as outgoing
from gateway_slurm.gateway.channels.queue import OutgoingQueue, QueuedMessage

LIMIT = 1600


@pytest.fixture
def sent():
    """Messages that were sent, or dropped, in that order."""
    return []


@pytest.fixture
def queue(sent, monkeypatch):
    """A queue whose limit is 1600 bytes."""
    monkeypatch.setattr(outgoing, "QUEUE_LIMIT", LIMIT)
    monkeypatch.setattr(outgoing, "SPARED_LIMIT", 200)
    return OutgoingQueue(sent.append)


def message(number, size, msg_type="stream", channel="iopub"):
    """A message of this size."""
    header = json.dumps({"msg_type": msg_type}).encode()
    return QueuedMessage(channel, [header, b"x" * (size - len(header))], f"m{number}")


def put(queue, *sizes):
    """Queue messages of these sizes; return them."""
    made = [message(number, size) for number, size in enumerate(sizes)]
    for item in made:
        queue.put(item)
    return made


async def test_what_is_within_the_limit_stays(queue, sent):
    """As many bytes as the limit are not over it."""
    put(queue, 400, 1200)
    queue.drop_oldest()
    assert (queue.queued, queue.dropped, sent) == (LIMIT, 0, [])


async def test_the_oldest_output_goes_until_the_rest_is_below_the_limit(queue, sent):
    """It is counted and told of in order, and is waited for no more."""
    made = put(queue, 300, 300, 500, 900)
    queue.drop_oldest()
    assert sent == made[:2]
    assert (queue.queued, queue.dropped) == (1400, 2)
    assert list(queue.ids()) == ["m2", "m3"]
    assert [queue.take(), queue.take()] == made[2:]
    assert queue.queued == 0


async def test_a_message_larger_than_the_limit_is_dropped_too(queue, sent):
    """The limit holds whatever the sizes are, and leaves an empty queue rather than an endless loop."""
    made = put(queue, 50, LIMIT + 1)
    queue.drop_oldest()
    assert sent == made
    assert (queue.queued, bool(queue)) == (0, False)


async def test_replies_and_statuses_outlive_the_output_around_them(queue, sent):
    """Without one of them a frontend would show its cell as running without end."""
    reply, idle = message(1, 50, "execute_reply", "shell"), message(3, 50, "status")
    made = [message(0, 800), reply, message(2, 800), idle, message(4, 800)]
    for item in made:
        queue.put(item)
    queue.drop_oldest()
    assert sent == [made[0], made[2]]
    assert queue.dropped == 2
    assert [queue.take() for _ in range(3)] == [reply, idle, made[4]]
    assert queue.queued == 0


async def test_so_many_replies_that_they_are_too_much_are_dropped_too(queue, sent):
    """The limit holds for all kinds together: those beyond what is spared go, as output does."""
    for number in range(40):
        queue.put(message(number, 50, "execute_reply", "shell"))
    queue.drop_oldest()
    assert queue.queued <= LIMIT
    assert [item.msg_id for item in sent] == [f"m{number}" for number in range(4, 4 + len(sent))]


async def test_what_a_broken_websocket_did_not_send_goes_out_first_by_the_next(queue, sent):
    """What it wrote was sent; the others are in the queue again, in order, and count."""
    made = put(queue, 100, 200, 300)
    loop = asyncio.get_running_loop()
    writes = [loop.create_future() for _ in range(2)]
    for written in writes:
        queue.track(queue.take(), written)
    assert queue.queued == 300
    writes[0].set_result(None)
    writes[1].set_exception(ConnectionError())
    queue.requeue_unsent()
    assert sent == made[:1]
    assert queue.queued == 500
    assert [queue.take(), queue.take()] == made[1:]


async def test_it_is_flushed_once_the_last_message_has_left(queue):
    """Neither while something is queued, nor while the websocket has not sent what it has."""
    assert queue.flushed.is_set()
    put(queue, 50)
    assert not queue.flushed.is_set()
    written = asyncio.get_running_loop().create_future()
    queue.track(queue.take(), written)
    await asyncio.sleep(0)
    assert not queue.flushed.is_set()
    written.set_result(None)
    await asyncio.wait_for(queue.flushed.wait(), 5)


async def test_where_the_websocket_takes_nothing_the_message_stays_the_first(queue):
    """A write that was refused changes neither the order nor the count."""
    made = put(queue, 50, 60)
    queue.track(queue.take(), None)
    assert queue.queued == 110
    assert [queue.take(), queue.take()] == made
