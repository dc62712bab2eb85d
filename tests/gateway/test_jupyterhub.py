"""A real JupyterHub with etc/jupyterhub: the gateway as its service, and users' servers on a login node."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gateway_slurm.testing.processes import free_port
from helpers.gateway_process import ask, start, stop, write_project
from helpers.kernel_clients import JOB, READY, jupyter_environment, poll_async
from helpers.notebook_server import HTTPClientError, Server
from helpers.proxies import ETC, adapted, running

BIN = Path(sys.executable).parent
ADMIN = "the-tests-own-token-of-a-service"
KERNEL = "physics.python"

CONFIG = """
import os, sys
c = get_config()
load_subconfig({sample!r})
c.JupyterHub.services += [{{"name": "tests", "api_token": {admin!r}}}]
c.JupyterHub.load_roles += [
    {{"name": "tests", "services": ["tests"], "scopes": ["admin:users", "admin:servers", "tokens", "access:servers"]}}
]
c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{hub_port}"
c.JupyterHub.db_url = "sqlite:///:memory:"
c.JupyterHub.cookie_secret_file = {directory!r} + "/cookie_secret"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{proxy_port}"
c.ConfigurableHTTPProxy.pid_file = {directory!r} + "/proxy.pid"
c.ConfigurableHTTPProxy.command = [{bin!r} + "/configurable-http-proxy"]
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = {directory!r} + "/home-{{username}}"
c.Spawner.cmd = [sys.executable, "-m", "jupyterhub.singleuser"]
c.Spawner.args = ["--allow-root"]
c.Spawner.environment.update({environment!r})
c.Spawner.start_timeout = 120
"""


@dataclass
class Metrics:
    """Stands in for what a site counts kernel starts with: what came, and with whose token."""

    url: str
    came: list[tuple[str, dict[str, object]]]


@dataclass
class Hub:
    """A hub that runs, and where it is."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    metrics: Metrics

    def at(self, path: str, token: str) -> Server:
        """What is behind the hub's proxy at ``path``, for the holder of a token."""
        return Server(self.process, self.url + path, token, self.log)

    @property
    def api(self) -> Server:
        """The hub's own API, for its admin."""
        return self.at("/hub/api", ADMIN)

    async def user(self, name: str) -> str:
        """A user's token, as they make one in the hub's control panel; the user is made if there is none."""
        try:
            await self.api.request("POST", f"/users/{name}")
        except HTTPClientError as error:
            if error.code != 409:
                raise
        return str((await self.api.json("POST", f"/users/{name}/tokens", {"note": "tests"}))["token"])


