"""Those who really use a gateway: a Jupyter server with ``--gateway-url``, nbclient, and what editors do."""

from __future__ import annotations

import asyncio
import functools
import shutil

import nbformat.v4 as nbf
import pytest
import websocket
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.gateway.managers import GatewayKernelManager
from nbclient import NotebookClient

from helpers.failing_starts import all_nodes_taken
from helpers.gateway_process import running_gateway, start, stop, write_project
from helpers.kernel_clients import JOB, READY, jupyter_files_in, poll_async
from helpers.notebook_server import Frontend, HTTPClientError, running_server
from helpers.private_slurm import jobs_of


@pytest.fixture(scope="module")
def module_gateway(cluster, jupyter_base):
    """One gateway for the tests here, which takes tokens in websockets' URLs."""
    with jupyter_files_in(jupyter_base):
        option = "--GatewayIdentityProvider.allow_token_in_url=True"
        with running_gateway(jupyter_base / "clients", option) as gateway:
            yield gateway


@pytest.fixture
def gateway(module_gateway, kernelspecs):
    """The gateway, with kernelspecs."""
    return module_gateway


@pytest.fixture(scope="module")
def module_server(module_gateway, jupyter_base):
    """A Jupyter server of alice's whose kernels are the gateway's; it gives up a request after three seconds."""
    directory = jupyter_base / "notebooks"
    directory.mkdir()
    environment = {
        "JUPYTER_GATEWAY_AUTH_TOKEN": module_gateway.tokens["alice"],
        "JUPYTER_GATEWAY_REQUEST_TIMEOUT": "3",
        "KERNEL_LAUNCH_TIMEOUT": "3",
    }
    option = f"--gateway-url={module_gateway.url}"
    options = [option, "--GatewayClient.request_timeout=3", "--GatewayClient.allowed_envs=JPY_SESSION_NAME"]
    with running_server(directory, *options, environment=environment) as server:
        yield server


@pytest.fixture
def server(module_server, gateway):
    """The server, whose gateway has kernelspecs."""
    return module_server


# -- a Jupyter server -----------------------------------------------------------------------------------


async def test_a_jupyter_servers_kernels_run_on_nodes(server, gateway, kernel_name):
    """Its users start, run, interrupt, restart and delete as if the kernels were its own."""
    kernel_id = await start(server, kernel_name)
    frontend = await Frontend.connect(server, kernel_id)
    _reply, jobid = await frontend.execute(JOB)
    (model,) = await gateway.of("alice").json("GET", "/api/kernels")
    assert model["slurm"]["jobid"] == jobid
    sleeping = await frontend.begin("import time; kept = 1; print('on', flush=True); time.sleep(300)", "on")
    await server.request("POST", f"/api/kernels/{kernel_id}/interrupt")
    assert (await frontend.result(sleeping))[0]["ename"] == "KeyboardInterrupt"
    await server.request("POST", f"/api/kernels/{kernel_id}/restart")
    assert (await frontend.execute("print('kept' in globals())"))[1] == "False"
    assert (await frontend.execute(JOB))[1] == jobid
    await stop(server, kernel_id)
    frontend.close()
    assert await gateway.of("alice").json("GET", "/api/kernels") == []


async def test_a_jupyter_server_shows_the_gateways_kernelspecs(server):
    """All that its user may start, with the project's."""
    listed = await server.json("GET", "/api/kernelspecs")
    assert set(listed["kernelspecs"]) == {"slurm", "slurm-direct", "physics.python"}


