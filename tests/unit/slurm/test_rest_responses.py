"""slurmrestd's answers in the shapes of each version, as its documentation gives them.

Those of v0.0.38 and v0.0.40 to v0.0.45 were seen from slurmrestd 22.05, 24.11 and 26.05; v0.0.39's are as documented.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.slurm.rest.responses import (
    ReportedError,
    error_text,
    exit_of,
    jobid_of,
    jobs_in,
    number,
    reported_errors,
    state_of,
)
from gateway_slurm.slurm.rest.versions import VERSIONS


def struct(value: int, *, is_set: bool = True, infinite: bool = False) -> dict[str, Any]:
    """A number in the shape of v0.0.39 and later."""
    return {"set": is_set, "infinite": infinite, "number": value}


TEXTS = {
    "account": "demo",
    "comment": "gateway_slurm:gs-1",
    "job_id": 12,
    "name": "gateway_slurm",
    "nodes": "c[1-2]",
    "partition": "batch",
    "state_reason": "None",
    "user_name": "ann",
}
PLAIN = {
    **TEXTS,
    "array_job_id": 0,
    "array_task_id": None,
    "het_job_id": 0,
    "het_job_offset": 0,
    "end_time": 1700000420,
    "exit_code": 0,
    "job_state": "RUNNING",
    "start_time": 1700000000,
    "submit_time": 1699999999,
    "time_limit": 7,
}
# v0.0.39: times are plain numbers still, the state is a text, the exit code a status.
STRUCTS = {
    **PLAIN,
    "array_job_id": struct(0),
    "array_task_id": struct(0, is_set=False),
    "het_job_id": struct(0),
    "het_job_offset": struct(0),
    "exit_code": struct(0),
    "time_limit": struct(7),
}
LISTS = {
    **STRUCTS,
    "end_time": struct(1700000420),
    "start_time": struct(1700000000),
    "submit_time": struct(1699999999),
    "job_state": ["RUNNING"],
    "exit_code": {
        "status": ["SUCCESS"],
        "return_code": struct(0),
        "signal": {"id": struct(0, is_set=False), "name": ""},
    },
}
RECORDED = {"v0.0.38": PLAIN, "v0.0.39": STRUCTS}
JOB = JobInfo(
    jobid="12",
    display_id="12",
    state="RUNNING",
    nodes="c[1-2]",
    user="ann",
    partition="batch",
    account="demo",
    name="gateway_slurm",
    comment="gateway_slurm:gs-1",
    submit_time=1699999999,
    start_time=1700000000,
    end_time=1700000420,
    time_limit=7,
)


@pytest.mark.parametrize("version", [version.name for version in VERSIONS])
def test_a_running_job(version: str) -> None:
    """The same job gives the same value in all versions."""
    assert jobs_in({"jobs": [RECORDED.get(version, LISTS)]}) == {"12": JOB}


def wait_status(code: int, signal: int) -> dict[str, Any]:
    """A job's exit code in the shape of v0.0.40 and later."""
    ended = struct(code, is_set=not signal)
    return {"status": ["SIGNALED" if signal else "ERROR"], "return_code": ended, "signal": {"id": struct(signal)}}


@pytest.mark.parametrize(
    ("told", "code", "signal"),
    [
        (0, 0, None),
        (3 << 8, 3, None),
        (9, 0, 9),
        (struct(3 << 8), 3, None),
        (struct(0, is_set=False), None, None),
        (wait_status(3, 0), 3, None),
        (wait_status(0, 15), 0, 15),
        ({"return_code": struct(1), "signal": {"signal_id": struct(0)}}, 1, None),
        ({"status": ["PENDING"], "return_code": struct(0, is_set=False)}, None, None),
        (None, None, None),
        ("?", None, None),
    ],
)
def test_how_a_job_ended(told: object, code: int | None, signal: int | None) -> None:
    """The exit code is a wait(2) status, or its parts."""
    assert exit_of(told) == (code, signal)


