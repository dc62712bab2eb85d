"""The files in ``etc/``: TLS and who one is by real proxies, the unit, a client's configuration."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from gateway_slurm.service import STANDSTILL_SECONDS
from gateway_slurm.store import LEASE_SECONDS
from gateway_slurm.testing import PrivateCluster
from helpers.gateway_process import Gateway, ask, start, stop
from helpers.kernel_clients import JOB, READY, jupyter_environment, jupyter_files_in
from helpers.notebook_server import running_server
from helpers.private_slurm import poll, slurm
from helpers.proxies import ETC, PASSWORD, PROXIES, Certificate, Proxy, adapted, gateway_on_socket, nginx

UNIT = ETC / "systemd/gateway_slurm.service"
DROP_IN = ETC / "systemd/gateway_slurm.service.d/run-as-user.conf"
KERNEL = "physics.python"


# -- reverse proxies --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(cluster) -> Iterator[Path]:
    """A short directory, for the socket's path, in which Jupyter finds nothing of anybody's."""
    directory = Path(tempfile.mkdtemp(prefix="gsd-", dir="/tmp"))
    with jupyter_files_in(directory):
        yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def gateway(base: Path) -> Iterator[Gateway]:
    """One gateway on a Unix socket, which knows tokens and believes the proxy."""
    options = ["--GatewayIdentityProvider.trusted_header=X-Remote-User"]
    options += ["--GatewayIdentityProvider.trusted_proxies=unix", "--GatewayIdentityProvider.allow_token_in_url=True"]
    with gateway_on_socket(base, *options) as running:
        yield running


@pytest.fixture(scope="module")
def certificate(base: Path) -> Certificate:
    """For all proxies here."""
    return Certificate.make(base)


def proxy_of(
    name: str, base: Path, gateway: Gateway, certificate: Certificate, *, knows_users: bool
) -> Iterator[Proxy]:
    """A proxy before the gateway, with files of its own."""
    directory = Path(tempfile.mkdtemp(prefix=name, dir=base))
    with PROXIES[name](directory, gateway, certificate, knows_users=knows_users) as proxy:
        yield proxy


@pytest.fixture(scope="module", params=PROXIES)
def proxy(request, base, gateway, certificate) -> Iterator[Proxy]:
    """Each proxy with its file as it is: users have tokens."""
    yield from proxy_of(request.param, base, gateway, certificate, knows_users=False)


@pytest.fixture(scope="module", params=PROXIES)
def proxy_with_users(request, base, gateway, certificate) -> Iterator[Proxy]:
    """Each proxy with the lines for a proxy that asks for passwords."""
    yield from proxy_of(request.param, base, gateway, certificate, knows_users=True)


def token(proxy: Proxy, user: str) -> dict[str, str]:
    """The header with a user's token."""
    return {"Authorization": f"token {proxy.gateway.tokens[user]}"}


def password(user: str, word: str = PASSWORD) -> dict[str, str]:
    """The header with a user's password."""
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{word}".encode()).decode()}


def who(answer: tuple[int, str]) -> str:
    """Whom ``/api/me`` names."""
    status, body = answer
    assert status == 200, body
    return str(json.loads(body)["identity"]["username"])


async def test_a_kernel_is_used_through_tls(proxy):
    """REST and the websocket go through the proxy: a kernel starts, computes, restarts and ends."""
    alice = proxy.of("alice")
    kernel_id = await start(alice, KERNEL)
    try:
        jobid = await ask(alice, kernel_id, JOB)
        assert jobid.isdigit()
        await alice.request("POST", f"/api/kernels/{kernel_id}/restart")
        assert await ask(alice, kernel_id, JOB) == jobid
    finally:
        await stop(alice, kernel_id)


def test_what_a_client_says_of_itself_does_not_count(proxy):
    """A client's own user header is removed: a client without a login gets no user, and alice does not become carol."""
    for headers in ({}, {"X-Remote-User": "carol"}, {"X_Remote_User": "carol"}, password("carol", "guessed")):
        assert proxy.ask("/api/me", headers)[0] == 403
    assert who(proxy.ask("/api/me", {"X-Remote-User": "carol", **token(proxy, "alice")})) == "alice"


