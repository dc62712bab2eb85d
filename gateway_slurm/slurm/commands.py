"""Slurm's command lines and their output: for each command a builder and a parser, both pure.

The parsers read text output with explicit formats. They do not use ``--json``, whose schema changed in 23.02, 23.11
and 24.05. The owner of a job chooses its name and comment, which may hold any byte, line ends included. So the caller
makes a random mark for each call, which separates the fields, and free text comes last. Every option is in
``--name=value`` form: no value can be read as an option. Job ids are compared whole.

Sources: sbatch(1), squeue(1), scancel(1), srun(1), scontrol(1), sinfo(1); outputs seen with Slurm 22.05, 24.11 and
26.05.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from gateway_slurm.errors import (
    AllocationEnded,
    AllocationError,
    GatewaySlurmError,
    LauncherFailed,
    SlurmError,
    SlurmUnavailable,
    SubmitRefused,
    Unanswered,
    UnknownJob,
)
from gateway_slurm.slurm.formats import Meaning, TimeFormatError, meaning, minutes, seconds
from gateway_slurm.slurm.model import JobInfo, JobSpec, Partition, StepInfo, StepSpec

# As Slurm prints it: 01 would be a second name of job 1.
_JOBID: Final = re.compile(r"[1-9][0-9]{0,9}(?:[_+](?:0|[1-9][0-9]{0,9}))?", re.ASCII)
_UNAVAILABLE: Final = re.compile(
    r"unable to contact slurm controller|socket timed out|zero bytes were transmitted|munge"
    r"|protocol authentication error|communication connection failure|connection (?:refused|timed out|reset)"
    r"|unable to process configuration file|configuration source|backup controller|in standby"
    r"|unable to establish|temporarily unable|resource temporarily unavailable|rate limit"
    r"|incompatible versions|message (?:receive|send) failure|unexpected message",
    re.IGNORECASE,
)
# The controller may have received the request and carried it out.
_UNANSWERED: Final = re.compile(
    r"socket timed out|zero bytes were transmitted|connection reset|unexpected message"
    r"|(?:send|receive|shutdown) failure",
    re.IGNORECASE,
)
# slurmstepd's words, with cgroups and where it watches the memory itself.
_MEMORY: Final = re.compile(r"oom[-_ ]kill|out[ -]of[ -]memory|exceeded \w+ memory limit", re.IGNORECASE)
_UNKNOWN_JOB: Final = re.compile(r"invalid job id", re.IGNORECASE)
_ALREADY_GONE: Final = re.compile(r"invalid job id|already completing or completed", re.IGNORECASE)
_PREFIX: Final = re.compile(
    r"^(?:sbatch|srun|scancel|squeue|slurm_load_jobs|slurmstepd)(?:: | )(?:error|fatal): ", re.M
)
_MAX_MESSAGE: Final = 4000  # characters
_SAME_LENGTH: Final = 5.0  # seconds
_NO_SIZE_LIMIT: Final = 0xFFFFFF00  # slurm.h has INFINITE and NO_VAL above it
_JOB_FIELDS: Final = (
    "JobID", "JobArrayID", "State", "Reason", "NodeList", "UserName", "Partition", "Account",
    "SubmitTime", "StartTime", "EndTime", "TimeLeft", "TimeLimit", "exit_code", "Name", "Comment",
)  # fmt: skip
_STEP_FIELDS: Final = ("StepID", "UserName", "Nodes", "StepName")
_STEP_END_STATES: Final = {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL"}
_PROLOG: Final = re.compile(r"^(?:Task)?Prolog(?:\[\d+\])?\s*=\s*(\S+)", re.MULTILINE)
_VERSION: Final = re.compile(r"^SLURM_VERSION\s*=\s*(\S+)", re.MULTILINE)


# -- sbatch --


def submit_command(spec: JobSpec) -> list[str]:
    """Return sbatch's argv; the script goes to its standard input, ``spec.env`` into its environment.

    The argv has ``--export=ALL``: with a list of names Slurm would load the user's login environment on the node, which
    takes seconds. The runner's environment holds only variables that the job may have.
    """
    options = {
        "job-name": spec.name,
        "comment": spec.comment,
        "output": spec.output,
        "error": spec.output,
        "export": "ALL",
        "chdir": "/",
        "partition": spec.partition,
        "account": spec.account,
        "nodes": spec.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": spec.cpus,
        "mem": spec.memory,
        "time": spec.time,
        "gres": ",".join(spec.gres),
        "reservation": spec.reservation,
        "qos": spec.qos,
        "constraint": spec.constraint,
        "nodelist": spec.nodelist,
        "signal": spec.signal_seconds and f"B:USR1@{spec.signal_seconds}",
        "propagate": spec.propagate,
    }
    return ["sbatch", "--parsable", "--no-requeue", *_options(options), *spec.extra]


def parse_submit(exit_status: int, stdout: str, stderr: str, requested: str = "") -> str:
    """Return the id of the submitted job; a federation's ``123;cluster`` gives ``123``.

    Raises SubmitRefused with Slurm's own words and ``requested`` (JobSpec.requested), SlurmUnavailable if the
    controller was not reached, and Unanswered if the job may exist nevertheless.
    """
    lines = stdout.strip().splitlines()
    jobid = lines[-1].partition(";")[0].strip() if lines else ""
    if exit_status == 0 and re.fullmatch(r"[0-9]{1,10}", jobid, re.ASCII):
        return jobid
    details: dict[str, Any] = {"argv": ["sbatch"], "exit_status": exit_status, "stderr": stderr}
    if exit_status == 0:
        text = f"sbatch printed {stdout[:200]!r} instead of a job id; look for the job with squeue --me"
        raise Unanswered(text, **details)
    message = slurm_message(stderr)
    if _UNANSWERED.search(stderr):
        text = f"sbatch got no answer from Slurm: {message}. The job may have been submitted"
        raise Unanswered(f"{text}; check that slurmctld is up", **details)
    if _UNAVAILABLE.search(stderr):
        raise unavailable("sbatch", exit_status, stderr)
    if exit_status < 0 or not message:
        text = f"sbatch ended with status {exit_status} ({message or 'no message'}); look for the job with squeue --me"
        raise Unanswered(text, **details)
    raise SubmitRefused(f"Slurm refused the job{requested}: {message}", **details)


# -- squeue: jobs, queues, steps --


def jobs_command(jobids: Collection[str], *, mark: str = "") -> list[str]:
    """Return squeue's argv for all of ``jobids``, finished jobs included; ``mark`` (letters) separates the fields."""
    if not jobids:
        raise ValueError("jobs_command() needs a job id")
    ids = ",".join(_checked_jobid(jobid) for jobid in jobids)
    return ["squeue", "--states=all", "--noheader", f"--jobs={ids}", f"--Format={_format(_JOB_FIELDS, mark)}"]


