"""The gateway's kernel manager: restarts that fail or are given up, shutdowns in their midst, and what stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal

import psutil
import pytest
from jupyter_client import AsyncKernelManager
from tornado.web import HTTPError

from gateway_slurm import SlurmMappingKernelManager
from gateway_slurm.errors import AllocationEnded, HandshakeError, LinkError
from gateway_slurm.gateway.restore import ready_of
from gateway_slurm.kernels import held as heldkernel
from gateway_slurm.kernels.model import Phase
from helpers.failing_starts import cut_links, nothing_left, on_loop
from helpers.kernel_clients import READY, poll_async, process_of
from helpers.private_slurm import slurm


class Sink:
    """A websocket that records the states that are sent to it."""

    protocol, reads_model = "", False

    def __init__(self):
        self.states, self.ended = [], ""

    def send(self, frame):
        """Take a message."""
        message = json.loads(frame)
        if message["msg_type"] == "status":
            self.states.append(message["content"]["execution_state"])
        left = asyncio.get_running_loop().create_future()
        left.set_result(None)
        return left

    def end(self, reason):
        """The session is over."""
        self.ended = reason


@contextlib.asynccontextmanager
async def managing(directory, **traits):
    """A kernel manager as the gateway's; at the end its kernels are shut down."""
    manager = SlurmMappingKernelManager(root_dir=str(directory), kill_kernels_on_exit=True, **traits)
    try:
        yield manager
    finally:
        await manager.shutdown_all(now=True)


async def started(manager, name="slurm"):
    """Start a kernel and wait until it is there: its id, and its own manager."""
    kernel_id = await manager.start_kernel(kernel_name=name)
    kernel = manager._kernels[kernel_id]
    assert await poll_async(lambda: ready_of(kernel).done() and kernel.execution_state == "idle", timeout=READY)
    return kernel_id, kernel


@contextlib.contextmanager
def out_of_reach(service):
    """While inside, there is no link, and no launcher is let in."""

    async def refuse(*_arguments):
        raise HandshakeError("the test wants no link now")

    service._socket.authenticate = refuse
    try:
        cut_links()
        yield
    finally:
        del service._socket.authenticate


@pytest.fixture
def impatient(monkeypatch):
    """Restarts wait for launchers only for a moment."""
    monkeypatch.setattr(heldkernel, "LINK_SECONDS", 0.2)
    monkeypatch.setattr(heldkernel, "STOP_SECONDS", 0.2)


# -- restarts that fail ---------------------------------------------------------------------------


async def test_a_kernel_whose_restart_failed_for_want_of_a_link_can_be_shut_down(service, cluster, tmp_path, impatient):
    """The restart says why; the shutdown after it ends the job, though the kernel runs and the link comes back."""
    async with managing(tmp_path) as manager:
        kernel_id, kernel = await started(manager)
        with out_of_reach(service):
            assert await poll_async(lambda: process_of(kernel).phase is Phase.LOST, timeout=5)
            with pytest.raises(HTTPError, match=r"the link to .* is down"):
                await manager.restart_kernel(kernel_id, now=True)
            assert kernel.execution_state == "dead"
        await manager.shutdown_kernel(kernel_id, now=True)
        assert kernel_id not in manager
        assert await poll_async(lambda: service.kernels.handles() == [], timeout=5)
        assert nothing_left(cluster)


async def test_a_restart_that_failed_and_is_not_tried_again_leaves_no_job(admin_settings, cluster, impatient):
    """If no client acts after a restart that found no link, the job ends after release_grace."""
    service = admin_settings(release_grace=0.5)
    manager = AsyncKernelManager(kernel_name="slurm")
    await manager.start_kernel()
    with out_of_reach(service):
        assert await poll_async(lambda: process_of(manager).phase is Phase.LOST, timeout=5)
        with pytest.raises(LinkError):
            await manager.restart_kernel(now=True)
    assert await poll_async(lambda: service.kernels.handles() == [], timeout=10)
    assert nothing_left(cluster)


