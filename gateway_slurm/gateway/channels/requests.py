"""The requests of all sessions that their kernel has not answered in full: with a reply, and with the status "idle"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Requests that a kernel's memory holds, and bytes of their headers and parts.
MAX_REQUESTS, MAX_BYTES = 10_000, 16 << 20
# Bytes of a request that is kept for the kernel's next process: one for the kernel's info has a few hundred.
MAX_REPEATABLE_BYTES = 8 << 10


@dataclass(slots=True)
class Request:
    """One message to the kernel on shell or control."""

    session: str
    channel: str
    header: dict[str, Any]
    parts: list[bytes] = field(default_factory=list)
    """Of a small request that the next process of the kernel can answer; empty for all others."""
    size: int = 0
    """Bytes of the header's text and of the parts that are kept."""
    reply: list[bytes] = field(default_factory=list)
    """The kernel's reply, while it waits for what the kernel has published before it."""
    is_replied: bool = False
    is_idle: bool = False

    @property
    def msg_id(self) -> str:
        return str(self.header.get("msg_id", ""))

    @property
    def reply_type(self) -> str:
        """The type of its reply; empty where it has one already, or, like a comm's message, gets none."""
        msg_type = str(self.header.get("msg_type", ""))
        name = msg_type.removesuffix("_request")
        return "" if self.is_replied or name == msg_type else f"{name}_reply"


class Requests:
    """The open requests, in the order in which they were sent."""

    def __init__(self) -> None:
        self._open: dict[str, Request] = {}
        self._bytes = self._reply_bytes = 0

    @property
    def size(self) -> int:
        """Bytes of the headers, parts and replies that are kept."""
        return self._bytes + self._reply_bytes

    def keep_reply(self, request: Request, parts: list[bytes]) -> None:
        """Keep the kernel's reply, while it waits for what the kernel has published before it."""
        self.take_reply(request)
        request.reply = parts
        self._reply_bytes += sum(map(len, parts))

    def take_reply(self, request: Request) -> list[bytes]:
        """The reply that waits, which does not any more; empty for none."""
        parts, request.reply = request.reply, []
        self._reply_bytes -= sum(map(len, parts))
        return parts

    def find(self, msg_id: str) -> Request | None:
        return self._open.get(msg_id)

    def add(self, session: str, channel: str, header: dict[str, Any], parts: list[bytes]) -> None:
        """Note a message that is sent to the kernel."""
        if channel not in ("shell", "control"):
            return
        size = sum(map(len, parts))
        is_repeatable = header.get("msg_type") == "kernel_info_request" and size <= MAX_REPEATABLE_BYTES
        kept = size if is_repeatable else sum(map(len, parts[:1]))
        request = Request(session, channel, header, parts if is_repeatable else [], size=kept)
        self.remove(request.msg_id)
        self._open[request.msg_id] = request
        self._bytes += kept
        while len(self._open) > MAX_REQUESTS or self._bytes > MAX_BYTES:
            self.remove(next(iter(self._open)))

    def remove(self, msg_id: str) -> Request | None:
        """Remove and return a request, if it is open: it is answered in full."""
        request = self._open.pop(msg_id, None)
        self._bytes -= request.size if request else 0
        return request

    def on_reply(self, msg_id: str) -> None:
        """Note the kernel's reply, which may come before or after the status, by another connection."""
        if request := self._open.get(msg_id):
            request.is_replied = True
            self._close_done(request)

    def on_idle(self, msg_id: str) -> None:
        """Note the status "idle", the last that the kernel publishes for a request."""
        if request := self._open.get(msg_id):
            request.is_idle = True
            self._close_done(request)

    def _close_done(self, request: Request) -> None:
        if request.is_idle and not request.reply_type:
            self.remove(request.msg_id)

    def replied(self) -> list[Request]:
        """The requests with a reply and without the status "idle", which may have been lost."""
        return [request for request in self._open.values() if request.is_replied and not request.is_idle]

    def take_repeatable(self) -> list[Request]:
        """Remove and return the requests that the kernel's next process can answer."""
        found = [request for request in self._open.values() if request.parts and not request.is_replied]
        for request in found:
            self.remove(request.msg_id)
        return found

    def take(self) -> list[Request]:
        """Remove and return all requests."""
        requests, self._open, self._bytes = list(self._open.values()), {}, 0
        return requests
