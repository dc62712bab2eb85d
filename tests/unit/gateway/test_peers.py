"""Requests and websockets for another gateway's kernels: small gateways in this process, and a directory of theirs."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import statistics
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from tornado import web
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.netutil import bind_sockets
from tornado.websocket import WebSocketHandler, websocket_connect

from gateway_slurm.budget import Budget
from gateway_slurm.errors import NotAllowed
from gateway_slurm.gateway.auth import peer as peer_proof
from gateway_slurm.gateway.auth.peer import ANSWER_PROOF, PROOF, USER, PeerProof
from gateway_slurm.gateway.auth.user import GatewayUser
from gateway_slurm.gateway.peers import forward, lists, peers
from gateway_slurm.gateway.peers import websocket as peer_websocket
from gateway_slurm.gateway.peers.client import FORWARDED_BY, PeerClient
from gateway_slurm.gateway.peers.directory import KERNELS, DirectoryUnavailable, Location, Peer, PeerRecords
from gateway_slurm.gateway.peers.forward import Forwarder, ForwardsRequests
from gateway_slurm.gateway.peers.lists import with_peers
from gateway_slurm.gateway.peers.peers import Peers
from gateway_slurm.gateway.peers.websocket import ForwardsWebsocket
from helpers.proxies import Certificate

V1 = "v1.kernel.websocket.jupyter.org"
LOG = logging.getLogger(__name__)
MEGABYTE = 1 << 20
PATIENCE = 20  # seconds


@dataclass
class Directory:
    """Who has what, as the test says; ``trouble`` makes it a store that does not answer."""

    server_id: str
    gateways: dict[str, Peer] = field(default_factory=dict)
    kernels: dict[str, tuple[str, str]] = field(default_factory=dict)  # id: the gateway's, the owner
    at: dict[tuple[str, str], str] = field(default_factory=dict)
    trouble: str = ""

    def _known(self):
        if self.trouble:
            raise DirectoryUnavailable(self.trouble)
        return self

    async def others(self):
        return [peer for peer in self._known().gateways.values() if peer.server_id != self.server_id]

    async def kernel(self, kernel_id):
        server, owner = self._known().kernels.get(kernel_id, ("", ""))
        return Location(peer=self.gateways[server], owner=owner) if server else None

    async def session(self, session_id):
        return None

    async def session_at(self, owner, path):
        server = self._known().at.get((owner, path))
        return Location(peer=self.gateways[server], owner=owner) if server else None

    async def owners(self):
        return {key: owner for key, (server, owner) in self._known().kernels.items() if server != self.server_id}

    async def records_of(self, server_ids):
        entries = [(owner, "", {"id": key}) for key, (server, owner) in self.kernels.items() if server in server_ids]
        return PeerRecords(kernels=tuple(entries))

    def close(self):
        pass


class Sessions:
    """A gateway's sessions: none."""

    def find(self, session_id):
        return None

    def at(self, path, owner):
        return None


class Known(web.RequestHandler):
    """Who asks: whom the token names."""

    async def prepare(self):
        kind, _, name = self.request.headers.get("Authorization", "").partition(" ")
        forwarded = await self.gateway.proof.authenticate(self.request)
        self.current_user = forwarded or (GatewayUser(name) if kind == "token" else None)
        self.set_default_headers()

    def set_default_headers(self):
        self.set_header(ANSWER_PROOF, self.gateway.proof.answer_to(self.request))

    @property
    def gateway(self):
        return self.settings["gateway"]


class Kernel(Known, ForwardsRequests):
    """``/api/kernels/{id}`` and below: answers with what it was asked."""

    async def prepare(self):
        await super().prepare()
        self.gateway.asked.append(self.request)
        await self.forward_to_holder()

    def finish(self, chunk=None, set_content_type="text/plain"):
        self.set_header("Content-Type", set_content_type)
        return super().finish(chunk)

    def answer(self, kernel_id):
        if self.gateway.kernels.get(kernel_id) != self.current_user.username:
            raise web.HTTPError(404)
        self.set_status(201)
        self.set_header("Location", f"/api/kernels/{kernel_id}")
        said = {"at": self.gateway.name, "id": kernel_id, "body": self.request.body.decode()}
        self.finish(json.dumps(said), set_content_type="application/x-said")

    get = post = delete = patch = answer


