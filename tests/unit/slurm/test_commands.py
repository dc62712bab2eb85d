"""Slurm's command lines and output; the texts are Slurm 22.05's own."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_slurm.errors import (
    AllocationEnded,
    AllocationError,
    GatewaySlurmError,
    LauncherFailed,
    SlurmError,
    SlurmUnavailable,
    SubmitRefused,
    UnknownJob,
)
from gateway_slurm.slurm import commands
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import JobSpec, StepInfo, StepSpec

MARK = "mab12"
SEP = "\x1f" + MARK

NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
NO_MUNGE = """\
sbatch: error: If munged is up, restart with --num-threads=10
sbatch: error: Munge encode failed: Failed to access "/run/m.sock": No such file (Did you start munged?)
sbatch: error: slurm_send_node_msg: auth_g_create: REQUEST_SUBMIT_BATCH_JOB has authentication error
sbatch: error: Batch job submission failed: Protocol authentication error
"""
TIMED_OUT = "squeue: error: slurm_receive_msg: Socket timed out on send/recv operation\n"
INVALID_ID = "slurm_load_jobs error: Invalid job id specified\n"
BAD_PARTITION = """\
sbatch: error: invalid partition specified: nope
sbatch: error: Batch job submission failed: Invalid partition name specified
"""


def row(*fields: str) -> str:
    """One job or step as squeue prints it."""
    return "".join(field + SEP for field in fields) + "\n"


RUNNING = row(
    "20", "20", "RUNNING", "None", "c[1-2]", "root", "batch", "(null)",
    "1795475990", "1795475998", "1795477798", "29:30", "30:00", "0", "we|ird\nname \x1f \x1e é,:", "com\nment",
)  # fmt: skip
PENDING = row(
    "3",
    "3",
    "PENDING",
    "JobHeldUser",
    "",
    "root",
    "off",
    "acc",
    "1795475990",
    "N/A",
    "N/A",
    "UNLIMITED",
    "UNLIMITED",
    "0",
    "n",
    "(null)",
)
FAILED = row(
    "4", "4", "FAILED", "NonZeroExitCode", "c1", "root", "batch", "(null)",
    "1795475990", "1795475998", "1795475999", "59:59", "1:00:00", "768", "sbatch", "(null)",
)  # fmt: skip
HETERO = row(
    "22",
    "21+1",
    "PENDING",
    "None",
    "",
    "root",
    "batch",
    "(null)",
    "1795475990",
    "N/A",
    "N/A",
    "1:00:00",
    "1:00:00",
    "0",
    "sbatch",
    "(null)",
)


def test_submit_command() -> None:
    """Each value is bound to its option by =, unset options are left out, and no argument holds a secret."""
    spec = JobSpec(
        name="--wrap=id; $(id)",
        script="#!/bin/sh\n",
        comment="a 'b'\nc",
        partition="batch",
        account="acc",
        nodes=2,
        time=30,
        gres=["gpu:1", "shard:2"],
        signal_seconds=600,
        env={"TOKEN": "hunter2"},
        extra=["--exclusive"],
    )
    argv = commands.submit_command(spec)
    assert argv[:3] == ["sbatch", "--parsable", "--no-requeue"]
    assert all(item.startswith("--") for item in argv[1:])
    assert {
        "--job-name=--wrap=id; $(id)",
        "--nodes=2",
        "--time=30",
        "--gres=gpu:1,shard:2",
        "--signal=B:USR1@600",
    } <= set(argv)
    assert not [item for item in argv if item.startswith(("--qos", "--mem", "--constraint", "--reservation"))]
    assert "hunter2" not in " ".join(argv) + repr(spec)
    assert argv[-1] == "--exclusive"


@pytest.mark.parametrize(("stdout", "jobid"), [("123\n", "123"), ("123;cluster\n", "123"), ("hello\n7\n", "7")])
def test_parse_submit(stdout: str, jobid: str) -> None:
    """The job id is read with and without a federation's cluster, and after a site's greeting."""
    assert commands.parse_submit(0, stdout, "") == jobid


def test_submit_refused_in_slurms_words() -> None:
    """A refusal carries every line of Slurm's message."""
    with pytest.raises(SubmitRefused) as caught:
        commands.parse_submit(1, "", BAD_PARTITION)
    assert "invalid partition specified: nope" in str(caught.value)
    assert "Batch job submission failed: Invalid partition name specified" in str(caught.value)
    assert caught.value.stderr == BAD_PARTITION
    assert caught.value.exit_status == 1


@pytest.mark.parametrize("stderr", [NO_CONTROLLER, NO_MUNGE, TIMED_OUT])
def test_submit_unavailable(stderr: str) -> None:
    """A controller or munge that is down does not refuse the job."""
    with pytest.raises(SlurmUnavailable):
        commands.parse_submit(1, "", stderr)


@pytest.mark.parametrize("stdout", ["", "Submitted batch job 5", "-1", "1 2"])
def test_submit_without_an_id(stdout: str) -> None:
    """A success without a job id leaves open whether the job exists."""
    with pytest.raises(SlurmUnavailable):
        commands.parse_submit(0, stdout, "")


