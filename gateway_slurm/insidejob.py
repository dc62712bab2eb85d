"""Steps that a launcher starts on the server's word, inside the job that it holds: the server's end.

For ways to Slurm that cannot reach srun and squeue (``slurm.rest``). Lives on the service's loop.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any, Final

from gateway_slurm.errors import AllocationError, SlurmUnavailable
from gateway_slurm.link import steps, wire
from gateway_slurm.slurm import commands
from gateway_slurm.slurm.model import StepInfo, StepSpec

LISTING_SECONDS: Final = 30.0
"""Longer than a launcher gives squeue."""
STEP_CHARACTERS: Final = 100
NO_LAUNCHER: Final = "the launcher that holds the job is gone, and the steps that it started with it"


class InsideStep:
    """One step; ``StepProcess`` for whoever started it."""

    def __init__(self, step: str, jobid: str, send: Callable[..., bool]) -> None:
        self.step, self._jobid, self._send = step, jobid, send
        # Exit status and the last of what srun said; a status of None: the launcher is gone.
        self.over: asyncio.Future[tuple[int | None, str]] = asyncio.get_running_loop().create_future()

    async def wait(self) -> None:
        """Return when the step has ended well; raise what ``commands.parse_step_failure`` makes of it otherwise."""
        status, stderr = await asyncio.shield(self.over)
        if status is None:
            raise AllocationError(f"the step in job {self._jobid} failed: {stderr}", jobid=self._jobid)
        if status != 0:
            raise commands.parse_step_failure(status, stderr, jobid=self._jobid)

    def kill(self) -> None:
        """End the step."""
        self._send("STEP_END", step=self.step)


class StepsInside:
    """The steps of one launcher; ``send`` sends it a message, or returns False where there is no link."""

    def __init__(self, send: Callable[..., bool]) -> None:
        self._send = send
        self._steps: dict[str, InsideStep] = {}
        # Those that were asked for before the link that is there now: its REPORT knows them, or nobody does.
        self._doubtful: set[str] = set()
        self._listings: dict[str, asyncio.Future[tuple[int, str, str]]] = {}

    async def start(self, spec: StepSpec) -> InsideStep:
        """Have a step started. Raises AllocationError where that cannot be said, or not be done like this."""
        step = InsideStep(secrets.token_hex(8), spec.jobid, self._send)
        try:
            fields = steps.checked(step_fields(step.step, spec))
        except wire.WireError as error:
            raise AllocationError(f"no step is started in job {spec.jobid}: {error}", jobid=spec.jobid) from error
        self._steps[step.step] = step
        if not self._send("STEP", **fields):
            del self._steps[step.step]
            raise AllocationError(
                f"no step can be started in job {spec.jobid} now: the link to its launcher is down", jobid=spec.jobid
            )
        return step

    async def listed(self, jobid: str) -> list[StepInfo]:
        """The running steps of the job, as Slurm tells the launcher. Raises SlurmUnavailable."""
        asked = secrets.token_hex(8)
        answer = self._listings[asked] = asyncio.get_running_loop().create_future()
        try:
            if not self._send("LIST_STEPS", asked=asked):
                raise SlurmUnavailable(f"the steps of job {jobid} are not known: the link to its launcher is down")
            status, listed, stderr = await asyncio.wait_for(answer, LISTING_SECONDS)
        except asyncio.TimeoutError as error:
            raise SlurmUnavailable(
                f"the launcher in job {jobid} did not list its steps within {LISTING_SECONDS:g} s"
            ) from error
        finally:
            del self._listings[asked]
        if status != 0:
            raise SlurmUnavailable(
                f"the launcher in job {jobid} could not list its steps: {commands.slurm_words(stderr)[:1000]}"
            )
        found = steps.parse_steps(jobid, listed)
        return [StepInfo(stepid=stepid, user=user, nodes=nodes, name=name) for stepid, user, nodes, name in found]

    def message(self, name: str, fields: dict[str, Any]) -> None:
        """STEPPED or STEPS came."""
        if name == "STEPPED":
            self._ended(fields)
            return
        answer = self._listings.get(str(fields.get("asked")))
        if answer is not None and not answer.done():
            status, listed, stderr = fields.get("status"), str(fields.get("listed")), str(fields.get("stderr"))
            answer.set_result((status if isinstance(status, int) else 1, listed, stderr))

    def linked(self) -> None:
        """A new link is there; REPORT follows."""
        self._doubtful = set(self._steps)

    def reported(self, reports: list[dict[str, Any]]) -> None:
        """What the launcher knows: of the other steps the word was lost on the way."""
        # More than an honest one has: 256 that are under way, and those that have ended since the last link.
        for fields in reports[: 4 * steps.STEPS_LIMIT]:
            if fields.get("status") is not None:
                self._ended(fields)
        for step in self._doubtful - {str(fields.get("step")) for fields in reports}:
            self._finish(step, None, "its launcher knows nothing of it")

    def _ended(self, fields: dict[str, Any]) -> None:
        step, status = str(fields.get("step")), fields.get("status")
        if len(step) > STEP_CHARACTERS:
            return  # none that a server asked for
        self._finish(step, status if isinstance(status, int) else 1, str(fields.get("stderr")))
        self._send("STEP_SEEN", step=step)

    def _finish(self, step: str, status: int | None, stderr: str) -> None:
        found = self._steps.pop(step, None)
        if found is not None and not found.over.done():
            found.over.set_result((status, stderr))

    def gone(self) -> None:
        """The launcher is no more."""
        for step in list(self._steps):
            self._finish(step, None, NO_LAUNCHER)


def step_fields(step: str, spec: StepSpec) -> dict[str, Any]:
    """Return STEP's fields."""
    options = {
        "job-name": spec.name,
        "nodelist": spec.node,
        "mem": spec.memory,
        "cpus-per-task": spec.cpus and str(spec.cpus),
        "gres": ",".join(spec.gres),
    }
    return {
        "step": step,
        "exact": spec.exact,
        "options": {name: value for name, value in options.items() if value},
        "env": dict(spec.env),
        "script": spec.script,
    }
