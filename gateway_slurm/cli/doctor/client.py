"""``jupyter slurm doctor --gateway-url``: check a gateway as the user's Jupyter server reaches it, step by step.

The settings of GatewayClient are read from the user's Jupyter configuration, as JupyterLab does. One kernel is started
and ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import socket
import ssl
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from jupyter_client.session import Session
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.serverapp import ServerApp
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.websocket import WebSocketClientConnection, websocket_connect

from gateway_slurm._util import exposure
from gateway_slurm.cli.doctor.steps import INDENT, StepResult
from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.link.endpoints import format_endpoint

NETWORK_TIMEOUT: Final = 30.0
"""Seconds for one connection or request."""
ANSWER_TIMEOUT: Final = 60.0
"""Seconds that a kernel which runs may take to answer 1+1."""
MIN_AWAY: Final = 60.0
"""Seconds that a client should try to reach a gateway that is restarted."""
TOKEN_VARIABLE: Final = GatewayClient.auth_token_env
PROXY_STATUS: Final = {502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}
_UPGRADE_ADVICE: Final = (
    "the proxy before the gateway must pass the headers Upgrade and Connection of websockets (etc/nginx, etc/caddy)"
)


class StepFailed(GatewaySlurmError):
    """A step failed; ``change`` says what to change.

    ``status`` is that of the gateway's own answer to a request; 0 if there was none: the gateway may carry it out.
    """

    def __init__(self, message: str, change: str, status: int = 0) -> None:
        super().__init__(message)
        self.change, self.status = change, status


class ClientCheck:
    """One check. ``show`` prints a line; ``wait`` is the seconds that the job may wait in Slurm's queue."""

    def __init__(self, url: str, token_file: str, kernelspec: str, wait: float, *, show: Callable[[str], None]) -> None:
        self.results: list[StepResult] = []
        self._url, self._token_file, self._name = url.rstrip("/"), token_file, kernelspec
        self._wait, self._show = wait, show
        self._client: Any  # GatewayClient, whose methods have no types
        self._began = time.monotonic()
        self._kernel_id = ""
        self._is_started = False  # the gateway has answered the request for the kernel

    @property
    def failed(self) -> bool:
        """Whether a step has failed."""
        return not all(result.ok for result in self.results)

    async def run(self) -> None:
        """Check every step up to the first that fails; end the kernel in any case."""
        try:
            for step, check in self._checks():
                await self._step(step, check)
        except StepFailed:
            pass
        finally:
            if self._kernel_id:
                with contextlib.suppress(StepFailed):
                    await self._step("delete", self._delete)

    def _checks(self) -> list[tuple[str, Callable[[], Any]]]:
        secure = [("tls", self._tls)] if urlsplit(self._url).scheme == "https" else []
        return [
            ("client", self._settings),
            ("name", self._resolve),
            ("connect", self._connect),
            *secure,
            ("token", self._token),
            ("kernelspecs", self._kernelspecs),
            ("start", self._start),
            ("websocket", self._websocket),
        ]

    async def _step(self, step: str, check: Callable[[], Any]) -> None:
        try:
            message, change, ok = await check(), "", True
        except StepFailed as error:
            message, change, ok = str(error), error.change, False
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            message = f"no gateway of gateway_slurm answers so: {type(error).__name__}: {error}"
            change, ok = "--gateway-url: another server listens there", False
        now = time.monotonic()
        result = StepResult(step, ok, message, now - self._began, change)
        self._began = now
        self.results.append(result)
        for line in result.lines():
            self._show(line)
        if not ok:
            raise StepFailed(message, change)

    # -- the client's settings ----------------------------------------------------------------------

    async def _settings(self) -> str:
        if not self._url.startswith(("http://", "https://")):
            raise StepFailed(
                f"{self._url!r} is no URL of a gateway", "--gateway-url must begin with https:// or http://"
            )
        client, files = await asyncio.to_thread(_read_client)
        client.url = self._url
        token, origin = await asyncio.to_thread(self._read_token, client)
        client.auth_token = token
        self._client = client
        lines = [f"{', '.join(files) or 'no configuration file'}; the token is {origin}"]
        lines += [f"warning: {warning}" for warning in warnings(client, secure=self._url.startswith("https"))]
        return "\n".join(lines)

    def _read_token(self, client: GatewayClient) -> tuple[str, str]:
        """The token, and where it comes from. Raises StepFailed."""
        if self._token_file:
            path = Path(self._token_file).expanduser()
            try:
                why = exposure(path.stat())
                token = path.read_text(errors="replace").strip()
            except OSError as error:
                raise StepFailed(f"the token file cannot be read: {error}", "--token-file") from error
            if why:
                raise StepFailed(f"{path} may not hold a token: {why}", "chmod 600 on it, and ask for a new token")
            return token, f"from {path}"
        from_environment = os.environ.get(TOKEN_VARIABLE, "")
        token = str(client.auth_token or "")
        if not token:
            raise StepFailed(
                "there is no token: neither GatewayClient.auth_token nor a token file is set",
                "etc/client/jupyter_server_config.py shows how a Jupyter server reads the token from a file",
            )
        if not token.isascii() or not token.isprintable() or " " in token:
            raise StepFailed("the token has spaces or other characters that no token has", "copy it again")
        if token == from_environment:
            return token, f"from {TOKEN_VARIABLE}: jupyter_server logs it with each kernel's start; use a file"
        return token, "from the configuration"

    # -- the network ----------------------------------------------------------------------------------

    @property
    def _address(self) -> tuple[str, int]:
        parts = urlsplit(self._url)
        try:
            return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise StepFailed(f"{self._url!r} is no URL: {error}", "--gateway-url") from error

    async def _resolve(self) -> str:
        host, port = self._address
        try:
            found = await asyncio.to_thread(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise StepFailed(
                f"this machine does not know the name {host!r}: {error}", "the name in --gateway-url; a VPN of the site"
            ) from error
        return f"{host} is {', '.join(dict.fromkeys(str(entry[4][0]) for entry in found))}"

    async def _connect(self) -> str:
        host, port = self._address
        try:
            connection = await asyncio.to_thread(socket.create_connection, (host, port), NETWORK_TIMEOUT)
        except OSError as error:
            refused = isinstance(error, ConnectionRefusedError)
            advice = "the gateway, or the proxy before it, is down, or listens on another port"
            raise StepFailed(
                f"no connection to {format_endpoint(host, port)}: {error}",
                advice if refused else "a firewall between here and the gateway, or the gateway's machine is down",
            ) from error
        with connection:
            return f"to {format_endpoint(str(connection.getpeername()[0]), port)}"

    async def _tls(self) -> str:
        host, port = self._address
        if not self._client.validate_cert:
            return "the certificate is not checked (GatewayClient.validate_cert)"
        context = ssl.create_default_context(cafile=self._client.ca_certs if self._client.client_cert else None)

        def greet() -> str:
            with (
                socket.create_connection((host, port), NETWORK_TIMEOUT) as plain,
                context.wrap_socket(plain, server_hostname=host) as secure,
            ):
                return (
                    f"{secure.version()}; the certificate is good until {(secure.getpeercert() or {}).get('notAfter')}"
                )

        try:
            return await asyncio.to_thread(greet)
        except ssl.SSLCertVerificationError as error:
            raise StepFailed(
                f"the gateway's certificate is refused: {error.verify_message}",
                "if the site has its own authority, start JupyterLab with SSL_CERT_FILE set to its certificates; "
                "GatewayClient.ca_certs alone has no effect",
            ) from error
        except (OSError, ValueError) as error:
            raise StepFailed(f"no TLS at this port: {error}", "the port; http:// if the gateway has no TLS") from error

    # -- the gateway --------------------------------------------------------------------------------------

    async def _request(self, method: str, path: str, body: object = None, *, timeout: float = NETWORK_TIMEOUT) -> Any:
        """The JSON of an answer. Raises StepFailed with the gateway's own words, or the proxy's."""
        arguments = self._client.load_connection_args()
        arguments |= {"connect_timeout": NETWORK_TIMEOUT, "request_timeout": timeout, "follow_redirects": False}
        data = json.dumps(body) if body is not None else None
        request = HTTPRequest(self._url + path, method, body=data, **arguments)
        try:
            response = await AsyncHTTPClient().fetch(request, raise_error=False)
        except (OSError, HTTPClientError, ssl.SSLError, ValueError) as error:
            raise StepFailed(
                f"{method} {path}: no HTTP answer: {error or type(error).__name__}",
                "https:// in --gateway-url, if the gateway has TLS; otherwise the gateway's log",
            ) from error
        return _checked(method, path, response)

    async def _token(self) -> str:
        identity = (await self._request("GET", "/api/me"))["identity"]
        return f"you are {identity.get('username')}"

    async def _kernelspecs(self) -> str:
        answer = await self._request("GET", "/api/kernelspecs", timeout=ANSWER_TIMEOUT)
        names, default = sorted(answer.get("kernelspecs", {})), str(answer.get("default"))
        if not names:
            raise StepFailed(
                "the gateway has no kernelspec for you", "ask the gateway's admin: you are in no project's members"
            )
        if self._name and self._name not in names:
            raise StepFailed(
                f"there is no kernelspec {self._name!r} for you; there are {', '.join(names)}", "--kernelspec"
            )
        self._name = self._name or default
        return f"{', '.join(names)}; the default is {default}"

    async def _start(self) -> str:
        # This side chooses the id: so the kernel of a request whose answer is lost can be ended, and no other one is.
        self._kernel_id = str(uuid.uuid4())
        body = {"name": self._name, "kernel_id": self._kernel_id, "env": {"KERNEL_WORKING_DIR": os.getcwd()}}
        try:
            model = await self._request("POST", "/api/kernels", body, timeout=ANSWER_TIMEOUT)
        except StepFailed as error:
            if error.status:
                self._kernel_id = ""
            raise
        self._kernel_id, self._is_started = str(uuid.UUID(model["id"])), True
        deadline, shown = time.monotonic() + self._wait, ""
        while model["execution_state"] in ("starting", "unknown", "dead"):
            reason = str(model.get("reason", ""))
            if model["execution_state"] == "dead":
                raise StepFailed(f"the kernel did not start: {reason}", "what the message names")
            if time.monotonic() > deadline:
                raise StepFailed(
                    f"the kernel has not started in {self._wait:g} s: {reason}",
                    "a longer --wait, or another kernelspec",
                )
            if reason != shown:
                self._show(INDENT + reason)
                shown = reason
            await asyncio.sleep(0.3)
            model = await self._request("GET", f"/api/kernels/{self._kernel_id}")
        slurm = model.get("slurm", {})
        where = f"{self._name} runs on node {slurm.get('node')} in job {slurm.get('jobid')}"
        directory = slurm.get("directory") or {}
        return f"{where}, in {directory['path']}" if directory.get("path") else where

    async def _websocket(self) -> str:
        base = str(self._client.ws_url or self._url.replace("http", "ws", 1)).rstrip("/")
        arguments = self._client.load_connection_args()
        arguments |= {"connect_timeout": NETWORK_TIMEOUT, "request_timeout": ANSWER_TIMEOUT}
        request = HTTPRequest(
            f"{base}/api/kernels/{self._kernel_id}/channels?session_id={uuid.uuid4().hex}", **arguments
        )
        try:
            connection = await asyncio.wait_for(websocket_connect(request), NETWORK_TIMEOUT)
        except HTTPClientError as error:
            raise StepFailed(f"the websocket was refused: {error}", _UPGRADE_ADVICE) from error
        except (OSError, ssl.SSLError, asyncio.TimeoutError) as error:
            raise StepFailed(
                f"no websocket at {base}: {error or type(error).__name__}", f"GatewayClient.ws_url; {_UPGRADE_ADVICE}"
            ) from error
        try:
            return await asyncio.wait_for(_evaluate(connection), ANSWER_TIMEOUT)
        except asyncio.TimeoutError as error:
            raise StepFailed("the kernel did not answer 1+1", "the gateway's log") from error
        finally:
            connection.close()

    async def _delete(self) -> str:
        try:
            await self._request("DELETE", f"/api/kernels/{self._kernel_id}", timeout=ANSWER_TIMEOUT)
        except StepFailed as error:
            if self._is_started:
                raise
            what = "is not there yet" if error.status == 404 else f"could not be ended ({error})"
            raise StepFailed(
                f"the answer to the start was lost, and kernel {self._kernel_id} ({self._name}) {what}: it may run and "
                "use your budget",
                "look in JupyterLab's list of running kernels in a few minutes, and shut it down there",
            ) from error
        return "the kernel was ended"


def _checked(method: str, path: str, response: HTTPResponse) -> Any:
    """The JSON of an answer. Raises StepFailed for an error, or an answer that no gateway gives."""
    if response.code == 204:
        return None
    try:
        content = json.loads(response.body)
    except ValueError:
        content = None
    message = str(content.get("message", "")) if isinstance(content, dict) else ""
    if 200 <= response.code < 300 and isinstance(content, dict):
        return content
    if response.code in (401, 403):
        raise StepFailed(
            f"the gateway refuses: {message or response.reason}",
            "the token, or GatewayClient.auth_scheme ('token')",
            response.code,
        )
    if response.code in PROXY_STATUS and not message:
        raise StepFailed(
            f"the proxy does not reach the gateway: {response.code} {response.reason}", "start the gateway"
        )
    change = "the URL's path: the gateway's base_url belongs to it" if content is None else "what the message names"
    # Tornado's client has 599 for its own time-out. Without a message a proxy may have answered.
    status = response.code if message or 400 <= response.code < 500 else 0
    raise StepFailed(f"{method} {path} was answered by {response.code} {message or response.reason}", change, status)


async def _evaluate(connection: WebSocketClientConnection) -> str:
    """The kernel's answer to 1+1."""
    session = Session()
    content = {"code": "1+1", "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
    message = session.msg("execute_request", content)
    await connection.write_message(json.dumps({**message, "channel": "shell", "buffers": []}, default=str))
    text = ""
    while True:
        answer = await connection.read_message()
        if answer is None:
            raise StepFailed("the websocket was closed before the kernel's answer", _UPGRADE_ADVICE)
        reply = json.loads(answer)
        if reply.get("parent_header", {}).get("msg_id") != message["header"]["msg_id"]:
            continue
        if reply["msg_type"] in ("execute_result", "stream", "error"):
            found = reply["content"]
            text += str(found.get("data", {}).get("text/plain") or found.get("text") or found.get("evalue") or "")
        if reply["msg_type"] == "execute_reply":
            return text.strip() or str(reply["content"].get("status"))


# -- GatewayClient's settings --------------------------------------------------------------------------------


def _read_client() -> tuple[Any, list[str]]:
    """GatewayClient as the user's configuration makes it, and the configuration's files. Raises StepFailed."""
    log = logging.getLogger("gateway_slurm.client_check")
    log.propagate, log.handlers = False, [logging.NullHandler()]
    app = ServerApp(log=log)
    try:
        app.load_config_file(suppress_errors=False)
        make: Any = GatewayClient
        client = make(config=app.config, log=log)
    except Exception as error:
        raise StepFailed(
            f"the Jupyter configuration cannot be read: {type(error).__name__}: {error}", "the file that it names"
        ) from error
    return client, [str(path) for path in app.loaded_config_files]


def seconds_of_retries(client: GatewayClient) -> float:
    """How long a Jupyter server tries to reach a gateway that is away, before it gives a notebook's websocket up."""
    waits = (client.gateway_retry_interval * 2.0 ** min(n, 30) for n in range(min(client.gateway_retry_max, 10_000)))
    return sum(min(wait, client.gateway_retry_interval_max) for wait in waits)


def warnings(client: GatewayClient, *, secure: bool) -> list[str]:
    """The settings that will be a trouble, each with the value to set."""
    found = []
    if (away := seconds_of_retries(client)) < MIN_AWAY:
        found.append(
            f"a notebook gives up a gateway that is away for {away:.0f} s: set GatewayClient.gateway_retry_max = 120 "
            "and gateway_retry_interval_max = 5.0"
        )
    if client.request_timeout < 150:
        found.append(
            f"GatewayClient.request_timeout = {client.request_timeout:g} ends a restart that takes longer: set 150"
        )
    if str(client.auth_scheme).lower() not in ("token", "bearer"):
        found.append(f"GatewayClient.auth_scheme = {client.auth_scheme!r}: the gateway accepts 'token' and 'Bearer'")
    if client.auth_header_key.lower() != "authorization":
        found.append(f"GatewayClient.auth_header_key = {client.auth_header_key!r}: the gateway reads Authorization")
    if secure and not client.validate_cert:
        found.append("GatewayClient.validate_cert = False: anyone on the way can read your token and your work")
    if client.ca_certs and not client.client_cert:
        found.append("GatewayClient.ca_certs has no effect without client_cert: set SSL_CERT_FILE for the server")
    if not secure:
        found.append("http:// sends the token and your work unencrypted, unless the gateway is on this machine")
    return found


def check_client(arguments: argparse.Namespace, show: Callable[[str], None]) -> ClientCheck:
    """Run the check that the options ask for."""
    check = ClientCheck(arguments.gateway_url, arguments.token_file, arguments.kernelspec, arguments.wait, show=show)
    asyncio.run(check.run())
    return check
