"""The books of an owner's allocations: which there are, what is on record of them, the tasks under way for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from gateway_slurm.allocation import Allocation
from gateway_slurm.errors import RequestError
from gateway_slurm.request import KernelRequest, parse_request
from gateway_slurm.store import AllocationRecord, Registry

T = TypeVar("T")

# A command may have a thousand arguments of 128 KiB: a record is for finding a job, and for people to read.
ARGUMENTS, CHARACTERS = 20, 200


class Books:
    """Kept on the service's loop; whoever made them awaits ``close``."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        # Those that Slurm has given an id and that are not over.
        self.by_jobid: dict[str, Allocation] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def record(self, allocation: Allocation) -> None:
        """Put what is known of it on record, for whoever comes after this process."""
        if allocation.is_over:
            return
        key = allocation.record_key = allocation.identity if allocation.ours else f"job-{allocation.jobid}"
        self.registry.put(
            AllocationRecord(
                launcher_id=key,
                jobid=allocation.jobid or None,
                ours=allocation.ours,
                state=allocation.state,
                nodelist=allocation.nodes,
                end_time=allocation.end_time,
                kernel_ids=allocation.kernel_ids,
                config=_short(allocation.request.as_config()),
                keep=allocation.keep,
                owner=allocation.owner,
                account=allocation.account,
                identity=allocation.identity,
            )
        )

    def let_go(self, allocation: Allocation) -> None:
        """It is another server's; so are its records."""
        if self.by_jobid.get(allocation.jobid) is allocation:
            del self.by_jobid[allocation.jobid]

    def unsettle(self, allocation: Allocation) -> None:
        """No kernel is to join it; it stays on record, whoever ends meanwhile, until it is known to be over."""
        self.registry.unsettled.add(allocation.record_key)
        self.let_go(allocation)

    def is_unsettled(self, allocation: Allocation) -> bool:
        """Whether there may be a job of it that Slurm is to end, or of which it has not said that there is one."""
        return allocation.record_key in self.registry.unsettled

    def forget(self, allocation: Allocation) -> None:
        """It is over, or no longer ours to see to."""
        self.let_go(allocation)
        self.registry.unsettled.discard(allocation.record_key)
        if allocation.record_key:
            self.registry.remove(allocation.record_key)
        for launcher_id in allocation.launchers:
            self.registry.remove_launcher(launcher_id)

    def own(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run as a task that ``close`` cancels; none begins after it: what is on record then, the next server does."""
        task = asyncio.ensure_future(coroutine)
        if self._closed:
            task.cancel()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Cancel the tasks that are under way."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def restored_allocation(record: AllocationRecord) -> Allocation:
    """What the record says of a job; whether it is still there nobody has asked yet."""
    allocation = Allocation(ours=record.ours, request=KernelRequest(jobid=record.jobid), jobid=record.jobid or "")
    allocation.owner, allocation.restored = record.owner, True
    take_over(allocation, record)
    return allocation


def take_over(allocation: Allocation, record: AllocationRecord) -> None:
    """The record of another server that had kernels in the same job: the job is ours if it is of either's making."""
    if record.ours or not allocation.record_key:
        allocation.ours, allocation.identity, allocation.account = record.ours, record.identity, record.account
        allocation.record_key = record.launcher_id
        # Text from a file: what it was made for only says which kernels it would suit.
        with contextlib.suppress(RequestError):
            allocation.request = parse_request(record.config)
    allocation.last_state, allocation.last_nodes, allocation.last_end = record.state, record.nodelist, record.end_time
    allocation.keep = allocation.keep or record.keep
    ran = record.ours and record.state not in ("", "PENDING")
    allocation.used = allocation.used or record.keep or ran


def _short(config: dict[str, Any]) -> dict[str, Any]:
    argv = config.get("kernel_argv")
    return config if argv is None else {**config, "kernel_argv": [item[:CHARACTERS] for item in argv[:ARGUMENTS]]}
