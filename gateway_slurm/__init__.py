"""Jupyter kernels on Slurm compute nodes.

The names below are the package's interface; the modules inside may move. Importing the package imports none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gateway_slurm.gateway.kernel_manager import SlurmMappingKernelManager
    from gateway_slurm.provisioner import SlurmProvisioner
    from gateway_slurm.service import SlurmService

__version__ = "0.1.0"
__all__ = ["SlurmMappingKernelManager", "SlurmProvisioner", "SlurmService", "__version__"]

_MODULES = {
    "SlurmMappingKernelManager": "gateway_slurm.gateway.kernel_manager",
    "SlurmProvisioner": "gateway_slurm.provisioner",
    "SlurmService": "gateway_slurm.service",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
