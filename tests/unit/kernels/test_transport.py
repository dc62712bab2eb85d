"""The transport of a kernel: which addresses are dialled and remembered, and what a hostile launcher cannot do."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import asynccontextmanager
from dataclasses import asdict, replace

import pytest

from gateway_slurm.allocations import launcher
from gateway_slurm.allocations.launcher import Questions
from gateway_slurm.errors import LauncherFailed, LinkError, NodeUnreachable, RequestError
from gateway_slurm.kernels import transport
from gateway_slurm.kernels.model import KernelLaunch, Phase
from gateway_slurm.kernels.process import KernelProcess
from gateway_slurm.kernels.transport import NOT_KEPT, TransportSelector, choose_mode
from gateway_slurm.link import wire
from helpers.kernel_clients import poll_async

HERE = "127.0.0.1"
LAUNCH = KernelLaunch(
    argv=("kernel",),
    env={},
    cwd=None,
    connection={"key": "k", "signature_scheme": "hmac-sha256", "curve_publickey": "p", "curve_secretkey": "s"},
    mode="auto",
    language="python",
    start_timeout=5.0,
    port_range=None,
    log_dir="",
    umask=0o022,
)


class Node:
    """A launcher as the server sees it, which answers PROBE with ``answer(fields)``."""

    where, node, jobid = "the launcher on node n1 (job 1)", "n1", "1"

    def __init__(self, answer, *, peer=HERE, own_ip=HERE, probes=True):
        self.peer, self.own_ip, self.probes = peer, own_ip, probes
        self.kernels, self.asked, self.sent = {}, [], []
        self.streams = None
        self.answer = answer
        self.prober = Questions(self.send, "PROBE", "probe", launcher.PROBE_TIMEOUT)

    def send(self, name, **fields):
        """Return True: the link is never down."""
        self.sent.append((name, fields))
        if name == "PROBE":
            self.asked.append(fields)
            told = self.answer(fields)
            if told is not None:
                self.prober.message({"probe": fields["probe"], **told})
        return True

    def slot_of(self, _kernel_id):
        """Return the slot."""
        return 0


@pytest.fixture
def dialled(monkeypatch):
    """All addresses that were dialled."""
    seen = []
    real = asyncio.open_connection

    async def recording(host, port, **options):
        seen.append((host, port))
        return await real(host, port, **options)

    monkeypatch.setattr(asyncio, "open_connection", recording)
    return seen


@asynccontextmanager
async def five_listeners(serve):
    """A port for each channel, where a service calls ``serve(reader, writer)`` for each connection."""

    async def served(reader, writer):
        await serve(reader, writer)

    servers = [await asyncio.start_server(served, HERE, 0) for _ in wire.CHANNELS]
    try:
        yield {name: each.sockets[0].getsockname()[1] for name, each in zip(wire.CHANNELS, servers, strict=True)}
    finally:
        for each in servers:
            each.close()


@asynccontextmanager
async def honest_node(**options):
    """A node whose launcher gives the right answer."""
    words = {}

    async def tell(reader, writer):
        writer.write(words[await reader.readexactly(32)])

    async with five_listeners(tell) as ports:

        def answer(fields):
            words[fields["question"].encode()] = fields["answer"].encode()
            return {"ports": ports}

        yield Node(answer, **options), ports


@pytest.fixture
def select():
    """Select a launch's transport with one TransportSelector."""
    made = TransportSelector(logging.getLogger("test"))

    async def selected(node, launch=LAUNCH, last=None, ports=None, ip=HERE):
        return await made.select(launch, node, "k", last, (ip, ports or {}))

    return selected


async def test_a_node_that_gives_the_right_answer_is_direct(select, dialled):
    """All five ports are dialled at the link's address, and the kernel gets them."""
    async with honest_node() as (node, ports):
        selected = await select(node)
    assert (selected.launch.mode, selected.ip, selected.ports) == ("direct", HERE, ports)
    assert selected.launch.connection == LAUNCH.connection
    assert sorted(dialled) == sorted((HERE, port) for port in ports.values())


async def test_a_direct_kernel_whose_output_is_not_kept_says_so(select, caplog):
    """The log says so, and the reason in the kernel's model."""
    caplog.set_level(logging.INFO)
    async with honest_node() as (node, _ports):
        selected = await select(node, replace(LAUNCH, mode="direct", why=NOT_KEPT))
    assert selected.launch.why == f"connect = direct, and node n1 can be dialled at {HERE}; {NOT_KEPT}"
    assert selected.launch.why in caplog.text


