"""A real jupyter_server with the gateway's identity provider: which users get in, under which names, and the log."""

from __future__ import annotations

import asyncio
import http.client
import json
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.websocket import websocket_connect

from gateway_slurm.errors import IdentityUnavailable
from gateway_slurm.gateway.auth.hub import MAX_CACHED_USERS, MAX_LOOKUPS, HubTokens
from gateway_slurm.gateway.auth.tokens import TokenFile
from helpers.kernel_clients import jupyter_environment, jupyter_files_in
from helpers.notebook_server import Server, running_server

PROXY = "127.0.0.2"
START_LINE = RequestStartLine("GET", "/", "HTTP/1.1")
NETWORK = "127.0.3.9"
CHANNELS = "/api/kernels/00000000-0000-0000-0000-000000000000/channels"
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


@dataclass
class Hub:
    """Stands in for a JupyterHub: the answers to ``GET /hub/api/user`` by token, and who asked."""

    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    status: int = 200
    delay: float = 0.0
    url: str = ""

    def answer(self, path: str, authorization: str) -> tuple[int, Any]:
        token = authorization.removeprefix("token ")
        self.asked.append(token)
        time.sleep(self.delay)
        if self.status != 200:
            return self.status, {"message": "broken"}
        if path != "/hub/api/user" or token not in self.answers:
            return 403, {"status": 403, "message": "Missing or invalid credentials."}
        return 200, self.answers[token]


@pytest.fixture(scope="module")
def module_hub() -> Iterator[Hub]:
    """One hub for the tests here."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = hub.answer(self.path, self.headers.get("Authorization", ""))
            content = json.dumps(body).encode() if not isinstance(body, bytes) else body
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body["to"])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}/hub/api"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass
class Answer:
    """What a request got."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def user(self) -> str:
        """Who ``/api/me`` says that one is."""
        assert self.status == 200, self.text
        return str(json.loads(self.text)["identity"]["username"])

    @property
    def identity(self) -> dict[str, Any]:
        return dict(json.loads(self.text)["identity"])


@dataclass
class Gateway:
    """The server, its tokens and its hub."""

    server: Server
    tokens: TokenFile
    hub: Hub

    def ask(
        self,
        path: str = "/api/me",
        headers: dict[str, str] | list[tuple[str, str]] | None = None,
        *,
        bearer: str = "",
        method: str = "GET",
        body: object = None,
        source: str = "127.0.0.1",
    ) -> Answer:
        """One request from the address ``source`` of this machine."""
        port = int(self.server.url.rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(source, 0))
        try:
            connection.putrequest(method, path)
            for name, value in headers.items() if isinstance(headers, dict) else headers or []:
                connection.putheader(name, value)
            if bearer:
                connection.putheader("Authorization", f"token {bearer}")
            content = b"" if body is None else json.dumps(body).encode()
            connection.putheader("Content-Length", str(len(content)))
            connection.endheaders(content)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read().decode(errors="replace"))
        finally:
            connection.close()


@pytest.fixture(scope="module")
def module_gateway(tmp_path_factory: pytest.TempPathFactory, module_hub: Hub) -> Iterator[Gateway]:
    """One server for the tests here, with all three ways, its log at its most talkative."""
    directory = tmp_path_factory.mktemp("gateway")
    tokens = TokenFile(directory / "tokens.json")
    config = {
        "tokens_file": str(tokens.path),
        "hub_api_url": module_hub.url,
        "hub_timeout": 2.0,
        "hub_cache_seconds": 3600.0,
        "hub_scopes": ["access:services!service=gateway"],
        "hub_services": ["courses"],
        "trusted_header": "X-Remote-User",
        "trusted_proxies": [PROXY, "127.0.3.0/24"],
        "admins": ["root-of-all"],
    }
    settings = {
        "ServerApp": {
            "identity_provider_class": "gateway_slurm.gateway.auth.identity.GatewayIdentityProvider",
            "trust_xheaders": True,
        },
        "GatewayIdentityProvider": config,
    }
    (directory / "config.json").write_text(json.dumps(settings))
    config_option = f"--config={directory / 'config.json'}"
    with jupyter_files_in(directory), running_server(directory, config_option, "--debug") as server:
        yield Gateway(server, tokens, module_hub)


