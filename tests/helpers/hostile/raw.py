"""Clients that do what no browser does: half a websocket message, a body without an end, thousands of connections."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import struct
import uuid
from typing import Any
from urllib.parse import urlsplit

from helpers.kernel_clients import READY
from helpers.notebook_server import V1, Server, _v1_frame

# Hostile clients have addresses of their own, as they have on a network: Bob's is 127.0.0.1.
ADA_ADDRESS, STRANGERS_ADDRESS = "127.0.0.3", "127.0.0.2"
TEXT, BINARY, CONTINUATION, CLOSE = 1, 2, 0, 8


async def connect(server: Server, source: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the server from this address."""
    where = urlsplit(server.url)
    return await asyncio.open_connection(where.hostname, where.port, local_addr=(source, 0))


async def request(
    server: Server, verb: str, path: str, body: bytes = b"", *, source: str = ADA_ADDRESS, token: str | None = None
) -> int:
    """The status of a request with any body; 0 where the server closes the connection without an answer."""
    reader, writer = await connect(server, source)
    head = f"{verb} {path} HTTP/1.1\r\nHost: gateway\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    head += f"Authorization: token {server.token if token is None else token}\r\n\r\n"
    try:
        writer.write(head.encode())
        writer.write(body)
        return await status_of(reader)
    finally:
        writer.close()


async def status_of(reader: asyncio.StreamReader) -> int:
    """The status of the answer that comes; 0 for none."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        line = await asyncio.wait_for(reader.readline(), READY)
        return int(line.split()[1]) if line else 0
    return 0


def message(kind: str, content: dict[str, Any], channel: str = "shell") -> bytes:
    """A frontend's message in the binary protocol."""
    header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "session": uuid.uuid4().hex, "username": "x"}
    header |= {"version": "5.3", "date": "2026-01-01T00:00:00Z"}
    return _v1_frame(channel, [json.dumps(part).encode() for part in (header, {}, {}, content)])


def cell(code: str) -> bytes:
    """An execute_request."""
    fixed = {"silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    return message("execute_request", {"code": code, **fixed})


class Page:
    """A websocket whose frames are written by hand, with masks of zeros (RFC 6455, 5.3). It reads when told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._draining: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, server: Server, kernel_id: str, *, source: str, protocol: str = V1) -> Page:
        """Raises ConnectionRefusedError with the status where the server does not switch protocols."""
        reader, writer = await connect(server, source)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [
            f"GET /api/kernels/{kernel_id}/channels?session_id={uuid.uuid4().hex} HTTP/1.1",
            "Host: gateway",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
            f"Authorization: token {server.token}",
            *([f"Sec-WebSocket-Protocol: {protocol}"] if protocol else []),
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        status = await status_of(reader)
        if status != 101:
            writer.close()
            raise ConnectionRefusedError(str(status))
        while (await reader.readline()).strip():
            pass
        return cls(reader, writer)

    async def send(self, data: bytes, opcode: int = BINARY, *, final: bool = True) -> None:
        """One frame; returns when the connection has taken most of it. Raises OSError after the server closed it."""
        length = len(data)
        head = bytes([(0x80 if final else 0) | opcode])
        if length < 126:
            head += bytes([0x80 | length])
        elif length < 1 << 16:
            head += struct.pack(">BH", 0x80 | 126, length)
        else:
            head += struct.pack(">BQ", 0x80 | 127, length)
        self._writer.write(head + bytes(4))
        self._writer.write(data)
        await self._writer.drain()

    def discard(self) -> None:
        """Read from now on, and keep nothing."""

        async def read() -> None:
            with contextlib.suppress(OSError):
                while await self._reader.read(1 << 20):
                    pass

        self._draining = asyncio.ensure_future(read())

    async def until(self, mark: bytes, timeout: float) -> bytes:
        """Read until these bytes have come, or the time is over; all that came."""
        got = bytearray()

        async def read() -> None:
            while mark not in got and (data := await self._reader.read(1 << 20)):
                got.extend(data)

        with contextlib.suppress(asyncio.TimeoutError, OSError):
            await asyncio.wait_for(read(), timeout)
        return bytes(got)

    async def closed_within(self, seconds: float) -> bool:
        """Whether the server closes it in this time."""
        if self._draining is None:
            self.discard()
        assert self._draining is not None
        done, _pending = await asyncio.wait({self._draining}, timeout=seconds)
        return bool(done)

    @property
    def is_closed(self) -> bool:
        """Whether the server has closed it, for a page that reads."""
        return self._draining is not None and self._draining.done()

    def close(self) -> None:
        if self._draining is not None:
            self._draining.cancel()
        self._writer.transport.abort()
