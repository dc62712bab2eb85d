"""A private member of jupyter_client that the provisioner uses. The gateway's are in ``gateway.jupyter_compat``."""

from __future__ import annotations

from typing import Any


def polling_restarter(manager: Any) -> tuple[Any, Any] | None:
    """The kernel manager's restarter and the PeriodicCallback that polls it; None while it does not poll.

    ``KernelManager._restarter`` and ``IOLoopKernelRestarter._pcallback``: the restarter polls every 3 s, and nothing
    public makes it poll earlier. Each start of the restarter makes another PeriodicCallback; each stop removes it.
    """
    restarter = getattr(manager, "_restarter", None)
    periodic = getattr(restarter, "_pcallback", None)
    return None if periodic is None else (restarter, periodic)
