"""The supported versions of Slurm's REST interface, as one table, and the job submission of each. All is pure.

A version (OpenAPI plugin, later data_parser) is stable across Slurm's releases; each release serves the last few.
Sources: slurm.schedmd.com/rest_api.html and openapi_release_notes.html. The tests use v0.0.38, v0.0.42 and v0.0.45,
with Slurm 22.05, 24.11 and 26.05. The other versions from v0.0.40 on were tried with these releases; v0.0.39 follows
the documentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway_slurm.errors import SlurmUnavailable, SubmitRefused
from gateway_slurm.slurm.formats import memory_in_mebibytes, minutes
from gateway_slurm.slurm.model import JobSpec

# The shapes of a number, of an environment and of a state, and of an exit code.
PLAIN, STRUCT = "number or null", "{set, infinite, number}"
OBJECT, LIST, TEXT = "object", "list", "text"
WAIT, PARTS = "wait(2) status", "{status, return_code, signal}"


@dataclass(frozen=True)
class Version:
    """One version, with the shapes and names in which the versions differ."""

    name: str
    slurm: str
    """The first release that serves the version."""
    numbers: str
    environment: str
    """An object of names and values, or a list of ``NAME=value``."""
    state: str
    exit_code: str
    gres: str
    """The prefix of each generic resource."""
    options: str
    """The origin of the option names: ``sbatch``, or the API's structure ``job_desc_msg_t``."""


VERSIONS: Final[tuple[Version, ...]] = (
    Version("v0.0.38", "22.05", PLAIN, OBJECT, TEXT, WAIT, "", "sbatch"),
    Version("v0.0.39", "23.02", STRUCT, LIST, TEXT, WAIT, "gres:", "job_desc_msg_t"),
    Version("v0.0.40", "23.11", STRUCT, LIST, LIST, PARTS, "gres/", "job_desc_msg_t"),
    Version("v0.0.41", "24.05", STRUCT, LIST, LIST, PARTS, "gres/", "job_desc_msg_t"),
    Version("v0.0.42", "24.11", STRUCT, LIST, LIST, PARTS, "gres/", "job_desc_msg_t"),
    Version("v0.0.43", "25.05", STRUCT, LIST, LIST, PARTS, "gres/", "job_desc_msg_t"),
    Version("v0.0.44", "25.11", STRUCT, LIST, LIST, PARTS, "gres/", "job_desc_msg_t"),
    Version("v0.0.45", "26.05", STRUCT, LIST, LIST, PARTS, "gres/", "job_desc_msg_t"),
)

_SUBMIT_PATH: Final = re.compile(r"/slurm/(v[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,4})/job/submit/?", re.ASCII)
# A job's environment is only what the request holds, so the request needs a PATH.
_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
# A job gets no login environment, unlike with sbatch. These lines take the variables that the launcher and kernels need
# from the node's user database.
_LOGIN: Final = """\
if [ -z "${HOME:-}" ]; then
  IFS=: read -r USER _ _ _ _ HOME SHELL <<GATEWAY_SLURM_USER
$(getent passwd "$(id -u)")
GATEWAY_SLURM_USER
  LOGNAME=$USER
  export HOME USER LOGNAME SHELL
fi
"""


def offered_versions(document: Mapping[str, Any]) -> list[str]:
    """Return the versions in a server's OpenAPI document that accept jobs, the oldest first."""
    paths = document.get("paths")
    found = (_SUBMIT_PATH.fullmatch(str(path)) for path in (paths if isinstance(paths, dict) else ()))
    names = {match[1] for match in found if match}
    return sorted(names, key=lambda name: [int(part) for part in name[1:].split(".")])


def newest_known(names: Iterable[str]) -> Version:
    """Return the newest of these versions that is in the table. Raises SlurmUnavailable if none is."""
    offered = list(names)
    for version in reversed(VERSIONS):
        if version.name in offered:
            return version
    raise SlurmUnavailable(
        f"slurmrestd serves {', '.join(offered) or 'no version that accepts jobs'}, and this gateway_slurm supports "
        f"{VERSIONS[0].name} to {VERSIONS[-1].name}: load one of these in slurmrestd (its options -s and -d)"
    )


def submission(spec: JobSpec, version: Version) -> dict[str, Any]:
    """Return the body of a ``job/submit`` request for ``spec``.

    Raises SubmitRefused for extra options, which only sbatch understands.
    """
    if spec.extra:
        raise SubmitRefused(
            f"the options {' '.join(spec.extra)} need sbatch, and this server uses Slurm's REST interface "
            "(SlurmService.cluster): leave them out"
        )
    # Lone surrogates, which JSON can hold and Slurm cannot, were refused in the kernel request.
    script = with_login_environment(spec.script)
    job = {
        **_common(spec, version),
        **(_sbatch_options(spec) if version.options == "sbatch" else _structure_options(spec, version)),
    }
    job = {name: value for name, value in job.items() if value is not None}
    return {"script": script, "job": job} if version.options == "sbatch" else {"job": {**job, "script": script}}


def with_login_environment(script: str) -> str:
    """Return the script with lines that set HOME, USER, LOGNAME and SHELL if the job has no HOME."""
    first, _end, rest = script.partition("\n")
    return f"{first}\n{_LOGIN}{rest}" if first.startswith("#!") else script


def _common(spec: JobSpec, version: Version) -> dict[str, Any]:
    environment = {"PATH": _PATH, **spec.env}
    as_list = [f"{name}={value}" for name, value in environment.items()]
    return {
        "name": spec.name,
        "comment": spec.comment or None,
        "environment": as_list if version.environment == LIST else environment,
        "current_working_directory": "/",
        "standard_output": spec.output,
        "standard_error": spec.output,
        "partition": spec.partition or None,
        "account": spec.account or None,
        "qos": spec.qos or None,
        "reservation": spec.reservation or None,
        "constraints": spec.constraint or None,
        "nodes": None if spec.nodes is None else str(spec.nodes),
        "tasks": spec.nodes or 1,
        "tasks_per_node": 1,
        "cpus_per_task": spec.cpus,
    }


def _sbatch_options(spec: JobSpec) -> dict[str, Any]:
    return {
        # "requeue": false means true (slurm_opt.c, arg_set_data_requeue).
        "no_requeue": True,
        "nodelist": spec.nodelist or None,
        "gres": ",".join(spec.gres) or None,
        "memory_per_node": str(memory_in_mebibytes(spec.memory)) if spec.memory else None,
        "time_limit": None if spec.time is None else str(spec.time),
        # No "signal": only sbatch understands that it is for the batch step alone ("B:"; proc_args.c,
        # get_signal_opts). Here it would reach the kernels. The launcher warns by its own clock.
    }


def _structure_options(spec: JobSpec, version: Version) -> dict[str, Any]:
    warning = spec.signal_seconds or None
    limit = minutes(str(spec.time)) if spec.time is not None else 0
    return {
        "requeue": False,
        "required_nodes": [spec.nodelist] if spec.nodelist else None,
        "tres_per_node": ",".join(version.gres + item for item in spec.gres) or None,
        "memory_per_node": _struct(memory_in_mebibytes(spec.memory)) if spec.memory else None,
        "time_limit": None if spec.time is None else _struct(limit),
        "kill_warning_signal": warning and "USR1",
        "kill_warning_delay": warning and _struct(warning),
        "kill_warning_flags": warning and ["BATCH_JOB"],
    }


def _struct(number: int | None) -> dict[str, Any]:
    """Return a number in the shape STRUCT; None is infinite."""
    return {"set": True, "infinite": number is None, "number": number or 0}
