"""One frontend's session: its place in the shared window, and what it gets from there, from the node, or instead."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from gateway_slurm.budget import Budget
from gateway_slurm.errors import LinkError
from gateway_slurm.gateway.channels import session as session_module
from gateway_slurm.gateway.channels.session import FLUSH_BYTES, Session
from gateway_slurm.gateway.channels.window import OVERHEAD, Published, Window
from gateway_slurm.link.journal import Record
from helpers.kernel_clients import poll_async


def frames(number, size=0):
    """A message of the kernel's as ZMQ frames."""
    header = {"msg_id": f"m{number}", "msg_type": "stream"}
    content = {"name": "stdout", "text": f"{number};" + "x" * size}
    return [b"topic", b"<IDS|MSG>", b"signature", *(json.dumps(one).encode() for one in (header, {}, {}, content))]


class Node:
    """The journal of a kernel: its records, and how it fails."""

    def __init__(self, records, failures=0):
        self.records, self.failures, self.asked = records, failures, []

    def read(self, start, upto):
        self.asked.append((start, upto))
        return _Reading(self, [record for record in self.records if start <= record.number <= upto])


class _Reading:
    def __init__(self, node, records):
        self._node, self._records = node, records

    async def __aiter__(self):
        if self._node.failures:
            self._node.failures -= 1
            raise LinkError("the link is down")
        for start in range(0, len(self._records), 3):
            await asyncio.sleep(0)
            yield self._records[start : start + 3]

    def close(self):
        pass


class Connection:
    """A kernel's connection, with its window alone."""

    is_known, failure, log = True, "", logging.getLogger("test")

    def __init__(self, node=None, limit=1 << 20):
        self.window, self.node, self.sessions = Window(), node, []
        self.user, self.budget = "alice", Budget(64 << 20, 0)
        self.window.limit = limit

    newest = property(lambda self: self.window.next - 1)
    can_read = property(lambda self: self.node is not None)

    def read(self, start, upto):
        return self.node.read(start, upto)

    def post(self, function):
        function()

    async def check_large(self, records):
        return records

    async def turn(self, function, *arguments):
        await asyncio.sleep(0)
        return function(*arguments)

    def parse(self, record):
        return Published.parse(record.first, record.number, record.frames)

    def attached(self, session, sink):
        pass

    def detached(self, session):
        pass

    def progressed(self, session):
        pass

    def dropped(self, msg_ids):
        self.dropped_replies = msg_ids

    def instead_of(self, _session, after, upto, _parent):
        content = {"name": "stderr", "text": f"missed {after + 1} to {upto}"}
        return [[json.dumps(one).encode() for one in ({"msg_type": "stream"}, {}, {}, content)]]

    def session(self, position=None):
        made = Session(self, "alice", self.newest if position is None else position)
        self.sessions.append(made)
        return made

    def publish(self, *numbers, size=0):
        for number in numbers:
            self.window.add(Published.parse(number, number, frames(number, size))[0])
        for session in self.sessions:
            session.push()


class Websocket:
    """A websocket that writes at once, or when the test says so."""

    protocol, reads_model = "", False

    def __init__(self, *, slow=False):
        self.slow, self.frames, self.writes, self.ended = slow, [], [], ""

    def send(self, frame):
        self.frames.append(frame)
        written = asyncio.get_running_loop().create_future()
        self.writes.append(written)
        if not self.slow:
            written.set_result(None)
        return written

    def write(self):
        self.slow = False
        for written in self.writes:
            if not written.done():
                written.set_result(None)

    def end(self, reason):
        self.ended = reason

    refuse = end

    @property
    def texts(self):
        return [json.loads(frame)["content"]["text"].split(";")[0] for frame in self.frames]


def private(text):
    """The parts of a message for one session alone."""
    return [json.dumps(one).encode() for one in ({"msg_type": "reply"}, {}, {}, {"text": text})]


async def settled(condition):
    """Wait until it is true."""
    assert await poll_async(condition, timeout=10)


async def test_a_session_gets_what_is_published_from_its_begin_on_and_its_own_messages_in_their_place():
    """A message for the session alone comes after what the kernel had published then."""
    connection = Connection()
    connection.publish(1, 2)
    session, page = connection.session(), Websocket()
    session.attach(page)
    connection.publish(3)
    session.put("shell", private("reply"))
    connection.publish(4)
    await settled(lambda: session.position == 4)
    assert page.texts == ["3", "reply", "4"]
    assert not session.has_unsent


async def test_what_a_websocket_did_not_write_goes_to_the_next_one():
    """Nothing is lost and nothing comes twice; the older websocket of the same session is closed."""
    connection = Connection()
    session, first, second = connection.session(), Websocket(), Websocket(slow=True)
    session.attach(first)
    connection.publish(1)
    await settled(lambda: session.position == 1)
    session.attach(second)
    assert first.ended == "a newer websocket of the same session"
    connection.publish(2)
    session.put("shell", private("reply"))
    connection.publish(3)
    assert second.texts == ["2", "reply", "3"]
    second.writes[0].set_result(None)
    session.detach(second)
    assert (session.position, session.has_unsent) == (2, True)
    third = Websocket()
    session.attach(third)
    await settled(lambda: session.position == 3)
    assert third.texts == ["reply", "3"]


