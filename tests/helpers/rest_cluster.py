"""A private cluster with slurmrestd, and settings by which a service reaches it only there."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from gateway_slurm.slurm.rest.driver import RestDriver, Slurmrestd
from gateway_slurm.slurm.rest.http import RestClient
from gateway_slurm.slurm.rest.tokens import FileTokens
from gateway_slurm.slurm.url import parse_cluster_url
from gateway_slurm.testing import PrivateCluster
from helpers.private_slurm import private_cluster

USER = "root" if os.geteuid() == 0 else os.environ.get("USER", "")

# Prints a token as scontrol does, and appends a line to a file, by which tests count the calls.
_MINT = """\
import os, subprocess, sys
counted, conf, lifespan, user = sys.argv[1:]
with open(counted, "a") as file:
    file.write(user + "\\n")
env = {**os.environ, "SLURM_CONF": conf}
sys.exit(subprocess.run(["scontrol", "token", f"username={user}", f"lifespan={lifespan}"], env=env).returncode)
"""


@contextmanager
def cluster_by_rest() -> Iterator[PrivateCluster]:
    """A cluster with slurmrestd. SLURM_CONF is not set, so that Slurm's commands in this process find no Slurm."""
    before = os.environ.pop("SLURM_CONF", None)
    try:
        with private_cluster(rest=True) as private:
            yield private
    finally:
        if before is not None:
            os.environ["SLURM_CONF"] = before


@contextmanager
def cluster_with_rest() -> Iterator[PrivateCluster]:
    """A cluster with slurmrestd that SLURM_CONF names, for modules whose tests run by several accesses to Slurm."""
    with cluster_by_rest() as private:
        os.environ.update(private.environment())
        try:
            yield private
        finally:
            del os.environ["SLURM_CONF"]


def mint_command(cluster: PrivateCluster, counted: Path, *, lifespan: int = 600) -> list[str]:
    """A value for SlurmService.rest_token_command; ``counted`` gets a line for each token."""
    return [sys.executable, "-c", _MINT, str(counted), str(cluster.slurm_conf), str(lifespan), "{user}"]


def write_token(path: Path, token: str) -> Path:
    """Replace a token file atomically, with mode 0600."""
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(token + "\n")
    temporary.replace(path)
    return path


@asynccontextmanager
async def driver_for(url: str, token_file: Path, timeout: float = 60) -> AsyncIterator[RestDriver]:
    """A driver for a slurmrestd."""
    rest = Slurmrestd(RestClient(parse_cluster_url(url), timeout=timeout), FileTokens(str(token_file)))
    try:
        yield RestDriver(rest, USER, find_launcher=lambda _jobid: None)
    finally:
        rest.client.close()
