"""Clients of a real gateway without a token: what they send is not read, and they keep no user out."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import time

import pytest

from gateway_slurm.gateway.door import MAX_IDLE_PER_USER
from helpers.gateway_process import running_gateway
from helpers.kernel_clients import jupyter_files_in
from helpers.private_slurm import poll

PER_ADDRESS, IN_ALL = 20, 50


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """A gateway with small limits and short time-outs. It needs no Slurm: no kernel is started."""
    directory = tmp_path_factory.mktemp("door")
    options = [f"--SlurmGatewayApp.max_unknown_per_address={PER_ADDRESS}"]
    options += [f"--SlurmGatewayApp.max_unknown_connections={IN_ALL}"]
    options += ["--SlurmGatewayApp.request_timeout=5", "--SlurmGatewayApp.body_timeout=2"]
    with jupyter_files_in(directory), running_gateway(directory, *options) as running:
        yield running


@pytest.fixture
def connect(gateway):
    """Opens a connection to the gateway, from any of this machine's addresses."""
    port = int(gateway.url.rpartition(":")[2])
    with contextlib.ExitStack() as opened:
        yield lambda source="127.0.0.1": opened.enter_context(
            socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0))
        )


def head(path: str, token: str = "", **headers: object) -> bytes:
    """The beginning of a POST request."""
    fields = {"Host": "gateway", **({"Authorization": f"token {token}"} if token else {}), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode()


def answer(connection: socket.socket) -> tuple[int, str]:
    """The status of the answer, and its message."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    body = response.read()
    return response.status, str(json.loads(body).get("message", "")) if body else ""


def is_closed(connection: socket.socket, seconds: float = 0.0) -> bool:
    """Whether the gateway has closed the connection, at the end of these seconds."""
    if not select.select([connection], [], [], seconds)[0]:
        return False
    try:
        return connection.recv(1) == b""
    except OSError:
        return True


@pytest.mark.parametrize("path", ["/api/kernels", "/api/sessions", "/login", "/nothing"])
def test_the_body_of_an_unknown_client_is_not_read(gateway, connect, path):
    """At any path the answer comes before the body; the gateway says why, and closes the connection."""
    for token in ("", gateway.anyone.token):
        for size in ({"Content_Length": 3 << 20}, {"Transfer_Encoding": "chunked"}):
            client = connect()
            client.sendall(head(path, token, **size))
            status, message = answer(client)
            assert (status, "not known" in message) == (403, True), message
            assert is_closed(client, 10)


def test_a_body_that_is_too_large_is_not_read_either(gateway, connect):
    """Also of a user, who learns how much may be sent; a smaller one is read."""
    token = gateway.tokens["alice"]
    client = connect()
    client.sendall(head("/api/kernels", token, Content_Length=450 << 20))
    status, message = answer(client)
    assert (status, "at most 4194304" in message) == (413, True), message
    client = connect()
    client.sendall(head("/api/kernels", token, Content_Length=1 << 20) + b"[" * (1 << 20))
    assert answer(client)[0] == 413


def test_a_client_that_sends_no_whole_request_is_closed(gateway, connect):
    """Without headers, with half of them, or with half of a body: each has its time."""
    silent, half, body = connect(), connect(), connect()
    half.sendall(b"GET /api HTTP/1.1\r\nHost: ")
    body.sendall(head("/api/kernels", gateway.tokens["alice"], Content_Length=100) + b"{")
    assert all(is_closed(client, 10) for client in (silent, half, body))


def test_unknown_clients_keep_nobody_out(gateway, connect):
    """However many connections they open, from one address or many: a user is served, also from the same address."""
    request = head("/api/kernels", gateway.tokens["alice"], Content_Length=2) + b"[]"
    for sources, limit in ((["127.0.7.1"] * 60, PER_ADDRESS), ([f"127.0.8.{one}" for one in range(1, 100)], IN_ALL)):
        begin = time.monotonic()
        idle = [connect(source) for source in sources]
        while True:
            user = connect("127.0.7.1")
            user.sendall(request)
            assert answer(user)[0] == 400
            if sum(not is_closed(client) for client in idle) <= limit:
                break
            time.sleep(0.1)
        assert time.monotonic() - begin < 4, "the time-out for requests has closed them"


def test_a_users_idle_connections_are_bounded(gateway, connect):
    """The oldest is closed where there is one too many; the newest serves the next request."""
    request = head("/api/kernels", gateway.tokens["alice"], Content_Length=2) + b"[]"
    mine = []
    for _ in range(MAX_IDLE_PER_USER + 10):
        mine.append(connect())
        mine[-1].sendall(request)
        assert answer(mine[-1])[0] == 400
    assert is_closed(mine[0], 10)
    assert poll(lambda: sum(not is_closed(client) for client in mine) == MAX_IDLE_PER_USER, timeout=10)
    mine[-1].sendall(request)
    assert answer(mine[-1])[0] == 400


@pytest.mark.parametrize("path", ["/nothing", "/login", "/api/nothing", "/a/"])
def test_a_path_where_nothing_is_answers_json_without_a_cookie(gateway, connect, path):
    """With and without a token, at paths of jupyter_server's own pages too."""
    for token in (gateway.tokens["alice"], ""):
        client = connect()
        client.sendall(head(path, token).replace(b"POST", b"GET", 1))
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, response.headers["Content-Type"]) == (404, "application/json")
        assert "Set-Cookie" not in response.headers
        assert json.loads(response.read())["message"]


def test_headers_are_bounded(gateway, connect):
    """A request with more than 32 KiB of headers is not read to its end."""
    client = connect()
    with contextlib.suppress(OSError):
        client.sendall(head("/api", gateway.tokens["alice"], X_Long="a" * (64 << 10)))
    assert is_closed(client, 10)


def test_one_users_requests_do_not_hold_up_another(gateway, connect):
    """Of 150 kernelspecs that one user asks for at once most still wait when another user has an answer."""
    path = "GET /api/kernelspecs/physics.python HTTP/1.1\r\nHost: gateway\r\nAuthorization: token {}\r\n\r\n"
    mine = [connect() for _ in range(150)]
    for client in mine:
        client.sendall(path.format(gateway.tokens["alice"]).encode())
    other = connect()
    other.sendall(path.format(gateway.tokens["bob"]).encode())
    assert answer(other)[0] == 200
    assert sum(bool(select.select([client], [], [], 0)[0]) for client in mine) < 140
    assert {answer(client)[0] for client in mine} == {200}


def test_a_body_of_very_many_values_is_refused(gateway, connect):
    """JSON of more than 64 KiB is not parsed, nor is a smaller one with too many values or too deep."""
    token = gateway.tokens["alice"]
    deep, many = b"[" * 60_000, b'{"a":[' + b"[]," * 20_000 + b"[]]}"
    for body, expected in ((b" " + b"[[],[],".ljust(1 << 20, b","), 413), (deep, 400), (many, 400)):
        client = connect()
        client.sendall(head("/api/kernels", token, Content_Length=len(body)) + body)
        status, message = answer(client)
        assert status == expected, message
