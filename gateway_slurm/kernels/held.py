"""A kernel and its place in an allocation: when it is restarted there, and when it is over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway_slurm.allocations.model import Allocation, Place
from gateway_slurm.errors import AllocationEnded, LinkError
from gateway_slurm.kernels.model import KernelLaunch, Phase
from gateway_slurm.kernels.process import KernelProcess
from gateway_slurm.store.records import KernelRecord

if TYPE_CHECKING:
    from gateway_slurm.service import SlurmService


# How long a restart waits for a launcher that is out of reach, as after this server's own start.
LINK_SECONDS = 10.0
# How long it waits for the old kernel's end, after STOP.
STOP_SECONDS = 10.0


class HeldKernel:
    """A kernel and its place in an allocation, until ``release``.

    It is released when the manager says that the kernel is over, when the manager never took it
    over after its start, and when it died and was not started again within ``release_grace``.
    """

    def __init__(self, service: SlurmService, process: KernelProcess, allocation: Allocation, place: Place) -> None:
        self.service, self.process, self.allocation, self._place = service, process, allocation, place
        self._timer: asyncio.TimerHandle | None = None
        self._released: asyncio.Future[None] | None = None
        # What the kernel manager needs to be made again in another process; secrets included.
        self.manager: dict[str, Any] = {}
        # Resolved, with the reason, once the kernel is dead and cannot be started again in its place.
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        # Called on the service's loop when the kernel has died, and not when it was ended.
        self.on_death: Callable[[], None] = lambda: None
        process.on_exit = lambda _process: self._after_exit()
        allocation.ended.add_done_callback(self._after_allocation)

    async def restart(self, launch: KernelLaunch) -> dict[str, Any]:
        """Start the kernel again in the same allocation, on the same node, with the same ports.

        Raises AllocationEnded when the allocation is over: a new one costs budget, and is not
        taken without being asked for. Raises LinkError when its launcher is out of reach. After an error
        it may be tried again within ``release_grace``; then the kernel is released.
        """
        self.forget_timers()
        try:
            self._check_place()
            await self.process.launcher.until_linked(LINK_SECONDS)
            await self._stop()
            self._check_place()  # it may have been given up meanwhile
            info = await self.process.start(launch)
        except BaseException:
            # Whoever asked for it may never call again.
            self._release_later(self.service.release_grace)
            raise
        self.record()
        self.expect_take_over()
        return info

    async def _stop(self) -> None:
        """End the kernel that is there. Raises LinkError when its launcher does not say that it ended."""
        process = self.process
        if process.phase is Phase.DEAD:
            return
        process.stop()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except asyncio.TimeoutError as error:
            raise LinkError(
                f"{process.launcher.where} did not say within {STOP_SECONDS:g} s that the old kernel was stopped: "
                "try again, or shut the kernel down"
            ) from error

    def record(self) -> None:
        """Put the kernel on record, as it is now: the next server process finds it there."""
        process = self.process
        assert process.launched is not None
        # With the slot that its launcher has it in.
        self.service.owners.of(self.allocation.owner).record_launcher(self.allocation, process.launcher)
        self.service.registry.put_kernel(
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
                launch=process.launched.as_json(),
                manager=self.manager,
                node=process.launcher.node,
            )
        )

    def remember(self, manager_state: dict[str, Any]) -> None:
        """Have this on record with the kernel; what was told before and is not told again stays."""
        self.manager = {**self.manager, **manager_state}
        if self._released is None and not self.allocation.is_over:
            self.record()

    @property
    def can_restart(self) -> bool:
        """Whether it may be started again in its place, as far as is known."""
        return not (self._released or self.allocation.is_over or self.process.launcher.terminated)

    def _check_place(self) -> None:
        jobid = self.allocation.jobid
        again = "shut the kernel down and start it again for a new allocation"
        if self.allocation.ended.done():
            ended = self.allocation.ended.result()
            raise AllocationEnded(f"{ended}; {again}", jobid=jobid, state=ended.state)
        if self._released is not None or self.allocation.is_over:
            raise AllocationEnded(
                f"the kernel's place in job {jobid} was given up after its death; {again}", jobid=jobid
            )
        if self.process.launcher.terminated:
            raise AllocationEnded(f"Slurm is ending job {jobid}; {again}", jobid=jobid, state="COMPLETING")

    def expect_take_over(self) -> None:
        """The manager is to call ``taken_over``; when it fails before, nobody else ends the kernel."""
        self._release_later(self.service.post_launch_timeout)

    async def taken_over(self) -> None:
        self.forget_timers()
        if self.process.phase is Phase.DEAD:
            self._after_exit()
            return
        self.service.report_start(self.process.kernel_id, self.allocation, self.process.launcher)

    async def until_over(self) -> str:
        """Wait until the kernel is dead and cannot be started again where it was; return why."""
        return await asyncio.shield(self.over)

    def _after_allocation(self, _ended: object) -> None:
        # Not before the kernel has been told, too, whose own reason says more.
        asyncio.get_running_loop().call_soon(self._tell_over)

    def _tell_over(self) -> None:
        if not self.over.done():
            self.over.set_result(self.process.reason or "its allocation is over")

    def _after_exit(self) -> None:
        if self._released is None:
            self._release_later(self.service.release_grace)
            self.on_death()

    def _release_later(self, seconds: float) -> None:
        self.forget_timers()
        if self._released is not None:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        self.service.log.warning(
            "kernel %s is over and nobody ended it: its place in job %s is given up",
            self.process.kernel_id,
            self.allocation.jobid,
        )
        self._released = self._released or asyncio.ensure_future(self._release())

    def forget_timers(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def give_away(self, reason: str) -> None:
        """Another server has the kernel now: let go of it here, and of nothing that it needs to live."""
        self.forget_timers()
        self._released = asyncio.get_running_loop().create_future()
        self._released.set_result(None)
        self.service.let_go(self)
        self.allocation.remove_place(self._place)
        self.process.give_away(reason)
        self._tell_over()

    async def release(self) -> None:
        """End the kernel and leave the allocation; safe to call again."""
        self._released = self._released or asyncio.ensure_future(self._release())
        await asyncio.shield(self._released)

    async def _release(self) -> None:
        self.forget_timers()
        self.service.forget(self)
        self.process.close()
        self._tell_over()
        await self.service.owners.of(self.allocation.owner).release_place(self.allocation, self._place)
