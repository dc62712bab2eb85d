"""Whether the Linux kernel has killed processes of this job's control group for memory.

Slurm's task/cgroup limits the memory of a job's processes. At the limit the kernel's out-of-memory killer sends SIGKILL
to one of them, usually the largest, and counts it: ``memory.events`` in version 2 of control groups,
``memory.oom_control`` in version 1 (kernel documentation: admin-guide/cgroup-v2, "memory.events"; cgroup-v1/memory).
"""

from __future__ import annotations

import os

PROCESS_GROUPS = "/proc/self/cgroup"
ROOT = "/sys/fs/cgroup"
MAX_FILE = 65536  # bytes


def oom_kills(groups: str = PROCESS_GROUPS, root: str = ROOT) -> int:
    """The number of processes of this process's group that were killed so far; 0 where it is not known."""
    for line in _read(groups).splitlines():
        number, _colon, rest = line.partition(":")
        controllers, _colon, path = rest.partition(":")
        if "memory" in controllers.split(","):
            places = [os.path.join(root, "memory", path.lstrip("/"), "memory.oom_control")]
        elif number == "0":
            places = [os.path.join(root, part, path.lstrip("/"), "memory.events") for part in ("", "unified")]
        else:
            continue
        for place in places:
            for entry in _read(place).splitlines():
                name, _space, count = entry.partition(" ")
                if name == "oom_kill" and count.isdigit():
                    return int(count)
    return 0


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_FILE)
    except OSError:  # no control groups, or a container that does not show them
        return ""