@pytest.fixture(scope="module")
def metrics() -> Iterator[Metrics]:
    """An HTTP server that remembers."""
    came: list[tuple[str, dict[str, object]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            came.append((self.headers["Authorization"], body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Metrics(f"http://127.0.0.1:{server.server_port}/kernels", came)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def hub(cluster, metrics) -> Iterator[Hub]:
    """One hub for the tests here, with its proxy and the gateway that it starts."""
    directory = Path(tempfile.mkdtemp(prefix="gsh-", dir="/tmp"))
    home = jupyter_environment(directory)
    write_project(directory / "projects")
    config = Path(home["JUPYTER_CONFIG_DIR"])
    (config / "jupyter_slurm_gateway_config.py").write_text(
        f"c = get_config()\nc.GatewayKernelSpecManager.projects_root = {str(directory / 'projects')!r}\n"
        "c.SlurmGatewayApp.allow_root = True\n"
    )
    shutil.copy(ETC / "jupyterhub/jupyter_server_config.py", config)
    port, gateway_port = free_port(), free_port()
    environment = {**home, **cluster.environment(), "PATH": f"{BIN}:{os.environ['PATH']}"}
    changes = {
        '"/opt/gateway_slurm/bin/jupyter"': repr(str(BIN / "jupyter")),
        "8889": str(gateway_port),
        '"/var/lib/gateway_slurm",\n        # A hub': f"{str(directory)!r},\n        # A hub",
        '{"HOME": "/var/lib/gateway_slurm", "MALLOC_MMAP_THRESHOLD_": "262144"}': repr(environment),
        "https://hub.example.org/services/metrics/kernels": metrics.url,
    }
    (directory / "sample.py").write_text(adapted(ETC / "jupyterhub/jupyterhub_config.py", changes))
    text = CONFIG.format(
        sample=str(directory / "sample.py"),
        admin=ADMIN,
        port=port,
        hub_port=free_port(),
        proxy_port=free_port(),
        directory=str(directory),
        bin=str(BIN),
        environment=environment,
    )
    (directory / "jupyterhub_config.py").write_text(text)
    log = directory / "hub.log"
    argv = [sys.executable, "-m", "jupyterhub", "--config", str(directory / "jupyterhub_config.py")]

    def is_up() -> bool:
        return all(answers(port, path) for path in ("/hub/api/", "/services/gateway/health/live"))

    with running(argv, log, is_up, environment, directory=directory) as process:
        yield Hub(process, f"http://127.0.0.1:{port}", log, metrics)
    assert not (directory / "proxy.pid").exists(), "the hub left its proxy running"
    shutil.rmtree(directory)


def answers(port: int, path: str) -> bool:
    """Whether the hub's proxy brings a good answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READY)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


async def test_the_hubs_users_have_kernels_at_the_gateway_and_see_their_own_only(hub):
    """A user's token starts a kernel behind the hub's proxy; another user's neither sees nor reaches it."""
    ada = hub.at("/services/gateway", await hub.user("ada"))
    ben = hub.at("/services/gateway", await hub.user("ben"))
    assert (await ada.json("GET", "/api/me"))["identity"]["username"] == "ada"
    kernel_id = await start(ada, KERNEL)
    try:
        assert (await ask(ada, kernel_id, JOB)).isdigit()
        assert await ben.json("GET", "/api/kernels") == []
        assert await ben.status("GET", f"/api/kernels/{kernel_id}") == 404
        assert await ben.status("DELETE", f"/api/kernels/{kernel_id}") == 404
    finally:
        await stop(ada, kernel_id)


async def test_a_token_without_the_services_scope_is_refused(hub):
    """A token that its user made for something else does not get in here, nor does a service's."""
    await hub.user("ada")
    narrow = await hub.api.json("POST", "/users/ada/tokens", {"scopes": ["read:users:name!user=ada"]})
    for token in (narrow["token"], ADMIN, "nonsense"):
        assert await hub.at("/services/gateway", token).status("GET", "/api/kernels") == 403


async def test_a_server_on_a_login_node_runs_kernels_and_reports_them(hub):
    """A user's server, by the hub, has kernels in jobs, and the report of a start carries that server's token."""
    token = await hub.user("ada")
    await hub.api.request("POST", "/users/ada/server")
    server = hub.at("/user/ada", token)
    try:
        await until_ready(hub, "ada")
        shutil.copytree(hub.log.parent / "projects/physics/python", hub.log.parent / "path/kernels/mine")
        kernel_id = await start(server, "mine")
        jobid = await ask(server, kernel_id, JOB)
        assert (await server.json("GET", f"/api/kernels/{kernel_id}"))["slurm"]["jobid"] == jobid
        assert await poll_async(lambda: hub.metrics.came != [], timeout=READY)
        authorization, report = hub.metrics.came[0]
        assert (report["kernel_id"], report["slurm_allocation_id"]) == (kernel_id, jobid)
        reporter = hub.at("/hub/api", authorization.removeprefix("token "))
        assert (await reporter.json("GET", "/user"))["name"] == "ada"
        # That token gets the server in at the gateway, too, as its user.
        gateway = hub.at("/services/gateway", authorization.removeprefix("token "))
        assert (await gateway.json("GET", "/api/me"))["identity"]["username"] == "ada"
        await stop(server, kernel_id)
    finally:
        await hub.api.request("DELETE", "/users/ada/server")


async def until_ready(hub: Hub, user: str) -> None:
    """Until the user's server is up."""
    for _ in range(600):
        servers = (await hub.api.json("GET", f"/users/{user}"))["servers"]
        if servers.get("", {}).get("ready"):
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"the server of {user} did not come up:\n{hub.log.read_text()[-3000:]}")
