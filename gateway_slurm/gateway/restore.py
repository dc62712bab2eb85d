"""Kernels outlive a server's process: how a server that stops leaves them, and how the next one restores them.

The kernels' Slurm part is the service's. Here is what the kernel manager adds to their records, encrypted: the
kernelspec, who started the kernel, and the arguments of its start, so that it can be restarted.
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
from datetime import datetime, timezone
from typing import Any

from jupyter_client.connect import port_names
from jupyter_client.kernelspec import KernelSpec, NoSuchKernel
from jupyter_server.prometheus.metrics import KERNEL_CURRENTLY_RUNNING_TOTAL

from gateway_slurm._util import Backoff, LogOnce, call_on
from gateway_slurm.environment import kernel_environment
from gateway_slurm.errors import GatewaySlurmError, LinkError
from gateway_slurm.gateway import jupyter_compat
from gateway_slurm.gateway.systemd import MAIN_LOOP
from gateway_slurm.kernels.restore import RestoredKernel
from gateway_slurm.provisioner import SlurmProvisioner
from gateway_slurm.service import SlurmService
from gateway_slurm.store.records import SessionRecord

# Seconds that websockets have to take the last messages of a server that stops.
FLUSH_SECONDS = 1.0
# Seconds until a restoring that failed is tried again; each pause is twice as long, up to the second value.
RETRY_DELAY, MAX_RETRY_DELAY = 0.5, 10.0
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


def ready_of(kernel: Any) -> asyncio.Future[None]:
    """The future of the kernel manager's ``ready``, on this loop."""
    ready = kernel.ready
    return ready if isinstance(ready, asyncio.Future) else asyncio.wrap_future(ready)


def server_deployment(port: int) -> str:
    """The deployment's name for a user's Jupyter server, under which its next process finds its kernels.

    The port identifies the server. A server of a JupyterHub gets another port with each start, and the same path.
    """
    prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX", "")
    place = f"hub-{prefix.strip('/')}" if prefix else f"server-{socket.gethostname()}-{port}"
    return _NOT_IN_NAMES.sub("_", f"{place}-{getpass.getuser()}")


