"""Why a job is pending, in Slurm's words, and what can end the wait. All functions are pure.

Slurm gives either one of its reason codes (``PartitionNodeLimit``) or a sentence of its own in the code's place
(``ReqNodeNotAvail, UnavailableNodes:c1``), by its commands and by its REST interface alike.

Sources: slurm.schedmd.com/job_reason_codes.html; squeue(1), "JOB REASON CODES"; the reasons and sentences seen with
Slurm 22.05, and those in the sources of 26.05 (job_state_reason.c and slurmctld).
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, NamedTuple


class Outlook(Enum):
    """What can end a job's wait; the value is the sentence that the documentation shows."""

    PASSES = "waiting ends it"
    NEEDS_ACTION = "a user or an administrator must act; the start says so and goes on waiting"
    NEVER = "this request cannot run as the cluster is configured; the start fails, and its job is cancelled"


class PendingReason(NamedTuple):
    """A kind of reason: the codes or sentences that it covers, what can end the wait, and what to do."""

    title: str
    """Slurm's reasons, as the documentation lists them."""
    pattern: str
    """A regular expression for the beginning of Slurm's text."""
    outlook: Outlook
    advice: str = ""
    by_partition: bool = False
    """Whether the reason concerns one partition: a job that names several may start in another one."""
    settles: float = 0.0
    """Seconds that the reason must stay until it counts: Slurm may replace it by a more exact one."""


_PASSES, _ACTION, _NEVER = Outlook.PASSES, Outlook.NEEDS_ACTION, Outlook.NEVER
_LESS: Final = "ask for less (runtime, nodes, gpus, cpus, memory), or use another project or qos"
_RELEASE: Final = "scontrol release JOBID lets it start"

