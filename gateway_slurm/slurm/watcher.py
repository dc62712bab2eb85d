"""One poller for all jobs without a link to their launcher: pending jobs, and jobs whose link is down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Final

from gateway_slurm._util import LogOnce
from gateway_slurm.slurm.driver import SlurmJobs
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import JobInfo

_log = logging.getLogger(__name__)

Callback = Callable[["JobInfo | None"], None]
"""Called on the watcher's loop with Slurm's answer; None if a healthy controller does not know the job."""

_GROWTH: Final = 1.5
_JITTER: Final = 0.1
MIN_POLL_INTERVAL: Final = 1.0
"""Seconds between two polls, or the shortest interval if that is less, however often ``poll_soon`` is called."""
_MISSES_TO_BE_GONE: Final = 2
"""After a failover, a controller may not know a newly submitted job yet; so one miss is not conclusive."""


class JobWatcher:
    """Polls Slurm for the watched jobs: one request for all jobs, one at a time, none if no job is watched.

    ``interval`` is in seconds: the first poll comes after the first number; then the interval grows by 1.5, with
    jitter, up to the second number. A new watch resets it. ``poll_soon`` polls at once, but at the earliest
    MIN_POLL_INTERVAL after the previous poll. A request that fails or whose answer cannot be read tells nothing about
    any job: the failure is logged once, polling slows down, and no callback runs. All methods are called on one loop;
    the owner awaits ``close``.
    """

    def __init__(self, driver: SlurmJobs, *, interval: tuple[float, float] = (1.0, 15.0)) -> None:
        shortest, longest = interval
        if not 0 < shortest <= longest:
            raise ValueError(f"JobWatcher's interval must be 0 < shortest <= longest, not {interval!r}")
        self._driver = driver
        self._shortest = shortest
        self._longest = longest
        self._delay = shortest
        self._watched: dict[str, Callback] = {}
        self._misses: dict[str, int] = {}
        # Each pending job's position in its partition's queue, 1 for the next, as of the last poll.
        self.queue_positions: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._poll_requested = False
        self._polled_at = float("-inf")  # when the last poll ended
        self._complaints = LogOnce(_log)
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def watch(self, jobid: str, callback: Callback) -> None:
        """Call ``callback`` with each answer about ``jobid`` until ``unwatch``; a second watch replaces the first."""
        if self._closed:
            raise RuntimeError("the JobWatcher is closed")
        self._watched[jobid] = callback
        self._misses.pop(jobid, None)
        self._delay = self._shortest
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._poll(), name="slurm-job-watcher")

    def unwatch(self, jobid: str) -> None:
        """End the watch of ``jobid``; does nothing for an id that is not watched."""
        self._watched.pop(jobid, None)
        self._misses.pop(jobid, None)
        if not self._watched:
            self._changed.set()

    def poll_soon(self, jobid: str) -> None:
        """Poll soon because ``jobid`` may have changed (its link broke). A request that is under way ends first."""
        if jobid in self._watched:
            self._poll_requested = True
            self._delay = self._shortest
            self._changed.set()

    async def close(self) -> None:
        """Stop polling and kill a running command. Idempotent."""
        self._closed = True
        self._watched.clear()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _poll(self) -> None:
        while self._watched:
            await self._pause()
            if self._watched:
                await self._poll_once()
                self._polled_at = asyncio.get_running_loop().time()

    async def _pause(self) -> None:
        """Wait until the next poll is due; ``poll_soon`` and a new watch shorten a long wait."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        delay = self._delay
        # With jitter, gateways that started together do not keep polling together.
        jitter = random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - no secret depends on it
        earliest = self._polled_at + min(MIN_POLL_INTERVAL, self._shortest)
        while self._watched:
            self._changed.clear()
            delay = min(delay, self._delay)
            left = (earliest if self._poll_requested else began + delay * jitter) - loop.time()
            if left <= 0:
                break
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        self._poll_requested = False
        self._delay = min(self._delay * _GROWTH, self._longest)

    async def _poll_once(self) -> None:
        watched = dict(self._watched)
        try:
            answer = await self._driver.jobs(list(watched))
            partitions = {info.partition for info in answer.values() if info.meaning is Meaning.WAITING}
            self.queue_positions = await self._driver.queue_positions(partitions) if partitions else {}
        except Exception as error:  # noqa: BLE001 - a SlurmError, or a defect of this package: polling must go on
            self._failed(error)
            return
        if self._complaints.clear("polling"):
            _log.info("Slurm answers again")
        await self._confirm_missing(set(watched) - set(answer), alone=len(watched) == 1)
        for jobid, callback in watched.items():
            # A watch that was replaced during the request waits for its own answer.
            if self._watched.get(jobid) is callback:
                self._notify(jobid, callback, answer.get(jobid))

    async def _confirm_missing(self, missing: set[str], *, alone: bool) -> None:
        """Request each missing job alone: only then does a healthy controller report "Invalid job id"."""
        for jobid in missing:
            try:
                if not alone and await self._driver.jobs([jobid]):
                    self._misses.pop(jobid, None)
                    continue
            except Exception as error:  # noqa: BLE001 - as in _poll_once
                self._failed(error)
                continue
            self._misses[jobid] = self._misses.get(jobid, 0) + 1

    def _failed(self, error: Exception) -> None:
        self._complaints.warning(
            "polling", "Slurm did not report the jobs; their state is unknown, retrying: %s", error
        )

    def _notify(self, jobid: str, callback: Callback, info: JobInfo | None) -> None:
        if info is None:
            if self._misses.get(jobid, 0) < _MISSES_TO_BE_GONE:
                return
        else:
            self._misses.pop(jobid, None)
        try:
            callback(info)
        except Exception:  # noqa: BLE001 - logged; the callbacks of the other jobs still run
            _log.exception("the watcher's callback for job %s failed", jobid)
