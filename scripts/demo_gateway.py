"""The last part of the demonstration: the shared gateway, and a Jupyter server that uses it by --gateway-url."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect

from gateway_slurm.testing.processes import free_port

GATEWAY = [sys.executable, "-m", "gateway_slurm.cli.app"]
LISTENS_WITHIN = 30.0  # seconds
ANSWERS_WITHIN = 60.0  # seconds


def make_token(directory: Path) -> str:
    """Make a token for the gateway, as its admin does for a user."""
    argv = [*GATEWAY, "token", "add", "ada", f"--tokens={directory / 'tokens.json'}"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def running(argv: Sequence[str], log: Path, **environment: str) -> Iterator[str]:
    """Run a server on a free port of this machine; give its URL. The server ends with the block."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*argv, "--ip=127.0.0.1", f"--port={port}", "--allow-root"],
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
        )
    try:
        deadline = time.monotonic() + LISTENS_WITHIN
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"demo: a server did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def server_with_gateway(directory: Path) -> Iterator[tuple[str, str]]:
    """The gateway, and ada's Jupyter server that uses it; give the server's URL and token."""
    token, server_token = make_token(directory), secrets.token_hex(16)
    gateway = [*GATEWAY, "gateway", f"--tokens={directory / 'tokens.json'}"]
    server = [sys.executable, "-m", "jupyter_server", f"--ServerApp.root_dir={directory}", "--no-browser"]
    with (
        running(gateway, directory / "gateway.log") as url,
        running(
            server,
            directory / "server.log",
            JUPYTER_GATEWAY_URL=url,  # the same as --gateway-url
            JUPYTER_GATEWAY_AUTH_TOKEN=token,
            JUPYTER_TOKEN=server_token,
        ) as server_url,
    ):
        yield server_url, server_token


async def run_cells(url: str, token: str, kernel_name: str, cells: Sequence[str]) -> list[str]:
    """Run cells in a new kernel of the Jupyter server, as a notebook frontend does; return each cell's output."""
    headers = {"Authorization": f"token {token}"}

    async def rest(method: str, path: str, body: str | None = None) -> Any:
        request = HTTPRequest(url + path, method, headers, body, request_timeout=ANSWERS_WITHIN)
        answer = (await AsyncHTTPClient().fetch(request)).body
        return json.loads(answer) if answer else None

    kernel = await rest("POST", "/api/kernels", json.dumps({"name": kernel_name}))
    channels = f"{url.replace('http', 'ws')}/api/kernels/{kernel['id']}/channels?session_id={uuid.uuid4().hex}"
    frontend = await websocket_connect(HTTPRequest(channels, headers=headers))
    try:
        return [await asyncio.wait_for(_run_cell(frontend, cell), ANSWERS_WITHIN) for cell in cells]
    finally:
        frontend.close()
        await rest("DELETE", f"/api/kernels/{kernel['id']}")


async def _run_cell(frontend: Any, code: str) -> str:
    msg_id = uuid.uuid4().hex
    header = {"msg_id": msg_id, "msg_type": "execute_request", "session": "demo", "username": "ada", "version": "5.3"}
    content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    await frontend.write_message(json.dumps(message))
    output = ""
    while True:
        answer = json.loads(await frontend.read_message())
        if answer["parent_header"].get("msg_id") != msg_id or answer["channel"] != "iopub":
            continue
        content = answer["content"]
        if content.get("execution_state") == "idle":
            return output.strip()
        output += content.get("text", "") or content.get("data", {}).get("text/plain", "")


def run_through_gateway(directory: Path, kernel_name: str, cells: Sequence[str]) -> list[str]:
    """Run the cells in a kernel that a Jupyter server takes from the gateway; return their outputs."""
    with server_with_gateway(directory) as (url, token):
        return asyncio.run(run_cells(url, token, kernel_name, cells))
