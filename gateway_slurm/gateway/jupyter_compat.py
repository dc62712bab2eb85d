"""Private members of jupyter_client and jupyter_server that the gateway uses, one function or method each.

Each docstring names the member and says why nothing public serves. ``tests/unit/gateway/test_jupyter_compat.py`` has a
test for each, which fails when a release changes the member.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.httpserver import HTTPServer

# -- One kernel's manager: jupyter_client's KernelManager --


def set_ready(kernel: Any) -> None:
    """Make ``kernel.ready`` a future that is done.

    ``KernelManager._ready``: the property makes a future only where there is none. The future of a start or restart
    that was cancelled stays pending, and a shutdown waits for it.
    """
    kernel._ready = asyncio.get_running_loop().create_future()
    kernel._ready.set_result(None)


def mark_started(kernel: Any) -> None:
    """Have the next restart make a new ``ready``, as after a start.

    ``KernelManager._attempted_start``: only a start sets it, and an adopted kernel has none.
    """
    kernel._attempted_start = True


def launch_args(kernel: Any) -> dict[str, Any]:
    """The arguments of the kernel's last start, with which a restart starts it again; empty before a start.

    ``KernelManager._launch_args``: no method returns them.
    """
    return dict(kernel._launch_args or {})


def set_launch_args(kernel: Any, arguments: dict[str, Any]) -> None:
    """Set the arguments with which a restart starts the kernel.

    ``KernelManager._launch_args``: only a start sets them, and an adopted kernel has none.
    """
    kernel._launch_args = arguments


def set_kernel_spec(kernel: Any, spec: KernelSpec) -> None:
    """Give the kernel's manager a kernelspec that is not installed.

    ``KernelManager._kernel_spec``: the property looks among the installed ones only.
    """
    kernel._kernel_spec = spec


def close_control_socket(kernel: Any) -> None:
    """Close the socket on which the kernel's manager asks for a shutdown.

    ``KernelManager._close_control_socket``: the public ``cleanup_resources`` ends the kernel as well.
    """
    kernel._close_control_socket()


def channel_url(kernel: Any, channel: str) -> str:
    """The ZMQ address of a kernel's channel, such as ``tcp://10.0.0.1:4711``.

    ``ConnectionFileMixin._make_url``: the public ``connect_iopub`` and so on return sockets of the asyncio class.
    """
    return str(kernel._make_url(channel))


# -- The kernels of a server: MultiKernelManager and MappingKernelManager --


def add_kernel(manager: Any, kernel_id: str, kernel: Any) -> None:
    """Put a running kernel into the server's tables.

    ``MultiKernelManager._kernels``, ``MappingKernelManager._kernel_connections`` and ``_kernel_ports``: only a start
    fills them.
    """
    manager._kernels[kernel_id] = kernel
    manager._kernel_connections[kernel_id] = 0
    manager._kernel_ports[kernel_id] = kernel.ports


def pending_task(manager: Any, kernel_id: str) -> asyncio.Task[None] | None:
    """The task of a start or shutdown that is under way.

    ``MultiKernelManager._pending_kernels``: nothing public waits for a shutdown, or cancels a start.
    """
    task: asyncio.Task[None] | None = manager._pending_kernels.get(kernel_id)
    return task


def drop_pending_task(manager: Any, kernel_id: str) -> None:
    """Remove that task from the table: a shutdown would wait for it.

    ``MultiKernelManager._pending_kernels``: after an error jupyter_client leaves the task there.
    """
    manager._pending_kernels.pop(kernel_id, None)


def take_finishing_task(manager: Any, kernel_id: str) -> asyncio.Task[None] | None:
    """Remove and return the task that waits for the kernel's start.

    ``MappingKernelManager._pending_kernel_tasks``: jupyter_server removes it only in its own shutdown.
    """
    task: asyncio.Task[None] | None = manager._pending_kernel_tasks.pop(kernel_id, None)
    return task


class HookedKernelManager(AsyncMappingKernelManager):
    """Jupyter server's kernel manager, with public methods in place of four private ones that subclasses replace."""

    async def finish_start(self, kernel_id: str) -> None:
        """Called with each start; returns once the kernel runs or has failed.

        ``MappingKernelManager._finish_kernel_start``: a failed start ends there, in the log.
        """
        await super()._finish_kernel_start(kernel_id)

    async def _finish_kernel_start(self, kernel_id: str) -> None:
        await self.finish_start(kernel_id)

    async def await_start(self, kernel_id: str, kernel: Any, start: Awaitable[None]) -> None:
        """Called with each start, to await it and to do what follows.

        ``MultiKernelManager._add_kernel_when_ready``: it logs a failed start with a traceback, and keeps the task.
        """
        await super()._add_kernel_when_ready(kernel_id, kernel, start)

    async def _add_kernel_when_ready(self, kernel_id: str, km: Any, kernel_awaitable: Awaitable[None]) -> None:
        await self.await_start(kernel_id, km, kernel_awaitable)

    def restarter_gave_up(self, kernel_id: str) -> None:
        """Called when a kernel died and its restarter does not try again.

        ``MappingKernelManager._handle_kernel_died``: it removes the kernel.
        """
        super()._handle_kernel_died(kernel_id)

    def _handle_kernel_died(self, kernel_id: str) -> None:
        self.restarter_gave_up(kernel_id)

    def check_kernel_id(self, kernel_id: str) -> None:
        """Called before each use of a kernel; raises HTTPError 404 for one that does not exist.

        ``MappingKernelManager._check_kernel_id``: a look at ``in`` alone cannot say 503.
        """
        super()._check_kernel_id(kernel_id)

    def _check_kernel_id(self, kernel_id: str) -> None:
        self.check_kernel_id(kernel_id)


