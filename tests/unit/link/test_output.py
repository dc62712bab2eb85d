"""The server's reading of kept output, from launchers that are honest, hostile, silent or gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_slurm.errors import LinkError
from gateway_slurm.link import flow, wire
from gateway_slurm.link import output as kept
from gateway_slurm.link.output import KeptOutput, read_kept
from gateway_slurm.link.tunnel import Streams

LIMIT = 100_000
HEADER = {"dropped": 2, "positions": {"s": "a"}, "acked": "a", "keeps": True}


class Launcher:
    """What comes up on the stream is said by the test."""

    def __init__(self) -> None:
        self.link: Any = SimpleNamespace(flush=lambda: None)
        self.streams = Streams(lambda: self.link)
        self.streams.attach(self.link)
        self.streams.resume({"streams": {}, "opened": 0})

    def read(self) -> asyncio.Task[KeptOutput]:
        return asyncio.ensure_future(read_kept(self.streams, "k", limit=LIMIT))

    def sent(self) -> list[tuple[str, Any]]:
        messages = []
        while (frame := self.link.outbox.next_frame()) is not None:
            messages += [wire.decode(body, wire.DOWN) for body in wire.unpack(frame)]
        return messages

    def say(self, data: bytes, *, closed: bool = True) -> None:
        for start in range(0, len(data), flow.CHUNK):
            self.streams.message("DATA", 1, data[start : start + flow.CHUNK])
        if closed:
            self.streams.message("CLOSE", 1, b"")


def records(header: dict[str, Any], *messages: list[bytes]) -> bytes:
    """A stream as a launcher sends it."""
    return b"".join(map(wire.frame, [json.dumps(header).encode(), *map(wire.pack, messages)]))


async def reading(launcher: Launcher) -> asyncio.Task[KeptOutput]:
    """A reading whose stream is open."""
    task = launcher.read()
    await asyncio.sleep(0)
    assert launcher.sent() == [("OPEN", (1, b"k\0kept"))]
    return task


async def test_what_the_launcher_kept_is_read_whole():
    """Messages in their order, with the fields that describe them; the stream is closed."""
    launcher = Launcher()
    task = await reading(launcher)
    launcher.say(records(HEADER, [b"topic", b"x" * 50_000], [b"", b"y"]))
    assert await task == KeptOutput([[b"topic", b"x" * 50_000], [b"", b"y"]], 2, {"s": "a"}, "a", True)
    assert launcher.streams._clients == {}
    assert ("CLOSE", (1, b"")) in launcher.sent()


async def test_a_message_that_could_not_be_opened_is_counted():
    """An empty record stands for it."""
    launcher = Launcher()
    task = await reading(launcher)
    launcher.say(records(HEADER, [b"a"], [], [b"b"]))
    found = await task
    assert (found.messages, found.dropped) == ([[b"a"], [b"b"]], 3)


async def test_credit_is_given_for_what_was_read():
    """More than a window comes."""
    launcher = Launcher()
    task = asyncio.ensure_future(read_kept(launcher.streams, "k", limit=4 * flow.WINDOW))
    await asyncio.sleep(0)
    launcher.say(records(HEADER, *[[bytes(100_000)]] * 30))
    assert len((await task).messages) == 30


@pytest.mark.parametrize(
    "data",
    [
        b"",
        wire.frame(b"no json"),
        wire.frame(b"[]"),
        wire.frame(b'{"dropped": "many"}'),
        records(HEADER) + wire.frame(b"\0\0\0\x09x"),
        (2**31).to_bytes(4, "big"),
        b"\0" * (2 * LIMIT + kept.MAX_HEADER + 4),
    ],
    ids=["nothing", "no json", "no object", "no number", "half a frame", "a huge record", "more than was kept"],
)
async def test_a_launcher_that_sends_something_else_is_an_error(data):
    """It ends that reading and nothing else; memory is bounded by the amount that the settings keep."""
    launcher = Launcher()
    task = await reading(launcher)
    launcher.say(data)
    with pytest.raises(LinkError):
        await task
    assert launcher.streams._clients == {}


@given(st.binary(max_size=400), st.integers(0, 400))
@settings(deadline=None)
def test_whatever_a_launcher_sends_is_kept_output_or_an_error(data, cut):
    """Also where a good stream is continued by noise."""

    async def read() -> None:
        launcher = Launcher()
        task = await reading(launcher)
        launcher.say(records(HEADER, [b"a"])[:cut] + data)
        with contextlib.suppress(LinkError):
            assert isinstance(await task, KeptOutput)

    asyncio.run(read())


async def test_without_a_word_it_is_given_up(monkeypatch):
    """A launcher that is silent, or out of reach, does not hold the reader without a limit."""
    monkeypatch.setattr(kept, "SILENCE_SECONDS", 0.05)
    launcher = Launcher()
    task = await reading(launcher)
    launcher.say(b"\0", closed=False)
    with pytest.raises(LinkError, match="sent nothing"):
        await task
    assert launcher.streams._clients == {}


async def test_a_launcher_that_is_gone_for_good_has_kept_nothing():
    """Before the reading, and while it goes on."""
    launcher = Launcher()
    task = await reading(launcher)
    launcher.streams.end()
    for attempt in (task, launcher.read()):
        with pytest.raises(LinkError):
            await attempt