def own_jobs_command(*, mark: str = "") -> list[str]:
    """Return squeue's argv for the user's own unfinished jobs; ``parse_jobs`` reads the output."""
    return ["squeue", "--me", "--noheader", f"--Format={_format(_JOB_FIELDS, mark)}"]


def parse_jobs(
    exit_status: int, stdout: str, stderr: str, *, mark: str = "", alone: bool = False
) -> dict[str, JobInfo]:
    """Return the jobs in squeue's output by job id. A job that a healthy controller does not know is left out.

    squeue fails if its only id (``alone``) is unknown; among several ids it skips an unknown one. Raises
    SlurmUnavailable for every other failure and for output that cannot be read: nothing is known about the jobs then.
    """
    if exit_status != 0 and _UNKNOWN_JOB.search(stderr) and not _UNAVAILABLE.search(stderr):
        return {}
    if exit_status != 0 or (not stdout.strip() and (alone or _UNAVAILABLE.search(stderr))):
        raise unavailable("squeue", exit_status, stderr)
    return {row[0]: _job_info(row) for row in _rows(stdout, len(_JOB_FIELDS), mark, key=r"[0-9]{1,10}")}


def queue_command(partitions: Collection[str], *, mark: str = "") -> list[str]:
    """Return squeue's argv for the pending jobs in ``partitions``, the highest priority first."""
    names = ",".join(sorted(partitions))
    fields = _format(("JobID", "Partition"), mark)
    return ["squeue", "--states=PENDING", "--noheader", f"--partition={names}", "--sort=-p,i", f"--Format={fields}"]


