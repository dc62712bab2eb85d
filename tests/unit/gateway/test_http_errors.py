"""What a client learns of an error, and what the log has of it."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_server.auth.decorator import allow_unauthenticated
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, HTTPError

from gateway_slurm.errors import KernelStartError, NotAllowed, SlurmUnavailable
from gateway_slurm.events import OUTCOMES
from gateway_slurm.gateway.auth.identity import GatewayIdentityProvider
from gateway_slurm.gateway.auth.tokens import TokenFile
from gateway_slurm.gateway.handlers import ChannelsHandler, ExplainsErrors, KernelsHandler
from gateway_slurm.gateway.http_errors import refusal_of

FORGED = "it died\n[E 2026-01-01 00:00:00 SlurmGatewayApp] forged \x1b[2J"
UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "AA=="}


class Fails(ExplainsErrors):
    """Raises ``error``."""

    error: Exception

    @allow_unauthenticated
    async def get(self) -> None:
        raise self.error


@asynccontextmanager
async def answering(tokens: str = "") -> AsyncIterator[str]:
    """The URL of a server with the handlers of the errors, of kernels and of websockets."""
    provider = GatewayIdentityProvider(tokens_file=tokens, log=logging.getLogger("test.errors"))
    routes = [("/fails", Fails), ("/api/kernels", KernelsHandler), (r"/(?P<kernel_id>k)/channels", ChannelsHandler)]
    server = HTTPServer(Application(routes, identity_provider=provider, allow_remote_access=True))
    socket, port = bind_unused_port()
    server.add_socket(socket)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()
        await server.close_all_connections()


@pytest.mark.parametrize(
    ("error", "answer", "logged"),
    [
        (KernelStartError("died; it printed\n100% secret", brief="died"), "died; it printed\n100% secret", "died"),
        (HTTPError(409, FORGED), FORGED, FORGED.replace("\n", "\\n").replace("\x1b", "\\x1b")),
        (SlurmUnavailable("squeue failed:\nits words"), "squeue failed:\nits words", "squeue failed:"),
    ],
)
async def test_the_answer_has_the_whole_text_and_the_log_one_line_of_it(error, answer, logged, caplog):
    """The log has no kernel's output, and no text of a user can forge a line or move a terminal's cursor."""
    Fails.error = error
    async with answering() as url:
        response = await AsyncHTTPClient().fetch(f"{url}/fails", raise_error=False)
    assert json.loads(response.body)["message"] == answer
    (line,) = [record.getMessage() for record in caplog.records if record.name == "tornado.general"]
    assert line == f"{response.code} GET /fails (127.0.0.1): {logged}"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (HTTPError(409, "there is a kernel with this id"), "taken_id"),
        (HTTPError(429, "2 is the limit"), "over_limit"),
        (HTTPError(503, "try again"), "not_known_now"),
        (NoSuchKernel("x"), "unknown_kernelspec"),
        (NotAllowed("no"), "not_allowed"),
        (SlurmUnavailable("no"), "slurm_unavailable"),
    ],
)
def test_a_refusal_that_is_no_fault_of_the_gateway_has_its_own_outcome(error, outcome):
    """``internal_error`` is for faults only."""
    assert refusal_of(error)[0] == outcome
    assert outcome in OUTCOMES
    assert refusal_of(HTTPError(500, "x"))[0] == "internal_error"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "websocket"])
async def test_a_request_of_an_unknown_user_is_refused_with_the_reason(method, tmp_path):
    """Whatever the method is: jupyter_server would ask some for an _xsrf cookie, and give others no reason."""
    TokenFile(tmp_path / "tokens").add("ada")
    async with answering(str(tmp_path / "tokens")) as url:
        path, upgrade = ("/k/channels", UPGRADE) if method == "websocket" else ("/api/kernels", {})
        method, body = "GET" if upgrade else method, b"{}" if method == "POST" else None
        for headers, reason in (
            ({}, "has no token"),
            ({"Authorization": "token gws_none"}, "does not know this token"),
        ):
            response = await AsyncHTTPClient().fetch(
                url + path, method=method, headers={**upgrade, **headers}, body=body, raise_error=False
            )
            assert (response.code, response.headers["Content-Type"]) == (403, "application/json")
            assert reason in json.loads(response.body)["message"]
