"""Slurm's time formats, read into minutes.

Source: sbatch(1), "--time": minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM and D-HH:MM:SS; squeue(1) prints the
same,
and UNLIMITED.
"""

from __future__ import annotations

import re
from typing import Final

from gateway_slurm.errors import GatewaySlurmError

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