def parse_queue(exit_status: int, stdout: str, stderr: str, *, mark: str = "") -> dict[str, int]:
    """Return each pending job's position in its partition's queue, 1 for the next. Raises SlurmUnavailable."""
    if exit_status != 0 or (not stdout.strip() and _UNAVAILABLE.search(stderr)):
        raise unavailable("squeue", exit_status, stderr)
    positions: dict[str, int] = {}
    waiting: dict[str, int] = {}
    for jobid, partition in _rows(stdout, 2, mark, key=r"[0-9]{1,10}"):
        waiting[partition] = waiting.get(partition, 0) + 1
        positions.setdefault(jobid, waiting[partition])
    return positions


def steps_command(jobid: str, *, mark: str = "") -> list[str]:
    """Return squeue's argv for the running steps of one job."""
    fields = _format(_STEP_FIELDS, mark)
    return ["squeue", "--steps", "--noheader", f"--jobs={_checked_jobid(jobid)}", f"--Format={fields}"]


def parse_steps(exit_status: int, stdout: str, stderr: str, *, jobid: str, mark: str = "") -> list[StepInfo]:
    """Return the running steps of ``jobid``; none for a job that is over or unknown. Raises SlurmUnavailable."""
    if exit_status != 0 and _UNKNOWN_JOB.search(stderr) and not _UNAVAILABLE.search(stderr):
        return []
    if exit_status != 0 or (not stdout.strip() and _UNAVAILABLE.search(stderr)):
        raise unavailable("squeue", exit_status, stderr)
    rows = _rows(stdout, len(_STEP_FIELDS), mark, key=r"[0-9]{1,10}(?:[_+][0-9]+)?\.\S+")
    steps = [StepInfo(stepid=row[0], user=_text(row[1]), nodes=_text(row[2]), name=row[3]) for row in rows]
    return [step for step in steps if step.jobid == jobid]


# -- scancel --


def cancel_command(jobid: str) -> list[str]:
    """Return scancel's argv for one whole job."""
    return ["scancel", _checked_jobid(jobid)]


def parse_cancel(exit_status: int, stderr: str) -> None:
    """Return if the job is being cancelled or is already gone. Raises SlurmUnavailable or SlurmError."""
    if _UNAVAILABLE.search(stderr):
        raise unavailable("scancel", exit_status, stderr)
    if exit_status == 0 or _ALREADY_GONE.search(stderr):
        return
    message = slurm_message(stderr) or f"it ended with status {exit_status}"
    raise SlurmError(f"scancel failed: {message}", argv=["scancel"], exit_status=exit_status, stderr=stderr)


# -- srun --


def step_command(spec: StepSpec) -> list[str]:
    """Return srun's argv for one more step in a running job; ``/bin/sh`` on the node reads the script from stdin.

    Without ``--overlap`` (or ``--exact`` with resources of its own) the step would wait for the other steps to end.
    """
    options = {
        "jobid": _checked_jobid(spec.jobid),
        "nodes": 1,
        "ntasks": 1,
        "nodelist": spec.node,
        "job-name": spec.name,
        "export": "ALL",
        "chdir": "/",
        "mem": spec.memory,
        "cpus-per-task": spec.cpus,
        "gres": ",".join(spec.gres),
        "propagate": spec.propagate,
    }
    # An exact step that names no GPUs would get all GPUs of the job, and one without free resources would wait.
    share = ["--exact", "--immediate=1", *([] if spec.gres else ["--gres=none"])] if spec.exact else ["--overlap"]
    return ["srun", *share, *_options(options), "/bin/sh", "-s"]


def parse_step_failure(exit_status: int, stderr: str, *, jobid: str | None = None) -> GatewaySlurmError:
    """Return the error, in Slurm's own words, for a step whose srun ended with an ``exit_status`` other than 0."""
    message = slurm_message(stderr) or f"srun ended with status {exit_status} and printed no message"
    text = f"the step in job {jobid} failed: {message}"
    if _MEMORY.search(stderr):
        text += "; it used more memory than it has: ask for more memory, or use less"
    if _UNKNOWN_JOB.search(stderr):
        return UnknownJob(text, argv=["srun"], exit_status=exit_status, stderr=stderr)
    if _UNAVAILABLE.search(stderr):
        return unavailable("srun", exit_status, stderr)
    ended = re.search(r"job \S+ has expired|DUE TO (TIME LIMIT|PREEMPTION|NODE FAILURE)", stderr, re.IGNORECASE)
    if ended:
        return AllocationEnded(text, jobid=jobid, state=_STEP_END_STATES.get(ended[1] or "", ""))
    # A cancelled step does not show that its job has ended: only the job's state does. An srun that was asked to cancel
    # its step ("forcing") may end before slurmstepd reports the cancellation.
    if not re.search("CANCELLED AT|forcing job termination", stderr) and re.search(r"tasks? [0-9,-]+: ", stderr):
        return LauncherFailed(text, output_tail=stderr[-_MAX_MESSAGE:])
    return AllocationError(text, jobid=jobid)


