"""The kernels of one server: how a kernel is started, restarted in its place, and released.

A kernel is released by its kernel manager. The server releases it when the manager does not confirm the start in time,
and when the kernel died and was not restarted within ``release_grace``. Everything here runs on the service's loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation, Place
from gateway_slurm.allocations.owners import Owners
from gateway_slurm.errors import AllocationEnded, LinkError
from gateway_slurm.events import STARTED, Events, by_of, outcome_of, reason_of
from gateway_slurm.kernels.hub_report import HubReports, start_report
from gateway_slurm.kernels.model import KernelLaunch, Phase
from gateway_slurm.kernels.process import KernelProcess
from gateway_slurm.kernels.transport import TransportSelector
from gateway_slurm.request import KernelRequest, resources
from gateway_slurm.slurm.account import Account
from gateway_slurm.slurm.names import file_of
from gateway_slurm.slurm.sudo.runner import process_user
from gateway_slurm.store import Registry
from gateway_slurm.store.records import KernelRecord

# Seconds that a restart waits for its launcher's link; after the server's own start the launchers need time to dial.
LINK_SECONDS = 10.0
# Seconds that a restart waits for the old kernel's end, after STOP.
STOP_SECONDS = 10.0
# Seconds that the end of the server waits for starts that it has cancelled.
START_SECONDS = 10.0
# Seconds that a kernel's end with its job waits for Slurm's word, which comes once the job's processes have ended.
REASON_SECONDS = 5.0
REMEDY = "shut the kernel down and start it again for a new allocation"


class Kernels:
    """All kernels of one server; dead kernels stay for as long as they may be restarted.

    ``prepare_start`` makes sure that an owner may start a kernel, and returns the account to bill for it.
    ``socket_directory`` is the private directory for the tunnels' sockets. ``release_grace`` and
    ``post_launch_timeout`` are in seconds. The service awaits ``close``.
    """

    def __init__(
        self,
        owners: Owners,
        registry: Registry,
        transport: TransportSelector,
        reports: HubReports | None,
        *,
        prepare_start: Callable[[KernelRequest, str], Awaitable[Account]],
        socket_directory: str,
        release_grace: float,
        post_launch_timeout: float,
        events: Events,
        log: logging.Logger,
    ) -> None:
        self.events = events
        self.owners, self.registry, self.transport = owners, registry, transport
        self.release_grace, self.post_launch_timeout, self.log = release_grace, post_launch_timeout, log
        self.reports, self._prepare_start, self._socket_directory = reports, prepare_start, socket_directory
        self._handles: dict[str, KernelHandle] = {}
        self._starting: set[asyncio.Task[Any]] = set()

    def handles(self) -> list[KernelHandle]:
        """The handles of all kernels."""
        return list(self._handles.values())

    async def start(
        self,
        kernel_id: str,
        request: KernelRequest,
        launch: KernelLaunch,
        owner: str,
        manager_state: dict[str, Any],
        maker: str = "",
    ) -> KernelHandle:
        """Start a kernel in an allocation, and return it once it listens; see ``SlurmService.start_kernel``."""
        task = asyncio.current_task()
        assert task is not None
        self._starting.add(task)
        facts = start_facts(kernel_id, request, launch, owner, maker)
        self.events.emit("kernel_requested", **facts)
        clock, handle = StartClock(), None
        try:
            account = await self._prepare_start(request, owner)
            allocations = self.owners.of(owner)
            connection = launch.connection
            place = Place(
                kernel_id,
                kernelspec=connection.get("kernel_name", ""),
                session_name=connection.get("jupyter_session", ""),
            )
            allocation, launcher = await allocations.acquire(request, account, place)
            clock.linked()
            handle = KernelHandle(self, self._process(kernel_id, launcher), allocation, place)
            try:
                # The project's variables apply where the kernel has none of its own.
                await handle.process.start(replace(launch, env={**account.environment, **launch.env}))
            except BaseException:
                await asyncio.shield(allocations.table.tasks.create_task(handle.release()))
                raise
        except BaseException as error:
            outcome, where = outcome_of(error), handle.place_facts() if handle is not None else {}
            self.events.emit(
                "kernel_not_started", **facts, **where, **clock.seconds(), outcome=outcome, reason=reason_of(error)
            )
            raise
        finally:
            self._starting.discard(task)
        allocation.mark_used()
        self._handles[kernel_id] = handle
        self.events.emit("kernel_started", **facts, **handle.place_facts(), **clock.seconds(), outcome=STARTED)
        handle.remember(manager_state)
        handle.await_confirmation()
        return handle

    def _process(self, kernel_id: str, launcher: Launcher) -> KernelProcess:
        # The paths of the sockets begin with this.
        prefix = os.path.join(self._socket_directory, secrets.token_hex(4))
        return KernelProcess(kernel_id, launcher, tunnel_prefix=prefix, transport=self.transport, log=self.log)

    def restore(
        self, allocation: Allocation, launcher: Launcher, record: KernelRecord, fallback_reason: str
    ) -> KernelHandle:
        """Have a kernel that an earlier server started; it is LOST until its launcher reports it.

        ``fallback_reason`` says why a direct kernel is reached through the tunnel; it is empty where the kernel can
        be dialled. Raises KeyError, TypeError or AttributeError for an incomplete record.
        """
        process = self._process(record.kernel_id, launcher)
        try:
            process.restore(record, fallback_reason)
        except (KeyError, TypeError, AttributeError):
            launcher.kernels.pop(record.kernel_id)
            raise
        allocation.mark_used()
        place = Place(record.kernel_id, record.node, launcher)
        allocation.add_place(place)
        handle = self._handles[record.kernel_id] = KernelHandle(self, process, allocation, place)
        handle.manager_state = dict(record.manager)
        return handle

    def forget(self, handle: KernelHandle) -> None:
        """The kernel is over: remove it from the table and from the store."""
        self.discard(handle)
        self.registry.remove("kernels", handle.process.kernel_id)

    def discard(self, handle: KernelHandle) -> None:
        """Remove the kernel from the table; its record stays, as it belongs to another server now."""
        self._handles.pop(handle.process.kernel_id, None)

    async def close(self, *, leave: bool) -> None:
        """End all kernels. With ``leave`` they run on for the next server, and starts under way are cancelled.

        A start under way has no client that could find its kernel later.
        """
        if leave and (starting := set(self._starting)):
            for start in starting:
                start.cancel()
            await asyncio.wait(starting, timeout=START_SECONDS)
        for handle in self.handles():
            handle.cancel_timer()
            handle.process.detach() if leave else handle.process.close()
        self._handles.clear()


def start_facts(
    kernel_id: str, request: KernelRequest, launch: KernelLaunch, owner: str, maker: str = ""
) -> dict[str, Any]:
    """The start in events (``events.FIELDS``)."""
    return {
        **_kernel_facts(kernel_id, launch, owner),
        "by": by_of(owner, maker),
        "project": request.project,
        "partition": request.partition,
        **resources(request),
    }


def _kernel_facts(kernel_id: str, launch: KernelLaunch | None, owner: str) -> dict[str, Any]:
    connection = launch.connection if launch is not None else {}
    return {
        "user": owner or process_user(),
        "kernel_id": kernel_id,
        "kernelspec": connection.get("kernel_name"),
        "notebook": file_of(connection.get("jupyter_session", "")),
    }


class StartClock:
    """How long a start has waited for its place, and how long the kernel has taken then."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._linked: float | None = None

    def linked(self) -> None:
        """The launcher in the allocation is connected."""
        self._linked = time.monotonic()

    def seconds(self) -> dict[str, float]:
        """``queue_seconds`` and, once there is a launcher, ``start_seconds``."""
        now = time.monotonic()
        if self._linked is None:
            return {"queue_seconds": now - self._begun}
        return {"queue_seconds": self._linked - self._begun, "start_seconds": now - self._linked}


