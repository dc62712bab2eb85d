"""Kernels that die at a gateway: what their frontends get, and which state their model has."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from helpers.gateway_process import running_gateway, start, stop
from helpers.kernel_clients import PID, READY
from helpers.notebook_server import Frontend
from helpers.private_slurm import slurm


@pytest.fixture(scope="module")
def module_gateway(gateway_environment):
    """One gateway for the tests here."""
    with running_gateway(gateway_environment / "gateway") as gateway:
        yield gateway


@pytest.fixture
def alice(module_gateway, kernelspecs):
    """The gateway as one user has it."""
    return module_gateway.of("alice")


class Inbox:
    """What a frontend has got, in order, up to a moment."""

    def __init__(self, frontend):
        self.frontend, self.seen = frontend, []

    async def until(self, is_there):
        """Read until ``is_there(self)``."""
        while not is_there(self):
            self.seen.append(await asyncio.wait_for(self.frontend.receive(), READY))
        return self

    def reply(self, msg_id):
        """The reply to a request: its type and its content; None before it has come."""
        found = [m for m in self.seen if m["channel"] != "iopub" and m["parent_header"].get("msg_id") == msg_id]
        assert len(found) < 2
        return (found[0]["msg_type"], found[0]["content"]) if found else None

    def is_idle(self, msg_id):
        """Whether the request's last status has come."""
        return any(
            message["content"].get("execution_state") == "idle" and message["parent_header"].get("msg_id") == msg_id
            for message in self.seen
        )

    @property
    def states(self):
        """The states of the kernel itself, which belong to no request."""
        statuses = [message for message in self.seen if message["msg_type"] == "status"]
        return [status["content"]["execution_state"] for status in statuses if not status["parent_header"]]


async def state_of(alice, kernel_id):
    """The state in the kernel's model."""
    return (await alice.json("GET", f"/api/kernels/{kernel_id}"))["execution_state"]


BLOCK = "import time, os; print('begun', os.getpid(), flush=True); time.sleep(300)"
INSPECT = {"code": "print", "cursor_pos": 5, "detail_level": 0}
COMPLETE = {"code": "pri", "cursor_pos": 3}
COMM = {"comm_id": "c1", "data": {}}


async def test_every_request_of_a_kernel_that_died_is_answered(alice, tmp_path):
    """Also queued ones, of a frontend that is away, and on control; none of them reaches the next process."""
    kernel_id = await start(alice, "slurm")
    away = await Frontend.connect(alice, kernel_id)
    here = await Frontend.connect(alice, kernel_id)
    _reply, pid = await here.execute(PID)
    cell = await here.begin(BLOCK, "begun")
    ran = tmp_path / "ran"
    queued = [await here.run(f"open({str(ran)!r}, 'w')") for _ in range(2)]
    asked = {
        await here.send("shell", f"{kind}_request", content): f"{kind}_reply"
        for kind, content in (("inspect", INSPECT), ("complete", COMPLETE), ("history", {"hist_access_type": "tail"}))
    }
    comm = await here.send("shell", "comm_msg", COMM)
    info = await here.send("shell", "kernel_info_request", {})
    from_away = await away.run("print('never')")
    subshell = await here.send("control", "create_subshell_request", {})
    inbox = await Inbox(here).until(lambda inbox: inbox.reply(subshell) and inbox.is_idle(subshell))
    assert await state_of(alice, kernel_id) == "busy"  # the subshell's "idle" is not the cell's
    away.close()
    await asyncio.sleep(0)
    os.kill(int(pid), signal.SIGKILL)
    await inbox.until(lambda inbox: "restarting" in inbox.states)
    for msg_id in (cell, *queued):
        kind, content = inbox.reply(msg_id)
        assert (kind, content["status"], content["ename"]) == ("execute_reply", "error", "KernelRestarted")
        assert "SIGKILL" in content["evalue"]
        assert inbox.is_idle(msg_id)
    for msg_id, kind in asked.items():
        assert (inbox.reply(msg_id)[0], inbox.reply(msg_id)[1]["status"]) == (kind, "error")
    assert (inbox.reply(comm), inbox.is_idle(comm)) == (None, True)
    # The next process answers what is true of it, too.
    await inbox.until(lambda inbox: inbox.reply(info))
    assert inbox.reply(info)[1]["status"] == "ok"
    back = await Frontend.connect(alice, kernel_id, session_id=away.session_id)
    reply, _text = await asyncio.wait_for(back.result(from_away), READY)
    assert reply["ename"] == "KernelRestarted"
    _reply, new_pid = await here.execute(PID)
    assert new_pid != pid
    assert not ran.exists()
    assert await state_of(alice, kernel_id) == "idle"
    # A restart by the user of one page answers the other page's cell.
    cell = await back.begin(BLOCK, "begun")
    await alice.request("POST", f"/api/kernels/{kernel_id}/restart")
    assert (await back.result(cell))[0]["ename"] == "KernelRestarted"
    assert await state_of(alice, kernel_id) == "idle"
    await stop(alice, kernel_id)


@pytest.mark.parametrize("arguments", [[], ["--signal=KILL", "--full"]], ids=["TERM", "KILL"])
async def test_a_cell_whose_job_is_cancelled_ends_with_the_reason_and_no_restart(alice, cluster, arguments):
    """The reason is Slurm's, with what to do; no frontend gets "restarting", the model is dead."""
    kernel_id = await start(alice, "slurm")
    here = await Frontend.connect(alice, kernel_id)
    cell = await here.begin(BLOCK, "begun")
    job = (await alice.json("GET", f"/api/kernels/{kernel_id}"))["slurm"]["jobid"]
    slurm("scancel", *arguments, job, cluster=cluster)
    inbox = await Inbox(here).until(lambda inbox: inbox.reply(cell) and inbox.is_idle(cell))
    content = inbox.reply(cell)[1]
    assert content["ename"] == "KernelDied"
    assert f"job {job} ended: CANCELLED" in content["evalue"]
    assert "start it again" in content["evalue"]
    assert "restarting" not in inbox.states
    model = await alice.json("GET", f"/api/kernels/{kernel_id}")
    assert (model["execution_state"], model["reason"]) == ("dead", content["evalue"])
    await stop(alice, kernel_id)


# nbclient with jupyter_server's client of gateways, which sends the token by REST, but not with its websocket, and
# which lacks a method that jupyter_client calls.
NBCLIENT = """
import functools, sys
import nbformat, websocket
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.gateway.managers import GatewayKernelManager
from nbclient import NotebookClient

websocket.create_connection = functools.partial(
    websocket.create_connection, header=["Authorization: token " + sys.argv[2]]
)
GatewayClient.instance(url=sys.argv[1], auth_token=sys.argv[2])

class Manager(GatewayKernelManager):
    async def _async_is_alive(self):
        return await self.is_alive()

notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sys.argv[3:]])
NotebookClient(notebook, kernel_manager_class=Manager).execute(kernel_name="slurm")
"""


async def test_nbclient_at_a_gateway_ends_when_its_kernel_dies(alice):
    """The cell that killed the kernel is an error, though the kernel is restarted."""
    cells = ["print(1)", "import os; os.kill(os.getpid(), 9)", "print(2)"]
    argv = [sys.executable, "-c", NBCLIENT, alice.url, alice.token, *cells]
    done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=READY)
    assert done.returncode == 1
    assert "CellExecutionError" in done.stderr
    assert "the kernel died (signal 9 (SIGKILL)) and is restarted: run the cells again" in done.stderr
    for model in await alice.json("GET", "/api/kernels"):
        await stop(alice, model["id"])
