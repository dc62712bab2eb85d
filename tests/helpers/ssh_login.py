"""Log in to a test login node: find the user of the login, and run commands there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gateway_slurm.slurm.ssh.config import Destination, resolve_destination
from gateway_slurm.slurm.ssh.connection import SshConnection
from gateway_slurm.slurm.ssh.login import Credentials
from gateway_slurm.slurm.ssh.runner import SshRunner
from gateway_slurm.slurm.url import parse_cluster_url
from helpers.login_node import LoginNode


def logged_in(
    url: str,
    *,
    identities: tuple[Path | str, ...] = ("/nonexistent",),
    known: Path | str = "/nonexistent",
    config: Path | str = "/nonexistent",
    password_file: Path | str = "",
) -> str:
    """Log in; return the name of the user who runs commands there."""
    destination = resolve_destination(
        parse_cluster_url(url),
        config_file=str(config),
        identity_files=tuple(map(str, identities)),
        known_hosts=(str(known),) if known else (),
    )
    return asyncio.run(_whoami(destination, Credentials(str(password_file))))


async def _whoami(destination: Destination, credentials: Credentials) -> str:
    log = logging.getLogger("test")
    connection = SshConnection(destination, credentials, python="/usr/bin/python3", timeout=20, heartbeat=10, log=log)
    try:
        runner = SshRunner(connection, None, None, timeout=20)
        return (await runner.run(["id", "-un"])).stdout.strip()
    finally:
        await connection.close()


@asynccontextmanager
async def runner_for(
    node: LoginNode,
    *,
    port: int = 0,
    timeout: float = 20,
    heartbeat: float = 10,
    python: str = "/usr/bin/python3",
    slurm_conf: str | None = None,
) -> AsyncIterator[SshRunner]:
    """A runner on the node; it connects to ``port`` if a proxy is in between."""
    url = parse_cluster_url(node.url.replace(f":{node.port}", f":{port or node.port}"))
    destination = resolve_destination(
        url,
        config_file=str(node.directory / "ssh_config"),
        identity_files=(str(node.key),),
        known_hosts=(str(node.known_hosts(*([port] if port else []))),),
    )
    log = logging.getLogger("test")
    connection = SshConnection(destination, Credentials(), python=python, timeout=20, heartbeat=heartbeat, log=log)
    try:
        yield SshRunner(connection, None, slurm_conf, timeout=timeout)
    finally:
        await connection.close()
