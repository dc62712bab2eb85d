"""Which process is meant, so that a later one with its pid is never taken for it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessInfo:
    """A service's process; the start time and the boot tell it from a later one with its pid."""

    host: str
    boot: str
    pid: int
    start: str

    @property
    def file_name(self) -> str:
        return f"{self.host}-{self.pid}-{self.start}.json"

    @property
    def is_dead(self) -> bool:
        """Known to be gone; one on another host is never called dead from here."""
        if not self.is_here:
            return False
        return self.boot != this_process().boot or start_time(self.pid) != self.start

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, on this host."""
        return self.host == socket.gethostname()


def start_time(pid: int) -> str:
    """When a process started, in clock ticks since the boot (proc(5), stat, field 22); empty if it is gone."""
    try:
        state, _parent, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # One that is dead and that its parent has not waited for does nothing any more.
        return "" if state in "ZX" else fields[17]
    except (OSError, ValueError, IndexError):
        return ""


def this_process() -> ProcessInfo:
    """The process that asks."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ProcessInfo(socket.gethostname(), boot, os.getpid(), start_time(os.getpid()))
