"""Whether a kernel may go into a job that its ``jobid`` names: whose the job is, how it is, how long it lives."""

from __future__ import annotations

from gateway_slurm.errors import AllocationEnded, AllocationError
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.slurm.states import Meaning, meaning


def not_yours(jobid: str) -> AllocationError:
    """Whose it is, and whether it is there at all, is not for everybody to know."""
    return AllocationError(f"jobid {jobid} is not a job of yours; name one of your own, or none", jobid=jobid)


def check_adoptable(jobid: str, info: JobInfo, user: str) -> None:
    """Raise AllocationError for a job that is not ``user``'s, AllocationEnded for one that is over."""
    if info.user != user:
        raise not_yours(jobid)
    if meaning(info.state) not in (Meaning.USABLE, Meaning.WAITING, Meaning.HELD):
        raise AllocationEnded(
            f"job {jobid} is {info.state}: name in jobid a job that runs or waits, or leave it out for a new one",
            jobid=jobid,
            state=info.state,
        )


def check_time(jobid: str, seconds_left: float | None, least: float) -> None:
    """Raise AllocationError for a job that ends in less than ``least`` seconds."""
    if seconds_left is not None and seconds_left < least:
        raise AllocationError(
            f"job {jobid} (RUNNING) ends in {max(seconds_left, 0):.0f} s: too soon for a kernel "
            f"(SlurmService.min_time_left is {least:g} s); name another job, or none",
            jobid=jobid,
        )
