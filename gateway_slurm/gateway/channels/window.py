"""The last messages that a kernel has published, in their order: one window, which all of its frontends share.

Each message has a number. A number that is missing is a message that was lost before it came here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from gateway_slurm.gateway.channels import messages

# Bytes that a message costs beside its own.
OVERHEAD = 512
# The beginning of the ids of the server's own requests. What a kernel publishes for them is for no frontend.
OWN_REQUEST = "gateway_slurm-"


class Published:
    """One message, or several that the node has joined: the numbers of the first and the last of them.

    ``parts`` are those of ``messages``. Only the server gets a message without parts, which ``is_hidden``.
    """

    __slots__ = ("_frames", "first", "number", "offset", "parent", "parts", "size")

    def __init__(self, first: int, number: int, parts: Sequence[bytes], parent: dict[str, Any]) -> None:
        self.first, self.number, self.parts, self.parent = first, number, parts, parent
        self.size = OVERHEAD + 2 * sum(map(len, parts))
        self.offset = 0  # the bytes of all messages up to it; the window sets it
        self._frames: dict[str, bytes | str] = {}

    @classmethod
    def parse(cls, first: int, number: int, frames: list[bytes]) -> tuple[Published, dict[str, Any]]:
        """The message of these ZMQ frames, hidden where it is the server's; and its header."""
        parts = messages.parts_of(frames)
        header, parent = messages.header_of(parts), messages.parent_header_of(parts)
        is_own = str(parent.get("msg_id", "")).startswith(OWN_REQUEST) or header.get("msg_type") == "iopub_welcome"
        return cls(first, number, () if is_own or len(parts) < 4 else parts, parent), header

    @property
    def is_hidden(self) -> bool:
        return not self.parts

    def frame(self, protocol: str) -> bytes | str:
        """The message for a websocket; made once for all that speak the protocol."""
        if protocol not in self._frames:
            self._frames[protocol] = messages.encode(protocol, "iopub", self.parts)
        return self._frames[protocol]


class Window:
    """The newest messages, of at most ``limit`` bytes, and always the last one.

    A place in it is counted from the kernel's first message that came here.
    """

    def __init__(self) -> None:
        self.limit = 0
        self._items: deque[Published] = deque()
        self._begin = 0  # the place of the first item
        self._bytes = 0
        self.total = 0
        """Bytes of all messages that have come here."""
        self.next = 1
        """The number of the next message."""

    @property
    def begin(self) -> int:
        """The place of the oldest message."""
        return self._begin

    @property
    def end(self) -> int:
        """The place of the next message."""
        return self._begin + len(self._items)

    @property
    def oldest(self) -> int:
        """The number of the oldest message, or ``next``."""
        return self._items[0].first if self._items else self.next

    def at(self, place: int) -> Published:
        return self._items[place - self._begin]

    def place_after(self, number: int) -> int:
        """The place of the first message with a larger number."""
        place = self.end
        while place > self._begin and self.at(place - 1).number > number:
            place -= 1
        return place

    @property
    def bytes(self) -> int:
        """Bytes of the messages that are here."""
        return self._bytes

    def clear(self) -> None:
        """Drop all messages."""
        self._begin, self._bytes = self.end, 0
        self._items.clear()

    def add(self, item: Published) -> None:
        self.total += item.size
        item.offset = self.total
        self._bytes += item.size
        self._items.append(item)
        self.next = item.number + 1
        while self._bytes > self.limit and len(self._items) > 1:
            self._bytes -= self._items.popleft().size
            self._begin += 1
