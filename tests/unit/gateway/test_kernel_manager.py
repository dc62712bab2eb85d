"""What the kernel manager does about kernels that end at an awkward moment."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from gateway_slurm import SlurmMappingKernelManager
from gateway_slurm.gateway import jupyter_compat
from gateway_slurm.provisioner import SlurmProvisioner


class DiedEarly(SlurmProvisioner):
    """The provisioner of a kernel that has died, and may be restarted in its place."""

    is_dead = can_restart = True  # type: ignore[assignment]
    jobid, exit_reason = "7", "exit code 1"  # type: ignore[assignment]

    async def until_over(self) -> str:
        await asyncio.Event().wait()
        return ""


async def test_a_kernel_that_dies_before_the_manager_follows_it_is_shown_as_dead_at_once():
    """Also where no restarter asks for it: its death was reported before anything listened."""
    manager = SlurmMappingKernelManager()
    kernel = SimpleNamespace(ports=[], autorestart=False, shutting_down=False, execution_state="idle", reason="")
    kernel.provisioner = DiedEarly(kernel_id="k")
    jupyter_compat.add_kernel(manager, "k", kernel)
    following = asyncio.ensure_future(manager._watch_end("k", kernel))
    await asyncio.sleep(0)
    assert kernel.execution_state == "dead"
    assert kernel.reason.startswith("exit code 1; its place in job 7 is kept")
    following.cancel()
    manager._lingering.pop("k").cancel()
