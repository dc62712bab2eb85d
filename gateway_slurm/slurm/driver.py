"""What the rest of the package asks of Slurm, and the driver that asks with Slurm's commands."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

from gateway_slurm.errors import AllocationError, SlurmUnavailable, SshLost, Unanswered, UnknownJob
from gateway_slurm.slurm import commands
from gateway_slurm.slurm import commands as about
from gateway_slurm.slurm.commands import About, JobInfo, JobSpec, StepInfo, StepSpec
from gateway_slurm.slurm.runner import DetachedProcess, Runner

# Seconds before each look for a job whose sbatch may have been run: together as long as a login node may be away.
LOST_PAUSES: Final = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
# The same where it was Slurm that did not answer: nobody waits for long for what may well be down.
UNANSWERED_PAUSES: Final = LOST_PAUSES[:4]
UNANSWERED_SECONDS: Final = 30.0
# Jobs and steps inherit sbatch's and srun's environment, and must not inherit what is there for our parsers.
_OURS: Final = {"LC_ALL": None, "SLURM_TIME_FORMAT": None}


class StepProcess(Protocol):
    """A step that was started; its driver's way to hear that it could not run."""

    async def wait(self) -> None:
        """Return when the step has ended well; raise AllocationError, UnknownJob, LauncherFailed or
        SlurmUnavailable.
        """

    def kill(self) -> None:
        """End the step; ``wait`` then raises."""


class SlurmJobs(Protocol):
    """What is asked of Slurm about jobs that are there, of whichever users.

    All methods raise SlurmUnavailable when Slurm could not be asked, which says nothing about any job, and
    SlurmNotInstalled. None keeps anything open between calls.
    """

    async def jobs(self, jobids: Collection[str]) -> dict[str, JobInfo]:
        """Ask once for many jobs; one that a healthy controller does not know is not in the answer."""

    async def find(self, name: str) -> dict[str, JobInfo]:
        """The user's own jobs of this name that are not over, by job id."""

    async def queue(self, partitions: Collection[str]) -> dict[str, int]:
        """Each waiting job's place in the queue of its partition, 1 for the next; none where that is not known."""

    async def cancel(self, jobid: str) -> None:
        """End a job; one that is over already is fine. SlurmError if it is not ours to end."""

    async def steps(self, jobid: str) -> list[StepInfo]:
        """List the running steps of a job, ``batch`` and ``extern`` included. StepsUnknown where nobody can tell."""


class SlurmDriver(SlurmJobs, Protocol):
    """A user's way to Slurm is these few methods; nothing else in the package knows how Slurm is reached."""

    @property
    def adopts(self) -> bool:
        """Whether steps can be started in a job that has no launcher of ours."""

    async def about(self) -> About:
        """Ask the cluster for its version and its partitions."""

    async def submit(self, spec: JobSpec) -> str:
        """Submit a job and return its id; SubmitRefused carries Slurm's own words; Unanswered: there may be a job."""

    async def describe(self, jobid: str) -> JobInfo:
        """Ask for one job that a kernel is to run in; UnknownJob, or AllocationError if we cannot use its
        kind.
        """

    async def start_step(self, spec: StepSpec) -> StepProcess:
        """Start one more step in a running job and return without waiting for it."""


