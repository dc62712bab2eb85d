"""The server's end of the tunnel: clients' connections while links come and go, and what a launcher may claim."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_slurm.link import flow, wire, zmtp
from gateway_slurm.link.tunnel import KernelTunnel, Streams
from helpers.kernel_clients import poll_async

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """A kernel's tunnel, and the link that carries it or none; what comes up is said by the test."""

    def __init__(self, directory: Path) -> None:
        self.link: Any = None
        self.streams = Streams(lambda: self.link)
        self.tunnel = KernelTunnel(self.streams, "k", str(directory / "k"))
        self.connections: list[Connection] = []

    async def connect(self) -> Connection:
        """One more client of the shell channel, whom the tunnel knows."""
        known = set(self.tunnel.clients)
        connection = await asyncio.open_unix_connection(f"{self.tunnel.prefix}-1")
        self.connections.append(connection)
        assert await poll_async(lambda: self.tunnel.clients - known, timeout=10, interval=0.001)
        return connection

    def link_up(self) -> dict[str, Any]:
        """A new link; returns what WELCOME says."""
        self.link = SimpleNamespace(flush=lambda: None)
        return self.streams.attach(self.link)

    def link_down(self) -> None:
        self.link = None
        self.streams.hold()

    def sent(self) -> list[tuple[str, Any]]:
        messages = []
        while (frame := self.link.outbox.next_frame()) is not None:
            messages += [wire.decode(body, wire.DOWN) for body in wire.unpack(frame)]
        return messages

    async def sent_in_all(self, count: int) -> list[tuple[str, Any]]:
        """The next messages, when they are so many."""
        return await self.sent_until(lambda messages: len(messages) >= count)

    async def sent_until(self, done: Callable[[list[tuple[str, Any]]], bool]) -> list[tuple[str, Any]]:
        """All that goes out until ``done(all)``; clients are read on as a link that takes data has it."""
        messages: list[tuple[str, Any]] = []

        def more() -> bool:
            messages.extend(self.sent())
            self.streams.read_on()
            return done(messages)

        assert await poll_async(more, timeout=10, interval=0.001), messages
        return messages


@pytest.fixture
def any_bytes(monkeypatch):
    """What passes need not be ZMTP."""
    monkeypatch.setattr(zmtp.MessageSizes, "feed", lambda _self, _data: "")


@pytest.fixture
async def server(tmp_path) -> AsyncIterator[Server]:
    """A tunnel that listens, with its first link up."""
    server = Server(tmp_path)
    await server.tunnel.listen()
    server.link_up()
    server.streams.resume({"streams": {}, "opened": 0})
    yield server
    server.tunnel.close()
    for _reader, writer in server.connections:
        writer.close()


OPEN = b"k\0shell"


def size_of(message: tuple[str, Any]) -> int:
    """The bytes that a message of a stream carries."""
    return len(message[1][1])


async def closed(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ends now."""
    return await asyncio.wait_for(reader.read(), 10) == b""


async def test_a_client_goes_on_where_it_was(any_bytes, server):
    """A connection outlives the link: what the launcher lacks of it is sent again, and it gets what follows."""
    reader, writer = await server.connect()
    writer.write(b"request")
    assert await server.sent_in_all(2) == [("OPEN", (1, OPEN)), ("DATA", (1, b"request"))]
    server.streams.message("DATA", 1, b"ans")
    server.link_down()
    writer.write(b" and more")
    assert server.link_up()["streams"] == {"1": [3, 3]}
    server.streams.resume({"streams": {"1": [3, 0]}, "opened": 1})
    assert await server.sent_in_all(2) == [("DATA", (1, b"uest")), ("DATA", (1, b" and more"))]
    server.streams.message("DATA", 1, b"wer")
    assert await asyncio.wait_for(reader.readexactly(6), 10) == b"answer"


async def test_a_client_that_comes_without_a_link_waits_for_one(server):
    """It may send a little, is held up then, and is opened on the next link; one that left meanwhile is not."""
    server.link_down()
    _reader, gone = await server.connect()
    gone.close()
    assert await poll_async(lambda: not server.tunnel.clients, timeout=10)
    _reader, writer = await server.connect()
    data = bytes(4 * flow.BACKLOG)
    writer.write(data)
    (client,) = server.tunnel.clients
    assert await poll_async(lambda: client.paused, timeout=10)
    assert server.streams._outbox._streams[2].sending.size < 3 * flow.BACKLOG
    server.link_up()
    server.streams.resume({"streams": {}, "opened": 0})
    messages = await server.sent_until(lambda messages: sum(map(size_of, messages)) == len(OPEN + data))
    assert messages[0] == ("OPEN", (2, OPEN))
    assert {number for _name, (number, _payload) in messages} == {2}


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"streams": None, "opened": 2},
        {"streams": {"1": [10**9, 0], "2": [7, 3]}, "opened": 2},
        {"streams": {"1": [-1, -1], "2": [7, 3]}, "opened": 2},
        {"streams": {"1": "x", "2": [7, 3], "3": [1, 1], "y": 1}, "opened": 2},
        {"streams": {"2": [7, 3]}, "opened": 2},
    ],
    ids=str,
)
async def test_a_launcher_that_claims_nonsense_ends_that_stream_only(any_bytes, server, report):
    """A client whose stream the launcher does not know, or tells what cannot be, is let go; others are served."""
    connections = [await server.connect() for _ in range(2)]
    for _reader, writer in connections:
        writer.write(b"request")
    await server.sent_in_all(4)
    for number in (1, 2):
        server.streams.message("CREDIT", number, (3).to_bytes(4, "big"))
    server.link_down()
    server.link_up()
    server.streams.resume(report)
    (first, _writer), (second, _other) = connections
    assert await closed(first)
    if "2" in (report.get("streams") or {}):
        server.streams.message("DATA", 2, b"answer")
        assert await asyncio.wait_for(second.readexactly(6), 10) == b"answer"
    else:
        assert await closed(second)


async def test_a_launcher_that_ignores_the_window_loses_its_stream(any_bytes, server):
    """The client's connection is cut, and the launcher hears of it."""
    reader, _writer = await server.connect()
    await server.sent_in_all(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.streams, "took", lambda _number, _count: None)
        for _ in range(flow.WINDOW // flow.CHUNK + 1):
            server.streams.message("DATA", 1, bytes(flow.CHUNK))
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(2 * flow.WINDOW), 10)
    assert await server.sent_in_all(1) == [("CLOSE", (1, b""))]


async def test_a_message_without_an_end_closes_its_connection(server):
    """Its client, which holds all of it in memory, is cut off before it is too large."""
    reader, _writer = await server.connect()
    await server.sent_in_all(1)
    server.streams.message("DATA", 1, b"\xff" + bytes(8) + b"\x7f\x03" + bytes(53))
    assert len(await asyncio.wait_for(reader.readexactly(64), 10)) == 64
    server.streams.message("DATA", 1, b"\x03" + (zmtp.MAX_MESSAGE + 1).to_bytes(8, "big"))
    assert await closed(reader)
    assert await server.sent_in_all(1) == [("CLOSE", (1, b""))]


async def test_without_a_launcher_for_good_connections_end(server):
    """Those that are open, and those that come."""
    reader, _writer = await server.connect()
    server.link_down()
    server.streams.end()
    assert await closed(reader)
    reader, _writer = await asyncio.open_unix_connection(f"{server.tunnel.prefix}-1")
    assert await closed(reader)
