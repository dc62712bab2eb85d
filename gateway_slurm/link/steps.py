"""Job steps that the server has its launcher start from inside the job: what may be asked for, as one table.

One source for both ends, as ``wire``: the server checks what it sends, the launcher what it gets, and the launcher
makes srun's argv from it. The job script carries this file to the node: Python >= 3.9, standard library only.
Sources: srun(1), squeue(1).
"""

from __future__ import annotations

import re
from typing import Any

from gateway_slurm.link.wire import WireError

SCRIPT_LIMIT = 2 * 1024 * 1024
# Steps that one launcher may have under way; each is a process of srun's on the node.
STEPS_LIMIT = 256

# srun's options that may be named, and what their values may be.
OPTIONS = {
    "job-name": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}",
    "nodelist": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}",
    "mem": r"[0-9]{1,12}[KMGTkmgt]?[Bb]?",
    "cpus-per-task": r"[0-9]{1,6}",
    "gres": r"[A-Za-z0-9_][A-Za-z0-9_.:,+=/-]{0,1023}",
}
# Variables that the step gets beside what every one has.
VARIABLES = {"GATEWAY_SLURM_TOKEN": r"[0-9a-f]{64}"}
_STEP = r"[A-Za-z0-9-]{1,64}"
_JOBID = r"[0-9]{1,10}"


def checked(fields: dict[str, Any]) -> dict[str, Any]:
    """Return STEP's fields, if they are all that they may be: ``step``, ``exact``, ``options``, ``env``, ``script``.

    Raises WireError.
    """
    script = fields.get("script")
    if not isinstance(script, str) or "\0" in script or len(script) > SCRIPT_LIMIT:
        raise WireError("STEP needs a script, without NUL and not too long")
    if not isinstance(fields.get("exact"), bool):
        raise WireError("STEP needs to say if its share is exact")
    return {
        "step": step_of(fields),
        "exact": fields["exact"],
        "options": _texts(fields.get("options"), OPTIONS, "option of srun's"),
        "env": _texts(fields.get("env"), VARIABLES, "variable"),
        "script": script,
    }


def step_of(fields: dict[str, Any]) -> str:
    """Return the name that a step has between server and launcher; raise WireError for none."""
    step = fields.get("step")
    if not isinstance(step, str) or not re.fullmatch(_STEP, step, re.ASCII):
        raise WireError(f"{str(step)[:70]!r} does not name a step")
    return step


def _texts(found: Any, allowed: dict[str, str], what: str) -> dict[str, str]:
    if not isinstance(found, dict):
        raise WireError(f"STEP needs an object for each {what}")
    for name, value in found.items():
        if name not in allowed or not isinstance(value, str) or not re.fullmatch(allowed[name], value, re.ASCII):
            raise WireError(f"no {what} that is taken: {str(name)[:40]!r} with {str(value)[:40]!r}")
    return dict(found)


def srun_argv(jobid: str, fields: dict[str, Any]) -> list[str]:
    """Return srun's argv for checked fields; ``/bin/sh`` there reads the script from its standard input.

    Without ``--overlap`` (or ``--exact`` with its own share) the step would wait for the others to end.
    """
    options = fields["options"]
    # An exact step that names no GPUs would get all of the job's; one that finds nothing free would wait.
    exact = ["--exact", "--immediate=1", *([] if "gres" in options else ["--gres=none"])]
    return [
        "srun",
        *(exact if fields["exact"] else ["--overlap"]),
        f"--jobid={_job(jobid)}",
        "--nodes=1",
        "--ntasks=1",
        "--export=ALL",
        "--chdir=/",
        *(f"--{name}={value}" for name, value in options.items()),
        "/bin/sh",
        "-s",
    ]


def squeue_argv(jobid: str, fields: str = "%i %u %N %j") -> list[str]:
    """Return squeue's argv for the running steps of the job, one step per line: id, user, nodes and name."""
    return ["squeue", "--steps", "--noheader", f"--jobs={_job(jobid)}", f"--format={fields}"]


def parse_steps(jobid: str, listed: str) -> list[tuple[str, str, str, str]]:
    """Return id, user, nodes and name of each of the job's steps; lines of other jobs, or none, are left out.

    A step's name is its owner's to choose, and may hold a line end: what follows is then taken for a step that
    is not there, and the job for one that is in use.
    """
    lines = [line.split(maxsplit=3) for line in listed.splitlines()]
    return [
        (line[0], line[1], line[2], line[3] if len(line) > 3 else "")
        for line in lines
        if len(line) >= 3 and line[0].startswith(f"{_job(jobid)}.")
    ]


def _job(jobid: str) -> str:
    if not re.fullmatch(_JOBID, jobid, re.ASCII):
        raise WireError(f"{jobid[:40]!r} is no job id")
    return jobid
