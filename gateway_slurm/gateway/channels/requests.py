"""The requests of one session that its kernel has not answered in full: with a reply, and with the status "idle"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Requests that a session's memory holds.
MAX_REQUESTS = 10_000


@dataclass(slots=True)
class Request:
    """One message to the kernel on shell or control."""

    channel: str
    header: dict[str, Any]
    parts: list[bytes] = field(default_factory=list)
    """Of a request that the next process of the kernel can answer; empty for all others."""
    is_replied: bool = False
    is_idle: bool = False

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

    def add(self, channel: str, header: dict[str, Any], parts: list[bytes]) -> None:
        """Note a message that is sent to the kernel."""
        if channel not in ("shell", "control"):
            return
        if len(self._open) >= MAX_REQUESTS:
            del self._open[next(iter(self._open))]
        self._open[str(header.get("msg_id", ""))] = Request(
            channel, header, parts if header.get("msg_type") == "kernel_info_request" else []
        )

    def remove(self, msg_id: str) -> None:
        """The request is answered in full, by the server."""
        self._open.pop(msg_id, None)

    def on_reply(self, msg_id: str) -> None:
        """Note the kernel's reply, which may come before or after the status, by another connection."""
        if request := self._open.get(msg_id):
            request.is_replied = True
            self._close_done(msg_id, request)

    def on_idle(self, msg_id: str) -> None:
        """Note the status "idle", the last that the kernel publishes for a request."""
        if request := self._open.get(msg_id):
            request.is_idle = True
            self._close_done(msg_id, request)

    def _close_done(self, msg_id: str, request: Request) -> None:
        if request.is_idle and not request.reply_type:
            del self._open[msg_id]

    def take_repeatable(self) -> list[Request]:
        """Remove and return the requests that the kernel's next process can answer."""
        found = [msg_id for msg_id, request in self._open.items() if request.parts and not request.is_replied]
        return [self._open.pop(msg_id) for msg_id in found]

    def take(self) -> list[Request]:
        """Remove and return all requests."""
        requests, self._open = list(self._open.values()), {}
        return requests