@pytest.fixture
def gateway(module_gateway: Gateway) -> Gateway:
    """The server, with a hub that knows no user."""
    hub = module_gateway.hub
    hub.answers, hub.asked, hub.status, hub.delay = {}, [], 200, 0.0
    return module_gateway


def hub_user(name: str, *scopes: str, **more: object) -> dict[str, object]:
    """What a hub says of a user's token."""
    return {"name": name, "kind": "user", "admin": False, "groups": [], "scopes": list(scopes) or SCOPES} | more


def new_token() -> str:
    """A token of the hub's that the gateway has never seen, and so remembers nothing of."""
    return secrets.token_hex(16)


SCOPES = ["access:services!service=gateway", "self"]


# -- unknown users -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/me", "/api/kernels", "/api/kernelspecs", "/api/status", "/api/sessions"])
def test_no_client_gets_in_without_a_login(gateway, path):
    """Without a token, with a wrong one, or with the token of the environment there is no entry, and no cookie."""
    wrong = gateway.tokens.add("ada")
    gateway.tokens.remove(lambda record: record.id == wrong.split("_")[1])
    for token in ("", wrong, "nonsense", gateway.server.token):
        answer = gateway.ask(path, bearer=token)
        assert answer.status == 403
        assert "Set-Cookie" not in answer.headers


def test_a_websocket_needs_a_user_too(gateway):
    """The upgrade of an unknown user is refused; for a known user the kernel is missing."""
    assert gateway.ask(CHANNELS, UPGRADE).status == 403
    assert gateway.ask(CHANNELS, UPGRADE, bearer=gateway.tokens.add("ada")).status == 404


# -- tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["token", "Bearer", "TOKEN"])
def test_a_token_names_its_user(gateway, scheme):
    """Either scheme of the header does, and each user is who their token says."""
    for name in ("ada", "ben"):
        token = gateway.tokens.add(name)
        answer = gateway.ask(headers={"Authorization": f"{scheme} {token}"})
        assert answer.user == name
        assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("form", ["Basic {}", "{}", "token", "token {} x", "Negotiate {}", "token={}"])
def test_a_token_under_another_scheme_is_none(gateway, form):
    """Only ``token`` and ``Bearer`` carry one."""
    assert gateway.ask(headers={"Authorization": form.format(gateway.tokens.add("ada"))}).status == 403


def test_a_token_that_is_removed_is_over_at_once(gateway):
    """The next request notices, with no restart."""
    token = gateway.tokens.add("ada")
    assert gateway.ask(bearer=token).user == "ada"
    gateway.tokens.remove(lambda record: record.user == "ada")
    assert gateway.ask(bearer=token).status == 403


def test_services_and_admins_are_what_their_token_or_the_setting_says(gateway):
    """``--service`` and ``--admin`` come with the token, ``admins`` names users."""
    for token, admin, service in (
        (gateway.tokens.add("ada"), False, False),
        (gateway.tokens.add("ada", admin=True), True, False),
        (gateway.tokens.add("hub", service=True), False, True),
        (gateway.tokens.add("root-of-all"), True, False),
    ):
        identity = gateway.ask(bearer=token).identity
        assert (identity["admin"], identity["service"]) == (admin, service)


def test_a_file_that_others_may_read_admits_no_client_and_says_why(gateway):
    """The answer is 503, not 403, since it is no token's fault; the log names the file."""
    token = gateway.tokens.add("ada")
    gateway.tokens.path.chmod(0o644)
    answer = gateway.ask(bearer=token)
    gateway.tokens.path.chmod(0o600)
    assert answer.status == 503
    assert str(gateway.tokens.path) not in answer.text
    assert "chmod 600" in gateway.server.log.read_text()
    assert gateway.ask(bearer=token).user == "ada"


