"""What breaks a running gateway, and users whose cells count all the while: seeded, bounded, and counted.

A user runs one cell that prints ``number:seconds`` for as long as the test lasts, and comes back as Jupyter's
frontends do when the websocket breaks. At the end every number is there once, in order, or was said to be dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from tornado.httpclient import HTTPClientError
from tornado.websocket import WebSocketClientConnection

from helpers.gateway_process import JUPYTER_SLURM, made_tokens, write_project
from helpers.kernel_clients import READY
from helpers.notebook_server import Frontend, Server, until_listening

KILL, TERM = "kill -9 of the gateway", "SIGTERM to the gateway"
# After these seconds a frontend tries again, and then gives up: 31 s in all (jupyter_server's gateway client).
RECONNECT_AFTER = (1.0, 2.0, 4.0, 8.0, 16.0)
# What a client has is acknowledged to the launcher within these seconds; at a gateway's end in good order, then.
ACKNOWLEDGED_WITHIN = {KILL: 1.0, TERM: 0.05}
PERIOD = 0.25  # seconds between two numbers of a cell
DROPPED = re.compile(r"gateway_slurm: (\d+) messages? of output")

COUNTING = """
import os, time
number = 0
while not os.path.exists({stop!r}):
    print(f"{{number}}:{{time.time():.2f}}", flush=True)
    number += 1
    time.sleep({period})
print(f"end:{{number}}", flush=True)
"""


# -- the gateway -----------------------------------------------------------------------------------


class RestartedGateway:
    """One gateway after the other, on one port, with the same files and users; ``end`` ends the last one."""

    def __init__(self, directory: Path, port: int, *options: str, environment: Mapping[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_project(directory / "projects")
        content, self.tokens = made_tokens()
        tokens = directory / "tokens.json"
        tokens.touch(mode=0o600)
        tokens.write_bytes(content)
        self._argv = [*JUPYTER_SLURM, "gateway", "--ip=127.0.0.1", f"--port={port}", f"--tokens={tokens}"]
        self._argv += ["--allow-root", f"--kernelspecs={directory / 'projects'}", "--SlurmGatewayApp.port_retries=0"]
        self._argv += options
        self._environment, self._port = dict(environment), port
        self.log = directory / "gateway.log"
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start the next one; returns when it listens."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(self._argv, stdout=output, stderr=output, env=self._environment)
        until_listening(self.process, self._port, self.log)

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=READY)
        finally:
            self.process.kill()
            self.process.wait()

    def of(self, user: str) -> Server:
        """The gateway as this user reaches it, whichever process it is."""
        return Server(self.process, f"http://127.0.0.1:{self._port}", self.tokens[user], self.log)

    def size(self) -> tuple[int, int]:
        """Bytes of memory (RSS) and open file descriptors."""
        process = psutil.Process(self.process.pid)
        return process.memory_info().rss, process.num_fds()


# -- users -------------------------------------------------------------------------------------------


class GaveUp(AssertionError):
    """A frontend could not come back in time."""


@dataclass
class User:
    """One frontend with one cell that counts; ``watch`` runs until the cell has ended."""

    server: Server
    kernel_id: str
    session_id: str
    stop_file: str
    name: str = ""
    """Of the kernelspec."""
    printed: dict[int, float] = field(default_factory=dict)
    """When each number was printed, in seconds since the epoch."""
    arrived: dict[int, float] = field(default_factory=dict)
    """When each number came first, in that order."""
    again: list[tuple[int, float, float]] = field(default_factory=list)
    """Which numbers came again: when they came first, and when again."""
    seen: set[str] = field(default_factory=set)
    """The ids of all messages of the cell's."""
    twice: int = 0
    """Messages that came again."""
    dropped: int = 0
    """Messages that the gateway said it had dropped."""
    reconnects: int = 0
    longest_away: float = 0.0
    """Seconds without a websocket."""
    latest: float = 0.0
    """When the newest number that has come was printed, in seconds since the epoch."""
    last: int | None = None
    """How many numbers the cell said at its end that it had printed."""
    reply: dict[str, Any] | None = None
    connection: WebSocketClientConnection | None = None
    _cell: str = ""

    async def watch(self) -> None:
        """Run the cell, and read what it prints by one websocket after the other."""
        frontend = await self._connect()
        self._cell = await frontend.run(COUNTING.format(stop=self.stop_file, period=PERIOD))
        while not self.is_done:
            message = await frontend.receive_or_none()
            if message is None:
                frontend.close()
                frontend = await self._come_back()
            else:
                self._take(message)
        frontend.close()

    @property
    def is_done(self) -> bool:
        return self.last is not None and self.reply is not None

    async def _connect(self) -> Frontend:
        return await Frontend.connect(self.server, self.kernel_id, session_id=self.session_id)

    async def _come_back(self) -> Frontend:
        began = time.monotonic()
        refused: Exception | None = None
        for pause in RECONNECT_AFTER:
            await asyncio.sleep(pause)  # as a frontend does
            try:
                frontend = await self._connect()
            except (OSError, HTTPClientError) as error:
                refused = error
                continue
            self.reconnects += 1
            self.longest_away = max(self.longest_away, time.monotonic() - began)
            return frontend
        raise GaveUp(f"kernel {self.kernel_id}: the frontend did not get back within 31 s: {refused!r}")

    def _take(self, message: dict[str, Any]) -> None:
        content = message["content"]
        text = str(content.get("text", "")) if message["msg_type"] == "stream" else ""
        self.dropped += sum(int(count) for count in DROPPED.findall(text))
        if message["parent_header"].get("msg_id") != self._cell:
            return
        msg_id = message["header"]["msg_id"]
        self.twice += msg_id in self.seen
        self.seen.add(msg_id)
        if message["channel"] == "shell":
            self.reply = content
        if content.get("name") == "stdout":
            self._count(text.split())

    def _count(self, words: Iterable[str]) -> None:
        for word in words:
            number, _colon, rest = word.partition(":")
            if number == "end":
                self.last = int(rest)
            else:
                self.latest = float(rest)
                self._number(int(number))

    def _number(self, number: int) -> None:
        now = time.time()
        if number in self.arrived:
            self.again.append((number, self.arrived[number], now))
        else:
            self.arrived[number], self.printed[number] = now, self.latest

    @property
    def missing(self) -> int:
        """Numbers that never came."""
        assert self.last is not None
        return self.last - len(self.printed)

    def holes(self) -> list[str]:
        """Where numbers are missing: how many, and when they were printed."""
        assert self.last is not None
        ends = [*sorted(self.printed), self.last]
        holes = [(before, after) for before, after in zip([-1, *ends], ends, strict=False) if after > before + 1]
        return [
            f"{self.name} {self.kernel_id}: {after - before - 1} after {before}, which was printed at "
            f"{clock(self.printed.get(before, 0.0))}"
            for before, after in holes
        ]

    @property
    def repeated(self) -> int:
        """Numbers that came more than once."""
        return len(self.again)

    def surprises(self, ends: list[tuple[float, float]]) -> list[str]:
        """Which of these did not come for the first time in the last moment before a gateway's end, and when they came.

        What has left to a client just then could not be acknowledged any more, and the next gateway sends it again.
        ``ends`` are their moments, and how many seconds before each count as the last.
        """
        return [
            f"{self.name} {self.kernel_id}: {number} came at {clock(first)}, and again at {clock(second)}"
            for number, first, second in self.again
            if not any(end - seconds < first < end + 0.5 for end, seconds in ends)
        ]

    @property
    def out_of_order(self) -> int:
        numbers = list(self.arrived)
        return sum(one > other for one, other in pairwise(numbers))