# -- scontrol and sinfo, and the same in slurmrestd's responses --


def config_command() -> list[str]:
    """Return scontrol's argv for the controller's configuration, which includes its version."""
    return ["scontrol", "show", "config"]


def partitions_command() -> list[str]:
    """Return sinfo's argv: one line per partition; the name of the default partition ends with a star."""
    return ["sinfo", "--noheader", "--summarize", "--format=%P|%a|%D|%s"]


def parse_version(stdout: str) -> str:
    """Return the version in ``scontrol show config``; empty if there is none."""
    found = _VERSION.search(stdout)
    return found[1] if found else ""


def parse_prolog(stdout: str) -> str:
    """Return the first prolog in ``scontrol show config`` that runs on nodes before a script; empty if none does."""
    found = [value for value in _PROLOG.findall(stdout) if value != "(null)"]
    return found[0] if found else ""


def parse_partitions(stdout: str) -> tuple[Partition, ...]:
    """Return the partitions in sinfo's output."""
    rows = [line.split("|") for line in stdout.splitlines() if line.count("|") == 3]
    found = []
    for name, state, nodes, size in rows:
        # ``1-infinite``, ``2-4``, or one number for both.
        least, _dash, most = size.strip().partition("-")
        limits = _count(least) or 0, _count(most or least)
        found.append(Partition(name.removesuffix("*"), name.endswith("*"), state, _count(nodes), *limits))
    return tuple(found)


def _count(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) else None


def version_in(document: Mapping[str, Any]) -> str:
    """Return Slurm's version in a response of slurmrestd; its field is ``Slurm`` before 23.11, then ``slurm``."""
    meta = document.get("meta")
    for name in ("slurm", "Slurm"):
        part = meta.get(name) if isinstance(meta, dict) else None
        if isinstance(part, dict) and isinstance(part.get("release"), str):
            return str(part["release"])[:50]
    return ""


def partitions_in(document: Mapping[str, Any]) -> tuple[Partition, ...]:
    """Return the ``partitions`` of a response. Raises SlurmUnavailable if the response has no list of partitions."""
    listed = document.get("partitions")
    if not isinstance(listed, list):
        raise SlurmUnavailable("slurmrestd's response has no list of partitions")
    rows = [row for row in listed if isinstance(row, dict) and isinstance(row.get("name"), str)]
    # v0.0.38 has flags; later versions do not tell which partition is the default.
    return tuple(
        Partition(
            str(row["name"])[:255],
            "default" in (row.get("flags") or ()),
            nodes=_size(row, "total_nodes", "nodes", "total"),
            min_nodes=_size(row, "min_nodes_per_job", "minimums", "nodes") or 0,
            max_nodes=_size(row, "maximum_nodes_per_job", "maximums", "nodes"),
        )
        for row in rows
    )


def _size(row: Mapping[str, Any], older: str, part: str, name: str) -> int | None:
    """Return a count of nodes in v0.0.38's field or in that of later versions; None for no limit and odd values."""
    inner = row.get(part)
    value = inner.get(name) if isinstance(inner, dict) else row.get(older)
    if isinstance(value, dict):
        value = value.get("number") if value.get("set") and not value.get("infinite") else None
    return value if isinstance(value, int) and 0 < value < _NO_SIZE_LIMIT else None


# -- Slurm's messages --


def means_unavailable(message: str) -> bool:
    """Whether this message of Slurm means that the controller was not reached."""
    return _UNAVAILABLE.search(message) is not None


def slurm_message(stderr: str) -> str:
    """Return Slurm's own words from a command's stderr, without prefixes such as ``sbatch: error: ``."""
    lines = (_PREFIX.sub("", line).strip() for line in stderr[:_MAX_MESSAGE].splitlines())
    return "; ".join(line for line in lines if line)


