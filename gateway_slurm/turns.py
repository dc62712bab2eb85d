"""Turns on a loop, user by user: one user's work, however much, does not hold up another's.

Work is given as functions that take at most some milliseconds. In each round of the loop SLICE_SECONDS of it are done,
of the users who have had least, so that the loop's other work waits no longer than that.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Final, TypeVar, cast

T = TypeVar("T")

SLICE_SECONDS: Final = 0.002
"""Seconds of work in one round of the loop."""
MIN_COST: Final = 0.00002
"""Seconds that each piece of work counts at least."""


class Turns:
    """The work that waits on one loop. Used on that loop only; ``close`` drops what waits.

    The order is start-time fair queueing (Goyal, Vin, Cheng 1996): a user's clock advances by the time that the user's
    work took, the one with the earliest clock is next, and one who comes back starts at the present, not at zero.
    """

    def __init__(self, slice_seconds: float = SLICE_SECONDS) -> None:
        self._slice_seconds = slice_seconds
        # Work, each with the future of its result, which only ``run`` has.
        self._waiting: dict[str, deque[tuple[Callable[[], Any], asyncio.Future[Any] | None]]] = {}
        self._clocks: dict[str, float] = {}
        self._now = 0.0
        self._left = slice_seconds  # of this round
        self._next_round: asyncio.Handle | None = None
        self._is_working = False

    async def run(self, user: str, function: Callable[..., T], *arguments: Any) -> T:
        """Call the function in the user's turn, and return or raise what it does.

        It is called at once where nothing waits, and this round has time left.
        """
        call = partial(function, *arguments)
        if self._is_free:
            return self._timed(user, call)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(user, deque()).append((call, future))
        return await future

    async def run_steps(self, user: str, steps: Generator[None, None, T]) -> T:
        """Take each step of a generator in a turn of the user's, and return what the generator returns."""
        while True:
            end = await self.run(user, _step, steps)
            if end is not None:
                return cast("T", end.value)

    def post(self, user: str, function: Callable[..., object], *arguments: Any) -> None:
        """Call the function in the user's turn; what it returns is dropped, and what it raises is logged.

        It is called at once where ``run`` would, but not from within another turn.
        """
        call = partial(function, *arguments)
        if self._is_free:
            self._do(user, call, None)
        else:
            self._waiting.setdefault(user, deque()).append((call, None))

    @property
    def _is_free(self) -> bool:
        """Whether work may be done at once. Where not, a round comes."""
        if self._next_round is None:
            self._schedule()
        return not self._waiting and self._left > 0 and not self._is_working

    def charge(self, user: str, seconds: float) -> None:
        """Count work of this user's that was done elsewhere, such as in a handler of requests."""
        self._clocks[user] = self._clock(user) + max(seconds, MIN_COST)
        self._left -= seconds
        if self._next_round is None:
            self._schedule()

    @property
    def waiting(self) -> int:
        """Pieces of work that wait."""
        return sum(map(len, self._waiting.values()))

    def close(self) -> None:
        """Cancel all that waits."""
        if self._next_round is not None:
            self._next_round.cancel()
            self._next_round = None
        for queue in self._waiting.values():
            for _call, future in queue:
                if future is not None:
                    future.cancel()
        self._waiting.clear()

    def _clock(self, user: str) -> float:
        return max(self._clocks.get(user, 0.0), self._now)

    def _timed(self, user: str, call: Callable[[], T]) -> T:
        self._now = self._clock(user)
        begin, self._is_working = time.monotonic(), True
        try:
            return call()
        finally:
            self._is_working = False
            self.charge(user, time.monotonic() - begin)

    def _schedule(self) -> None:
        self._next_round = asyncio.get_running_loop().call_soon(self._do_round)

    def _do_round(self) -> None:
        self._next_round, self._left = None, self._slice_seconds
        while self._waiting and self._left > 0:
            user = min(self._waiting, key=self._clock)
            call, future = self._waiting[user].popleft()
            if not self._waiting[user]:
                del self._waiting[user]
            if future is None or not future.done():  # else its caller was cancelled
                self._do(user, call, future)
        if self._waiting and self._next_round is None:
            self._schedule()
        elif not self._waiting:
            # Who is not ahead of the present needs no clock.
            self._clocks = {user: clock for user, clock in self._clocks.items() if clock > self._now}

    def _do(self, user: str, call: Callable[[], Any], future: asyncio.Future[Any] | None) -> None:
        try:
            result = self._timed(user, call)
        except Exception as error:  # noqa: BLE001 - raised again in the caller
            if future is not None and not future.done():
                future.set_exception(error)
            else:
                context = {"message": "a piece of a user's work failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
            return
        if future is not None and not future.done():  # the work itself may have cancelled its caller
            future.set_result(result)


def _step(steps: Generator[None, None, Any]) -> StopIteration | None:
    """Take one step; return how the generator ended, if it did."""
    try:
        next(steps)
    except StopIteration as end:
        return end
    return None
