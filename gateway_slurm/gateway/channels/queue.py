"""The queue of messages to one frontend, and which of them have been sent.

A message is sent once the websocket's own buffer has written it. A message that a broken websocket did not write goes
to the next websocket of the same session, so that each message is sent once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gateway_slurm.gateway.channels import messages

# Bytes in one frontend's queue. Over the limit, the kernel's iopub is not read while the frontend is there, and the
# oldest output is dropped while it is away.
QUEUE_LIMIT = 64 << 20
# Bytes of replies and statuses that stay when the output around them is dropped.
SPARED_LIMIT = 1 << 20


@dataclass(slots=True, eq=False)
class QueuedMessage:
    """One message; ``msg_id`` is the kernel's own for its output, and empty for all else."""

    channel: str
    parts: list[bytes]
    msg_id: str = ""
    cell: str = ""
    """The cell to which this message is the reply; empty for any other message."""
    written: asyncio.Future[None] | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))

    @property
    def is_output(self) -> bool:
        """Whether a frontend can go on without it. Without a reply or an idle status a cell would never end there."""
        return self.channel == "iopub" and messages.header_of(self.parts).get("msg_type") != "status"

    @property
    def is_written(self) -> bool:
        written = self.written
        return written is not None and written.done() and not written.cancelled() and written.exception() is None


class OutgoingQueue:
    """A queue of messages; those that the websocket has and has not written yet are at its head.

    ``on_sent`` is called with each message that was sent, and with each that was dropped.
    """

    def __init__(self, on_sent: Callable[[QueuedMessage], None]) -> None:
        self._on_sent = on_sent
        self._queue: deque[QueuedMessage] = deque()
        self._writing: deque[QueuedMessage] = deque()
        self.queued = 0  # bytes
        self.dropped = 0  # messages
        self.flushed = asyncio.Event()
        """Set while nothing is queued, and the websocket has written all that it has."""
        self.flushed.set()

    def __bool__(self) -> bool:
        return bool(self._queue)

    def ids(self) -> Iterator[str]:
        """The ids of the kernel's messages that have not been sent."""
        return (item.msg_id for items in (self._writing, self._queue) for item in items if item.msg_id)

    def put(self, item: QueuedMessage) -> None:
        self._queue.append(item)
        self.queued += item.size
        self.flushed.clear()

    def put_first(self, item: QueuedMessage) -> None:
        """Queue a message before all that the websocket does not have yet."""
        self.put(item)
        self._queue.rotate()

    def take(self) -> QueuedMessage:
        """The next message; call ``track`` with it after the write."""
        item = self._queue.popleft()
        self.queued -= item.size
        return item

    def track(self, item: QueuedMessage, written: asyncio.Future[None] | None) -> None:
        """Follow a write of the websocket's. None: the websocket is closed, and the message is queued again."""
        if written is None:
            self.put_first(item)
            return
        item.written = written
        self._writing.append(item)
        written.add_done_callback(lambda _written: self._settle())

    def _settle(self) -> None:
        while self._writing and self._writing[0].is_written:
            self._on_sent(self._writing.popleft())
        if not self._writing and not self._queue:
            self.flushed.set()

    def requeue_unsent(self) -> None:
        """Queue again, first, what a closed websocket did not write."""
        self._settle()
        while self._writing:
            item = self._writing.pop()
            item.written = None
            self.put_first(item)

    def drop_oldest(self) -> None:
        """Drop the oldest output over the limit, and 1/16 more, so that the queue is not searched at each message.

        Messages that are not output stay, up to ``SPARED_LIMIT``.
        """
        if self.queued <= QUEUE_LIMIT:
            return
        spared: list[QueuedMessage] = []
        room = SPARED_LIMIT
        goal = QUEUE_LIMIT - QUEUE_LIMIT // 16
        while self._queue and self.queued + SPARED_LIMIT - room > goal:
            item = self.take()
            if item.size <= room and not item.is_output:
                spared.append(item)
                room -= item.size
            else:
                self.dropped += 1
                self._on_sent(item)
        for item in reversed(spared):
            self.put_first(item)

    def clear(self) -> None:
        self._queue.clear()
        self._writing.clear()
        self.queued = 0
