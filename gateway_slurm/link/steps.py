"""Job steps that the launcher starts inside the job for its server: the permitted requests, as one table.

Both ends use this file, like ``wire``: the server checks a request before it sends it, the launcher checks it again and
builds srun's argv from it. The job script carries this file to the node: Python >= 3.9, standard library only.
Sources: srun(1), squeue(1).
"""

from __future__ import annotations

import re
from typing import Any

from gateway_slurm.link.wire import WireError

SCRIPT_LIMIT = 2 * 1024 * 1024
# Running steps of one launcher; each is a process srun on the node.
MAX_STEPS = 256

# The value of --propagate: the names of resource limits in sbatch(1).
_LIMIT = "AS|CORE|CPU|DATA|FSIZE|MEMLOCK|NOFILE|NPROC|RSS|STACK"
PROPAGATE = f"NONE|ALL|(?:{_LIMIT})(?:,(?:{_LIMIT})){{0,9}}"
# The permitted options of srun, and the pattern of each value.
OPTIONS = {
    "job-name": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}",
    "nodelist": r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}",
    "mem": r"[0-9]{1,12}[KMGTkmgt]?[Bb]?",
    "cpus-per-task": r"[0-9]{1,6}",
    "gres": r"[A-Za-z0-9_][A-Za-z0-9_.:,+=/-]{0,1023}",
    "propagate": PROPAGATE,
}
# The permitted environment variables, beside those that every step gets.
VARIABLES = {"GATEWAY_SLURM_TOKEN": r"[0-9a-f]{64}"}
_STEP = r"[A-Za-z0-9-]{1,64}"
_JOBID = r"[1-9][0-9]{0,9}"


def checked(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of STEP: ``step``, ``exact``, ``options``, ``env`` and ``script``.

    Raises WireError if one of them is not permitted.
    """
    script = fields.get("script")
    if not isinstance(script, str) or "\0" in script or len(script) > SCRIPT_LIMIT:
        raise WireError(f"STEP needs a script without NUL, of at most {SCRIPT_LIMIT} characters")
    if not isinstance(fields.get("exact"), bool):
        raise WireError("STEP needs the field exact, true or false")
    return {
        "step": step_of(fields),
        "exact": fields["exact"],
        "options": _texts(fields.get("options"), OPTIONS, "srun option"),
        "env": _texts(fields.get("env"), VARIABLES, "variable"),
        "script": script,
    }


def step_of(fields: dict[str, Any]) -> str:
    """Return the name of a step between server and launcher; raise WireError if it is not one."""
    step = fields.get("step")
    if not isinstance(step, str) or not re.fullmatch(_STEP, step, re.ASCII):
        raise WireError(f"{str(step)[:70]!r} is not the name of a step")
    return step


def _texts(found: Any, allowed: dict[str, str], what: str) -> dict[str, str]:
    if not isinstance(found, dict):
        raise WireError(f"STEP needs a JSON object with each {what}")
    for name, value in found.items():
        if name not in allowed or not isinstance(value, str) or not re.fullmatch(allowed[name], value, re.ASCII):
            raise WireError(f"this {what} is not permitted: {str(name)[:40]!r} with the value {str(value)[:40]!r}")
    return dict(found)


def srun_argv(jobid: str, fields: dict[str, Any]) -> list[str]:
    """Return srun's argv for checked fields; ``/bin/sh`` in the step reads the script from its standard input.

    Without ``--overlap`` (or ``--exact`` with a share of its own) the step would wait for the end of the other steps.
    """
    options = fields["options"]
    # Without --gres=none an exact step would get all GPUs of the job. Without --immediate it would wait for resources.
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
    """Return id, user, nodes and name of each step of the job; other lines are left out.

    The user chooses the name of a step, and it may hold a line end. The rest of such a name can look like another step;
    the job then counts as shared.
    """
    lines = [line.split(maxsplit=3) for line in listed.splitlines()]
    return [
        (line[0], line[1], line[2], line[3] if len(line) > 3 else "")
        for line in lines
        if len(line) >= 3 and line[0].startswith(f"{_job(jobid)}.")
    ]


def _job(jobid: str) -> str:
    if not re.fullmatch(_JOBID, jobid, re.ASCII):
        raise WireError(f"{jobid[:40]!r} is not a job id")
    return jobid
