"""How long before its end a job asks Slurm for a signal."""

from __future__ import annotations

import pytest

from gateway_slurm.allocations.start import MAX_SIGNAL_SECONDS, signal_seconds


@pytest.mark.parametrize(
    ("warnings", "minutes", "seconds"),
    [
        ([10, 5, 1], 30, 600),
        ([1, 5, 10], None, 600),  # no limit yet: an admin may set one
        ([10, 5, 1], 12, 600),
        ([10, 5, 1], 11, 300),  # 600 would come with the start, or soon after
        ([10, 5, 1], 3, 60),
        ([10, 5, 1], 2, None),
        ([0.5], 60, 30),
        ([5000], 10_000, MAX_SIGNAL_SECONDS),
        ([], 60, None),
        ([0], 60, None),
        ([-5], 60, None),
    ],
)
def test_the_signal_comes_with_the_first_warning_that_fits(warnings, minutes, seconds):
    """It never comes with the start, and is what sbatch accepts."""
    assert signal_seconds(warnings, minutes) == seconds
