"""The interface through which the package uses Slurm, and its implementation by Slurm's commands."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

from gateway_slurm.errors import AllocationError, SlurmUnavailable, SshLost, Unanswered, UnknownJob
from gateway_slurm.slurm import commands
from gateway_slurm.slurm.model import ClusterInfo, JobInfo, JobSpec, StepInfo, StepSpec
from gateway_slurm.slurm.runner import DetachedProcess, Runner

LOST_LOOKUP_DELAYS: Final = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Seconds before each lookup of a job whose sbatch may have run when the connection to the login node broke; the sum
is the time that a login node may be away.
"""
UNANSWERED_LOOKUP_DELAYS: Final = LOST_LOOKUP_DELAYS[:4]
"""The same if Slurm did not answer. Slurm may be down for long, so these lookups end earlier."""
UNANSWERED_TIMEOUT: Final = 30.0  # seconds
# A job or step inherits the environment of sbatch or srun. These variables are for the parsers and are removed.
_NOT_FOR_JOBS: Final = {"LC_ALL": None, "SLURM_TIME_FORMAT": None}


class StepProcess(Protocol):
    """A started step."""

    async def wait(self) -> None:
        """Return when the step has ended with status 0.

        Raises AllocationError, UnknownJob, LauncherFailed or SlurmUnavailable.
        """

    def kill(self) -> None:
        """End the step; ``wait`` then raises."""


class SlurmJobs(Protocol):
    """Requests to Slurm about existing jobs of any user.

    All methods raise SlurmNotInstalled, and SlurmUnavailable if Slurm was not reached; nothing is known about the jobs
    then. No method keeps anything open between calls.
    """

    @property
    def is_local(self) -> bool:
        """Whether Slurm is reached by this machine's commands: a job that this process runs in is this cluster's."""

    async def jobs(self, jobids: Collection[str]) -> dict[str, JobInfo]:
        """Return all of these jobs with one request; a job that a healthy controller does not know is left out."""

    async def find(self, comment: str) -> dict[str, JobInfo]:
        """Return the user's own unfinished jobs whose comment begins with this, by job id; their names do not count."""

    async def queue_positions(self, partitions: Collection[str]) -> dict[str, int]:
        """Return each pending job's position in its partition's queue, 1 for the next; empty if that is not known."""

    async def cancel(self, jobid: str) -> None:
        """End a job; a finished job is no error. Raises SlurmError if the user may not cancel the job."""

    async def steps(self, jobid: str) -> list[StepInfo]:
        """List the running steps of a job, ``batch`` and ``extern`` included. Raises StepsUnknown."""


class SlurmDriver(SlurmJobs, Protocol):
    """One user's access to Slurm. The rest of the package does not know how a driver reaches Slurm."""

    @property
    def can_adopt(self) -> bool:
        """Whether steps can be started in a job that has no launcher of this package."""

    async def cluster_info(self) -> ClusterInfo:
        """Return the cluster's version and its partitions."""

    async def submit(self, spec: JobSpec) -> str:
        """Submit a job and return its id.

        Raises SubmitRefused with Slurm's own words, and Unanswered if the job may exist nevertheless.
        """

    async def describe(self, jobid: str) -> JobInfo:
        """Return one job in which a kernel will run.

        Raises UnknownJob, and AllocationError for an array task or a component of a heterogeneous job.
        """

    async def start_step(self, spec: StepSpec) -> StepProcess:
        """Start one more step in a running job, and return without waiting for its end."""


