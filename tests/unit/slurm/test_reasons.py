"""What Slurm's reasons for a pending job mean."""

from __future__ import annotations

import pytest

from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.slurm.reasons import Outlook, pending

PASSES, ACTION, NEVER = Outlook.PASSES, Outlook.NEEDS_ACTION, Outlook.NEVER


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("", PASSES), ("None", PASSES), ("Resources", PASSES), ("Priority", PASSES), ("A new reason", PASSES),
        ("BeginTime", PASSES), ("Dependency", PASSES), ("Licenses", PASSES), ("Reservation", PASSES),
        ("AssocGrpCpuLimit", PASSES), ("QOSGrpNodeLimit", PASSES), ("AssocMaxJobsLimit", PASSES),
        ("QOSMaxCpuPerUserLimit", PASSES), ("QOSMaxGRESPerUser", PASSES), ("MaxGRESPerAccount", PASSES),
        ("AssocGrpCPURunMinutesLimit", PASSES), ("QOSGrpGRESRunMinutes", PASSES), ("AssocGrpMemRunMinutes", PASSES),
        ("ReqNodeNotAvail, May be reserved for other job", PASSES),
        ("ReqNodeNotAvail, Reserved for maintenance", PASSES),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions", PASSES),
        ("JobHeldUser", ACTION), ("JobHeldAdmin", ACTION), ("JobHoldMaxRequeue", ACTION),
        ("job requeued in held state", ACTION), ("launch failed requeued held", ACTION),
        ("PartitionDown", ACTION), ("PartitionInactive", ACTION), ("NodeDown", ACTION),
        ("ReqNodeNotAvail, UnavailableNodes:c[1-2]", ACTION),
        ("AssocGrpCPUMinutesLimit", ACTION), ("AssocGrpBillingMinutes", ACTION), ("QOSUsageThreshold", ACTION),
        ("Job is at or exceeds QOS small's group max TRES(cpu) minutes of 10 with 11", ACTION),
        ("PartitionTimeLimit", NEVER), ("PartitionNodeLimit", ACTION), ("PartitionConfig", NEVER),
        ("BadConstraints", NEVER), ("InvalidAccount", NEVER), ("InvalidQOS", NEVER), ("MaxMemPerLimit", NEVER),
        ("AccountNotAllowed", NEVER), ("QOSNotAllowed", NEVER),
        ("Job's account not permitted to use this partition (devel allows admin not demo)", NEVER),
        ("uid 1000 not in group permitted to use this partition (devel). groups allowed: wheel", NEVER),
        ("ReservationDeleted", NEVER), ("Reservation tutorial was deleted", NEVER),
        ("Reservation tutorial is invalid", NEVER), ("DependencyNeverSatisfied", NEVER),
        ("AssocMaxWallDurationPerJobLimit", NEVER), ("AssocMaxCpuMinutesPerJobLimit", NEVER),
        ("QOSMaxNodePerJobLimit", NEVER), ("QOSMaxCpuPerNode", NEVER), ("AssocMaxGRESPerJob", NEVER),
        ("QOSMinGRES", NEVER), ("QOSMinCpuNotSatisfied", NEVER),
    ],
)  # fmt: skip
def test_outlook(reason: str, expected: Outlook) -> None:
    """A request that the cluster does not allow never starts; a hold or a broken node needs a person; others pass."""
    found = pending(reason)
    assert found.outlook is expected
    assert found.advice or expected is PASSES


def test_the_advice_for_a_held_job_is_a_command() -> None:
    """It names the job."""
    assert "scontrol release 12 " in JobInfo(jobid="12", state="PENDING", reason="JobHeldUser").pending.advice


def test_a_reason_of_one_partition_is_not_final_for_a_job_that_names_several() -> None:
    """The job may start in another partition; what concerns the whole job is final."""
    assert pending("PartitionTimeLimit", partition="devel,batch").outlook is PASSES
    assert pending("BadConstraints", partition="devel,batch").outlook is NEVER
