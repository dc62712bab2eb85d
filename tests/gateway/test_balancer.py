"""The files in ``etc/`` for two gateways at work: real balancers that send each request to either of them, over TLS."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gateway_slurm.gateway.peers.client import FORWARDED_BY
from gateway_slurm.testing.processes import free_port
from helpers.gateway_group import Deployment, deployment
from helpers.gateway_process import ask, start, stop, stop_all
from helpers.kernel_clients import JOB, PID, READY, jupyter_files_in, poll_async
from helpers.notebook_server import V1, Frontend, Server
from helpers.postgres import private_postgres
from helpers.proxies import ETC, Certificate, adapted, running_caddy, running_nginx

KERNEL = "physics.python"


@pytest.fixture(scope="module")
def base(cluster) -> Iterator[Path]:
    """A short directory in which Jupyter finds nothing of anybody's."""
    directory = Path(tempfile.mkdtemp(prefix="gsb-", dir="/tmp"))
    with jupyter_files_in(directory):
        yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def certificate(base: Path) -> Certificate:
    """For all: balancers and gateways."""
    return Certificate.make(base)


def options(certificate: Certificate) -> list[str]:
    """A gateway's, as docs/admins/gateway.md has them."""
    found = [f"--certfile={certificate.file}", f"--keyfile={certificate.key}"]
    return [*found, f"--SlurmGatewayApp.peer_cafile={certificate.file}"]


@contextmanager
def nginx(directory: Path, ports: list[str], certificate: Certificate) -> Iterator[int]:
    """nginx with etc/nginx/two_gateways.conf; its port."""
    port = free_port()
    changes = {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen [::]:443 ssl;": "",
        "/etc/ssl/certs/gateway.example.org.pem": str(certificate.file),
        "/etc/ssl/private/gateway.example.org.key": str(certificate.key),
        "/etc/ssl/certs/ca-certificates.crt": str(certificate.file),
        "proxy_ssl_name gateway.example.org": "proxy_ssl_name localhost",
        "/var/log/nginx/gateway_slurm.log": str(directory / "access.log"),
        "gw1.example.org:8888": f"127.0.0.1:{ports[0]}",
        "gw2.example.org:8888": f"127.0.0.1:{ports[1]}",
    }
    with running_nginx(directory, adapted(ETC / "nginx/two_gateways.conf", changes), port):
        yield port


@contextmanager
def caddy(directory: Path, ports: list[str], certificate: Certificate) -> Iterator[int]:
    """Caddy with etc/caddy/Caddyfile.two_gateways; its port."""
    port = free_port()
    changes = {
        "gateway.example.org {": f"https://localhost:{port}, https://127.0.0.1:{port} {{",
        "#cert# ": "",
        "/etc/ssl/certs/gateway.example.org.pem": str(certificate.file),
        "/etc/ssl/private/gateway.example.org.key": str(certificate.key),
        "/etc/ssl/certs/ca-certificates.crt": str(certificate.file),
        "tls_server_name gateway.example.org": "tls_server_name localhost",
        "https://gw1.example.org:8888": f"https://127.0.0.1:{ports[0]}",
        "https://gw2.example.org:8888": f"https://127.0.0.1:{ports[1]}",
    }
    with running_caddy(directory, adapted(ETC / "caddy/Caddyfile.two_gateways", changes), port):
        yield port


@pytest.mark.parametrize("balancer", [nginx, caddy])
@pytest.mark.slow
async def test_users_see_one_gateway(balancer, base, certificate, tmp_path):
    """Kernels, lists and websockets behind a balancer that is not sticky; then one of the two gateways is killed."""
    with private_postgres() as postgres, deployment(tmp_path / "own", postgres.new_database()) as own:
        for name in ("a", "b"):
            own.start(name, *options(certificate))
        await own.know_each_other()
        ports = [gateway.url.rpartition(":")[2] for gateway in own.gateways.values()]
        directory = Path(tempfile.mkdtemp(prefix="lb-", dir=base))
        with balancer(directory, ports, certificate) as port:
            url, ca = f"https://localhost:{port}", str(certificate.file)
            alice = replace(own.gateways["a"].of("alice"), url=url, ca=ca)
            bob = replace(own.gateways["b"].of("bob"), url=url, ca=ca)
            try:
                await use(alice, bob)
                await survive(own, alice)
            finally:
                await stop_all(alice)


async def use(alice: Server, bob: Server) -> None:
    """What a user does, each request at whichever gateway."""
    kernels = [await start(alice, KERNEL) for _ in range(2)]
    for kernel_id in kernels:
        frontends = [await Frontend.connect(alice, kernel_id, protocol) for protocol in (V1, "", V1, "")]
        await frontends[0].execute("x = 1")
        for frontend in frontends:
            assert (await frontend.execute("print(x)"))[1] == "1"
            frontend.close()
    for _ in range(4):
        assert sorted(one["id"] for one in await alice.json("GET", "/api/kernels")) == sorted(kernels)
        assert await bob.json("GET", "/api/kernels") == []
        assert await bob.status("GET", f"/api/kernels/{kernels[0]}") == 404
        # A client's own mark is taken away.
        marked = await alice.request("GET", f"/api/kernels/{kernels[0]}", headers={FORWARDED_BY: "x"})
        assert marked.code == 200
    job = await ask(alice, kernels[0], JOB)
    await alice.request("POST", f"/api/kernels/{kernels[0]}/restart")
    assert await ask(alice, kernels[0], JOB) == job
    body = {"path": "n.ipynb", "name": "n.ipynb", "kernel": {"name": KERNEL}}
    sessions = await asyncio.gather(*(alice.json("POST", "/api/sessions", body) for _ in range(4)))
    assert len({session["kernel"]["id"] for session in sessions}) == 1
    await stop(alice, *kernels, sessions[0]["kernel"]["id"])


async def survive(own: Deployment, alice: Server) -> None:
    """A gateway's death is the balancer's and the other gateway's to deal with, and no kernel's."""
    kernel_id = await start(alice, KERNEL)
    pid = await ask(alice, kernel_id, PID)
    servers = {own.server_of(gateway): gateway for gateway in own.gateways.values()}
    assert await poll_async(lambda: own.owner_of(kernel_id) != "", timeout=READY)
    servers[own.owner_of(kernel_id)].process.kill()
    statuses = []
    while not statuses or statuses[-1] != 200:
        statuses.append(await alice.status("GET", f"/api/kernels/{kernel_id}"))
        assert statuses[-1] in (200, 502, 503), statuses
        assert len(statuses) < 100
    assert await ask(alice, kernel_id, PID) == pid
