"""The service: one per process, with a thread and a loop of its own. It composes the parts and starts and ends them.

A caller's loop may be busy, or may not run between calls (``jupyter console``, nbclient, papermill), so nothing here
depends on it. ``run`` awaits a coroutine on the service's loop from a caller's loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

from gateway_slurm._util import LoopWatch, TaskSet, call_on
from gateway_slurm.access import SlurmUsers, cluster_access
from gateway_slurm.addresses import endpoints, interface_addresses
from gateway_slurm.allocations.keep import KeepFlags
from gateway_slurm.allocations.manager import Allocations
from gateway_slurm.allocations.owners import Owners, QueuedStart
from gateway_slurm.allocations.recovery import recover, watch_orphans
from gateway_slurm.allocations.start import DialAddresses
from gateway_slurm.allocations.table import AllocationTable, OwnerContext
from gateway_slurm.config import ServiceSettings, load_admin_config, port_range
from gateway_slurm.errors import GatewaySlurmError, LinkError
from gateway_slurm.events import Events
from gateway_slurm.kernels.held import KernelHandle, Kernels
from gateway_slurm.kernels.hub_report import HubReports
from gateway_slurm.kernels.model import KernelLaunch
from gateway_slurm.kernels.restore import Failover, LauncherAddresses, RestoredKernel, Restorer
from gateway_slurm.kernels.transport import TransportSelector
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.link.tunnel import make_socket_directory
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.driver import SlurmJobs
from gateway_slurm.slurm.watcher import JobWatcher
from gateway_slurm.store import Registry

T = TypeVar("T")

# Seconds that the end of the process waits for the service to close.
CLOSE_SECONDS = 40.0
# Seconds that a loop may stand still before the server no longer renews its lease. Longer than any callback takes: the
# longest one restores a thousand kernels, and notes each of them.
STANDSTILL_SECONDS = 10.0


class SlurmService(ServiceSettings):
    """Starts kernels on Slurm's nodes. Settings are the admin's, in ``jupyter_slurm_config.py``."""

    _instance: SlurmService | None = None
    _instance_lock = threading.Lock()

    @classmethod
    def instance(cls, log: logging.Logger | None = None) -> SlurmService:
        """The process's service; the first call makes it, with the admin's configuration.

        Raises ConfigError when that configuration has a mistake.
        """
        with cls._instance_lock:
            service = cls._instance
            # After a fork the thread is gone, and the allocations are the parent's.
            if service is None or service._pid != os.getpid() or service.is_closed:
                # From the start: the access to the cluster, which __init__ makes, keeps the log.
                service = load_admin_config(cls, **({} if log is None else {"log": log}))
                cls._instance = service
            return service

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._pid = os.getpid()
        # Whether ``close`` has begun: no kernel is started any more, and all kernels are over for this server.
        self.is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._thread_lock = threading.Lock()
        self._opened: asyncio.Task[None] | None = None
        self.events = Events(self.log)
        # The loops on which kernels depend: the service's own, and a gateway's.
        self.loops = LoopWatch()
        self.access = cluster_access(self)
        self.runner = self.access.runner
        self.users = SlurmUsers(self, self.access)
        # Made by ``open``.
        self.registry: Registry
        self.owners: Owners
        self.all_jobs: SlurmJobs
        self.kernels: Kernels
        self.addresses: LauncherAddresses
        # Where the other servers of the deployment reach this server's API; set before ``open``.
        self.url = ""
        # Sockets on which a service manager listens for launchers, in place of ``response_port``; set before ``open``.
        self.response_sockets: list[socket.socket] = []
        # Whether this server deals with the jobs that dead servers left.
        self.recovers = True
        # Whether kernels run on for the next server when the process ends without ``close``.
        self.leave_at_exit = False
        # Called on the service's loop: with kernels of a server that died, and with ids of kernels that another took.
        self.on_claimed: Callable[[list[RestoredKernel]], None] = lambda _restored: None
        self.on_dropped: Callable[[list[str]], None] = lambda _kernel_ids: None

    # -- The thread and its loop ------------------------------------------------------------------

    def _ensure_thread(self) -> asyncio.AbstractEventLoop:
        with self._thread_lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="gateway_slurm", daemon=True)
                self._thread.start()
                # Before the interpreter forbids new threads and processes, which atexit is too late for
                # (3.12); concurrent.futures uses the same hook.
                threading._register_atexit(lambda: self.close(leave=self.leave_at_exit))  # type: ignore[attr-defined]
            return self._loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run ``coroutine`` on the service's loop; any thread may call this."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._ensure_thread())

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` on the service's loop and await it on the caller's; cancellation is passed on."""
        return await asyncio.wrap_future(self.submit(coroutine))

    # -- Opening (on the service's loop) ----------------------------------------------------------

    async def open(self) -> None:
        """Open the store and listen for launchers, once. Raises StoreError or LinkError."""
        if self._opened is None or (self._opened.done() and not self.is_open):
            self._opened = asyncio.ensure_future(self._open())
        await asyncio.shield(self._opened)

    @property
    def is_open(self) -> bool:
        """Whether the store is open and the server listens for launchers."""
        opened = self._opened
        return opened is not None and opened.done() and not opened.cancelled() and opened.exception() is None

    async def why_not_ready(self) -> str:
        """Why no kernel could be started now, as far as this machine knows; Slurm is not asked."""
        try:
            self.access.check()
            await self.open()
        except GatewaySlurmError as error:
            return str(error)
        return self.registry.trouble  # a job that cannot be recorded is not submitted

    def make_registry(self) -> Registry:
        """The store that the admin has set, not opened yet; the caller opens and closes it."""
        return Registry.default(
            url=self.store_url,
            key_file=self.store_key_file,
            deployment=self.deployment,
            standing=lambda: self.loops.standing(STANDSTILL_SECONDS),
        )

    async def _open(self) -> None:
        """After an error nothing is left open."""
        self._tasks = TaskSet()
        self.registry = self.make_registry()
        await asyncio.to_thread(self.registry.open)
        self._directory = ""
        try:
            self._directory = await asyncio.to_thread(make_socket_directory, self.tunnel_directory)
            self._compose()
            await self._listen()
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            await asyncio.to_thread(self.registry.close)
            raise
        self.addresses.announce()
        loop = asyncio.get_running_loop()
        # The store's thread calls it.
        self.registry.on_lost = lambda lost: call_on(loop, self._failover.hand_over, lost)
        self._tasks.create_task(self._keep_flags.watch())
        self._tasks.create_task(self.loops.follow("the service's loop"))
        if self.recovers:
            self._tasks.create_task(recover(self.registry, self.all_jobs, self.log, deployment=self.deployment))
        # A program that starts one kernel asks Slurm for no more than that.
        if self.deployment or self.orphan_jobs != "leave":
            policy, timeout = self.orphan_jobs, self.orphan_timeout
            self._tasks.create_task(
                watch_orphans(self.registry, self.all_jobs, self.log, policy=policy, orphan_timeout=timeout)
            )
        await self.access.open(self._socket.connected, self.addresses.announce)

    def _compose(self) -> None:
        """Make the parts, each of those made before it."""
        self._keep_flags = KeepFlags(self.registry.keep_flags, interval=self.heartbeat, log=self.log)
        self.owners = Owners(self._allocations_for, self.registry)
        self.access.find_launcher = self.owners.steps_of
        self.all_jobs = self.users.all_jobs(self.registry, self.owners.owner_of)
        self._watcher = JobWatcher(self.all_jobs, interval=(self.watch_interval, 15 * self.watch_interval))
        self.kernels = Kernels(
            self.owners,
            self.registry,
            TransportSelector(self.log),
            HubReports.from_environment(os.environ, self.log),
            prepare_start=self.users.prepare_start,
            socket_directory=self._directory,
            release_grace=self.release_grace,
            post_launch_timeout=self.post_launch_timeout,
            events=self.events,
            log=self.log,
        )
        self.addresses = LauncherAddresses(
            self.access,
            self.registry,
            self._tasks,
            listen=lambda port: self._socket.also_listen(self._hosts, port),
            url=self.url,
            log=self.log,
        )
        self._failover = Failover(
            self.kernels,
            Restorer(self.kernels, self.all_jobs, self._tasks),
            self.addresses,
            self._tasks,
            deployment=self.deployment,
            # Both may be set later.
            on_claimed=lambda restored: self.on_claimed(restored),
            on_dropped=lambda kernel_ids: self.on_dropped(kernel_ids),
            log=self.log,
        )
        self._socket = ResponseSocket(log=self.log, resolve=self._failover.resolve_unknown_launcher)

    def _allocations_for(self, owner: str) -> Allocations:
        separate_users = self.run_as == "user"
        return Allocations(
            OwnerContext(
                owner=owner,
                user=self.users.user_of(owner),
                driver=self.users.driver_of(owner),
                socket=self._socket,
                watcher=self._watcher,
                table=AllocationTable(self.registry, self._socket),
                settings=self,
                events=self.events,
                log=self.log,
            ),
            self._keep_flags,
            DialAddresses(first=self.addresses.of_this_server, later=self.addresses.of_all_servers),
            may_adopt=lambda jobid: self.owners.may_adopt(owner, jobid, separate_users=separate_users),
            log_end=lambda path: self.users.log_end(owner, path),
            cluster_info=self.users.cluster_info,
        )

    async def _listen(self) -> None:
        """Listen for launchers. Raises LinkError."""
        low, high = port_range(self.response_port) or (0, 0)
        self._hosts = interface_addresses(self.response_interface) if self.response_interface else None
        try:
            if self.response_sockets:
                await self._socket.listen_on(self.response_sockets)
            else:
                await self._socket.listen(self._hosts, range(low, high + 1))
        except OSError as error:
            raise LinkError(
                f"the response socket cannot listen on port {self.response_port} of "
                f"{self.response_interface or 'any interface'}: {error}; see SlurmService.response_port"
            ) from error
        self.addresses.direct = endpoints(self.response_address, self._hosts, self._socket.port)
        self.log.info("response socket: listening, announced as %s", ", ".join(self.addresses.direct))

    # -- Closing ------------------------------------------------------------------------------------

    def close(self, *, leave: bool = False) -> None:
        """Release all allocations and end the thread; any thread but the service's own may call it.

        With ``leave`` kernels and their jobs stay, on record, for the next server process. Starts that are under way
        are cancelled with their jobs: no client could find their kernels.
        """
        loop, thread = self._loop, self._thread
        if self.is_closed or loop is None or thread is None or self._pid != os.getpid():
            return
        self.is_closed = True
        self.loops.close()
        closing = asyncio.run_coroutine_threadsafe(self._close(leave=leave), loop)
        try:
            closing.result(timeout=CLOSE_SECONDS)
        except (concurrent.futures.TimeoutError, GatewaySlurmError) as error:
            self.log.error("the service did not close in good order: %s", error or "timeout")
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        if not thread.is_alive():
            loop.close()

    async def _close(self, *, leave: bool) -> None:
        if self._opened is not None:
            await asyncio.wait([self._opened])
        if not self.is_open:
            return
        await self._tasks.close()  # first: a server that ends must not claim a dead server's kernels
        await self.kernels.close(leave=leave)
        await self.owners.close(leave=leave)
        await self._watcher.close()
        await self._socket.close()
        await self.access.close()
        await asyncio.to_thread(self.registry.close, leave=leave)
        if self.kernels.reports is not None:
            await self.kernels.reports.close()
        # A caller that waits for the end of a kernel that runs on would wait without an end.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        shutil.rmtree(self._directory, ignore_errors=True)
        await asyncio.sleep(0)  # what was written to the links is sent

    # -- Kernels (on the service's loop) ------------------------------------------------------------

    async def start_kernel(
        self,
        kernel_id: str,
        request: KernelRequest,
        launch: KernelLaunch,
        owner: str,
        manager_state: dict[str, Any],
        maker: str = "",
    ) -> KernelHandle:
        """Start a kernel in an allocation, and return it once it listens.

        ``owner`` is the name of the user whom both belong to; empty for the process's own user. ``manager_state`` is
        what another process needs to make the kernel's manager again (``KernelHandle.remember``). ``maker`` is the
        name of the user or service that asked, for events.
        Raises RequestError (NotAllowed), SlurmError, AllocationError or KernelStartError. A start that fails or is
        cancelled leaves no kernel, and no job that it submitted.
        """
        await self.open()
        return await self.kernels.start(kernel_id, request, launch, owner, manager_state, maker)

    async def restore(self) -> list[RestoredKernel]:
        """Take over the kernels of dead servers of this ``deployment``, now and from now on. Raises StoreError.

        ``on_claimed`` is called with the kernels of servers that die later.
        """
        await self.open()
        return await self._failover.restore()

    async def take_over(self, kernel_ids: Iterable[str]) -> list[RestoredKernel]:
        """Take over these kernels of a dead server, and the kernels that share their jobs. Raises StoreError."""
        await self.open()
        return await self._failover.claim(kernel_ids)

    # -- Allocations, for their owners ----------------------------------------------------------------
    #
    # ``owner`` None stands for all owners, for admins. The coroutines run on the service's loop:
    # ``await service.run(service.keep_allocation(owner, jobid))``. They raise UnknownJob for a job that is
    # over, or that another owner has, and SlurmError when Slurm did not do what it was asked.

    def waiting(self, kernel_id: str, owner: str | None = None) -> QueuedStart | None:
        """Why a kernel's start takes time; reads memory only, and any thread may call it."""
        return self.owners.waiting(kernel_id, owner) if self.is_open else None

    def has_job(self, kernel_id: str, owner: str | None = None) -> bool:
        """Whether a kernel's start has a job by now; reads memory only, and any thread may call it."""
        return self.is_open and self.owners.has_job(kernel_id, owner)

    def allocations_of(self, owner: str | None) -> list[dict[str, Any]]:
        """Each of the owner's allocations, by job id; reads memory only, and any thread may call it.

        The keys are those of ``Allocation.row``: jobid, owner, ours, state, reason, advice,
        queue_place, expected_start, nodes, end_time, kernel_ids, kept and config.
        """
        return self.owners.rows(owner) if self.is_open else []

    async def keep_allocation(self, owner: str | None, jobid: str) -> None:
        """Keep the allocation after its last kernel, until its time limit or ``release_allocation``."""
        await self.open()
        self.owners.keep(owner, jobid)

    async def release_allocation(self, owner: str | None, jobid: str) -> None:
        """Keep it no longer: it ends with its last kernel, or now where it has none."""
        await self.open()
        await self.owners.release(owner, jobid)

    async def cancel_allocation(self, owner: str | None, jobid: str) -> None:
        """End the allocation now, with its kernels."""
        await self.open()
        await self.owners.cancel(owner, jobid)