# In the order of the search: the first pattern that matches decides.
REASONS: Final[tuple[PendingReason, ...]] = (
    # The request does not fit the cluster's configuration. An administrator could change that, but nothing says so.
    PendingReason("PartitionTimeLimit", r"PartitionTimeLimit", _NEVER,
                  "ask for less time (runtime) or another partition", True),
    PendingReason("PartitionConfig", r"PartitionConfig", _NEVER,
                  "ask for what the partition has and allows (nodes, runtime, cpus, memory, project, qos), or for "
                  "another partition", True, 2.0),
    PendingReason("MaxMemPerLimit", r"MaxMemPerLimit", _NEVER, "ask for less memory or another partition", True),
    PendingReason("AccountNotAllowed, QOSNotAllowed",
                  r"AccountNotAllowed|QOSNotAllowed|Job's (?:account|QOS) not |uid \d+ not in group permitted", _NEVER,
                  "use another project, qos or partition", True),
    PendingReason("BadConstraints", r"BadConstraints", _NEVER,
                  "ask for what the nodes have (nodes, gpus, gres, constraint, memory, cpus)"),
    PendingReason("InvalidAccount", r"InvalidAccount", _NEVER, "correct project"),
    PendingReason("InvalidQOS", r"InvalidQOS", _NEVER, "correct qos"),
    PendingReason("ReservationDeleted, ReservationInvalid",
                  r"Reservation(?:Deleted|Invalid)|Reservation \S+ (?:was deleted|is invalid)", _NEVER,
                  "correct reservation"),
    PendingReason("DependencyNeverSatisfied", r"DependencyNeverSatisfied", _NEVER, "submit it without that dependency"),
    PendingReason("AssocMax*PerJob*, AssocMax*PerNode, QOSMax*PerJob*, QOSMax*PerNode",
                  r"(?:Assoc|QOS)Max\w+Per(?:Job|Node)(?:Limit)?\b", _NEVER, _LESS, True),
    PendingReason("QOSMin*", r"QOSMin\w+", _NEVER, "ask for more, as the qos demands, or use another qos", True),
    # The request fits, and a person must act.
    PendingReason("JobHeldUser", r"JobHeldUser|job requeued in (?:held|special exit) state", _ACTION,
                  f"the job is held: {_RELEASE}"),
    PendingReason("JobHeldAdmin", r"JobHeldAdmin", _ACTION,
                  "an administrator holds the job, and must release it"),
    PendingReason("JobHoldMaxRequeue", r"JobHoldMaxRequeue|launch.failed.requeued.held", _ACTION,
                  "Slurm could not launch the job and holds it: ask the administrators to look at its nodes"),
    PendingReason("PartitionDown, PartitionInactive", r"Partition(?:Down|Inactive)", _ACTION,
                  "the partition starts no jobs: use another one, or ask the administrators when it will"),
    # The number of nodes, or nodes that are down (squeue(1)): a start compares the number with the partition's limits.
    PendingReason("PartitionNodeLimit", r"PartitionNodeLimit", _ACTION,
                  "ask for another number of nodes or another partition, or wait: its nodes may be down or "
                  "drained", True),
    PendingReason("ReqNodeNotAvail, UnavailableNodes:*; NodeDown", r"ReqNodeNotAvail,\s*UnavailableNodes|NodeDown",
                  _ACTION, "these nodes are down or drained: ask for others, or wait until they are returned to use"),
    # A limit of what runs at one time (GrpTRESRunMins): the minutes that running jobs may still use.
    PendingReason("AssocGrp*RunMinutes*, QOSGrp*RunMinutes*",
                  r"(?:Assoc|QOS)Grp\w*RunMinutes\w*", _PASSES,
                  "other jobs must end first, or come nearer to their ends; less time (runtime) may start sooner"),
    PendingReason("AssocGrp*Minutes*, QOSGrp*Minutes*, QOSUsageThreshold",
                  r"(?:Assoc|QOS)Grp\w*Minutes\w*|(?:Assoc|QOS)GrpWall\w*|QOSUsageThreshold"
                  r"|Job is at or exceeds .*(?:group max TRES\S* minutes|group wall limit)", _ACTION,
                  "the budget is used up: ask for less time, use another project or qos, or ask for more budget"),
    PendingReason("AssociationTimeLimit, QOSTimeLimit, AssociationResourceLimit, QOSResourceLimit",
                  r"(?:Association|QOS)(?:Time|Resource)Limit", _ACTION, _LESS),
    PendingReason("Constraints", r"Constraints", _ACTION, "no node that is up now has what the job asks for"),
    PendingReason("BurstBufferOperation, SystemFailure", r"BurstBufferOperation|SystemFailure", _ACTION,
                  "ask the administrators"),
    # The rest ends by itself. A hint is given where a user may wonder.
    PendingReason("Nodes required for job are DOWN, DRAINED or reserved …; other ReqNodeNotAvail",
                  r"Nodes required for job are|ReqNodeNotAvail", _PASSES,
                  "the nodes are down or reserved for now: other nodes or a shorter runtime may start sooner"),
    PendingReason("QOSMax*PerUser*, Max*PerUser, Max*PerAccount, AssocMaxJobsLimit, QOSJobLimit, AssociationJobLimit",
                  r"(?:QOS)?Max\w+Per(?:User|Account)(?:Limit)?\b|(?:Assoc|QOS)Max(?:Submit)?Jobs?Limit"
                  r"|(?:QOS|Association)JobLimit", _PASSES,
                  "other jobs must end first; if there are none, ask for less"),
    PendingReason("Resources, Priority, BeginTime, Dependency, Licenses, Reservation, Prolog, Cleaning, "
                  "AssocGrp*Limit, QOSGrp*Limit, and any other reason", r"", _PASSES),
)  # fmt: skip
_COMPILED: Final = tuple((re.compile(kind.pattern, re.DOTALL), kind) for kind in REASONS)


class Pending(NamedTuple):
    """What can end one job's wait, and what to do; ``advice`` is empty where there is nothing to do.

    ``settles`` is the number of seconds that the reason must stay until it counts.
    """

    outlook: Outlook
    advice: str = ""
    settles: float = 0.0


def pending(reason: str, jobid: str = "", partition: str = "") -> Pending:
    """Return what can end the wait of a job that is pending for ``reason``; an unknown reason passes.

    A job that names several ``partition``s, separated by commas, has the reason of one of them, so that no reason that
    concerns a partition is final.
    """
    kind = next(kind for pattern, kind in _COMPILED if pattern.match(reason))
    advice = kind.advice.replace("JOBID", jobid or "JOBID")
    if kind.by_partition and "," in partition:
        return Pending(Outlook.PASSES, f"in one of the partitions the job cannot run: {advice}")
    return Pending(kind.outlook, advice, kind.settles)
