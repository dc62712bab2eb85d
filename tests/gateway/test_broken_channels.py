"""One user's kernel breaks its own channels: the gateway serves every other user all the while."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from helpers.broken_channels import KINDS, breaking
from helpers.gateway_process import running_gateway, start, stop
from helpers.kernel_clients import JOB, READY, poll_async
from helpers.notebook_server import V1, Frontend, running_server

# Seconds for an answer to another user, on two busy CPUs. A kernel that does not end when asked is killed after 5.
IN_TIME = 3.0
LISTS = ("/api/kernels", "/api/sessions", "/api/kernelspecs")
# The kernel signs with another key, as a process does that has taken its port.
FORGING = """
session = get_ipython().kernel.session
key, session.key = session.key, b"another key"
print("forged", flush=True)
session.key = key
print("own", flush=True)
"""
MAX_MESSAGE, MAX_REQUEST = 1_000_000, 1 << 20  # bytes


@pytest.fixture(scope="module")
def module_gateway(gateway_environment):
    """One gateway for the tests here."""
    limits = [f"--SlurmMappingKernelManager.max_message_size={MAX_MESSAGE}"]
    limits += [f"--SlurmMappingKernelManager.max_request_size={MAX_REQUEST}"]
    with running_gateway(gateway_environment / "broken", *limits) as gateway:
        yield gateway


@pytest.fixture
def gateway(module_gateway, kernelspecs):
    """The gateway, with kernelspecs."""
    return module_gateway


@contextlib.asynccontextmanager
async def answered_in_time(server, *paths):
    """Another user's requests, one after the other: each must be answered within ``IN_TIME``."""
    is_over = False

    async def ask_again() -> None:
        while not is_over:
            for path in paths:
                assert await asyncio.wait_for(server.status("GET", path), IN_TIME) == 200, path
            await asyncio.sleep(0.05)

    asking = asyncio.ensure_future(ask_again())
    try:
        yield
    finally:
        is_over = True
        await asking


@pytest.mark.slow
async def test_a_kernel_with_broken_channels_is_restarted_and_ended(gateway, kernel_name, tmp_path):
    """However it broke them, every verb is answered, and other users' requests in time; its job ends with it."""
    alice, bob = gateway.of("alice"), gateway.of("bob")
    session = await alice.json("POST", "/api/sessions", {"path": "b.ipynb", "kernel": {"name": kernel_name}})
    kernel_id = session["kernel"]["id"]
    kernel, sessions = f"/api/kernels/{kernel_id}", f"/api/sessions/{session['id']}"
    try:
        frontend = await Frontend.connect(alice, kernel_id)
        _reply, jobid = await frontend.execute(JOB)
        for kind in KINDS:
            done = tmp_path / kind
            await frontend.run(breaking(kind, done, "control", "shell", "stdin", "iopub", "hb"))
            assert await poll_async(done.exists, timeout=READY), kind
            async with answered_in_time(bob, *LISTS, "/api/allocations"):
                for path in (kernel, sessions, "/api/kernels", "/api/sessions"):
                    assert await asyncio.wait_for(alice.status("GET", path), IN_TIME) == 200, (kind, path)
                assert await alice.status("POST", f"{kernel}/interrupt") == 204, kind
                if kind != KINDS[-1]:
                    assert await alice.status("POST", f"{kernel}/restart") == 200, kind
                    await frontend.until_ready()
                    assert (await frontend.execute(JOB))[1] == jobid, kind
                else:
                    assert await alice.status("DELETE", sessions) == 204
        await frontend.until_closed()
        assert await alice.status("GET", kernel) == 404
        assert "Traceback" not in gateway.log.read_text()
    finally:
        await stop(alice, kernel_id)


async def test_a_cell_with_a_large_output_gets_all_of_it(gateway):
    """The limit of one part is for ZMQ's connections; what the kernel publishes comes by its journal."""
    alice = gateway.of("alice")
    kernel_id = await start(alice)
    try:
        frontend = await Frontend.connect(alice, kernel_id)
        await frontend.execute(JOB)
        size = 2 * MAX_MESSAGE
        code = f"print('before'); display({{'text/html': 'x' * {size}}}, raw=True); print('after')"
        cell = await frontend.run(code)
        found = []
        while {"execution_state": "idle"} not in [message["content"] for message in found]:
            found.append(await asyncio.wait_for(frontend.receive(), READY))
        assert all(message["parent_header"].get("msg_id") == cell for message in found)
        shown = [message["content"] for message in found if message["msg_type"] in ("stream", "display_data")]
        texts = [content.get("text") or content["data"]["text/html"] for content in shown]
        assert texts == ["before\n", "x" * size, "after\n"]
        frontend.close()
    finally:
        await stop(alice, kernel_id)


async def test_what_is_not_signed_with_the_kernels_key_is_not_shown(gateway, kernel_name):
    """The page says so instead, and the cell goes on."""
    alice = gateway.of("alice")
    kernel_id = await start(alice, kernel_name)
    try:
        frontend = await Frontend.connect(alice, kernel_id)
        await frontend.execute(JOB)
        reply, printed = await frontend.execute(FORGING)
        assert reply["status"] == "ok"
        assert "not signed with the kernel's key" in printed
        assert "forged" not in printed
        assert "own" in printed
        frontend.close()
    finally:
        await stop(alice, kernel_id)


@pytest.mark.parametrize("protocol", ["", V1])
async def test_a_cell_that_is_too_large_fails_and_its_websocket_stays(gateway, protocol):
    """The error under the cell names the limit, and the cell ends; the next one runs by the same websocket."""
    alice = gateway.of("alice")
    kernel_id = await start(alice)
    try:
        frontend = await Frontend.connect(alice, kernel_id, protocol)
        await frontend.execute(JOB)
        cell = await frontend.run(f"print('{'x' * 2 * MAX_REQUEST}')")
        reply, printed = await asyncio.wait_for(frontend.result(cell), READY)
        assert (reply["status"], printed) == ("error", "")
        assert "max_request_size" in reply["evalue"]
        assert (await frontend.execute("print(1 + 1)"))[1] == "2"
        frontend.close()
    finally:
        await stop(alice, kernel_id)


@pytest.mark.slow
async def test_a_plain_jupyter_server_ends_a_kernel_with_a_broken_control_channel(cluster, kernelspecs, tmp_path):
    """Without our kernel manager, too: the provisioner gives its manager a new control socket for each request."""
    with running_server(kernelspecs.parent / "home") as server:
        kernel_id = await start(server)
        frontend = await Frontend.connect(server, kernel_id)
        await frontend.until_ready()
        for kind in ("malformed", "huge"):
            done = tmp_path / kind
            await frontend.run(breaking(kind, done, "control"))
            assert await poll_async(done.exists, timeout=READY), kind
        async with answered_in_time(server, *LISTS):
            assert await server.status("DELETE", f"/api/kernels/{kernel_id}") == 204
        frontend.close()
