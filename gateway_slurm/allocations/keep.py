"""Which allocations stay after their last kernel and after their server, by requests and by the user's keep flags.

``keep_allocation`` and ``jupyter slurm allocations keep`` set a flag, in any process; ``release`` removes it. The
server reads all flags at once, at the heartbeat's interval, and sends the result to the launchers: the launcher of
a kept job stays when its server is gone.
"""

from __future__ import annotations

import asyncio
import logging

from gateway_slurm._util import LogOnce
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.allocations.table import AllocationTable
from gateway_slurm.store.keep_flags import KeepFlagFiles


class KeepFlags:
    """The keep flags of all owners' allocations. ``interval`` is in seconds. Lives on the service's loop."""

    def __init__(self, files: KeepFlagFiles, *, interval: float, log: logging.Logger) -> None:
        self._files, self._interval, self.log = files, interval, log
        self.tables: list[AllocationTable] = []
        # Kept by request where the file could not be written: for as long as this process remembers it.
        self._without_file: set[Allocation] = set()
        self._complaints = LogOnce(log)

    async def watch(self) -> None:
        """Read the flags again and again; the caller owns the task."""
        while True:
            await asyncio.sleep(self._interval)
            await self.refresh()

    async def refresh(self) -> None:
        """Read all flags with one listing; where that fails, all allocations stay as they are."""
        if not any(table.by_jobid for table in self.tables):
            return
        try:
            flags = await asyncio.to_thread(self._files.all)
        except OSError as error:
            self._complain(error)
            return
        for allocation in [allocation for table in self.tables for allocation in table.listed()]:
            flagged = (allocation.jobid, allocation.identity) in flags or allocation in self._without_file
            self._set(allocation, flagged)

    async def is_kept(self, allocation: Allocation) -> bool:
        """Whether the allocation stays, by the flags as they are now."""
        await self.refresh()
        return allocation.keep

    def keep(self, allocation: Allocation) -> None:
        """Set the flag, once the job has an id. The last call counts: an earlier ``release`` is void."""
        if allocation.jobid:
            try:
                self._files.set(allocation.jobid, allocation.identity)
            except OSError as error:
                self._without_file.add(allocation)
                self._complain(error)
        self._set(allocation, True)

    def release(self, allocation: Allocation) -> None:
        """Remove the flag."""
        self.forget(allocation)
        self._set(allocation, False)

    def forget(self, allocation: Allocation) -> None:
        """The job is over, and the flag with it."""
        self._without_file.discard(allocation)
        try:
            self._files.remove(allocation.jobid, allocation.identity)
        except OSError as error:
            self._complain(error)

    def _set(self, allocation: Allocation, kept: bool) -> None:
        if allocation.keep == kept:
            return
        allocation.set_keep(kept)
        for launcher in allocation.launchers.values():
            launcher.beat()
        for table in self.tables:
            if table.by_jobid.get(allocation.jobid) is allocation:
                table.record(allocation)
                change = "is kept, as requested" if kept else "is no longer kept"
                self.log.info("job %s %s", allocation.jobid, change)

    def _complain(self, error: OSError) -> None:
        self._complaints.warning("files", "which jobs must be kept is not known: %s", error)
