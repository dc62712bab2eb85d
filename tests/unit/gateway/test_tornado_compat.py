"""A websocket that stays open when a message is too large: with tornado's own server and client."""

from __future__ import annotations

import asyncio
import inspect
import tracemalloc
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from tornado import httpserver, netutil, util, web, websocket

from gateway_slurm.budget import Budget
from gateway_slurm.gateway import tornado_compat
from gateway_slurm.gateway.tornado_compat import KEPT, LimitedProtocol, limit_messages
from helpers.kernel_clients import poll_async

LIMIT = 1 << 20
BUDGET = Budget(6 << 20, 0)


class Echo(websocket.WebSocketHandler):
    """Answers each message with its size, and an oversized one with what is known of it."""

    compressed = False

    async def get(self, *args: str, **kwargs: str) -> None:
        limit_messages(self, LIMIT, self.oversized, partial(BUDGET.holding, "alice", "incoming"))
        await super().get(*args, **kwargs)

    def get_compression_options(self) -> dict[str, Any] | None:
        return {} if self.compressed else None

    def oversized(self, beginning: bytes, end: bytes, size: int, refusal: str) -> None:
        if beginning.startswith(b"raise"):
            raise ValueError("a fault of the handler's")
        self.write_message(refusal or f"{size}:".encode() + beginning[:20] + b"..." + end[-20:], binary=not refusal)
        assert len(beginning) <= KEPT
        assert len(end) <= KEPT

    def on_message(self, message: str | bytes) -> None:
        self.write_message(f"took {len(message)}")


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """A server with that handler."""
    server = httpserver.HTTPServer(web.Application([("/", Echo)]))
    sockets = netutil.bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    yield f"ws://127.0.0.1:{sockets[0].getsockname()[1]}/"
    server.stop()
    await server.close_all_connections()


@pytest.mark.parametrize(
    "name", ["_receive_frame", "_read_bytes", "_handle_message", "_run_callback"], ids=lambda name: name.strip("_")
)
def test_tornado_has_the_method(name: str) -> None:
    """A new release of tornado that took one away would close websockets, or fail."""
    method = getattr(websocket.WebSocketProtocol13, name, None)
    assert method is not None, f"tornado's WebSocketProtocol13.{name} is gone: see tornado_compat"
    if name in vars(LimitedProtocol):
        ours = inspect.signature(getattr(LimitedProtocol, name)).parameters
        assert list(inspect.signature(method).parameters) == list(ours)


def test_tornado_has_the_other_members() -> None:
    """The parameters with their limit, and the attributes of a protocol."""
    made = websocket.WebSocketProtocol13(None, False, websocket._WebSocketParams(max_message_size=7))  # type: ignore[arg-type]
    assert made.params.max_message_size == 7
    for name in ("_decompressor", "_fragmented_message_buffer", "_frame_mask", "_wire_bytes_in"):
        assert hasattr(made, name), f"tornado's WebSocketProtocol13.{name} is gone: see tornado_compat"
    assert util._websocket_mask(b"\0\0\0\0", b"x") == b"x"


async def ask(connection: websocket.WebSocketClientConnection, message: str | bytes) -> str:
    """The answer to a message."""
    await connection.write_message(message, binary=isinstance(message, bytes))
    answer = await asyncio.wait_for(connection.read_message(), 20)
    return answer.decode() if isinstance(answer, bytes) else str(answer)


async def send_fragments(connection: websocket.WebSocketClientConnection, message: bytes, sizes: int) -> None:
    """Send a message in frames of this size, as browsers do, with a ping between them."""
    protocol = connection.protocol
    assert isinstance(protocol, websocket.WebSocketProtocol13)
    for start in range(0, len(message), sizes):
        protocol._write_frame(start + sizes >= len(message), 0 if start else 2, message[start : start + sizes])
        if start % (sizes * 64) == 0:
            await protocol._write_frame(True, 0x9, b"ping")


async def test_a_message_that_is_too_large_is_reported(url: str) -> None:
    """With its beginning, its end and its size; the websocket goes on, and up to the limit a message is taken."""
    connection = await websocket.websocket_connect(url)
    assert await ask(connection, b"x" * LIMIT) == f"took {LIMIT}"
    for size in (LIMIT + 1, LIMIT + 3, 5 * LIMIT + 2):
        message = b"the beginning" + b"x" * (size - 20) + b"the end"
        for kind in (message, message.decode()):
            assert await ask(connection, kind) == f"{size}:{message[:20].decode()}...{message[-20:].decode()}"
        assert await ask(connection, "small") == "took 5"
    connection.close()