async def test_an_ipv4_address_that_a_socket_for_both_shows_is_ipv4(select, dialled):
    """A listener for both families, as the relay is, reports ``::ffff:…``."""
    async with honest_node(peer=f"::ffff:{HERE}") as (node, _ports):
        assert (await select(node)).ip == HERE


# -- what a launcher may not have us do -----------------------------------------------------------------------


def others(channel="shell", port=2001):
    """Five ports, one of them changed."""
    return {**dict(zip(wire.CHANNELS, range(2001, 2006), strict=True)), channel: port}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"ports": None},
        {"ports": "22"},
        {"ports": [1, 2, 3, 4, 5]},
        {"ports": {"shell": 2000}},
        {"ports": others("more", 2000)},
        {"ports": others("shell", 22)},
        {"ports": others("shell", 0)},
        {"ports": others("shell", -5)},
        {"ports": others("shell", 65536)},
        {"ports": others("shell", True)},
        {"ports": others("shell", "2001")},
        {"ports": others("shell", 2001.0)},
        {"ports": others("shell", [HERE, 22])},
        {"ports": others("shell", {"ip": "10.0.0.1", "port": 22})},
        {"error": {"a": ["list"] * 1000}},
        {"error": "x" * 100_000},
    ],
)
async def test_invalid_ports_are_not_dialled(select, dialled, answer):
    """The kernel uses the tunnel, the reason is short, and nothing was dialled."""
    selected = await select(Node(lambda _fields: answer))
    assert selected.launch.mode == "ipc"
    assert selected.launch.why.startswith("node n1 was not dialled: ")
    assert len(selected.launch.why) < 500
    assert dialled == []


async def test_only_ports_of_the_admins_range_are_dialled(select, dialled):
    """Other ports that a launcher names are refused."""
    async with honest_node() as (node, ports):
        low = max(ports.values()) + 1
        selected = await select(node, replace(LAUNCH, port_range=(low, 65535)))
    assert (selected.launch.mode, dialled) == ("ipc", [])


@pytest.mark.parametrize("field", ["ip", "host", "address", "peer"])
async def test_an_address_that_a_launcher_names_is_not_dialled(select, dialled, field):
    """The link's address is dialled, whatever else PROBED contains."""
    async with honest_node() as (node, _ports):
        honest = node.answer
        node.answer = lambda fields: {**honest(fields), field: "192.0.2.9"}
        assert (await select(node)).ip == HERE
    assert {host for host, _port in dialled} == {HERE}


@pytest.mark.parametrize(
    ("peer", "own", "words"),
    [
        ("198.51.100.7", "10.0.0.5", "addresses are translated"),
        (HERE, "169.254.169.254", "addresses are translated"),
        (HERE, "metadata.example.org", "not known"),
        (HERE, "", "not known"),
        ("", HERE, "not known"),
        ("2001:db8::5", "2001:db8::5", "IPv4 addresses only"),
        ("fe80::5%eth0", "fe80::5%eth0", "IPv4 addresses only"),
    ],
)
async def test_a_node_with_another_address_than_its_link_is_not_asked(select, dialled, peer, own, words):
    """An address that TCP has not proved is not dialled, and the launcher is not asked to listen."""
    node = Node(lambda _fields: {"ports": others()}, peer=peer, own_ip=own)
    selected = await select(node)
    assert selected.launch.mode == "ipc"
    assert words in selected.launch.why
    assert (dialled, node.asked) == ([], [])
    with pytest.raises(NodeUnreachable, match=words):
        await select(node, replace(LAUNCH, mode="direct"))


@pytest.mark.parametrize("speech", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"0" * 32, b"x" * 1_000_000, "echo"])
async def test_a_process_that_does_not_know_the_answer_is_not_the_node(select, speech, monkeypatch):
    """Silence, a greeting, a guess, a flood and an echo are recognised soon."""
    monkeypatch.setattr(transport, "ANSWER_SECONDS", 0.1)

    async def speak(reader, writer):
        writer.write(await reader.read(100) if speech == "echo" else speech)

    async with five_listeners(speak) as ports:
        selected = await select(Node(lambda _fields: {"ports": ports}))
    assert selected.launch.mode == "ipc"
    assert "the process that listens there is not its launcher" in selected.launch.why


