"""What is told of one kernel: whether it is there, where it waits or runs, why it is not."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from gateway_slurm.allocation import Waiting
from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.provisioner import SlurmProvisioner
from gateway_slurm.service import SlurmService


def ready_of(kernel: Any) -> asyncio.Future[None]:
    """The kernel manager's ``ready``, on this loop."""
    ready = kernel.ready
    return ready if isinstance(ready, asyncio.Future) else asyncio.wrap_future(ready)


def words_of(error: BaseException) -> str:
    """Why a start failed."""
    return str(error) if isinstance(error, GatewaySlurmError) else f"{type(error).__name__}: {error}"


def slurm_model(kernel: Any) -> dict[str, Any]:
    """What a kernel's model has beside Jupyter's: ``slurm``, and ``reason`` while it waits. Reads memory only."""
    provisioner = getattr(kernel, "provisioner", None)
    if not isinstance(provisioner, SlurmProvisioner):
        return {}
    slurm: dict[str, Any] = {
        "jobid": provisioner.jobid,
        "node": provisioner.node,
        "connect": provisioner.connect,
    }
    waiting = None if ready_of(kernel).done() else SlurmService.instance().waiting(kernel.kernel_id)
    if waiting is None:
        return {"slurm": slurm}
    slurm |= {
        "jobid": waiting.jobid,
        "state": waiting.state,
        "reason": waiting.reason,
        "place": waiting.place,
        "expected_start": waiting.expected_start,
    }
    return {"slurm": slurm, "reason": _why(waiting)}


def _why(waiting: Waiting) -> str:
    words = f"job {waiting.jobid} is {waiting.state}"
    if waiting.reason and waiting.reason != "None":
        words += f" ({waiting.reason})"
    if waiting.place:
        words += f", number {waiting.place} in its partition's queue"
    if waiting.expected_start:
        words += ", expected to start at " + time.strftime("%Y-%m-%d %H:%M", time.localtime(waiting.expected_start))
    return words
