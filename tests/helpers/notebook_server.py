"""A jupyter_server of this environment in its own process, and a frontend's session with a kernel."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jupyter_client.session import Session
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.websocket import WebSocketClientConnection, websocket_connect

from gateway_slurm.testing.processes import free_port
from helpers.kernel_clients import READY

V1 = "v1.kernel.websocket.jupyter.org"


@dataclass
class Server:
    """A running server, its URL and a token for it."""

    process: subprocess.Popen[bytes]
    url: str
    token: str
    log: Path
    ca: str | None = None  # file of the server's certificate for HTTPS

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = None,
        raise_error: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> HTTPResponse:
        """One REST call; raises HTTPClientError for a status of 400 and above, unless ``raise_error`` is False."""
        headers = {"Authorization": f"token {self.token if token is None else token}", **(headers or {})}
        data = json.dumps(body) if body is not None else ("" if method in ("POST", "PATCH") else None)
        limits = {"request_timeout": READY, "connect_timeout": READY}
        request = HTTPRequest(self.url + path, method, headers, body=data, ca_certs=self.ca, **limits)
        return await AsyncHTTPClient().fetch(request, raise_error=raise_error)

    async def json(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of the answer; None for an empty answer."""
        answer = (await self.request(method, path, body)).body
        return json.loads(answer) if answer else None

    async def status(self, method: str, path: str, body: object = None, *, token: str | None = None) -> int:
        """The status of a REST call, also of a failed one."""
        return (await self.refusal(method, path, body, token=token))[0]

    async def refusal(
        self, method: str, path: str, body: object = None, *, token: str | None = None
    ) -> tuple[int, str]:
        """Status and body of a REST call, also of a failed one."""
        answer = await self.request(method, path, body, token=token, raise_error=False)
        return answer.code, answer.body.decode(errors="replace")