def test_the_word_of_a_proxy_that_knows_its_users_counts(proxy_with_users):
    """The password determines the user, whatever header a client sends; a wrong one gives no access."""
    assert who(proxy_with_users.ask("/api/me", password("alice"))) == "alice"
    assert who(proxy_with_users.ask("/api/me", {"X-Remote-User": "carol", **password("alice")})) == "alice"
    for headers in ({}, password("alice", "guessed"), {"X-Remote-User": "carol"}, token(proxy_with_users, "alice")):
        assert proxy_with_users.ask("/api/me", headers)[0] == 401


def check_health_and_metrics(proxy: Proxy) -> None:
    """Load balancers need no user; metrics need an admin or a named user, and an address that is allowed."""
    for path in ("/health/live", "/health/ready"):
        assert proxy.ask(path, {"X-Remote-User": "carol"})[0] == 200
    assert proxy.ask("/metrics")[0] == 403
    assert proxy.ask("/metrics", {"X-Remote-User": "carol"})[0] == 403
    assert proxy.ask("/metrics", token(proxy, "alice"))[0] == 403
    assert "gateway_slurm_kernels" in proxy.ask("/metrics", token(proxy, "carol"))[1]
    assert proxy.ask("/metrics", token(proxy, "carol"), source="127.0.0.2")[0] == 403


def test_health_is_for_all_clients_and_metrics_for_this_machine(proxy):
    """Where users have tokens."""
    check_health_and_metrics(proxy)


def test_health_and_metrics_need_no_password(proxy_with_users):
    """Where the proxy asks for passwords it does not for these, and its own word is not given for them."""
    check_health_and_metrics(proxy_with_users)


def test_a_body_that_is_too_large_is_refused(proxy):
    """The proxy takes sixteen megabytes and no more."""
    body = b'{"name": "' + b"x" * (17 << 20) + b'"}'
    try:
        status = proxy.ask("/api/kernels", token(proxy, "alice"), method="POST", body=body)[0]
    except OSError:
        return  # it hung up before the whole answer was sent
    assert status in (400, 413)


async def test_no_token_of_a_url_is_in_a_log(proxy):
    """A websocket's token in its URL gets its user in, and is written down nowhere."""
    secret = proxy.gateway.tokens["alice"]
    nowhere = "/api/kernels/00000000-0000-0000-0000-000000000000/channels"
    url = proxy.url.replace("https", "wss") + f"{nowhere}?token={secret}"
    request = HTTPRequest(url, ca_certs=str(proxy.certificate.file), request_timeout=READY)
    with pytest.raises(HTTPClientError) as caught:
        await websocket_connect(request)
    assert caught.value.code == 404  # a stranger's is 403
    for log in (proxy.access_log, proxy.gateway.log):
        assert secret not in log.read_text()


# -- a client ------------------------------------------------------------------------------------------------


async def test_a_jupyter_server_with_the_clients_configuration_uses_the_gateway(
    base, gateway, certificate, tmp_path, monkeypatch
):
    """It reads the token's file and starts a kernel at the gateway, through a proxy with a certificate of its own."""
    for name, value in jupyter_environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    home, directory = Path(os.environ["HOME"]), base / "nginx-client"
    secret = home / ".config/gateway_slurm/token"
    secret.parent.mkdir(parents=True)
    secret.write_text(gateway.tokens["alice"] + "\n")
    secret.chmod(0o600)
    directory.mkdir()
    with nginx(directory, gateway, certificate, knows_users=False) as proxy:
        text = adapted(ETC / "client/jupyter_server_config.py", {"https://gateway.example.org": proxy.url})
        (Path(os.environ["JUPYTER_CONFIG_DIR"]) / "jupyter_server_config.py").write_text(text)
        with running_server(tmp_path) as server:
            specs = await server.json("GET", "/api/kernelspecs")
            assert KERNEL in specs["kernelspecs"]
            kernel_id = await start(server, KERNEL)
            try:
                assert [one["id"] for one in await gateway_kernels(proxy)] == [kernel_id]
                assert (await ask(server, kernel_id, JOB)).isdigit()
            finally:
                await stop(server, kernel_id)
    assert gateway.tokens["alice"] not in server.log.read_text()


