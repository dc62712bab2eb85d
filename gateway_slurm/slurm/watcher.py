"""One poller for all the jobs of which we do not hear by a link: pending ones, and those whose link broke."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Collection
from typing import Final, Protocol

from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import JobInfo

_log = logging.getLogger(__name__)

Callback = Callable[["JobInfo | None"], None]
"""Called on the watcher's loop with what Slurm says; None: a healthy controller does not know the job (any
more)."""

_GROWTH: Final = 1.5
_JITTER: Final = 0.1
LEAST_PAUSE: Final = 1.0
"""Seconds between two looks, or the shortest interval where that is less: however often anybody pokes."""
_MISSES_TO_BE_GONE: Final = 2
"""A job just submitted may not be known yet at a controller that fails over; one miss says nothing."""


class _Asks(Protocol):
    async def jobs(self, jobids: Collection[str]) -> dict[str, JobInfo]: ...
    async def queue(self, partitions: Collection[str]) -> dict[str, int]: ...


class JobWatcher:
    """Asks Slurm about the watched jobs: one call for all, never two at once, none when nothing is watched.

    ``interval`` is in seconds: the first look comes after the first number, then ×1.5 with jitter up to the
    second; a new watch starts over. A poke is answered at once, but LEAST_PAUSE after the look before it. A call that
    fails, is slow or is rubbish says nothing about any job: it is logged once, the pace slows down, and no callback
    runs. Must be made and used on one loop; whoever made it awaits ``close``.
    """

    def __init__(self, driver: _Asks, *, interval: tuple[float, float] = (1.0, 15.0)) -> None:
        shortest, longest = interval
        if not 0 < shortest <= longest:
            raise ValueError(f"JobWatcher's interval must be 0 < shortest <= longest, not {interval!r}")
        self._driver = driver
        self._shortest = shortest
        self._longest = longest
        self._delay = shortest
        self._watched: dict[str, Callback] = {}
        self._misses: dict[str, int] = {}
        # Each waiting job's place in its partition's queue, 1 for the next, as of the last look.
        self.places: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._poked = False
        self._asked_at = float("-inf")  # when the last look was over
        self._failing = False
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def watched(self) -> frozenset[str]:
        """The ids that are being watched."""
        return frozenset(self._watched)

    def watch(self, jobid: str, callback: Callback) -> None:
        """Call ``callback`` with each answer about ``jobid`` until ``unwatch``; a second watch replaces
        the first.
        """
        if self._closed:
            raise RuntimeError("the JobWatcher is closed")
        self._watched[jobid] = callback
        self._misses.pop(jobid, None)
        self._delay = self._shortest
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._poll(), name="slurm-job-watcher")

    def unwatch(self, jobid: str) -> None:
        """Ask no more about ``jobid``, and call its callback no more; unknown ids are fine."""
        self._watched.pop(jobid, None)
        self._misses.pop(jobid, None)
        if not self._watched:
            self._changed.set()

    def poke(self, jobid: str) -> None:
        """Ask soon: something happened to ``jobid`` (its link broke). A call in flight is finished first."""
        if jobid in self._watched:
            self._poked = True
            self._delay = self._shortest
            self._changed.set()

    async def close(self) -> None:
        """Stop asking; a command that runs is killed. Idempotent."""
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
                await self._ask()
                self._asked_at = asyncio.get_running_loop().time()

    async def _pause(self) -> None:
        """Wait for the next look's time, or for a poke; a new watch shortens a long wait."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        delay = self._delay
        # Jitter, or gateways that were started together would ask together for ever.
        spread = random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - no secret hangs on it
        least = self._asked_at + min(LEAST_PAUSE, self._shortest)
        while self._watched:
            self._changed.clear()
            delay = min(delay, self._delay)
            left = (least if self._poked else began + delay * spread) - loop.time()
            if left <= 0:
                break
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        self._poked = False
        self._delay = min(self._delay * _GROWTH, self._longest)

    async def _ask(self) -> None:
        asked = dict(self._watched)
        try:
            answer = await self._driver.jobs(list(asked))
            partitions = {info.partition for info in answer.values() if info.meaning is Meaning.WAITING}
            self.places = await self._driver.queue(partitions) if partitions else {}
        except Exception as error:  # noqa: BLE001 - SlurmError or our own fault: the watch must go on
            self._failed(error)
            return
        if self._failing:
            self._failing = False
            _log.info("Slurm answers again")
        await self._confirm_missing(set(asked) - set(answer), alone=len(asked) == 1)
        for jobid, callback in asked.items():
            # The callback that was there when we asked: a watch that was replaced meanwhile waits for its
            # own answer.
            if self._watched.get(jobid) is callback:
                self._tell(jobid, callback, answer.get(jobid))

    async def _confirm_missing(self, missing: set[str], *, alone: bool) -> None:
        """Asked for one job alone a healthy controller says "Invalid job id"; silence among many says nothing."""
        for jobid in missing:
            try:
                if not alone and await self._driver.jobs([jobid]):
                    self._misses.pop(jobid, None)
                    continue
            except Exception as error:  # noqa: BLE001 - as in _ask
                self._failed(error)
                continue
            self._misses[jobid] = self._misses.get(jobid, 0) + 1

    def _failed(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            _log.warning("Slurm could not be asked about the jobs; their state is unknown, retrying: %s", error)

    def _tell(self, jobid: str, callback: Callback, info: JobInfo | None) -> None:
        if info is None:
            if self._misses.get(jobid, 0) < _MISSES_TO_BE_GONE:
                return
        else:
            self._misses.pop(jobid, None)
        try:
            callback(info)
        except Exception:  # noqa: BLE001 - logged, and the other jobs still hear theirs
            _log.exception("the watcher's callback for job %s failed", jobid)
