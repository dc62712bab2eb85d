"""Large output: code that prints it, and checks that all of it arrives."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from typing import Any

import psutil
from websocket import create_connection

from helpers.kernel_clients import DROP_NOTHING
from helpers.notebook_server import Frontend, Server

PIECE = 100_000  # characters of one print
_NUMBER = re.compile(r"(\d{6})\.{100}")


def flood(pieces: int, pause: float = 0) -> str:
    """Code that prints so many numbered pieces. Each is flushed, since ipykernel joins prints that are not."""
    shown = f"print(f'{{number:06d}}'.ljust({PIECE - 1}, '.'), flush=True)"
    return f"import time\nfor number in range({pieces}): {shown}; time.sleep({pause})"


class SlowFrontend:
    """A session whose websocket is read only when the test reads: tornado's own reads ahead."""

    def __init__(self, server: Server, kernel_id: str) -> None:
        self.session_id = uuid.uuid4().hex
        url = f"{server.url.replace('http', 'ws')}/api/kernels/{kernel_id}/channels?session_id={self.session_id}"
        options = {"header": {"Authorization": f"token {server.token}"}, "timeout": 60}
        # It validates UTF-8 in Python, which takes minutes for what is read here.
        self._websocket = create_connection(url, skip_utf8_validation=True, **options)

    def read(self, cell: str) -> str:
        """Read on until this cell has ended; return the text of all streams on the way, of whatever cell."""
        printed = ""
        while True:
            message = json.loads(self._websocket.recv())
            printed += message["content"].get("text", "")
            is_idle = message["content"].get("execution_state") == "idle"
            if is_idle and message["parent_header"].get("msg_id") == cell:
                return printed

    def close(self) -> None:
        self._websocket.close(timeout=0)


class Memory:
    """The most memory that a process has had since, by looking often. ``growth`` ends it."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before = self._most = self._process.memory_info().rss
        self._task = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        while True:
            self._most = max(self._most, self._process.memory_info().rss)
            await asyncio.sleep(0.02)

    def growth(self) -> int:
        """Bytes."""
        self._task.cancel()
        return int(self._most - self._before)


async def drop_nothing(server: Server, kernel_id: str) -> None:
    """Let the kernel drop nothing for those that it publishes to by now, as far as it has memory."""
    frontend: Any = await Frontend.connect(server, kernel_id)
    await frontend.execute(DROP_NOTHING)
    frontend.close()


async def relay_small_and_large(frontend: Frontend) -> None:
    """Print 10 000 lines, then 100 MB; all output must arrive in order."""
    _reply, printed = await frontend.execute(f"{DROP_NOTHING}for number in range(10_000): print(number, flush=True)")
    assert printed.split() == [str(number) for number in range(10_000)]
    _reply, printed = await frontend.execute("for number in range(100): print(f'{number:02d}' * 500_000)")
    assert [(line[:2], len(line)) for line in printed.split()] == [(f"{n:02d}", 1_000_000) for n in range(100)]


def numbers_of(text: str) -> list[int]:
    """The numbers of the flood's pieces in the text, in order."""
    return [int(number) for number in _NUMBER.findall(text)]
