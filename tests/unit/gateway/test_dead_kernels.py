"""A kernel that is dead: which frontends have the reason, how long it is listed, and what it may still be asked for.

The kernel manager is the gateway's; the kernel is a name with a start that fails when a test wants it.
"""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from tornado.web import HTTPError

from gateway_slurm import SlurmMappingKernelManager
from gateway_slurm.errors import KernelStartError
from gateway_slurm.gateway import jupyter_compat
from gateway_slurm.gateway.kernel_manager import SHOWN_LINGER
from helpers.kernel_clients import poll_async

KERNEL, REASON = "kernel-1", "invalid partition specified: nowhere"


class Frontend:
    """A websocket that takes everything."""

    protocol, reads_model = "", False

    def __init__(self):
        self.got = []

    def send(self, frame):
        self.got.append(json.loads(frame))
        written = asyncio.get_running_loop().create_future()
        written.set_result(None)
        return written

    def end(self, _reason):
        pass

    @property
    def replies(self):
        """The error of each cell that has one."""
        found = [message for message in self.got if message["msg_type"] == "execute_reply"]
        return {message["parent_header"]["msg_id"]: message["content"]["evalue"] for message in found}


def execute(cell):
    """The parts of a cell's request."""
    header = {"msg_id": cell, "msg_type": "execute_request"}
    return [json.dumps(part).encode() for part in (header, {}, {}, {"code": "1"})]


@pytest.fixture
async def manager():
    """A kernel manager with one kernel, which is starting."""
    manager = SlurmMappingKernelManager()
    kernel = SimpleNamespace(kernel_id=KERNEL, kernel_name="slurm", ready=asyncio.get_running_loop().create_future())
    kernel.execution_state, kernel.reason, kernel.ports = "starting", "", []
    kernel.has_kernel, kernel.provisioner = False, None
    jupyter_compat.add_kernel(manager, KERNEL, kernel)
    yield manager
    manager._lingering.pop(KERNEL).cancel()
    manager.frontends.close(KERNEL, "the test is over")


async def fail_start(manager):
    """The kernel's start fails."""
    manager.get_kernel(KERNEL).ready.set_exception(KernelStartError(REASON))
    await manager.finish_start(KERNEL)


def open_session(manager, name, *cells):
    """A session with these cells, and its websocket."""
    session, frontend = manager.frontends.open_session(KERNEL, name), Frontend()
    session.attach(frontend)
    for cell in cells:
        session.from_client("shell", execute(cell))
    return session, frontend


def listed_for(manager):
    """Seconds for which the dead kernel is still listed."""
    return manager._lingering[KERNEL].when() - asyncio.get_running_loop().time()


async def test_a_dead_kernel_is_listed_until_a_frontend_that_was_away_has_the_reason(manager):
    """Nothing that is queued for it is lost, also where another page shows the reason already."""
    away, gone = open_session(manager, "away", "a")
    away.detach(gone)
    await fail_start(manager)
    assert not away.failure_shown
    here, page = open_session(manager, "here")
    here.from_client("shell", execute("b"))
    assert await poll_async(lambda: here.failure_shown, timeout=10)
    assert page.replies == {"b": REASON}
    assert listed_for(manager) > manager.dead_kernel_linger / 2
    _session, back = open_session(manager, "away")
    assert await poll_async(lambda: listed_for(manager) <= SHOWN_LINGER, timeout=10)
    assert (away.failure_shown, back.replies) == (True, {"a": REASON})


async def test_a_kernel_whose_start_failed_is_neither_restarted_nor_interrupted(manager):
    """The answer has the reason and what to do, and no job is submitted for it: it is a conflict, not a fault."""
    await fail_start(manager)
    for request, verb in ((manager.restart_kernel, "restarted"), (manager.interrupt_kernel, "interrupted")):
        with pytest.raises(HTTPError, match=f"cannot be {verb}: start a new kernel. {REASON}") as caught:
            await request(KERNEL)
        assert caught.value.status_code == 409
    assert manager.get_kernel(KERNEL).execution_state == "dead"


async def test_a_dead_kernel_that_is_restarted_has_no_failure_but_that_of_the_restart(manager):
    """What is run meanwhile is held and is answered if the restart fails, too; later cells get the last reason."""
    await fail_start(manager)
    session, page = open_session(manager, "here", "before")
    assert await poll_async(lambda: page.replies, timeout=10)
    connection = manager.frontends.connection(KERNEL)
    connection.hold("the kernel was restarted")
    session.from_client("shell", execute("meanwhile"))
    await session.flushed()
    assert (connection.failure, page.replies) == ("", {"before": REASON})
    connection.fail("the node is down")
    connection.fail("the job has ended")
    session.from_client("shell", execute("after"))
    await session.flushed()
    assert page.replies == {"before": REASON, "meanwhile": "the node is down", "after": "the job has ended"}
