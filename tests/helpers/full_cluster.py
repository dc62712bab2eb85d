"""A job that leaves nothing of the cluster free."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from gateway_slurm.testing import PrivateCluster
from helpers.kernel_clients import job_state
from helpers.private_slurm import slurm


@contextmanager
def all_nodes_taken(cluster: PrivateCluster, *options: str) -> Iterator[str]:
    """A job that leaves no CPU of the cluster free; what is submitted meanwhile waits."""
    argv = ["sbatch", "--parsable", "--nodes=4", "--exclusive", "--output=/dev/null", *options, "--wrap=sleep 300"]
    jobid = slurm(*argv, cluster=cluster).stdout.strip()
    deadline = time.monotonic() + 20
    while job_state(jobid) != "RUNNING":
        assert time.monotonic() < deadline, "the job that takes all nodes does not run"
        time.sleep(0.05)
    try:
        yield jobid
    finally:
        slurm("scancel", jobid, cluster=cluster)
