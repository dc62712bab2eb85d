"""What is to go to one frontend, in order, and what of it has left.

A message has left once the websocket's own buffer is empty of it. One that has not when the websocket
breaks goes to the next websocket of the same session, so that each message goes out once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gateway_slurm.gateway.channels import messages

# Bytes that wait for one frontend before its kernel's iopub is read no further, or the oldest output is
# dropped where the frontend is away.
QUEUE_LIMIT = 64 << 20
# Bytes of replies and statuses that are not dropped with the output around them.
SPARED_LIMIT = 1 << 20


@dataclass(slots=True, eq=False)
class Item:
    """One message; ``msg_id`` is the kernel's own for its output, and empty for all else."""

    channel: str
    parts: list[bytes]
    msg_id: str = ""
    cell: str = ""
    """The cell whose end this message says, by shell or iopub; empty for any other message."""
    written: asyncio.Future[None] | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))

    @property
    def is_output(self) -> bool:
        """Whether a frontend goes on without it: one that misses a reply, or that a cell is over, waits for ever."""
        return self.channel == "iopub" and messages.header_of(self.parts).get("msg_type") != "status"


class Outgoing:
    """A queue of messages, those that the websocket has and has not sent yet at its head.

    ``on_left`` is called with each message that has left, and with each that was dropped.
    """

    def __init__(self, on_left: Callable[[Item], None]) -> None:
        self._on_left = on_left
        self._queue: deque[Item] = deque()
        self._leaving: deque[Item] = deque()
        self.queued = 0  # bytes
        self.dropped = 0  # messages
        self.flushed = asyncio.Event()
        """Set while nothing is queued, and all that the websocket has has left."""
        self.flushed.set()

    def __bool__(self) -> bool:
        return bool(self._queue)

    def ids(self) -> Iterator[str]:
        """Ids of the kernel's messages that have not left."""
        return (item.msg_id for items in (self._leaving, self._queue) for item in items if item.msg_id)

    def put(self, item: Item) -> None:
        self._queue.append(item)
        self.queued += item.size
        self.flushed.clear()

    def put_first(self, item: Item) -> None:
        """Before all that has not been handed to the websocket."""
        self._queue.appendleft(item)
        self.queued += item.size
        self.flushed.clear()

    def take(self) -> Item:
        """The next message; ``wrote`` says what became of it."""
        item = self._queue.popleft()
        self.queued -= item.size
        return item

    def wrote(self, item: Item, written: asyncio.Future[None] | None) -> None:
        """The websocket has the message; where it has none any more (None), the next one gets it."""
        if written is None:
            self.put_first(item)
            return
        item.written = written
        self._leaving.append(item)
        written.add_done_callback(lambda _written: self._settle())

    def _settle(self) -> None:
        while self._leaving and _has_left(self._leaving[0]):
            self._on_left(self._leaving.popleft())
        if not self._leaving and not self._queue:
            self.flushed.set()

    def take_back(self) -> None:
        """The websocket is gone: what it did not send is to go out first."""
        self._settle()
        while self._leaving:
            item = self._leaving.pop()
            item.written = None
            self.put_first(item)

    def drop_oldest(self) -> None:
        """Drop the oldest output where there is more than the limit; a bit more, so that few look through the queue.

        What is no output stays, unless there is much of it.
        """
        if self.queued <= QUEUE_LIMIT:
            return
        spared: list[Item] = []
        room = SPARED_LIMIT
        goal = QUEUE_LIMIT - QUEUE_LIMIT // 16
        while self._queue and self.queued + SPARED_LIMIT - room > goal:
            item = self.take()
            if item.size <= room and not item.is_output:
                spared.append(item)
                room -= item.size
            else:
                self.dropped += 1
                self._on_left(item)
        for item in reversed(spared):
            self.put_first(item)

    def clear(self) -> None:
        self._queue.clear()
        self._leaving.clear()
        self.queued = 0


def _has_left(item: Item) -> bool:
    written = item.written
    return written is not None and written.done() and not written.cancelled() and written.exception() is None
