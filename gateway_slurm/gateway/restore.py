"""Kernels that an earlier server of the deployment had, as if this one had started them.

What the earlier one knew of a kernel beside Slurm's part is on record, sealed: its kernelspec, who made it, and
what it was started with, so that it can be restarted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import getpass
import json
import os
import re
import socket
from collections.abc import Callable
from typing import Any

from jupyter_client.kernelspec import KernelSpec, NoSuchKernel
from jupyter_server._tz import utcnow
from jupyter_server.prometheus.metrics import KERNEL_CURRENTLY_RUNNING_TOTAL

from gateway_slurm.environment import kernel_environment
from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.kernels.restore import Restored
from gateway_slurm.provisioner import SlurmProvisioner
from gateway_slurm.service import SlurmService
from gateway_slurm.store.records import SessionRecord

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


def server_deployment(port: int) -> str:
    """The name under which a user's Jupyter server finds its kernels again when it is started anew.

    By its port; that of a JupyterHub's is another each time, and its path the same.
    """
    prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX", "")
    place = f"hub-{prefix.strip('/')}" if prefix else f"server-{socket.gethostname()}-{port}"
    return _NOT_IN_NAMES.sub("_", f"{place}-{getpass.getuser()}")


def _memory_of(kernel: Any, maker: str) -> dict[str, Any]:
    """What of a kernel manager makes it again; JSON, with secrets."""
    arguments = dict(kernel._launch_args or {})
    if isinstance(arguments.get("env"), dict):
        # A Jupyter server gives its whole environment, of which a kernel gets only what is its own.
        arguments["env"] = kernel_environment(arguments["env"])
    return {
        "kernel_name": kernel.kernel_name,
        "maker": maker,
        "launch_args": {name: value for name, value in arguments.items() if _is_json(value)},
        "transport_encryption": kernel.transport_encryption,
        "kernel_spec": {**kernel.kernel_spec.to_dict(), "resource_dir": kernel.kernel_spec.resource_dir},
    }


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


class KernelRestorer:
    """For one kernel manager, on its loop, which is the one that is not the service's."""

    def __init__(self, manager: Any) -> None:
        self._manager, self.log = manager, manager.log
        self.done = asyncio.Event()
        self.failure: GatewaySlurmError | None = None
        # The server ends and its kernels run on: their records are the next one's.
        self.is_leaving = False
        # Called with the records of sessions whose kernels are there again.
        self.on_sessions: list[Callable[[list[SessionRecord]], None]] = []

    @property
    def is_keeping(self) -> bool:
        """Whether there are records, and they are this server's to change."""
        return self.done.is_set() and self.failure is None and not self.is_leaving

    async def restore(self, deployment: str) -> None:
        """Have the kernels of dead servers of the deployment, and of those that die later. Raises nothing.

        Where the store cannot be used ``failure`` says why.
        """
        service = self._service(deployment)
        try:
            self.have(await service.run(service.restore()))
        except GatewaySlurmError as error:
            self.failure = error
        self.done.set()

    def restore_now(self, deployment: str, seconds: float) -> None:
        """The same, and nothing else on this loop before it is done, or so long has passed: it goes on then."""
        service = self._service(deployment)
        begun = service.submit(service.restore())
        try:
            self.have(begun.result(timeout=seconds))
        except concurrent.futures.TimeoutError:
            self.log.error("kernels of before are not there after %g s; they may come later", seconds)
            service.submit(self._tell_later(service, begun))
        except GatewaySlurmError as error:
            self.failure = error
        self.done.set()

    def _service(self, deployment: str) -> SlurmService:
        service = SlurmService.instance(self.log)
        service.deployment = service.deployment or deployment
        loop = asyncio.get_running_loop()
        service.on_claimed = lambda restored: _call_soon(loop, self.have, restored)
        service.on_dropped = lambda kernel_ids: _call_soon(loop, self._drop, kernel_ids)
        return service

    async def _tell_later(self, service: SlurmService, begun: concurrent.futures.Future[list[Restored]]) -> None:
        try:
            service.on_claimed(await asyncio.wrap_future(begun))
        except GatewaySlurmError as error:
            self.log.error("kernels of before are not restored: %s", error)

    def remember(self, kernel_id: str) -> None:
        """Have on record what makes the kernel's manager again."""
        kernel: Any = self._manager._kernels[kernel_id]
        if isinstance(kernel.provisioner, SlurmProvisioner):
            kernel.provisioner.remember(_memory_of(kernel, self._manager.maker_of(kernel_id)))

    def have(self, restored: list[Restored]) -> None:
        """Have these kernels, and their sessions."""
        for one in restored:
            try:
                self._adopt(one)
            except Exception:
                # One that this version cannot read is not the end of the others, nor its own.
                self.log.exception("kernel %s was not restored", one.record.kernel_id)
        registry = SlurmService.instance().registry
        records = registry.sessions()
        there = [one for one in records if one.kernel_id in self._manager]
        for session in records:
            if session not in there:
                registry.remove_session(session.session_id)
        for callback in self.on_sessions:
            callback(there)

    def _adopt(self, restored: Restored) -> None:
        manager, record, memory = self._manager, restored.record, restored.record.manager
        kernel_id = record.kernel_id
        if kernel_id in manager:
            return
        kernel = self._kernel_manager(restored)
        provisioner = SlurmProvisioner(
            kernel_id=kernel_id, kernel_spec=kernel.kernel_spec, parent=kernel, **_fields_of(kernel.kernel_spec)
        )
        kernel.provisioner = provisioner
        info = provisioner.adopt(restored)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(kernel.connection_file)  # the earlier server's
        kernel._reconcile_connection_info(info)
        kernel._attempted_start = True
        kernel._ready = asyncio.get_running_loop().create_future()
        kernel._ready.set_result(None)
        kernel.execution_state, kernel.reason, kernel.last_activity = "unknown", "", utcnow()
        kernel.start_restarter()
        kernel._connect_control_socket()
        manager._owners[kernel_id] = record.owner, str(memory.get("maker") or record.owner)
        self._have(kernel_id, kernel)

    def _have(self, kernel_id: str, kernel: Any) -> None:
        """As after a start."""
        manager = self._manager
        manager._kernels[kernel_id] = kernel
        manager._kernel_connections[kernel_id] = 0
        manager._kernel_ports[kernel_id] = kernel.ports
        manager.frontends.expect(kernel_id)
        manager.start_watching_activity(kernel_id)
        manager.add_restart_callback(kernel_id, lambda: manager._handle_kernel_died(kernel_id), "dead")
        manager.follow_restarts(kernel_id)
        manager._own(manager._watch(kernel_id, kernel))
        manager._own(self._restore_frontends(kernel_id, kernel))
        KERNEL_CURRENTLY_RUNNING_TOTAL.labels(type=kernel.kernel_name).inc()
        if not manager._initialized_culler:
            manager.initialize_culler()

    async def _restore_frontends(self, kernel_id: str, kernel: Any) -> None:
        state = await self._manager.frontends.restore(kernel_id)
        if kernel.execution_state == "unknown":
            kernel.execution_state = state or "idle"

    def _kernel_manager(self, restored: Restored) -> Any:
        record, memory = restored.record, restored.record.manager
        name = str(memory.get("kernel_name") or record.launch.get("connection", {}).get("kernel_name", ""))
        kernel, _name, _kernel_id = self._manager.pre_start_kernel(name, {"kernel_id": record.kernel_id})
        kernel.kernel_id = record.kernel_id
        try:
            kernel.kernel_spec  # noqa: B018 - it is looked for
        except (NoSuchKernel, GatewaySlurmError):
            # It was uninstalled; the kernel runs nevertheless.
            kernel._kernel_spec = KernelSpec(**memory.get("kernel_spec", {}))
        kernel.transport_encryption = memory.get("transport_encryption", kernel.transport_encryption)
        env = record.launch.get("env") or {}
        kernel._launch_args = dict(memory.get("launch_args") or {"env": env, "cwd": record.launch.get("cwd")})
        return kernel

    def _drop(self, kernel_ids: list[str]) -> None:
        """Another server has these kernels: they are no longer here, and live on."""
        for kernel_id in kernel_ids:
            if kernel_id in self._manager:
                self.log.warning("kernel %s is another server's now", kernel_id)
                self.let_go(kernel_id)

    def let_go(self, kernel_id: str) -> None:
        """Forget a kernel that lives on without this server."""
        kernel = self._manager._kernels[kernel_id]
        kernel.stop_restarter()
        kernel.shutting_down = True
        self._manager.stop_watching_activity(kernel_id)
        kernel._close_control_socket()
        KERNEL_CURRENTLY_RUNNING_TOTAL.labels(type=kernel.kernel_name).dec()
        self._manager.remove_kernel(kernel_id)


def _fields_of(spec: KernelSpec) -> dict[str, Any]:
    """The kernelspec's request fields, as ``KernelProvisionerFactory`` gives them to a provisioner."""
    provisioner = (spec.metadata or {}).get("kernel_provisioner", {})
    return dict(provisioner.get("config", {})) if isinstance(provisioner, dict) else {}


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
        loop.call_soon_threadsafe(function, *arguments)
