"""Slurm's command lines and what comes back: for each command a builder and a parser, both pure.

The text output is read with explicit formats, not ``--json``, whose schema moved in 23.02, 23.11 and 24.05.
Job names and comments may hold any byte, line ends included, and belong to whoever made the job. So fields
are
separated by a mark that the caller draws per call and nobody else can guess, and free text comes last.
Every option is in ``--name=value`` form: no value can be read as an option. Job ids are compared whole.

Sources: sbatch(1), squeue(1), scancel(1), srun(1); outputs seen with Slurm 22.05, 24.11 and 26.05.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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
from gateway_slurm.slurm.formats import Meaning, TimeFormatError, meaning, minutes
from gateway_slurm.slurm.model import JobInfo, JobSpec, StepInfo, StepSpec

__all__ = [
    "JobInfo",
    "JobSpec",
    "StepInfo",
    "StepSpec",
    "cancel_command",
    "jobs_command",
    "minutes",
    "parse_cancel",
    "parse_jobs",
    "parse_step_failure",
    "parse_steps",
    "parse_submit",
    "step_command",
    "steps_command",
    "submit_command",
]

_JOBID: Final = re.compile(r"[0-9]{1,10}(?:[_+][0-9]{1,10})?", re.ASCII)
_UNAVAILABLE: Final = re.compile(
    r"unable to contact slurm controller|socket timed out|zero bytes were transmitted|munge"
    r"|protocol authentication error|communication connection failure|connection (?:refused|timed out|reset)"
    r"|unable to process configuration file|configuration source|backup controller|in standby"
    r"|unable to establish|temporarily unable|resource temporarily unavailable|rate limit"
    r"|incompatible versions|message (?:receive|send) failure|unexpected message",
    re.IGNORECASE,
)
# The controller was reached, as far as is known, and it may have done what it was asked.
_UNANSWERED: Final = re.compile(
    r"socket timed out|zero bytes were transmitted|connection reset|unexpected message"
    r"|(?:send|receive|shutdown) failure",
    re.IGNORECASE,
)
_UNKNOWN_JOB: Final = re.compile(r"invalid job id", re.IGNORECASE)
_ALREADY_GONE: Final = re.compile(r"invalid job id|already completing or completed", re.IGNORECASE)
_PREFIX: Final = re.compile(
    r"^(?:sbatch|srun|scancel|squeue|slurm_load_jobs|slurmstepd)(?:: | )(?:error|fatal): ", re.M
)
_SHOWN: Final = 4000


def submit_command(spec: JobSpec) -> list[str]:
    """Return sbatch's argv; the script goes to its standard input, ``spec.env`` into its environment.

    ``--export=ALL`` because a list of names would make Slurm load the user's login environment on the node,
    which takes seconds; the runner's environment holds nothing that should not travel.
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
    }
    return ["sbatch", "--parsable", "--no-requeue", *_options(options), *spec.extra]


def parse_submit(exit_status: int, stdout: str, stderr: str, asked: str = "") -> str:
    """Return the id of the submitted job, of ``asked``; a federation's ``123;cluster`` gives ``123``.

    Raises SubmitRefused with Slurm's own words, SlurmUnavailable when the controller could not be asked, and
    Unanswered when there may be a job all the same.
    """
    lines = stdout.strip().splitlines()
    jobid = lines[-1].partition(";")[0].strip() if lines else ""
    if exit_status == 0 and re.fullmatch(r"[0-9]{1,10}", jobid, re.ASCII):
        return jobid
    if exit_status == 0:
        raise Unanswered(
            f"sbatch printed {stdout[:200]!r} where a job id should be; look for the job with squeue --me",
            exit_status=exit_status,
            stderr=stderr,
        )
    if _UNANSWERED.search(stderr):
        raise Unanswered(
            f"sbatch got no answer from Slurm: {slurm_words(stderr)}. It may have made the job; is slurmctld up?",
            argv=["sbatch"],
            exit_status=exit_status,
            stderr=stderr,
        )
    if _UNAVAILABLE.search(stderr):
        raise unavailable("sbatch", exit_status, stderr)
    words = slurm_words(stderr)
    if exit_status < 0 or not words:
        raise Unanswered(
            f"sbatch ended with status {exit_status} ({words or 'it said nothing'}); look for the job with squeue --me",
            argv=["sbatch"],
            exit_status=exit_status,
            stderr=stderr,
        )
    refused = f"Slurm refused the job{asked}: {words}"
    raise SubmitRefused(refused, argv=["sbatch"], exit_status=exit_status, stderr=stderr)


