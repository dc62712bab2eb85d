"""What is asked of Slurm and what it answers, as values: jobs and job steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from gateway_slurm.slurm.formats import Meaning, meaning

# Of a job, what Slurm may refuse.
_ASKED: Final = (
    "partition",
    "account",
    "qos",
    "reservation",
    "nodes",
    "nodelist",
    "time",
    "cpus",
    "memory",
    "constraint",
)


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job to submit. ``env`` is added to the job's environment and may hold secrets: it is never in
    argv.
    """

    name: str
    script: str
    comment: str = ""
    partition: str | None = None
    account: str | None = None
    nodes: int | None = None
    time: int | str | None = None
    """Minutes, or text in one of Slurm's formats."""
    gres: Sequence[str] = ()
    reservation: str | None = None
    qos: str | None = None
    cpus: int | None = None
    memory: str | None = None
    constraint: str | None = None
    nodelist: str | None = None
    signal_seconds: int | None = None
    """Before its end, as it is then, Slurm sends the script (not what it started) SIGUSR1; up to a minute early."""
    output: str = "/dev/null"
    extra: Sequence[str] = ()
    """More options, as the admin allows them; each is one whole ``--name=value``."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def asked(self) -> str:
        """For messages, as `` (partition devel, nodes 3)``: Slurm's own do not always name what they refuse."""
        named = ((name, getattr(self, name)) for name in _ASKED)
        told = [f"{name} {value}" for name, value in named if value is not None]
        told += [f"gres {one}" for one in self.gres]
        return f" ({', '.join(told)})" if told else ""


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """One job step in an allocation that is there: ``script`` runs once, on ``node`` or on a node of
    Slurm's choice.
    """

    jobid: str
    name: str
    script: str
    node: str | None = None
    memory: str | None = None
    exact: bool = False
    """A share of its own, or at once the error that none is free; else it overlaps with other steps."""
    cpus: int | None = None
    gres: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """What Slurm says of one job; times are seconds since the epoch, None where Slurm has none."""

    jobid: str
    state: str
    reason: str = ""
    nodes: str = ""
    """A host list, to be read with ``hostlist.expand``; empty while the job has no nodes."""
    user: str = ""
    partition: str = ""
    account: str = ""
    name: str = ""
    comment: str = ""
    submit_time: float | None = None
    start_time: float | None = None
    end_time: float | None = None
    """While the job runs, the moment its time limit ends it; afterwards, when it ended."""
    time_limit: int | None = None
    """Minutes; None is no limit."""
    exit_code: int | None = None
    exit_signal: int | None = None
    display_id: str = ""
    """``123_4`` or ``123+1`` for an array's task or a heterogeneous job's component; else the job id."""

    @property
    def meaning(self) -> Meaning:
        """What the state means for us."""
        return meaning(self.state)

    @property
    def is_component(self) -> bool:
        """True if this is an array's task or a heterogeneous job's component."""
        return self.display_id not in ("", self.jobid)


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """One running job step: ``stepid`` is ``123.0`` or ``123.batch``."""

    stepid: str
    user: str = ""
    name: str = ""
    nodes: str = ""

    @property
    def jobid(self) -> str:
        """The id of the job it is in."""
        return self.stepid.partition(".")[0]

    @property
    def number(self) -> str:
        """The part after the dot: a number, ``batch``, ``extern`` or ``interactive``."""
        return self.stepid.partition(".")[2]
