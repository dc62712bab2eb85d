"""Log in to a test login node, and find the user of the login."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from gateway_slurm.slurm.ssh.config import Destination, resolve_destination
from gateway_slurm.slurm.ssh.connection import SshConnection
from gateway_slurm.slurm.ssh.login import Credentials
from gateway_slurm.slurm.ssh.runner import SshRunner
from gateway_slurm.slurm.url import parse_cluster_url


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