@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE"])
def test_a_request_with_a_token_needs_no_xsrf_cookie(gateway, method):
    """What changes something is answered by its handler, also from a page of another site that has the token."""
    path = {"POST": "/api/kernels", "PATCH": "/api/me", "DELETE": "/api/sessions/none"}[method]
    body = {"name": "no-such-kernel"} if method == "POST" else {"color": "red"} if method == "PATCH" else None
    token = gateway.tokens.add("ada")
    answer = gateway.ask(path, {"Origin": "https://elsewhere.example"}, bearer=token, method=method, body=body)
    assert answer.status not in (401, 403)
    assert "_xsrf" not in answer.text


def test_jupyters_gateway_client_opens_its_websocket_with_the_header(gateway):
    """What a Jupyter server with ``--gateway-url`` sends is enough: no cookie, no token in the URL."""
    from jupyter_server.gateway.gateway_client import GatewayClient

    token = gateway.tokens.add("ada")
    client = GatewayClient(url=gateway.server.url, auth_token=token)
    client.init_connection_args()
    sent = client.load_connection_args()["headers"]
    assert gateway.ask(headers=sent).user == "ada"
    assert gateway.ask(CHANNELS, {**UPGRADE, **sent}).status == 404


# -- tokens in URLs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["token", "%74oken", "tok%65n"])
@pytest.mark.parametrize("path", ["/api/me", "/api/kernels", "/nothing/here", "/"])
def test_a_token_in_a_url_is_refused_and_not_logged(gateway, key, path):
    """However it is spelt, on whatever path: 403 for a token that is good, and the log does not have it."""
    token = gateway.tokens.add("ada")
    assert gateway.ask(f"{path}?a=b&{key}={token}&c=d").status == 403
    assert gateway.ask(f"{path}?{key}={token}", bearer=token).status == 403
    log = gateway.server.log.read_text()
    assert token not in log
    assert path in log


async def test_no_token_is_in_any_log(gateway):
    """Good, wrong and misplaced tokens, in headers, URLs and upgrades: the log at its most talkative has none."""
    good, wrong, hubs = gateway.tokens.add("ada"), "gws_" + "0" * 12 + "_" + "A" * 43, new_token()
    gateway.hub.answers[hubs] = hub_user("ada")
    for token in (good, wrong, hubs):
        for path in ("/api/me", "/api/contents/missing", "/login", CHANNELS, "/api/kernels/%2e%2e"):
            gateway.ask(path, bearer=token)
            gateway.ask(f"{path}?token={token}")
            gateway.ask(path, {"Referer": f"http://x/?token={token}"})
            gateway.ask(path, {"Authorization": f"token {token}\tx"})
            gateway.ask(path, {"Authorization": f"token {token}", "X-Remote-User": "eve"})
        gateway.ask("/api/kernels", bearer=token, method="POST", body="not a dictionary")
    gateway.hub.status = 500
    late = new_token()
    assert gateway.ask(bearer=late).status == 503
    log = gateway.server.log.read_text()
    for token in (good, wrong, hubs, late):
        assert token not in log


async def test_a_url_token_opens_websockets_where_the_admin_allows_it(tmp_path, monkeypatch):
    """With ``allow_token_in_url`` it counts for an upgrade, and for nothing else; the log has it scrubbed."""
    for name, value in jupyter_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    tokens = TokenFile(tmp_path / "tokens.json")
    token = tokens.add("ada")
    options = (
        "--ServerApp.identity_provider_class=gateway_slurm.gateway.auth.identity.GatewayIdentityProvider",
        f"--GatewayIdentityProvider.tokens_file={tokens.path}",
        "--GatewayIdentityProvider.allow_token_in_url=True",
        "--debug",
    )
    with running_server(tmp_path, *options) as server:
        gateway = Gateway(server, tokens, Hub())
        assert gateway.ask(f"/api/me?token={token}").status == 403
        assert gateway.ask(f"{CHANNELS}?session_id=1&token={token}", UPGRADE).status == 404
        assert gateway.ask(f"{CHANNELS}?token={token[:-1]}", UPGRADE).status == 403
        # JupyterLab's and VS Code's websockets name the page that they are on.
        request = HTTPRequest(
            server.url.replace("http", "ws") + f"{CHANNELS}?token={token}", headers={"Origin": "vscode-webview://x"}
        )
        with pytest.raises(HTTPClientError) as caught:
            await websocket_connect(request)
        assert caught.value.code == 404
        assert token[:-1] not in server.log.read_text()


