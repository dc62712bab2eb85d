"""Kernelspecs as users have them, kernels started from them, and questions to a kernel."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

import psutil
import pytest
from jupyter_client import AsyncKernelManager, KernelManager

from gateway_slurm.config import FILE_NAME
from gateway_slurm.service import SlurmService
from gateway_slurm.store import Registry

READY = 60  # seconds: many tests may share two busy CPUs
IPYKERNEL = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
# The names of the fixture's kernelspecs, by the way clients reach their kernels.
KERNEL_NAMES = {"tunnel": "slurm", "direct": "slurm-direct"}
AUTO_KERNEL = "slurm-auto"  # that of ``install_auto``
CURVE = {"metadata": {"supported_encryption": ["curve"]}}
PROVISIONER = "slurm-provisioner"


# -- kernelspecs and settings -------------------------------------------------------------------


def install_kernelspec(
    directory: Path,
    name: str,
    *,
    config_overrides: Mapping[str, object] | None = None,
    spec_overrides: Mapping[str, object] | None = None,
) -> Path:
    """Write ``kernels/<name>/kernel.json`` under ``directory``, an entry of JUPYTER_PATH; return its path.

    It has the format that users have in their homes. ``config_overrides`` replaces request fields, where
    None takes one away; ``spec_overrides`` replaces the spec's own keys, and adds to its ``metadata``.
    """
    config: dict[str, object] = {
        "project": "demo",
        "partition": "batch",
        "nodes": "1",
        "runtime": "10",
        "gpus": "0",
        "reservation": "None",
        "jobid": "None",
        "node": "None",
        "kernel_argv": IPYKERNEL,
        **(config_overrides or {}),
    }
    config = {field: value for field, value in config.items() if value is not None}
    spec = {"display_name": name, "language": "python", **(spec_overrides or {})}
    provisioner = {"provisioner_name": PROVISIONER, "config": config}
    extra = dict((spec_overrides or {}).get("metadata") or {})  # type: ignore[call-overload]
    spec["metadata"] = {"debugger": True, "kernel_provisioner": provisioner, **extra}
    path = directory / "kernels" / name / "kernel.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(spec, indent=1))
    return path


def install_both(directory: Path) -> None:
    """Install ``slurm``, which declares nothing and so goes through the tunnel, and ``slurm-direct``, which must not.

    With ``connect = auto`` a kernel of the gateway is behind the tunnel, where its output is kept.
    """
    install_kernelspec(directory, KERNEL_NAMES["tunnel"])
    install_kernelspec(directory, KERNEL_NAMES["direct"], config_overrides={"connect": "direct"}, spec_overrides=CURVE)


def install_auto(directory: Path) -> None:
    """Install ``slurm-auto``: where no output is kept, its kernels are direct if their node can be dialled."""
    install_kernelspec(directory, AUTO_KERNEL, spec_overrides=CURVE)


def jupyter_environment(base: Path) -> dict[str, str]:
    """Environment in which Jupyter finds only what is under ``base``; its directories are made."""
    places = {
        "HOME": "home",
        "JUPYTER_PATH": "path",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTER_DATA_DIR": "data",
        "IPYTHONDIR": "ipython",
    }
    for directory in places.values():
        (base / directory).mkdir(mode=0o700, parents=True, exist_ok=True)
    return {variable: str(base / directory) for variable, directory in places.items()}


@contextmanager
def jupyter_files_in(base: Path) -> Iterator[Path]:
    """Set ``jupyter_environment`` for this process and its children, until the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in jupyter_environment(base).items():
            patch.setenv(name, value)
        yield base


def write_admin_settings(**traits: object) -> Path:
    """Write ``jupyter_slurm_config.py`` with these traits of SlurmService; the next service reads it."""
    path = Path(os.environ["JUPYTER_CONFIG_DIR"]) / FILE_NAME
    lines = [f"c.SlurmService.{name} = {value!r}" for name, value in traits.items()]
    path.write_text("\n".join(["c = get_config()  # noqa", *lines, ""]))
    return path


def forget_service() -> None:
    """Close this process's service; the next ``SlurmService.instance()`` makes a new one."""
    if SlurmService._instance is not None:
        SlurmService._instance.close()
    SlurmService._instance = None


def forget_dead_servers() -> None:
    """Remove the records of earlier tests' servers, such as one of an sbatch without an answer.

    The next service would look for that job for a minute, and tests count Slurm's commands.
    """
    with closing(Registry.default()) as registry:
        registry.drop([found for found in registry.all_allocations() if found[0].is_gone])


# -- kernels ------------------------------------------------------------------------------------


@contextmanager
def running_kernel(name: str, **start: Any) -> Iterator[tuple[KernelManager, Any]]:
    """A kernel of a blocking manager, and a ready client; the kernel is shut down at the end."""
    manager = KernelManager(kernel_name=name)
    manager.start_kernel(**start)
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=READY)
        yield manager, client
    finally:
        client.stop_channels()
        if manager.has_kernel:
            manager.shutdown_kernel()