def clock(moment: float) -> str:
    """A moment as logs tell it."""
    return time.strftime("%H:%M:%S", time.localtime(moment)) + f"{moment % 1:.3f}"[1:]


async def until_live(users: list[User], since: float, *, timeout: float = READY) -> float:
    """Wait until each user has seen something that was printed after ``since``; seconds from then."""
    deadline = time.time() + timeout
    while not all(user.latest > since for user in users):
        if time.time() > deadline:
            late = [f"{user.kernel_id} ({since - user.latest:.0f} s)" for user in users if user.latest <= since]
            raise AssertionError(f"nothing new came within {timeout:g} s from {', '.join(late)}")
        await asyncio.sleep(0.05)
    return time.time() - since


# -- a run ---------------------------------------------------------------------------------------------


def plan(kinds: list[str], rounds: int, seed: int) -> list[str]:
    """The disturbance of each round: all kinds in turn, shuffled for each turn; the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    drawn: list[str] = []
    while len(drawn) < rounds:
        deck = list(kinds)
        rng.shuffle(deck)
        drawn += deck
    return drawn[:rounds]


@dataclass
class Report:
    """What one run has counted; ``lines`` is for people, and for docs/admins/reliability.md."""

    rounds: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """From each disturbance's end until every user had new output, by kind."""
    kernels: int = 0
    numbers: int = 0
    missing: int = 0
    dropped: int = 0
    repeated: int = 0
    twice: int = 0
    out_of_order: int = 0
    reconnects: int = 0
    longest_away: float = 0.0
    holes: list[str] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    """Numbers that came twice where they should not."""
    ends: list[tuple[float, float]] = field(default_factory=list)
    """When gateways ended, and within how many seconds before that what clients have may be unacknowledged."""

    def round(self, kind: str, began: float, seconds: float) -> None:
        """One more of this kind."""
        if kind in ACKNOWLEDGED_WITHIN:
            self.ends.append((began, ACKNOWLEDGED_WITHIN[kind]))
        self.rounds[kind] += 1
        self.seconds.setdefault(kind, []).append(seconds)

    def users(self, users: list[User]) -> None:
        """Add up what they have seen."""
        self.kernels = len(users)
        for name in ("missing", "dropped", "repeated", "twice", "out_of_order", "reconnects"):
            setattr(self, name, sum(getattr(user, name) for user in users))
        self.numbers = sum(len(user.arrived) for user in users)
        self.longest_away = max(user.longest_away for user in users)
        self.holes = [hole for user in users for hole in user.holes()]
        self.surprises = [line for user in users for line in user.surprises(self.ends)]

    def lines(self) -> list[str]:
        """Each kind with its count and the longest time, then the sums."""
        kinds = [
            f"{kind}: {count} rounds, all clients had new output after {max(self.seconds[kind]):.1f} s at the most"
            for kind, count in sorted(self.rounds.items())
        ]
        return [
            *kinds,
            f"{self.kernels} kernels printed {self.numbers} numbers: {self.missing} missing, {self.dropped} reported as"
            f" dropped, {self.repeated} twice, {self.out_of_order} out of order, {self.twice} messages again;"
            f" {self.reconnects} websockets came back, the longest was away for {self.longest_away:.1f} s",
            *self.holes,
            *self.surprises[:10],
        ]


@contextlib.asynccontextmanager
async def watching(users: list[User]) -> Any:
    """All of them watch; one that fails ends the run with its error."""
    tasks = [asyncio.ensure_future(user.watch()) for user in users]
    body = asyncio.current_task()
    assert body is not None
    failed: list[BaseException] = []

    def look(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not failed:
            failed.append(error)
            body.cancel()

    for task in tasks:
        task.add_done_callback(look)
    try:
        yield tasks
    except asyncio.CancelledError:
        if not failed:
            raise
        raise failed[0] from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
