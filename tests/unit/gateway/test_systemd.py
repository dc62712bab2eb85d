"""What systemd gets from a gateway: ready, alive while its loops run, stopping."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from gateway_slurm._util import LoopWatch
from gateway_slurm.gateway.systemd import ALIVE, MAIN_LOOP, READY, ServiceManager


@pytest.fixture(params=["path", "abstract"])
def systemd(request, tmp_path, monkeypatch):
    """The service manager's socket, by a path or by a name in the abstract namespace."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@gateway_slurm-{os.getpid()}-{id(request)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0", 1))
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield receiver


async def test_a_state_is_sent_and_no_child_can_send_one(systemd):
    """The variable with the socket's name is gone afterwards."""
    manager = ServiceManager()
    manager.notify(READY)
    assert systemd.recv(100) == b"READY=1"
    assert "NOTIFY_SOCKET" not in os.environ
    ServiceManager().notify(READY)
    with pytest.raises(BlockingIOError):
        systemd.recv(100)


async def test_signs_of_life_end_while_a_loop_stands_still(systemd):
    """Of the loop that calls, nothing is sent while it does not run; of another one it knows by the watch."""
    loops = LoopWatch()
    life = asyncio.ensure_future(ServiceManager().show_life(loops, 0.05))
    loop = asyncio.get_running_loop()
    assert await asyncio.wait_for(loop.sock_recv(systemd, 100), 10) == ALIVE.encode()
    with loops.following("another"):
        await asyncio.sleep(0.1)
        assert loops.standing(0.05)
        while True:  # what was sent before the other loop stood still
            try:
                await asyncio.wait_for(loop.sock_recv(systemd, 100), 2.5)
            except asyncio.TimeoutError:
                break
        loops.beat("another")
    assert await asyncio.wait_for(loop.sock_recv(systemd, 100), 10) == ALIVE.encode()
    life.cancel()
    await asyncio.wait({life})
    assert loops.standing(-1) == ""  # nothing is watched any more
    loops.beat(MAIN_LOOP)
    assert loops.standing(-1) == ""


async def test_a_service_manager_that_is_away_is_no_error(tmp_path, monkeypatch):
    """The gateway serves on."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    ServiceManager().notify(READY)
