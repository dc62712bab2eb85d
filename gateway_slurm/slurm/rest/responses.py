"""What slurmrestd answers, read into values: pure.

Fields are read by their shape, whatever version was asked for: slurmrestd's own options (``-d v0.0.41+complex``)
change shapes within a version. What cannot be read is SlurmUnavailable: nothing is known then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.slurm.formats import STATES, Meaning, meaning
from gateway_slurm.slurm.model import JobInfo

# Numbers of slurm_errno.h.
UNKNOWN_JOB_ERROR: Final = 2017
ALREADY_DONE_ERROR: Final = 2021
NO_CONTROLLER_ERROR: Final = 1800  # no connection to it was made: it was told nothing
NOT_AUTHENTICATED_ERROR: Final = 1007
UNSPECIFIED_ERROR: Final = -1
ZERO_BYTES_ERROR: Final = 5005
# No number of Slurm's: what slurm_kill_jobs(), which cancels from 24.05 on, makes of a controller that is down.
NOT_PERMITTED_ERROR: Final = 1

_LARGEST: Final = 0xFFFFFFFD  # above: INFINITE and NO_VAL, where a field has no other way to say so
_SHOWN: Final = 2000
# The states that job_state_base gives; what else a list of states holds says more than these.
_BASE: Final = (
    "PENDING", "RUNNING", "SUSPENDED", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED",
    "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
)  # fmt: skip


@dataclass(frozen=True)
class ReportedError:
    """One of an answer's ``errors``: Slurm's number for it, 0 where there is none, and its words."""

    number: int
    words: str


def reported_errors(document: Mapping[str, Any]) -> list[ReportedError]:
    """Return an answer's ``errors``, and those of each job that was to be cancelled.

    From 24.05 on a job that cannot be cancelled is not in ``errors``: the answer is a 200 with a ``status`` for each.
    """
    told = [item.get("error") for item in _dicts(document.get("status"))]
    return [
        *(_problem(item) for item in _dicts(document.get("errors"))),
        *(_problem(item) for item in _dicts(told) if item.get("code")),
    ]


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


# Where the versions have Slurm's error number (slurm_errno.h).
ERROR_NUMBER_FIELDS = ("error_number", "error_code", "errno", "code")


def _problem(item: Mapping[str, Any]) -> ReportedError:
    number = next((item[key] for key in ERROR_NUMBER_FIELDS if isinstance(item.get(key), int)), 0)
    error, description = _plain(item.get("error") or item.get("string")), _plain(item.get("description"))
    words = error if description in ("", error) else description if error in description else f"{description}: {error}"
    return ReportedError(number, words[:_SHOWN] or f"error {number}")


def error_text(found: Sequence[ReportedError]) -> str:
    """Return all that Slurm said."""
    return "; ".join(problem.words for problem in found)[:_SHOWN]


def jobid_of(document: Mapping[str, Any]) -> str:
    """Return the id of a submitted job; empty where the answer names none."""
    jobid = number(document.get("job_id"))
    return str(int(jobid)) if jobid else ""


def jobs_in(document: Mapping[str, Any]) -> dict[str, JobInfo]:
    """Return an answer's ``jobs`` by job id. Raises SlurmUnavailable for what is no list of jobs."""
    listed = document.get("jobs")
    if not isinstance(listed, list):
        raise SlurmUnavailable("slurmrestd's answer has no list of jobs in it; nothing is known about the jobs")
    found = [_job_info(item) for item in listed]
    return {info.jobid: info for info in found}


def _job_info(job: object) -> JobInfo:
    jobid = number(job.get("job_id")) if isinstance(job, dict) else None
    if not isinstance(job, dict) or not jobid:
        raise SlurmUnavailable(f"slurmrestd lists a job without an id: {str(job)[:200]!r}")
    state = state_of(job.get("job_state"))
    code, signal = exit_of(job.get("exit_code")) if meaning(state) in (Meaning.OVER, Meaning.ENDING) else (None, None)
    limit = number(job.get("time_limit"))
    return JobInfo(
        jobid=str(int(jobid)),
        display_id=_display_id(job, int(jobid)),
        state=state,
        reason=_plain(job.get("state_reason")),
        nodes=_plain(job.get("nodes")),
        user=_plain(job.get("user_name")),
        partition=_plain(job.get("partition")),
        account=_plain(job.get("account")),
        submit_time=number(job.get("submit_time")) or None,
        start_time=number(job.get("start_time")) or None,
        end_time=number(job.get("end_time")) or None,
        time_limit=None if limit is None else int(limit),
        exit_code=code,
        exit_signal=signal,
        name=_text(job.get("name")),
        comment=_text(job.get("comment")),
    )


def number(value: object) -> float | None:
    """Read a number as any version writes it; None where there is none, or where it is infinite."""
    if isinstance(value, dict):
        if value.get("infinite") or value.get("set") is False:
            return None
        value = value.get("number")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
        return None
    return float(value)


def state_of(value: object) -> str:
    """Read a state: of a list, as squeue does, what says more than the base state (``COMPLETING``) goes first."""
    if isinstance(value, str):
        return value.strip()
    words = [word for word in value if isinstance(word, str)] if isinstance(value, list) else []
    known = [word for word in words if word in STATES]
    return next((word for word in known if word not in _BASE), (known or words or [""])[0])


def exit_of(value: object) -> tuple[int | None, int | None]:
    """Read how a job ended: exit code and signal, from wait(2)'s status or from its parts."""
    if isinstance(value, dict) and "return_code" in value:
        signal = value.get("signal")
        named = number(signal.get("id", signal.get("signal_id"))) if isinstance(signal, dict) else None
        code = number(value["return_code"])
        return (int(code) if code is not None else 0 if named else None), int(named) if named else None
    status = number(value)
    if status is None:
        return None, None
    return int(status) >> 8 & 0xFF, (int(status) & 0x7F) or None


def _display_id(job: Mapping[str, Any], jobid: int) -> str:
    """Name an array's task or a heterogeneous job's component, as squeue does."""
    array, task, het = (number(job.get(key)) for key in ("array_job_id", "array_task_id", "het_job_id"))
    if array:
        waiting = re.sub(r"[^0-9,%:-]", "", _text(job.get("array_task_string")))
        return f"{int(array)}_{int(task) if task is not None else f'[{waiting}]'}"
    if het:
        return f"{int(het)}+{int(number(job.get('het_job_offset')) or 0)}"
    return str(jobid)


def _text(value: object) -> str:
    return value if isinstance(value, str) and value != "(null)" else ""


def _plain(value: object) -> str:
    text = _text(value).strip()
    return "" if text in ("None", "N/A") else text
