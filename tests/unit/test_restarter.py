"""The restarter of a kernel manager, which outlives the manager's kernels."""

from __future__ import annotations

from jupyter_client.ioloop import AsyncIOLoopKernelManager
from traitlets.config import Config

from gateway_slurm._jupyter_compat import allow_restarts, refuse_restarts


async def test_a_restarter_has_its_limit_again_with_the_managers_next_kernel():
    """Where a job has ended nothing is restarted, and every poll says so; a new kernel of the manager is."""
    manager = AsyncIOLoopKernelManager(config=Config(KernelRestarter={"restart_limit": 2}))
    refuse_restarts(manager)  # it has no restarter yet
    allow_restarts(manager)
    restarter = manager._restarter = manager.restarter_class(kernel_manager=manager, parent=manager)
    for _kernel in range(2):
        restarter.start()
        for _poll in range(2):
            refuse_restarts(manager)
            assert restarter.restart_limit == 0
        restarter.stop()
        allow_restarts(manager)
        assert restarter.restart_limit == 2
