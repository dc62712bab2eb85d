"""Remember jobs, launchers, kernels and sessions beyond the process, and which server has them. Knows records only.

The database itself (``store.database``: ``Store``, ``open_store``) is imported late, off the loop: SQLAlchemy is large.
"""

from gateway_slurm.store.export import EXPORT_NAME, by_job
from gateway_slurm.store.records import (
    LEASE_SECONDS,
    RENEW_SECONDS,
    AllocationRecord,
    Claimed,
    Found,
    KernelRecord,
    LauncherRecord,
    Lost,
    ProcessInfo,
    Rows,
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
    "Claimed",
    "Found",
    "KernelRecord",
    "LauncherRecord",
    "Lost",
    "ProcessInfo",
    "Registry",
    "Rows",
    "ServerRecord",
    "SessionRecord",
    "by_job",
    "state_directory",
    "this_process",
]