# -- What jupyter_server logs --


class ServerLogFilter(logging.Filter):
    """Corrects two lines of jupyter_server's log where kernels outlive the server, and drops a wrong one of tornado's.

    ``ServerApp.start_app`` and ``ServerApp.cleanup_kernels``: both say that all kernels are shut down.
    ``WebSocketMixin.ping_interval``: milliseconds, which tornado reads as seconds, and warns of.
    """

    _CHANGES: Final = (
        (
            re.compile(r"Use Control-C to stop this server and shut down all kernels"),
            "Use Control-C to stop this server; its kernels keep running for the next one",
        ),
        (
            re.compile(r"Shutting down (\d+) kernels?$"),
            r"Stopping; kernels on nodes keep running for the next server (\1)",
        ),
    )
    _DROPPED: Final = "The websocket_ping_timeout (90000)"

    def __init__(self, leaves_kernels: Callable[[], bool]) -> None:
        super().__init__()
        self._leaves_kernels = leaves_kernels

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.msg, str):
            return True
        if self._leaves_kernels():
            for pattern, text in self._CHANGES:
                record.msg = pattern.sub(text, record.msg)
        return not record.msg.startswith(self._DROPPED)


def correct_log(log: Any, leaves_kernels: Callable[[], bool]) -> None:
    """Filter a server's log, and tornado's, by a ``ServerLogFilter``; an earlier one is replaced."""
    made = ServerLogFilter(leaves_kernels)
    for logger in (getattr(log, "logger", log), logging.getLogger("tornado.general")):
        for known in [known for known in logger.filters if isinstance(known, ServerLogFilter)]:
            logger.removeFilter(known)
        logger.addFilter(made)


# -- Kernelspecs, and HTTP handlers --


def set_http_server(app: ServerApp, server: HTTPServer) -> None:
    """Replace the HTTP server, which ``init_httpserver`` has just made and which does not listen yet.

    ``ServerApp._http_server``: there is no setting for the class, or for header and body time-outs.
    """
    app._http_server = server


class HookedServerApp(ServerApp):
    """Jupyter server's application, which serves on sockets that are open already, where there are any.

    ``ServerApp._find_http_port`` and ``_bind_http_server``: they open a port, or a Unix socket, of their own.
    """

    http_sockets: Sequence[socket.socket] = ()
    """Listening sockets; empty: the configured one is opened."""

    def _find_http_port(self) -> None:
        if not self.http_sockets:
            super()._find_http_port()

    def _bind_http_server(self) -> None:
        if self.http_sockets:
            self.http_server.add_sockets(self.http_sockets)
        else:
            super()._bind_http_server()


def spec_directory(manager: KernelSpecManager, name: str) -> str | None:
    """The directory of an installed kernelspec; None where there is none.

    ``KernelSpecManager._find_spec_directory``: the public ``find_kernel_specs`` lists all directories.
    """
    directory: str | None = manager._find_spec_directory(name)
    return directory


class UntrackedHandler:
    """A base of handlers that do not count as activity of the server.

    ``APIHandler._track_activity``: jupyter_server's own handlers set it, and there is no public setting.
    """

    _track_activity = False
