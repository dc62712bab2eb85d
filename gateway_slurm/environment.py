"""The environment variables of the server that a kernel inherits; a table names those that it must not inherit.

A kernel runs on another machine, in another job, possibly for another user. The server's secrets, its sockets and the
variables of its own Slurm job are wrong there, and some of them are dangerous.
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
"""Bytes of all names and values. Linux gives argv and environment a quarter of the stack, 2 MiB by default."""
MAX_VARIABLE: Final = (128 << 10) - 1
"""Bytes of one ``NAME=value``: Linux's MAX_ARG_STRLEN without its NUL."""

DROPPED: Final[tuple[tuple[str, str], ...]] = (
    ("JUPYTER_TOKEN", "the server's secret"),
    ("JUPYTERHUB_*", "the hub's secrets and addresses"),
    ("JPY_API_TOKEN", "the server's secret"),
    ("JPY_COOKIE_SECRET", "the server's secret"),
    ("JPY_PARENT_PID", "a process on another machine; the kernel would end itself, as if that process had ended"),
    ("CONFIGPROXY_AUTH_TOKEN", "the secret of the hub's proxy"),
    ("JUPYTER_GATEWAY_*", "the server's secrets for a gateway"),
    ("JUPYTER_SERVER_*", "the server's address, read by its extensions"),
    ("GATEWAY_SLURM_*", "settings and launch tokens of gateway_slurm"),
    ("KERNEL_SLURM_*", "request fields, which choose the allocation"),
    ("SLURM_*", "the server's own job; job steps fail with another job's SLURM_JOB_ID or SLURM_NTASKS"),
    ("SLURMD_*", "another node's daemon"),
    ("SLURMCTLD_*", "variables of the controller"),
    ("SBATCH_*", "options for Slurm's commands on the server"),
    ("SRUN_*", "options for Slurm's commands on the server"),
    ("SALLOC_*", "options for Slurm's commands on the server"),
    ("SQUEUE_*", "options for Slurm's commands on the server"),
    ("SCANCEL_*", "options for Slurm's commands on the server"),
    ("SCONTROL_*", "options for Slurm's commands on the server"),
    ("SINFO_*", "options for Slurm's commands on the server"),
    ("SACCT_*", "options for Slurm's commands on the server"),
    ("SPRIO_*", "options for Slurm's commands on the server"),
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
    ("DISPLAY", "a display of the server"),
    ("WAYLAND_DISPLAY", "a display of the server"),
    ("XAUTHORITY", "a secret for the server's display"),
    ("TMUX", "a socket on the server"),
    ("TMUX_PANE", "a socket on the server"),
    ("STY", "a socket on the server"),
    ("NOTIFY_SOCKET", "a variable of the service manager"),
    ("LISTEN_FDS", "a variable of the service manager"),
    ("LISTEN_FDNAMES", "a variable of the service manager"),
    ("LISTEN_PID", "a variable of the service manager"),
    ("INVOCATION_ID", "a variable of the service manager"),
    ("JOURNAL_STREAM", "a variable of the service manager"),
    ("MAINPID", "a variable of the service manager"),
    ("WATCHDOG_*", "a variable of the service manager"),
    ("CREDENTIALS_DIRECTORY", "secrets from the service manager"),
    ("PWD", "a variable of the shell"),
    ("OLDPWD", "a variable of the shell"),
    ("SHLVL", "a variable of the shell"),
    ("_", "a variable of the shell"),
    ("HOSTNAME", "the name of another machine"),
)

# Variables of the server's own user. Another user's kernel has the values of its job instead.
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

# Variables of the server's machine and its installations. On another cluster a kernel has those of its job instead.
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
                f"the environment variable {name[:200]!r} has {size} bytes; Linux allows {MAX_VARIABLE}",
                field=name,
            )
        total += size + 1
    if total > MAX_ENVIRONMENT:
        raise RequestError(f"the environment has {total} bytes; at most {MAX_ENVIRONMENT} can be sent to a kernel")
    return kept


def without_personal(environment: Mapping[str, str], server: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without the variables of PERSONAL that have the same value in ``server``, the server's own."""
    return {name: value for name, value in environment.items() if name not in PERSONAL or server.get(name) != value}


def without_machine(environment: Mapping[str, str], server: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without the variables of MACHINE that have the same value in ``server``, the server's own."""
    return {name: value for name, value in environment.items() if name not in MACHINE or server.get(name) != value}


def dropped_table() -> str:
    """Draw DROPPED as a markdown table."""
    lines = ["| variable | why a kernel does not inherit it |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in DROPPED]
    return "\n".join(lines) + "\n"


def _passes(name: str, allowed: Collection[str] | None) -> bool:
    if not name or "=" in name or "\0" in name:
        return False
    if name in _EXACT or name.startswith(_PREFIXES):
        return False
    return allowed is None or any(fnmatchcase(name, pattern) for pattern in allowed)


def _bytes(text: str) -> bytes:
    """Encode as os.environ does, which keeps bytes that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def fill_placeholders(item: str, resource_dir: str) -> str:
    """Replace Jupyter's placeholders in an argument, except ``{connection_file}``, which the launcher replaces."""
    known = {"prefix": sys.prefix, "resource_dir": resource_dir}
    return _PLACEHOLDER.sub(lambda match: known.get(match.group(1)) or match.group(), item)


def only_texts(env: Mapping[str, Any]) -> dict[str, str]:
    """An environment with names and values as text, without variables that are None."""
    return {str(name): str(value) for name, value in env.items() if value is not None}