class KernelById(Kernel):
    """As a list's question for one."""

    async def get(self, kernel_id):
        if self.gateway.silence is not None:
            await self.gateway.silence.wait()
        if self.gateway.kernels.get(kernel_id) != self.current_user.username:
            raise web.HTTPError(404)
        self.finish({"at": self.gateway.name, "id": kernel_id})

    delete = get


class KernelList(Known, ForwardsRequests):
    """``/api/kernels``."""

    async def get(self):
        if self.gateway.silence is not None:
            await self.gateway.silence.wait()
        own = [
            {"id": key, "at": self.gateway.name}
            for key, owner in self.gateway.kernels.items()
            if owner == self.current_user.username
        ]
        self.finish(
            {"kernels": await with_peers(self, KERNELS, own)}
            if FORWARDED_BY not in self.request.headers
            else json.dumps(own)
        )


class SessionList(Kernel):
    """``POST /api/sessions``."""

    async def post(self):
        if not await self.forward_session(self.current_user.username, self.get_query_argument("path"), ""):
            self.finish({"at": self.gateway.name})


class Connection:
    """A kernel's, as KernelWebsocketHandler calls it: echoes, and floods or closes when told."""

    kernel_ws_protocol = V1

    def __init__(self, handler):
        self.handler, self.sent, self.received = handler, 0, 0

    async def connect(self):
        self.handler.gateway.connections.append(self)

    def handle_incoming_message(self, message):
        gateway = self.handler.gateway
        if gateway.reading is not None:
            return self._read_slowly(message)
        if message == "close":
            self.handler.close(4321, "as told")
        elif message == "flood":
            self.flood = asyncio.ensure_future(self._flood())
        else:
            self.handler.write_message(message, binary=isinstance(message, bytes))
        return None

    async def _read_slowly(self, message):
        await self.handler.gateway.reading.wait()
        self.received += len(message)

    async def _flood(self):
        for _ in range(200):
            await self.handler.write_message(bytes(MEGABYTE), binary=True)
            self.sent += MEGABYTE
        await self.handler.write_message("that is all")

    def disconnect(self):
        self.handler.gateway.closed.append((self.handler.close_code, self.handler.close_reason))


class Channels(ForwardsWebsocket, Known, WebSocketHandler):
    """``/api/kernels/{id}/channels``, around which KernelWebsocketHandler does the same."""

    log = LOG

    async def get(self, kernel_id):
        self.gateway.asked.append(self.request)
        if await self.forward_websocket(kernel_id):
            return
        if self.current_user is None or self.gateway.kernels.get(kernel_id) != self.current_user.username:
            raise web.HTTPError(404)
        self.connection = Connection(self)
        await super().get(kernel_id=kernel_id)

    async def open(self, kernel_id):
        await self.connection.connect()

    def select_subprotocol(self, subprotocols):
        return self.connection.kernel_ws_protocol if self.connection.kernel_ws_protocol in subprotocols else None

    def on_close(self):
        self.connection.disconnect()


class Kernels(dict):
    """Kernels by id, with their owners."""

    max_request_size, budget = 6 * MEGABYTE, Budget(0, 0)