async def test_a_websocket_that_does_not_write_gets_no_more_than_its_share():
    """The rest waits in the window, which all share; it goes on when the websocket has written."""
    connection = Connection(limit=1 << 30)
    session, page = connection.session(), Websocket(slow=True)
    session.attach(page)
    connection.publish(*range(1, 101), size=10_000)
    assert FLUSH_BYTES < sum(map(len, page.frames)) < FLUSH_BYTES + 20_000
    page.write()
    await settled(lambda: session.position == 100)
    assert page.texts == [str(number) for number in range(1, 101)]


async def test_large_messages_go_to_as_many_websockets_at_once_as_there_is_room_for(monkeypatch):
    """The others get theirs afterwards; what is not read for long is given up, with the reason, and nothing is lost."""
    connection = Connection(limit=1 << 30)
    connection.budget = Budget(10 << 20, 0)
    monkeypatch.setattr(session_module, "ROOM_INTERVAL", 0.01)
    pages = []
    for number in range(6):
        session, page = Session(connection, f"s{number}", 0), Websocket(slow=True)
        connection.sessions.append(session)
        session.attach(page)
        pages.append(page)
    connection.publish(1, size=2 << 20)
    given = [bool(page.frames) for page in pages]
    assert given == [True] * 3 + [False] * 3  # each costs twice its size until it is written, once for the window
    pages[0].write()
    await settled(lambda: sum(bool(page.frames) for page in pages) == 4)
    monkeypatch.setattr(session_module, "ROOM_SECONDS", 0.05)
    await settled(lambda: any("memory_per_user is 10 MiB" in page.ended for page in pages))
    assert connection.budget.used("alice") <= 10 << 20
    for session, page in zip(connection.sessions, pages, strict=True):
        if page.ended:
            page.frames.clear()
            session.attach(new := Websocket())
            await settled(lambda new=new: new.texts == ["1"])
        page.write()
    await settled(lambda: all(session.position == 1 for session in connection.sessions))


async def test_messages_for_a_session_alone_count_for_its_user_and_are_dropped_over_the_limit():
    """The frontend opens another websocket; its connection hears which replies were dropped."""
    connection = Connection()
    connection.budget = Budget(10 << 20, 0)
    session, page = connection.session(), Websocket(slow=True)
    session.attach(page)
    message = private("x" * (1 << 20))
    message[1] = b'{"msg_id": "cell"}'
    for _ in range(11):
        session.put("shell", message)
    await settled(lambda: page.ended)
    assert "memory_per_user is 10 MiB" in page.ended
    assert set(connection.dropped_replies) == {"cell"}
    assert connection.budget.used("alice") == 0
    session.attach(second := Websocket())
    session.put("shell", private("reply"))
    assert second.texts == ["reply"]
    session.close("the kernel is over")
    assert connection.budget.users() == {}


@pytest.mark.parametrize("failures", [0, 2])
async def test_what_has_left_the_window_comes_from_the_node(failures):
    """In order and once, also where the link is down at first, and while the kernel goes on."""
    node = Node([Record(number, number, frames(number)) for number in range(1, 50)], failures)
    connection = Connection(node, limit=5 * (OVERHEAD + 400))
    session, page = connection.session(), Websocket()
    connection.publish(*range(1, 40))
    session.attach(page)
    session.put("shell", private("reply"))
    connection.publish(*range(40, 50))
    await settled(lambda: session.position == 49)
    expected = [*map(str, range(1, 40)), "reply", *map(str, range(40, 50))]
    assert page.texts == expected
    assert len(node.asked) >= 1 + failures


async def test_what_the_node_has_dropped_is_counted_and_said():
    """Also a number that is missing in the window, and all of it for a kernel without a journal."""
    node = Node([Record(number, number, frames(number)) for number in range(20, 40)])
    connection = Connection(node, limit=5 * (OVERHEAD + 400))
    session, page = connection.session(), Websocket()
    connection.publish(*range(1, 40))
    session.attach(page)
    await settled(lambda: session.position == 39)
    assert page.texts == ["missed 1 to 19", *map(str, range(20, 40))]
    connection.publish(43)
    await settled(lambda: session.position == 43)
    assert page.texts[-2:] == ["missed 40 to 42", "43"]
    connection = Connection(limit=5 * (OVERHEAD + 400))
    session, page = connection.session(), Websocket()
    connection.publish(*range(1, 40))
    oldest = connection.window.oldest
    session.attach(page)
    assert page.texts[:2] == [f"missed 1 to {oldest - 1}", str(oldest)]


async def test_a_websocket_may_begin_at_any_number():
    """One that is in the window, on the node, or still to come."""
    node = Node([Record(number, number, frames(number)) for number in range(1, 40)])
    connection = Connection(node, limit=5 * (OVERHEAD + 400))
    connection.publish(*range(1, 40))
    for since, expected in ((38, ["39"]), (30, [str(number) for number in range(31, 40)]), (10**12, [])):
        session, page = connection.session(), Websocket()
        session.attach(page, since)
        await settled(lambda session=session: session.position == 39)
        assert page.texts == expected
    connection.publish(40)
    assert page.texts == ["40"]


async def test_a_session_that_is_closed_ends_its_reading_and_its_websocket():
    """No task is left."""
    connection = Connection(Node([], failures=10**6), limit=5 * (OVERHEAD + 400))
    session, page = connection.session(), Websocket()
    connection.publish(*range(1, 40))
    session.attach(page)
    await asyncio.sleep(0)
    session.close("the kernel was shut down")
    assert page.ended == "the kernel was shut down"
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