_JOB_FIELDS: Final = (
    "JobID", "JobArrayID", "State", "Reason", "NodeList", "UserName", "Partition", "Account",
    "SubmitTime", "StartTime", "EndTime", "TimeLimit", "exit_code", "Name", "Comment",
)  # fmt: skip
_STEP_FIELDS: Final = ("StepID", "UserName", "Nodes", "StepName")


def jobs_command(jobids: Collection[str], *, mark: str = "") -> list[str]:
    """Return one squeue for all of ``jobids``, finished ones included; ``mark`` (letters) separates the
    fields.
    """
    if not jobids:
        raise ValueError("jobs_command() needs a job id")
    ids = ",".join(_checked(jobid) for jobid in jobids)
    return ["squeue", "--states=all", "--noheader", f"--jobs={ids}", f"--Format={_format(_JOB_FIELDS, mark)}"]


def find_command(name: str, *, mark: str = "") -> list[str]:
    """Return squeue's argv for the user's own jobs of this name that are not over; ``parse_jobs`` reads it."""
    return ["squeue", "--me", "--noheader", f"--name={name}", f"--Format={_format(_JOB_FIELDS, mark)}"]


def parse_jobs(
    exit_status: int, stdout: str, stderr: str, *, mark: str = "", alone: bool = False
) -> dict[str, JobInfo]:
    """Return what squeue said, by job id; a job that a healthy controller does not know is not in it.

    squeue fails as a whole when it is asked for one id (``alone``) and that is unknown; asked for several, it
    skips it.
    Raises SlurmUnavailable for every other failure and for an answer that cannot be read: then nothing is
    known.
    """
    if exit_status != 0 and _UNKNOWN_JOB.search(stderr) and not _UNAVAILABLE.search(stderr):
        return {}
    if exit_status != 0 or (not stdout.strip() and (alone or _UNAVAILABLE.search(stderr))):
        raise unavailable("squeue", exit_status, stderr)
    return {row[0]: _job_info(row) for row in _rows(stdout, len(_JOB_FIELDS), mark, key=r"[0-9]{1,10}")}


def queue_command(partitions: Collection[str], *, mark: str = "") -> list[str]:
    """Return squeue's argv for what waits in ``partitions``, the highest priority first."""
    names = ",".join(sorted(partitions))
    fields = _format(("JobID", "Partition"), mark)
    return ["squeue", "--states=PENDING", "--noheader", f"--partition={names}", "--sort=-p,i", f"--Format={fields}"]


def parse_queue(exit_status: int, stdout: str, stderr: str, *, mark: str = "") -> dict[str, int]:
    """Return each waiting job's place in its partition, 1 for the next. Raises SlurmUnavailable."""
    if exit_status != 0 or (not stdout.strip() and _UNAVAILABLE.search(stderr)):
        raise unavailable("squeue", exit_status, stderr)
    places: dict[str, int] = {}
    waiting: dict[str, int] = {}
    for jobid, partition in _rows(stdout, 2, mark, key=r"[0-9]{1,10}"):
        waiting[partition] = waiting.get(partition, 0) + 1
        places.setdefault(jobid, waiting[partition])
    return places


def cancel_command(jobid: str) -> list[str]:
    """Return scancel's argv for one whole job."""
    return ["scancel", _checked(jobid)]


def parse_cancel(exit_status: int, stderr: str) -> None:
    """Return if the job is being cancelled or is gone already; else raise SlurmUnavailable or SlurmError."""
    if _UNAVAILABLE.search(stderr):
        raise unavailable("scancel", exit_status, stderr)
    if exit_status == 0 or _ALREADY_GONE.search(stderr):
        return
    words = slurm_words(stderr) or f"it ended with status {exit_status}"
    raise SlurmError(f"scancel failed: {words}", argv=["scancel"], exit_status=exit_status, stderr=stderr)


def steps_command(jobid: str, *, mark: str = "") -> list[str]:
    """Return squeue's argv for the running steps of one job."""
    return [
        "squeue",
        "--steps",
        "--noheader",
        f"--jobs={_checked(jobid)}",
        f"--Format={_format(_STEP_FIELDS, mark)}",
    ]