class Gateway:
    """A small gateway that listens, and knows a directory."""

    def __init__(self, name, *, tls=None, ca_file=""):
        self.name, self.scheme = name, "https" if tls else "http"
        self.kernels, self.asked, self.connections, self.closed = Kernels(), [], [], []
        self.silence = self.reading = None
        self.directory = Directory(name)
        self.peers = Peers(self.directory, log=LOG)
        self.key = b"key" * 11
        self.proof = PeerProof(lambda: self.key, lambda: self.name)
        self.forwarder = Forwarder(self.peers, PeerClient(self.proof, ca_file))
        routes = [
            (r"/api/kernels", KernelList),
            (r"/api/sessions", SessionList),
            (r"/api/kernels/(?P<kernel_id>[0-9a-z]+)", KernelById),
            (r"/api/kernels/(?P<kernel_id>[0-9a-z]+)/act", Kernel),
            (r"/api/kernels/(?P<kernel_id>[0-9a-z]+)/channels", Channels),
        ]
        settings = {"gateway": self, "forwarder": self.forwarder, "kernel_manager": self.kernels, "base_url": "/"}
        application = web.Application(routes, session_manager=Sessions(), **settings)
        self.server = HTTPServer(application, ssl_options=tls)
        sockets = bind_sockets(0, "127.0.0.1")
        self.server.add_sockets(sockets)
        self.url = f"{self.scheme}://127.0.0.1:{sockets[0].getsockname()[1]}"

    @property
    def peer(self):
        return Peer(server_id=self.name, url=self.url)

    async def ask(self, method, path, *, user="alice", **options):
        headers = {"Authorization": f"token {user}", **options.pop("headers", {})}
        request = HTTPRequest(self.url + path, method, headers, allow_nonstandard_methods=True, **options)
        return await AsyncHTTPClient().fetch(request, raise_error=False)

    async def websocket(self, kernel_id, *, user="alice", **options):
        url = f"ws{self.url.removeprefix('http')}/api/kernels/{kernel_id}/channels?session_id=s1"
        headers = {"Authorization": f"token {user}", **options.pop("headers", {})}
        return await websocket_connect(HTTPRequest(url, headers=headers), **options)

    async def close(self):
        self.forwarder.close()
        self.server.stop()
        await self.server.close_all_connections()


@asynccontextmanager
async def gateways(*names, **options):
    """Gateways that know of each other."""
    found = [Gateway(name, **options) for name in names]
    for one in found:
        one.directory.gateways = {other.name: other.peer for other in found}
    try:
        yield found
    finally:
        for one in found:
            await one.close()


@pytest.fixture
async def pair():
    """Gateway a, and b, who has alice's kernel k; a knows that."""
    async with gateways("a", "b") as (a, b):
        b.kernels["k"] = "alice"
        a.directory.kernels["k"] = ("b", "alice")
        yield a, b


