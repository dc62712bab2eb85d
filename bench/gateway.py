"""The shared gateway beside a plain jupyter_server, and beside ZMQ: each with a kernel as it is used there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect
from websocket import WebSocket, create_connection

from bench.harness import Kernel, Table, start, stop, write_kernelspec
from scripts.demo_gateway import GATEWAY, make_token
from scripts.demo_gateway import running as running_server

ROUND_TRIPS = 50
READERS = (1, 8)
OUTPUT_RUNS = 5
INTERRUPTS = 20
NOT_READING = 50
# jupyter_server keeps all of it for each frontend that does not read.
NOT_READING_PLAIN = 5
PRINTS = 10_000
SMALL = f"for number in range({PRINTS}): print(number, flush=True)"
# Each is a message of its own: ipykernel joins prints that are not flushed.
STREAM = "for _ in range(100): print('x' * 999_999, flush=True)"
DISPLAY = "for _ in range({}): display({{'text/plain': 'x' * 1_000_000}}, raw=True)"
# The kernel says when the interrupt arrived, since the frontend is then still reading the flood.
FLOOD = """
import time
try:
    while True: print('y' * 5000)
except KeyboardInterrupt:
    interrupted = time.time()
"""
FLOODED = 20_000_000  # bytes that a frontend has received when the interrupt is sent
TOLD = "print(globals().pop('interrupted', 0))"
MAX_GROWTH = 8 << 30  # bytes; a server that has grown so much is measured no further


class Client:
    """A frontend's REST calls and websockets to a gateway or a Jupyter server."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token, self._headers = url, token, {"Authorization": f"token {token}"}

    async def rest(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of the answer; None for an empty answer."""
        data = json.dumps(body) if body is not None else ("" if method == "POST" else None)
        request = HTTPRequest(self.url + path, method, self._headers, data, request_timeout=120)
        answer = (await AsyncHTTPClient().fetch(request)).body
        return json.loads(answer) if answer else None

    async def start(self, name: str) -> str:
        """Start a kernel; return its id when it answers."""
        kernel_id = str((await self.rest("POST", "/api/kernels", {"name": name}))["id"])
        websocket = await self.connect(kernel_id)
        await ask(websocket, "kernel_info_request", {})
        websocket.close()
        return kernel_id

    async def connect(self, kernel_id: str) -> WebSocketClientConnection:
        """Open a websocket of a new session."""
        request = HTTPRequest(self._channels(kernel_id), headers=self._headers, connect_timeout=60)
        return await websocket_connect(request, max_message_size=1 << 28)

    def connect_slow(self, kernel_id: str) -> WebSocket:
        """A websocket that reads only on demand; tornado's reads ahead, and closes at 100 MB."""
        return create_connection(self._channels(kernel_id), header=self._headers, timeout=60)

    def _channels(self, kernel_id: str) -> str:
        return f"{self.url.replace('http', 'ws')}/api/kernels/{kernel_id}/channels?session_id={uuid.uuid4().hex}"


def request_message(msg_type: str, content: dict[str, Any]) -> tuple[str, str]:
    """A request for the shell channel: its id and its text."""
    msg_id = uuid.uuid4().hex
    header = {"msg_id": msg_id, "msg_type": msg_type, "session": "bench", "username": "", "version": "5.3", "date": ""}
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    return msg_id, json.dumps(message)


async def ask(websocket: WebSocketClientConnection, msg_type: str, content: dict[str, Any]) -> None:
    """Send a request; return when it is answered and the kernel is idle."""
    msg_id, text = request_message(msg_type, content)
    await websocket.write_message(text)
    replied, idle = False, False
    while not (replied and idle):
        data = await websocket.read_message()
        assert data is not None, "the server closed the websocket"
        message = json.loads(data)
        if message["parent_header"].get("msg_id") != msg_id:
            continue
        replied = replied or message["channel"] == "shell"
        idle = idle or message["content"].get("execution_state") == "idle"


async def execute(websocket: WebSocketClientConnection, code: str) -> None:
    """Run code; return when it has ended."""
    await ask(websocket, "execute_request", {"code": code, "silent": False})


class Frontends:
    """Frontends of one kernel in another process, as browsers are; see ``bench.frontends``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, client: Client, kernel_id: str, count: int = 1) -> AsyncIterator[Frontends]:
        """So many frontends that have subscribed."""
        argv = [sys.executable, "-m", "bench.frontends", client.url, client.token, kernel_id, str(count)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
        try:
            frontends = cls(process)
            await frontends._line()
            yield frontends
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def run(self, code: str, on_flood: Callable[[], Awaitable[Any]] | None = None) -> dict[str, Any]:
        """Run code, until all of them have its whole output; ``on_flood`` is called once much has come."""
        assert self._process.stdin is not None
        announce = FLOODED if on_flood else 0
        self._process.stdin.write(json.dumps({"code": code, "announce": announce}).encode() + b"\n")
        if on_flood:
            await self._line()
            await on_flood()
        return dict(await self._line())

    async def _line(self) -> Any:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, "the frontends' process has ended"
        return json.loads(line)


class Measured:
    """One of the two servers, its process, and its kernel."""

    def __init__(self, name: str, client: Client, port: str) -> None:
        self.name, self.client = name, client
        processes = psutil.process_iter(["cmdline"])
        self.process = next(item for item in processes if port in " ".join(item.info["cmdline"] or []))
        self.kernel_id = ""

    def frontends(self, count: int = 1) -> contextlib.AbstractAsyncContextManager[Frontends]:
        """So many frontends of its kernel."""
        return Frontends.running(self.client, self.kernel_id, count)

    def received(self) -> int:
        """The bytes that the server's open TCP connections have received: all but its links' are requests."""
        argv = ["ss", "--tcp", "--processes", "--info", "--no-header", "--numeric", "--oneline", "state", "established"]
        lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
        ours = [line for line in lines if f"pid={self.process.pid}," in line]
        words = [word.partition(":") for line in ours for word in line.split()]
        return sum(int(value) for key, _colon, value in words if key == "bytes_received")


async def bench_gateway(table: Table, directory: Path, runs: int) -> None:
    """Measure the gateway with a kernel of its own, in the tunnel, and jupyter_server with a local kernel, in turns."""
    names = {mode: write_kernelspec(directory, f"behind-{mode}", connect=mode) for mode in ("tunnel", "direct")}
    names["local"] = write_kernelspec(directory, "local")
    servers = directory / "servers"
    servers.mkdir()
    gateway_token, server_token = make_token(servers), secrets.token_hex(16)
    gateway = [*GATEWAY, "gateway", f"--tokens={servers / 'tokens.json'}"]
    plain = [sys.executable, "-m", "jupyter_server", "--no-browser", f"--ServerApp.root_dir={servers}"]
    # By default it drops output over 1000 messages or 1 MB a second.
    plain += ["--ZMQChannelsWebsocketConnection.limit_rate=False"]
    with (
        running_server(gateway, servers / "gateway.log") as gateway_url,
        running_server(plain, servers / "server.log", JUPYTER_TOKEN=server_token) as plain_url,
    ):
        both = [
            Measured("gateway", Client(gateway_url, gateway_token), f"--port={gateway_url.rpartition(':')[2]}"),
            Measured("jupyter_server", Client(plain_url, server_token), f"--port={plain_url.rpartition(':')[2]}"),
        ]
        for server, name in zip(both, (names["tunnel"], names["local"]), strict=True):
            server.kernel_id = await server.client.start(name)
        # The first, since what a server once had of memory, it keeps.
        await bench_memory(table, both)
        await bench_round_trips(table, both, names, runs)
        await bench_new_websockets(table, both, runs)
        await bench_output(table, both, min(runs, OUTPUT_RUNS))
        await bench_interrupts(table, both)
        for server in both:
            await server.client.rest("DELETE", f"/api/kernels/{server.kernel_id}")


async def bench_round_trips(table: Table, both: list[Measured], names: dict[str, str], runs: int) -> None:
    """A cell that does nothing, by websockets and by ZMQ, in turns, so that noise affects all of them."""
    gateway = both[0]
    direct = await gateway.client.start(names["direct"])
    kernels: dict[str, Kernel] = {mode: (await start(name))[0] for mode, name in names.items()}
    for kernel in kernels.values():
        await kernel.subscribe()
    sockets = {server.name: await server.client.connect(server.kernel_id) for server in both}
    sockets["gateway, direct"] = await gateway.client.connect(direct)
    ways: dict[str, Callable[[], Awaitable[Any]]] = {
        **{f"ZMQ, {mode}": lambda kernel=kernel: kernel.run("1") for mode, kernel in kernels.items()},  # type: ignore[misc]
        **{name: lambda socket=socket: execute(socket, "1") for name, socket in sockets.items()},  # type: ignore[misc]
    }
    for _run in range(max(runs, 7) * 3):
        for name, run in ways.items():
            began = time.perf_counter()
            for _ in range(ROUND_TRIPS):
                await run()
            table.add(f"round trip, {name}", (time.perf_counter() - began) / ROUND_TRIPS)
    for socket in sockets.values():
        socket.close()
    for kernel in kernels.values():
        await stop(kernel)
    await gateway.client.rest("DELETE", f"/api/kernels/{direct}")
    references = {"gateway": "ZMQ, tunnel", "gateway, direct": "ZMQ, direct", "jupyter_server": "ZMQ, local"}
    for name in ways:
        reference = f"round trip, {references[name]}" if name in references else None
        table.row(f"round trip, {name}", "ms", reference=reference, scale=1e3)


async def bench_new_websockets(table: Table, both: list[Measured], runs: int) -> None:
    """From opening a new session's websocket to the answer of its first request."""
    for _run in range(max(runs, 7) * 3):
        for server in both:
            began = time.perf_counter()
            websocket = await server.client.connect(server.kernel_id)
            await ask(websocket, "kernel_info_request", {})
            table.add(f"kernel_info on a new websocket, {server.name}", time.perf_counter() - began)
            websocket.close()
    _rows(table, "kernel_info on a new websocket", "ms", scale=1e3)


async def bench_output(table: Table, both: list[Measured], runs: int) -> None:
    """Many small outputs, and 100 MB in large ones, with one frontend and with more."""
    for count in READERS:
        readers = "one reader" if count == 1 else f"{count} readers"
        for _run in range(runs):
            for server in both:
                async with server.frontends(count) as frontends:
                    await _measure_output(table, server, frontends, count, readers)
        if count == 1:
            _rows(table, f"{PRINTS} prints", "s")
            _rows(table, f"{PRINTS} prints that arrive", "")
        for what in ("stream", "display"):
            _rows(table, f"100 MB {what}, {readers}", "s")
            _rows(table, f"100 MB {what} that arrive, {readers}", "MB", scale=1e-6)
            table.row(f"bytes over the link, 100 MB {what}, {readers}", "MB", scale=1e-6)


async def _measure_output(table: Table, server: Measured, frontends: Frontends, count: int, readers: str) -> None:
    if count == 1:
        found = await frontends.run(SMALL)
        table.add(f"{PRINTS} prints, {server.name}", found["seconds"])
        table.add(f"{PRINTS} prints that arrive, {server.name}", min(found["lines"]))
    for what, code in (("stream", STREAM), ("display", DISPLAY.format(100))):
        before = server.received()
        found = await frontends.run(code)
        table.add(f"100 MB {what}, {readers}, {server.name}", found["seconds"])
        table.add(f"100 MB {what} that arrive, {readers}, {server.name}", min(found["sizes"]))
        if server.name == "gateway":
            table.add(f"bytes over the link, 100 MB {what}, {readers}", server.received() - before)


async def bench_interrupts(table: Table, both: list[Measured]) -> None:
    """Seconds from the frontend's interrupt to its arrival in a cell that floods its frontend."""
    for server in both:
        async with server.frontends() as frontends:
            for _run in range(INTERRUPTS):
                began = 0.0

                async def interrupt(server: Measured = server) -> None:
                    nonlocal began
                    began = time.time()
                    await server.client.rest("POST", f"/api/kernels/{server.kernel_id}/interrupt")

                await frontends.run(FLOOD, interrupt)
                # Rarely the interrupt hits ipykernel's own code, and the cell does not record it.
                interrupted = float((await frontends.run(TOLD))["printed"])
                if interrupted > began:
                    table.add(f"interrupt under flood, {server.name}", interrupted - began)
    _rows(table, "interrupt under flood", "ms", scale=1e3)


async def bench_memory(table: Table, both: list[Measured]) -> None:
    """The growth of the server's memory while one frontend reads 200 MB of displays, and others do not read."""
    for server in both:
        count = NOT_READING if server.name == "gateway" else NOT_READING_PLAIN
        before = most = server.process.memory_info().rss
        async with server.frontends() as frontends:
            connect = server.client.connect_slow
            slow = [await asyncio.to_thread(connect, server.kernel_id) for _ in range(count)]
            run = asyncio.ensure_future(frontends.run(DISPLAY.format(200)))
            try:
                while not run.done() and most - before < MAX_GROWTH:
                    await asyncio.sleep(0.02)
                    most = max(most, server.process.memory_info().rss)
                done = run.done()
            finally:
                for websocket in slow:
                    websocket.shutdown()
                await run
        what = f"memory growth, {count} do not read{'' if done else ', not to the end'}, {server.name}"
        table.add(what, most - before)
        table.row(what, "MB", scale=1e-6)


def _rows(table: Table, what: str, unit: str, *, scale: float = 1.0) -> None:
    """The rows of both servers; jupyter_server's is the reference."""
    table.row(f"{what}, jupyter_server", unit, scale=scale)
    table.row(f"{what}, gateway", unit, reference=f"{what}, jupyter_server", scale=scale)