class KernelHandle:
    """One kernel and its place in an allocation, until ``release``."""

    def __init__(self, kernels: Kernels, process: KernelProcess, allocation: Allocation, place: Place) -> None:
        self._kernels, self.process, self.allocation, self._place = kernels, process, allocation, place
        self.log = kernels.log
        self._timer: asyncio.TimerHandle | None = None
        self._released: asyncio.Future[None] | None = None
        self._restarting = False
        # What another process needs to make the kernel's manager again; it holds secrets.
        self.manager_state: dict[str, Any] = {}
        # Resolved with the reason once the kernel is dead and cannot be restarted in its place.
        loop = asyncio.get_running_loop()
        self.over: asyncio.Future[str] = loop.create_future()
        self._over_timer: asyncio.TimerHandle | None = None
        # Called on the service's loop when the kernel's process has ended, and this server does not release it.
        self.on_death: Callable[[], None] = lambda: None
        process.on_exit = lambda _process: self._ended()
        # In the loop's next round: by then the process knows a reason, which says more.
        allocation.ended.add_done_callback(lambda _ended: loop.call_soon(self._set_over))

    async def restart(self, launch: KernelLaunch) -> None:
        """Start the kernel again in the same allocation, on the same node, with the same ports.

        Raises AllocationEnded when the allocation is over: a new one costs budget, and must be asked for separately.
        Raises LinkError when the launcher has no link. After an error the restart may be tried again within
        ``release_grace``; then the kernel is released.
        """
        self.cancel_timer()
        was_dead = self.process.phase is Phase.DEAD
        self._restarting = True
        try:
            self._check_place()
            await self.process.launcher.until_linked(LINK_SECONDS)
            await self._stop()
            self._check_place()  # it may have been released meanwhile
            await self.process.start(launch)
        except BaseException as error:
            # The manager may never call again.
            self._release_later(self._kernels.release_grace)
            if self.process.phase is Phase.DEAD and not was_dead:
                self._kernels.events.emit("kernel_ended", **self.facts(), reason=reason_of(error))
            raise
        finally:
            self._restarting = False
        self._kernels.events.emit("kernel_restarted", **self.facts())
        self.record()
        self.await_confirmation()

    def place_facts(self) -> dict[str, Any]:
        """Where it runs, for events."""
        connect = self.process.connect or {}
        return {
            "jobid": self.allocation.jobid,
            "node": self.process.launcher.node,
            "connect": connect.get("mode"),
        }

    def facts(self) -> dict[str, Any]:
        """The kernel in an event (``events.FIELDS``)."""
        process, allocation = self.process, self.allocation
        return {
            **_kernel_facts(process.kernel_id, process.launched, allocation.owner),
            "project": allocation.request.project,
            **self.place_facts(),
        }

    async def _stop(self) -> None:
        """End the running kernel. Raises LinkError when its launcher does not report the end."""
        process = self.process
        if process.phase is Phase.DEAD:
            return
        process.stop()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except asyncio.TimeoutError as error:
            raise LinkError(
                f"{process.launcher.where} did not report within {STOP_SECONDS:g} s that the old kernel has stopped: "
                "try again, or shut the kernel down"
            ) from error

    def record(self) -> None:
        """Record the kernel as it is now, so that the next server finds it."""
        process = self.process
        assert process.launched is not None
        # The launcher's record has the slot of the kernel.
        self._kernels.owners.of(self.allocation.owner).table.record_launcher(self.allocation, process.launcher)
        self._kernels.registry.put(
            KernelRecord(
                kernel_id=process.kernel_id,
                launcher_id=process.launcher.launcher_id,
                record_key=self.allocation.record_key,
                owner=self.allocation.owner,
                generation=process.generation,
                mode=process.mode,
                ip=process.ip,
                ports=dict(process.ports),
                pid=process.pid,
                started_at=process.started_at,
                launch=asdict(process.launched),
                manager=self.manager_state,
                node=process.launcher.node,
            )
        )

    def remember(self, manager_state: dict[str, Any]) -> None:
        """Record this with the kernel. Keys that an earlier call gave, and this one does not, stay."""
        self.manager_state = {**self.manager_state, **manager_state}
        if self._released is None and not self.allocation.is_over:
            self.record()

    @property
    def can_restart(self) -> bool:
        """Whether the kernel may be started again in its place, as far as is known."""
        launcher = self.process.launcher
        return not (self._released or self.allocation.is_over or launcher.terminated or launcher.ended)

    def _check_place(self) -> None:
        jobid = self.allocation.jobid
        if self.allocation.ended.done():
            ended = self.allocation.ended.result()
            raise AllocationEnded(f"{ended}; {REMEDY}", jobid=jobid, state=ended.state)
        if self._released is not None or self.allocation.is_over:
            raise AllocationEnded(
                f"the kernel's place in job {jobid} was released after the kernel's death; {REMEDY}", jobid=jobid
            )
        if self.process.launcher.terminated:
            raise AllocationEnded(f"Slurm is ending job {jobid}; {REMEDY}", jobid=jobid, state="COMPLETING")
        if self.process.launcher.ended:
            raise AllocationEnded(f"the kernel's launcher in job {jobid} has ended; {REMEDY}", jobid=jobid)

    # -- From a start to its confirmation -------------------------------------------------------

    def await_confirmation(self) -> None:
        """Release the kernel unless its manager calls ``confirm`` in time: a manager that fails before ends nothing."""
        self._release_later(self._kernels.post_launch_timeout)

    async def confirm(self) -> None:
        """The manager has the kernel, and releases it from now on."""
        self.cancel_timer()
        if self.process.phase is Phase.DEAD:
            self._after_exit()
        elif self._kernels.reports is not None:
            report = start_report(self.process.kernel_id, self.allocation, self.process.launcher)
            self._kernels.reports.send(report)

    # -- The end --------------------------------------------------------------------------------

    async def until_over(self) -> str:
        """Wait until the kernel is dead and cannot be restarted in its place; return why, and what to do."""
        return await asyncio.shield(self.over)

    def _set_over(self) -> None:
        if self._over_timer is not None:
            self._over_timer.cancel()
            self._over_timer = None
        if not self.over.done():
            self.over.set_result(f"{self.process.reason or 'its allocation is over'}; {REMEDY}")

    def _ended(self) -> None:
        """The process has ended. Other events report a start that failed, and a restart."""
        process = self.process
        if process.started_at is not None and not self._restarting:
            text, code = process.brief, process.returncode
            self._kernels.events.emit("kernel_ended", **self.facts(), exit_code=code, reason=text)
        self._after_exit()

    def _after_exit(self) -> None:
        if self._released is None:
            self._release_later(self._kernels.release_grace)
            if not self.can_restart and self._over_timer is None:
                self._over_timer = asyncio.get_running_loop().call_later(REASON_SECONDS, self._set_over)
            self.on_death()

    def _release_later(self, seconds: float) -> None:
        self.cancel_timer()
        if self._released is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._release_unconfirmed)

    def _release_unconfirmed(self) -> None:
        self.log.warning(
            "kernel %s is over and its manager did not release it: the server releases its place in job %s",
            self.process.kernel_id,
            self.allocation.jobid,
        )
        self._released = self._released or asyncio.ensure_future(self._release())

    def cancel_timer(self) -> None:
        """The kernel is not released by itself any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def hand_over(self, reason: str) -> None:
        """Another server has the kernel now: drop it here without ending it."""
        self.cancel_timer()
        self._released = asyncio.get_running_loop().create_future()
        self._released.set_result(None)
        self._kernels.discard(self)
        self.allocation.remove_place(self._place)
        self.process.hand_over(reason)
        self._set_over()

    async def release(self) -> None:
        """End the kernel and give its place back; a second call waits for the first."""
        self._released = self._released or asyncio.ensure_future(self._release())
        await asyncio.shield(self._released)

    async def _release(self) -> None:
        self.cancel_timer()
        self._kernels.forget(self)
        self.process.close()
        self._set_over()
        await self._kernels.owners.of(self.allocation.owner).releaser.release_place(self.allocation, self._place)