async def test_nothing_but_the_question_is_sent(select, monkeypatch):
    """The process that listens there gets the random question, and nothing else."""
    monkeypatch.setattr(transport, "ANSWER_SECONDS", 0.1)
    heard = []

    async def served(reader, _writer):
        heard.append(await reader.read())

    servers = [await asyncio.start_server(served, HERE, 0) for _ in wire.CHANNELS]
    ports = {name: each.sockets[0].getsockname()[1] for name, each in zip(wire.CHANNELS, servers, strict=True)}
    node = Node(lambda _fields: {"ports": ports})
    selected = await select(node)
    for each in servers:
        each.close()
    assert selected.launch.mode == "ipc"
    assert await poll_async(lambda: len(heard) == 5, timeout=10)
    assert set(heard) == {node.asked[0]["question"].encode()}


async def test_a_port_that_is_closed_is_named(select):
    """One closed port of five is enough: clients of the kernel would hang."""
    async with honest_node() as (node, ports):
        with socket.socket() as free:
            free.bind((HERE, 0))
            closed = free.getsockname()[1]
            honest = node.answer
            node.answer = lambda fields: {**honest(fields), "ports": {**ports, "stdin": closed}}
            selected = await select(node)
    assert selected.launch.why == f"node n1 could not be dialled at {HERE}:{closed}: Connection refused"


async def test_a_launcher_that_does_not_answer_is_waited_for_a_moment(select, dialled, monkeypatch):
    """The start goes on through the tunnel."""
    monkeypatch.setattr(launcher, "PROBE_TIMEOUT", 0.05)
    selected = await select(Node(lambda _fields: None))
    assert (selected.launch.mode, dialled) == ("ipc", [])
    assert "did not answer" in selected.launch.why


def test_an_unexpected_answer_is_ignored():
    """Neither an unknown probe nor one that has no name."""
    probing = Questions(lambda *_arguments, **_fields: True, "PROBE", "probe", 1.0)
    for fields in ({}, {"probe": "x"}, {"probe": "", "ports": {}}):
        probing.message(fields)


# -- nodes that do not answer ---------------------------------------------------------------------------------


@pytest.fixture
def swallowing():
    """A port whose listener takes no more connections: what dials it gets no answer (listen(2), the backlog)."""
    with socket.socket() as full:
        full.bind((HERE, 0))
        full.listen(0)
        waiting = []
        for _ in range(2):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(full.getsockname())
        yield full.getsockname()[1]
        for each in waiting:
            each.close()


async def test_a_silent_node_is_remembered(select, dialled, swallowing, monkeypatch):
    """The node is not dialled for a while; after each further failure that takes twice as long."""
    now, loop = [1000.0], asyncio.get_running_loop()
    monkeypatch.setattr(transport, "CONNECT_SECONDS", 0.2)
    node = Node(lambda _fields: {"ports": dict.fromkeys(wire.CHANNELS, swallowing)})
    monkeypatch.setattr(transport, "_now", lambda: now[0])
    begun = loop.time()
    first = await select(node)
    assert loop.time() - begun < 5
    assert first.launch.why == f"node n1 could not be dialled at {HERE}:{swallowing}: timed out"
    assert len(dialled) == 5
    for seconds, asked in ((0.0, 1), (59.0, 1), (2.0, 2), (119.0, 2), (2.0, 3)):
        now[0] += seconds
        selected = await select(node)
        assert selected.launch.mode == "ipc"
        assert selected.launch.why.startswith(first.launch.why)
        assert len(node.asked) == asked


async def test_a_kernel_that_must_be_direct_is_tried_on_a_silent_node(select, swallowing, monkeypatch):
    """``connect = direct`` is tried nevertheless, and a success ends the memory."""
    monkeypatch.setattr(transport, "CONNECT_SECONDS", 0.2)
    silent = Node(lambda _fields: {"ports": dict.fromkeys(wire.CHANNELS, swallowing)})
    await select(silent)
    with pytest.raises(NodeUnreachable, match="timed out"):
        await select(silent, replace(LAUNCH, mode="direct"))
    async with honest_node() as (node, _ports):
        assert (await select(node)).launch.mode == "ipc"
        assert (await select(node, replace(LAUNCH, mode="direct"))).launch.mode == "direct"
        assert (await select(node)).launch.mode == "direct"


