"""Requests to Slurm and its answers, as values: jobs, job steps, partitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from gateway_slurm.slurm.formats import Meaning, meaning
from gateway_slurm.slurm.reasons import Pending, pending

# The fields of a job for which Slurm may refuse it.
_REQUESTED: Final = (
    "partition", "account", "qos", "reservation", "nodes", "nodelist", "time", "cpus", "memory", "constraint",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job to submit. ``env`` is added to the job's environment and may hold secrets: it is never in argv."""

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
    """Slurm sends SIGUSR1 to the script, not to the script's children, this many seconds before the job's time limit,
    or up to a minute earlier.
    """
    propagate: str = "NONE"
    """The resource limits of the submitting process that the job gets (sbatch(1), --propagate)."""
    output: str = "/dev/null"
    extra: Sequence[str] = ()
    """Further options that the admin allows, each as ``--name=value``."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def requested(self) -> str:
        """A suffix for messages, as `` (partition devel, nodes 3)``: Slurm's own words may not name what it refuses."""
        values = ((name, getattr(self, name)) for name in _REQUESTED)
        parts = [f"{name} {value}" for name, value in values if value is not None]
        parts += [f"gres {gres}" for gres in self.gres]
        return f" ({', '.join(parts)})" if parts else ""


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """One job step in a running job: ``script`` runs once, on ``node`` or on a node that Slurm chooses."""

    jobid: str
    name: str
    script: str
    node: str | None = None
    memory: str | None = None
    exact: bool = False
    """Whether the step gets resources of its own, or fails at once if none are free; else it overlaps other steps."""
    cpus: int | None = None
    gres: Sequence[str] = ()
    propagate: str = "NONE"
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


MAX_SKEW: Final = 10.0
"""Seconds. An answer from a login node may take that long, and end times should not change with each answer."""


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """What Slurm says about one job. Times are seconds since the epoch, None where Slurm has none."""

    jobid: str
    state: str
    reason: str = ""
    nodes: str = ""
    """A host list, which ``formats.expand_hostlist`` reads; empty while the job has no nodes."""
    user: str = ""
    partition: str = ""
    account: str = ""
    name: str = ""
    comment: str = ""
    submit_time: float | None = None
    """By Slurm's clock, always: it tells the job from others with its id, and must not change between answers."""
    start_time: float | None = None
    end_time: float | None = None
    """When the time limit will end a running job, or when a finished job ended."""
    clock: float | None = None
    """What the clock by which the times were calculated showed at the answer; None where it is not known."""
    time_limit: int | None = None
    """Minutes; None means no limit."""
    exit_code: int | None = None
    exit_signal: int | None = None
    display_id: str = ""
    """``123_4`` for an array task, ``123+1`` for a component of a heterogeneous job; else the job id."""

    def by_clock(self, now: float) -> JobInfo:
        """The same with start and end by a clock that shows ``now``; small differences are left."""
        ahead = 0.0 if self.clock is None else now - self.clock
        if abs(ahead) < MAX_SKEW:
            return self
        start_time, end_time = (None if at is None else at + ahead for at in (self.start_time, self.end_time))
        return replace(self, clock=now, start_time=start_time, end_time=end_time)

    @property
    def meaning(self) -> Meaning:
        return meaning(self.state)

    @property
    def is_waiting(self) -> bool:
        """Whether the job has no nodes yet."""
        return self.meaning in (Meaning.WAITING, Meaning.HELD)

    @property
    def pending(self) -> Pending:
        """What can end the wait of a job that has no nodes yet."""
        return pending(self.reason, self.jobid, self.partition)

    @property
    def is_component(self) -> bool:
        """Whether this is an array task or a component of a heterogeneous job."""
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
        return self.stepid.partition(".")[0]

    @property
    def number(self) -> str:
        """The part after the dot: a number, ``batch``, ``extern`` or ``interactive``."""
        return self.stepid.partition(".")[2]


@dataclass(frozen=True)
class Partition:
    """A partition that jobs can ask for."""

    name: str
    is_default: bool = False
    state: str = ""
    """Slurm's word, ``up`` for a partition that runs jobs; empty if Slurm does not tell it."""
    nodes: int | None = None
    """All of its nodes, those that are down included."""
    min_nodes: int = 0
    """Of a job (slurm.conf, MinNodes)."""
    max_nodes: int | None = None
    """Of a job (slurm.conf, MaxNodes); None if there is no such limit, or Slurm does not tell it."""

    def allows(self, nodes: int) -> bool:
        """Whether a job of this many nodes may ever run in it, as far as is known."""
        return (
            self.min_nodes <= nodes <= min(limit for limit in (self.nodes, self.max_nodes, nodes) if limit is not None)
        )

    def __str__(self) -> str:
        state = f" ({self.state})" if self.state not in ("", "up") else ""
        return f"{self.name}{'*' if self.is_default else ''}{state}"


@dataclass(frozen=True)
class ClusterInfo:
    """What Slurm says about its cluster. ``version`` is the controller's; empty if Slurm does not tell it."""

    version: str
    partitions: tuple[Partition, ...] = ()
    prolog: str | None = None
    """The program that runs on a node before a job's script; empty if there is none, None if Slurm does not tell it."""

    @property
    def default_partition(self) -> str | None:
        """The partition of jobs that name none, or the only partition; None if Slurm tells neither."""
        names = [partition.name for partition in self.partitions if partition.is_default]
        if not names and len(self.partitions) == 1:
            return self.partitions[0].name
        return names[0] if names else None