class KernelRestorer:
    """Hands over and restores the kernels of one kernel manager. Its methods run on the manager's loop.

    That loop is not the service's.
    """

    def __init__(self, manager: Any) -> None:
        self._manager, self.log = manager, manager.log
        self.done = asyncio.Event()
        # Why the last attempt failed. Where ``done`` is not set, it is tried again.
        self.failure: GatewaySlurmError | None = None
        self._retrying: asyncio.Task[None] | None = None
        # The server stops and its kernels run on: their records belong to the next server.
        self.is_handing_over = False
        # Called with the records of the sessions of restored kernels.
        self.on_sessions: list[Callable[[list[SessionRecord]], None]] = []

    @property
    def waits_because(self) -> str:
        """Why earlier kernels are not restored yet, after an attempt that failed; else empty."""
        if self.done.is_set() or self.failure is None:
            return ""
        return f"the kernels of the earlier server are not restored yet, which is tried again: {self.failure}"

    @property
    def is_keeping(self) -> bool:
        """Whether there are records, and this server may change them."""
        return self.done.is_set() and self.failure is None and not self.is_handing_over

    # -- a server that stops ------------------------------------------------------------------------

    async def hand_over_kernels(self) -> None:
        """Leave running kernels to the next server: report to frontends, acknowledge, and detach."""
        manager, self.is_handing_over = self._manager, True
        if self._retrying is not None:
            self._retrying.cancel()
        kernels = {kernel_id: manager.get_kernel(kernel_id) for kernel_id in manager.list_kernel_ids()}
        running = {kernel_id: kernel for kernel_id, kernel in kernels.items() if _runs_on_a_node(kernel)}
        connections = [found for kernel_id in running if (found := manager.frontends.find(kernel_id))]
        for connection in connections:
            connection.refuse_held("the server was stopped before the kernel had this cell: run it again")
        if connections:
            flushes = [asyncio.ensure_future(connection.flushed()) for connection in connections]
            await asyncio.wait(flushes, timeout=FLUSH_SECONDS)
        jobs = sorted({str(kernel.provisioner.jobid) for kernel in running.values()})
        for kernel_id in running:
            manager.frontends.hand_over(kernel_id, "the server was stopped")
            self.detach(kernel_id)
        if running:
            count = "1 kernel" if len(running) == 1 else f"{len(running)} kernels"
            seconds = SlurmService.instance(self.log).orphan_timeout
            limit = f" if it is started within {seconds:g} s; otherwise they end" if seconds else ""
            self.log.warning(
                "%s left running, in jobs %s. The next server restores them%s", count, ", ".join(jobs), limit
            )

    async def close_service(self) -> None:
        """Close the service and leave its kernels running. Raises nothing."""
        try:
            await asyncio.to_thread(SlurmService.instance(self.log).close, leave=True)
        except Exception:
            # The process must end all the same; kernels and records outlive it in any case.
            self.log.exception("the service did not close in good order")

    def detach(self, kernel_id: str) -> None:
        """Remove a kernel from Jupyter's tables; it runs on without this server."""
        kernel = self._manager.get_kernel(kernel_id)
        kernel.stop_restarter()
        kernel.shutting_down = True
        self._manager.stop_watching_activity(kernel_id)
        jupyter_compat.close_control_socket(kernel)
        KERNEL_CURRENTLY_RUNNING_TOTAL.labels(type=kernel.kernel_name).dec()
        self._manager.remove_kernel(kernel_id)

    # -- the server after it ------------------------------------------------------------------------

    async def restore(self, deployment: str, on_retry: Callable[[float], object] = lambda _seconds: None) -> None:
        """Restore the kernels of the deployment's dead servers, and of servers that die later. Raises nothing.

        While launchers cannot reach this server, since another process has its port, it is tried again until it works:
        the kernels run on, and would end without a server. ``on_retry`` is called with the seconds until the next
        attempt. Afterwards ``failure`` is the reason where the store cannot be used.
        """
        service, complaints = self._service(deployment), LogOnce(self.log)
        pauses = Backoff(RETRY_DELAY, MAX_RETRY_DELAY)
        while True:
            try:
                self.adopt(await service.run(service.restore()))
            except LinkError as error:
                self.failure = error
                complaints.warning(str(error), "%s", self.waits_because)
                pause = pauses.next()
                on_retry(pause)
                await asyncio.sleep(pause)
                continue
            except GatewaySlurmError as error:
                self.failure = error
            else:
                self.failure = None
            self.done.set()
            return

    def restore_now(self, deployment: str, seconds: float) -> None:
        """Restore like ``restore``, and block this loop until that is done, for at most so many seconds.

        After that time the kernels come later; also while launchers cannot reach this server (see ``restore``).
        """
        service = self._service(deployment)
        restoring = service.submit(service.restore())
        try:
            self.adopt(restoring.result(timeout=seconds))
        except concurrent.futures.TimeoutError:
            self.log.error("earlier kernels are not restored after %g s; they may come later", seconds)
            service.submit(self._adopt_later(service, restoring))
        except LinkError as error:
            self.failure = error
            self._retrying = asyncio.ensure_future(self.restore(deployment))
            return
        except GatewaySlurmError as error:
            self.failure = error
        self.done.set()

    def _service(self, deployment: str) -> SlurmService:
        service = SlurmService.instance(self.log)
        service.deployment = service.deployment or deployment
        loop = asyncio.get_running_loop()
        service.on_claimed = lambda restored: call_on(loop, self.adopt, restored)
        service.on_dropped = lambda kernel_ids: call_on(loop, self._drop, kernel_ids)
        return service

    async def _adopt_later(
        self, service: SlurmService, restoring: concurrent.futures.Future[list[RestoredKernel]]
    ) -> None:
        try:
            service.on_claimed(await asyncio.wrap_future(restoring))
        except GatewaySlurmError as error:
            self.log.error("earlier kernels are not restored: %s", error)

    def remember(self, kernel_id: str) -> None:
        """Put on record what the next server needs to manage this kernel."""
        kernel: Any = self._manager.get_kernel(kernel_id)
        if isinstance(kernel.provisioner, SlurmProvisioner):
            kernel.provisioner.remember(_manager_state(kernel, self._manager.maker_of(kernel_id)))

    def adopt(self, kernels: list[RestoredKernel]) -> None:
        """Manage these kernels, and restore their sessions."""
        loops = SlurmService.instance(self.log).loops
        for restored in kernels:
            loops.beat(MAIN_LOOP)
            try:
                self._adopt_kernel(restored)
            except Exception:
                # A record that this version cannot read affects neither other kernels nor its own.
                self.log.exception("kernel %s was not restored", restored.record.kernel_id)
        registry = SlurmService.instance().registry
        sessions = registry.sessions()
        for session in sessions:
            if session.kernel_id not in self._manager:
                registry.remove("sessions", session.session_id)
        sessions = [session for session in sessions if session.kernel_id in self._manager]
        for callback in self.on_sessions:
            callback(sessions)

    def _adopt_kernel(self, restored: RestoredKernel) -> None:
        manager, record = self._manager, restored.record
        if record.kernel_id in manager:
            return
        kernel = self._kernel_manager(restored)
        spec = kernel.kernel_spec
        # The kernelspec's request fields, as ``KernelProvisionerFactory`` gives them to a provisioner.
        stanza = (spec.metadata or {}).get("kernel_provisioner", {})
        fields = stanza.get("config", {}) if isinstance(stanza, dict) else {}
        kernel.provisioner = SlurmProvisioner(kernel_id=record.kernel_id, kernel_spec=spec, parent=kernel, **fields)
        info = kernel.provisioner.adopt(restored)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(kernel.connection_file)  # the earlier server's
        for port in port_names:  # load_connection_info keeps ports that the configuration has set
            setattr(kernel, port, 0)
        kernel.load_connection_info(info)
        kernel.write_connection_file()
        jupyter_compat.mark_started(kernel)
        jupyter_compat.set_ready(kernel)
        kernel.execution_state, kernel.reason, kernel.last_activity = "unknown", "", datetime.now(timezone.utc)
        kernel.start_restarter()
        maker = str(record.manager.get("maker") or record.owner)
        manager.adopt_kernel(record.kernel_id, kernel, record.owner, maker)

    def _kernel_manager(self, restored: RestoredKernel) -> Any:
        record, state = restored.record, restored.record.manager
        name = str(state.get("kernel_name") or record.launch.get("connection", {}).get("kernel_name", ""))
        kernel, _name, _kernel_id = self._manager.pre_start_kernel(name, {"kernel_id": record.kernel_id})
        kernel.kernel_id = record.kernel_id
        try:
            kernel.kernel_spec  # noqa: B018 - the property looks for it
        except (NoSuchKernel, GatewaySlurmError):
            # It was uninstalled; the kernel runs nevertheless.
            jupyter_compat.set_kernel_spec(kernel, KernelSpec(**state.get("kernel_spec", {})))
        kernel.transport_encryption = state.get("transport_encryption", kernel.transport_encryption)
        env = record.launch.get("env") or {}
        arguments = state.get("launch_args") or {"env": env, "cwd": record.launch.get("cwd")}
        jupyter_compat.set_launch_args(kernel, dict(arguments))
        return kernel

    def _drop(self, kernel_ids: list[str]) -> None:
        """Another server has taken these kernels over: remove them here, and leave them running."""
        for kernel_id in kernel_ids:
            if kernel_id in self._manager:
                self.log.warning("kernel %s has been taken over by another server", kernel_id)
                self.detach(kernel_id)


def _runs_on_a_node(kernel: Any) -> bool:
    """Whether the kernel has a process on a node, which does not need this server."""
    provisioner = getattr(kernel, "provisioner", None)
    if not isinstance(provisioner, SlurmProvisioner) or not ready_of(kernel).done():
        return False
    return provisioner.has_process and kernel.execution_state != "dead"


def _manager_state(kernel: Any, maker: str) -> dict[str, Any]:
    """What the next server needs to make the kernel's manager: JSON, with secrets."""
    arguments = jupyter_compat.launch_args(kernel)
    if isinstance(arguments.get("env"), dict):
        # A Jupyter server passes its whole environment, of which a kernel gets a part.
        arguments["env"] = kernel_environment(arguments["env"])
    return {
        "kernel_name": kernel.kernel_name,
        "maker": maker,
        "launch_args": {name: value for name, value in arguments.items() if _is_json(value)},
        "transport_encryption": kernel.transport_encryption,
        "kernel_spec": {**kernel.kernel_spec.to_dict(), "resource_dir": kernel.kernel_spec.resource_dir},
    }


def _is_json(value: object) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        json.dumps(value)
        return True
    return False