@asynccontextmanager
async def async_kernel(name: str, **start: Any) -> AsyncIterator[tuple[AsyncKernelManager, Any]]:
    """A kernel of an asynchronous manager, and a ready client; the kernel is shut down at the end."""
    manager = AsyncKernelManager(kernel_name=name)
    await manager.start_kernel(**start)
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=READY)
        yield manager, client
    finally:
        client.stop_channels()
        if manager.has_kernel:
            await manager.shutdown_kernel()


def execute(client: Any, code: str, *, timeout: float = READY, **options: Any) -> str:
    """Run code by a blocking client and return what it printed, stripped; an error of the code raises."""
    printed: list[str] = []
    reply = client.execute_interactive(code, timeout=timeout, output_hook=_printed_to(printed), **options)
    _check(code, reply["content"])
    return "".join(printed).strip()


async def async_execute(client: Any, code: str, *, timeout: float = READY, **options: Any) -> str:
    """Run code by an asynchronous client, return what it printed, stripped; an error of the code raises."""
    printed: list[str] = []
    reply = await client.execute_interactive(code, timeout=timeout, output_hook=_printed_to(printed), **options)
    _check(code, reply["content"])
    return "".join(printed).strip()


def _printed_to(printed: list[str]) -> Any:
    def hook(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            printed.append(message["content"]["text"])

    return hook


def _check(code: str, content: dict[str, Any]) -> None:
    if content["status"] != "ok":
        raise AssertionError(f"{code!r} ended with {content.get('ename')}: {content.get('evalue')}")


def until_reply(client: Any, msg_id: str, *, timeout: float = READY) -> dict[str, Any]:
    """The shell's reply to ``msg_id``, by a blocking client."""
    deadline = time.monotonic() + timeout
    while True:
        reply: dict[str, Any] = client.get_shell_msg(timeout=max(0.01, deadline - time.monotonic()))
        if reply["parent_header"].get("msg_id") == msg_id:
            return reply


async def async_until_reply(client: Any, msg_id: str, *, timeout: float = READY) -> dict[str, Any]:
    """The shell's reply to ``msg_id``, by an asynchronous client."""
    deadline = time.monotonic() + timeout
    while True:
        reply: dict[str, Any] = await client.get_shell_msg(timeout=max(0.01, deadline - time.monotonic()))
        if reply["parent_header"].get("msg_id") == msg_id:
            return reply


async def until_printed(client: Any, text: str, *, timeout: float = READY) -> None:
    """Read an asynchronous client's iopub until ``text`` was printed."""
    deadline = time.monotonic() + timeout
    seen = ""
    while text not in seen:
        try:
            message = await client.get_iopub_msg(timeout=max(0.01, deadline - time.monotonic()))
        except Empty:
            raise AssertionError(f"{text!r} was not printed within {timeout} s, only {seen!r}") from None
        if message["msg_type"] == "stream":
            seen += message["content"]["text"]


JOB = "import os; print(os.environ['SLURM_JOB_ID'])"
PID = "import os; print(os.getpid())"
# ipykernel drops what more than 1000 messages wait for, as where the machine stands still for 0.3 s while it prints
# line by line. That is lost before it has left the kernel; a test of what comes after that takes this away.
DROP_NOTHING = """
(lambda thread: thread.schedule(lambda: setattr(thread.socket, "sndhwm", 0)))(get_ipython().kernel.iopub_thread)
"""


def process_of(manager: Any) -> Any:
    """The process proxy of a manager's kernel."""
    return manager.provisioner._handle.process


def jobid_of(manager: Any) -> str:
    """The Slurm job that a manager's kernel runs in."""
    return str(manager.provisioner.jobid)


def commands_run(service: SlurmService) -> int:
    """The number of Slurm commands that the service has run."""
    return sum(service.runner.counts.values())


async def poll_async(condition: Any, *, timeout: float, interval: float = 0.05) -> bool:
    """Whether the condition becomes true within ``timeout`` seconds, without blocking the event loop."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(interval)
    return True


def processes_of_job(jobid: str) -> list[psutil.Process]:
    """Processes with this job of the session's cluster in their environment; all nodes are on this machine.

    Another run's cluster has jobs of the same numbers. Without SLURM_CONF, as where Slurm is a site's, both count.
    """
    found, cluster = [], os.environ.get("SLURM_CONF")
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            is_ours = cluster in (None, environment.get("SLURM_CONF", cluster))
            if environment.get("SLURM_JOB_ID") == jobid and is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it ended meanwhile, or is another user's
            continue
    return found


def job_state(jobid: str) -> str:
    """The job's state as squeue shows it; empty for a job that squeue does not list."""
    argv = ["squeue", "--noheader", "--format=%i %T"]
    lines = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    return dict(line.split() for line in lines).get(jobid, "")
