"""Servers in their own processes, which start kernels and are killed, and managers for the restored kernels."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jupyter_client import AsyncKernelManager
from jupyter_client.provisioning import KernelProvisionerFactory

from gateway_slurm.kernels.restore import RestoredKernel
from gateway_slurm.link import envelope, wire
from gateway_slurm.store import LauncherRecord
from helpers import HELPERS
from helpers.kernel_clients import READY

# Reads one command in JSON from each line of its standard input, and answers each with a line.
SERVER = """
import asyncio, json, sys
from jupyter_client import AsyncKernelManager
from gateway_slurm.service import SlurmService

managers, clients, dropped = {}, {}, []

async def client_of(manager):
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=60)
    return client

async def start(name, **options):
    manager = AsyncKernelManager(kernel_name=name)
    await manager.start_kernel(**options)
    managers[manager.kernel_id] = manager
    clients[manager.kernel_id] = await client_of(manager)
    provisioner = manager.provisioner
    provisioner.remember({"launch_args": {}, "seen": "by the first server"})
    pid = provisioner._handle.process.pid
    service = SlurmService.instance()
    await service.run(asyncio.sleep(0))
    await asyncio.to_thread(service.registry.flush)
    return {"kernel_id": manager.kernel_id, "jobid": provisioner.jobid, "node": provisioner.node, "pid": pid}

async def begin(name, **options):
    asyncio.ensure_future(AsyncKernelManager(kernel_name=name).start_kernel(**options))

async def execute(kernel_id, code):
    reply = await clients[kernel_id].execute_interactive(code, timeout=60, output_hook=lambda message: None)
    return reply["content"]["status"]

async def shutdown(kernel_id):
    clients.pop(kernel_id).stop_channels()
    await managers.pop(kernel_id).shutdown_kernel()

async def restore():
    service = SlurmService.instance()
    service.on_dropped = dropped.extend
    found = await service.run(service.restore())
    return sorted(one.record.kernel_id for one in found)

async def recorded():
    await asyncio.to_thread(SlurmService.instance().registry.flush)

async def lost():
    return sorted(dropped)

async def close(leave):
    await asyncio.to_thread(SlurmService.instance().close, leave=leave)

async def serve():
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, options = json.loads(line)
        answer = await globals()[name](**options)
        print(json.dumps(answer), flush=True)

asyncio.run(serve())
"""


@dataclass
class DrivenServer:
    """A process with its own service, which the test drives by commands."""

    process: subprocess.Popen[str] = field(repr=False)

    def call(self, command: str, /, **options: Any) -> Any:
        """Run a command in the server; return its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([command, options]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the server ended in {command}"
        return json.loads(answer)

    def signal(self, signum: int) -> None:
        """Send a signal to the server; after SIGKILL wait for its end."""
        self.process.send_signal(signum)
        if signum == signal.SIGKILL:
            self.process.wait(READY)

    def end(self) -> None:
        """Close its standard input, after which it ends normally."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(READY)


@contextmanager
def driven_server() -> Iterator[DrivenServer]:
    """A server process; it is killed at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": str(HELPERS.parent)}
    argv = [sys.executable, "-c", SERVER]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield DrivenServer(process)
    finally:
        process.kill()
        process.wait(READY)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()


async def answer_of(port: int, record: LauncherRecord) -> tuple[str, Any]:
    """Dial a server on this machine as this launcher; return the server's first message."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        public_key = wire.parse_preamble(await reader.readexactly(wire.PREAMBLE_BYTES))
        token, jobid = record.tokens[1], record.jobid
        opening, _seal, unseal = envelope.seal_hello(public_key, token, record.launcher_id, jobid, {})
        writer.write(wire.frame(opening.encode()))
        frames = wire.FrameReader(wire.FRAME_LIMIT)
        while True:
            data = await asyncio.wait_for(reader.read(65536), READY)
            assert data, "the server closed the connection"
            for frame in frames.feed(data):
                return wire.decode(wire.unpack(unseal(frame))[0], wire.DOWN)
    finally:
        writer.close()


async def call(driven: DrivenServer, command: str, /, **options: Any) -> Any:
    """``DrivenServer.call`` without blocking the test's event loop."""
    return await asyncio.to_thread(lambda: driven.call(command, **options))


def adopt(restored: RestoredKernel, kernel_name: str) -> AsyncKernelManager:
    """A kernel manager for a restored kernel, as if it had started the kernel."""
    manager = AsyncKernelManager(kernel_name=kernel_name)
    manager.kernel_id = restored.record.kernel_id
    factory = KernelProvisionerFactory.instance()
    manager.provisioner = factory.create_provisioner_instance(manager.kernel_id, manager.kernel_spec, parent=manager)
    manager.load_connection_info(manager.provisioner.adopt(restored))
    manager._attempted_start = True
    manager._launch_args = dict(restored.record.manager["launch_args"])
    return manager