async def test_a_jupyter_server_has_sessions_with_the_gateways_kernels(server, gateway, cluster):
    """A notebook's session starts a kernel at the gateway, in a job with the notebook's name, and ends it."""
    body = {"path": "a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "physics.python"}}
    session = await server.json("POST", "/api/sessions", body)
    assert (await server.json("POST", "/api/sessions", body))["id"] == session["id"]
    assert await poll_async(lambda: any(line.endswith(" a.ipynb") for line in jobs_of(cluster)), timeout=READY)
    frontend = await Frontend.connect(server, session["kernel"]["id"])
    assert (await frontend.execute("print(6 * 7)"))[1] == "42"
    frontend.close()
    await server.request("DELETE", f"/api/sessions/{session['id']}")
    assert await gateway.of("alice").json("GET", "/api/kernels") == []


async def test_a_job_may_wait_longer_than_a_jupyter_server_does(server, cluster):
    """The server gives up a request after three seconds; the job waits for eight, and its first cell then runs."""
    began = asyncio.get_running_loop().time()
    with all_nodes_taken(cluster):
        kernel_id = await start(server)
        frontend = await Frontend.connect(server, kernel_id)
        early = await frontend.send("shell", "execute_request", {"code": JOB, "silent": False})
        model = await waiting_model(server)
        assert model["execution_state"] == "starting"
        # The queue is what is waited for here, and it has to be longer than the server's patience.
        await asyncio.sleep(8 - (asyncio.get_running_loop().time() - began))
        assert await server.status("GET", f"/api/kernels/{kernel_id}") == 200
    _reply, printed = await frontend.result(early)
    assert printed in [line.split()[0] for line in jobs_of(cluster)]
    frontend.close()
    await stop(server, kernel_id)


async def waiting_model(server):
    """The kernel's model once it names the job that waits."""
    for _ in range(200):
        models = await server.json("GET", "/api/kernels")
        if models and "Waiting for job" in models[0]["slurm"].get("waiting", ""):
            return models[0]
        await asyncio.sleep(0.1)
    raise AssertionError(f"nothing was said of the job that waits: {models}")


async def test_a_waiting_kernel_of_a_jupyter_servers_is_deleted(server, cluster):
    """And its job with it."""
    with all_nodes_taken(cluster) as blocker:
        kernel_id = await start(server)
        await stop(server, kernel_id)
        assert await poll_async(lambda: [line.split()[0] for line in jobs_of(cluster)] == [blocker], timeout=READY)


async def test_a_refusal_reaches_the_jupyter_server(server, gateway):
    """With the gateway's status; its words are in the server's log, since it tells its users no more."""
    write_project(gateway.log.parent / "projects", "tight", limits={"max_runtime": 5})
    assert await server.status("POST", "/api/kernels", {"name": "tight.python"}) == 403
    assert "max_runtime=5" in server.log.read_text()
    shutil.rmtree(gateway.log.parent / "projects" / "tight")


# -- nbclient -------------------------------------------------------------------------------------------


@pytest.fixture
def gateway_client(gateway, monkeypatch):
    """jupyter_server's client of this process, as alice's; forgotten afterwards."""
    GatewayClient.clear_instance()
    client = GatewayClient.instance()
    client.url, client.auth_token = gateway.url, gateway.tokens["alice"]
    client.init_connection_args()
    # jupyter_server's kernel client sends its token with each request, but not when it opens the websocket.
    header = [f"Authorization: token {client.auth_token}"]
    connect = functools.partial(websocket.create_connection, header=header)
    monkeypatch.setattr(websocket, "create_connection", connect)
    yield client
    GatewayClient.clear_instance()


class Manager(GatewayKernelManager):
    """jupyter_server's manager for nbclient, as jupyter_client now asks whether a kernel is alive."""

    _async_is_alive = GatewayKernelManager.is_alive


async def test_nbclient_runs_a_notebook_by_the_gateway(gateway, gateway_client, cluster):
    """Through jupyter_server's own gateway manager and client; nothing of a wait is in the notebook."""
    cells = [nbf.new_code_cell(code) for code in (JOB, "value = 6 * 7", "value", "1 / 0")]
    cells[-1].metadata["tags"] = ["raises-exception"]
    notebook = nbf.new_notebook(cells=cells)
    client = NotebookClient(
        notebook, kernel_name="slurm", kernel_manager_class=Manager, startup_timeout=READY, timeout=READY
    )
    alice, loop = gateway.of("alice"), asyncio.get_running_loop()
    with all_nodes_taken(cluster):
        running, began = asyncio.ensure_future(client.async_execute(kernel_name="slurm")), loop.time()
        await waiting_model(alice)
        # Longer than until a cell that is sent would show the wait.
        await asyncio.sleep(4 - (loop.time() - began))
    await running
    assert [len(cell.outputs) for cell in cells] == [1, 0, 1, 1]
    assert int(cells[0].outputs[0]["text"]) > 0
    assert cells[2].outputs[0]["data"]["text/plain"] == "42"
    assert cells[3].outputs[0]["ename"] == "ZeroDivisionError"
    assert await alice.json("GET", "/api/kernels") == []


# -- editors ----------------------------------------------------------------------------------------------


async def test_an_editor_that_sends_its_token_in_the_websockets_url(gateway):
    """As VS Code does it: REST with the header, a session, and a websocket that has no headers of its own."""
    alice = gateway.of("alice")
    listed = await alice.json("GET", "/api/kernelspecs")
    assert "slurm" in listed["kernelspecs"]
    path = "work/a-jvsc-2c5f6c40-7b3e-4f0e-8a7f-8d6ac6ae3b5e.ipynb"
    body = {"path": path, "name": "a.ipynb", "type": "notebook", "kernel": {"name": "slurm"}}
    session = await alice.json("POST", "/api/sessions", body)
    kernel_id = session["kernel"]["id"]
    frontend = await Frontend.connect(alice, kernel_id, token_in_url=True)
    assert (await frontend.execute("print(6 * 7)"))[1] == "42"
    assert [one["id"] for one in await alice.json("GET", "/api/sessions")] == [session["id"]]
    # REST never takes it there, and neither does a gateway that was not told to.
    assert await alice.status("GET", f"/api/kernels?token={alice.token}", token="") == 403
    await alice.request("POST", f"/api/kernels/{kernel_id}/restart")
    assert (await frontend.execute("print(6 * 7)"))[1] == "42"
    await alice.request("DELETE", f"/api/sessions/{session['id']}")
    frontend.close()
    assert alice.token.split("_", 2)[2] not in gateway.log.read_text()
    with pytest.raises(HTTPClientError) as raised:
        await Frontend.connect(gateway.anyone, kernel_id, token_in_url=True)
    assert raised.value.code == 403
