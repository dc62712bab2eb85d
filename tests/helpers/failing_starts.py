"""Helpers for tests of failures: failing starts, a job that fills the cluster, leftovers, broken links."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jupyter_client import KernelManager

from gateway_slurm.allocations.identity import COMMENT
from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import job_processes
from helpers.kernel_clients import install_kernelspec
from helpers.private_slurm import jobs_of, poll, slurm

SOON = 2.0  # seconds that a wrong request may take


def start_error(name: str, **start: Any) -> tuple[GatewaySlurmError, float]:
    """The error of a kernel's start, and the seconds until it was raised."""
    manager = KernelManager(kernel_name=name)
    began = time.monotonic()
    with pytest.raises(GatewaySlurmError) as caught:
        manager.start_kernel(**start)
    seconds = time.monotonic() - began
    assert not manager.has_kernel
    assert manager.ready.done()
    assert manager.ready.exception() is caught.value
    return caught.value, seconds


def spec(kernelspecs: Path, **fields: object) -> str:
    """Install a kernelspec with these request fields; return its name."""
    install_kernelspec(kernelspecs, "asked", config_overrides=fields)
    return "asked"


def nothing_left(cluster: PrivateCluster, *, timeout: float = 15) -> bool:
    """Whether all jobs and their processes end within ``timeout`` seconds."""
    return poll(lambda: not jobs_of(cluster) and not job_processes(cluster.slurm_conf), timeout=timeout)


@contextmanager
def all_nodes_taken(cluster: PrivateCluster, *options: str, nodes: int = 4) -> Iterator[str]:
    """A job that occupies all nodes of the cluster, so that jobs submitted in the block wait; gives its id."""
    argv = ["sbatch", "--parsable", "--output=/dev/null", f"--nodes={nodes}", "--exclusive", *options]
    jobid = slurm(*argv, "--wrap=sleep 600", cluster=cluster).stdout.strip()
    try:
        assert poll(lambda: f"{jobid} RUNNING wrap" in jobs_of(cluster), timeout=20)
        yield jobid
    finally:
        slurm("scancel", jobid, cluster=cluster)


def jobs_of_ours(cluster: PrivateCluster) -> list[str]:
    """The ids of jobs that this package has submitted."""
    listed = slurm("squeue", "--noheader", "--format=%i %k", cluster=cluster).stdout.splitlines()
    return [line.split()[0] for line in listed if f" {COMMENT}" in line]


def on_loop(function: Callable[[], Any]) -> Any:
    """Call a function on the service's event loop, to which links and kernels belong."""

    async def call() -> Any:
        return function()

    return SlurmService.instance().submit(call()).result(timeout=10)


def cut_links() -> int:
    """Break all links of this process's service, as a network failure does; return their number."""

    def cut() -> int:
        links = list(SlurmService.instance()._socket._links)
        for link in links:
            link._transport.abort()
        return len(links)

    return int(on_loop(cut))


def script(path: Path, text: str) -> str:
    """Write an executable file; return its path."""
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def python_script(path: Path, text: str) -> str:
    """Write an executable script for this Python; return its path."""
    return script(path, f"#!{sys.executable}\n{text}")


def wrapped_command(directory: Path, name: str, first: str) -> str:
    """A ``slurm_path`` whose command ``name`` runs the shell lines ``first``, and then Slurm's command."""
    directory.mkdir(exist_ok=True)
    path = os.environ["PATH"]
    script(directory / name, f'#!/bin/sh\nPATH={shlex.quote(path)}\n{first}\nexec {name} "$@"\n')
    return f"{directory}:{path}"
