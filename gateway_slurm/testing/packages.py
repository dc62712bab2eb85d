"""The programs that a private cluster needs, and the Debian packages that contain them."""

from __future__ import annotations

import re
import subprocess

from gateway_slurm.errors import ClusterError
from gateway_slurm.testing.processes import find_program

_SLURM = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sinfo": "slurm-client",
}
_ACCOUNTING = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
_REST = {"slurmrestd": "slurmrestd"}
# These packages contain plugins only, so no program shows whether they are installed. No daemon starts without them.
_SLURM_PLUGINS = "slurm-wlm-basic-plugins"
_ACCOUNTING_PLUGINS = "slurm-wlm-mysql-plugin"
_REST_PLUGINS = "slurm-wlm-jwt-plugin"


def check(*, accounting: bool, rest: bool = False) -> None:
    """Raise ClusterError if programs are missing; the message has the command that installs them."""
    programs = {**_SLURM, **(_ACCOUNTING if accounting else {}), **(_REST if rest else {})}
    missing = [name for name in programs if find_program(name) is None]
    if not missing:
        return
    needed = {programs[name] for name in missing} | {_SLURM_PLUGINS}
    if accounting:
        needed.add(_ACCOUNTING_PLUGINS)
    if rest:
        needed.add(_REST_PLUGINS)
    raise ClusterError(
        f"a private cluster needs {', '.join(missing)}, not found on this machine. On Debian and Ubuntu: "
        f"sudo apt-get install --no-install-recommends {' '.join(sorted(needed))}"
    )


def slurm_version() -> tuple[int, int]:
    """The installed Slurm's version, as (22, 5). Raises ClusterError."""
    argv = [find_program("slurmd") or "slurmd", "-V"]
    try:
        output = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(f"slurmd -V failed: {error}") from error
    return parse_version(output)


def parse_version(output: str) -> tuple[int, int]:
    """The version in the output of ``slurmd -V``, such as ``slurm 24.11.5`` or ``slurm-wlm 22.05.8``."""
    match = re.match(r"slurm\S*\s+(\d+)\.(\d+)", output)
    if match is None:
        raise ClusterError(f"slurmd -V printed no version: {output.strip()!r}")
    return int(match[1]), int(match[2])
