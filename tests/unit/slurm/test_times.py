"""Slurm's time formats."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_slurm.slurm.formats import TimeFormatError, minutes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30), ("30:00", 30), ("30:01", 31), ("1:00:00", 60), ("1-0", 1440), ("1-2", 1560),
        ("1-2:3", 1563),
        ("1-02:03:04", 1564), ("UNLIMITED", None), ("infinite", None), (" 5 ", 5), ("0", 0),
    ],
)  # fmt: skip
def test_minutes(text: str, expected: int | None) -> None:
    """Each of sbatch's formats is read; seconds are rounded up to a minute."""
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1:2:3:4", "1-", "1-2:3:4:5", "x", "1d", "٣", "9" * 5000, "NOT_SET"])
def test_refused(text: str) -> None:
    """Any other text raises TimeFormatError."""
    with pytest.raises(TimeFormatError):
        minutes(text)


@given(st.integers(0, 400), st.integers(0, 23), st.integers(0, 59))
def test_round_trip(days: int, hours: int, mins: int) -> None:
    """What squeue prints for a limit gives that limit."""
    assert minutes(f"{days}-{hours:02}:{mins:02}:00") == (days * 24 + hours) * 60 + mins


@given(st.text())
def test_only_our_error(text: str) -> None:
    """Any text gives minutes or TimeFormatError."""
    try:
        limit = minutes(text)
    except TimeFormatError:
        return
    assert limit is None or limit >= 0
