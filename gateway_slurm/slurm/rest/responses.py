"""slurmrestd's responses as values. All functions are pure.

A field is read by its shape, for any version: slurmrestd's options (``-d v0.0.41+complex``) change shapes within a
version. A response that cannot be read raises SlurmUnavailable: nothing is known about the jobs then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.slurm.formats import STATES, Meaning, meaning
from gateway_slurm.slurm.model import JobInfo

# Error numbers (slurm_errno.h).
UNKNOWN_JOB_ERROR: Final = 2017
ALREADY_DONE_ERROR: Final = 2021
NO_CONTROLLER_ERROR: Final = 1800  # the controller did not receive the request
NOT_AUTHENTICATED_ERROR: Final = 1007
UNSPECIFIED_ERROR: Final = -1
ZERO_BYTES_ERROR: Final = 5005
# Not in slurm_errno.h: slurm_kill_jobs(), which cancels from 24.05 on, reports it for a controller that is down.
NOT_PERMITTED_ERROR: Final = 1
ERROR_NUMBER_FIELDS: Final = ("error_number", "error_code", "errno", "code")
"""The fields in which the versions have the error number."""

_MAX_NUMBER: Final = 0xFFFFFFFD  # larger values are INFINITE and NO_VAL
_MAX_TEXT: Final = 2000  # characters
# The values of job_state_base. Another state in the same list is more specific.
_BASE_STATES: Final = (
    "PENDING", "RUNNING", "SUSPENDED", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED",
    "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
)  # fmt: skip


@dataclass(frozen=True)
class ReportedError:
    """One of a response's ``errors``: Slurm's error number (0 if it gives none) and its text."""

    number: int
    text: str


def reported_errors(document: Mapping[str, Any]) -> list[ReportedError]:
    """Return a response's ``errors``, and the errors of jobs that could not be cancelled.

    From 24.05 on, the latter are not in ``errors``: the response is a 200 with a ``status`` for each job.
    """
    statuses = [item.get("error") for item in _dicts(document.get("status"))]
    return [
        *(_reported_error(item) for item in _dicts(document.get("errors"))),
        *(_reported_error(item) for item in _dicts(statuses) if item.get("code")),
    ]


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _reported_error(item: Mapping[str, Any]) -> ReportedError:
    number = next((item[key] for key in ERROR_NUMBER_FIELDS if isinstance(item.get(key), int)), 0)
    error, description = _plain(item.get("error") or item.get("string")), _plain(item.get("description"))
    text = error if description in ("", error) else description if error in description else f"{description}: {error}"
    return ReportedError(number, text[:_MAX_TEXT] or f"error {number}")


def error_text(errors: Sequence[ReportedError]) -> str:
    """Return the texts of all errors."""
    return "; ".join(error.text for error in errors)[:_MAX_TEXT]


def jobid_of(document: Mapping[str, Any]) -> str:
    """Return the id of a submitted job; empty if the response has none."""
    jobid = number(document.get("job_id"))
    return str(int(jobid)) if jobid else ""


def jobs_in(document: Mapping[str, Any]) -> dict[str, JobInfo]:
    """Return a response's ``jobs`` by job id. Raises SlurmUnavailable if the response has no list of jobs."""
    jobs = document.get("jobs")
    if not isinstance(jobs, list):
        raise SlurmUnavailable("slurmrestd's response has no list of jobs; nothing is known about the jobs")
    infos = [_job_info(job) for job in jobs]
    return {info.jobid: info for info in infos}


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
    """Read a number in the shape of any version; None if it is missing or infinite."""
    if isinstance(value, dict):
        if value.get("infinite") or value.get("set") is False:
            return None
        value = value.get("number")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_MAX_NUMBER <= value <= _MAX_NUMBER:
        return None
    return float(value)


def state_of(value: object) -> str:
    """Read a state. In a list, a more specific state (``COMPLETING``) precedes the base state, as in squeue."""
    if isinstance(value, str):
        return value.strip()
    states = [state for state in value if isinstance(state, str)] if isinstance(value, list) else []
    known = [state for state in states if state in STATES]
    return next((state for state in known if state not in _BASE_STATES), (known or states or [""])[0])


def exit_of(value: object) -> tuple[int | None, int | None]:
    """Read a job's exit code and signal, from a wait(2) status or from its parts."""
    if isinstance(value, dict) and "return_code" in value:
        signal = value.get("signal")
        signal_id = number(signal.get("id", signal.get("signal_id"))) if isinstance(signal, dict) else None
        code = number(value["return_code"])
        return (int(code) if code is not None else 0 if signal_id else None), int(signal_id) if signal_id else None
    status = number(value)
    if status is None:
        return None, None
    return int(status) >> 8 & 0xFF, (int(status) & 0x7F) or None


def _display_id(job: Mapping[str, Any], jobid: int) -> str:
    """Return the id of an array task or of a heterogeneous job's component in squeue's form."""
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
