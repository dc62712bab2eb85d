"""While Slurm's controller is down a start is answered as docs/admins/gateway.md says."""

from __future__ import annotations

import json

import pytest

from helpers.daemons import start_daemon, stop_daemon
from helpers.gateway_process import running_gateway, until_dead
from helpers.private_slurm import jobs_of


@pytest.mark.slow
async def test_a_start_while_the_controller_is_down_ends_in_slurms_words(cluster, jupyter_base, kernelspecs, tmp_path):
    """They are in the answer, or in the model of the kernel that is dead once sbatch gives up; no job is left."""
    with running_gateway(tmp_path / "gateway") as gateway:
        alice = gateway.of("alice")
        stop_daemon(cluster, "slurmctld")
        try:
            status, words = await alice.refusal("POST", "/api/kernels", {"name": "physics.python"})
            if status == 201:
                words = (await until_dead(alice, json.loads(words)["id"]))["reason"]
        finally:
            start_daemon(cluster, "slurmctld")
    assert status in (201, 503)
    assert "controller" in words.lower(), words
    assert jobs_of(cluster) == []
