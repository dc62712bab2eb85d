"""All bytes between nodes and server, recorded: what an observer on the network can read."""

from __future__ import annotations

import base64
import secrets

import pytest
import zmq
import zmq.utils.monitor
import zmq.utils.z85

from gateway_slurm.testing.processes import free_port
from helpers.kernel_clients import KERNEL_NAMES, READY, execute, running_kernel
from helpers.recording_proxy import RecordingProxy

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
# The output is not in the code, and large, so that the record shows that it went this way.
CODE = "marked_variable = 'left'; print((marked_variable + 'right') * 20_000)"
OUTPUT = "leftright"
CURVE_KEY = 40  # characters of Z85
TOKEN = 32  # bytes


@pytest.fixture
def tokens(monkeypatch):
    """Every launch token that the service draws from here on."""
    drawn = []
    real = secrets.token_bytes

    def drawing(size):
        value = real(size)
        if size == TOKEN:
            drawn.append(value)
        return value

    monkeypatch.setattr(secrets, "token_bytes", drawing)
    return drawn


@pytest.fixture
def link_proxy(tokens, admin_settings):
    """A recording proxy that launchers dial instead of the response socket."""
    port = free_port()
    proxy = RecordingProxy(("127.0.0.1", port))
    admin_settings(response_address=f"127.0.0.1:{proxy.port}", response_port=str(port))
    yield proxy
    proxy.close()


def shapes(secret):
    """A secret as it may stand in a stream: raw, hexadecimal, base64, Z85."""
    raw = secret.encode() if isinstance(secret, str) else secret
    found = {raw, raw.hex().encode(), base64.b64encode(raw).rstrip(b"="), base64.urlsafe_b64encode(raw).rstrip(b"=")}
    if isinstance(secret, str) and len(raw) == CURVE_KEY:
        found.add(zmq.utils.z85.decode(raw))
    return found


def readable(seen, *secret_values):
    """Which of the secrets are in what was seen."""
    return [value for value in secret_values if value and any(shape in seen for shape in shapes(value))]


def test_what_is_looked_for_would_be_found():
    """The search finds a secret in each of its shapes, and does not find what is not there."""
    _public, curve = (key.decode() for key in zmq.curve_keypair())
    for secret in ("a session key", curve, b"\x00\xff token"):
        for shape in shapes(secret):
            assert readable(b"before" + shape + b"after", secret) == [secret]
        assert readable(b"something else", secret) == []


def test_the_link_shows_nothing(service, link_proxy, tokens, mode):
    """Neither code nor output, session key, Curve secret or token can be read from a launcher's link."""
    with running_kernel(KERNEL_NAMES[mode]) as (manager, client):
        assert execute(client, CODE) == OUTPUT.replace("leftright", "leftright" * 20_000)
        info = manager.get_connection_info()
        manager.restart_kernel()
        client.wait_for_ready(timeout=READY)
        key, curve = manager.session.key, info.get("curve_secretkey")
    if mode == "tunnel":
        assert len(link_proxy.up) > 20_000 * len(OUTPUT)
    assert len(link_proxy.up) > 500
    assert len(link_proxy.down) > 500
    assert tokens
    assert bool(curve) == (mode == "direct")
    secret_values = ["marked_variable", OUTPUT, "execute_request", "curve_secretkey", "signature_scheme"]
    assert readable(link_proxy.seen, *secret_values, key, curve, *tokens) == []


def test_a_direct_kernels_channels_show_nothing(service):
    """A client that reaches the kernel on its node through a recorded network leaves no readable byte there."""
    with running_kernel(KERNEL_NAMES["direct"]) as (manager, _client):
        info = manager.get_connection_info()
        proxies = {name: RecordingProxy((info["ip"], info[f"{name}_port"])) for name in CHANNELS}
        ports = {f"{name}_port": proxy.port for name, proxy in proxies.items()}
        client = manager.client(ip="127.0.0.1", **ports)
        client.start_channels()
        client.wait_for_ready(timeout=READY)
        assert execute(client, CODE).startswith(OUTPUT)
        client.stop_channels()
        for proxy in proxies.values():
            proxy.close()
    seen = b"".join(proxy.seen for proxy in proxies.values())
    assert len(proxies["iopub"].down) > 20_000 * len(OUTPUT)
    assert b"CURVE" in proxies["shell"].seen
    values = ["marked_variable", OUTPUT, "execute_request", manager.session.key, info["curve_secretkey"]]
    assert readable(seen, *values) == []


def test_a_direct_kernel_does_not_answer_a_client_without_its_keys(service):
    """A ZMQ peer that does not have the kernel's Curve key hears nothing, not even a heartbeat."""
    with running_kernel(KERNEL_NAMES["direct"]) as (manager, client):
        info = manager.get_connection_info()
        context = zmq.Context()
        stranger = context.socket(zmq.REQ)
        stranger.linger = 0
        events = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        stranger.connect(f"tcp://{info['ip']}:{info['hb_port']}")
        stranger.send(b"are you there?")
        assert events.poll(READY * 1000)
        event = zmq.utils.monitor.recv_monitor_message(events)["event"]
        assert event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        assert not stranger.poll(100)
        context.destroy(linger=0)
        assert execute(client, "print(6 * 7)") == "42"


def test_the_tunnels_sockets_are_the_users_alone(service):
    """The sockets that stand for a tunnelled kernel lie in a 0700 directory, on the server and on the node."""
    with running_kernel(KERNEL_NAMES["tunnel"]) as (manager, client):
        here = manager.get_connection_info()["ip"]
        there = execute(client, "import sys, os; print(os.path.dirname(sys.argv[sys.argv.index('-f') + 1]))")
        modes = "import os, sys; print([oct(os.stat(os.path.dirname(p)).st_mode & 0o777) for p in {!r}])"
        assert execute(client, modes.format([here, there + "/x"])) == "['0o700', '0o700']"
