"""Parts that all measurements use: kernelspecs in the bench's directory, kernels, clients, medians."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from jupyter_client.manager import AsyncKernelManager

from gateway_slurm.config import FILE_NAME
from gateway_slurm.service import SlurmService

ARGV = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
FIELDS = {"project": "demo", "partition": "batch", "nodes": 1, "runtime": 30, "kernel_argv": ARGV}


def write_kernelspec(directory: Path, name: str, *, jobid: str | None = None, connect: str | None = None) -> str:
    """Write a kernelspec and return its name; ``connect=None`` makes a local one, without slurm-provisioner."""
    spec: dict[str, Any] = {"display_name": name, "language": "python", "argv": ARGV}
    if connect is not None:
        config = {**FIELDS, "jobid": jobid, "connect": connect}
        provisioner = {"provisioner_name": "slurm-provisioner", "config": config}
        spec["metadata"] = {"kernel_provisioner": provisioner, "supported_encryption": ["curve"]}
    target = directory / "kernels" / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "kernel.json").write_text(json.dumps(spec))
    return name


@contextlib.contextmanager
def admin_settings(directory: Path, settings: dict[str, object]) -> Iterator[SlurmService]:
    """The process's service with these admin settings; the end closes the service and removes the settings."""
    if SlurmService._instance is not None:
        SlurmService._instance.close()
    SlurmService._instance = None  # an unused service does not count as closed
    file = directory / "config" / FILE_NAME
    file.parent.mkdir(exist_ok=True)
    lines = [f"c.SlurmService.{name} = {value!r}" for name, value in settings.items()]
    file.write_text("\n".join(["c = get_config()  # noqa", *lines, ""]))
    service = SlurmService.instance()
    try:
        yield service
    finally:
        service.close()
        file.unlink()


class Kernel:
    """A running kernel and its client."""

    def __init__(self, manager: AsyncKernelManager, client: Any) -> None:
        self.manager, self.client = manager, client

    @property
    def provisioner(self) -> Any:
        """The kernel's provisioner."""
        return self.manager.provisioner

    async def info(self) -> None:
        """Send a kernel_info request and wait for its reply."""
        message_id = self.client.kernel_info()
        while True:
            reply = await self.client.get_shell_msg(timeout=60)
            if reply["parent_header"].get("msg_id") == message_id:
                return

    async def subscribe(self) -> None:
        """Wait until the iopub subscription has reached the kernel, whose earlier messages are lost."""
        while True:
            await self.info()
            with contextlib.suppress(queue.Empty):
                await self.client.get_iopub_msg(timeout=0.2)
                return

    async def run(self, code: str) -> tuple[int, float]:
        """Run code; return the bytes of its output and the seconds until the kernel is idle."""
        began = time.perf_counter()
        message_id = self.client.execute(code)
        size = 0
        while True:
            message = await self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != message_id:
                continue
            content = message["content"]
            if message["msg_type"] == "stream":
                size += len(content["text"])
            elif message["msg_type"] == "display_data":
                size += len(content["data"]["text/plain"])
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                break
        await self.client.get_shell_msg(timeout=120)
        return size, time.perf_counter() - began

    async def evaluate(self, expression: str) -> str:
        """The repr of an expression in the kernel."""
        message_id = self.client.execute("", user_expressions={"value": expression})
        while True:
            reply = await self.client.get_shell_msg(timeout=60)
            if reply["parent_header"].get("msg_id") == message_id:
                return str(reply["content"]["user_expressions"]["value"]["data"]["text/plain"])


async def start(name: str) -> tuple[Kernel, float]:
    """Start a kernel; also return the seconds from ``start_kernel`` to the ``kernel_info_reply``."""
    manager = AsyncKernelManager(kernel_name=name)
    began = time.perf_counter()
    await manager.start_kernel()
    client = manager.client()
    client.start_channels(hb=False)
    kernel = Kernel(manager, client)
    await kernel.info()
    return kernel, time.perf_counter() - began


async def stop(kernel: Kernel) -> None:
    """Shut the kernel down, as a user does."""
    kernel.client.stop_channels()
    await kernel.manager.shutdown_kernel()


@contextlib.asynccontextmanager
async def running(name: str) -> AsyncIterator[Kernel]:
    """A kernel that runs during the block."""
    kernel, _seconds = await start(name)
    await kernel.subscribe()
    try:
        yield kernel
    finally:
        await stop(kernel)


class Ticker:
    """Measures the longest stall of the caller's event loop, beyond a tick of 10 ms."""

    def __init__(self) -> None:
        self.worst = 0.0
        self._task = asyncio.ensure_future(self._tick())

    async def _tick(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.01)
            self.worst = max(self.worst, time.perf_counter() - began - 0.01)

    async def stop(self) -> float:
        """Stop measuring; return the longest stall in seconds."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        return self.worst


class Table:
    """Rows of medians, each with its reference."""

    def __init__(self) -> None:
        self._samples: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        """Add a sample."""
        self._samples.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """The median of the samples."""
        return statistics.median(self._samples[name])

    def row(self, name: str, unit: str, *, reference: str | None = None, scale: float = 1.0) -> None:
        """Print a row: median, minimum, maximum, and the ratio to the reference's median."""
        samples = [value * scale for value in self._samples[name]]
        ratio = f"{self.median(name) / self.median(reference):6.2f} × {reference}" if reference in self._samples else ""
        spread = f"({min(samples):.3g} … {max(samples):.3g}, n={len(samples)})"
        print(f"{name:<58} {statistics.median(samples):9.4g} {unit:<5} {spread:<32} {ratio}", flush=True)


def environment(directory: Path) -> None:
    """Let Jupyter use the bench's kernelspecs, configuration and connection files only."""
    os.environ["JUPYTER_PATH"] = str(directory)
    os.environ["JUPYTER_CONFIG_DIR"] = str(directory / "config")
    os.environ["JUPYTER_RUNTIME_DIR"] = str(directory / "runtime")
    os.environ["PYTHONWARNINGS"] = "ignore"
