"""Who uses a job beside its kernels: one table of what keeps a job from being ended after its last kernel.

A server, the command line and the look for orphans ask here. They never end a job in which this server runs, or a step
or a batch script that is not ours.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from gateway_slurm._util import printable
from gateway_slurm.allocations.identity import STEP_NAME, is_launcher_id
from gateway_slurm.slurm.driver import SlurmJobs
from gateway_slurm.slurm.model import StepInfo

# Steps that Slurm makes for a job itself: the extern step holds no process of the user's until an ssh login joins it.
_SLURMS_STEPS = frozenset({"extern"})
_JOB_IN_CGROUP = re.compile(r"/job_([0-9]+)(?=/|$)", re.ASCII | re.MULTILINE)


class Use(enum.Enum):
    """Why a job is not ended after its last kernel; the value completes "job 12 stays: "."""

    SERVER = "this server runs in it"
    SCRIPT = "its batch script is not ours; it ends with that script"
    STEP = "another job step runs in it"
    OTHER_SERVER = "another server uses it"
    UNKNOWN = "it is not known whether others use it"

    @property
    def is_lasting(self) -> bool:
        """Whether the job is never ours to end, so that it need not be checked again."""
        return self in (Use.SERVER, Use.SCRIPT)

    def in_words(self, what: str) -> str:
        """The reason for messages; ``what`` uses the job, or is empty."""
        return f"{self.value} ({what})" if what else self.value


def use_by_steps(steps: Iterable[StepInfo], *, own: Collection[str], identity: str) -> tuple[Use | None, str]:
    """Return the use of a job with these running steps, and the step in words; None if there is no use.

    ``own`` are numbers of steps that are ours; ``identity`` is the job's (``identity_of``).
    """
    others = [step for step in steps if step.number not in _SLURMS_STEPS and step.number not in own]
    for step in others:
        if step.number != "batch":
            return Use.STEP, f"step {step.stepid} ({printable(step.name)})"
    if others and not is_launcher_id(identity):
        return Use.SCRIPT, f"step {others[0].stepid}"
    return None, ""


async def use_without_server(driver: SlurmJobs, jobid: str, identity: str) -> tuple[Use | None, str]:
    """Return the same for a running job that no server has. Launchers of dead servers are no use.

    Raises SlurmError, and StepsUnknown where the access to Slurm cannot list steps.
    """
    if jobid in jobs_of_this_process(driver):
        return Use.SERVER, ""
    steps = await driver.steps(jobid)
    return use_by_steps(steps, own={step.number for step in steps if step.name == STEP_NAME}, identity=identity)


def jobs_of_this_process(driver: SlurmJobs) -> frozenset[str]:
    """The ids of the jobs that this process runs in: by Slurm's variables, and by its cgroup if these are gone.

    A process in the shell of ``salloc`` is on no node of the job, and still counts. Where the driver reaches Slurm on
    another machine there are none: that cluster may give the same number to another job.
    """
    if not driver.is_local:
        return frozenset()
    found = {os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_JOBID")}
    with contextlib.suppress(OSError):  # /proc is hidden
        found |= set(_JOB_IN_CGROUP.findall(Path("/proc/self/cgroup").read_text()))
    return frozenset(found - {""})
