"""Reads kernelspecs in threads of its own, user by user: one user's lists, however many, do not hold up another's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")

THREADS: Final = 4


class SpecReader:
    """Runs functions that read the disk. Used on one loop; its owner calls ``close``.

    Each user has one thread at a time.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "kernelspecs")
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._next: dict[tuple[object, ...], asyncio.Future[Any]] = {}

    async def run(self, user: str, function: Callable[..., T], *arguments: Any) -> T:
        """Call the function in a thread, in the user's turn."""
        lock = self._locks.setdefault(user, asyncio.Lock())
        async with lock:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def run_shared(self, user: str, function: Callable[..., T], *arguments: Any) -> T:
        """``run``, where all who wait for the same call get one result, which is not older than their request."""
        key = (user, function, *arguments)
        if key not in self._next:
            task = self._next[key] = asyncio.ensure_future(self.run(user, self._begin, key, function, *arguments))
            task.add_done_callback(lambda task: self._done(key, task))
        # A caller that is cancelled does not cancel the call for the others.
        result: T = await asyncio.shield(self._next[key])
        return result

    def _begin(self, key: tuple[object, ...], function: Callable[..., T], *arguments: Any) -> T:
        # A request from here on gets a later result.
        self._next.pop(key, None)
        return function(*arguments)

    def _done(self, key: tuple[object, ...], task: asyncio.Future[Any]) -> None:
        if self._next.get(key) is task:  # cancelled before it began
            del self._next[key]
        if not task.cancelled():
            task.exception()  # marks it as retrieved: all callers may have gone

    def close(self) -> None:
        """End the threads, once what they do is done. Nothing that waits is begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)
