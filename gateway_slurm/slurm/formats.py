"""Slurm's text formats as values: job states, host lists, times and memory. All functions are pure."""

from __future__ import annotations

import math
import re
from enum import Enum
from itertools import product
from typing import Final

from gateway_slurm.errors import GatewaySlurmError

MAX_HOSTS: Final = 65536
"""The number of hosts that Slurm allows in a list by default (MAX_RANGE, 64 k); a longer list is refused."""
TIME_FORMATS: Final = "minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS or UNLIMITED"

_MAX_HOSTLIST: Final = 1 << 20  # characters
_MAX_DIGITS: Final = 18
_MAX_HOST_NAME: Final = 255  # characters (RFC 1123, section 2.1)
_HOSTLIST_GROUP: Final = re.compile(r"\[[^\[\]]*\]")
# The items stand between the commas outside brackets. Empty items are skipped, as in Slurm.
_HOSTLIST_ITEM: Final = re.compile(r"(?:\[[^\[\]]*\]|[^\[\],])+")
_HOSTLIST_PART: Final = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_HOSTLIST_RANGE: Final = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_HOST_NAME: Final = re.compile(r"[^\s,\[\]\x00-\x1f\x7f]+")
_TIME_NUMBER: Final = r"([0-9]{1,9})"
_TIME_WITH_DAYS: Final = re.compile(rf"{_TIME_NUMBER}-{_TIME_NUMBER}(?::{_TIME_NUMBER})?(?::{_TIME_NUMBER})?")
_SQUEUE_TIME: Final = re.compile(r"(?:(?:([0-9]{1,6})-)?([0-9]{1,2}):)?([0-9]{1,2}):([0-9]{2})", re.ASCII)
_TIME_OF_DAY: Final = re.compile(rf"{_TIME_NUMBER}(?::{_TIME_NUMBER})?(?::{_TIME_NUMBER})?")
_MEBIBYTES: Final = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}


class HostListError(GatewaySlurmError, ValueError):
    """The text is not a Slurm host list, or it names too many hosts."""


class TimeFormatError(GatewaySlurmError, ValueError):
    """The text is in none of Slurm's time formats."""


# -- Job states --

# Source: squeue(1), "JOB STATE CODES", of Slurm 22.05 to 25.11. A state that is not in the table is UNKNOWN.
# UNKNOWN never means that the job is dead: a newer Slurm must not make the server discard running kernels.


class Meaning(Enum):
    """What the server does with a job in a state; the value is the sentence that the documentation shows."""

    WAITING = "no nodes yet; wait"
    HELD = "no nodes until the job is released; wait, and report it"
    USABLE = "kernels can run"
    PAUSED = "the processes are stopped and may resume; wait"
    ENDING = "the job is being torn down; start nothing in it"
    OVER = "final; every process of the job is gone"
    UNKNOWN = "not a known state; the job counts as neither usable nor dead"


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

STATES: Final[dict[str, Meaning]] = {name: meaning for name, _, meaning in _TABLE}
_CODES: Final[dict[str, Meaning]] = {code: meaning for _, code, meaning in _TABLE}


def meaning(state_text: str) -> Meaning:
    """Return the meaning of a state as Slurm writes it: in any case, as a compact code, or as ``CANCELLED by 1000``.

    An empty or unknown text is ``Meaning.UNKNOWN``.
    """
    words = state_text.upper().split(maxsplit=1)
    if not words:
        return Meaning.UNKNOWN
    # sacct marks a word that it has cut off ("CANCELLED+").
    word = words[0].rstrip("+")
    return STATES.get(word) or _CODES.get(word) or Meaning.UNKNOWN


# -- Host lists: ``a[1-2,07],b03,gpu[08-10]-ib`` --