async def gateway_kernels(proxy: Proxy) -> list[dict[str, str]]:
    """Alice's kernels, as the gateway has them."""
    kernels: list[dict[str, str]] = await proxy.of("alice").json("GET", "/api/kernels")
    return kernels


def test_a_token_that_others_can_read_is_refused(tmp_path):
    """The client's configuration says what to do about it."""
    secret = tmp_path / ".config/gateway_slurm/token"
    secret.parent.mkdir(parents=True)
    secret.write_text("known to all")
    secret.chmod(0o644)
    shutil.copy(ETC / "client/jupyter_server_config.py", tmp_path)
    environment = {**os.environ, "HOME": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path)}
    environment.pop("JUPYTER_GATEWAY_AUTH_TOKEN", None)
    argv = [sys.executable, "-m", "jupyter_server", "--allow-root", "--show-config"]
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=READY)
    assert "other users can read" in result.stderr
    assert "known to all" not in result.stderr + result.stdout


# -- systemd ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["alone", "run-as-user", "sockets"])
def unit(request, tmp_path) -> Path:
    """The unit with a program that is there; with the drop-in for sudo, and with that for sockets, too."""
    path = tmp_path / "gateway_slurm.service"
    path.write_text(adapted(UNIT, {"/opt/gateway_slurm/bin/jupyter ": f"{Path(sys.executable).parent}/jupyter "}))
    if request.param != "alone":
        directory = tmp_path / "gateway_slurm.service.d"
        directory.mkdir()
        shutil.copy(DROP_IN.parent / f"{request.param}.conf", directory)
    for socket_unit in UNIT.parent.glob("*.socket"):
        shutil.copy(socket_unit, tmp_path)
    return path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze."""
    argv = ["systemd-analyze", "--no-pager", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=READY)


def test_systemd_takes_the_unit(unit):
    """Every setting of the unit is known and has a value that is valid."""
    sockets = map(str, unit.parent.glob("*.socket"))
    result = analyze("verify", "--recursive-errors=no", "--man=no", str(unit), *sockets)
    complaints = [line for line in result.stderr.splitlines() if "gateway_slurm" in line]
    assert (result.returncode, complaints) == (0, [])


def test_the_unit_leaves_the_gateway_little(tmp_path):
    """systemd's own measure of exposure, 0 to 10, is low for the unit as it is."""
    path = tmp_path / UNIT.name
    shutil.copy(UNIT, path)
    result = analyze("security", "--offline=yes", "--threshold=35", str(path))
    assert result.returncode == 0, result.stdout[-300:]


def settings(path: Path) -> dict[str, str]:
    """A unit's settings; of several of one name the last."""
    return dict(re.findall(r"(?m)^(\w+)=(.*)$", path.read_text()))


def test_systemd_is_notified_when_the_gateway_is_ready_lives_and_stops(gateway_environment, monkeypatch):
    """The unit waits for the first, kills the gateway without the second, and does not wait for it after the third."""
    unit = settings(UNIT)
    assert (unit["Type"], unit["WatchdogSignal"]) == ("notify", "SIGABRT")
    assert int(unit["WatchdogSec"]) > STANDSTILL_SECONDS + LEASE_SECONDS  # another gateway takes over before
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(gateway_environment / "notify"))
        systemd.settimeout(READY)
        monkeypatch.setenv("NOTIFY_SOCKET", str(gateway_environment / "notify"))
        (gateway_environment / "notified").mkdir()
        with gateway_on_socket(gateway_environment / "notified"):
            states = [systemd.recv(100)]
            while not {b"READY=1", b"WATCHDOG=1"} <= set(states) or states[-1] != b"WATCHDOG=1":
                states.append(systemd.recv(100))
        while (state := systemd.recv(100)) == b"WATCHDOG=1":
            pass
        assert state == b"STOPPING=1"


