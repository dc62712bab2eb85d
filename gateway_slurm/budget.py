"""A user's budget of memory: all that the server holds for a user is counted, per user and in all.

Each queue, window or buffer that belongs to a user has a ``Holding``. What is over the limit is refused, or the largest
holding that can be closed is closed, with a reason for its user.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from gateway_slurm._util import call_on

KINDS: Final = {
    "held": "messages held for a kernel that waits or is restarted",
    "to_kernel": "messages that a kernel has not read yet",
    "incoming": "parts of websocket messages that are not complete",
    "frontend": "messages that a page or program has not read yet",
    "window": "the last output of a kernel, shared by all its pages",
    "executions": "folded outputs of the last cells",
    "reading": "kept output that is read from a node",
    "request": "bodies of HTTP requests and their answers",
}
"""What is counted, by its label in ``/metrics``."""
SPARE: Final = frozenset({"window", "executions"})
"""Kinds that are given up first, also to make room: the journal on the kernel's node has the same."""
# Bytes that each user may always have, also where the server's limit is reached by others.
FLOOR: Final = 4 << 20
MEBIBYTE: Final = 1 << 20


@dataclass(eq=False)
class Holding:
    """Bytes that one thing holds for one user. ``close`` gives them back. Its methods may be called by any thread.

    ``shed`` is called on ``loop`` with a reason, where the thing has to be given up, or made as small as it can be.
    """

    budget: Budget
    user: str
    kind: str
    shed: Callable[[str], object] | None = None
    loop: asyncio.AbstractEventLoop | None = None
    size: int = field(default=0, init=False)
    is_shedding: bool = field(default=False, init=False)

    def try_add(self, count: int) -> bool:
        """Count these bytes as well; False, with nothing counted, where they do not fit."""
        return self.budget.change(self, count, is_refusable=True)

    def add(self, count: int) -> None:
        """Count bytes that are there already. Where they do not fit, the user's largest holding is shed."""
        self.budget.change(self, count, is_refusable=False)

    def remove(self, count: int) -> None:
        """These bytes are not held any more."""
        self.budget.change(self, -min(count, self.size), is_refusable=False)

    def set(self, size: int) -> None:
        """All bytes that are held now."""
        self.budget.change(self, size - self.size, is_refusable=False)

    def close(self) -> None:
        """Nothing is held any more, and nothing can be shed."""
        self.budget.close(self)

    def refusal(self) -> str:
        """Why ``try_add`` refused, for the user."""
        return self.budget.reason(self.user)


class Budget:
    """The holdings of all users. ``per_user`` and ``total`` are bytes; 0 is no limit.

    ``per_user`` does not limit the user "", who is that of a server with one user.

    Over ``total`` the user who holds most pays. A user with less than FLOOR is never refused.
    """

    def __init__(self, per_user: int, total: int) -> None:
        self.per_user, self.total = per_user, total
        self.shed_count: Counter[str] = Counter()
        """How often a holding of each kind was shed or refused."""
        self._lock = threading.Lock()
        self._of_user: dict[str, dict[Holding, None]] = {}
        self._sizes: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._used = 0

    def holding(self, user: str, kind: str, shed: Callable[[str], object] | None = None) -> Holding:
        """A new holding. With ``shed`` it belongs to the running loop."""
        assert kind in KINDS, kind
        made = Holding(self, user, kind, shed, asyncio.get_running_loop() if shed is not None else None)
        with self._lock:
            self._of_user.setdefault(user, {})[made] = None
        return made

    def has_room(self, user: str, count: int) -> bool:
        """Whether so many more bytes fit now."""
        with self._lock:
            return self._has_room(user, count)

    def used(self, user: str | None = None) -> int:
        """Bytes held for a user, or for all."""
        with self._lock:
            return self._used if user is None else self._sizes[user]

    def kinds(self) -> dict[str, int]:
        """Bytes of each kind."""
        with self._lock:
            return {kind: self._kinds[kind] for kind in KINDS}

    def users(self) -> dict[str, int]:
        """Bytes of each user who has any."""
        with self._lock:
            return {user: size for user, size in self._sizes.items() if size}

    def reason(self, user: str) -> str:
        """Why something of this user's was refused or closed, and what to do."""
        held, most = self.used(user), self._limit_of(user)
        limit, setting = (most, "memory_per_user") if most and held > most // 2 else (self.total, "memory_limit")
        return (
            f"too much waits in the server for your kernels and pages ({held // MEBIBYTE} MiB; the limit {setting} is "
            f"{limit // MEBIBYTE} MiB): close pages that you do not use, interrupt or restart kernels that do not "
            "read, and run it again"
        )

    def change(self, holding: Holding, count: int, *, is_refusable: bool) -> bool:
        """Called by holdings."""
        with self._lock:
            if holding not in self._of_user.get(holding.user, {}):
                return True  # closed
            if is_refusable and count > 0 and not self._has_room(holding.user, count):
                self.shed_count[holding.kind] += 1
                return False
            self._count(holding, count)
            victim = self._choose(holding.user) if count > 0 else None
        if victim is not None:
            self._shed(victim)
        return True

    def close(self, holding: Holding) -> None:
        """Called by holdings."""
        with self._lock:
            mine = self._of_user.get(holding.user, {})
            if holding not in mine:
                return
            self._count(holding, -holding.size)
            del mine[holding]
            if not mine:
                del self._of_user[holding.user]
                del self._sizes[holding.user]

    def _limit_of(self, user: str) -> int:
        return self.per_user if user else 0

    def _count(self, holding: Holding, count: int) -> None:
        holding.size += count
        self._sizes[holding.user] += count
        self._kinds[holding.kind] += count
        self._used += count
        if count < 0:
            holding.is_shedding = False

    def _has_room(self, user: str, count: int) -> bool:
        after, limit = self._sizes[user] + count, self._limit_of(user)
        if after <= FLOOR:
            return True
        over = max(limit and after - limit, self.total and self._used + count - self.total)
        return over <= 0 or over <= self._spare(user)

    def _spare(self, user: str) -> int:
        """Bytes that are given up for others of the user's."""
        mine = self._of_user.get(user, {})
        return sum(held.size for held in mine if held.kind in SPARE and held.shed is not None)

    def _choose(self, user: str) -> Holding | None:
        """The holding to shed where a user, or all together, are over the limit: what is spare, then the largest."""
        if not (limit := self._limit_of(user)) or self._sizes[user] <= limit:
            if not self.total or self._used <= self.total:
                return None
            user = max(self._sizes, key=lambda name: self._sizes[name])
        mine = [held for held in self._of_user.get(user, {}) if held.shed is not None and held.size]
        if any(held.is_shedding for held in mine):
            return None  # it has been asked, and will give back
        return max(mine, key=lambda held: (held.kind in SPARE, held.size), default=None)

    def _shed(self, holding: Holding) -> None:
        holding.is_shedding = True
        self.shed_count[holding.kind] += 1
        if holding.loop is not None:
            call_on(holding.loop, self._call_shed, holding, self.reason(holding.user))

    def _call_shed(self, holding: Holding, reason: str) -> None:
        before = holding.size
        with self._lock:
            if holding not in self._of_user.get(holding.user, {}):
                return  # closed meanwhile
        try:
            if holding.shed is not None:
                holding.shed(reason)
        finally:
            holding.is_shedding = False  # also where it could give nothing back
        with self._lock:
            victim = self._choose(holding.user) if holding.size < before else None
        if victim is not None:
            self._shed(victim)
