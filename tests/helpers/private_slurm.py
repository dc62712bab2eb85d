"""A private Slurm for tests, its commands, and the wait for a condition."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import job_processes


def poll(condition: Callable[[], bool], *, timeout: float, interval: float = 0.05) -> bool:
    """Whether the condition came true within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


def slurm(*argv: str, cluster: PrivateCluster, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands on the cluster."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        [*cluster.prefix, *argv],
        check=check,
        capture_output=True,
        text=True,
        timeout=60,
        # Discard the output of jobs, unless a test says where it goes.
        env={**environment, **cluster.environment(), "SBATCH_OUTPUT": "/dev/null"},
    )


def jobs_of(cluster: PrivateCluster) -> list[str]:
    """Every job that squeue shows, one line each."""
    output = slurm("squeue", "--noheader", "--format=%i %T %j", cluster=cluster).stdout
    return output.splitlines()


def state_of(cluster: PrivateCluster, jobid: str) -> str:
    """The state that squeue shows of a job; empty for one that it does not list (any more)."""
    return {line.split()[0]: line.split()[1] for line in jobs_of(cluster)}.get(jobid, "")


def steps_of(cluster: PrivateCluster, jobid: str) -> list[str]:
    """The numbers of the job's running steps, without the batch step."""
    lines = slurm("squeue", "--steps", "--noheader", f"--jobs={jobid}", "--format=%i", cluster=cluster).stdout.split()
    return [line.partition(".")[2] for line in lines if not line.endswith((".batch", ".extern"))]


@contextmanager
def private_cluster(**options: Any) -> Iterator[PrivateCluster]:
    """A real Slurm of four nodes with two pretended GPUs each; nothing of it is left afterwards."""
    base = Path(tempfile.mkdtemp(prefix="gst-", dir="/tmp"))
    base.chmod(0o755)  # other users' jobs read slurm.conf, too
    private = PrivateCluster(base / "slurm", **options)
    private.up()
    try:
        yield private
    finally:
        private.down()
        left = job_processes(private.slurm_conf)
        files = list(base.iterdir())
        base.rmdir()
    assert left == []
    assert files == []
