"""What is done around a kernel's end, so that jupyter_client does all of its work, and leaves nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from gateway_slurm.gateway.kernelmodel import ready_of

# Seconds that a restart is given to come to an end.
END_SECONDS = 5.0


async def end_restart(kernel: Any, restarting: asyncio.Task[Any] | None) -> None:
    """Come to the end of a restart: of this task, which is cancelled, or of the restarter's, which cannot be.

    jupyter_client shuts down what is ``ready``, forgets without a word what failed, and raises for what is
    neither, as a restart is for ever that was cancelled. A kernel that is there is ready afterwards.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + END_SECONDS
    if restarting is not None:
        restarting.cancel()
        await asyncio.wait({restarting}, timeout=END_SECONDS)
    else:
        # It is another future for each half of a restart.
        while not (ready := ready_of(kernel)).done() and loop.time() < deadline:
            await asyncio.wait({ready}, timeout=deadline - loop.time())
    ready = ready_of(kernel)
    is_there = kernel.has_kernel or getattr(kernel.provisioner, "holds_kernel", False)
    if not ready.done() or (is_there and (ready.cancelled() or ready.exception() is not None)):
        kernel._ready = loop.create_future()
        kernel._ready.set_result(None)


def let_go(kernel: Any) -> None:
    """The manager is dropped: it must neither start its kernel again, nor keep a socket, by which a process hangs."""
    kernel.stop_restarter()
    kernel._close_control_socket()
