"""Standard output that nobody reads any more, as when it goes to ``head``."""

from __future__ import annotations

import os
import sys


def flush_output() -> None:
    """What is still to be written fails here, and not at Python's end, where nobody can handle it."""
    if sys.stdout is not None:  # closed by whoever started us
        sys.stdout.flush()


def discard_output() -> None:
    """After an error of writing: what is printed from now on goes nowhere, and fails no more."""
    if sys.stdout is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
