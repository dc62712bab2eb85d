"""What the tests of failures share: starts that are to fail, jobs that fill the cluster, what is left over."""

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

from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import job_processes
from helpers.kernel_clients import install_kernelspec
from helpers.private_slurm import jobs_of, poll, slurm

SOON = 2.0  # seconds: what a user waits for the answer to a wrong request


def start_error(name: str, **start: Any) -> tuple[GatewaySlurmError, float]:
    """The error with which a kernel does not start, and how many seconds it took to come."""
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
    """Install one more kernelspec with these request fields; return its name."""
    install_kernelspec(kernelspecs, "asked", config_overrides=fields)
    return "asked"


def nothing_left(cluster: PrivateCluster, *, timeout: float = 15) -> bool:
    """Whether soon no job, and no process that a job has started, is there."""
    return poll(lambda: not jobs_of(cluster) and not job_processes(cluster.slurm_conf), timeout=timeout)


@contextmanager
def filled(cluster: PrivateCluster, *options: str) -> Iterator[str]:
    """Jobs of somebody who needs every node, for as long as it takes; gives the job's id."""
    argv = ["sbatch", "--parsable", "--output=/dev/null", *(options or ("--nodes=4", "--exclusive"))]
    jobid = slurm(*argv, "--wrap=sleep 600", cluster=cluster).stdout.strip()
    try:
        assert poll(lambda: f"{jobid} RUNNING wrap" in jobs_of(cluster), timeout=20)
        yield jobid
    finally:
        slurm("scancel", jobid, cluster=cluster)


def jobs_of_ours(cluster: PrivateCluster) -> list[str]:
    """Ids of the jobs that a service has submitted."""
    return [line.split()[0] for line in jobs_of(cluster) if line.endswith(" gateway_slurm")]


def on_loop(function: Callable[[], Any]) -> Any:
    """Call a function on the service's loop, where links and kernels live."""

    async def call() -> Any:
        return function()

    return SlurmService.instance().submit(call()).result(timeout=10)


def cut_links() -> int:
    """Break every link of the process's service as a network does; how many there were."""

    def cut() -> int:
        links = list(SlurmService.instance()._socket._links)
        for link in links:
            link._transport.abort()
        return len(links)

    return int(on_loop(cut))


def script(path: Path, text: str) -> str:
    """Write an executable; return its path."""
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def python_script(path: Path, text: str) -> str:
    """Write an executable for this Python."""
    return script(path, f"#!{sys.executable}\n{text}")


def wrapped_command(directory: Path, name: str, first: str) -> str:
    """A directory for ``slurm_path`` whose ``name`` runs the shell lines ``first`` before Slurm's own one."""
    directory.mkdir(exist_ok=True)
    path = os.environ["PATH"]
    script(directory / name, f'#!/bin/sh\nPATH={shlex.quote(path)}\n{first}\nexec {name} "$@"\n')
    return f"{directory}:{path}"
