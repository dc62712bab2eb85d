"""Jobs that Slurm takes the nodes from for another job: their kernels end, the reason says so, nothing is left."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import job_processes
from helpers.failing_starts import spec
from helpers.kernel_clients import READY, execute, jobid_of, running_kernel
from helpers.private_slurm import jobs_of, poll, slurm

CONF = """
PreemptType=preempt/partition_prio
PreemptMode={mode}
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=10
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", ["CANCEL", "REQUEUE"])
def test_a_preempted_kernel_is_dead_and_the_reason_says_so(admin_settings, kernelspecs, caplog, mode):
    """Slurm's word is the reason, a restart takes no new job, and the job is not queued again."""
    with (
        tempfile.TemporaryDirectory(prefix="gst-", dir="/tmp") as base,
        PrivateCluster(Path(base) / "n", nodes=1, extra_conf=CONF.format(mode=mode)) as private,
    ):
        admin_settings(slurm_conf=str(private.slurm_conf))
        with running_kernel(spec(kernelspecs)) as (manager, client):
            jobid = jobid_of(manager)
            assert execute(client, "print('here')") == "here"
            argv = ("sbatch", "--parsable", "--partition=urgent", "--exclusive", "-N1", "-o/dev/null")
            urgent = slurm(*argv, "--wrap=sleep 300", cluster=private).stdout.strip()
            assert poll(lambda: not manager.is_alive(), timeout=READY)
            assert poll(lambda: "PREEMPTED" in manager.provisioner.exit_reason, timeout=READY)
            assert f"job {jobid} ended: PREEMPTED" in caplog.text
            with pytest.raises(Exception, match=f"job {jobid}.*PREEMPTED.*start it again"):
                manager.restart_kernel(now=True)
            assert poll(lambda: jobs_of(private) == [f"{urgent} RUNNING wrap"], timeout=READY)
        slurm("scancel", urgent, cluster=private)
        assert poll(lambda: not jobs_of(private) and not job_processes(private.slurm_conf), timeout=READY)
        SlurmService.instance().close()
