"""Which allocations stay after their last kernel, and after their server: as requests and the user's marks say.

A mark is set by ``keep_allocation`` and by ``jupyter slurm allocations keep``, in whatever process, and taken
back by ``release``. The server looks at all marks at once, on the heartbeat's rhythm, and tells the launchers:
one that holds a kept job stays when its server is gone.
"""

from __future__ import annotations

import asyncio
import logging

from gateway_slurm.allocations.model import Allocation, Books
from gateway_slurm.store.marks import KeepMarks


class Keeping:
    """For all owners' allocations; ``interval`` is in seconds. Lives on the service's loop."""

    def __init__(self, marks: KeepMarks, *, interval: float, log: logging.Logger) -> None:
        self._marks, self._interval, self.log = marks, interval, log
        self._all_books: list[Books] = []
        # Kept by request where the mark could not be written: for as long as this process remembers it.
        self._unmarked: set[Allocation] = set()
        self._complained = False

    def add(self, books: Books) -> None:
        """See to the allocations in these, too."""
        self._all_books.append(books)

    async def watch(self) -> None:
        """Look at the marks for ever; who calls it owns the task."""
        while True:
            await asyncio.sleep(self._interval)
            await self.refresh()

    async def refresh(self) -> None:
        """One listing for all allocations; where it fails, all stay as they are."""
        if not any(books.by_jobid for books in self._all_books):
            return
        try:
            marks = await asyncio.to_thread(self._marks.all)
        except OSError as error:
            self._complain(error)
            return
        for allocation in [one for books in self._all_books for one in books.by_jobid.values()]:
            if not allocation.is_over:
                self._set(allocation, (allocation.jobid, allocation.identity) in marks or allocation in self._unmarked)

    async def is_kept(self, allocation: Allocation) -> bool:
        """Whether it is to stay, as of now."""
        await self.refresh()
        return allocation.keep

    def keep(self, allocation: Allocation) -> None:
        """It is asked for: mark the job, once it has an id. The last word counts: a release before is void."""
        if allocation.jobid:
            try:
                self._marks.set(allocation.jobid, allocation.identity)
            except OSError as error:
                self._unmarked.add(allocation)
                self._complain(error)
        self._set(allocation, True)

    def release(self, allocation: Allocation) -> None:
        """That is taken back."""
        self.forget(allocation)
        self._set(allocation, False)

    def forget(self, allocation: Allocation) -> None:
        """The job is over: so is the mark."""
        self._unmarked.discard(allocation)
        try:
            self._marks.remove(allocation.jobid, allocation.identity)
        except OSError as error:
            self._complain(error)

    def _set(self, allocation: Allocation, kept: bool) -> None:
        if allocation.keep == kept:
            return
        allocation.keep = kept
        for launcher in allocation.launchers.values():
            launcher.beat()
        for books in self._all_books:
            if books.by_jobid.get(allocation.jobid) is allocation:
                books.record(allocation)
                words = "to be kept, as asked" if kept else "no longer to be kept"
                self.log.info("job %s is %s", allocation.jobid, words)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self.log.warning("which jobs are to be kept is not known: %s", error)
        self._complained = True
