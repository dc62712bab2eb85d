"""Measurements of gateway_slurm beside reference values, in one session: ``make bench``."""

import sys
from pathlib import Path

# The login node and the TCP proxy are helpers of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