async def test_what_is_remembered_is_bounded(select, swallowing, monkeypatch):
    """The oldest node is forgotten."""
    monkeypatch.setattr(transport, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(transport, "MAX_SILENT_NODES", 1)
    for host in ("127.0.0.1", "127.0.0.2", "127.0.0.1"):
        monkeypatch.setattr(transport, "_ask_all", lambda *_arguments, **_keywords: _timed_out())
        node = Node(lambda _fields: {"ports": others()}, peer=host, own_ip=host)
        assert (await select(node)).launch.mode == "ipc"
        assert len(node.asked) == 1


async def _timed_out():
    return [f"there: {transport.TIMED_OUT}"]


# -- restarts and older versions ------------------------------------------------------------------------------


async def test_a_restart_keeps_the_tunnel(select, dialled):
    """Clients are connected through it. The reason stays the one of the first start."""
    async with honest_node() as (node, _ports):
        last = LAUNCH.tunnelled("it was so")
        selected = await select(node, last=last)
    assert (selected.launch.mode, selected.launch.why, node.asked, dialled) == ("ipc", "it was so", [], [])
    assert "curve_publickey" not in selected.launch.connection


async def test_a_restart_asks_for_the_kernels_own_ports(select):
    """The launcher gets them only for a direct kernel."""
    async with honest_node() as (node, ports):
        await select(node, last=LAUNCH.direct("so"), ports=ports)
        await select(node, replace(LAUNCH, mode="direct"), last=LAUNCH.tunnelled("so"), ports=dict(ports))
    assert [fields["ports"] for fields in node.asked] == [ports, None]


@pytest.mark.parametrize(("peer", "own"), [("fd00::2", "fd00::2"), ("127.0.0.9", "127.0.0.9"), ("127.0.0.9", HERE)])
async def test_a_restart_keeps_the_kernels_address(select, dialled, peer, own):
    """Also where the launcher's link comes from another address by now: clients are connected to the old one."""
    async with honest_node(peer=peer, own_ip=own) as (node, ports):
        selected = await select(node, last=LAUNCH.direct("so"), ports=ports)
    assert (selected.launch.mode, selected.ip, selected.ports) == ("direct", HERE, ports)
    assert [fields["ip"] for fields in node.asked] == [HERE]
    assert {host for host, _port in dialled} == {HERE}


async def test_a_launcher_of_an_older_version_gets_no_new_message(select, dialled):
    """The kernel uses the tunnel, or is direct without a test where that was requested."""
    node = Node(lambda _fields: None, probes=False)
    assert (await select(node)).launch.mode == "ipc"
    selected = await select(node, replace(LAUNCH, mode="direct"))
    assert (selected.launch.mode, selected.ip, selected.ports) == ("direct", HERE, None)
    assert (node.asked, dialled) == ([], [])


def test_an_older_versions_record_has_no_reason():
    """A kernel that an earlier version started is restored."""
    fields = asdict(LAUNCH)
    del fields["why"]
    assert KernelLaunch.from_json(fields) == LAUNCH
    assert KernelLaunch.from_json(asdict(LAUNCH.direct("so"))).why == "so"


# -- what STARTED may say -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ip": "169.254.169.254"}, "not the node's address"),
        ({"ip": "localhost"}, "not the node's address"),
        ({"mode": "ipc"}, "for a kernel to start as direct"),
        ({"ports": {"shell": 2000}}, "a port for each channel"),
        ({"ports": others("shell", 22)}, "which is not from"),
    ],
)
async def test_a_direct_kernel_is_where_was_dialled_or_its_start_has_failed(changed, words):
    """A launcher's STARTED cannot send clients elsewhere, and nothing of the kernel is left."""
    async with honest_node() as (node, ports):
        process = process_on(node, {"mode": "direct", "pid": 5, "ip": HERE, "ports": ports, **changed})
        with pytest.raises(LinkError, match=words):
            await process.start(LAUNCH)
    assert process.phase is Phase.DEAD
    assert [name for name, _fields in node.sent][-1] == "STOP"