# What implies NoNewPrivileges for a unit with a user (systemd.exec(5)).
IMPLYING = {
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "PrivateDevices",
    "ProtectClock",
    "ProtectHostname",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "RestrictAddressFamilies",
    "RestrictFileSystems",
    "RestrictNamespaces",
    "RestrictRealtime",
    "RestrictSUIDSGID",
    "SystemCallArchitectures",
    "SystemCallFilter",
    "SystemCallLog",
}


def test_sudo_works_with_the_drop_in():
    """Whatever the unit sets that would imply NoNewPrivileges, the drop-in takes back."""
    given, taken_back = settings(UNIT), settings(DROP_IN)
    assert {name for name in IMPLYING & given.keys() if taken_back.get(name) not in ("", "no")} == set()
    assert taken_back["NoNewPrivileges"] == "no"
    assert "CAP_SETUID" in taken_back["CapabilityBoundingSet"]


def test_a_restart_leaves_job_steps_alone():
    """Only the gateway's own process is killed: one of its sruns holds a user's job step."""
    assert settings(UNIT)["KillMode"] == "process"


# -- Slurm -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> Iterator[PrivateCluster]:
    """A cluster with the lines of etc/slurm, and the QOS of its README."""
    text = (ETC / "slurm/interactive.conf").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    (commands,) = re.findall(r"(?s)```sh\n(.*?)```", (ETC / "slurm/README.md").read_text())
    with (
        tempfile.TemporaryDirectory(prefix="gst-", dir="/tmp") as directory,
        PrivateCluster(Path(directory) / "s", nodes=2, accounting=True, extra_conf=lines) as private,
    ):
        slurm("sh", "-ec", commands, cluster=private)
        yield private


def submit(cluster: PrivateCluster, *options: str) -> subprocess.CompletedProcess[str]:
    """Submit a job that would run for five minutes."""
    return slurm("sbatch", "--parsable", *options, "--wrap=sleep 300", cluster=cluster, check=False)


def state_of(cluster: PrivateCluster, jobid: str) -> str:
    """The job's state in Slurm's words."""
    return slurm("squeue", "--noheader", "--format=%T", f"--jobs={jobid}", cluster=cluster).stdout.strip()


@pytest.mark.slow
def test_slurm_has_the_lines_as_they_are_meant(site):
    """What the snippet sets is what the controller says that it has."""
    config = slurm("scontrol", "show", "config", cluster=site).stdout
    for name, value in {
        "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=2,bf_interval=10",
        "PreemptType": "preempt/partition_prio",
        "AccountingStorageEnforce": "associations,limits,qos",
    }.items():
        assert re.search(rf"(?m)^{name} += {re.escape(value)}$", config), config


@pytest.mark.slow
def test_an_interactive_job_need_not_wait_for_batch_jobs(site):
    """It takes the nodes of one that can be put back, and none can take its own."""
    batch = submit(site, "--nodes=2", "--exclusive", "--requeue").stdout.strip()
    assert poll(lambda: state_of(site, batch) == "RUNNING", timeout=READY)
    kernel = submit(site, "--partition=interactive", "--nodes=2", "--exclusive").stdout.strip()
    assert poll(lambda: state_of(site, kernel) == "RUNNING", timeout=READY)
    assert state_of(site, batch) == "PENDING"
    later = submit(site, "--nodes=1").stdout.strip()
    assert poll(lambda: state_of(site, later) == "PENDING", timeout=READY)
    assert state_of(site, kernel) == "RUNNING"
    slurm("scancel", batch, kernel, later, cluster=site)


@pytest.mark.slow
def test_what_is_over_a_limit_is_refused_at_once(site):
    """The partition's and the QOS's limits: Slurm says so instead of letting the job wait."""
    allowed = submit(site, "--qos=kernels", "--gres=gpu:2")
    assert allowed.returncode == 0, allowed.stderr
    for options in (["--gres=gpu:2", "--nodes=2"], ["--time=09:00:00"]):
        refused = submit(site, "--qos=kernels", *options)
        assert refused.returncode != 0, refused.stdout
        assert "QOS" in refused.stderr
    slurm("scancel", allowed.stdout.strip(), cluster=site)
