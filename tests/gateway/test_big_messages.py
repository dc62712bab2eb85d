"""Cells and outputs of many megabytes: what a server takes passes; what it does not take fails with the reason."""

from __future__ import annotations

import asyncio

import pytest

from helpers.gateway_process import running_gateway, start, stop
from helpers.kernel_clients import READY, jupyter_files_in
from helpers.notebook_server import V1, Frontend, running_server

MEGABYTE = 1_000_000
CELL = 12 * MEGABYTE  # more than tornado's own limit
SIZES = {"gateway": 64 * MEGABYTE, "own-server": 16 * MEGABYTE}
LIMIT = 80 * MEGABYTE
OPTION = f"--SlurmMappingKernelManager.max_request_size={LIMIT}"
OWN_SERVER = "--ServerApp.kernel_manager_class=gateway_slurm.SlurmMappingKernelManager"


@pytest.fixture(scope="module", params=["gateway", "own-server"])
def kind(request):
    """Of the server."""
    return request.param


@pytest.fixture(scope="module")
def protocol(kind):
    """Each of the websocket's two formats at one of the servers."""
    return V1 if kind == "own-server" else ""


@pytest.fixture(scope="module")
def module_server(kind, cluster, jupyter_base):
    """A gateway as alice reaches it, and a Jupyter server with our kernel manager."""
    directory = jupyter_base / f"big-{kind}"
    directory.mkdir()
    with jupyter_files_in(jupyter_base):
        if kind == "gateway":
            with running_gateway(directory, OPTION) as gateway:
                yield gateway.of("alice")
        else:
            with running_server(directory, OWN_SERVER, OPTION) as server:
                yield server


@pytest.fixture
def server(module_server, kernelspecs):
    """The same, with kernelspecs."""
    return module_server


async def passes_whole(frontend, size):
    """A cell of 12 MB, a larger request, which IPython does not tokenize for minutes, and such an output pass."""
    reply, printed = await asyncio.wait_for(frontend.execute(f"print(len('{'x' * CELL}'))"), 2 * READY)
    assert (reply["status"], printed) == ("ok", str(CELL))
    request = await frontend.send("shell", "comm_info_request", {"target_name": "x" * size})
    assert (await asyncio.wait_for(frontend.result(request), 2 * READY))[0] == {"status": "ok", "comms": {}}
    reply, printed = await asyncio.wait_for(frontend.execute(f"print('y' * {size})"), 2 * READY)
    assert (reply["status"], len(printed)) == ("ok", size)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_large_message_passes_and_a_larger_cell_fails_by_itself(server, protocol, kind):
    """The larger one has an error, a reply and its end, with what to do; the next cell runs, on the same websocket."""
    kernel_id = await start(server)
    frontend = await Frontend.connect(server, kernel_id, protocol)
    await passes_whole(frontend, SIZES[kind])
    cell = await frontend.run("z" * (LIMIT + MEGABYTE))
    found = []
    while not found or found[-1]["content"].get("execution_state") != "idle":
        message = await asyncio.wait_for(frontend.receive(), 2 * READY)
        if message["parent_header"].get("msg_id") == cell:
            found.append(message)
    assert [one["msg_type"] for one in found] == ["error", "execute_reply", "status"]
    assert "81 MB, and this server takes 80 MB" in found[0]["content"]["evalue"]
    assert (await asyncio.wait_for(frontend.execute("print('on')"), 2 * READY))[1] == "on"
    frontend.close()
    await stop(server, kernel_id)
