"""Whether this node's slurmd is there: without it Slurm will take the job for lost (slurm.conf(5), SlurmdTimeout).

Nobody asks Slurm about a job whose link is up, so the launcher has to notice.
"""

from __future__ import annotations

import os


def find_slurmd(node: str) -> int | None:
    """The process id of the node's slurmd; None where there is none to be seen."""
    found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_slurmd(pid)]
    if len(found) > 1:
        # Several on one host are told apart by -N (slurmd(8)).
        found = [pid for pid in found if node in _arguments(pid)]
    return found[0] if found else None


def is_slurmd(pid: int) -> bool:
    """Whether the process is still there, and still slurmd."""
    return _read(pid, "comm").strip() == "slurmd"


def _arguments(pid: int) -> list[str]:
    return _read(pid, "cmdline").split("\0")


def _read(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", errors="replace") as file:
            return file.read()
    except OSError:  # it ended meanwhile, or is hidden (proc(5), hidepid)
        return ""
