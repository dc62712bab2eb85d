"""One user's kernel breaks its own channels: the gateway serves every other user all the while."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from helpers.broken_channels import KINDS, breaking
from helpers.gateway_process import running_gateway, stop
from helpers.kernel_clients import JOB, READY, poll_async
from helpers.notebook_server import Frontend

# Seconds for an answer to another user, on two busy CPUs. A kernel that does not end when asked is killed after 5.
IN_TIME = 3.0


@pytest.fixture(scope="module")
def module_gateway(gateway_environment):
    """One gateway for the tests here."""
    with running_gateway(gateway_environment / "broken") as gateway:
        yield gateway


@pytest.fixture
def gateway(module_gateway, kernelspecs):
    """The gateway, with kernelspecs."""
    return module_gateway


@contextlib.asynccontextmanager
async def answered_in_time(server):
    """Another user's requests, one after the other: each must be answered within ``IN_TIME``."""
    is_over = False

    async def ask_again() -> None:
        while not is_over:
            for path in ("/api/kernels", "/api/sessions", "/api/kernelspecs", "/api/allocations"):
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
            async with answered_in_time(bob):
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