def test_jobs_command() -> None:
    """One squeue requests all jobs; text that is not a job id is never passed on."""
    argv = commands.jobs_command(["1", "12_3"], mark=MARK)
    assert argv[:4] == ["squeue", "--states=all", "--noheader", "--jobs=1,12_3"]
    for bad in ("", "1,2", "-1", "1;2", "abc", "1\n"):
        with pytest.raises(UnknownJob):
            commands.jobs_command([bad])


def test_parse_jobs() -> None:
    """Every field is read, with any bytes in a job's name and comment."""
    jobs = commands.parse_jobs(0, RUNNING + PENDING + FAILED, "", mark=MARK)
    assert list(jobs) == ["20", "3", "4"]
    running = jobs["20"]
    assert (running.name, running.comment) == ("we|ird\nname \x1f \x1e é,:", "com\nment")
    assert (running.start_time, running.end_time, running.time_limit) == (1795475998.0, 1795477798.0, 30)
    assert (running.clock, jobs["3"].clock, jobs["4"].clock) == (1795476028.0, None, None)
    assert running.by_clock(1795476028.0 + 9) is running
    a_day_on = running.by_clock(1795476028.0 + 86400)
    assert (a_day_on.start_time, a_day_on.end_time) == (1795475998.0 + 86400, 1795477798.0 + 86400)
    assert (running.nodes, running.account, running.reason) == ("c[1-2]", "", "")
    assert (running.exit_code, running.meaning) == (None, Meaning.USABLE)
    assert (jobs["3"].start_time, jobs["3"].time_limit, jobs["3"].comment) == (None, None, "")
    assert jobs["3"].reason == "JobHeldUser"
    assert (jobs["4"].exit_code, jobs["4"].exit_signal, jobs["4"].end_time) == (3, None, 1795475999.0)


def test_a_name_cannot_forge_another_job() -> None:
    """A job whose name looks like squeue's answer for another job changes nothing about that job."""
    forged = FAILED.replace(SEP, "\x1fmother")
    jobs = commands.parse_jobs(0, RUNNING.replace("we|ird", forged) + PENDING, "", mark=MARK)
    assert list(jobs) == ["20", "3"]


def test_components_are_known_as_such() -> None:
    """A component of a heterogeneous job keeps its whole id and is marked as a component."""
    jobs = commands.parse_jobs(0, HETERO, "", mark=MARK)
    assert jobs["22"].is_component
    assert not commands.parse_jobs(0, RUNNING, "", mark=MARK)["20"].is_component


def test_jobs_unknown() -> None:
    """A healthy controller that does not know the only requested job gives an empty result."""
    assert commands.parse_jobs(1, "", INVALID_ID) == {}
    assert commands.parse_jobs(0, "", "") == {}


@pytest.mark.parametrize(
    ("status", "stdout", "stderr"),
    [
        (1, "", NO_CONTROLLER), (1, "", NO_MUNGE), (1, "", TIMED_OUT), (1, "", ""), (-9, RUNNING, ""),
        (0, "", NO_CONTROLLER), (1, "", INVALID_ID + NO_CONTROLLER), (0, "rubbish", ""),
        (0, RUNNING[:40], ""),
        (0, row(*"x" * 15), ""), (0, RUNNING + "x", ""), (0, row("1"), ""),
    ],
)  # fmt: skip
def test_jobs_unavailable(status: int, stdout: str, stderr: str) -> None:
    """Any other failure, and incomplete or unreadable output, means that the job is unknown, never that it ended."""
    with pytest.raises(SlurmUnavailable):
        commands.parse_jobs(status, stdout, stderr, mark=MARK)


@given(st.integers(-15, 255), st.text(max_size=80), st.text(max_size=80))
def test_parsers_raise_only_ours(status: int, stdout: str, stderr: str) -> None:
    """For any output, a parser returns a value or raises an error of this package."""
    for parse in (
        lambda: commands.parse_submit(status, stdout, stderr),
        lambda: commands.parse_jobs(status, stdout, stderr, mark=MARK),
        lambda: commands.parse_jobs(status, row(*stdout[:16].ljust(16)), stderr, mark=MARK),
        lambda: commands.parse_steps(status, stdout, stderr, jobid="1", mark=MARK),
        lambda: commands.parse_cancel(status, stderr),
    ):
        try:
            parse()
        except GatewaySlurmError as error:
            seen: GatewaySlurmError | None = error
        else:
            seen = None
        assert seen is None or str(seen)
    assert isinstance(commands.parse_step_failure(status, stderr), GatewaySlurmError)


TEXT = st.text(st.characters(codec="utf-8")).filter(lambda text: SEP not in text)