@pytest.mark.parametrize("frame", [100, 4096, 300_000, 2 * LIMIT])
async def test_a_message_in_fragments_is_reported(url: str, frame: int) -> None:
    """Browsers send a large message in many frames; frames of control may be between them."""
    connection = await websocket.websocket_connect(url)
    message = b"the beginning" + b"x" * (3 * LIMIT if frame > 1000 else LIMIT + 5000) + b"the end"
    for _ in range(1 + (frame > 1000)):
        await send_fragments(connection, message, frame)
        answer = await asyncio.wait_for(connection.read_message(), 20)
        assert answer == f"{len(message)}:".encode() + message[:20] + b"..." + message[-20:]
        await send_fragments(connection, b"y" * (LIMIT - 5), frame)
        assert await asyncio.wait_for(connection.read_message(), 20) == f"took {LIMIT - 5}"
    connection.close()


async def test_a_user_has_only_so_much_that_is_not_complete(url: str) -> None:
    """The websockets together: what is over is reported with the reason, and all is given back."""
    connections = [await websocket.websocket_connect(url) for _ in range(8)]
    piece = b"x" * (LIMIT - 1000)
    for connection in connections:
        protocol = connection.protocol
        assert isinstance(protocol, websocket.WebSocketProtocol13)
        await protocol._write_frame(False, 2, piece)
    assert await poll_async(lambda: BUDGET.shed_count["incoming"] == 2, timeout=10)
    assert BUDGET.used("alice") == 6 * len(piece)
    assert await ask(await websocket.websocket_connect(url), "small") == "took 5"
    answers = []
    for connection in connections:
        assert connection.protocol is not None
        await connection.protocol._write_frame(True, 0, b"x")  # type: ignore[attr-defined]
        answers.append(str(await asyncio.wait_for(connection.read_message(), 20)))
    assert [answer for answer in answers if "memory_per_user is 6 MiB" in answer] == answers[6:]
    assert answers[:6] == [f"took {len(piece) + 1}"] * 6
    assert BUDGET.used("alice") == 0
    protocol = connections[0].protocol
    assert isinstance(protocol, websocket.WebSocketProtocol13)
    await protocol._write_frame(False, 2, piece)
    assert await poll_async(lambda: BUDGET.used("alice") == len(piece), timeout=10)
    protocol.stream.close()
    assert await poll_async(lambda: BUDGET.used("alice") == 0, timeout=10)


async def test_nothing_of_it_is_stored(url: str) -> None:
    """A message of fifty times the limit costs no memory."""
    connection = await websocket.websocket_connect(url)
    message = b"x" * (50 * LIMIT)
    protocol = connection.protocol
    assert isinstance(protocol, websocket.WebSocketProtocol13)
    stream = protocol.stream
    # Unmasked and in pieces, so that this client stores none of it either.
    await stream.write(b"\x82\x7f" + len(message).to_bytes(8, "big"))
    tracemalloc.start()
    try:
        for start in range(0, len(message), LIMIT):
            await stream.write(memoryview(message)[start : start + LIMIT])
        answer = await asyncio.wait_for(connection.read_message(), 20)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer is not None
    assert answer.startswith(f"{len(message)}:".encode())
    assert peak < 12 * LIMIT
    connection.close()


async def test_a_compressed_websocket_has_tornados_limit(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its message is only known once it is whole: the websocket is closed with 1009, as without us."""
    monkeypatch.setattr(Echo, "compressed", True)
    connection = await websocket.websocket_connect(url, compression_options={})
    assert await ask(connection, b"x" * LIMIT) == f"took {LIMIT}"
    assert await ask(connection, b"x" * (2 * LIMIT)) == "None"
    assert connection.close_code == 1009


async def test_a_fault_in_the_report_closes_the_websocket(url: str) -> None:
    """As a fault in ``on_message`` does."""
    connection = await websocket.websocket_connect(url)
    assert await ask(connection, b"raise" + b"x" * LIMIT) == "None"


def test_another_protocol_is_left_alone() -> None:
    """Where a handler makes one of its own, tornado's limit holds."""
    handler: Any = type("Handler", (), {"get_websocket_protocol": lambda self: None})()
    tornado_compat.limit_messages(handler, LIMIT, lambda *_: None, partial(BUDGET.holding, "alice", "incoming"))
    assert handler.get_websocket_protocol() is None
