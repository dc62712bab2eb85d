"""The records that the store keeps: each is a row of the table that its docstring names.

Fields marked *encrypted* are encrypted at rest and never in a ``repr``. All times are seconds since the epoch.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = "memory:"
"""The ``store_url`` of a store without a file, whose records end with the process."""
LEASE_SECONDS = 10.0
"""How long a server keeps its rows without renewing its lease."""
RENEW_SECONDS = 3.0
"""How often a server renews its lease."""


@dataclass(frozen=True)
class ProcessInfo:
    """A server's process. The boot and the start time tell it from a later process with the same pid."""

    host: str
    boot: str
    pid: int
    start: str

    @property
    def file_name(self) -> str:
        """The name of the process's file for servers on other hosts (``export.RecordFiles``)."""
        return f"{self.host}-{self.pid}-{self.start}.json"

    @property
    def is_dead(self) -> bool:
        """Whether the process is known to have ended; False for a process on another host, which cannot be seen."""
        if not self.is_here:
            return False
        return self.boot != this_process().boot or start_time(self.pid) != self.start

    @property
    def is_here(self) -> bool:
        """Whether the process runs, or ran, on this host."""
        return self.host == socket.gethostname()


def start_time(pid: int) -> str:
    """When a process started, in clock ticks since the boot (proc(5), stat, field 22); empty if it has ended."""
    try:
        state, _parent, *stat_fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # A zombie has ended, although its parent has not waited for it.
        return "" if state in "ZX" else stat_fields[17]
    except (OSError, ValueError, IndexError):
        return ""


def this_process() -> ProcessInfo:
    """The calling process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ProcessInfo(socket.gethostname(), boot, os.getpid(), start_time(os.getpid()))


@dataclass(frozen=True, kw_only=True)
class AllocationRecord:
    """One allocation (table ``allocations``)."""

    launcher_id: str
    """The key. A submitted job has the comment ``gateway_slurm:<launcher_id>`` in Slurm; an adopted job has the key
    ``job-<jobid>``. Launchers and kernels refer to it as ``record_key``."""
    jobid: str | None = None
    """None until sbatch has answered."""
    ours: bool = True
    """Submitted by a server; False for an adopted job."""
    state: str = ""
    nodelist: list[str] = field(default_factory=list)
    end_time: float | None = None
    kernel_ids: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    """The request fields."""
    keep: bool = False
    """The job stays after its last kernel."""
    owner: str = ""
    """The user who owns it; empty for the Unix user of the server's process."""
    account: str = ""
    identity: str = ""
    """What tells the job from other jobs that have or had the same id."""


@dataclass(frozen=True, kw_only=True)
class LauncherRecord:
    """What another server needs to accept a launcher's connection (table ``launchers``)."""

    launcher_id: str
    record_key: str
    """``AllocationRecord.launcher_id`` of the allocation that the launcher runs in."""
    jobid: str = ""
    tokens: tuple[bytes, bytes] = field(repr=False)
    """Encrypted. The launch token, and the token that replaces it with the first WELCOME."""
    node: str = ""
    holds_job: bool = False
    isolated: bool = False
    stepid: str = ""
    nodelist: str = ""
    end_time: float | None = None
    slots: dict[str, int] = field(default_factory=dict)
    """For each kernel id the number in the name of the kernel's directory on the node."""
    epoch: int = 0
    """Increases with each takeover. The launcher rejects a server with a lower epoch than it has seen."""


@dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """What another server needs to restore a kernel (table ``kernels``)."""

    kernel_id: str
    launcher_id: str
    record_key: str
    owner: str = ""
    generation: int = 0
    mode: str = ""
    """How servers reach its channels, from the launcher's STARTED message."""
    ip: str = ""
    ports: dict[str, int] = field(default_factory=dict)
    pid: int = 0
    started_at: float | None = None
    launch: dict[str, Any] = field(default_factory=dict, repr=False)
    """Encrypted. The ``KernelLaunch`` as JSON: argv, env, cwd, connection, mode, language, …"""
    manager: dict[str, Any] = field(default_factory=dict, repr=False)
    """Encrypted. What a new kernel manager is made from: kernel_name, path, launch arguments, …"""
    node: str = ""


@dataclass(frozen=True, kw_only=True)
class SessionRecord:
    """A Jupyter session: a document or console, and its kernel (table ``sessions``)."""

    session_id: str
    owner: str = ""
    kernel_id: str = ""
    path: str = ""
    name: str = ""
    type: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServerRecord:
    """A server process. The rows with its ``server_id`` belong to it (table ``servers``)."""

    server_id: str
    deployment: str = ""
    """Servers of one deployment take over from each other; a server without one is taken over only kernel by kernel."""
    process: ProcessInfo
    url: str = ""
    addresses: tuple[str, ...] = ()
    """``host:port`` of each address that launchers dial."""
    relays: tuple[dict[str, Any], ...] = ()
    """The server's ports on the login node: ``port``, and the process with that port (``boot``, ``pid``, ``ticks``)."""
    lease_until: float = 0.0
    """By this host's clock, whatever the database's clock says."""
    ended: bool = False
    """The server has recorded its end, or another server has taken over from it."""

    @property
    def is_dead(self) -> bool:
        """Whether its deployment may take over its rows: it has ended, or its lease has expired."""
        return self.ended or self.process.is_dead or self._lease_expired

    @property
    def is_gone(self) -> bool:
        """Whether its kernels are out of use. A server on this host that is stopped or suspended will continue."""
        return self.ended or self.process.is_dead or (self._lease_expired and not self.process.is_here)

    @property
    def _lease_expired(self) -> bool:
        return time.time() >= self.lease_until


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Records of several tables that belong together."""

    allocations: tuple[AllocationRecord, ...] = ()
    launchers: tuple[LauncherRecord, ...] = ()
    kernels: tuple[KernelRecord, ...] = ()
    sessions: tuple[SessionRecord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClaimedRows(Rows):
    """The rows that a claim has moved to the claiming server."""

    epoch: int = 0
    """The new epoch of the claimed launchers."""
    servers: tuple[ServerRecord, ...] = ()
    """The servers that had these rows, with the addresses that their launchers dial."""


@dataclass(frozen=True, kw_only=True)
class LostRows:
    """Keys of rows that another server has taken over from this one. Their kernels live and must not be ended."""

    allocations: frozenset[str] = frozenset()
    launchers: frozenset[str] = frozenset()
    kernels: frozenset[str] = frozenset()
    sessions: frozenset[str] = frozenset()


ServerAllocation = tuple[ServerRecord, AllocationRecord]
"""An allocation, and the server that has it on record."""
