"""What a provisioner tells its kernel manager where jupyter_client has no word for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway_slurm.errors import KernelStartError


def start_cancelled(manager: Any) -> None:
    """What a cancelled start, or restart, leaves of itself with its manager is put right."""
    # Whoever waits for it, as websockets do, would for ever.
    ready = getattr(manager, "_ready", None)
    if ready is not None and not ready.done():
        ready.set_exception(KernelStartError("the start of the kernel was cancelled"))
        ready.exception()  # seen: nobody has to await it
    if manager is not None:
        manager.stop_restarter()  # it would find no kernel, and start one: in a new job


def look_soon(manager: Any, is_dead: Callable[[], bool]) -> None:
    """Have the manager's restarter, if it has one that runs, look after its kernel, which it does every 3 s.

    Any thread; returns at once. It looks on the loop that it runs on, and by its own rules, if ``is_dead`` says
    so then and nobody has asked for the kernel's end, or restarted it, meanwhile.
    """
    periodic = _periodic(manager)
    if periodic is None:
        return
    loop = periodic.io_loop
    # By way of the loop, so that a shutdown that is to begin there goes first.
    loop.add_callback(loop.add_callback, _look, manager, periodic, is_dead)


def _periodic(manager: Any) -> Any:
    """The PeriodicCallback of a restarter that runs: each restart, and the end, stops it first."""
    return getattr(getattr(manager, "_restarter", None), "_pcallback", None)


def _look(manager: Any, periodic: Any, is_dead: Callable[[], bool]) -> Any:
    """Return what the restarter's poll does: an awaitable of an asynchronous manager's, which the loop awaits."""
    if manager.shutting_down or _periodic(manager) is not periodic or not is_dead():
        return None
    return manager._restarter.poll()
