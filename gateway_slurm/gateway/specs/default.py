"""The kernelspec for clients that name none: a project's or the gateway's setting, or the one that asks for least.

A kernel that a page starts by itself must not take a GPU, only because its kernelspec is the first of the alphabet.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Final

from gateway_slurm.errors import RequestError
from gateway_slurm.gateway.specs.catalog import ServedSpec
from gateway_slurm.gateway.specs.limits import merge_fields
from gateway_slurm.request import KernelRequest, parse_request
from gateway_slurm.slurm.formats import memory_in_mebibytes

_GPU: Final = re.compile(r"(?:^|[,/:])(?:gpu|shard|mps)(?:[:=][^,]*?)??(?:[:=](\d+))?(?=,|$)")


def _gpus(request: KernelRequest) -> float:
    in_gres = sum(int(count or 1) for count in _GPU.findall((request.gres or "").lower()))
    return (request.gpus + in_gres) * (request.nodes or 1)


def _memory(request: KernelRequest) -> float:
    return memory_in_mebibytes(request.memory) * (request.nodes or 1) or math.inf


ORDER: Final[tuple[tuple[str, str, Callable[[KernelRequest], float]], ...]] = (
    ("GPUs", "`gpus` and those in `gres`, times nodes", _gpus),
    ("nodes", "`nodes`", lambda request: request.nodes or 1),
    ("CPUs", "`cpus` (1 if unset) times nodes", lambda request: (request.cpus or 1) * (request.nodes or 1)),
    ("memory", "`memory` times nodes; unset, which can be a node's whole memory, is most", _memory),
    ("time", "`time` or `runtime`; no limit is most", lambda request: request.minutes or math.inf),
)
"""What is compared, one after the other: the first difference decides."""


def default_name(visible: Mapping[str, ServedSpec], wanted: str) -> str:
    """The default among the kernelspecs that a user sees: a project's ``default_kernel``, else the gateway's setting
    ``wanted``, else the one that asks for least; ``wanted`` if there are none.
    """
    chosen = {name: served for name, served in visible.items() if served.is_project_default}
    if not chosen and (wanted in visible or not visible):
        return wanted
    return min(chosen or visible, key=lambda name: (*_size(visible[name]), name))


def _size(served: ServedSpec) -> tuple[float, ...]:
    """What the kernelspec asks for, in ORDER. One that names a job, or cannot be started as it stands, is last."""
    if served.file.is_local:
        return (0.0,)
    try:
        request = parse_request(merge_fields(served.project, served.file.config, {}))
    except RequestError:
        return (2.0,)
    if request.jobid is not None:
        return (2.0,)
    return (1.0, *(measure(request) for _name, _help, measure in ORDER))
