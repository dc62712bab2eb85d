"""How many requests of one user are handled at once: more wait in their order, and hold up no other user's."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Hashable
from typing import Final

MAX_UNDER_WAY: Final = 32
MAX_UNDER_WAY_SERVICE: Final = 256
"""For a service, whose requests are many users'."""
MAX_WAITING: Final = 512


class TooManyRequests(Exception):
    """So many requests of the user wait that one more is refused."""


class UserSlots:
    """Places for requests, by user. Used on one loop."""

    def __init__(self) -> None:
        self._under_way: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}

    async def enter(self, user: Hashable, limit: int = MAX_UNDER_WAY) -> None:
        """Wait for a place; ``leave`` gives it back. Raises TooManyRequests."""
        if self._under_way[user] < limit:
            self._under_way[user] += 1
            return
        waiting = self._waiting.setdefault(user, deque())
        if len(waiting) >= MAX_WAITING:
            raise TooManyRequests
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave(user)
            raise

    def leave(self, user: Hashable) -> None:
        """Give the place to the next request of this user that waits."""
        waiting = self._waiting.get(user)
        while waiting:
            place = waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._waiting.pop(user, None)
        self._under_way[user] -= 1
        if self._under_way[user] <= 0:
            del self._under_way[user]
