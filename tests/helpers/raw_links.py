"""Launchers' ends of links that a test makes by hand, and a response socket's owner that records the calls to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

from gateway_slurm.config import ServiceSettings
from gateway_slurm.link import envelope, server, wire


class RecordingHandler:
    """A LinkHandler that records the calls to it."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.changed = asyncio.Event()

    def _note(self, *event: Any) -> None:
        self.events.append(event)
        self.changed.set()

    def link_up(self, link: server.Link, hello: dict[str, Any]) -> dict[str, Any]:
        self._note("up", hello)
        return {"heartbeat": 10, "orphan_timeout": 10, "minutes": None, "warn_minutes": []}

    def link_message(self, link: server.Link, name: str, payload: Any) -> None:
        self._note("message", name, payload)

    def link_down(self, link: server.Link, reason: str) -> None:
        self._note("down", reason)

    def forgotten(self) -> None:
        self._note("forgotten")

    def complained(self, reason: str) -> None:
        self._note("complained", reason)

    def link_writable(self, link: server.Link) -> None:
        pass

    async def until(self, kind: str) -> tuple[Any, ...]:
        """Wait for an event of this kind."""
        while True:
            for event in self.events:
                if event[0] == kind:
                    return event
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 10)


class LauncherEnd:
    """A launcher's end of a connection, made by hand so that it can misbehave."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.frames = wire.FrameReader(wire.FRAME_LIMIT)
        self.messages: list[tuple[str, Any]] = []
        self.public_key = b""

    @classmethod
    async def dial(cls, port: int) -> LauncherEnd:
        peer = cls(*await asyncio.open_connection("127.0.0.1", port))
        peer.public_key = wire.parse_preamble(await peer.reader.readexactly(wire.PREAMBLE_BYTES))
        return peer

    def hello(self, launcher_id: str, token: bytes, jobid: str, **fields: Any) -> bytes:
        said = {"pid": 1, **fields}
        opening, self.seal, self.unseal = envelope.seal_hello(self.public_key, token, launcher_id, jobid, said)
        return wire.frame(opening.encode())

    def say(self, *messages: bytes) -> None:
        """Write one frame."""
        self.writer.write(wire.frame(self.seal(wire.pack(list(messages)))))

    def report(self) -> bytes:
        """A sealed REPORT of no kernels."""
        return self.seal(wire.pack([wire.encode("REPORT", kernels=[])]))

    async def message(self) -> tuple[str, Any]:
        while not self.messages:
            data = await asyncio.wait_for(self.reader.read(65536), 10)
            if not data:
                raise EOFError
            for frame in self.frames.feed(data):
                self.messages += [wire.decode(body, wire.DOWN) for body in wire.unpack(self.unseal(frame))]
        return self.messages.pop(0)

    async def is_closed(self) -> bool:
        """Whether the server closes this connection, having said nothing."""
        with contextlib.suppress(ConnectionResetError):
            return await asyncio.wait_for(self.reader.read(1), server.HANDSHAKE_SECONDS + 5) == b""
        return True


def draw_tokens() -> tuple[bytes, bytes]:
    """A launch token and its successor."""
    return os.urandom(32), os.urandom(32)


async def connect(
    socket: server.ResponseSocket, token: bytes, launcher_id: str = "L1", jobid: str = "12", **hello: Any
) -> LauncherEnd:
    """A launcher that does everything right; returns after WELCOME."""
    peer = await LauncherEnd.dial(socket.port)
    peer.writer.write(peer.hello(launcher_id, token, jobid, **hello))
    name, fields = await peer.message()
    assert name == "WELCOME"
    peer.token = bytes.fromhex(fields["token"])
    return peer


def launcher_settings() -> ServiceSettings:
    """Settings for a ``Launcher`` that has no real launcher behind it."""
    return ServiceSettings(walltime_warnings=[], kept_output=0)