async def test_a_tunnelled_kernel_sends_no_client_to_an_address(tmp_path):
    """A launcher that must use the tunnel cannot make its kernel direct."""
    node = Node(lambda _fields: None, probes=False)
    process = process_on(node, {"mode": "direct", "pid": 5, "ip": "192.0.2.9", "ports": others()}, tmp_path)
    with pytest.raises(LinkError, match="for a kernel to start as ipc"):
        await process.start(LAUNCH)
    process.detach()


async def test_a_job_that_ends_while_its_node_is_dialled_is_the_reason():
    """The error has Slurm's state, and not the result of the dialling."""
    async with honest_node() as (node, ports):
        process = process_on(node, {"mode": "direct", "pid": 5, "ip": HERE, "ports": ports})
        honest = node.answer

        def end_it(fields):
            process.ended_with_job("job 1 is CANCELLED")
            return honest(fields)

        node.answer = end_it
        with pytest.raises(LauncherFailed, match="CANCELLED"):
            await process.start(LAUNCH)
    assert "START" not in [name for name, _fields in node.sent]
    assert process.phase is Phase.DEAD


def process_on(node, started, directory="/nonexistent"):
    """A kernel whose launcher answers START at once."""
    log = logging.getLogger("test")
    process = KernelProcess("k", node, tunnel_prefix=f"{directory}/t", transport=TransportSelector(log), log=log)
    send = node.send

    def sending(name, **fields):
        sent = send(name, **fields)
        if name == "START":
            process.message("STARTED", {"generation": fields["generation"], **started})
        return sent

    node.send = sending
    return process


# -- the mode that is asked for -------------------------------------------------------------------------------

CURVE = {"supported_encryption": ["curve"]}


@pytest.mark.parametrize(
    ("asked", "admins", "metadata", "required", "mode", "why"),
    [
        (None, "auto", CURVE, False, "auto", ""),
        (None, "auto", {"supported_encryption": "Curve "}, False, "auto", ""),
        (None, "auto", {}, False, "ipc", "does not declare CurveZMQ"),
        (None, "auto", {"supported_encryption": ["other"]}, False, "ipc", "does not declare CurveZMQ"),
        (None, "tunnel", CURVE, False, "ipc", "SlurmService.connect is tunnel"),
        ("tunnel", "auto", CURVE, False, "ipc", "its kernelspec asks for tunnel"),
        ("auto", "tunnel", CURVE, False, "auto", ""),
        ("direct", "tunnel", CURVE, False, "direct", ""),
        (None, "auto", CURVE, True, "direct", ""),
    ],
)
def test_the_request_goes_over_the_admins_setting(asked, admins, metadata, required, mode, why):
    """``auto`` is left for the node to decide."""
    chosen, reason = choose_mode(asked, admins, metadata, curve_required=required, keeps_output=False)
    assert chosen == mode
    assert why in reason
    assert bool(why) == bool(reason)


@pytest.mark.parametrize(
    ("asked", "metadata", "required", "mode", "why"),
    [
        (None, CURVE, False, "ipc", "its output is kept on the node (SlurmService.kept_output)"),
        ("auto", CURVE, False, "ipc", "its output is kept on the node (SlurmService.kept_output)"),
        (None, {}, False, "ipc", "does not declare CurveZMQ"),
        ("tunnel", CURVE, False, "ipc", "its kernelspec asks for tunnel"),
        ("direct", CURVE, False, "direct", NOT_KEPT),
        (None, CURVE, True, "direct", NOT_KEPT),
    ],
)
def test_where_output_is_kept_only_an_explicit_request_makes_a_kernel_direct(asked, metadata, required, mode, why):
    """``connect = auto`` is the tunnel. The reason, which the model shows, marks a direct kernel."""
    chosen, reason = choose_mode(asked, "auto", metadata, curve_required=required, keeps_output=True)
    assert (chosen, why in reason) == (mode, True)


@pytest.mark.parametrize(("asked", "metadata"), [("direct", {}), ("tunnel", CURVE), (None, {})])
def test_what_cannot_be_is_refused(asked, metadata):
    """Direct without CurveZMQ, and a manager that requires it for a kernel that goes through the tunnel."""
    with pytest.raises(RequestError, match="CurveZMQ"):
        choose_mode(asked, "auto", metadata, curve_required=True, keeps_output=False)
