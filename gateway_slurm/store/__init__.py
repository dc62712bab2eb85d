"""Keep records of jobs, launchers, kernels and sessions beyond the process, and of the server that owns them.

This room knows records only. The modules ``database``, ``claims``, ``engine`` and ``schema`` import SQLAlchemy,
which is large: they are imported late, off the loop.
"""

from gateway_slurm.store.export import EXPORT_NAME, by_job
from gateway_slurm.store.keep_flags import KeepFlag, KeepFlagFiles
from gateway_slurm.store.records import (
    LEASE_SECONDS,
    RENEW_SECONDS,
    AllocationRecord,
    ClaimedRows,
    KernelRecord,
    LauncherRecord,
    LostRows,
    ProcessInfo,
    Rows,
    ServerAllocation,
    ServerRecord,
    SessionRecord,
    this_process,
)
from gateway_slurm.store.registry import Registry, state_directory

__all__ = [
    "EXPORT_NAME",
    "LEASE_SECONDS",
    "RENEW_SECONDS",
    "AllocationRecord",
    "ClaimedRows",
    "KeepFlag",
    "KeepFlagFiles",
    "KernelRecord",
    "LauncherRecord",
    "LostRows",
    "ProcessInfo",
    "Registry",
    "Rows",
    "ServerAllocation",
    "ServerRecord",
    "SessionRecord",
    "by_job",
    "state_directory",
    "this_process",
]
