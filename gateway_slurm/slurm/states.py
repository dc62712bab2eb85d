"""What every Slurm job state means for an allocation, as one table.

Source: squeue(1), "JOB STATE CODES", of Slurm 22.05 to 25.11. Anything that is not in the table is UNKNOWN,
and UNKNOWN is never read as dead: a newer Slurm must not make us throw away running kernels.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final


class Meaning(Enum):
    """What a job state lets us do; the value is the sentence that the documentation shows."""

    WAITING = "no nodes yet; wait"
    HELD = "no nodes until somebody releases the job; wait, and say so"
    USABLE = "kernels can run"
    PAUSED = "the processes are stopped, the allocation may come back; wait"
    ENDING = "the job is being torn down; start nothing in it"
    OVER = "final; every process of the job is gone"
    UNKNOWN = "not a state we know; neither usable nor dead"


_TABLE: Final[tuple[tuple[str, str, Meaning], ...]] = (
    ("PENDING", "PD", Meaning.WAITING),
    ("CONFIGURING", "CF", Meaning.WAITING),
    ("POWER_UP_NODE", "PU", Meaning.WAITING),
    ("REQUEUED", "RQ", Meaning.WAITING),
    ("REQUEUE_FED", "RF", Meaning.WAITING),
    ("EXPEDITING", "EX", Meaning.WAITING),
    ("REQUEUE_HOLD", "RH", Meaning.HELD),
    ("RESV_DEL_HOLD", "RD", Meaning.HELD),
    ("SPECIAL_EXIT", "SE", Meaning.HELD),
    ("RUNNING", "R", Meaning.USABLE),
    ("RESIZING", "RS", Meaning.USABLE),
    ("SIGNALING", "SI", Meaning.USABLE),
    ("SUSPENDED", "S", Meaning.PAUSED),
    ("STOPPED", "ST", Meaning.PAUSED),
    ("COMPLETING", "CG", Meaning.ENDING),
    ("STAGE_OUT", "SO", Meaning.ENDING),
    ("COMPLETED", "CD", Meaning.OVER),
    ("CANCELLED", "CA", Meaning.OVER),
    ("FAILED", "F", Meaning.OVER),
    ("TIMEOUT", "TO", Meaning.OVER),
    ("DEADLINE", "DL", Meaning.OVER),
    ("PREEMPTED", "PR", Meaning.OVER),
    ("NODE_FAIL", "NF", Meaning.OVER),
    ("BOOT_FAIL", "BF", Meaning.OVER),
    ("LAUNCH_FAILED", "LF", Meaning.OVER),
    ("RECONFIG_FAIL", "RC", Meaning.OVER),
    ("OUT_OF_MEMORY", "OOM", Meaning.OVER),
    ("REVOKED", "RV", Meaning.OVER),
)

STATES: Final[dict[str, Meaning]] = {name: what for name, _, what in _TABLE}
_CODES: Final[dict[str, Meaning]] = {code: what for _, code, what in _TABLE}


def meaning(state_text: str) -> Meaning:
    """Return what Slurm's word for a state means; case, compact codes and ``CANCELLED by 1000`` are
    understood.

    Never raises: an empty or unheard-of text is ``Meaning.UNKNOWN``.
    """
    words = state_text.upper().split(maxsplit=1)
    if not words:
        return Meaning.UNKNOWN
    # sacct marks a word that it had to cut ("CANCELLED+"); cut or not, the word decides.
    word = words[0].rstrip("+")
    return STATES.get(word) or _CODES.get(word) or Meaning.UNKNOWN


def states_table() -> str:
    """Draw the table as markdown, one line per state."""
    lines = ["| state | code | for us | what we do |", "|---|---|---|---|"]
    lines += [f"| `{name}` | `{code}` | {what.name} | {what.value} |" for name, code, what in _TABLE]
    lines.append(f"| anything else | | {Meaning.UNKNOWN.name} | {Meaning.UNKNOWN.value} |")
    return "\n".join(lines) + "\n"


# Reasons for which a pending job waits in vain until somebody changes the job, the site's limits or its
# configuration. Source: squeue(1), "JOB REASON CODES", and slurm_protocol_defs.c of 22.05 to 25.11. What ends
# by itself (Resources, Priority, a group's limit that others' jobs use up, a node that is down) is not here.
_HOPELESS: Final[dict[str, str]] = {
    "PartitionTimeLimit": "ask for less time (runtime) or another partition",
    "PartitionNodeLimit": "ask for fewer nodes or another partition",
    "BadConstraints": "ask for what the nodes have (nodes, gpus, gres, constraint, memory, cpus)",
    "InvalidAccount": "correct project",
    "InvalidQOS": "correct qos",
    "AccountNotAllowed": "use another project or partition",
    "QOSNotAllowed": "use another qos or partition",
    "ReservationDeleted": "correct reservation",
    "ReservationInvalid": "correct reservation",
    "DependencyNeverSatisfied": "submit it without that dependency",
}
# AssocMaxWallDurationPerJobLimit, QOSMaxCpuPerJobLimit, QOSMaxNodePerJobLimit, QOSMinGRES and their like: one
# job alone is over (or under) a limit of the account's or of the quality of service's.
_PER_JOB: Final = re.compile(r"(?:Assoc|QOS)(?:Max\w+PerJob(?:Limit)?|MaxWallDuration\w*|Min\w+)")


def remedy(reason: str) -> str | None:
    """Return what to do about a job that is pending for ``reason``; None if waiting may help."""
    if _PER_JOB.fullmatch(reason):
        return "ask for less (runtime, nodes, gpus, cpus, memory), or use another project or qos"
    return _HOPELESS.get(reason)
