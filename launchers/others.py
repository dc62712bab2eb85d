"""Whether others work in the job that this launcher holds: then its end would end what they do.

Asked by a launcher that has lost its server, before it ends the job, and by no other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

TIMEOUT = 20.0
# The steps that every batch job has.
OWN_STEPS = ("batch", "extern")


def others_work(jobid: str) -> bool | None:
    """Whether a job step runs beside the job's own; None while Slurm does not say."""
    argv = ["squeue", "--steps", "--noheader", f"--jobs={jobid}", "--format=%i"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, env=env, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        print("launcher: this node has no squeue: whether others work in the job is not known", file=sys.stderr)
        return False
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return has_others(jobid, done.stdout) if done.returncode == 0 else None


def has_others(jobid: str, listed: str) -> bool:
    """Read squeue's answer, one step a line: ``12.batch`` is the job's own, ``12.0`` somebody's."""
    steps = re.findall(r"^\s*([0-9]+)\.(\S+)\s*$", listed, re.MULTILINE)
    return any(job == jobid and step not in OWN_STEPS for job, step in steps)
