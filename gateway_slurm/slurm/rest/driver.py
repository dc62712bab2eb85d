"""The driver for slurmrestd. REST has no job steps, so this server's launcher in a job starts and lists them.

A response counts only if it has a 2xx status, JSON and no errors. Any other response tells nothing about a job, except
"Invalid job id".
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

from gateway_slurm._util import is_user_name
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
from gateway_slurm.slurm.rest import responses
from gateway_slurm.slurm.rest.http import RestClient, RestResponse
from gateway_slurm.slurm.rest.tokens import Tokens
from gateway_slurm.slurm.rest.versions import Version, newest_known, offered_versions, submission

_log = logging.getLogger(__name__)

MAX_SINGLE_REQUESTS: Final = 8
"""Up to this number of jobs, the driver requests each job alone; the interface has no other request but for all jobs
of the cluster.
"""
LOOKUP_DELAYS: Final = (0.0, 1.0, 3.0)
"""Seconds before each lookup of a job whose submission got no answer."""
_JOBID: Final = re.compile(r"[1-9][0-9]{0,9}", re.ASCII)


class StepLauncher(Protocol):
    """A launcher of this server in a job, which starts and lists the job's steps."""

    async def start(self, spec: StepSpec) -> StepProcess: ...
    async def list_steps(self, jobid: str) -> list[StepInfo]:
        """Return the running steps of the launcher's job. Raises SlurmUnavailable."""


class Slurmrestd:
    """One slurmrestd, which all users share: the HTTP client, the users' tokens, and the API version.

    Its owner uses it on one loop and closes the client there.
    """

    def __init__(self, client: RestClient, tokens: Tokens) -> None:
        self.client, self.tokens = client, tokens
        self._version: Version | None = None
        self._version_lock = asyncio.Lock()

    async def version(self, user: str) -> Version:
        """Return the newest API version that both sides know; the server is asked once."""
        async with self._version_lock:
            if self._version is None:
                response = await self.send("GET", "/openapi/v3", user)
                if not response.document.get("paths"):
                    raise self.unusable(response, user)
                self._version = newest_known(offered_versions(response.document))
                _log.info("%s: using version %s", self.client, self._version.name)
            return self._version

    async def request(self, method: str, resource: str, user: str, spec: JobSpec | None = None) -> RestResponse:
        """Send a request for ``resource`` (``jobs``, ``job/12``) in the chosen API version.

        If the server no longer serves that version, the version is chosen again and the request repeated. Raises
        SlurmUnavailable.
        """
        for last in (False, True):
            version = await self.version(user)
            body = None if spec is None else json.dumps(submission(spec, version)).encode()
            response = await self.send(method, f"/slurm/{version.name}/{resource}", user, body)
            # For an unknown job slurmrestd also answers 404, but with a JSON document.
            if response.status != 404 or response.document or last:
                break
            self._version = None
        return response

    async def send(self, method: str, path: str, user: str, body: bytes | None = None) -> RestResponse:
        """Send a request with the user's token; if the token is refused, once more with another one."""
        token = await self.tokens.token(user)
        response = await self.client.request(method, path, user=user, token=token, body=body)
        # 22.05 does not tell whether it created the job before the error, and a job must not be submitted twice.
        if response.refuses_token or (response.may_refuse_token and body is None):
            another = await self.tokens.token(user, refused=token)
            if another != token:
                response = await self.client.request(method, path, user=user, token=another, body=body)
        return response

    def unusable(self, response: RestResponse, user: str) -> SlurmUnavailable:
        """Return the error for a response that tells nothing about any job."""
        message = responses.error_text(response.errors) or response.excerpt or "nothing"
        text = f"{self.client} answered {response.status}: {message}"
        if response.refuses_token:
            text += f". It refuses {user}'s token: see SlurmService.rest_token_file and rest_token_command"
        elif response.may_refuse_token:
            text += f". Either slurmctld is down, or {user}'s token has expired or is not valid"
        elif response.status == 403:
            text += f". {user} is not allowed to do this"
        elif not response.document:
            text += (
                f". This is not slurmrestd's JSON ({response.content_type or 'no content type'}): check "
                "SlurmService.cluster, and whether a proxy answered"
            )
        return SlurmUnavailable(f"{text}. Nothing is known about the jobs", argv=["slurmrestd"], stderr=message)


