"""The request fields that a client may set, and the check of a whole request against the project's limits. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from gateway_slurm.environment import kernel_environment
from gateway_slurm.errors import NotAllowed, RequestError
from gateway_slurm.gateway.specs.projects import NEVER_CLIENT_FIELDS, Project
from gateway_slurm.request import FIELDS, KernelRequest, parse_request
from gateway_slurm.slurm.formats import memory_in_mebibytes

PREFIX: Final = "KERNEL_SLURM_"

COUNTED: Final = frozenset({"nodes", "gpus", "gres", "cpus", "memory", "runtime", "time", "partition"})
"""Request fields that the limits count."""
UNCOUNTED: Final = NEVER_CLIENT_FIELDS.union(
    ("project", "reservation", "jobid", "node", "qos", "constraint", "connect", "share", "isolate", "keep_allocation"),
    ("directory", "default_directory"),
)
"""Request fields that do not make a job larger. A field in neither set is refused where there are limits."""

_KNOWN: Final = frozenset(field.name for field in FIELDS)
_GPU_SHARES: Final = ("shard", "mps")
_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE_?KEY", re.IGNORECASE)


# -- A client's environment --


def client_fields(env: Mapping[str, object], allowed: Collection[str]) -> dict[str, object]:
    """The request fields in a client's environment.

    Raises RequestError for a field that does not exist, NotAllowed for a field that this client may not set.
    """
    found: dict[str, object] = {}
    for variable, value in env.items():
        if not variable.startswith(PREFIX) or _is_unset(value):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in _KNOWN:
            raise RequestError(f"{variable[:100]}: there is no request field {name[:100]!r}", field=name[:100])
        if name in NEVER_CLIENT_FIELDS or name not in allowed:
            names = ", ".join(sorted(set(allowed) - NEVER_CLIENT_FIELDS)) or "none"
            raise NotAllowed(
                f"{variable}={_shown(value)}: clients may not set {name!r} of this kernelspec; they may set: {names}",
                field=name,
            )
        found[name] = value
    return found


def client_environment(env: Mapping[str, object], allowed: Collection[str]) -> dict[str, str]:
    """The variables of a client that its kernel gets: ``KERNEL_*``, the notebook's path as Jupyter servers give it to
    kernels (JPY_SESSION_NAME), and those ``allowed`` (names and globs).

    Request fields are left out, and so are variables named like secrets, unless their full name is allowed. Raises
    RequestError for a value that is not text, and for too much text.
    """
    texts: dict[str, str] = {}
    for name, value in env.items():
        if not isinstance(value, str):
            raise RequestError(f"the environment variable {name[:200]!r} is not text", field=name[:200])
        if name in allowed or not _SECRET.search(name):
            texts[name] = value
    return kernel_environment(texts, allowed=["KERNEL_*", "JPY_SESSION_NAME", *allowed])


# -- The whole request --


def merge_fields(
    project: Project | None, config: Mapping[str, object], client: Mapping[str, object]
) -> dict[str, object]:
    """The project's defaults, overridden by the kernelspec's fields, overridden by the client's.

    A field that must be unset is None: the result overrides the kernelspec's fields once more.
    """
    spec_fields = {name: value for name, value in config.items() if not _is_unset(value)}
    fields = {**(project.defaults if project else {}), **spec_fields, **client}
    if "runtime" in client and "time" not in client and "time" in spec_fields:
        # ``time`` has precedence over ``runtime``: the kernelspec's would override the client's.
        fields["time"] = None
    return fields


def check_request(fields: Mapping[str, object], project: Project | None) -> KernelRequest:
    """The request with these fields. Raises RequestError if they are invalid, NotAllowed if they exceed the limits."""
    request = parse_request(fields)
    if project is None:
        return request
    if project.limits.are_any or project.partitions is not None:
        _refuse_uncountable(fields, project)
    _check_partition(request, project)
    limits, nodes = project.limits, request.nodes or 1
    _check("nodes", nodes, limits.max_nodes, "nodes", project)
    if limits.max_gpus is not None:
        in_gres = sum(_gpus_of(item, project) for item in (request.gres or "").lower().split(","))
        _check("gpus", (request.gpus + in_gres) * nodes, limits.max_gpus, f"GPUs on {nodes} nodes", project)
    _check("cpus", (request.cpus or 1) * nodes, limits.max_cpus, f"CPUs on {nodes} nodes", project)
    _check_memory(request, nodes, project)
    if limits.max_runtime is not None:
        _check_times(request, limits.max_runtime, project)
    return request


def _check(field: str, value: int, limit: int | None, what: str, project: Project) -> None:
    if limit is not None and value > limit:
        raise _too_much(field, f"{value} {what}", f"max_{field}={limit}", project)


def _too_much(field: str, value: str, limit: str, project: Project) -> NotAllowed:
    return NotAllowed(f"{field}: {value} is more than project {project.name!r} allows ({limit})", field=field)


def _refuse_uncountable(fields: Mapping[str, object], project: Project) -> None:
    for name, value in fields.items():
        if name not in COUNTED | UNCOUNTED and not _is_unset(value):
            message = f"{name}={_shown(value)}: it could bypass the limits of project {project.name!r}"
            raise NotAllowed(message, field=name)


def _check_partition(request: KernelRequest, project: Project) -> None:
    """Check each partition of a list: Slurm uses the one in which the job starts first."""
    if project.partitions is None or request.partition is None:
        return
    for partition in request.partition.split(","):
        if partition not in project.partitions:
            raise NotAllowed(
                f"partition={request.partition!r}: {partition!r} is not a partition of project {project.name!r}, "
                f"which has {', '.join(project.partitions) or 'none'}",
                field="partition",
            )


def _check_memory(request: KernelRequest, nodes: int, project: Project) -> None:
    limit = project.limits.max_memory
    if limit is None or (request.jobid is not None and request.memory is None):
        return
    mebibytes = memory_in_mebibytes(request.memory)
    if mebibytes == 0:
        # Without --mem, and with --mem=0, a job can get all memory of a node (sbatch(1)).
        given = "nothing" if request.memory is None else repr(request.memory)
        value = f"{given}, which can be a node's whole memory,"
        raise _too_much("memory", value, f"max_memory={limit}M; set it", project)
    _check("memory", mebibytes * nodes, limit, f"MiB on {nodes} nodes", project)


def _check_times(request: KernelRequest, limit: int, project: Project) -> None:
    """Check both fields, although one has precedence: whichever is used is within the limit."""
    _check("runtime", request.runtime or 0, limit, "minutes", project)
    if request.time is not None and (request.minutes is None or request.minutes > limit):
        time = repr(request.time) if request.minutes is None else f"{request.minutes} minutes"
        raise _too_much("time", time, f"max_runtime={limit}", project)


def _gpus_of(item: str, project: Project) -> int:
    """The GPUs of one node in an item of ``gres``. A share of a GPU counts as one.

    Source: sbatch(1), ``--gres``: ``name[[:type]:count]``; ``gres/`` or ``gres:`` may stand before the name.
    """
    name, *rest = re.split(r"[:/=]", re.sub(r"^(?:gres[:/])+", "", item))
    if name not in ("gpu", *_GPU_SHARES):
        return 0
    if name in _GPU_SHARES or not rest:
        return 1
    if rest[-1].isdigit():
        return int(rest[-1])
    if not rest[-1][:1].isalpha():
        # Slurm reads a suffix in a count (2K), and a type may begin with a digit (3g.20gb).
        raise NotAllowed(
            f"gres={item!r}: the number of GPUs is not clear. Write a plain count at its end; "
            f"project {project.name!r} limits them",
            field="gres",
        )
    return 1


def _is_unset(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.strip() in ("", "None"))


def _shown(value: object) -> str:
    return repr(value)[:200]
