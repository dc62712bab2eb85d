"""What goes with the kernel manager in the Jupyter server that has it: websockets, sessions, and its kernels of before.

One line of that server's configuration is enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tornado.ioloop import IOLoop

from gateway_slurm.gateway.restoring import server_deployment
from gateway_slurm.gateway.serversessions import SlurmSessionManager
from gateway_slurm.gateway.websocket import SlurmWebsocketConnection
from gateway_slurm.service import SlurmService

if TYPE_CHECKING:
    from gateway_slurm.gateway.kernels import SlurmMappingKernelManager

# Seconds for which a Jupyter server that starts waits for its kernels of before.
RESTORE_SECONDS = 20.0


def go_with(manager: SlurmMappingKernelManager, app: Any) -> None:
    """Choose what goes with this manager, where nothing else is configured; called while the server is set up."""
    chosen = app.config.get(type(app).__name__, {})
    if "kernel_websocket_connection_class" not in chosen:
        app.kernel_websocket_connection_class = SlurmWebsocketConnection
    if getattr(app, "restores_kernels", False):
        return  # it sees to the rest itself
    if "session_manager_class" not in chosen:
        app.session_manager_class = SlurmSessionManager
    if hasattr(app, "port"):
        SlurmService.instance(manager.log).leave_at_exit = not manager.kill_kernels_on_exit
        # The first thing that the loop does, before it listens: nobody is to be told that there are no kernels.
        IOLoop.current().add_callback(restore_before_listening, manager, app)


def restore_before_listening(manager: SlurmMappingKernelManager, app: Any) -> None:
    """Have the kernels of this server's earlier process; a store that cannot be used is not the server's end."""
    manager.restorer.restore_now(server_deployment(app.port), RESTORE_SECONDS)
    if manager.restorer.failure is not None:
        manager.log.error("kernels of before are not restored, and none is started: %s", manager.restorer.failure)