def parse_steps(exit_status: int, stdout: str, stderr: str, *, jobid: str, mark: str = "") -> list[StepInfo]:
    """Return the running steps of ``jobid``; none for a job that is over or unknown. Raises
    SlurmUnavailable.
    """
    if exit_status != 0 and _UNKNOWN_JOB.search(stderr) and not _UNAVAILABLE.search(stderr):
        return []
    if exit_status != 0 or (not stdout.strip() and _UNAVAILABLE.search(stderr)):
        raise unavailable("squeue", exit_status, stderr)
    rows = _rows(stdout, len(_STEP_FIELDS), mark, key=r"[0-9]{1,10}(?:[_+][0-9]+)?\.\S+")
    steps = [StepInfo(stepid=row[0], user=_text(row[1]), nodes=_text(row[2]), name=row[3]) for row in rows]
    return [step for step in steps if step.jobid == jobid]


_STEP_ENDS: Final = {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL"}


def step_command(spec: StepSpec) -> list[str]:
    """Return srun's argv for one more step in a running job; ``/bin/sh`` there reads the script from stdin.

    Without ``--overlap`` (or ``--exact`` with its own share) the step would wait for the others to end.
    """
    options = {
        "jobid": _checked(spec.jobid),
        "nodes": 1,
        "ntasks": 1,
        "nodelist": spec.node,
        "job-name": spec.name,
        "export": "ALL",
        "chdir": "/",
        "mem": spec.memory,
        "cpus-per-task": spec.cpus,
        "gres": ",".join(spec.gres),
    }
    # An exact step that names no GPUs would get all of the job's; one that finds nothing free would wait.
    share = ["--exact", "--immediate=1", *([] if spec.gres else ["--gres=none"])] if spec.exact else ["--overlap"]
    return ["srun", *share, *_options(options), "/bin/sh", "-s"]


def parse_step_failure(exit_status: int, stderr: str, *, jobid: str | None = None) -> GatewaySlurmError:
    """Return the error for a step's srun that ended with ``exit_status`` other than 0, in Slurm's own
    words.
    """
    words = slurm_words(stderr) or f"srun ended with status {exit_status} and said nothing"
    text = f"the step in job {jobid} failed: {words}"
    if _UNKNOWN_JOB.search(stderr):
        return UnknownJob(text, argv=["srun"], exit_status=exit_status, stderr=stderr)
    if _UNAVAILABLE.search(stderr):
        return unavailable("srun", exit_status, stderr)
    ended = re.search(r"job \S+ has expired|DUE TO (TIME LIMIT|PREEMPTION|NODE FAILURE)", stderr, re.IGNORECASE)
    if ended:
        return AllocationEnded(text, jobid=jobid, state=_STEP_ENDS.get(ended[1] or "", ""))
    # A cancelled step says nothing about its job: that is the job's state's to say. The srun that was told to
    # cancel it ("forcing") may end before slurmstepd's word on it is there.
    if not re.search("CANCELLED AT|forcing job termination", stderr) and re.search(r"tasks? [0-9,-]+: ", stderr):
        return LauncherFailed(text, output_tail=stderr[-_SHOWN:])
    return AllocationError(text, jobid=jobid)


def says_unavailable(words: str) -> bool:
    """Whether these words of Slurm's say that it could not be asked."""
    return _UNAVAILABLE.search(words) is not None


def slurm_words(stderr: str) -> str:
    """Return what Slurm said, word for word; only ``sbatch: error: `` and the like are taken off, for reading."""
    lines = (_PREFIX.sub("", line).strip() for line in stderr[:_SHOWN].splitlines())
    return "; ".join(line for line in lines if line)


def unavailable(command: str, exit_status: int, stderr: str) -> SlurmUnavailable:
    """The error for a command by which Slurm could not be asked."""
    words = slurm_words(stderr) or f"it ended with status {exit_status} and said nothing"
    return SlurmUnavailable(
        f"{command} got no answer from Slurm: {words}. Nothing is known about the jobs; is slurmctld up?",
        argv=[command],
        exit_status=exit_status,
        stderr=stderr,
    )


def _options(options: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items() if value is not None and value != ""]


def _checked(jobid: str) -> str:
    if not _JOBID.fullmatch(jobid):
        raise UnknownJob(f"{jobid[:200]!r} is no Slurm job id")
    return jobid


def _format(fields: Sequence[str], mark: str) -> str:
    """Draw squeue's --Format: a suffix without a width means the field is neither padded nor cut."""
    return ",".join(f"{name}:\x1f{mark}" for name in fields)


def _rows(stdout: str, width: int, mark: str, *, key: str) -> list[list[str]]:
    """Cut squeue's answer into rows of ``width`` fields; each field, also the last, ends with the
    separator.
    """
    fields = stdout.split(f"\x1f{mark}")
    end = fields.pop()
    if end.strip() or len(fields) % width:
        raise SlurmUnavailable(f"squeue's answer cannot be read: {stdout[:200]!r}", argv=["squeue"])
    rows = [fields[at : at + width] for at in range(0, len(fields), width)]
    for row in rows:
        row[0] = row[0].strip()  # the line end of the row before
        if not re.fullmatch(key, row[0], re.ASCII):
            raise SlurmUnavailable(f"squeue named a job {row[0][:200]!r}, which is none", argv=["squeue"])
    return rows


def _job_info(row: Sequence[str]) -> JobInfo:
    (
        jobid,
        display_id,
        state,
        reason,
        nodes,
        user,
        partition,
        account,
        submitted,
        start,
        end,
        limit,
        status,
        name,
        comment,
    ) = row
    code, signal = _exit(status) if meaning(state) in (Meaning.OVER, Meaning.ENDING) else (None, None)
    return JobInfo(
        jobid=jobid,
        display_id=display_id.strip(),
        state=state.strip(),
        reason=_text(reason),
        nodes=_text(nodes),
        user=_text(user),
        partition=_text(partition),
        account=_text(account),
        submit_time=_epoch(submitted),
        start_time=_epoch(start),
        end_time=_epoch(end),
        time_limit=_limit(limit),
        exit_code=code,
        exit_signal=signal,
        name=name,
        comment="" if comment == "(null)" else comment,
    )


def _text(value: str) -> str:
    value = value.strip()
    return "" if value in ("(null)", "N/A", "None", "n/a") else value


def _epoch(value: str) -> float | None:
    return float(value) if re.fullmatch(r"\s*[0-9]{1,12}\s*", value, re.ASCII) else None


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


# -- What a cluster says of itself: its version and its partitions, by commands and by REST. Pure. --


_VERSION: Final = re.compile(r"^SLURM_VERSION\s*=\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Partition:
    """One that jobs can ask for."""

    name: str
    is_default: bool = False
    state: str = ""
    """In Slurm's word, ``up`` for one that runs jobs; empty where it does not say."""
    nodes: int | None = None

    def __str__(self) -> str:
        state = f" ({self.state})" if self.state not in ("", "up") else ""
        return f"{self.name}{'*' if self.is_default else ''}{state}"


@dataclass(frozen=True)
class About:
    """``version`` is the controller's; empty where it does not say."""

    version: str
    partitions: tuple[Partition, ...] = ()

    @property
    def default_partition(self) -> str | None:
        """The one of jobs that name none, or the only one there is; None where there is none, or nobody says."""
        names = [each.name for each in self.partitions if each.is_default]
        if not names and len(self.partitions) == 1:
            return self.partitions[0].name
        return names[0] if names else None


def config_command() -> list[str]:
    """Return scontrol's argv for the controller's configuration, which says its version."""
    return ["scontrol", "show", "config"]


def partitions_command() -> list[str]:
    """Return sinfo's argv: a line for each partition, its name with a star where it is the default."""
    return ["sinfo", "--noheader", "--summarize", "--format=%P|%a|%D"]


def parse_version(stdout: str) -> str:
    """Return the version in ``scontrol show config``."""
    found = _VERSION.search(stdout)
    return found[1] if found else ""


def parse_partitions(stdout: str) -> tuple[Partition, ...]:
    """Return the partitions in sinfo's answer."""
    rows = [line.split("|") for line in stdout.splitlines() if line.count("|") == 2]
    return tuple(
        Partition(name.removesuffix("*"), name.endswith("*"), state, int(nodes) if nodes.isdigit() else None)
        for name, state, nodes in rows
    )


def version_in(document: Mapping[str, Any]) -> str:
    """Return Slurm's version in an answer of slurmrestd's; its field is ``Slurm`` before 23.11, then ``slurm``."""
    meta = document.get("meta")
    for name in ("slurm", "Slurm"):
        part = meta.get(name) if isinstance(meta, dict) else None
        if isinstance(part, dict) and isinstance(part.get("release"), str):
            return str(part["release"])[:50]
    return ""


def partitions_in(document: Mapping[str, Any]) -> tuple[Partition, ...]:
    """Return an answer's ``partitions``; raise SlurmUnavailable for what is no list of them."""
    listed = document.get("partitions")
    if not isinstance(listed, list):
        raise SlurmUnavailable("slurmrestd's answer has no list of partitions in it")
    rows = [row for row in listed if isinstance(row, dict) and isinstance(row.get("name"), str)]
    # v0.0.38 has flags; later ones have none that says which is the default.
    return tuple(Partition(str(row["name"])[:255], "default" in (row.get("flags") or ())) for row in rows)
