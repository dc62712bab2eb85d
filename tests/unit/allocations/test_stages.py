"""Which clock counts while a start waits for its launcher, and when the launcher is late."""

from __future__ import annotations

from typing import Any

import pytest

from gateway_slurm.allocations.model import Allocation
from gateway_slurm.allocations.stages import Stage, StageClock, stage_of
from gateway_slurm.allocations.start import _ScriptStart
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.commands import parse_prolog
from gateway_slurm.slurm.model import JobInfo

STAGES = {
    Stage.QUEUE: [{}, {"state": "PENDING", "reason": "Priority"}, {"state": "PENDING", "reason": "JobHeldUser"}],
    Stage.BOOT: [{"state": "CONFIGURING"}, {"state": "POWER_UP_NODE"}, {"state": "CONFIGURING", "reason": "Prolog"}],
    Stage.PROLOG: [{"state": "RUNNING", "reason": "Prolog"}],
    Stage.RUNNING: [{"state": "RUNNING"}, {"state": "RUNNING", "reason": "None"}],
}


@pytest.mark.parametrize(("stage", "fields"), [(stage, fields) for stage, found in STAGES.items() for fields in found])
async def test_slurms_answer_names_the_stage(stage: Stage, fields: dict[str, Any]) -> None:
    """No answer yet is the queue."""
    allocation = Allocation(ours=True, request=KernelRequest())
    if fields:
        allocation.update(JobInfo(jobid="12", **fields))
    assert stage_of(allocation) is stage


def test_each_stage_has_its_own_seconds() -> None:
    """Also a job that goes back: its nodes may boot twice."""
    times = iter((0.0, 5.0, 65.0, 67.0, 68.0, 70.0))
    clock = StageClock(lambda: next(times))
    stages = (Stage.QUEUE, Stage.BOOT, Stage.QUEUE, Stage.BOOT, Stage.RUNNING)
    assert [clock.spend(stage) for stage in stages] == [5.0, 60.0, 7.0, 61.0, 2.0]


@pytest.mark.parametrize(
    ("began", "prolog", "deadline"),
    [(None, None, 360), (None, "", 60), (None, "/etc/prolog", 360), (80.0, None, 140), (80.0, "/etc/prolog", 140)],
)
def test_a_launcher_is_late_from_the_start_of_its_script(
    began: float | None, prolog: str | None, deadline: int
) -> None:
    """Where the start is not seen, a prolog may still run."""
    script = _ScriptStart(60.0)
    script.prolog = prolog
    script.looked(79.0, None)
    if began is not None:
        assert not script.is_look_due(began)
        assert script.is_look_due(79.0 + 7.5)
        script.looked(began, "")
        assert not script.is_look_due(1000.0)
    assert script.deadline(300.0) == deadline


@pytest.mark.parametrize(
    ("config", "prolog"),
    [
        ("Prolog                  = (null)\nTaskProlog              = (null)\n", ""),
        ("PrologFlags             = Alloc\nPrologSlurmctld         = /x\nResvProlog = /y\n", ""),
        ("Prolog                  = /etc/slurm/prolog.sh\nTaskProlog = /t\n", "/etc/slurm/prolog.sh"),
        ("Prolog[0]               = /etc/slurm/prolog.d/*\n", "/etc/slurm/prolog.d/*"),
        ("Prolog = (null)\nTaskProlog              = /etc/task.sh\n", "/etc/task.sh"),
        ("", ""),
    ],
)
def test_a_prolog_on_the_nodes_is_found_in_slurms_configuration(config: str, prolog: str) -> None:
    """The controller's own, and the flags, are not programs that delay a script on a node."""
    assert parse_prolog(config) == prolog
