"""The driver that asks slurmrestd; what has to happen inside a job is done by our launcher there, when it is told.

An answer is believed only when it is whole: a status of 2xx, JSON, and no errors in it. Everything else says
nothing about any job, but for "Invalid job id".
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

from gateway_slurm.errors import (
    AllocationError,
    SlurmError,
    SlurmUnavailable,
    StepsUnknown,
    SubmitRefused,
    Unanswered,
    UnknownJob,
)
from gateway_slurm.slurm.commands import partitions_in, version_in
from gateway_slurm.slurm.driver import StepProcess, not_adoptable, plain_job
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import ClusterInfo, JobInfo, JobSpec, StepInfo, StepSpec
from gateway_slurm.slurm.rest.http import RestClient, RestResponse
from gateway_slurm.slurm.rest.responses import (
    ALREADY_DONE_ERROR,
    NO_CONTROLLER_ERROR,
    UNKNOWN_JOB_ERROR,
    error_text,
    jobid_of,
    jobs_in,
)
from gateway_slurm.slurm.rest.tokens import Tokens
from gateway_slurm.slurm.rest.versions import Version, announced, choose, encode, submission

_log = logging.getLogger(__name__)

FEW: Final = 8
"""Jobs up to which each is asked about alone; the only other question is for all jobs of the cluster."""
LOOK_AFTER: Final = (0.0, 1.0, 3.0)
"""Seconds before each look for a job whose submission was not answered."""
_JOBID: Final = re.compile(r"[0-9]{1,10}", re.ASCII)
# It goes into a header, and may go into a file's name or a command's argument.
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}", re.ASCII)


class InsideJob(Protocol):
    """Our launcher that holds a job, as the driver needs it."""

    async def start(self, spec: StepSpec) -> StepProcess:
        """Have a step started."""

    async def listed(self, jobid: str) -> list[StepInfo]:
        """The running steps of its job. Raises SlurmUnavailable."""


class Rest:
    """What all users of one slurmrestd share: the client, their tokens, and the version that is spoken.

    Whoever made it calls ``close`` on the loop that it was used on.
    """

    def __init__(self, client: RestClient, tokens: Tokens) -> None:
        self.client, self._tokens = client, tokens
        self._version: Version | None = None
        self._choosing = asyncio.Lock()

    def close(self) -> None:
        """End what is under way."""
        self.client.close()

    async def version(self, user: str) -> Version:
        """Return the newest version that both sides know, as the server announces them; asked once."""
        async with self._choosing:
            if self._version is None:
                answer = await self.send("GET", "/openapi/v3", user)
                if not answer.document.get("paths"):
                    raise self.unusable(answer, user)
                self._version = choose(announced(answer.document))
                _log.info("%s: version %s is spoken", self.client, self._version.name)
            return self._version

    async def ask(self, method: str, what: str, user: str, spec: JobSpec | None = None) -> RestResponse:
        """Ask about ``what`` (``jobs``, ``job/12``), again where the server was replaced by one of another version.

        Raises SlurmUnavailable.
        """
        for last in (False, True):
            version = await self.version(user)
            body = None if spec is None else encode(submission(spec, version))
            answer = await self.send(method, f"/slurm/{version.name}/{what}", user, body)
            # A job that is not known is a 404, too, but one with Slurm's words.
            if answer.status != 404 or answer.document or last:
                break
            self._version = None
        return answer

    async def send(self, method: str, path: str, user: str, body: bytes | None = None) -> RestResponse:
        """Send a request with the user's token, and once more with another one where that is refused."""
        token = await self._tokens.token(user)
        answer = await self.client.ask(method, path, user=user, token=token, body=body)
        # 22.05 does not say whether a job was made before it failed: it must not be submitted twice.
        if answer.refuses_token or (answer.may_refuse_token and body is None):
            another = await self._tokens.token(user, refused=token)
            if another != token:
                answer = await self.client.ask(method, path, user=user, token=another, body=body)
        return answer

    async def token(self, user: str, *, refused: str = "") -> str:
        """The user's token; another one than ``refused``, where there is another."""
        return await self._tokens.token(user, refused=refused)

    def unusable(self, answer: RestResponse, user: str) -> SlurmUnavailable:
        """The error for an answer that says nothing about any job."""
        said = error_text(answer.errors) or answer.excerpt or "nothing"
        text = f"{self.client} answered {answer.status}: {said}"
        if answer.refuses_token:
            text += f". It does not take {user}'s token: see SlurmService.rest_token_file and rest_token_command"
        elif answer.may_refuse_token:
            text += f". Either slurmctld is down, or {user}'s token has expired or is not valid"
        elif answer.status == 403:
            text += f". {user} may not do that"
        elif not answer.document:
            what = answer.content_type or "no content type"
            text += f". That is not slurmrestd's JSON ({what}): is SlurmService.cluster right, is a proxy in between?"
        return SlurmUnavailable(f"{text}. Nothing is known about the jobs", argv=["slurmrestd"], stderr=said)