async def until(condition):
    """Poll until it is true."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.01)


# -- requests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PATCH"])
async def test_a_request_for_a_peers_kernel_gets_the_peers_answer(pair, method):
    """Method, path, query, body and user go on, but no credentials; status, headers and body come back."""
    a, b = pair
    body = b'{"x": 1}' if method in ("POST", "PATCH") else None
    answer = await a.ask(
        method, "/api/kernels/k/act?y=%26%C3%A4&y=2", body=body, headers={"Cookie": "c=1", "Origin": "http://o"}
    )
    assert answer.code == 201
    assert answer.headers["Location"] == "/api/kernels/k"
    assert answer.headers["Content-Type"] == "application/x-said"
    assert json.loads(answer.body) == {"at": "b", "id": "k", "body": (body or b"").decode()}
    [request] = b.asked
    assert (request.method, request.query_arguments) == (method, {"y": ["&ä".encode(), b"2"]})
    assert request.headers[FORWARDED_BY] == "a"
    assert not {"Authorization", "Cookie", "Origin"} & set(request.headers)
    assert "token alice" not in str(request.headers)


async def test_the_peer_judges_who_may_have_it(pair):
    """The peer decides for the user; a request of a user who is not the owner on record is not forwarded."""
    a, b = pair
    assert (await a.ask("GET", "/api/kernels/k/act", user="bob")).code == 404
    assert b.asked == []
    b.kernels["k2"] = "alice"
    a.directory.kernels["k2"] = ("b", "bob")  # a wrong record gives no user access
    assert (await a.ask("GET", "/api/kernels/k2/act", user="bob")).code == 404
    assert (await b.proof.authenticate(b.asked[0])).username == "bob"


async def test_what_is_no_gateway_of_the_deployment_is_not_believed_either_way(pair, monkeypatch):
    """An address without the store's key gets no token, and its answer reaches no user; nor does its request."""
    monkeypatch.setattr(forward, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(peer_websocket, "WAIT_SECONDS", 0.1)
    a, b = pair
    await a.ask("GET", "/api/kernels/k/act")
    headers = {name: b.asked[0].headers[name] for name in (USER, PROOF)}
    path, begin = "/api/kernels/k/act", headers[PROOF].rpartition(".")[0]

    def asked(uri=path, method="GET", body=b"", name=headers[USER], proof=headers[PROOF]):
        sent = HTTPHeaders({"Host": "b", USER: name, PROOF: proof})
        start = RequestStartLine(method, uri, "HTTP/1.1")
        return HTTPServerRequest(start_line=start, headers=sent, body=body, connection=SimpleNamespace())

    assert (await b.proof.authenticate(asked())).username == "alice"
    other = asked(name=headers[USER][:-4] + "AAAA")
    for changed in (
        asked(uri=path + "?x"),
        asked(method="DELETE"),
        asked(body=b"{}"),
        other,
        asked(proof=begin + ".0"),
    ):
        with pytest.raises(NotAllowed):
            await b.proof.authenticate(changed)
    with pytest.raises(NotAllowed):
        await a.proof.authenticate(asked())  # it was for b
    monkeypatch.setattr(peer_proof, "MAX_AGE", -1)
    with pytest.raises(NotAllowed, match="too old"):
        await b.proof.authenticate(asked())
    monkeypatch.undo()
    monkeypatch.setattr(forward, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(peer_websocket, "WAIT_SECONDS", 0.1)

    class Stranger(PeerProof):
        async def authenticate(self, request):
            return GatewayUser("alice")

    b.proof = Stranger(lambda: b"no key", lambda: "b")
    assert (await a.ask("GET", path)).code == 503
    assert b.asked[-1].path == path
    with pytest.raises(HTTPClientError, match="503"):
        await a.websocket("k")
    a.key = b""  # before the store is open
    assert (await a.ask("GET", path)).code == 503


async def test_a_request_is_forwarded_once(pair):
    """Two gateways that take each other for the owner do not send it to and fro."""
    a, b = pair
    b.kernels.clear()
    b.directory.kernels["k"] = ("a", "alice")
    assert (await a.ask("GET", "/api/kernels/k/act")).code == 404
    assert [len(one.asked) for one in (a, b)] == [1, 1]
    with pytest.raises(HTTPClientError, match="404"):
        await a.websocket("k")


async def test_a_kernel_that_has_moved_is_found_at_its_new_gateway():
    """The location is looked up again when the peer no longer has the kernel."""
    async with gateways("a", "b", "c") as (a, b, c):
        a.directory.kernels["k"] = ("b", "alice")
        b.kernels["k"] = "alice"
        assert json.loads((await a.ask("GET", "/api/kernels/k/act")).body)["at"] == "b"
        c.kernels["k"] = b.kernels.pop("k")
        a.directory.kernels["k"] = ("c", "alice")
        assert json.loads((await a.ask("POST", "/api/kernels/k/act", body=b"")).body)["at"] == "c"
        a.kernels["k"] = c.kernels.pop("k")
        a.directory.kernels["k"] = ("a", "alice")
        assert json.loads((await a.ask("GET", "/api/kernels/k/act")).body)["at"] == "a"


async def test_a_dead_gateways_kernel_is_waited_for_and_then_said_to_be_busy(pair, monkeypatch):
    """Never 404, which clients take for the kernel's end."""
    a, b = pair
    dead = Peer(server_id="b", url=b.url, lives=False)
    a.directory.gateways["b"] = dead
    waiting = asyncio.ensure_future(a.ask("GET", "/api/kernels/k/act"))
    await until(lambda: a.asked)
    a.kernels["k"] = "alice"  # taken over
    assert json.loads((await waiting).body)["at"] == "a"
    a.kernels.clear()
    monkeypatch.setattr(forward, "WAIT_SECONDS", 0.1)
    assert (await a.ask("GET", "/api/kernels/k/act")).code == 503
    await b.close()
    a.directory.gateways["b"] = Peer(server_id="b", url=b.url)  # its lease is not over yet
    assert (await a.ask("GET", "/api/kernels/k/act")).code == 503
    monkeypatch.setattr(peer_websocket, "WAIT_SECONDS", 0.1)
    with pytest.raises(HTTPClientError, match="503"):
        await a.websocket("k")


async def test_a_kernel_that_no_record_names_yet_is_asked_for(pair):
    """It may have been made a moment ago. A kernel that no gateway has is not found."""
    a, _b = pair
    a.directory.kernels.clear()
    assert json.loads((await a.ask("GET", "/api/kernels/k/act")).body)["at"] == "b"
    assert (await a.ask("GET", "/api/kernels/k/act", user="bob")).code == 404
    assert (await a.ask("GET", "/api/kernels/none/act")).code == 404


async def test_while_the_store_is_away_what_was_known_is_used(pair):
    """Requests for a known kernel are forwarded; the peers are asked for an unknown one, with 503 and not 404."""
    a, b = pair
    await a.ask("GET", "/api/kernels")
    await a.ask("GET", "/api/kernels/k/act")
    a.directory.trouble = "the database does not answer"
    assert json.loads((await a.ask("GET", "/api/kernels/k/act")).body)["at"] == "b"
    b.kernels["new"] = "alice"
    assert json.loads((await a.ask("GET", "/api/kernels/new/act")).body)["at"] == "b"
    assert (await a.ask("GET", "/api/kernels/none/act")).code == 503


async def test_a_gateway_that_hangs_is_waited_for_as_long_as_it_lives(pair, monkeypatch):
    """A slow answer arrives; once the lease is over the request is free to be sent to who has the kernel then."""
    monkeypatch.setattr(forward, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(peers, "CACHED_SECONDS", 0.0)
    a, b = pair
    b.silence = asyncio.Event()
    waiting = asyncio.ensure_future(a.ask("GET", "/api/kernels/k"))
    await until(lambda: b.asked)
    b.silence.set()
    assert json.loads((await waiting).body)["at"] == "b"
    b.silence.clear()
    waiting = asyncio.ensure_future(a.ask("GET", "/api/kernels/k"))
    deleting = asyncio.ensure_future(a.ask("DELETE", "/api/kernels/k"))
    await until(lambda: len(b.asked) == 3)
    a.directory.gateways["b"] = Peer(server_id="b", url=b.url, lives=False)
    assert (await deleting).code == 503  # it may have been done
    a.kernels["k"] = "alice"
    assert json.loads((await waiting).body)["at"] == "a"
    b.silence.set()


async def test_while_the_store_does_not_answer_a_gateway_that_was_never_listed_lives(pair, monkeypatch):
    """It has the kernel by an answer from before: its slow answer arrives, and its websockets stay open."""
    monkeypatch.setattr(forward, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(peers, "CACHED_SECONDS", 0.0)
    a, b = pair
    known = Peers(a.directory, log=LOG)
    peer = (await known.find(KERNELS, "k")).peer
    a.directory.trouble = "the database does not answer"
    assert await known.lives(peer)
    a.directory.trouble = ""
    assert await known.lives(peer)
    assert not await known.lives(Peer(server_id="none", url=""))
    a.directory.trouble = "the database does not answer"
    a.directory.gateways["b"] = Peer(server_id="b", url=b.url, lives=False)
    assert await known.lives(peer)  # by the last answer
    a.directory.trouble = ""
    assert not await known.lives(peer)


async def test_lists_have_what_is_at_all_gateways():
    """Each once, for this user; of one that does not answer what is on record."""
    async with gateways("a", "b", "c") as (a, b, c):
        a.kernels.update(k1="alice", moved="alice")
        b.kernels.update(k2="alice", moved="alice", other="bob")
        c.kernels.update(k3="alice")
        answer = json.loads((await a.ask("GET", "/api/kernels")).body)["kernels"]
        assert {one["id"]: one["at"] for one in answer} == {"k1": "a", "moved": "a", "k2": "b", "k3": "c"}
        assert len(answer) == 4
        c.silence = asyncio.Event()
        a.directory.kernels.update(k3=("c", "alice"), theirs=("c", "bob"))
        seconds_before = lists.LIST_SECONDS
        lists.LIST_SECONDS = 0.2
        try:
            answer = json.loads((await a.ask("GET", "/api/kernels")).body)["kernels"]
        finally:
            lists.LIST_SECONDS = seconds_before
            c.silence.set()
        assert sorted(one["id"] for one in answer) == ["k1", "k2", "k3", "moved"]


async def test_all_gateways_agree_on_where_a_new_session_is_made():
    """Whichever is asked; one that goes moves only what it had, and what cannot be reached is made here."""
    async with gateways("a", "b", "c") as all_of_them:
        homes = {}
        for path in map(str, range(12)):
            answers = [await one.ask("POST", f"/api/sessions?path={path}", body=b"") for one in all_of_them]
            [homes[path]] = {json.loads(answer.body)["at"] for answer in answers}
        assert len(set(homes.values())) > 1
        a, _b, c = all_of_them
        await c.close()
        for path, home in homes.items():
            at = json.loads((await a.ask("POST", f"/api/sessions?path={path}", body=b"")).body)["at"]
            assert at == (home if home != "c" else "a")
        # One that exists goes before.
        a.directory.at["alice", "n"] = "b"
        assert json.loads((await a.ask("POST", "/api/sessions?path=n", body=b"")).body)["at"] == "b"


async def test_a_peers_certificate_is_checked(tmp_path):
    """One of an authority that is not known is not accepted; with its file it is."""
    certificate = Certificate.make(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate.file, certificate.key)
    passed = None
    async with gateways("b", tls=tls) as [b]:
        b.kernels["k"] = "alice"
        for ca_file, name in (("", "a1"), (str(certificate.file), "a2")):
            async with gateways(name, ca_file=ca_file) as [a]:
                a.directory.gateways["b"], a.directory.kernels["k"] = b.peer, ("b", "alice")
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(forward, "WAIT_SECONDS", 0)
                    passed = await a.ask("GET", "/api/kernels/k/act")
                assert passed.code == (201 if ca_file else 503)
        async with gateways("a", ca_file=str(certificate.file)) as [a]:
            a.directory.gateways["b"], a.directory.kernels["k"] = b.peer, ("b", "alice")
            websocket = await a.websocket("k")
            await websocket.write_message("over TLS")
            assert await websocket.read_message() == "over TLS"
            websocket.close()


# -- websockets -------------------------------------------------------------------------------------------


async def test_a_websocket_is_joined_to_the_peers(pair):
    """Text and bytes go both ways, under the subprotocol that the peer chose, and small ones do not wait."""
    a, b = pair
    websocket = await a.websocket("k", subprotocols=["other", V1])
    assert websocket.selected_subprotocol == V1
    for message in ("text ä", b"\x00bytes\xff", "", b"", bytes(5 * MEGABYTE)):
        await websocket.write_message(message, binary=isinstance(message, bytes))
        assert await websocket.read_message() == message
    request = b.asked[0]
    assert request.query_arguments == {"session_id": [b"s1"]}
    assert "Authorization" not in request.headers
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        await websocket.write_message("ping")
        assert await websocket.read_message() == "ping"
        times.append(time.perf_counter() - begun)
    assert statistics.median(times) < 0.03  # Nagle's algorithm with delayed ACKs takes 0.04
    websocket.close(4002, "enough")
    await until(lambda: b.closed)
    assert b.closed[0][0] == 4002
    assert not a.peers._websockets
    plain = await a.websocket("k")
    assert plain.selected_subprotocol is None
    plain.close()


async def test_a_refused_websocket_says_why(pair):
    """The peer's status is the client's."""
    a, b = pair
    b.kernels["k"] = "bob"
    with pytest.raises(HTTPClientError, match="404"):
        await a.websocket("k")


async def test_the_peers_close_is_the_clients(pair):
    """Code and reason; a gateway that just goes is said to be restarting, so that clients connect again."""
    a, b = pair
    websocket = await a.websocket("k")
    await websocket.write_message("close")
    assert await websocket.read_message() is None
    assert (websocket.close_code, websocket.close_reason) == (4321, "as told")
    websocket = await a.websocket("k")
    await websocket.write_message("there")
    assert await websocket.read_message() == "there"
    b.connections[-1].handler.ws_connection.stream.close()
    assert await websocket.read_message() is None
    assert websocket.close_code == 1012


async def test_a_websocket_ends_when_its_gateways_lease_is_over(pair, monkeypatch):
    """A gateway that hangs closes nothing by itself."""
    monkeypatch.setattr(peers, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(peers, "CACHED_SECONDS", 0.0)
    a, b = pair
    websocket = await a.websocket("k")
    a.directory.trouble = "a store that does not answer ends nothing"
    await websocket.write_message("there")
    assert await websocket.read_message() == "there"
    a.directory.trouble = ""
    a.directory.gateways["b"] = Peer(server_id="b", url=b.url, lives=False)
    assert await websocket.read_message() is None
    assert websocket.close_code == 1012


async def test_a_client_that_does_not_read_slows_the_kernels_gateway_down(pair):
    """What it has not taken stays with the kernel's gateway, and arrives whole when it reads again."""
    a, b = pair
    websocket = await a.websocket("k", max_message_size=2 * MEGABYTE)
    await websocket.write_message("flood")
    await until(lambda: b.connections and b.connections[0].sent)
    sent = -1
    while sent != b.connections[0].sent:
        sent = b.connections[0].sent
        await asyncio.sleep(0.5)
    assert sent < 40 * MEGABYTE
    received = 0
    while (message := await websocket.read_message()) != "that is all":
        received += len(message)
    assert received == 200 * MEGABYTE
    websocket.close()


async def test_a_message_that_is_too_large_is_refused_by_the_gateway_that_forwards(pair):
    """Its cell fails with the reason; the websockets stay open, and the kernel's gateway gets the next message."""
    a, _b = pair
    websocket = await a.websocket("k")
    header = {"msg_id": "m1", "msg_type": "execute_request", "session": "s1"}
    cell = json.dumps({"channel": "shell", "content": {"code": "x" * (7 * MEGABYTE)}, "header": header})
    await websocket.write_message(cell)
    answers = [json.loads(await websocket.read_message()) for _ in range(3)]
    assert [one["msg_type"] for one in answers] == ["error", "execute_reply", "status"]
    assert all(one["parent_header"] == header for one in answers)
    assert "this server takes 6 MB" in answers[0]["content"]["evalue"]
    await websocket.write_message("ping")
    assert "ping" in await websocket.read_message()
    await websocket.write_message("x" * (7 * MEGABYTE))
    assert await websocket.read_message() is None
    assert websocket.close_code == 1009


async def test_a_kernels_gateway_that_does_not_read_slows_the_client_down(pair):
    """The other way round."""
    a, b = pair
    b.reading = asyncio.Event()
    websocket = await a.websocket("k")
    sent = 0

    async def send():
        nonlocal sent
        for _ in range(100):
            await websocket.write_message(bytes(MEGABYTE), binary=True)
            sent += MEGABYTE

    sending, before = asyncio.ensure_future(send()), -1
    await until(lambda: sent)
    while before != sent:
        before = sent
        await asyncio.sleep(0.5)
    assert sent < 40 * MEGABYTE
    b.reading.set()
    await sending
    await until(lambda: b.connections[0].received == 100 * MEGABYTE)
    websocket.close()
