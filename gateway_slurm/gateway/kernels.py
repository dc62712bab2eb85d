"""The earlier path of ``gateway_slurm.SlurmMappingKernelManager``, for configurations of the last release."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "SlurmMappingKernelManager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.{name} is now gateway_slurm.{name}; the old name works in this release only",
        DeprecationWarning,
        stacklevel=2,
    )
    from gateway_slurm.gateway.kernel_manager import SlurmMappingKernelManager

    return SlurmMappingKernelManager
