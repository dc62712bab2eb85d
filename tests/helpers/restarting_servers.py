"""Servers that end and start again on the same port, and frontends that reconnect as JupyterLab's do."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tornado.httpclient import HTTPClientError
from tornado.websocket import WebSocketClosedError

from gateway_slurm.testing.processes import free_port
from helpers.gateway_process import gateway_argv, made_tokens
from helpers.kernel_clients import READY
from helpers.notebook_server import Frontend, Server
from helpers.private_slurm import poll

# Seconds between two attempts to connect; JupyterLab begins with 1 s and gives up after about 31 s.
RETRY_SECONDS = 0.2


class LastingServer:
    """Servers that run one after the other with the same command line, port and log; ``end`` ends the current one."""

    def __init__(self, argv: list[str], log: Path, environment: dict[str, str], tokens: dict[str, str]) -> None:
        self.port = free_port()
        self._argv = [item.format(port=self.port) for item in argv]
        self.log, self._environment, self._tokens = log, environment, tokens
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes]
        self.begin()

    def begin(self) -> None:
        """Start the next server; return at once."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._argv,
                stdout=output,
                stderr=output,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )

    def until_listening(self) -> None:
        """Wait until the server listens."""

        def listens() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        assert poll(listens, timeout=READY), self.log.read_text()

    def signal(self, signum: int) -> int:
        """End the process by a signal; return its exit status."""
        self.process.send_signal(signum)
        return self.process.wait(timeout=30)

    def restart(self, signum: int) -> None:
        """End the server by this signal and start the next one."""
        self.signal(signum)
        self.begin()
        self.until_listening()

    def of(self, user: str) -> Server:
        """The server as this user reaches it."""
        return Server(self.process, self.url, self._tokens[user], self.log)

    def end(self) -> None:
        """Send SIGTERM, on which the server must end."""
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
        finally:
            self.process.kill()
            self.process.wait()


@contextmanager
def lasting_gateway(directory: Path, *options: str) -> Iterator[LastingServer]:
    """A running gateway that can be restarted."""
    argv = [*gateway_argv(directory, *options), "--port={port}"]
    yield from _lasting(LastingServer(argv, directory / "gateway.log", {}, made_tokens()[1]))


@contextmanager
def lasting_server(
    directory: Path, *options: str, environment: dict[str, str] | None = None
) -> Iterator[LastingServer]:
    """A running Jupyter server that can be restarted; its user is ``me``."""
    directory.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(16)
    argv = [sys.executable, "-m", "jupyter_server", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0"]
    argv += ["--allow-root", f"--ServerApp.root_dir={directory}", *options, "--ServerApp.port={port}"]
    variables = {"JUPYTER_TOKEN": token, **(environment or {})}
    yield from _lasting(LastingServer(argv, directory / "server.log", variables, {"me": token}))


def _lasting(server: LastingServer) -> Iterator[LastingServer]:
    try:
        server.until_listening()
        yield server
    finally:
        server.end()


class LastingFrontend:
    """The websocket of a session, which reconnects whenever it breaks. ``close`` ends it.

    ``messages`` has all received messages, in order.
    """

    def __init__(self, server: Server, kernel_id: str) -> None:
        self._server, self._kernel_id = server, kernel_id
        self.session_id = secrets.token_hex(16)
        self.messages: list[dict[str, Any]] = []
        self.connections = 0
        self._frontend: Frontend | None = None
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while True:
            with suppress(HTTPClientError, OSError):
                frontend = await Frontend.connect(self._server, self._kernel_id, session_id=self.session_id)
                self._frontend, self.connections = frontend, self.connections + 1
                with suppress(AssertionError):  # the server closed it
                    while True:
                        self.messages.append(await frontend.receive())
                self._frontend = None
            await asyncio.sleep(RETRY_SECONDS)

    async def until(self, condition: Any, timeout: float = READY, interval: float = 0.02) -> None:
        """Wait until the condition holds for this frontend; look at it every ``interval`` seconds."""
        deadline = time.monotonic() + timeout
        while not condition(self):
            assert not self._task.done(), self._task.exception()
            assert time.monotonic() < deadline, self.messages[-5:]
            await asyncio.sleep(interval)

    async def send(self, code: str) -> str:
        """Send a cell when there is a connection; return its id."""
        content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False, "stop_on_error": True}
        while True:
            await self.until(lambda one: one._frontend is not None)
            with suppress(WebSocketClosedError, AttributeError):
                return await self._frontend.send("shell", "execute_request", content)

    async def result(self, msg_id: str, timeout: float = READY) -> tuple[dict[str, Any], str]:
        """Wait for the end of the cell; return the content of its reply, and the printed text."""
        await self.until(lambda one: one.reply(msg_id) is not None and one.is_idle(msg_id), timeout)
        return self.reply(msg_id), self.printed(msg_id)

    async def execute(self, code: str, timeout: float = READY) -> tuple[dict[str, Any], str]:
        """Run code; return the content of its reply, and the printed text."""
        return await self.result(await self.send(code), timeout)

    def of(self, msg_id: str) -> list[dict[str, Any]]:
        """The messages of this cell."""
        return [one for one in self.messages if one["parent_header"].get("msg_id") == msg_id]

    def replies(self, msg_id: str) -> list[dict[str, Any]]:
        return [one["content"] for one in self.of(msg_id) if one["msg_type"] == "execute_reply"]

    def reply(self, msg_id: str) -> dict[str, Any] | None:
        return next(iter(self.replies(msg_id)), None)

    def is_idle(self, msg_id: str) -> bool:
        return any(one["content"].get("execution_state") == "idle" for one in self.of(msg_id))

    def printed(self, msg_id: str) -> str:
        return "".join(one["content"]["text"] for one in self.of(msg_id) if one["msg_type"] == "stream")

    async def close(self) -> None:
        """Close the websocket and stop reconnecting."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if self._frontend is not None:
            self._frontend.close()