@given(name=TEXT, comment=TEXT)
def test_names_round_trip(name: str, comment: str) -> None:
    """Any name and any comment come back unchanged."""
    text = row("1", "1", "RUNNING", "None", "c1", "u", "p", "a", "0", "1", "2", "1", "3", "0", name, comment)
    info = commands.parse_jobs(0, text + PENDING, "", mark=MARK)["1"]
    assert info.name == name
    assert info.comment == ("" if comment == "(null)" else comment)


@pytest.mark.parametrize(
    ("status", "stderr"),
    [
        (0, ""),
        (1, "scancel: error: Kill job error on job id 99999: Invalid job id specified\n"),
        (1, "scancel: error: Kill job error on job id 4: Job/step already completing or completed\n"),
    ],
)
def test_cancel_is_idempotent(status: int, stderr: str) -> None:
    """Cancelling a finished job succeeds."""
    commands.parse_cancel(status, stderr)
    assert commands.cancel_command("4") == ["scancel", "4"]


def test_cancel_fails_in_slurms_words() -> None:
    """A refusal carries Slurm's words; a controller that is down is another error."""
    with pytest.raises(SlurmError, match="Access/permission denied"):
        commands.parse_cancel(210, "scancel: error: Kill job error on job id 20: Access/permission denied\n")
    with pytest.raises(SlurmUnavailable):
        commands.parse_cancel(1, "scancel: error: Kill job error on job id 1: " + NO_CONTROLLER)


def test_steps() -> None:
    """Only the steps of this job are listed: 20 is neither 2 nor 200."""
    text = row("20.0", "root", "c2", "my step") + row("20.batch", "root", "c1", "batch") + row("200.0", "u", "c1", "x")
    steps = commands.parse_steps(0, text, "", jobid="20", mark=MARK)
    assert steps[0] == StepInfo(stepid="20.0", user="root", nodes="c2", name="my step")
    assert [step.number for step in steps] == ["0", "batch"]
    assert commands.parse_steps(0, text, "", jobid="2", mark=MARK) == []
    assert commands.parse_steps(1, "", INVALID_ID, jobid="20") == []
    with pytest.raises(SlurmUnavailable):
        commands.parse_steps(1, "", NO_CONTROLLER, jobid="20")


def test_step_command() -> None:
    """A step overlaps the others, and the request's values stay in their options."""
    argv = commands.step_command(StepSpec(jobid="20", name="a; id", script="x", node="c2"))
    assert argv[:3] == ["srun", "--overlap", "--jobid=20"]
    assert argv[-2:] == ["/bin/sh", "-s"]
    assert {"--nodelist=c2", "--job-name=a; id", "--propagate=NONE"} <= set(argv)
    exact = commands.step_command(StepSpec(jobid="20", name="n", script="x", exact=True, memory="0", gres=["gpu:1"]))
    assert {"--exact", "--mem=0", "--gres=gpu:1"} <= set(exact)
    assert "--overlap" not in exact


EXPIRED = "srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 20\n"


@pytest.mark.parametrize(
    ("stderr", "kind", "words"),
    [
        (
            f"srun: error: Unable to confirm allocation for job 20: Invalid job id specified\n{EXPIRED}",
            UnknownJob,
            "Invalid job id specified",
        ),
        (f"srun: error: Slurm job 20 has expired\n{EXPIRED}", AllocationEnded, "has expired"),
        (
            f"srun: error: Unable to confirm allocation for job 20: Job is pending execution\n{EXPIRED}",
            AllocationError,
            "Job is pending execution",
        ),
        (
            "srun: error: Unable to create step for job 20: Memory required by task is not available\n",
            AllocationError,
            "Memory required",
        ),
        (
            "srun: error: Unable to confirm allocation for job 20: Unable to contact slurm controller\n",
            SlurmUnavailable,
            "Unable to contact",
        ),
        ("srun: error: c1: task 0: Exited with exit code 127\n", LauncherFailed, "exit code 127"),
        (
            "srun: forcing job termination\n"
            "slurmstepd-c2: error: *** STEP 26.1 ON c2 CANCELLED AT 1795476963 ***\n"
            "srun: error: c2: task 0: Killed\n",
            AllocationError,
            "CANCELLED AT",
        ),
        (
            "slurmstepd: error: *** STEP 26.1 ON c2 CANCELLED AT 1795476963 DUE TO TIME LIMIT ***\n",
            AllocationEnded,
            "TIME LIMIT",
        ),
        ("", AllocationError, "printed no message"),
    ],
)
def test_step_failures(stderr: str, kind: type[GatewaySlurmError], words: str) -> None:
    """Each kind of failure of a step has its own error, in Slurm's words."""
    error = commands.parse_step_failure(1, stderr, jobid="20")
    assert type(error) is kind
    assert words in str(error)
    if isinstance(error, AllocationEnded) and "LIMIT" in words:
        assert error.state == "TIMEOUT"


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_values_stay_in_their_option(name: str) -> None:
    """No job name can become an option, not even through a shell."""
    argv = commands.submit_command(JobSpec(name=name, script=""))
    assert f"--job-name={name}" in argv
    assert shlex.split(shlex.join(argv)) == argv
