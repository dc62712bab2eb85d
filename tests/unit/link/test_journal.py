"""The server's reading of a journal, from launchers that are honest, hostile, silent or gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_slurm.budget import Budget
from gateway_slurm.errors import LinkError
from gateway_slurm.link import flow, wire
from gateway_slurm.link import journal as journal_module
from gateway_slurm.link.journal import JournalHeader, JournalReading, Record
from gateway_slurm.link.tunnel import Streams

HEADER = {
    "oldest": 3,
    "next": 9,
    "start": 5,
    "positions": {"s": 4},
    "notes": {"m": "text"},
    "subscribed": True,
    "trouble": "",
}


class Launcher:
    """What comes up on the stream is said by the test; ``deliver`` runs on the loop of the streams."""

    def __init__(self) -> None:
        self.link: Any = SimpleNamespace(flush=lambda: None)
        self.streams = Streams(lambda: self.link)
        self.streams.attach(self.link)
        self.streams.resume({"streams": {}, "opened": 0})

    def sent(self) -> list[tuple[str, Any]]:
        messages = []
        while (frame := self.link.outbox.next_frame()) is not None:
            messages += [wire.decode(body, wire.DOWN) for body in wire.unpack(frame)]
        return messages

    def say(self, data: bytes, *, closed: bool = False) -> None:
        for start in range(0, len(data), flow.CHUNK):
            self.streams.message("DATA", 1, data[start : start + flow.CHUNK])
        if closed:
            self.streams.message("CLOSE", 1, b"")


def record(first: int, number: int, *frames: bytes) -> bytes:
    """A record as it goes over the stream."""
    return wire.frame(struct.pack(">QQ", first, number) + wire.pack(list(frames)))


def stream(*records: bytes, **header: Any) -> bytes:
    """A stream as a launcher sends it."""
    return wire.frame(json.dumps({**HEADER, **header}).encode()) + b"".join(records)


def reading_of(launcher: Launcher, *, start: int | None = 5, upto: int = 0, **more: Any) -> JournalReading:
    """A reading whose stream is open, on this loop."""
    reading = JournalReading("k", start=start, upto=upto, **more)
    reading.attach(launcher.streams)
    return reading


async def rest_of(reading: JournalReading) -> list[Record]:
    """All records until the end."""
    return [found async for records in reading for found in records]


async def test_a_journal_is_read_as_the_launcher_has_it():
    """The header, then records as they come, and the end; the highest number is passed on."""
    launcher, delivered = Launcher(), []
    reading = reading_of(launcher, start=None, upto=12, delivered=delivered.append)
    assert launcher.sent() == [("OPEN", (1, b"k\0journal::12"))]
    launcher.say(stream(record(5, 5, b"topic", b"x" * 300_000)))
    assert await reading.header() == JournalHeader(3, 9, 5, {"s": 4}, {"m": "text"}, True, "")
    assert await anext(reading) == [Record(5, 5, [b"topic", b"x" * 300_000])]
    launcher.say(record(7, 9, b"", b"y") + record(10, 10), closed=True)
    assert await rest_of(reading) == [Record(7, 9, [b"", b"y"]), Record(10, 10, [])]
    assert delivered == [8, 5, 10]
    reading.close()


def flood(count: int) -> Iterator[bytes]:
    """So many records, a hundred in each piece."""
    yield stream(start=1, oldest=1, next=1)
    for begin in range(1, count, 100):
        yield b"".join(record(number, number, b"topic", b"x" * 200) for number in range(begin, begin + 100))


async def test_a_reading_is_for_another_loop_than_the_link():
    """A flood from the service's thread: it waits for the reader within the stream's credit, and wakes it seldom."""
    launcher, count, woken = Launcher(), 20_000, 0
    service = asyncio.new_event_loop()
    thread = threading.Thread(target=service.run_forever)
    thread.start()
    reading = JournalReading("k", start=1, upto=0)
    loop = asyncio.get_running_loop()
    wake = loop.call_soon_threadsafe

    def counting(*arguments: Any) -> Any:
        nonlocal woken
        woken += 1
        return wake(*arguments)

    async def send() -> None:
        reading.attach(launcher.streams)
        allowed, at = flow.WINDOW, 0
        for piece in flood(count):
            while at + len(piece) > allowed:
                await asyncio.sleep(0.001)
                allowed += sum(flow.credit_of(payload) for name, (_, payload) in launcher.sent() if name == "CREDIT")
            launcher.streams.message("DATA", 1, piece)
            at += len(piece)
        launcher.streams.message("CLOSE", 1, b"")

    loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
    try:
        sending = asyncio.run_coroutine_threadsafe(send(), service)
        found = [found.number for found in await asyncio.wait_for(rest_of(reading), 60)]
        sending.result(10)
    finally:
        loop.call_soon_threadsafe = wake  # type: ignore[method-assign]
        service.call_soon_threadsafe(service.stop)
        thread.join()
        service.close()
    assert found == list(range(1, count + 1))
    assert woken <= count / 50


async def test_a_record_may_be_larger_than_a_header_and_begin_behind_it():
    """The header's limit is for the header alone."""
    launcher = Launcher()
    reading = reading_of(launcher)
    size = journal_module.MAX_HEADER + 1
    data = stream() + wire.frame(struct.pack(">QQ", 5, 5) + wire.pack([b"x" * size]))
    task = asyncio.ensure_future(anext(reading))
    for start in range(0, len(data), flow.WINDOW // 4):
        launcher.say(data[start : start + flow.WINDOW // 4])
        for _ in range(8):
            await asyncio.sleep(0)
    assert [len(record.frames[0]) for record in await asyncio.wait_for(task, 10)] == [size]


async def test_a_record_for_which_there_is_no_room_is_left_out():
    """It is read and thrown away, and its size and the reason are passed on; those before and after it come."""
    launcher, skipped, budget = Launcher(), [], Budget(10 << 20, 0)
    reading = reading_of(
        launcher,
        holding=partial(budget.holding, "alice", "reading"),
        skipped=lambda size, reason: skipped.append((size, reason)),
    )
    bodies = [b"a", b"b" * (4 << 20), b"c" * (6 << 20), b"d"]
    found, mark = [], 0
    data = stream(*(record(number, number, body) for number, body in enumerate(bodies, 5)))
    collecting = asyncio.ensure_future(rest_of(reading))
    for start in range(0, len(data), flow.CHUNK):
        launcher.say(data[start : start + flow.CHUNK])
        launcher.sent()
        await asyncio.sleep(0.001)
        mark = max(mark, budget.used("alice"))
    launcher.say(b"", closed=True)
    found = await collecting
    assert [(one.number, len(one.frames[0])) for one in found] == [(5, 1), (6, 4 << 20), (8, 1)]
    assert skipped[0][0] >= 6 << 20
    assert "memory_per_user is 10 MiB" in skipped[0][1]
    assert 8 << 20 <= mark <= 10 << 20
    reading.close()
    assert budget.users() == {}


async def test_a_reading_over_its_users_limit_ends_with_the_reason():
    """The reader may begin again where it was."""
    launcher, budget = Launcher(), Budget(1 << 20, 0)
    reading = reading_of(launcher, holding=partial(budget.holding, "alice", "reading"))
    launcher.say(stream(record(5, 5, b"x" * 500)))
    assert len(await anext(reading)) == 1
    budget.holding("alice", "held").add(2 << 20)
    launcher.say(record(6, 6, b"x" * 500)[:100])
    with pytest.raises(LinkError, match="memory_per_user is 1 MiB"):
        await rest_of(reading)
    assert budget.kinds()["reading"] == 0


async def test_what_is_not_read_has_no_credit():
    """A reader that is busy holds the launcher up; one that waits for a large record does not."""
    launcher = Launcher()
    reading = reading_of(launcher)
    launcher.sent()
    size = journal_module.READ_AHEAD + 3 * flow.WINDOW
    piece = wire.frame(struct.pack(">QQ", 5, 5) + wire.pack([b"x" * size]))
    launcher.say(stream() + piece[: flow.WINDOW // 2])
    assert launcher.sent()  # it may send ahead
    for start in range(flow.WINDOW // 2, journal_module.READ_AHEAD, flow.WINDOW // 4):
        launcher.say(piece[start : start + flow.WINDOW // 4])
    launcher.sent()
    launcher.say(piece[journal_module.READ_AHEAD : journal_module.READ_AHEAD + flow.WINDOW // 2])
    assert launcher.sent() == []
    task = asyncio.ensure_future(anext(reading))
    for start in range(journal_module.READ_AHEAD + flow.WINDOW // 2, len(piece), flow.WINDOW // 4):
        launcher.say(piece[start : start + flow.WINDOW // 4])
        for _ in range(5):
            await asyncio.sleep(0)
    assert [len(found.frames[0]) for found in await asyncio.wait_for(task, 10)] == [size]
    for _ in range(2 + journal_module.READ_AHEAD // flow.WINDOW):
        launcher.streams.message("DATA", 1, bytes(flow.WINDOW))
    with pytest.raises(LinkError, match="credit"):
        await asyncio.wait_for(rest_of(reading_after_abort(reading)), 10)


def reading_after_abort(reading: JournalReading) -> JournalReading:
    """Without the bytes that wait, which are no record."""
    reading._unparsed.clear()
    return reading


HOSTILE = {
    "no JSON": wire.frame(b"{"),
    "a list": wire.frame(b"[]"),
    "deep JSON": wire.frame(b"[" * 100_000),
    "a large header": struct.pack(">I", journal_module.MAX_HEADER + 1),
    "no numbers": wire.frame(b"{}"),
    "numbers that are none": stream(oldest=True),
    "a start before the oldest": stream(oldest=6),
    "a start from the future": stream(start=10),
    "a number out of range": stream(next=wire.MAX_NUMBER),
    "a short record": stream(wire.frame(b"x" * 15)),
    "a number again": stream(record(5, 5), record(5, 5)),
    "numbers that fall": stream(record(7, 7), record(6, 8)),
    "a range upside down": stream(record(7, 6)),
    "a number before the start": stream(record(4, 4)),
    "a record out of range": stream(record(5, wire.MAX_NUMBER)),
    "a large record": stream(struct.pack(">I", wire.MAX_RECORD + 1)),
    "too many frames": stream(record(5, 5, *[b""] * (wire.MAX_RECORD_FRAMES + 1))),
    "frames that do not fit": stream(wire.frame(struct.pack(">QQ", 5, 5) + struct.pack(">I", 9) + b"x")),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_launcher_that_breaks_the_protocol_ends_this_reading(data):
    """With an error, and its stream is closed; another kernel's is not touched."""
    launcher = Launcher()
    reading = reading_of(launcher)
    launcher.sent()
    launcher.say(data)
    with pytest.raises(LinkError):
        await asyncio.wait_for(rest_of(reading), 10)
    with pytest.raises(LinkError):
        await anext(reading)
    await asyncio.sleep(0)
    assert [name for name, _ in launcher.sent()][-1] == "CLOSE"


async def test_good_records_before_a_bad_one_are_delivered():
    """Then the error follows."""
    launcher = Launcher()
    reading = reading_of(launcher)
    launcher.say(stream(record(5, 5, b"a"), record(5, 5, b"b")))
    assert await anext(reading) == [Record(5, 5, [b"a"])]
    with pytest.raises(LinkError, match="behind 5"):
        await anext(reading)


@given(st.binary(max_size=400), st.integers(0, 400))
@settings(deadline=None, max_examples=200)
def test_whatever_a_launcher_sends_is_a_journal_or_an_error(data, cut):
    """Also behind an honest beginning."""

    async def read() -> None:
        launcher = Launcher()
        reading = reading_of(launcher)
        launcher.say(stream(record(5, 5, b"a"))[:cut] + data, closed=True)
        with contextlib.suppress(LinkError):
            await asyncio.wait_for(rest_of(reading), 10)

    asyncio.run(read())


async def test_an_end_inside_a_record_is_an_error():
    """The launcher had no memory for the rest of it."""
    launcher = Launcher()
    reading = reading_of(launcher)
    launcher.say(stream(record(5, 5, b"x" * 100))[:-1], closed=True)
    with pytest.raises(LinkError, match="inside a record"):
        await anext(reading)


async def test_a_kernel_without_a_journal_is_said_so():
    """Its launcher closes the stream at once."""
    launcher = Launcher()
    reading = reading_of(launcher)
    launcher.say(b"", closed=True)
    with pytest.raises(LinkError, match="has no journal"):
        await reading.header()


async def test_a_launcher_that_is_gone_for_good_is_an_error():
    """Before the reading and during it; a stream that the launcher closes is no error."""
    launcher = Launcher()
    reading = reading_of(launcher)
    launcher.say(stream())
    await reading.header()
    launcher.streams.end()
    with pytest.raises(LinkError, match="gone"):
        await anext(reading)
    with pytest.raises(LinkError, match="gone"):
        await reading_of(launcher).header()


async def test_a_bounded_reading_fails_after_some_silence(monkeypatch):
    """An endless one waits; it can be closed at any time, also before its stream is open."""
    monkeypatch.setattr(journal_module, "SILENCE_SECONDS", 0.05)
    launcher = Launcher()
    bounded, endless = reading_of(launcher, upto=9), reading_of(launcher)
    launcher.sent()
    with pytest.raises(LinkError, match=r"0\.05 s"):
        await bounded.header()
    task = asyncio.ensure_future(rest_of(endless))
    await asyncio.sleep(0.1)
    assert not task.done()
    endless.close()
    endless.close()
    assert await asyncio.wait_for(task, 10) == []
    early = JournalReading("k", start=1, upto=0)
    early.close()
    early.attach(launcher.streams)
    await asyncio.sleep(0)
    assert [name for name, _ in launcher.sent()] == ["CLOSE", "CLOSE"]
    with pytest.raises(LinkError, match="closed"):
        await early.header()


async def test_a_reading_outlives_its_link():
    """On the next link it goes on where it was, in the middle of a record."""
    launcher = Launcher()
    reading = reading_of(launcher)
    data = stream(record(5, 5, b"x" * 200_000), record(6, 6, b"y"))
    launcher.sent()
    launcher.say(data[:100_000])
    await reading.header()
    launcher.streams.hold()
    positions = launcher.streams.attach(launcher.link)["streams"]
    launcher.streams.resume({"streams": {"1": [0, 0]}, "opened": 1})
    assert positions["1"][0] == 100_000
    launcher.say(data[100_000:])
    assert [found.number for found in await anext(reading)] == [5, 6]
