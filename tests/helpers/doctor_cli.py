"""``jupyter slurm doctor`` as its user runs it, and what its walk said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helpers.kernel_clients import READY

STEPS = (
    "settings", "login", "slurm", "server", "submit", "run", "dial", "python", "crypto", "kernel", "execute", "end",
)  # fmt: skip
ASKED = ("--project", "demo", "--partition", "batch")


@dataclass
class Walked:
    """What came of a walk: its steps, by their keys, in the order in which they were told."""

    status: int
    steps: dict[str, dict[str, Any]]

    @property
    def failed(self) -> list[str]:
        """The steps that failed: one, or none."""
        return [key for key, step in self.steps.items() if not step["ok"]]

    @property
    def is_good(self) -> bool:
        """Whether it came to its end, by all steps, in their order."""
        return (self.status, tuple(self.steps), self.failed) == (0, STEPS, [])

    def said(self, step: str) -> str:
        """What a step said, and what it would have changed."""
        found = self.steps[step]
        return f"{found['said']} | {found['change']}"


def command(*arguments: str) -> list[str]:
    """The argv of the doctor."""
    return [sys.executable, "-m", "gateway_slurm.cli.app", "doctor", *arguments]


def walk(*arguments: str, inside: Sequence[str] = ()) -> Walked:
    """Walk, and look for nothing that is left; ``inside`` is a command that runs commands in another network."""
    argv = [*inside, *command("--only-walk", "--json", *arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=2 * READY, env=os.environ, check=False)
    assert done.stderr == "", done.stderr
    return Walked(done.returncode, {each["step"]: each for each in json.loads(done.stdout)["walk"]})


def failed_at(walked: Walked, step: str, *words: str) -> bool:
    """Whether it failed there, told all before it as good and said these words; the exit status says so, too."""
    before = [key for key in walked.steps if key not in (step, "end")]
    assert walked.failed == [step], walked.steps
    assert before == list(STEPS[: len(before)]), walked.steps
    assert [word for word in words if word not in walked.said(step)] == [], walked.said(step)
    return walked.status == 3