@pytest.mark.parametrize(
    ("told", "state", "meaning"),
    [
        ("RUNNING", "RUNNING", Meaning.USABLE),
        ("CANCELLED", "CANCELLED", Meaning.OVER),
        (["PENDING"], "PENDING", Meaning.WAITING),
        (["RUNNING", "COMPLETING"], "COMPLETING", Meaning.ENDING),
        (["COMPLETING", "CANCELLED"], "COMPLETING", Meaning.ENDING),
        (["RUNNING", "CONFIGURING"], "CONFIGURING", Meaning.WAITING),
        (["PENDING", "REQUEUE_HOLD"], "REQUEUE_HOLD", Meaning.HELD),
        (["RUNNING", "UPDATE_DB"], "RUNNING", Meaning.USABLE),
        (["SOMETHING_NEW"], "SOMETHING_NEW", Meaning.UNKNOWN),
        ([], "", Meaning.UNKNOWN),
        (None, "", Meaning.UNKNOWN),
    ],
)
def test_states(told: object, state: str, meaning: Meaning) -> None:
    """A more specific state precedes the base state, as in squeue; an unknown state never means dead."""
    assert state_of(told) == state
    assert jobs_in({"jobs": [{**LISTS, "job_state": told}]})["12"].meaning is meaning


@pytest.mark.parametrize(
    ("told", "value"),
    [
        (7, 7.0),
        (7.5, 7.5),
        (struct(7), 7.0),
        (struct(7, is_set=False), None),
        (struct(0, infinite=True), None),
        (None, None),
        ("Infinity", None),
        (True, None),
        (0xFFFFFFFE, None),
        (0xFFFFFFFF, None),
        (float("inf"), None),
        (float("nan"), None),
        ({"set": True, "number": {}}, None),
    ],
)
def test_numbers(told: object, value: float | None) -> None:
    """Each shape of a number, and each shape of its absence."""
    assert number(told) == value


@pytest.mark.parametrize(
    ("fields", "display"),
    [
        ({"array_job_id": 12, "array_task_id": 3}, "12_3"),
        ({"array_job_id": struct(12), "array_task_id": struct(3)}, "12_3"),
        (
            {"array_job_id": struct(12), "array_task_id": struct(0, is_set=False), "array_task_string": "1-2"},
            "12_[1-2]",
        ),
        ({"het_job_id": struct(12), "het_job_offset": struct(0)}, "12+0"),
        ({}, "12"),
    ],
)
def test_arrays_and_components_are_told_from_plain_jobs(fields: dict[str, object], display: str) -> None:
    """Their display ids are those of squeue."""
    info = jobs_in({"jobs": [{**LISTS, **fields}]})["12"]
    assert info.display_id == display
    assert info.is_component == (display != "12")


@pytest.mark.parametrize("answer", [{}, {"jobs": {}}, {"jobs": [1]}, {"jobs": [{"job_id": None}]}, {"jobs": [{}]}])
def test_what_cannot_be_read_says_nothing(answer: dict[str, Any]) -> None:
    """Without a list, or with a job without an id, nothing is known about any job."""
    with pytest.raises(SlurmUnavailable):
        jobs_in(answer)


@given(
    some.dictionaries(
        some.sampled_from(sorted(LISTS)),
        some.recursive(
            some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=5),
            lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=6), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_any_answer_is_a_job_or_an_error(fields: dict[str, Any]) -> None:
    """Any fields give a value or SlurmUnavailable."""
    try:
        found = jobs_in({"jobs": [{**LISTS, **fields}]})
    except SlurmUnavailable:
        return
    assert all(isinstance(info, JobInfo) for info in found.values())


def test_errors_of_each_version() -> None:
    """The number is in error_number or error_code, and the text in error, description, or both."""
    old = {"error_code": 2000, "error": "Invalid partition name specified"}
    new = {
        "description": "Batch job submission failed",
        "error_number": 2000,
        "error": "Invalid partition name specified",
        "source": "slurm_submit_batch_job()",
    }
    found = reported_errors({"errors": [old, new, {"description": "Unknown key"}, {}, "?"]})
    assert found == [
        ReportedError(2000, "Invalid partition name specified"),
        ReportedError(2000, "Batch job submission failed: Invalid partition name specified"),
        ReportedError(0, "Unknown key"),
        ReportedError(0, "error 0"),
    ]
    assert error_text(found[:1]) == "Invalid partition name specified"
    assert reported_errors({"errors": None}) == []
    of_jobs = {"status": [{"error": {"code": 0}}, {"error": {"code": 2002, "string": "Access/permission denied"}}, "?"]}
    assert reported_errors(of_jobs) == [ReportedError(2002, "Access/permission denied")]


def test_the_id_of_a_submitted_job() -> None:
    """The id is a number; other values count as no id."""
    assert jobid_of({"job_id": 12, "step_id": "batch"}) == "12"
    assert jobid_of({"job_id": struct(12)}) == "12"
    assert [jobid_of(one) for one in ({}, {"job_id": 0}, {"job_id": "x"}, {"job_id": True})] == [""] * 4
