"""What the store keeps: plain records, each of which is a row of the table that its docstring names.

Fields marked *sealed* are encrypted at rest and never in a ``repr``. All times are seconds since the epoch.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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


# -- What the store keeps: plain records, each of which is a row of the table that its docstring names. --


# How long a server that is not heard of owns what it has, and how often it says that it lives.
LEASE_SECONDS = 10.0
RENEW_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class AllocationRecord:
    """What is known of one allocation (table ``allocations``)."""

    launcher_id: str
    """By which Slurm knows a job of ours: its comment is ``gateway_slurm:<launcher_id>``.

    Of an adopted one: ``job-<jobid>``. The other records' ``record_key``.
    """
    jobid: str | None = None
    """None until sbatch has answered."""
    ours: bool = True
    state: str = ""
    nodelist: list[str] = field(default_factory=list)
    end_time: float | None = None
    """Seconds since the epoch."""
    kernel_ids: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    keep: bool = False
    owner: str = ""
    """Whom it belongs to; empty for the user of the process that keeps the record."""
    account: str = ""
    identity: str = ""
    """What tells the job from others with its id (``launching.identity_of``)."""


@dataclass(frozen=True, kw_only=True)
class LauncherRecord:
    """What a later server needs to let a launcher in again (table ``launchers``)."""

    launcher_id: str
    record_key: str
    """``AllocationRecord.launcher_id`` of the allocation that it runs in."""
    jobid: str = ""
    tokens: tuple[bytes, bytes] = field(repr=False)
    """Sealed. The launch token, and its successor, which the first WELCOME puts in its place."""
    node: str = ""
    holds_job: bool = False
    isolated: bool = False
    stepid: str = ""
    nodelist: str = ""
    end_time: float | None = None
    slots: dict[str, int] = field(default_factory=dict)
    """By kernel id: the number in the kernel's directory on the node."""
    epoch: int = 0
    """Counts the changes of owner; the launcher refuses a server with a lower one than it has seen."""


@dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """What a later server needs to have the kernel again (table ``kernels``)."""

    kernel_id: str
    launcher_id: str
    record_key: str
    owner: str = ""
    generation: int = 0
    mode: str = ""
    """How its channels are reached, as the launcher's STARTED said."""
    ip: str = ""
    ports: dict[str, int] = field(default_factory=dict)
    pid: int = 0
    started_at: float | None = None
    launch: dict[str, Any] = field(default_factory=dict, repr=False)
    """Sealed. The ``KernelLaunch`` as JSON: argv, env, cwd, connection, mode, language, …"""
    manager: dict[str, Any] = field(default_factory=dict, repr=False)
    """Sealed. What the kernel manager is made of again: kernel_name, path, launch arguments, …"""
    node: str = ""


@dataclass(frozen=True, kw_only=True)
class SessionRecord:
    """A Jupyter session: a document, or console, and its kernel (table ``sessions``)."""

    session_id: str
    owner: str = ""
    kernel_id: str = ""
    path: str = ""
    name: str = ""
    type: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServerRecord:
    """A server process, who owns the rows with its ``server_id`` (table ``servers``)."""

    server_id: str
    deployment: str = ""
    """Servers of one deployment take over from each other; empty: nobody does so by themselves."""
    process: ProcessInfo
    url: str = ""
    addresses: tuple[str, ...] = ()
    """``host:port`` of each place where launchers reach it."""
    relays: tuple[dict[str, Any], ...] = ()
    """Ports of the login node where it listens, or is to: ``port``, and by ``boot``, ``pid``, ``ticks`` who has it."""
    lease_until: float = 0.0
    """By this machine's clock, whatever the database's says."""
    ended: bool = False
    """It said so, or another server took over from it."""

    @property
    def is_dead(self) -> bool:
        """Whether its deployment may take over what it has: its end was said or is seen, or its lease is over."""
        return self.ended or self.process.is_dead or self._is_silent

    @property
    def is_gone(self) -> bool:
        """Whether nobody works with what it has: one of this host that is only stopped or suspended will go on."""
        return self.ended or self.process.is_dead or (self._is_silent and not self.process.is_here)

    @property
    def _is_silent(self) -> bool:
        return time.time() >= self.lease_until


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of several tables that belong together."""

    allocations: tuple[AllocationRecord, ...] = ()
    launchers: tuple[LauncherRecord, ...] = ()
    kernels: tuple[KernelRecord, ...] = ()
    sessions: tuple[SessionRecord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Claimed(Rows):
    """What a claim has moved to the claimer."""

    epoch: int = 0
    """The launchers' new one."""
    servers: tuple[ServerRecord, ...] = ()
    """Those whose rows these were, with the addresses that their launchers dial."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Keys of rows that were this server's and are another's now: their kernels live, and are not to be ended."""

    allocations: frozenset[str] = frozenset()
    launchers: frozenset[str] = frozenset()
    kernels: frozenset[str] = frozenset()
    sessions: frozenset[str] = frozenset()


Found = tuple[ServerRecord, AllocationRecord]
"""A record, and whose it is."""
