"""Which of the server's environment variables a kernel gets, as one table of what it must not get.

A kernel runs on another machine, in another job, possibly for another user: the server's secrets, its sockets
and its own Slurm job's variables are wrong there, and some of them are dangerous.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

from gateway_slurm.errors import RequestError

_PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_]+)\}")

MAX_ENVIRONMENT: Final = 1 << 20
"""Bytes of all names and values; Linux gives argv and environment a quarter of the stack, 2 MiB by
default."""
MAX_VARIABLE: Final = (128 << 10) - 1
"""Bytes of one ``NAME=value``: Linux's MAX_ARG_STRLEN, its NUL not counted."""

DROPPED: Final[tuple[tuple[str, str], ...]] = (
    ("JUPYTER_TOKEN", "the server's secret"),
    ("JUPYTERHUB_*", "the hub's secrets and addresses"),
    ("JPY_API_TOKEN", "the server's secret"),
    ("JPY_COOKIE_SECRET", "the server's secret"),
    ("JPY_PARENT_PID", "a process on another machine: the kernel would wait for its end"),
    ("CONFIGPROXY_AUTH_TOKEN", "the hub's proxy's secret"),
    ("JUPYTER_GATEWAY_*", "the server's secrets for a gateway"),
    ("JUPYTER_SERVER_*", "the server's address, read by its extensions"),
    ("GATEWAY_SLURM_*", "our own settings and launch tokens"),
    ("KERNEL_SLURM_*", "request fields: they choose the allocation, and are no part of it"),
    ("SLURM_*", "the server's own job; SLURM_JOB_ID or SLURM_NTASKS of another job breaks steps"),
    ("SLURMD_*", "another node's daemon"),
    ("SLURMCTLD_*", "the controller's"),
    ("SBATCH_*", "options for commands of the server's, not of the kernel's"),
    ("SRUN_*", "options for commands"),
    ("SALLOC_*", "options for commands"),
    ("SQUEUE_*", "options for commands"),
    ("SCANCEL_*", "options for commands"),
    ("SCONTROL_*", "options for commands"),
    ("SINFO_*", "options for commands"),
    ("SACCT_*", "options for commands"),
    ("SPRIO_*", "options for commands"),
    ("PMI_*", "another job's MPI"),
    ("PMI2_*", "another job's MPI"),
    ("PMIX_*", "another job's MPI"),
    ("OMPI_*", "another job's MPI"),
    ("MPI_LOCALRANKID", "another job's MPI"),
    ("MPI_LOCALNRANKS", "another job's MPI"),
    ("CUDA_VISIBLE_DEVICES", "another job's GPUs; Slurm sets it"),
    ("GPU_DEVICE_ORDINAL", "another job's GPUs; Slurm sets it"),
    ("ROCR_VISIBLE_DEVICES", "another job's GPUs; Slurm sets it"),
    ("HIP_VISIBLE_DEVICES", "another job's GPUs"),
    ("ZE_AFFINITY_MASK", "another job's GPUs; Slurm sets it"),
    ("TMPDIR", "a directory on the server, or of another job"),
    ("SSH_*", "the server's agent and connection"),
    ("GPG_AGENT_INFO", "the server's agent"),
    ("DBUS_*", "a socket on the server"),
    ("XDG_RUNTIME_DIR", "a directory on the server, with sockets"),
    ("XDG_SESSION_*", "the login session on the server"),
    ("XDG_SEAT*", "the login session on the server"),
    ("XDG_VTNR", "the login session on the server"),
    ("DISPLAY", "a screen of the server's"),
    ("WAYLAND_DISPLAY", "a screen of the server's"),
    ("XAUTHORITY", "a secret for the server's screen"),
    ("TMUX", "a socket on the server"),
    ("TMUX_PANE", "a socket on the server"),
    ("STY", "a socket on the server"),
    ("NOTIFY_SOCKET", "the service manager's"),
    ("LISTEN_FDS", "the service manager's"),
    ("LISTEN_FDNAMES", "the service manager's"),
    ("LISTEN_PID", "the service manager's"),
    ("INVOCATION_ID", "the service manager's"),
    ("JOURNAL_STREAM", "the service manager's"),
    ("MAINPID", "the service manager's"),
    ("WATCHDOG_*", "the service manager's"),
    ("CREDENTIALS_DIRECTORY", "the service manager's secrets"),
    ("PWD", "the shell's"),
    ("OLDPWD", "the shell's"),
    ("SHLVL", "the shell's"),
    ("_", "the shell's"),
    ("HOSTNAME", "another machine's name"),
)

