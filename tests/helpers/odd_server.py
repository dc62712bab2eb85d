"""A server with odd process settings, in whose kernels none of them must be found; and what a process has of its node.

``odd_server.py PLAN`` starts the kernels of a plan (JSON), runs code in them, prints the results, and ends them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A process's own account of itself, written by a shell that changes nothing of it; then the process becomes a kernel.
PROBE = r"""#!/bin/sh
mkdir -p "$1"
# A shell blocks signals while it starts a command, so it reads its status by itself.
while IFS= read -r line; do printf '%s\n' "$line"; done </proc/self/status >"$1/status"
for name in limits environ oom_score_adj stat; do cat /proc/$$/$name >"$1/$name"; done
ls -l /proc/$$/fd >"$1/fds"
readlink /proc/$$/cwd >"$1/cwd"
touch "$1/new file"
mkdir "$1/new directory"
shift
[ $# = 0 ] || exec "$@"
"""

IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT, signal.SIGUSR2, signal.SIGTSTP)
BLOCKED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGWINCH)
NICE, OOM_SCORE_ADJ, DESCRIPTOR = 5, 321, 77
LIMITS = {
    resource.RLIMIT_NOFILE: (700, 800),
    resource.RLIMIT_CPU: (3000, 3001),
    resource.RLIMIT_CORE: (0, 0),
    resource.RLIMIT_STACK: (6 << 20, 6 << 20),
    resource.RLIMIT_MEMLOCK: (1 << 16, 1 << 16),
    resource.RLIMIT_AS: (60 << 30, 60 << 30),
    resource.RLIMIT_FSIZE: (1 << 40, 1 << 40),
}


def be_odd(*, with_sudo: bool = False) -> None:
    """Give this process settings that no kernel must have; its children inherit them. Some prevent sudo."""
    os.umask(0o077)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    os.nice(NICE)
    Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJ))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.dup2(os.open("/etc/hostname", os.O_RDONLY), DESCRIPTOR, inheritable=True)
    for limit, values in LIMITS.items():
        resource.setrlimit(limit, values)
    if not with_sudo:
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def install_probe(directory: Path) -> Path:
    """Write the probe to ``directory``; return its path."""
    path = directory / "probe"
    path.write_text(PROBE)
    path.chmod(0o755)
    return path


def probed(directory: Path) -> dict[str, Any]:
    """What the probe has written, by name; variables are in ``environment``."""
    status = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines())
    kept = ("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "SigCgt", "CapEff", "NoNewPrivs", "Cpus_allowed_list")
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (directory / "limits").read_text().splitlines()[1:]}
    environment = (directory / "environ").read_bytes().split(b"\0")
    descriptors = [line.split(" -> ")[0].split()[-1] for line in (directory / "fds").read_text().splitlines()[1:]]
    fields = (directory / "stat").read_text().rpartition(")")[2].split()
    modes = [oct((directory / name).stat().st_mode & 0o777) for name in ("new file", "new directory")]
    return {
        **{name: value.strip() for name, value in status.items() if name in kept},
        **limits,
        "oom_score_adj": (directory / "oom_score_adj").read_text().strip(),
        "nice": fields[16],
        "descriptors": sorted(int(number) for number in descriptors if int(number) < 3 or int(number) == DESCRIPTOR),
        "cwd": (directory / "cwd").read_text().strip(),
        "modes": modes,
        "environment": dict(os.fsdecode(item).split("=", 1) for item in environment if item),
    }


def run_plan(plan: list[dict[str, Any]], environment: Mapping[str, str], timeout: float) -> dict[str, dict[str, str]]:
    """Run a plan by an odd server; return what each code printed, by kernel and name.

    The plan lists kernels in the order of their starts: ``name``, the ``spec``'s fields, the probe's ``argv``, and the
    ``codes`` to run. In a field, ``JOB`` stands for the first kernel's job and ``OTHER`` for its second node.
    """
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(plan)],
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    """Be an odd server."""
    be_odd()  # before any thread and any child
    from gateway_slurm.service import SlurmService
    from helpers.kernel_clients import execute, install_kernelspec, jobid_of, running_kernel

    results: dict[str, dict[str, str]] = {}
    with contextlib.ExitStack() as stack:
        first = ""
        for kernel in json.loads(sys.argv[1]):
            fields = dict(kernel["spec"])
            for name, value in fields.items():
                if value == "JOB":
                    fields[name] = first
                elif value == "OTHER":
                    fields[name] = SlurmService.instance().allocations_of("")[0]["nodes"][-1]
            install_kernelspec(
                Path(os.environ["JUPYTER_PATH"]),
                kernel["name"],
                config_overrides=fields,
                spec_overrides=kernel["outer"],
            )
            manager, client = stack.enter_context(running_kernel(kernel["name"]))
            first = first or jobid_of(manager)
            results[kernel["name"]] = {name: execute(client, code) for name, code in kernel["codes"].items()}
    SlurmService.instance().close()
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