async def test_a_restart_that_failed_may_be_tried_again(service, impatient):
    """Within release_grace, once the link is back, the same kernel is restarted in the same job."""
    manager = AsyncKernelManager(kernel_name="slurm")
    await manager.start_kernel()
    job = manager.provisioner.jobid
    with out_of_reach(service):
        assert await poll_async(lambda: process_of(manager).phase is Phase.LOST, timeout=5)
        with pytest.raises(LinkError):
            await manager.restart_kernel(now=True)
    assert await poll_async(lambda: process_of(manager).launcher.link, timeout=20)
    await manager.restart_kernel(now=True)
    assert (await manager.is_alive(), manager.provisioner.jobid) == (True, job)
    await manager.shutdown_kernel()


async def test_a_launcher_that_stops_no_kernel_fails_the_restart(admin_settings, cluster, tmp_path, impatient):
    """A launcher that has a link and says nothing: the kernel is shown dead, with words, and can be shut down."""
    admin_settings(heartbeat=60.0)
    async with managing(tmp_path) as manager:
        kernel_id, kernel = await started(manager)
        launcher = psutil.Process(process_of(kernel).pid).parent()
        launcher.suspend()
        try:
            with pytest.raises(HTTPError, match="did not report within") as caught:
                await manager.restart_kernel(kernel_id, now=True)
        finally:
            launcher.resume()
        assert (caught.value.status_code, kernel.execution_state) == (409, "dead")
        await manager.shutdown_kernel(kernel_id, now=True)
    assert nothing_left(cluster)


async def test_restarts_after_the_jobs_end_leave_nothing_in_the_server(admin_settings, cluster):
    """A kernel whose job is over is forgotten after release_grace, with its sockets, also if a restart was tried."""
    service = admin_settings(release_grace=0.5)
    manager = AsyncKernelManager(kernel_name="slurm")
    await manager.start_kernel()
    assert len(os.listdir(service._directory)) == 5
    slurm("scancel", manager.provisioner.jobid, cluster=cluster)
    assert await poll_async(lambda: process_of(manager).phase is Phase.DEAD, timeout=20)
    with pytest.raises(AllocationEnded):
        await manager.restart_kernel(now=True)
    assert await poll_async(lambda: service.kernels.handles() == [], timeout=10)
    assert os.listdir(service._directory) == []


# -- shutdowns during a restart -------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["the old one is stopped", "the new one starts", "it is there"])
async def test_a_kernel_can_be_shut_down_while_it_is_restarted(service, cluster, tmp_path, moment):
    """Whatever the restart is about, it is given up, the shutdown works the first time, and nothing is left."""
    async with managing(tmp_path) as manager:
        kernel_id, kernel = await started(manager)
        process = process_of(kernel)
        restart = asyncio.ensure_future(manager.restart_kernel(kernel_id, now=moment == "the new one starts"))
        reached = {
            "the old one is stopped": lambda: not ready_of(kernel).done(),
            "the new one starts": lambda: process.phase is Phase.STARTING,
            "it is there": lambda: process.generation == 2 and process.phase is Phase.RUNNING,
        }[moment]
        assert await poll_async(reached, timeout=READY, interval=0.001)
        await manager.shutdown_kernel(kernel_id)
        assert kernel_id not in manager
        with contextlib.suppress(HTTPError):
            await asyncio.wait_for(restart, READY)
        assert await poll_async(lambda: service.kernels.handles() == [], timeout=5)
        assert nothing_left(cluster)


async def test_a_kernel_can_be_shut_down_while_its_restarter_restarts_it(service, cluster, tmp_path):
    """A DELETE in that moment ends it, and the restarter does not start it again."""
    async with managing(tmp_path) as manager:
        kernel_id, kernel = await started(manager)
        begun = asyncio.Event()
        manager.add_restart_callback(kernel_id, begun.set)
        os.kill(process_of(kernel).pid, signal.SIGKILL)
        await asyncio.wait_for(begun.wait(), READY)
        await manager.shutdown_kernel(kernel_id)
        assert kernel_id not in manager
        assert await poll_async(lambda: service.kernels.handles() == [], timeout=5)
        assert kernel._restarter._pcallback is None
        assert nothing_left(cluster)