# Of the server's own user; another user's kernel has those of its job instead.
PERSONAL: Final = frozenset(
    {
        "HOME",
        "USER",
        "LOGNAME",
        "USERNAME",
        "SHELL",
        "MAIL",
        "KRB5CCNAME",
        "IPYTHONDIR",
        "PYTHONUSERBASE",
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "XDG_STATE_HOME",
    }
)

# Of the server's machine and its own installations; on another cluster the job's own take their places.
MACHINE: Final = frozenset(
    {
        "PATH",
        "MANPATH",
        "INFOPATH",
        "LD_LIBRARY_PATH",
        "LIBRARY_PATH",
        "CPATH",
        "PKG_CONFIG_PATH",
        "PYTHONPATH",
        "PYTHONHOME",
        "VIRTUAL_ENV",
        "CONDA_PREFIX",
        "CONDA_DEFAULT_ENV",
        "CONDA_EXE",
        "CONDA_PYTHON_EXE",
        "CONDA_SHLVL",
        "MODULEPATH",
        "LOADEDMODULES",
        "_LMFILES_",
        "JUPYTER_PATH",
        "JUPYTER_CONFIG_PATH",
        "XDG_DATA_DIRS",
        "XDG_CONFIG_DIRS",
        "TERM",
        "TZ",
    }
)

_EXACT: Final = frozenset(name for name, _ in DROPPED if not name.endswith("*"))
_PREFIXES: Final = tuple(name[:-1] for name, _ in DROPPED if name.endswith("*"))


def kernel_environment(ambient: Mapping[str, str], *, allowed: Collection[str] | None = None) -> dict[str, str]:
    """Return what of ``ambient`` a kernel gets: without DROPPED, and if ``allowed`` is given only names in
    it.

    ``allowed`` holds names and globs (``LC_*``); it adds nothing to what DROPPED takes away. Names that
    are no
    identifiers are carried too (bash's ``BASH_FUNC_module%%``), unless they are empty or hold ``=`` or NUL.
    Raises RequestError naming a variable whose value holds a NUL or is too long, and for too large a whole.
    """
    kept = {name: value for name, value in ambient.items() if _passes(name, allowed)}
    total = 0
    for name, value in kept.items():
        if "\0" in value:
            raise RequestError(f"the environment variable {name[:200]!r} holds a NUL character", field=name)
        size = len(_bytes(name)) + len(_bytes(value)) + 1
        if size > MAX_VARIABLE:
            raise RequestError(
                f"the environment variable {name[:200]!r} has {size} bytes; Linux takes {MAX_VARIABLE}",
                field=name,
            )
        total += size + 1
    if total > MAX_ENVIRONMENT:
        raise RequestError(f"the environment has {total} bytes; at most {MAX_ENVIRONMENT} are sent to a kernel")
    return kept


def without_personal(environment: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` without what of PERSONAL has the value that it has in ``ours``, our own."""
    return {name: value for name, value in environment.items() if name not in PERSONAL or ours.get(name) != value}


def without_machine(environment: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """Return ``environment`` without what of MACHINE has the value that it has in ``ours``, our own."""
    return {name: value for name, value in environment.items() if name not in MACHINE or ours.get(name) != value}


def dropped_table() -> str:
    """Draw DROPPED as markdown."""
    lines = ["| variable | why a kernel does not get it |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in DROPPED]
    return "\n".join(lines) + "\n"


def _passes(name: str, allowed: Collection[str] | None) -> bool:
    if not name or "=" in name or "\0" in name:
        return False
    if name in _EXACT or name.startswith(_PREFIXES):
        return False
    return allowed is None or any(fnmatchcase(name, pattern) for pattern in allowed)


def _bytes(text: str) -> bytes:
    """Encode as os.environ does: bytes that were no UTF-8 come back as they were."""
    return text.encode("utf-8", "surrogateescape")


def fill_placeholders(item: str, resource_dir: str) -> str:
    """Jupyter's placeholders in an argument; ``{connection_file}`` is filled in on the node."""
    known = {"prefix": sys.prefix, "resource_dir": resource_dir}
    return _PLACEHOLDER.sub(lambda match: known.get(match.group(1)) or match.group(), item)


def only_texts(env: Mapping[str, Any]) -> dict[str, str]:
    """An environment as a process can have it."""
    return {str(name): str(value) for name, value in env.items() if value is not None}