# -- a hub --------------------------------------------------------------------------------------------


def test_the_hubs_users_come_with_the_hubs_tokens(gateway):
    """The hub names the user of a token; an admin of the hub is no admin here, unless the setting names them."""
    one, other = new_token(), new_token()
    gateway.hub.answers |= {one: hub_user("ada", admin=True), other: hub_user("root-of-all")}
    assert gateway.ask(bearer=one).user == "ada"
    assert not gateway.ask(bearer=one).identity["admin"]
    assert gateway.ask(bearer=other).identity["admin"]
    assert gateway.ask(bearer=new_token()).status == 403


def test_the_hub_is_asked_once_for_a_token(gateway):
    """Answers are kept, the negative ones, too; requests that come at the same time share one question."""
    good, bad = new_token(), new_token()
    gateway.hub.answers[good] = hub_user("ada")
    gateway.hub.delay = 0.5
    threads = [threading.Thread(target=gateway.ask, kwargs={"bearer": token}) for token in [good, bad] * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gateway.ask(bearer=good).user == "ada"
    assert gateway.ask(bearer=bad).status == 403
    assert sorted(gateway.hub.asked) == sorted([good, bad])


def test_the_gateways_own_tokens_are_never_shown_to_the_hub(gateway):
    """Neither a good nor a wrong one."""
    token = gateway.tokens.add("ada")
    gateway.ask(bearer=token)
    gateway.ask(bearer=token[:-1])
    assert gateway.hub.asked == []


@pytest.mark.parametrize("status", [500, 503, 404, 429, 302])
def test_a_hub_that_does_not_say_is_no_refusal(gateway, status):
    """503 with the reason, so that clients try again; once the hub is back, the same token works."""
    token = new_token()
    gateway.hub.answers[token] = hub_user("ada")
    gateway.hub.status = status
    answer = gateway.ask(bearer=token)
    assert answer.status == 503
    assert "JupyterHub" in answer.text
    gateway.hub.status = 200
    assert gateway.ask(bearer=token).user == "ada"


@pytest.fixture
async def hub_tokens(gateway):
    """Asks the hub for the user of a token, without the server around it; the answer is the user's name."""
    tokens = HubTokens(gateway.hub.url, timeout=60.0, cache_seconds=3600.0)

    async def name(token: str) -> str | None:
        request = HTTPServerRequest(
            start_line=START_LINE, headers=HTTPHeaders({"Host": "gateway", "Authorization": f"token {token}"})
        )
        user = await tokens.authenticate(request)
        return None if user is None else user.username

    yield name
    tokens.close()


async def test_invented_tokens_take_no_users_place(gateway, hub_tokens):
    """A client that sends more unknown tokens than the cache holds evicts no user's token."""
    good = new_token()
    gateway.hub.answers[good] = hub_user("ada")
    assert await hub_tokens(good) == "ada"
    for _ in range(0, MAX_CACHED_USERS + 100, 50):
        assert await asyncio.gather(*(hub_tokens(new_token()) for _ in range(50))) == [None] * 50
    assert await hub_tokens(good) == "ada"
    assert gateway.hub.asked.count(good) == 1


async def test_a_token_that_the_hub_has_taken_back_has_no_user(gateway):
    """A token that the hub has come to know is a user's: the last answer counts."""
    tokens = HubTokens(gateway.hub.url, timeout=60.0, cache_seconds=0.0)
    token = new_token()
    for user in ("ada", None, "ada"):
        gateway.hub.answers = {token: hub_user(user)} if user else {}
        model = await tokens._model(token)
        assert (model and model["name"]) == user
        assert len(tokens._users) + len(tokens._unknown) == 1
    tokens.close()


async def test_only_so_many_tokens_are_asked_about_at_a_time(gateway, hub_tokens):
    """One more is refused at once with "try again", and users with cached tokens get in meanwhile."""
    good = new_token()
    gateway.hub.answers[good] = hub_user("ada")
    assert await hub_tokens(good) == "ada"
    gateway.hub.delay = 2.0
    invented = [asyncio.ensure_future(hub_tokens(new_token())) for _ in range(MAX_LOOKUPS)]
    await asyncio.sleep(0)  # each has begun
    with pytest.raises(IdentityUnavailable, match="too many"):
        await hub_tokens(new_token())
    assert await hub_tokens(good) == "ada"
    assert not all(one.done() for one in invented)
    for one in invented:
        one.cancel()


async def test_invented_tokens_keep_no_known_user_out(gateway):
    """A token that the hub knew earlier is asked about again at once, and other addresses have turns of their own."""
    tokens = HubTokens(gateway.hub.url, timeout=60.0, cache_seconds=0.0)
    good, other = new_token(), new_token()
    gateway.hub.answers |= {good: hub_user("ada"), other: hub_user("ben")}
    assert (await tokens._model(good, "192.0.2.1"))["name"] == "ada"
    gateway.hub.delay = 0.3
    invented = [asyncio.ensure_future(tokens._model(new_token(), "192.0.2.66")) for _ in range(MAX_LOOKUPS)]
    await asyncio.sleep(0)  # each has begun
    begin = time.monotonic()
    found = await asyncio.gather(tokens._model(good, "192.0.2.66"), tokens._model(other, "192.0.2.2"))
    assert [model["name"] for model in found] == ["ada", "ben"]
    assert time.monotonic() - begin < 2.0  # all the invented ones need 16 times 0.3 s
    assert not all(one.done() for one in invented)
    for one in invented:
        one.cancel()
    tokens.close()


def test_a_slow_hub_delays_no_other_client(gateway):
    """While it is waited for the server answers others; after ``hub_timeout`` it is 503."""
    gateway.hub.delay = 4.0
    slow: list[Answer] = []
    thread = threading.Thread(target=lambda: slow.append(gateway.ask(bearer=new_token())))
    thread.start()
    token = gateway.tokens.add("ben")
    while not gateway.hub.asked:
        time.sleep(0.01)
    assert gateway.ask(bearer=token).user == "ben"
    assert not slow
    thread.join()
    assert slow[0].status == 503


@pytest.mark.parametrize(
    ("name", "model", "status"),
    [
        ("a filtered scope", hub_user("ada", "access:services!service=gateway"), 200),
        ("the whole scope", hub_user("ada", "access:services"), 200),
        ("another service's", hub_user("ada", "access:services!service=other"), 403),
        ("none", hub_user("ada", "self"), 403),
        ("no list", hub_user("ada") | {"scopes": "access:services"}, 403),
        ("a service that is named", hub_user("courses", kind="service"), 200),
        ("a service that is not", hub_user("ada", kind="service"), 403),
        ("a user named as a service", hub_user("courses"), 200),
        ("another kind", hub_user("ada", kind="robot"), 403),
        ("no name", {"kind": "user", "scopes": SCOPES}, 403),
        ("a name that is none", hub_user("../ada"), 403),
        ("no user", [], 503),
        ("no JSON", b"<html>", 503),
        ("too much", b" " * (2 << 20), 503),
    ],
)
def test_what_the_hub_says_is_looked_at(gateway, name, model, status):
    """Scope, kind and name must be right; only a service that is named is one."""
    token = new_token()
    gateway.hub.answers[token] = model
    answer = gateway.ask(bearer=token)
    assert answer.status == status
    if status == 200:
        assert answer.identity["service"] == (model["kind"] == "service")


# -- a proxy's header ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [PROXY, NETWORK])
def test_a_proxy_says_who_it_is(gateway, source):
    """From the address, or the network, that is trusted, the header is enough."""
    assert gateway.ask(headers={"X-Remote-User": "ada"}, source=source).user == "ada"
    assert gateway.ask(source=source).status == 403


@pytest.mark.parametrize("forwarded", [{}, {"X-Forwarded-For": PROXY}, {"X-Real-Ip": PROXY}])
def test_the_header_of_anybody_else_is_refused(gateway, forwarded):
    """Whatever X-Forwarded-For says; and even with a good token, since it can only be an attempt."""
    assert gateway.ask(headers={"X-Remote-User": "ada", **forwarded}).status == 403
    answer = gateway.ask(headers={"x-remote-user": "ada", **forwarded}, bearer=gateway.tokens.add("ben"))
    assert answer.status == 403
    assert "X-Remote-User" in answer.text


@pytest.mark.parametrize("values", [["ada", "eve"], [""], ["ada,eve"], ["../ada"], ["0"], ["ädä"]])
def test_a_header_that_is_not_one_name_is_refused(gateway, values):
    """Two names, or none, are no user."""
    headers = [("X-Remote-User", value.encode().decode("latin-1")) for value in values]
    assert gateway.ask(headers=headers, source=PROXY).status == 403


def test_behind_a_proxy_another_sites_page_can_do_nothing(gateway):
    """The proxy's cookie comes with a forged request; Origin gives it away. Programs send none, and need no cookie."""
    host = gateway.server.url.removeprefix("http://")
    user = {"X-Remote-User": "ada"}
    ask = {"method": "PATCH", "path": "/api/me", "body": {"color": "red"}, "source": PROXY}
    assert gateway.ask(headers={**user, "Origin": "https://evil.example"}, **ask).status == 403
    assert gateway.ask(headers={**user, "Origin": "null"}, **ask).status == 403
    assert gateway.ask(headers={**user, "Origin": f"http://{host}"}, **ask).status == 400
    assert gateway.ask(headers=user, **ask).status == 400
    answer = gateway.ask(headers={**user, "Origin": "https://evil.example"}, source=PROXY)
    assert answer.headers.get("Access-Control-Allow-Origin") != "https://evil.example"
    socket = {**user, **UPGRADE, "Origin": "https://evil.example"}
    assert gateway.ask(CHANNELS, socket, source=PROXY).status == 403
    assert gateway.ask(CHANNELS, {**user, **UPGRADE}, source=PROXY).status == 404


# -- the settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no user could use the gateway"),
        (["trusted_header=X-User"], "needs trusted_proxies"),
        (["trusted_header=X-User", "trusted_proxies=['10.0.0.0/33']"], "10.0.0.0/33"),
        (["hub_api_url=hub.example"], "must begin with http"),
    ],
)
def test_a_setting_that_cannot_be_meant_ends_the_start(tmp_path, monkeypatch, options, words):
    """The server does not start open, or closed to all users; its log has the reason."""
    for name, value in jupyter_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(AssertionError, match=words),
        running_server(
            tmp_path,
            "--ServerApp.identity_provider_class=gateway_slurm.gateway.auth.identity.GatewayIdentityProvider",
            *(f"--GatewayIdentityProvider.{option}" for option in options),
        ),
    ):
        pass


def test_an_unsafe_tokens_file_ends_the_start(tmp_path, monkeypatch):
    """It is found before the first request."""
    for name, value in jupyter_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    tokens = TokenFile(Path(tmp_path / "tokens.json"))
    tokens.add("ada")
    tokens.path.chmod(0o644)
    with (
        pytest.raises(AssertionError, match="chmod 600"),
        running_server(
            tmp_path,
            "--ServerApp.identity_provider_class=gateway_slurm.gateway.auth.identity.GatewayIdentityProvider",
            f"--GatewayIdentityProvider.tokens_file={tokens.path}",
        ),
    ):
        pass
