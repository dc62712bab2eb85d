"""What the provisioner needs of Jupyter's programs beside their interface; the gateway has its own module.

Private members of jupyter_client; and errors that users can understand are shown once, without tracebacks.
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from jupyter_client.multikernelmanager import MultiKernelManager

from gateway_slurm._util import printable
from gateway_slurm.errors import GatewaySlurmError


def polling_restarter(manager: Any) -> tuple[Any, Any] | None:
    """The kernel manager's restarter and the PeriodicCallback that polls it; None while it does not poll.

    ``KernelManager._restarter`` and ``IOLoopKernelRestarter._pcallback``: the restarter polls every 3 s, and nothing
    public makes it poll earlier. Each start of the restarter makes another PeriodicCallback; each stop removes it.
    """
    restarter = getattr(manager, "_restarter", None)
    periodic = getattr(restarter, "_pcallback", None)
    return None if periodic is None else (restarter, periodic)


_LIMITS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""The ``restart_limit`` of restarters that may restart nothing now."""


def refuse_restarts(manager: Any) -> None:
    """Have the manager's restarter, if it has one, report that the kernel is dead, and not try to restart it.

    A restarter that was stopped may be in the middle of its last poll, after which it would still restart the kernel.
    """
    restarter = getattr(manager, "_restarter", None)
    if restarter is not None:
        _LIMITS.setdefault(restarter, restarter.restart_limit)
        restarter.restart_limit = 0


def allow_restarts(manager: Any) -> None:
    """Give the manager's restarter its limit back: the manager keeps it, and starts it again with the next kernel."""
    restarter = getattr(manager, "_restarter", None)
    if restarter is not None and restarter in _LIMITS:
        restarter.restart_limit = _LIMITS.pop(restarter)


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


# -- Errors that are shown once --


class _ReportedErrors(logging.Filter):
    """Drops records with the traceback of an error that was reported already."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, GatewaySlurmError) and error.is_reported)


_FILTER = _ReportedErrors()


def report(error: GatewaySlurmError, manager: Any, log: Any, text: str) -> None:
    """Report an error of a start once; ``text`` is the line of a server's log.

    jupyter_client logs it with a traceback, jupyter_server does so twice more, and a console or nbclient shows it as an
    exception. In a server (``manager`` is a kernel of a MultiKernelManager) one line in the log is the report. Other
    programs get the exception alone.
    """
    log.debug("%s", printable(text), exc_info=error if str(error) in text else None)
    loggers = (getattr(log, "logger", log), getattr(manager, "log", None), logging.getLogger("tornado.application"))
    for logger in loggers:
        if isinstance(logger, logging.Logger) and not any(known is _FILTER for known in logger.filters):
            logger.addFilter(_FILTER)
    if isinstance(getattr(manager, "parent", None), MultiKernelManager):
        log.error("%s", printable(text))
    elif not isinstance(sys.excepthook, _Hook) and _is_installed_program(sys.argv[0]):
        sys.excepthook = _Hook(sys.excepthook)
    error.is_reported = True


def _is_installed_program(path: str) -> bool:
    """Whether the main program is one of this environment's, as jupyter-console is, and not a user's script."""
    scripts = {os.path.realpath(sysconfig.get_path("scripts")), os.path.realpath(Path(sys.executable).parent)}
    return os.path.realpath(Path(path).parent) in scripts


class _Hook:
    """``sys.excepthook`` of such a program: it shows a reported error without a traceback, which is not the user's."""

    def __init__(self, previous: Any) -> None:
        self._previous = previous

    def __call__(self, kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if isinstance(error, GatewaySlurmError) and error.is_reported:
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {printable(error)}\n")
        else:
            self._previous(kind, error, where)
