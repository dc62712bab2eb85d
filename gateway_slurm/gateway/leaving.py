"""What a server that ends does with kernels that run on: nothing but to say so."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway_slurm.gateway.kernelmodel import ready_of
from gateway_slurm.provisioner import SlurmProvisioner
from gateway_slurm.service import SlurmService

# Seconds for which websockets may take what is to be said last.
FLUSH_SECONDS = 1.0


async def leave_kernels(manager: Any) -> None:
    """Let go of the kernels that run on Slurm's nodes, and close the service; starts are given up, with their jobs."""
    manager.restorer.is_leaving = True
    service = SlurmService.instance(manager.log)
    left = {kernel_id: kernel for kernel_id, kernel in manager._kernels.items() if _runs_on(kernel)}
    reason = "the server was stopped before the kernel had this cell: run it again"
    channels = [one for kernel_id in left for one in manager.frontends.of(kernel_id)]
    for one in channels:
        one.give_back(reason)
    if channels:
        await asyncio.wait([asyncio.ensure_future(one.flushed()) for one in channels], timeout=FLUSH_SECONDS)
    jobs = sorted({str(kernel.provisioner.jobid) for kernel in left.values()})
    for kernel_id in left:
        manager.frontends.leave(kernel_id, "the server was stopped")
        manager.restorer.let_go(kernel_id)
    if left:
        manager.log.warning(
            "%s left running, in jobs %s: a server that is started %s has them again; else they end",
            "1 kernel" if len(left) == 1 else f"{len(left)} kernels",
            ", ".join(jobs),
            f"within {service.orphan_timeout:g} s" if service.orphan_timeout else "some time",
        )
    # Starts that wait, and what does not run on Slurm, end before it.
    others = list(manager._kernels)
    await shutdown_each(manager, others)
    try:
        await asyncio.to_thread(service.close, leave=True)
    except Exception:
        # The process is to end all the same; kernels and records outlive it in any case.
        manager.log.exception("the service did not close in good order")


async def shutdown_each(manager: Any, kernel_ids: list[str], now: bool = False) -> None:
    """Shut these kernels down; one that cannot be is logged, and keeps nobody from going on."""
    ends = [manager.shutdown_kernel(kernel_id, now=now) for kernel_id in kernel_ids]
    for kernel_id, error in zip(kernel_ids, await asyncio.gather(*ends, return_exceptions=True), strict=True):
        if isinstance(error, BaseException):
            manager.log.error("kernel %s was not shut down in good order", kernel_id, exc_info=error)


def _runs_on(kernel: Any) -> bool:
    """Whether it has a process on a node, which does not need this server."""
    provisioner = getattr(kernel, "provisioner", None)
    return (
        isinstance(provisioner, SlurmProvisioner)
        and ready_of(kernel).done()
        and provisioner.has_process
        and kernel.execution_state != "dead"
    )