@pytest.mark.parametrize("by", ["user", "restarter"])
async def test_a_server_that_ends_during_a_restart_ends(service, cluster, tmp_path, by):
    """A kernel that is being restarted keeps neither the server nor its service from their end."""
    manager = SlurmMappingKernelManager(root_dir=str(tmp_path))
    kernel_id, kernel = await started(manager)
    begun = asyncio.Event()
    manager.add_restart_callback(kernel_id, begun.set)
    if by == "user":
        restart = asyncio.ensure_future(manager.restart_kernel(kernel_id))
        assert await poll_async(lambda: not ready_of(kernel).done(), timeout=READY, interval=0.001)
    else:
        restart = None
        os.kill(process_of(kernel).pid, signal.SIGKILL)
        await asyncio.wait_for(begun.wait(), READY)
    await manager.shutdown_all()
    assert service.is_closed
    if restart is not None:
        with pytest.raises(HTTPError, match="shut down"):
            await restart
    assert nothing_left(cluster)


async def test_a_kernel_that_cannot_be_shut_down_keeps_no_other_from_it(service, cluster, tmp_path, caplog):
    """At the server's end each kernel is ended, and the one that could not be is in the log."""
    async with managing(tmp_path) as manager:
        bad_id, bad = await started(manager)
        good_id, good = await started(manager)
        cleanup = bad.provisioner.cleanup

        async def broken(restart=False):
            await cleanup(restart)
            raise OSError("another extension")

        bad.provisioner.cleanup = broken
        await manager.shutdown_all()
        assert good_id not in manager
        assert not good.has_kernel
        assert f"kernel {bad_id} was not shut down in good order" in caplog.text
        del bad.provisioner.cleanup
    assert nothing_left(cluster)


# -- sessions -------------------------------------------------------------------------------------


async def test_all_sessions_share_the_sockets_of_their_kernel_and_a_closed_kernel_has_none(service, tmp_path):
    """Also after a restart by the restarter; a kernel whose connection is closed during a restart opens no more."""
    async with managing(tmp_path) as manager:
        kernel_id, kernel = await started(manager)
        connection = manager.frontends.connection(kernel_id)
        for number in range(3):  # a page that is reloaded
            session, sink = manager.frontends.open_session(kernel_id, f"s{number}"), Sink()
            session.attach(sink)
            assert await poll_async(lambda: connection._held is None, timeout=READY)
            if number < 2:
                session.detach(sink)
        assert len(connection._sockets) == 3
        os.kill(process_of(kernel).pid, signal.SIGKILL)
        assert await poll_async(lambda: process_of(kernel).generation == 2, timeout=READY)
        assert await poll_async(lambda: connection._held is None and ready_of(kernel).done(), timeout=READY)
        assert len(connection._sockets) == 3
        restart = asyncio.ensure_future(manager.restart_kernel(kernel_id))
        assert await poll_async(lambda: not ready_of(kernel).done(), timeout=READY, interval=0.001)
        manager.frontends.close(kernel_id, "the server takes it over")
        await asyncio.wait_for(restart, READY / 2)  # less than what a kernel's first message is waited for
        assert len(connection._sockets) == 0


async def test_a_session_that_came_before_its_kernel_hears_of_the_restarters_restart(service, tmp_path):
    """A notebook that was opened while the job waited gets "restarting" like any other."""
    async with managing(tmp_path) as manager:
        kernel_id = await manager.start_kernel(kernel_name="slurm")
        kernel, sink = manager._kernels[kernel_id], Sink()
        connection = manager.frontends.connection(kernel_id)
        manager.frontends.open_session(kernel_id, "early").attach(sink)
        assert await poll_async(lambda: connection._held is None, timeout=READY)
        os.kill(process_of(kernel).pid, signal.SIGKILL)
        assert await poll_async(lambda: "restarting" in sink.states, timeout=READY)
        assert await poll_async(lambda: connection._held is None and ready_of(kernel).done(), timeout=READY)
        assert sink.states.count("restarting") == 1
        assert await kernel.is_alive()
        assert on_loop(lambda: process_of(kernel).phase) is Phase.RUNNING
