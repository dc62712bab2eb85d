"""The environment variables of the server that a kernel inherits; a table names those that it must not inherit.

A kernel runs on another machine, in another job, possibly for another user. The server's secrets, its sockets and the
variables of its own Slurm job are wrong there, and some of them are dangerous.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Final

from gateway_slurm.errors import RequestError

_PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_]+)\}")

MAX_ENVIRONMENT: Final = 1 << 20
"""Bytes of all names and values. Linux gives argv and environment a quarter of the stack, 2 MiB by default."""
MAX_VARIABLE: Final = (128 << 10) - 1
"""Bytes of one ``NAME=value``: Linux's MAX_ARG_STRLEN without its NUL."""

DEFAULT_UMASK: Final = 0o022
"""Linux's usual umask (login.defs(5), pam_umask(8)), where the user's own is not known."""

_DROPPED_FOR: Final[dict[str, tuple[str, ...]]] = {
    "the server's secret": ("JUPYTER_TOKEN", "JPY_API_TOKEN", "JPY_COOKIE_SECRET"),
    "the hub's secrets and addresses": ("JUPYTERHUB_*",),
    "a process on another machine; the kernel would end itself, as if that process had ended": ("JPY_PARENT_PID",),
    "the secret of the hub's proxy": ("CONFIGPROXY_AUTH_TOKEN",),
    "the server's secrets for a gateway": ("JUPYTER_GATEWAY_*",),
    "the server's address, read by its extensions": ("JUPYTER_SERVER_*",),
    "settings and launch tokens of gateway_slurm": ("GATEWAY_SLURM_*",),
    "request fields, which choose the allocation": ("KERNEL_SLURM_*",),
    "the server's own job; job steps fail with another job's SLURM_JOB_ID or SLURM_NTASKS": ("SLURM_*",),
    "another node's daemon": ("SLURMD_*",),
    "variables of the controller": ("SLURMCTLD_*",),
    "options for Slurm's commands on the server": (
        "SBATCH_*",
        "SRUN_*",
        "SALLOC_*",
        "SQUEUE_*",
        "SCANCEL_*",
        "SCONTROL_*",
        "SINFO_*",
        "SACCT_*",
        "SPRIO_*",
    ),
    "another job's MPI": ("PMI_*", "PMI2_*", "PMIX_*", "OMPI_*", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "another job's GPUs; Slurm sets it": (
        "CUDA_VISIBLE_DEVICES",
        "GPU_DEVICE_ORDINAL",
        "ROCR_VISIBLE_DEVICES",
        "ZE_AFFINITY_MASK",
    ),
    "another job's GPUs": ("HIP_VISIBLE_DEVICES",),
    "a directory on the server, or of another job": ("TMPDIR",),
    "the server's agent and connection": ("SSH_*",),
    "the server's agent": ("GPG_AGENT_INFO",),
    "a socket on the server": ("DBUS_*", "TMUX", "TMUX_PANE", "STY"),
    "a directory on the server, with sockets": ("XDG_RUNTIME_DIR",),
    "the login session on the server": ("XDG_SESSION_*", "XDG_SEAT*", "XDG_VTNR"),
    "a display of the server": ("DISPLAY", "WAYLAND_DISPLAY"),
    "a secret for the server's display": ("XAUTHORITY",),
    "a variable of the service manager": (
        "NOTIFY_SOCKET",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        "LISTEN_PID",
        "INVOCATION_ID",
        "JOURNAL_STREAM",
        "MAINPID",
        "WATCHDOG_*",
    ),
    "secrets from the service manager": ("CREDENTIALS_DIRECTORY",),
    "a variable of the shell": ("PWD", "OLDPWD", "SHLVL", "_"),
    "the name of another machine": ("HOSTNAME",),
}
DROPPED: Final = tuple((name, reason) for reason, names in _DROPPED_FOR.items() for name in names)
"""Each variable or pattern that a kernel does not inherit, and why."""

# Variables of the server's own user. Another user's kernel has the values of its job instead.
PERSONAL: Final = frozenset(
    {"HOME", "USER", "LOGNAME", "USERNAME", "SHELL", "MAIL", "KRB5CCNAME", "IPYTHONDIR", "PYTHONUSERBASE"}
    | {"JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"}
    | {"XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"}
)

# Variables of the server's machine and its installations. On another cluster a kernel has those of its job instead.
MACHINE: Final = frozenset(
    {"PATH", "MANPATH", "INFOPATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH", "PKG_CONFIG_PATH", "TERM", "TZ"}
    | {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    | {"CONDA_PREFIX", "CONDA_DEFAULT_ENV", "CONDA_EXE", "CONDA_PYTHON_EXE", "CONDA_SHLVL"}
    | {"MODULEPATH", "LOADEDMODULES", "_LMFILES_"}
    | {"JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "XDG_DATA_DIRS", "XDG_CONFIG_DIRS"}
)

_EXACT: Final = frozenset(name for name, _ in DROPPED if not name.endswith("*"))
_PREFIXES: Final = tuple(name[:-1] for name, _ in DROPPED if name.endswith("*"))


def kernel_environment(ambient: Mapping[str, str], *, allowed: Collection[str] | None = None) -> dict[str, str]:
    """The variables of ``ambient`` that a kernel inherits: those not in DROPPED, and with ``allowed`` those in it.

    ``allowed`` holds names and patterns (``LC_*``); it cannot admit what DROPPED names. Names that are no identifiers
    (bash's ``BASH_FUNC_module%%``) are inherited as well, unless they are empty or contain ``=`` or NUL. Raises
    RequestError for a value with a NUL, for a variable that is too long, and for an environment that is too large.
    """
    kept = {name: value for name, value in ambient.items() if _passes(name, allowed)}
    total = 0
    for name, value in kept.items():
        if "\0" in value:
            raise RequestError(f"the environment variable {name[:200]!r} holds a NUL character", field=name)
        size = len(_bytes(name)) + len(_bytes(value)) + 1
        if size > MAX_VARIABLE:
            raise RequestError(
                f"the environment variable {name[:200]!r} has {size} bytes; Linux allows {MAX_VARIABLE}", field=name
            )
        total += size + 1
    if total > MAX_ENVIRONMENT:
        raise RequestError(f"the environment has {total} bytes; at most {MAX_ENVIRONMENT} can be sent to a kernel")
    return kept


def without(names: Collection[str], environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without those of ``names`` that have the same value in the server's own environment."""
    return {name: value for name, value in environment.items() if name not in names or os.environ.get(name) != value}


def _passes(name: str, allowed: Collection[str] | None) -> bool:
    if not name or "=" in name or "\0" in name or name in _EXACT or name.startswith(_PREFIXES):
        return False
    return allowed is None or any(fnmatchcase(name, pattern) for pattern in allowed)


def _bytes(text: str) -> bytes:
    """Encode as os.environ does, which keeps bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def own_umask() -> int:
    """The umask of this process, read from proc_pid_status(5): umask(2) would have to change it for all threads."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name == "Umask":
                return int(value, 8)
    return DEFAULT_UMASK


def fill_placeholders(item: str, resource_dir: str) -> str:
    """Replace Jupyter's placeholders in an argument, except ``{connection_file}``, which the launcher replaces."""
    known = {"prefix": sys.prefix, "resource_dir": resource_dir}
    return _PLACEHOLDER.sub(lambda match: known.get(match.group(1)) or match.group(), item)