def expand_hostlist(text: str, limit: int = MAX_HOSTS) -> list[str]:
    """Return the host names in Slurm's order. ``""`` and ``(null)`` (a job without nodes) give ``[]``.

    Raises HostListError for unbalanced brackets, for descending ranges, and for more than ``limit`` names.
    """
    if len(text) > _MAX_HOSTLIST:
        raise HostListError(f"the host list has {len(text)} characters; at most {_MAX_HOSTLIST} are read")
    text = text.strip()
    if text in ("", "(null)", "None assigned"):
        return []
    if not {"[", "]"}.isdisjoint(_HOSTLIST_GROUP.sub("", text)):
        raise HostListError(f"unbalanced brackets in the host list {text[:200]!r}")
    names: list[str] = []
    for item in _HOSTLIST_ITEM.findall(text):
        names.extend(_expand_item(item, limit - len(names)))
    return names


def _expand_item(item: str, room: int) -> list[str]:
    choices: list[list[str]] = []
    total, longest = 1, 0
    for group, literal in _HOSTLIST_PART.findall(item):
        part = [literal] if literal else _expand_group(group, item, room)
        total *= len(part)
        if total > room:
            raise HostListError(f"the host list names too many hosts at {item[:200]!r}")
        longest += max(map(len, part))
        if longest > _MAX_HOST_NAME:
            raise HostListError(
                f"a host name of more than {_MAX_HOST_NAME} characters in the host list: {item[:200]!r}"
            )
        choices.append(part)
    names = ["".join(parts) for parts in product(*choices)]
    if not _HOST_NAME.fullmatch(names[0]):
        raise HostListError(f"{item[:200]!r} in the host list is not a host name")
    return names


def _expand_group(group: str, item: str, room: int) -> list[str]:
    """Expand the text between two brackets. Leading zeros of a range's first number apply to the whole range."""
    values: list[str] = []
    for text in group.split(","):
        match = _HOSTLIST_RANGE.fullmatch(text)
        if match is None or len(text) > 2 * _MAX_DIGITS:
            raise HostListError(f"{text[:200]!r} in the host list item {item[:200]!r} is not a range of numbers")
        low, high = match[1], match[2] or match[1]
        first, last = int(low), int(high)
        if last < first:
            raise HostListError(f"the range {text[:200]!r} in the host list item {item[:200]!r} is descending")
        if last - first >= room - len(values):
            raise HostListError(f"the host list names too many hosts at {item[:200]!r}")
        values += [str(number).zfill(len(low)) for number in range(first, last + 1)]
    return values


# -- Times and memory --


def minutes(text: str) -> int | None:
    """Return a time in Slurm's format as minutes, rounded up as Slurm does; None means no limit.

    Raises TimeFormatError for text that is in none of TIME_FORMATS.
    """
    text = text.strip()
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    if match := _TIME_WITH_DAYS.fullmatch(text):
        days, hours, mins, secs = (int(part or 0) for part in match.groups())
    elif match := _TIME_OF_DAY.fullmatch(text):
        days, parts = 0, [int(part) for part in match.groups() if part]
        # One number is minutes, two are minutes and seconds, three begin with hours.
        hours, mins, secs = parts if len(parts) == 3 else (0, *parts, 0)[:3]
    else:
        raise TimeFormatError(f"{text[:200]!r} is not in a time format of Slurm: {TIME_FORMATS}")
    return (days * 24 + hours) * 60 + mins + -(-secs // 60)


def seconds(text: str) -> int | None:
    """Return a duration as squeue prints it (``[days-]hours:minutes:seconds``) as seconds; None for other text."""
    match = _SQUEUE_TIME.fullmatch(text.strip())
    if match is None:
        return None
    days, hours, mins, secs = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + mins) * 60 + secs


def memory_in_mebibytes(text: str | None) -> int:
    """Return a memory size in Slurm's format as MiB, rounded up; 0 for None (sbatch(1), ``--mem``)."""
    if not text:
        return 0
    digits = text.upper().removesuffix("B")
    unit = digits[-1] if digits[-1] in _MEBIBYTES else "M"
    return math.ceil(int(digits.rstrip("KMGT")) * _MEBIBYTES[unit])
