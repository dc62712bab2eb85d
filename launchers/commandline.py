"""A kernel's command as its node runs it, and in words why it cannot."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Callable

PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def on_node(item: str, connection_file: str) -> str:
    """An argv item as this node needs it: its connection file, and ``~`` as the shell would have it."""
    item = item.replace("{connection_file}", connection_file)
    return os.path.expanduser(item) if item.startswith("~") else item


def die_with_launcher(launcher: int) -> Callable[[], None]:
    """For a child between fork and exec: it ends when the launcher does (prctl(2), PR_SET_PDEATHSIG)."""

    def in_child() -> None:
        signal.set_wakeup_fd(-1)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:
            os._exit(125)

    return in_child


def cannot_run(argv: list[str], env: dict[str, str], error: Exception) -> str:
    """Why ``argv`` could not be started, for the user."""
    node = socket.gethostname()
    if isinstance(error, FileNotFoundError):
        where = "" if "/" in argv[0] else f" on PATH={env.get('PATH', '')}"
        return (
            f"kernel_argv cannot run on node {node}: there is no {argv[0]!r}{where}; "
            "install the kernel where the compute nodes see it, or correct kernel_argv"
        )
    return f"kernel_argv cannot run on node {node}: {argv[0]!r}: {error}"
