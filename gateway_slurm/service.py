"""The service: one per process, with its own thread and loop; the composition root and the admin's traits.

Callers may have a loop that is busy, or none that runs between calls (``jupyter console``, nbclient,
papermill): nothing here depends on theirs. ``run`` hands a coroutine over from a caller's loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from gateway_slurm.access import SlurmUsers, cluster_access
from gateway_slurm.addresses import endpoints, interface_addresses
from gateway_slurm.allocations.keep import KeepFlags
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.manager import Allocations, AllocationSettings, make_allocations
from gateway_slurm.allocations.model import Allocation, Owner, Place, Waiting
from gateway_slurm.allocations.owners import Owners
from gateway_slurm.allocations.recovery import recover, watch_orphans
from gateway_slurm.allocations.start import LauncherSite
from gateway_slurm.allocations.table import AllocationTable, OwnerContext
from gateway_slurm.config import ServiceSettings, load_admin_config, port_range
from gateway_slurm.errors import GatewaySlurmError, LinkError
from gateway_slurm.kernels.held import HeldKernel
from gateway_slurm.kernels.hub_report import HubReports, start_report
from gateway_slurm.kernels.model import KernelLaunch
from gateway_slurm.kernels.process import KernelProcess
from gateway_slurm.kernels.restore import FailOver, Restored
from gateway_slurm.kernels.transport import Dialling
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.link.tunnel import make_socket_directory
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.driver import SlurmJobs
from gateway_slurm.slurm.watcher import JobWatcher
from gateway_slurm.store import LostRows, Registry

T = TypeVar("T")

# How long the end of the process waits for starts that it gives up, and for all there is to do, in seconds.
START_SECONDS, CLOSE_SECONDS = 10.0, 40.0


class SlurmService(ServiceSettings):
    """Starts kernels on Slurm's nodes. Settings are the admin's, in ``jupyter_slurm_config.py``."""

    _instance: SlurmService | None = None
    _instance_lock = threading.Lock()

    @classmethod
    def instance(cls, log: logging.Logger | None = None) -> SlurmService:
        """The process's service, made with the admin's configuration when it is first asked for.

        Raises ConfigError when that configuration has a mistake.
        """
        with cls._instance_lock:
            service = cls._instance
            # After a fork the thread is gone, and the allocations are the parent's.
            if service is None or service._pid != os.getpid() or service._closed:
                service = load_admin_config(cls)
                if log is not None:
                    service.log = log
                cls._instance = service
            return service

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._pid, self._closed = os.getpid(), False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._thread_lock = threading.Lock()
        self._opened: asyncio.Task[None] | None = None
        self.access = cluster_access(self)
        self.runner = self.access.runner
        self._users = SlurmUsers(self, self.access)
        self.owners: Owners
        self.registry: Registry
        self.url = ""  # where the others of the deployment reach this server's clients' side; set before it is used
        self.all_jobs: SlurmJobs
        self.endpoints: list[str] = []  # this server's own addresses for launchers
        self._starting: set[asyncio.Task[Any]] = set()
        self.recovers = True  # it deals with what dead servers have left
        self.leave_at_exit = False  # kernels, to the next server, where nobody closes the service before the end
        # Called on the service's loop: with kernels of a server that died, and with ids of those that another took.
        self.on_claimed: Callable[[list[Restored]], None] = lambda _restored: None
        self.on_dropped: Callable[[list[str]], None] = lambda _kernel_ids: None

    @property
    def allocations(self) -> Allocations:
        """Those of the process's own user."""
        return self.owners.of("")

    @property
    def is_closed(self) -> bool:
        """Whether its end has begun: nothing is started any more, and all kernels are over."""
        return self._closed

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
        """Run ``coroutine`` on the service's loop and await it on the caller's; cancellation goes along."""
        return await asyncio.wrap_future(self.submit(coroutine))

    # -- life -------------------------------------------------------------------------------

    async def open(self) -> None:
        """Listen, once; called on the service's loop."""
        if self._opened is None or (self._opened.done() and not self.is_open):
            self._opened = asyncio.ensure_future(self._listen())
        await asyncio.shield(self._opened)

    @property
    def is_open(self) -> bool:
        """Whether it listens for launchers and has its store."""
        opened = self._opened
        return opened is not None and opened.done() and not opened.cancelled() and opened.exception() is None

    async def why_not_ready(self) -> str:
        """Why no kernel could be started now, as far as this machine knows; Slurm is not asked."""
        try:
            self.access.check()
            await self.open()
        except GatewaySlurmError as error:
            return str(error)
        return self.registry.trouble  # no job is submitted that cannot be put on record

    async def _listen(self) -> None:
        """Raises StoreError or LinkError; nothing is left open then."""
        self.registry = self.make_registry()
        await asyncio.to_thread(self.registry.open)
        try:
            await self._open_socket()
        except BaseException:
            await asyncio.to_thread(self.registry.close)
            raise
        self._failover.announce()
        self._directory = await asyncio.to_thread(make_socket_directory, self.tunnel_directory)
        self._kernels: dict[str, HeldKernel] = {}
        self.dialling = Dialling(self.log)
        self._keep_flags = KeepFlags(self.registry.keep_flags, interval=self.heartbeat, log=self.log)
        self._reports = HubReports.wanted_by(os.environ, self.log)
        self.owners = Owners(self._allocations_for, self.registry)
        self.access.find_launcher = self.owners.steps_of
        self.all_jobs = self._users.all_jobs(self.registry, self.owners.owner_of)
        self._watcher = JobWatcher(self.all_jobs, interval=(self.watch_interval, 15 * self.watch_interval))
        self.registry.on_lost = self._lost
        self.allocations.create_task(self._keep_flags.watch())
        if self.recovers:
            self.allocations.create_task(recover(self.registry, self.all_jobs, self.log, deployment=self.deployment))
        # A program that starts one kernel asks Slurm for no more than that.
        if self.deployment or self.orphan_jobs != "leave":
            self.allocations.create_task(
                watch_orphans(
                    self.registry,
                    self.all_jobs,
                    self.log,
                    policy=self.orphan_jobs,
                    orphan_timeout=self.orphan_timeout,
                )
            )
        await self.access.open(self._socket.connected, self._failover.announce)

    def make_registry(self) -> Registry:
        """The store as the admin has set it, not opened yet; whoever opens it closes it."""
        return Registry.default(url=self.store_url, key_file=self.store_key_file, deployment=self.deployment)

    def _lost(self, lost: LostRows) -> None:
        """Called on the store's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._failover.lose, lost)

    async def _open_socket(self) -> None:
        low, high = port_range(self.response_port) or (0, 0)
        self._hosts = interface_addresses(self.response_interface) if self.response_interface else None
        self._failover = FailOver(self)
        self._socket = ResponseSocket(log=self.log, unknown=self._failover.stranger)
        try:
            await self._socket.listen(self._hosts, range(low, high + 1))
        except OSError as error:
            raise LinkError(
                f"the response socket cannot listen on port {self.response_port} of "
                f"{self.response_interface or 'any interface'}: {error}; see SlurmService.response_port"
            ) from error
        self.endpoints = endpoints(self.response_address, self._hosts, self._socket.port)
        self.log.info("response socket: listening, announced as %s", ", ".join(self.endpoints))

    async def also_listen(self, port: int) -> None:
        """Have launchers dial this port, too. Raises OSError when it is not free."""
        await self._socket.also_listen(self._hosts, port)

    def _allocations_for(self, owner: str) -> Allocations:
        separate_users = self.run_as == "user"
        return make_allocations(
            Owner(
                name=owner,
                user=self._users.user_of(owner),
                may_adopt=lambda jobid: self.owners.may_adopt(owner, jobid, separate_users=separate_users),
            ),
            OwnerContext(
                driver=self._users.driver_of(owner),
                socket=self._socket,
                watcher=self._watcher,
                table=AllocationTable(self.registry, self._socket),
                log=self.log,
            ),
            self._keep_flags,
            LauncherSite(
                endpoints=lambda: self.access.endpoints(self.endpoints),
                addresses=self._failover.addresses,
                log_end=self._users.log_end,
            ),
            AllocationSettings.of(self),
        )

    def close(self, *, leave: bool = False) -> None:
        """Relinquish all allocations and end the thread; any thread but the service's own may call it.

        With ``leave`` kernels and their jobs stay, on record, for the next server process; starts that are
        under way are given up with their jobs, since their kernels would be nobody's.
        """
        loop, thread = self._loop, self._thread
        if self._closed or loop is None or thread is None or self._pid != os.getpid():
            return
        self._closed = True
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
        if leave:
            await self._give_up_starts()
        for held in self.kernels():
            held.forget_timers()
            held.process.leave() if leave else held.process.close()
        self._kernels.clear()
        await self.owners.close(leave=leave)
        await self._watcher.close()
        await self._socket.close()
        await self.access.close()
        await asyncio.to_thread(self.registry.close, leave=leave)
        if self._reports is not None:
            await self._reports.close()
        # Who waits for the end of a kernel that lives on waits for nothing any more.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        shutil.rmtree(self._directory, ignore_errors=True)
        await asyncio.sleep(0)  # what was written to the links goes out

    async def _give_up_starts(self) -> None:
        starting = set(self._starting)
        for start in starting:
            start.cancel()
        if starting:
            await asyncio.wait(starting, timeout=START_SECONDS)

    # -- kernels of earlier processes (on the service's loop) ----------------------------------

    async def restore(self) -> list[Restored]:
        """Have the kernels of dead servers of this ``deployment`` again, and those of servers that die later.

        Of these ``on_claimed`` is told. Raises StoreError.
        """
        await self.open()
        return await self._failover.restore()

    async def take_over(self, kernel_ids: Iterable[str]) -> list[Restored]:
        """Have these kernels, of a server that is dead, and what shares their jobs. Raises StoreError."""
        await self.open()
        return await self._failover.claim(kernel_ids)

    # -- kernels (on the service's loop) -----------------------------------------------------

    async def start_kernel(
        self,
        kernel_id: str,
        request: KernelRequest,
        launch: KernelLaunch,
        owner: str = "",
        manager: dict[str, Any] | None = None,
    ) -> tuple[HeldKernel, dict[str, Any]]:
        """Start a kernel in an allocation; return it and its connection info.

        ``owner`` is the name of the user whom both belong to; empty for the process's own user. ``manager`` is
        what a later process's kernel manager needs to be told (``HeldKernel.remember``).
        Raises RequestError (NotAllowed), SlurmError, AllocationError or KernelStartError. A start that fails or is
        cancelled leaves no kernel, and no job that it made.
        """
        await self.open()
        starting = asyncio.current_task()
        assert starting is not None
        self._starting.add(starting)
        try:
            return await self._start_kernel(kernel_id, request, launch, owner, manager or {})
        finally:
            self._starting.discard(starting)

    async def _start_kernel(
        self, kernel_id: str, request: KernelRequest, launch: KernelLaunch, owner: str, manager: dict[str, Any]
    ) -> tuple[HeldKernel, dict[str, Any]]:
        account = await self._users.prepare_start(request, owner)
        allocations = self.owners.of(owner)
        launch = replace(launch, env={**account.environment, **launch.env})  # the project's, under the kernel's own
        place = Place(kernel_id)
        allocation, launcher = await allocations.acquire(request, account, place)
        process = KernelProcess(kernel_id, launcher, **self.of_kernels())
        held = HeldKernel(self, process, allocation, place)
        try:
            info = await process.start(launch)
        except BaseException:
            await asyncio.shield(allocations.create_task(held.release()))
            raise
        allocation.mark_used()
        self.hold(held)
        held.remember(manager)
        held.expect_take_over()
        return held, info

    def environment_of(self, owner: str, environment: dict[str, str]) -> dict[str, str]:
        """A kernel's environment, without what is this process's user's where the kernel is another's."""
        return self._users.environment(owner, environment)

    # -- allocations, for their owners -----------------------------------------------------------
    #
    # Where ``owner`` is None everybody's are meant, for admins. The coroutines run on the service's loop:
    # ``await service.run(service.keep_allocation(owner, jobid))``. They raise UnknownJob for a job that is
    # over, or not that owner's, and SlurmError when Slurm did not do what it was asked.

    def waiting(self, kernel_id: str, owner: str | None = None) -> Waiting | None:
        """Why a kernel's start takes its time; memory only, any thread may call this."""
        return self.owners.waiting(kernel_id, owner) if self.is_open else None

    def allocations_of(self, owner: str | None) -> list[dict[str, Any]]:
        """Each of the owner's allocations, by job id; memory only, any thread may call this.

        The keys are those of ``Allocation.row``: jobid, owner, ours, state, reason, queue_place,
        expected_start, nodes, end_time, kernel_ids, kept and config.
        """
        return self.owners.rows(owner) if self.is_open else []

    async def keep_allocation(self, owner: str | None, jobid: str) -> None:
        """Let it stay after its last kernel, until its time limit or until it is released."""
        await self.open()
        self.owners.keep(owner, jobid)

    async def release_allocation(self, owner: str | None, jobid: str) -> None:
        """Take that back: it ends with its last kernel; now, if there is none in it."""
        await self.open()
        await self.owners.release(owner, jobid)

    async def cancel_allocation(self, owner: str | None, jobid: str) -> None:
        """End it now, with its kernels."""
        allocations, allocation = await self._find(owner, jobid)
        await allocations.cancel(allocation)

    async def _find(self, owner: str | None, jobid: str) -> tuple[Allocations, Allocation]:
        await self.open()
        return self.owners.find(owner, jobid)

    def report_start(self, kernel_id: str, allocation: Allocation, launcher: Launcher) -> None:
        """Tell the JupyterHub that wants to know; called on the service's loop, and takes no time."""
        if self._reports is not None:
            self._reports.send(start_report(kernel_id, allocation, launcher))

    def kernels(self) -> list[HeldKernel]:
        """Those that are there, dead ones for as long as they may be restarted."""
        return list(self._kernels.values())

    def hold(self, held: HeldKernel) -> None:
        """Have a kernel, until ``forget``."""
        self._kernels[held.process.kernel_id] = held

    def forget(self, held: HeldKernel) -> None:
        """The kernel is over: nobody is to find it later."""
        self._kernels.pop(held.process.kernel_id, None)
        self.registry.remove_kernel(held.process.kernel_id)

    def let_go(self, held: HeldKernel) -> None:
        """The kernel is another server's, and so is its record."""
        self._kernels.pop(held.process.kernel_id, None)

    def of_kernels(self) -> dict[str, Any]:
        """What each KernelProcess is made with; ``tunnel_prefix`` begins the paths of its sockets here."""
        prefix = os.path.join(self._directory, secrets.token_hex(4))
        return {"tunnel_prefix": prefix, "dialling": self.dialling, "log": self.log}
