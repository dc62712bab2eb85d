"""A thousand kernels of an earlier process are back in a moment."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from gateway_slurm.kernels.model import KernelLaunch, Phase
from gateway_slurm.link import wire
from gateway_slurm.service import SlurmService
from gateway_slurm.store import AllocationRecord, KernelRecord, LauncherRecord, Registry
from helpers import HELPERS
from helpers.kernel_clients import READY, poll_async

KERNELS = 1000
SECONDS = 20.0
# Of each kernel five sockets for its clients and one link.
DESCRIPTORS = 8 * KERNELS

LAUNCH = KernelLaunch(
    argv=("kernel",),
    env={f"VARIABLE_{n}": "x" * 40 for n in range(40)},
    cwd=None,
    connection={"key": "k", "signature_scheme": "hmac-sha256", "kernel_name": "", "jupyter_session": ""},
    mode="ipc",
    language="python",
    start_timeout=60.0,
    port_range=None,
    log_dir="~",
    umask=0o022,
)


@pytest.fixture
def short_directory() -> Iterator[str]:
    """For sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="gs-", dir="/tmp") as directory:
        yield directory


def leave_behind(directory: Path, port: int) -> list[dict[str, str]]:
    """What a server has on record whose process is over; return what its launchers know."""
    registry = Registry(directory, deployment="many")
    registry.open()
    registry.announce(addresses=[f"127.0.0.1:{port}"])
    stubs = []
    for number in range(KERNELS):
        key, jobid, kernel_id = f"gs-{number:016x}", str(1000 + number), f"kernel-{number}"
        tokens = secrets.token_bytes(32), secrets.token_bytes(32)
        registry.put(AllocationRecord(launcher_id=key, jobid=jobid, state="RUNNING", identity=key))
        registry.put(
            LauncherRecord(launcher_id=key, record_key=key, jobid=jobid, tokens=tokens, node="c1", holds_job=True)
        )
        registry.put(
            KernelRecord(
                kernel_id=kernel_id,
                launcher_id=key,
                record_key=key,
                generation=1,
                mode="ipc",
                ports={channel: n for n, channel in enumerate(wire.CHANNELS, 1)},
                launch=asdict(LAUNCH),
                manager={"launch_args": {}},
                node="c1",
            )
        )
        stubs.append({"launcher_id": key, "jobid": jobid, "token": tokens[1].hex(), "kernel_id": kernel_id})
    registry.flush()
    registry.close(leave=True)
    return stubs


@pytest.mark.slow
async def test_a_thousand_kernels_are_restored_and_their_launchers_linked(tmp_path, short_directory, monkeypatch):
    """Their launchers dial all at once the port that the earlier process had, and no Slurm is needed for it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, DESCRIPTORS), hard))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    stubs = await asyncio.to_thread(leave_behind, tmp_path / "gateway_slurm", port)
    argv = [sys.executable, str(HELPERS / "stub_launchers.py"), str(port)]
    launchers = await asyncio.to_thread(lambda: subprocess.Popen(argv, stdin=subprocess.PIPE, text=True))
    # A Slurm that cannot be asked says nothing about any job.
    service = SlurmService(deployment="many", tunnel_directory=short_directory, slurm_path=str(tmp_path / "none"))
    try:
        assert launchers.stdin is not None
        launchers.stdin.write("\n".join(map(json.dumps, stubs)))
        launchers.stdin.close()
        begun = time.process_time()
        restored = await service.run(service.restore())
        assert len(restored) == KERNELS

        def all_run() -> bool:
            sockets = len(os.listdir(service._directory))
            return sockets == 5 * KERNELS and all(one.handle.process.phase is Phase.RUNNING for one in restored)

        assert await poll_async(all_run, timeout=READY)
        # Of the processor's time: how long it takes by the clock says how many others want the same machine.
        assert time.process_time() - begun < SECONDS
    finally:
        await asyncio.to_thread(service.close, leave=True)
        launchers.kill()
        launchers.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