class CommandLineSlurm:
    """The driver that runs sbatch, squeue, scancel and srun."""

    adopts: Final = True

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    async def about(self) -> About:
        """Ask with one scontrol and one sinfo."""
        version = about.parse_version(await self._ask(about.config_command()))
        return About(version, about.parse_partitions(await self._ask(about.partitions_command())))

    async def _ask(self, argv: list[str]) -> str:
        result = await self.runner.run(argv)
        if result.exit_status != 0:
            raise commands.unavailable(argv[0], result.exit_status, result.stderr)
        return result.stdout

    async def submit(self, spec: JobSpec) -> str:
        """Submit with one sbatch; the script goes through its standard input, ``spec.env`` by its
        environment.
        """
        try:
            result = await self.runner.run(
                commands.submit_command(spec), input=spec.script.encode(), extra_env={**_OURS, **spec.env}
            )
            return commands.parse_submit(result.exit_status, result.stdout, result.stderr, spec.asked)
        except Unanswered as error:
            lost = isinstance(error, SshLost)
            looking = self._submitted_after_all(spec, LOST_PAUSES if lost else UNANSWERED_PAUSES)
            with contextlib.suppress(asyncio.TimeoutError):
                jobid = await asyncio.wait_for(looking, None if lost else UNANSWERED_SECONDS)
                if jobid is not None:
                    return jobid
            raise

    async def _submitted_after_all(self, spec: JobSpec, pauses: Sequence[float]) -> str | None:
        """Look for the job of an sbatch whose answer was lost, by its comment, which no other job has.

        Once Slurm answers it is looked for twice: what was on its way to the controller is there by then.
        """
        looked = 0
        for pause in pauses if spec.comment else ():
            await asyncio.sleep(pause)
            try:
                found = await self.find(spec.name)
            except SlurmUnavailable:
                continue
            jobid = next((jobid for jobid, info in found.items() if info.comment == spec.comment), None)
            if jobid is not None:
                return jobid
            looked += 1
            if looked == 2:
                break
        return None

    async def jobs(self, jobids: Collection[str]) -> dict[str, JobInfo]:
        """Ask with one squeue, or with none when there is nothing to ask."""
        if not jobids:
            return {}
        mark = _mark()
        result = await self.runner.run(commands.jobs_command(jobids, mark=mark))
        alone = len(jobids) == 1
        return commands.parse_jobs(result.exit_status, result.stdout, result.stderr, mark=mark, alone=alone)

    async def find(self, name: str) -> dict[str, JobInfo]:
        """Ask with one squeue."""
        mark = _mark()
        result = await self.runner.run(commands.find_command(name, mark=mark))
        return commands.parse_jobs(result.exit_status, result.stdout, result.stderr, mark=mark)

    async def queue(self, partitions: Collection[str]) -> dict[str, int]:
        """Ask with one squeue."""
        mark = _mark()
        result = await self.runner.run(commands.queue_command(partitions, mark=mark))
        return commands.parse_queue(result.exit_status, result.stdout, result.stderr, mark=mark)

    async def describe(self, jobid: str) -> JobInfo:
        """Ask with one squeue; array tasks and heterogeneous jobs are refused with the reason."""
        return the_plain_job(jobid, await self.jobs([jobid]))

    async def cancel(self, jobid: str) -> None:
        """End the job with one scancel."""
        result = await self.runner.run(commands.cancel_command(jobid))
        commands.parse_cancel(result.exit_status, result.stderr)

    async def steps(self, jobid: str) -> list[StepInfo]:
        """List the steps with one squeue."""
        mark = _mark()
        result = await self.runner.run(commands.steps_command(jobid, mark=mark))
        return commands.parse_steps(result.exit_status, result.stdout, result.stderr, jobid=jobid, mark=mark)

    async def start_step(self, spec: StepSpec) -> SrunStep:
        """Start a detached srun, which stays for as long as the step does, also when this process goes
        away.
        """
        process = await self.runner.start(
            commands.step_command(spec), input=spec.script.encode(), extra_env={**_OURS, **spec.env}
        )
        return SrunStep(process, spec.jobid)


class SrunStep:
    """The srun of one step."""

    def __init__(self, process: DetachedProcess, jobid: str) -> None:
        self._process = process
        self._jobid = jobid

    @property
    def pid(self) -> int:
        """The process id of srun."""
        return self._process.pid

    async def wait(self) -> None:
        """Return when the step has ended well; raise what ``commands.parse_step_failure`` makes of it
        otherwise.
        """
        status = await self._process.wait()
        if status != 0:
            raise commands.parse_step_failure(status, self._process.stderr_tail(), jobid=self._jobid)

    def kill(self) -> None:
        """End the step: on SIGTERM srun has it killed at once; a SIGKILL of srun would leave it running."""
        self._process.terminate()


def the_plain_job(jobid: str, found: Mapping[str, JobInfo]) -> JobInfo:
    """Return the job from what Slurm says when it is asked for it; UnknownJob, or AllocationError if we cannot use
    its kind.
    """
    if not found:
        raise UnknownJob(
            f"Slurm does not know job {jobid}: it ended some time ago, or never was. squeue --me lists yours"
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
    """A job in which no launcher of this server is: nothing can be started there."""
    return AllocationError(
        f"no kernel can be started in job {jobid}: Slurm is reached by its REST interface (SlurmService.cluster), "
        "which starts nothing in a running job, and the job is not one that this server has submitted and has its "
        "launcher in. Leave jobid out, or name the job of one of your kernels here",
        jobid=jobid,
    )


def _mark() -> str:
    """Return a separator that no job name can hold, since it was not there when the job was named."""
    return "m" + secrets.token_hex(8)