@contextmanager
def running_server(
    directory: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    root: Path | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[Server]:
    """Run ``jupyter server`` with its files in ``directory``; it must end on SIGTERM at the end of the block.

    ``root`` is the directory of its notebooks, if it is another. ``prefix`` comes before its command.
    """
    token = secrets.token_hex(16)
    argv = [*prefix, sys.executable, "-m", "jupyter_server", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0"]
    argv += ["--allow-root", f"--ServerApp.root_dir={root or directory}", *options]
    # The token is in the environment, as JupyterHub passes it.
    environment = {"JUPYTER_TOKEN": token, **(environment or {})}
    with running_process(argv, "--ServerApp.port={}", directory / "server.log", environment) as (process, url):
        yield Server(process, url, token, directory / "server.log")


@contextmanager
def running_process(
    argv: list[str], port_option: str, log: Path, environment: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a server until the end of the block, when it must end on SIGTERM; give the process and its URL."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*argv, port_option.format(port)],
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        until_listening(process, port, log)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()


def until_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until the process listens. Raises AssertionError if it ends or takes too long."""
    deadline = time.monotonic() + READY
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


class Frontend:
    """A frontend's websocket to a kernel; ``protocol`` is "" (JSON) or V1 (binary frames)."""

    def __init__(self, connection: WebSocketClientConnection, protocol: str, session_id: str) -> None:
        self._connection, self._protocol, self.session_id = connection, protocol, session_id
        self._session = Session(session=uuid.uuid4().hex)

    @classmethod
    async def connect(
        cls,
        server: Server,
        kernel_id: str,
        protocol: str = "",
        *,
        session_id: str = "",
        token_in_url: bool = False,
        since: object = None,
    ) -> Frontend:
        """Open the websocket of a new session, or with ``session_id`` of an earlier one.

        ``since`` is the number of the last message that it has of the kernel's output.
        """
        session_id = session_id or uuid.uuid4().hex
        url = server.url.replace("http", "ws") + f"/api/kernels/{kernel_id}/channels?session_id={session_id}"
        headers = {} if token_in_url else {"Authorization": f"token {server.token}"}
        url += f"&token={server.token}" if token_in_url else ""
        url += f"&since={since}" if since is not None else ""
        request = HTTPRequest(url, headers=headers, connect_timeout=READY, ca_certs=server.ca)
        subprotocols = [protocol] if protocol else None
        connection = await websocket_connect(request, subprotocols=subprotocols, max_message_size=1 << 28)
        assert (connection.selected_subprotocol or "") == protocol
        return cls(connection, protocol, session_id)

    async def send(
        self, channel: str, msg_type: str, content: dict[str, Any], metadata: dict[str, Any] | None = None
    ) -> str:
        """Send a message; return its id."""
        message = self._session.msg(msg_type, content, metadata=metadata)
        if self._protocol:
            parts = [
                json.dumps(message[name], default=str).encode()
                for name in ("header", "parent_header", "metadata", "content")
            ]
            await self._connection.write_message(_v1_frame(channel, parts), binary=True)
        else:
            text = json.dumps({**message, "channel": channel, "buffers": []}, default=str)
            await self._connection.write_message(text)
        return str(message["header"]["msg_id"])

    async def receive(self) -> dict[str, Any]:
        """The next message, with its ``channel``."""
        message = await self.receive_or_none()
        assert message is not None, "the server closed the websocket"
        return message

    async def receive_or_none(self) -> dict[str, Any] | None:
        """The next message; None after the websocket is closed."""
        data = await self._connection.read_message()
        if data is None:
            return None
        if isinstance(data, str):
            return dict(json.loads(data))
        channel, parts = _v1_parts(data)
        header, parent, metadata, content = map(json.loads, parts[:4])
        return {
            "channel": channel,
            "header": header,
            "msg_type": header["msg_type"],
            "parent_header": parent,
            "metadata": metadata,
            "content": content,
        }

    async def until_closed(self) -> None:
        """Read until the server closes the websocket."""
        while await self._connection.read_message() is not None:
            pass

    async def until_ready(self) -> None:
        """Repeat a request until answers have come by shell and by iopub, as frontends do after a restart.

        ZMQ reconnects each channel separately, and iopub messages before that are lost.
        """
        while True:
            msg_id = await self.send("shell", "kernel_info_request", {})
            try:
                await asyncio.wait_for(self.result(msg_id), 1.0)
            except asyncio.TimeoutError:
                continue
            return

    async def run(self, code: str, cell_id: str = "") -> str:
        """Send code, as JupyterLab does with the cell's id; return the request's id."""
        metadata = {"cellId": cell_id} if cell_id else None
        return await self.send("shell", "execute_request", _execute(code), metadata)

    async def execute(self, code: str) -> tuple[dict[str, Any], str]:
        """Run code; return the content of the reply, and the printed text."""
        msg_id = await self.run(code)
        return await self.result(msg_id)

    async def begin(self, code: str, mark: str) -> str:
        """Send code and return its id once it has printed ``mark``."""
        msg_id = await self.run(code)
        while mark not in str((await self.receive())["content"].get("text")):
            pass
        return msg_id

    async def result(self, msg_id: str) -> tuple[dict[str, Any], str]:
        """Wait until the kernel is idle again; return the reply to ``msg_id`` and the printed text."""
        reply, printed, idle = None, "", False
        while reply is None or not idle:
            message = await self.receive()
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            if message["channel"] == "shell":
                reply = message["content"]
            elif message["msg_type"] == "stream":
                printed += message["content"]["text"]
            elif message["msg_type"] == "status":
                idle = message["content"]["execution_state"] == "idle"
        return reply, printed.strip()

    async def output(self, msg_id: str) -> list[dict[str, Any]]:
        """The cell's messages on iopub, until the kernel is idle: all that a frontend hears that did not send it."""
        found: list[dict[str, Any]] = []
        while not found or found[-1]["content"].get("execution_state") != "idle":
            message = await self.receive()
            if message["channel"] == "iopub" and message["parent_header"].get("msg_id") == msg_id:
                found.append(message)
        return found

    @property
    def close_code(self) -> int | None:
        """The code with which the server closed the websocket."""
        return self._connection.close_code

    def close(self) -> None:
        self._connection.close()


def _execute(code: str) -> dict[str, Any]:
    return {
        "code": code,
        "silent": False,
        "store_history": True,
        "user_expressions": {},
        "allow_stdin": True,
        "stop_on_error": True,
    }


def _v1_frame(channel: str, parts: list[bytes]) -> bytes:
    """jupyter_server's binary frame: count and offsets (64 bits, little endian), channel, parts."""
    all_parts = [channel.encode(), *parts]
    offsets = [8 * (2 + len(all_parts))]
    for part in all_parts:
        offsets.append(offsets[-1] + len(part))
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(all_parts)


def _v1_parts(data: bytes) -> tuple[str, list[bytes]]:
    (count,) = struct.unpack_from("<Q", data)
    offsets = struct.unpack_from(f"<{count}Q", data, 8)
    parts = [data[low:high] for low, high in pairwise(offsets)]
    return parts[0].decode(), parts[1:]


__all__ = ["V1", "Frontend", "HTTPClientError", "Server", "running_process", "running_server", "until_listening"]