class RestSlurm:
    """One user's way to Slurm. ``inside`` finds our launcher that holds a job, if it is linked to this process.

    Raises ValueError for a user whose name is none.
    """

    # A step in a job from outside needs srun; REST has none.
    can_adopt: Final = False

    def __init__(self, rest: Rest, user: str, *, inside: Callable[[str], InsideJob | None]) -> None:
        if not _USER.fullmatch(user):
            raise ValueError(f"{user[:64]!r} is not the name of a user")
        self.rest, self.user = rest, user
        self._inside = inside

    async def cluster_info(self) -> ClusterInfo:
        """Ask with one request."""
        document = self._good(await self.rest.ask("GET", "partitions", self.user))
        return ClusterInfo(version_in(document), partitions_in(document))

    async def submit(self, spec: JobSpec) -> str:
        """Submit with one request; where its answer says neither yes nor no the job is looked for by its comment.

        It is asked for again only where Slurm has answered, does not have the job, and the token was replaced since.
        """
        token = await self.rest.token(self.user)
        jobid, error, answered = await self._submit(spec)
        if jobid:
            return jobid
        found = await self._look_for(spec)
        if found:
            return found
        if found is not None and answered and await self.rest.token(self.user, refused=token) != token:
            jobid, error, _answered = await self._submit(spec)
        if not jobid and found is None:
            raise Unanswered(str(error), argv=error.argv) from error
        if not jobid:
            raise error
        return jobid

    async def _submit(self, spec: JobSpec) -> tuple[str, SlurmUnavailable, bool]:
        """Return the job's id, or why it is not known whether there is one, and whether the request was answered.

        Raises SubmitRefused, and SlurmUnavailable where it is known that there is none.
        """
        try:
            answer = await self.rest.ask("POST", "job/submit", self.user, spec)
        except SlurmUnavailable as error:
            return "", error, False
        if jobid := jobid_of(answer.document):
            # Beside errors, too: then it waits, "Requested partition configuration not available now".
            return jobid, SlurmUnavailable(""), True
        if answer.is_refusal:
            words = error_text(answer.errors)
            raise SubmitRefused(f"Slurm refused the job{spec.requested}: {words}", argv=["slurmrestd"], stderr=words)
        if answer.refuses_token or any(one.number == NO_CONTROLLER_ERROR for one in answer.errors):
            raise self.rest.unusable(answer, self.user)
        return "", self.rest.unusable(answer, self.user), bool(answer.errors)

    async def _look_for(self, spec: JobSpec) -> str | None:
        """The job with this comment, which no other has; empty if there is none, None if Slurm does not say."""
        for pause in LOOK_AFTER if spec.comment else ():
            await asyncio.sleep(pause)
            try:
                jobs = await self.find(spec.name)
            except SlurmUnavailable:
                continue
            return next((jobid for jobid, info in jobs.items() if info.comment == spec.comment), "")
        return None

    async def jobs(self, jobids: Collection[str]) -> dict[str, JobInfo]:
        """Ask about a few one by one, and about more by one list of all jobs."""
        wanted = dict.fromkeys(map(_checked, jobids))
        if not wanted:
            return {}
        if len(wanted) > FEW:
            return {jobid: info for jobid, info in (await self._all()).items() if jobid in wanted}
        answers = await asyncio.gather(*map(self._one, wanted), return_exceptions=True)
        found: dict[str, JobInfo] = {}
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            found.update(answer)
        return found

    async def _one(self, jobid: str) -> dict[str, JobInfo]:
        """The job, or an array's tasks, or a heterogeneous job's components; none where Slurm does not know it."""
        answer = await self.rest.ask("GET", f"job/{jobid}", self.user)
        if any(one.number == UNKNOWN_JOB_ERROR for one in answer.errors):
            return {}
        found = jobs_in(self._good(answer))
        if not found:
            # It was asked for one job: an answer without any and without a reason says nothing.
            raise self.rest.unusable(answer, self.user)
        return found

    async def _all(self) -> dict[str, JobInfo]:
        document = self._good(await self.rest.ask("GET", "jobs", self.user))
        # In a thread: of 10,000 jobs it takes as long as a kernel's start.
        return await asyncio.to_thread(jobs_in, document)

    def _good(self, answer: RestResponse) -> Any:
        if not answer.is_good:
            raise self.rest.unusable(answer, self.user)
        return answer.document

    async def find(self, name: str) -> dict[str, JobInfo]:
        """Ask for all jobs and choose: the interface has no question for a user's, or by name."""
        return {
            jobid: info
            for jobid, info in (await self._all()).items()
            if info.name == name and info.user == self.user and info.meaning is not Meaning.OVER
        }

    async def queue_positions(self, partitions: Collection[str]) -> dict[str, int]:
        """Return nothing: places are not known, and the list of all jobs at every look would be too much to ask."""
        return {}

    async def describe(self, jobid: str) -> JobInfo:
        """Ask for one job; array tasks and heterogeneous jobs are refused with the reason."""
        if not _JOBID.fullmatch(jobid):
            raise AllocationError(
                f"job {jobid} is a task of an array or a component of a heterogeneous job, which cannot be adopted yet",
                jobid=jobid,
            )
        return plain_job(jobid, await self.jobs([jobid]))

    async def cancel(self, jobid: str) -> None:
        """End the job; slurmrestd sends SIGKILL by way of slurmctld, so what runs gets SIGTERM first (KillWait)."""
        answer = await self.rest.ask("DELETE", f"job/{_checked(jobid)}", self.user)
        if answer.is_good or any(one.number in (UNKNOWN_JOB_ERROR, ALREADY_DONE_ERROR) for one in answer.errors):
            return
        if not answer.is_refusal:
            raise self.rest.unusable(answer, self.user)
        words = error_text(answer.errors)
        raise SlurmError(f"job {jobid} could not be cancelled: {words}", argv=["slurmrestd"], stderr=words)

    async def steps(self, jobid: str) -> list[StepInfo]:
        """Have our launcher in the job list them; without one they are not known, but of a job that waits."""
        inside = self._inside(jobid)
        if inside is None:
            info = (await self.jobs([jobid])).get(jobid)
            if info is not None and info.meaning in (Meaning.WAITING, Meaning.HELD):
                return []
            raise StepsUnknown(
                f"which steps run in job {jobid} is not known: Slurm's REST interface does not tell, and no launcher "
                "of this server is in it to ask"
            )
        return await inside.listed(jobid)

    async def start_step(self, spec: StepSpec) -> StepProcess:
        """Have our launcher in the job start it."""
        inside = self._inside(spec.jobid)
        if inside is None:
            raise not_adoptable(spec.jobid)
        return await inside.start(spec)


def _checked(jobid: str) -> str:
    if not _JOBID.fullmatch(jobid):
        raise UnknownJob(f"{jobid[:200]!r} is no Slurm job id that the REST interface takes")
    return jobid
