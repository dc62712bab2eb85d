"""A gateway in its own process, with a token file and a directory of projects."""

from __future__ import annotations

import asyncio
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.kernel_clients import IPYKERNEL, PROVISIONER, READY
from helpers.notebook_server import Frontend, HTTPClientError, Server, running_process

JUPYTER_SLURM = [sys.executable, "-m", "gateway_slurm.cli.app"]
# The users' names, and their options of ``jupyter slurm token add``.
USERS: Mapping[str, tuple[str, ...]] = {"alice": (), "bob": (), "carol": ("--admin",), "portal": ("--service",)}
PROJECT = {"title": "Physics", "limits": {"max_runtime": 30}}


@dataclass
class Gateway:
    """A running gateway, its URL and the users' tokens."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    tokens: dict[str, str]

    def of(self, user: str) -> Server:
        """The gateway as this user reaches it."""
        return Server(self.process, self.url, self.tokens[user], self.log)

    @property
    def anyone(self) -> Server:
        """The gateway as a client with an unknown token reaches it."""
        return Server(self.process, self.url, "gws_000000000000_" + "A" * 43, self.log)


@functools.cache
def made_tokens() -> tuple[bytes, dict[str, str]]:
    """A token file with all users, made once a run, and their tokens."""
    with tempfile.TemporaryDirectory(prefix="gst-", dir="/tmp") as directory:
        tokens = Path(directory) / "tokens.json"
        made = {user: make_token(tokens, user, *kind) for user, kind in USERS.items()}
        return tokens.read_bytes(), made


def make_token(tokens: Path, user: str, *options: str) -> str:
    """Run ``jupyter slurm token add``; return the token."""
    argv = [*JUPYTER_SLURM, "token", "add", user, *options, f"--tokens={tokens}"]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=READY).stdout.strip()


def write_project(
    projects: Path, name: str = "physics", fields: Mapping[str, object] | None = None, **keys: object
) -> None:
    """Write ``<name>/project.json`` and its kernelspec ``<name>.python``, which has these further request fields."""
    folder = projects / name / "python"
    folder.mkdir(parents=True, exist_ok=True)
    (projects / name / "project.json").write_text(json.dumps({**PROJECT, **keys}))
    config = {"project": "demo", "partition": "batch", "nodes": 1, "runtime": 10, "kernel_argv": IPYKERNEL}
    config |= fields or {}
    provisioner = {"provisioner_name": PROVISIONER, "config": config}
    spec = {"display_name": "Python", "language": "python", "metadata": {"kernel_provisioner": provisioner}}
    (folder / "kernel.json").write_text(json.dumps(spec))


def gateway_argv(directory: Path, *options: str) -> list[str]:
    """Write a gateway's files into ``directory``; return its command line without a port."""
    directory.mkdir(parents=True, exist_ok=True)
    write_project(directory / "projects")
    content, _made = made_tokens()
    tokens = directory / "tokens.json"
    tokens.touch(mode=0o600)
    tokens.write_bytes(content)
    argv = [*JUPYTER_SLURM, "gateway", "--ip=127.0.0.1", f"--tokens={tokens}", "--allow-root"]
    return [*argv, f"--kernelspecs={directory / 'projects'}", "--SlurmGatewayApp.port_retries=0", *options]


@contextmanager
def running_gateway(directory: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Gateway]:
    """Run ``jupyter slurm gateway`` with its files in ``directory``; it must end on SIGTERM at the end of the block.

    Kernels outlive it: a test that starts kernels ends them.
    """
    argv, log = gateway_argv(directory, *options), directory / "gateway.log"
    with running_process(argv, "--port={}", log, environment or {}) as (process, url):
        yield Gateway(process, url, log, made_tokens()[1])


# -- users' requests --------------------------------------------------------------------------------


async def start(server: Server, name: str = "slurm", **body: Any) -> str:
    """Start a kernel by POST /api/kernels; return its id."""
    return str((await server.json("POST", "/api/kernels", {"name": name, **body}))["id"])


async def stop(server: Server, *kernel_ids: str) -> None:
    """Delete the kernels that still exist."""
    for kernel_id in kernel_ids:
        try:
            await server.request("DELETE", f"/api/kernels/{kernel_id}")
        except HTTPClientError as error:
            if error.code != 404:
                raise


async def ask(server: Server, kernel_id: str, code: str) -> str:
    """Run code in the kernel over a new websocket; return its output."""
    frontend = await Frontend.connect(server, kernel_id)
    try:
        reply, printed = await frontend.execute(code)
    finally:
        frontend.close()
    assert reply["status"] == "ok", reply
    return printed


async def stop_all(server: Server) -> None:
    """Delete all kernels that this user can see."""
    await stop(server, *[kernel["id"] for kernel in await server.json("GET", "/api/kernels")])


async def until_dead(server: Server, kernel_id: str) -> dict[str, Any]:
    """Poll the kernel's model until its state is ``dead``; return the model."""
    for _ in range(300):
        model: dict[str, Any] = await server.json("GET", f"/api/kernels/{kernel_id}")
        if model["execution_state"] == "dead":
            return model
        await asyncio.sleep(0.1)
    raise AssertionError(f"the kernel did not die: {model}")


__all__ = ["USERS", "Frontend", "Gateway", "HTTPClientError", "Server", "running_gateway"]