class RestDriver:
    """One user's access to Slurm. ``find_launcher`` returns this server's launcher in a job if it is linked.

    Raises ValueError for text that is not a user's name.
    """

    # A step in a job from outside the job needs srun.
    can_adopt: Final = False
    is_local: Final = False

    def __init__(self, rest: Slurmrestd, user: str, *, find_launcher: Callable[[str], StepLauncher | None]) -> None:
        if not is_user_name(user):
            raise ValueError(f"{user[:64]!r} is not the name of a user")
        self.rest, self.user = rest, user
        self._find_launcher = find_launcher

    async def cluster_info(self) -> ClusterInfo:
        document = self._document(await self.rest.request("GET", "partitions", self.user))
        return ClusterInfo(version_in(document), partitions_in(document))

    async def submit(self, spec: JobSpec) -> str:
        """Send one request. If the response neither accepts nor refuses the job, look the job up by its comment.

        The job is submitted again only if Slurm answers, does not have the job, and the token was replaced meanwhile.
        """
        token = await self.rest.tokens.token(self.user)
        jobid, error, answered = await self._submit(spec)
        if jobid:
            return jobid
        found = await self._look_up(spec)
        if found:
            return found
        if found is None:
            raise Unanswered(str(error), argv=error.argv) from error
        if answered and await self.rest.tokens.token(self.user, refused=token) != token:
            jobid, error, _answered = await self._submit(spec)
        if not jobid:
            raise error
        return jobid

    async def _submit(self, spec: JobSpec) -> tuple[str, SlurmUnavailable, bool]:
        """Return the job's id, or else the error that leaves open whether the job exists; and if Slurm answered.

        Raises SubmitRefused, and SlurmUnavailable if the job certainly does not exist.
        """
        try:
            response = await self.rest.request("POST", "job/submit", self.user, spec)
        except SlurmUnavailable as error:
            return "", error, False
        if jobid := responses.jobid_of(response.document):
            # A job id may come with an error; the job is pending then ("Requested partition configuration not
            # available now").
            return jobid, SlurmUnavailable(""), True
        if response.is_refusal:
            text = responses.error_text(response.errors)
            raise SubmitRefused(f"Slurm refused the job{spec.requested}: {text}", argv=["slurmrestd"], stderr=text)
        if response.refuses_token or response.reports(responses.NO_CONTROLLER_ERROR):
            raise self.rest.unusable(response, self.user)
        return "", self.rest.unusable(response, self.user), bool(response.errors)

    async def _look_up(self, spec: JobSpec) -> str | None:
        """Return the job with this unique comment; empty if there is none, None if Slurm does not answer."""
        for delay in LOOKUP_DELAYS if spec.comment else ():
            await asyncio.sleep(delay)
            try:
                jobs = await self.find(spec.comment)
            except SlurmUnavailable:
                continue
            return next((jobid for jobid, info in jobs.items() if info.comment == spec.comment), "")
        return None

    async def jobs(self, jobids: Collection[str]) -> dict[str, JobInfo]:
        """Request a few jobs one by one, and more jobs by the list of all jobs."""
        wanted = dict.fromkeys(map(_checked_jobid, jobids))
        if not wanted:
            return {}
        if len(wanted) > MAX_SINGLE_REQUESTS:
            return {jobid: info for jobid, info in (await self._all_jobs()).items() if jobid in wanted}
        results = await asyncio.gather(*map(self._single_job, wanted), return_exceptions=True)
        found: dict[str, JobInfo] = {}
        for result in results:
            if isinstance(result, BaseException):
                raise result
            found |= result
        return found

    async def _single_job(self, jobid: str) -> dict[str, JobInfo]:
        """Return the job, or an array's tasks, or a heterogeneous job's components; empty for an unknown job."""
        response = await self.rest.request("GET", f"job/{jobid}", self.user)
        if response.reports(responses.UNKNOWN_JOB_ERROR):
            return {}
        found = responses.jobs_in(self._document(response))
        if not found:
            # A response for one job with neither a job nor an error tells nothing.
            raise self.rest.unusable(response, self.user)
        return found

    async def _all_jobs(self) -> dict[str, JobInfo]:
        document = self._document(await self.rest.request("GET", "jobs", self.user))
        # In a thread: 10,000 jobs take as long as a kernel's start.
        return await asyncio.to_thread(responses.jobs_in, document)

    def _document(self, response: RestResponse) -> Any:
        """Return a successful response's document. Raises SlurmUnavailable."""
        if not response.is_success:
            raise self.rest.unusable(response, self.user)
        return response.document

    async def find(self, comment: str) -> dict[str, JobInfo]:
        """Request all jobs and filter them: the interface has no request by user or comment."""
        return {
            jobid: info
            for jobid, info in (await self._all_jobs()).items()
            if info.comment.startswith(comment) and info.user == self.user and info.meaning is not Meaning.OVER
        }

    async def queue_positions(self, partitions: Collection[str]) -> dict[str, int]:
        """Return nothing: the positions would need the list of all jobs at every poll, which is too large."""
        return {}

    async def describe(self, jobid: str) -> JobInfo:
        if not _JOBID.fullmatch(jobid):
            raise AllocationError(
                f"job {jobid} is a task of an array or a component of a heterogeneous job, which cannot be adopted yet",
                jobid=jobid,
            )
        return plain_job(jobid, await self.jobs([jobid]))

    async def cancel(self, jobid: str) -> None:
        """End the job. slurmrestd requests SIGKILL from slurmctld, which sends SIGTERM first (KillWait)."""
        response = await self.rest.request("DELETE", f"job/{_checked_jobid(jobid)}", self.user)
        if response.is_success or response.reports(responses.UNKNOWN_JOB_ERROR, responses.ALREADY_DONE_ERROR):
            return
        if not response.is_refusal:
            raise self.rest.unusable(response, self.user)
        text = responses.error_text(response.errors)
        raise SlurmError(f"job {jobid} could not be cancelled: {text}", argv=["slurmrestd"], stderr=text)

    async def steps(self, jobid: str) -> list[StepInfo]:
        """Ask this server's launcher in the job. Without a launcher only the steps of a pending job are known: none."""
        launcher = self._find_launcher(jobid)
        if launcher is None:
            info = (await self.jobs([jobid])).get(jobid)
            if info is not None and info.is_waiting:
                return []
            raise StepsUnknown(
                f"the steps of job {jobid} are not known: Slurm's REST interface does not list them, and no launcher "
                "of this server runs in the job"
            )
        return await launcher.list_steps(jobid)

    async def start_step(self, spec: StepSpec) -> StepProcess:
        launcher = self._find_launcher(spec.jobid)
        if launcher is None:
            raise not_adoptable(spec.jobid)
        return await launcher.start(spec)


def _checked_jobid(jobid: str) -> str:
    if not _JOBID.fullmatch(jobid):
        raise UnknownJob(f"{jobid[:200]!r} is not a Slurm job id for the REST interface")
    return jobid
