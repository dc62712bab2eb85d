"""What every Slurm job state means for an allocation, as one table.

Source: squeue(1), "JOB STATE CODES", of Slurm 22.05 to 25.11. Anything that is not in the table is UNKNOWN,
and UNKNOWN is never read as dead: a newer Slurm must not make us throw away running kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from enum import Enum
from itertools import product
from typing import Final

from gateway_slurm.errors import GatewaySlurmError

_MEBIBYTES: Final = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


def memory_in_mebibytes(text: str | None) -> int:
    """Slurm's memory format as MiB, rounded up; 0 for None (sbatch(1), ``--mem``)."""
    if not text:
        return 0
    digits = text.upper().removesuffix("B")
    unit = digits[-1] if digits[-1] in _MEBIBYTES else "M"
    return math.ceil(int(digits.rstrip("KMGT")) * _MEBIBYTES[unit])


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


# -- Slurm's host lists: ``a[1-2,07],b03,gpu[08-10]-ib`` to the names in it. --


MAX_HOSTS: Final = 65536
"""As many hosts as Slurm's own default for a list (MAX_RANGE, 64 k); more is refused."""
_MAX_TEXT: Final = 1 << 20
_MAX_DIGITS: Final = 18
_MAX_NAME: Final = 255
"""Characters of one host name, as RFC 1123 has it, section 2.1."""

_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_NAME = re.compile(r"[^\s,\[\]\x00-\x1f\x7f]+")


class HostListError(GatewaySlurmError, ValueError):
    """The text is no Slurm host list, or it names too many hosts."""


def expand(text: str, limit: int = MAX_HOSTS) -> list[str]:
    """Return the host names in Slurm's order; ``""`` and ``(null)``, a job without nodes, give ``[]``.

    Raises HostListError for unbalanced brackets, ranges that run backwards, and more than ``limit`` names.
    """
    if len(text) > _MAX_TEXT:
        raise HostListError(f"a host list of {len(text)} characters; at most {_MAX_TEXT} are read")
    text = text.strip()
    if text in ("", "(null)", "None assigned"):
        return []
    names: list[str] = []
    for item in _items(text):
        names.extend(_expand_item(item, limit - len(names)))
    return names


def _items(text: str) -> Iterator[str]:
    """Split at the commas that are outside of brackets; empty items are skipped, as Slurm does."""
    depth = start = 0
    for at, char in enumerate(text):
        if char == "[":
            depth += 1
        elif char == "]":
            depth -= 1
        if depth not in (0, 1):
            raise HostListError(f"unbalanced brackets in the host list {text[:200]!r}")
        if char == "," and depth == 0:
            if at > start:
                yield text[start:at]
            start = at + 1
    if depth:
        raise HostListError(f"unbalanced brackets in the host list {text[:200]!r}")
    if start < len(text):
        yield text[start:]


def _expand_item(item: str, room: int) -> list[str]:
    choices: list[list[str]] = []
    total, longest = 1, 0
    for group, literal in _PART.findall(item):
        part = [literal] if literal else _expand_group(group, item, room)
        total *= len(part)
        if total > room:
            raise HostListError(f"the host list names too many hosts at {item[:200]!r}")
        longest += max(map(len, part))
        if longest > _MAX_NAME:
            raise HostListError(f"a host name of more than {_MAX_NAME} characters in the host list: {item[:200]!r}")
        choices.append(part)
    names = ["".join(parts) for parts in product(*choices)]
    if not _NAME.fullmatch(names[0]):
        raise HostListError(f"{item[:200]!r} in the host list is no host name")
    return names


def _expand_group(group: str, item: str, room: int) -> list[str]:
    """Expand what is between brackets; zeros that pad a range's first number pad all of it."""
    values: list[str] = []
    for text in group.split(","):
        match = _RANGE.fullmatch(text)
        if match is None or len(text) > 2 * _MAX_DIGITS:
            raise HostListError(f"{text[:200]!r} in the host list item {item[:200]!r} is no range of numbers")
        low, high = match[1], match[2] or match[1]
        first, last = int(low), int(high)
        if last < first:
            raise HostListError(f"the range {text[:200]!r} in the host list item {item[:200]!r} runs backwards")
        if last - first >= room - len(values):
            raise HostListError(f"the host list names too many hosts at {item[:200]!r}")
        values += [str(number).zfill(len(low)) for number in range(first, last + 1)]
    return values


# -- Slurm's time formats, read into minutes. --


FORMATS: Final = "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS or UNLIMITED"

_NUMBER = r"([0-9]{1,9})"
_DAYS = re.compile(rf"{_NUMBER}-{_NUMBER}(?::{_NUMBER})?(?::{_NUMBER})?")
_CLOCK = re.compile(rf"{_NUMBER}(?::{_NUMBER})?(?::{_NUMBER})?")


class TimeFormatError(GatewaySlurmError, ValueError):
    """The text is in none of Slurm's time formats."""


def minutes(text: str) -> int | None:
    """Return the minutes that Slurm reads in ``text``, rounded up to whole ones as Slurm does; None is no
    limit.

    Raises TimeFormatError for anything that is not in one of FORMATS.
    """
    text = text.strip()
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if match := _DAYS.fullmatch(text):
        days, hours, mins, secs = (int(part or 0) for part in match.groups())
    elif match := _CLOCK.fullmatch(text):
        days = 0
        hours, mins, secs = _clock(*match.groups())
    else:
        raise TimeFormatError(f"{text[:200]!r} is no time that Slurm reads; it reads {FORMATS}")
    return (days * 24 + hours) * 60 + mins + -(-secs // 60)


def _clock(first: str, second: str | None, third: str | None) -> tuple[int, int, int]:
    """Read what has no days: two numbers are minutes and seconds, three begin with hours."""
    if third is not None:
        return int(first), int(second or 0), int(third)
    return 0, int(first), int(second or 0)
