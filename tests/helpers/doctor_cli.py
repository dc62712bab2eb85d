"""``jupyter slurm doctor`` as its user runs it, and the output of its path check."""

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
REQUEST = ("--project", "demo", "--partition", "batch")


@dataclass
class PathCheckOutput:
    """The result of a path check: its steps by their keys, in the order in which they were reported."""

    status: int
    steps: dict[str, dict[str, Any]]

    @property
    def failed(self) -> list[str]:
        """The steps that failed: one, or none."""
        return [key for key, step in self.steps.items() if not step["ok"]]

    @property
    def is_good(self) -> bool:
        """Whether all steps passed, in their order."""
        return (self.status, tuple(self.steps), self.failed) == (0, STEPS, [])

    def said(self, step: str) -> str:
        """A step's message, and its advice what to change."""
        result = self.steps[step]
        return f"{result['said']} | {result['change']}"


def command(*arguments: str) -> list[str]:
    """The doctor's argv."""
    return [sys.executable, "-m", "gateway_slurm.cli.app", "doctor", *arguments]


def check_path(*arguments: str, inside: Sequence[str] = ()) -> PathCheckOutput:
    """Run the path check alone; ``inside`` is a command that runs commands in another network."""
    argv = [*inside, *command("--only-walk", "--json", *arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=2 * READY, env=os.environ, check=False)
    assert done.stderr == "", done.stderr
    return PathCheckOutput(done.returncode, {step["step"]: step for step in json.loads(done.stdout)["walk"]})


def failed_at(output: PathCheckOutput, step: str, *words: str) -> bool:
    """Whether the check failed at this step with these words, after it had passed all steps before; its status is 3."""
    before = [key for key in output.steps if key not in (step, "end")]
    assert output.failed == [step], output.steps
    assert before == list(STEPS[: len(before)]), output.steps
    assert [word for word in words if word not in output.said(step)] == [], output.said(step)
    return output.status == 3
