"""Private members of jupyter_client that the provisioner uses. The gateway's are in ``gateway.jupyter_compat``."""

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


def renew_control_socket(manager: Any) -> None:
    """Have the kernel's manager connect a new control socket for each request, one on which no send blocks.

    ``KernelManager._connect_control_socket``, ``_close_control_socket`` and ``_control_socket``: the manager keeps one
    socket for the kernel's life. libzmq gives its connection up after one malformed frame, which any cell can send; the
    next send would block the manager's loop without a limit. A socket that was connected just now takes a message.
    """
    if "_connect_control_socket" in vars(manager):
        return
    connect = manager._connect_control_socket

    def connect_again() -> None:
        manager._close_control_socket()
        connect()
        manager._control_socket.sndtimeo = 0

    manager._connect_control_socket = connect_again