def unavailable(command: str, exit_status: int, stderr: str) -> SlurmUnavailable:
    """Return the error for a command that did not reach Slurm's controller."""
    message = slurm_message(stderr) or f"it ended with status {exit_status} and printed no message"
    return SlurmUnavailable(
        f"{command} got no answer from Slurm: {message}. Nothing is known about the jobs; check that slurmctld is up",
        argv=[command],
        exit_status=exit_status,
        stderr=stderr,
    )


# -- Building and reading --


def _options(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items() if value is not None and value != ""]


def _checked_jobid(jobid: str) -> str:
    if not _JOBID.fullmatch(jobid):
        raise UnknownJob(f"{jobid[:200]!r} is not a Slurm job id")
    return jobid


def _format(fields: Sequence[str], mark: str) -> str:
    """Return the value of squeue's --Format; with a suffix and no width, Slurm neither pads nor cuts a field."""
    return ",".join(f"{name}:\x1f{mark}" for name in fields)


def _rows(stdout: str, width: int, mark: str, *, key: str) -> list[list[str]]:
    """Cut squeue's output into rows of ``width`` fields; each field, the last one included, ends with the separator."""
    fields = stdout.split(f"\x1f{mark}")
    end = fields.pop()
    if end.strip() or len(fields) % width:
        raise SlurmUnavailable(f"squeue's output cannot be read: {stdout[:200]!r}", argv=["squeue"])
    rows = [fields[at : at + width] for at in range(0, len(fields), width)]
    for row in rows:
        row[0] = row[0].strip()  # the line end of the previous row
        if not re.fullmatch(key, row[0], re.ASCII):
            raise SlurmUnavailable(f"squeue printed {row[0][:200]!r} instead of a job id", argv=["squeue"])
    return rows


def _job_info(row: Sequence[str]) -> JobInfo:
    job = dict(zip(_JOB_FIELDS, row, strict=True))
    has_ended = meaning(job["State"]) in (Meaning.OVER, Meaning.ENDING)
    code, signal = _exit(job["exit_code"]) if has_ended else (None, None)
    return JobInfo(
        jobid=job["JobID"],
        display_id=job["JobArrayID"].strip(),
        state=job["State"].strip(),
        reason=_text(job["Reason"]),
        nodes=_text(job["NodeList"]),
        user=_text(job["UserName"]),
        partition=_text(job["Partition"]),
        account=_text(job["Account"]),
        submit_time=_epoch(job["SubmitTime"]),
        start_time=_epoch(job["StartTime"]),
        end_time=_epoch(job["EndTime"]),
        clock=_clock(job),
        time_limit=_limit(job["TimeLimit"]),
        exit_code=code,
        exit_signal=signal,
        name=job["Name"],
        comment="" if job["Comment"] == "(null)" else job["Comment"],
    )


def _text(value: str) -> str:
    value = value.strip()
    return "" if value in ("(null)", "N/A", "None", "n/a") else value


def _epoch(value: str) -> float | None:
    return float(value) if re.fullmatch(r"\s*[0-9]{1,12}\s*", value, re.ASCII) else None


def _clock(job: Mapping[str, str]) -> float | None:
    """The clock of the host that squeue ran on, which calculated the time left.

    None where a job does not run, and where its end is not its start plus its time limit: at a preemption with a grace
    time slurmctld moves the end forward and leaves the limit, by which squeue calculates the time left.
    """
    start, end, left = _epoch(job["StartTime"]), _epoch(job["EndTime"]), seconds(job["TimeLeft"])
    limit = seconds(job["TimeLimit"])
    if job["State"].strip() != "RUNNING" or not (start and end and left and limit):
        return None
    return end - left if abs(end - start - limit) <= _SAME_LENGTH else None


def _limit(value: str) -> int | None:
    try:
        return minutes(value)
    except TimeFormatError:  # NOT_SET, Partition_Limit, INVALID
        return None


def _exit(value: str) -> tuple[int | None, int | None]:
    """Read an exit status: a wait(2) status as one number, or ``code:signal``."""
    match = re.fullmatch(r"\s*([0-9]{1,10})(?::([0-9]{1,3}))?\s*", value, re.ASCII)
    if match is None:
        return None, None
    first = int(match[1])
    code, signal = (first, int(match[2])) if match[2] else (first >> 8 & 0xFF, first & 0x7F)
    return code, signal or None
