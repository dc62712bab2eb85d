"""The shared gateway's websocket beside ZMQ and beside jupyter_server's websocket, to kernels of the same kind."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect
from websocket import WebSocket, create_connection

from bench.harness import Table, running, write_kernelspec
from scripts.demo_gateway import GATEWAY, make_token
from scripts.demo_gateway import running as running_server

ROUND_TRIPS = 50
SMALL = "for number in range(10_000): print(number, flush=True)"
DISPLAYS = "for _ in range(400): display({'text/plain': 'x' * 1_000_000}, raw=True)"
LARGE = "for _ in range(100): print('x' * 999_999)"


class Client:
    """A frontend's REST calls and websockets to a gateway or a Jupyter server."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._headers = url, {"Authorization": f"token {token}"}

    async def rest(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of the answer; None for an empty answer."""
        data = json.dumps(body) if body is not None else ("" if method == "POST" else None)
        request = HTTPRequest(self._url + path, method, self._headers, data, request_timeout=120)
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
        return f"{self._url.replace('http', 'ws')}/api/kernels/{kernel_id}/channels?session_id={uuid.uuid4().hex}"


def request_message(msg_type: str, content: dict[str, Any]) -> tuple[str, str]:
    """A request for the shell channel: its id and its text."""
    msg_id = uuid.uuid4().hex
    header = {"msg_id": msg_id, "msg_type": msg_type, "session": "bench", "username": "", "version": "5.3", "date": ""}
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    return msg_id, json.dumps(message)


async def ask(websocket: WebSocketClientConnection, msg_type: str, content: dict[str, Any]) -> int:
    """Send a request; when it is answered and the kernel is idle, return the bytes of its printed text."""
    msg_id, text = request_message(msg_type, content)
    await websocket.write_message(text)
    replied, idle, size = False, False, 0
    while not (replied and idle):
        data = await websocket.read_message()
        assert data is not None, "the server closed the websocket"
        message = json.loads(data)
        if message["parent_header"].get("msg_id") != msg_id:
            continue
        replied = replied or message["channel"] == "shell"
        idle = idle or message["content"].get("execution_state") == "idle"
        size += len(message["content"].get("text", ""))
    return size


async def execute(websocket: WebSocketClientConnection, code: str) -> int:
    """Run code; return the bytes of its printed text."""
    return await ask(websocket, "execute_request", {"code": code, "silent": False})


async def bench_gateway(table: Table, directory: Path, runs: int) -> None:
    """Measure both servers at the same time, each with a direct kernel."""
    name = write_kernelspec(directory, "behind-a-server", connect="direct")
    servers = directory / "servers"
    servers.mkdir()
    gateway_token, server_token = make_token(servers), secrets.token_hex(16)
    gateway = [*GATEWAY, "gateway", f"--tokens={servers / 'tokens.json'}"]
    plain = [sys.executable, "-m", "jupyter_server", "--no-browser", f"--ServerApp.root_dir={servers}"]
    plain += ["--ZMQChannelsWebsocketConnection.limit_rate=False"]
    with (
        running_server(gateway, servers / "gateway.log") as gateway_url,
        running_server(plain, servers / "server.log", JUPYTER_TOKEN=server_token) as plain_url,
    ):
        clients = {"gateway": Client(gateway_url, gateway_token), "jupyter_server": Client(plain_url, server_token)}
        kernels = {kind: await client.start(name) for kind, client in clients.items()}
        await bench_websockets(table, clients, kernels, name, runs)
        process = next(item for item in psutil.process_iter(["cmdline"]) if gateway[-1] in (item.info["cmdline"] or []))
        await measure_slow_reader(table, process, clients["gateway"], kernels["gateway"])
        for kind, kernel_id in kernels.items():
            await clients[kind].rest("DELETE", f"/api/kernels/{kernel_id}")


async def bench_websockets(
    table: Table, clients: dict[str, Client], kernels: dict[str, str], name: str, runs: int
) -> None:
    """Round trips, which alternate so that noise affects all of them, new websockets, and much output."""
    sockets = {kind: await client.connect(kernels[kind]) for kind, client in clients.items()}
    await bench_round_trips(table, sockets, name, runs)
    for _run in range(runs):
        for kind, client in clients.items():
            began = time.perf_counter()
            websocket = await client.connect(kernels[kind])
            await ask(websocket, "kernel_info_request", {})
            table.add(f"kernel_info on a new websocket, {kind}", time.perf_counter() - began)
            websocket.close()
    for _run in range(min(runs, 3)):
        for kind, socket in sockets.items():
            await measure_output(table, kind, socket)
    for socket in sockets.values():
        socket.close()
    table.row("round trip, ZMQ", "ms", scale=1e3)
    for what in ("round trip", "kernel_info on a new websocket"):
        for kind in clients:
            table.row(f"{what}, {kind}", "ms", reference="round trip, ZMQ" if what == "round trip" else None, scale=1e3)
    for what, unit in (("10 000 prints", "s"), ("10 000 prints that arrive", ""), ("100 MB stream", "s")):
        for kind in clients:
            table.row(f"{what}, {kind}", unit)


async def bench_round_trips(table: Table, sockets: dict[str, Any], name: str, runs: int) -> None:
    """Round trips by each websocket, and by ZMQ to another kernel."""
    async with running(name) as kernel:
        for _run in range(runs):
            began = time.perf_counter()
            for _ in range(ROUND_TRIPS):
                await kernel.run("1")
            table.add("round trip, ZMQ", (time.perf_counter() - began) / ROUND_TRIPS)
            for kind, socket in sockets.items():
                began = time.perf_counter()
                for _ in range(ROUND_TRIPS):
                    await execute(socket, "1")
                table.add(f"round trip, {kind}", (time.perf_counter() - began) / ROUND_TRIPS)


async def measure_output(table: Table, kind: str, socket: WebSocketClientConnection) -> None:
    """Many small outputs, and 100 MB in large ones."""
    began = time.perf_counter()
    size = await execute(socket, SMALL)
    table.add(f"10 000 prints, {kind}", time.perf_counter() - began)
    # The prints have 48 890 characters; fewer mean that output was lost.
    table.add(f"10 000 prints that arrive, {kind}", 10_000 * size / 48_890)
    began = time.perf_counter()
    assert await execute(socket, LARGE) >= 99_000_000
    table.add(f"100 MB stream, {kind}", time.perf_counter() - began)


async def measure_slow_reader(table: Table, process: psutil.Process, client: Client, kernel_id: str) -> None:
    """The gateway's memory before, and its maximum while one frontend does not read 400 MB of output.

    The output is in messages of 1 MB, because ipykernel joins fast prints into one message, which is not divided.
    """
    before = process.memory_info().rss
    slow = await asyncio.to_thread(client.connect_slow, kernel_id)
    slow.send(request_message("execute_request", {"code": DISPLAYS, "silent": False})[1])
    maximum = before
    for _ in range(100):
        await asyncio.sleep(0.1)
        maximum = max(maximum, process.memory_info().rss)
    table.add("gateway's memory", before)
    table.add("gateway's memory, one slow reader", maximum)
    slow.close()
    table.row("gateway's memory", "MB", scale=1e-6)
    table.row("gateway's memory, one slow reader", "MB", scale=1e-6)