class CommandLineDriver:
    """The driver that runs sbatch, squeue, scancel and srun."""

    can_adopt: Final = True

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    @property
    def is_local(self) -> bool:
        return self.runner.is_local

    async def cluster_info(self) -> ClusterInfo:
        config = await self._output(commands.config_command())
        partitions = commands.parse_partitions(await self._output(commands.partitions_command()))
        return ClusterInfo(commands.parse_version(config), partitions, commands.parse_prolog(config))

    async def _output(self, argv: list[str]) -> str:
        result = await self.runner.run(argv)
        if result.exit_status != 0:
            raise commands.unavailable(argv[0], result.exit_status, result.stderr)
        return result.stdout

    async def submit(self, spec: JobSpec) -> str:
        """Run one sbatch, which gets the script by its standard input and ``spec.env`` by its environment."""
        try:
            result = await self.runner.run(
                commands.submit_command(spec), stdin=spec.script.encode(), extra_env={**_NOT_FOR_JOBS, **spec.env}
            )
            return commands.parse_submit(result.exit_status, result.stdout, result.stderr, spec.requested)
        except Unanswered as error:
            lost = isinstance(error, SshLost)
            lookup = self._look_up(spec, LOST_LOOKUP_DELAYS if lost else UNANSWERED_LOOKUP_DELAYS)
            with contextlib.suppress(asyncio.TimeoutError):
                jobid = await asyncio.wait_for(lookup, None if lost else UNANSWERED_TIMEOUT)
                if jobid is not None:
                    return jobid
            raise

    async def _look_up(self, spec: JobSpec, delays: Sequence[float]) -> str | None:
        """Look for the job of an sbatch that gave no answer, by the job's unique comment.

        Once Slurm answers, the job is looked up twice: a request that was under way has reached the controller by then.
        """
        answers = 0
        for delay in delays if spec.comment else ():
            await asyncio.sleep(delay)
            try:
                found = await self.find(spec.comment)
            except SlurmUnavailable:
                continue
            for jobid, info in found.items():
                if info.comment == spec.comment:
                    return jobid
            answers += 1
            if answers == 2:
                break
        return None

    async def jobs(self, jobids: Collection[str]) -> dict[str, JobInfo]:
        """Run one squeue, or none if ``jobids`` is empty."""
        if not jobids:
            return {}
        mark = _mark()
        result = await self.runner.run(commands.jobs_command(jobids, mark=mark))
        alone = len(jobids) == 1
        found = commands.parse_jobs(result.exit_status, result.stdout, result.stderr, mark=mark, alone=alone)
        return _by_this_clock(found)

    async def find(self, comment: str) -> dict[str, JobInfo]:
        """Run one squeue for all jobs of the user: it cannot choose by comment."""
        mark = _mark()
        result = await self.runner.run(commands.own_jobs_command(mark=mark))
        found = commands.parse_jobs(result.exit_status, result.stdout, result.stderr, mark=mark)
        return _by_this_clock({jobid: info for jobid, info in found.items() if info.comment.startswith(comment)})

    async def queue_positions(self, partitions: Collection[str]) -> dict[str, int]:
        mark = _mark()
        result = await self.runner.run(commands.queue_command(partitions, mark=mark))
        return commands.parse_queue(result.exit_status, result.stdout, result.stderr, mark=mark)

    async def describe(self, jobid: str) -> JobInfo:
        return plain_job(jobid, await self.jobs([jobid]))

    async def cancel(self, jobid: str) -> None:
        result = await self.runner.run(commands.cancel_command(jobid))
        commands.parse_cancel(result.exit_status, result.stderr)

    async def steps(self, jobid: str) -> list[StepInfo]:
        mark = _mark()
        result = await self.runner.run(commands.steps_command(jobid, mark=mark))
        return commands.parse_steps(result.exit_status, result.stdout, result.stderr, jobid=jobid, mark=mark)

    async def start_step(self, spec: StepSpec) -> SrunStep:
        """Start a detached srun, which runs until the step ends, even if this process ends earlier."""
        process = await self.runner.start(
            commands.step_command(spec), stdin=spec.script.encode(), extra_env={**_NOT_FOR_JOBS, **spec.env}
        )
        return SrunStep(process, spec.jobid)


class SrunStep:
    """The srun of one step."""

    def __init__(self, process: DetachedProcess, jobid: str) -> None:
        self._process = process
        self._jobid = jobid

    async def wait(self) -> None:
        status = await self._process.wait()
        if status != 0:
            raise commands.parse_step_failure(status, self._process.stderr_tail(), jobid=self._jobid)

    def kill(self) -> None:
        """End the step. On SIGTERM srun kills the step at once; a SIGKILL of srun would leave the step running."""
        self._process.terminate()


def _by_this_clock(found: Mapping[str, JobInfo]) -> dict[str, JobInfo]:
    """Return the jobs with times by this host's clock: a login node's may be another one."""
    return {jobid: info.by_clock(time.time()) for jobid, info in found.items()}


def plain_job(jobid: str, found: Mapping[str, JobInfo]) -> JobInfo:
    """Return the job ``jobid`` from Slurm's answer to a request for this job alone.

    Raises UnknownJob, and AllocationError for an array task or a component of a heterogeneous job.
    """
    if not found:
        raise UnknownJob(
            f"Slurm does not know job {jobid}: it ended some time ago, or it never existed. squeue --me lists your jobs"
        )
    info = found.get(jobid)
    if info is None or info.is_component or len(found) > 1:
        raise AllocationError(
            f"job {jobid} is a job array or heterogeneous; array tasks and heterogeneous components "
            "cannot be adopted yet. Name a plain job",
            jobid=jobid,
        )
    return info


def not_adoptable(jobid: str) -> AllocationError:
    """Return the error for a job that has no launcher of this server, in which REST cannot start a step."""
    return AllocationError(
        f"no kernel can be started in job {jobid}: Slurm's REST interface (SlurmService.cluster) cannot start a step "
        "in a running job, and no launcher of this server runs in the job. Leave jobid out, or name the job of one of "
        "your kernels on this server",
        jobid=jobid,
    )


def _mark() -> str:
    """Return a random separator, which no job name can hold: the name is older than the separator."""
    return "m" + secrets.token_hex(8)
