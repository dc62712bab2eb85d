"""Cells whose replies, or requests, were lost with an earlier server or with a connection to their kernel.

A reply goes to the server that is there when the cell ends. Where there was none, a reply is made here, from what the
kernel published about the cell.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from gateway_slurm.gateway.channels.session import Session
from gateway_slurm.gateway.executions import Execution, Executions, reply_of

# Seconds in which what the kernel publishes for a probe comes, also where much must be read before it. After that
# another probe is sent.
PROBE_SECONDS = 30.0
# Seconds between a cell's end and a reply made here, in which the kernel's own reply may come.
REPLY_GRACE = 1.0


class Connection(Protocol):
    """What is used here of the kernel's connection (``connection``)."""

    executions: Executions
    sessions: dict[str, Session]

    def nudge(self, channel: str) -> str:
        """Request the kernel's info; return the request's id."""

    def send_reply(self, session: Session, header: dict[str, Any], content: dict[str, Any]) -> None:
        """Send a reply that is made here."""

    def refuse_cell(self, session: Session, header: dict[str, Any], reason: str, name: str) -> None:
        """Answer a cell with an error."""


class LostReplies:
    """The cells of one connection that may have lost something. ``forget`` ends what is under way."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._doubted: dict[str, None] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._finding: asyncio.Task[None] | None = None
        self._probe = ""
        self._answered, self._published = asyncio.Event(), asyncio.Event()

    def doubt(self) -> None:
        """The requests of all cells without a reply, and the replies to them, may have been lost."""
        for execution in self._connection.executions.unreplied():
            self._doubted[execution.msg_id] = None

    def forget(self) -> None:
        """All cells were answered."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._doubted.clear()
        if self._finding is not None:
            self._finding.cancel()

    def on_idle(self, msg_id: str) -> None:
        """The kernel has ended a request."""
        if msg_id in self._doubted and msg_id not in self._timers:
            self._timers[msg_id] = asyncio.get_running_loop().call_later(REPLY_GRACE, self._reply, msg_id)

    def on_reply(self, msg_id: str) -> None:
        """The kernel has replied to a cell."""
        self._doubted.pop(msg_id, None)
        if timer := self._timers.pop(msg_id, None):
            timer.cancel()

    def _reply(self, msg_id: str) -> None:
        self.on_reply(msg_id)
        execution = self._connection.executions.get(msg_id)
        if execution is not None and not execution.is_replied:
            self._send(execution, reply_of(execution))

    def _send(self, execution: Execution, content: dict[str, Any]) -> None:
        if session := self._connection.sessions.get(execution.session or ""):
            self._connection.send_reply(session, execution.header, content)
        else:
            self._connection.executions.replied(execution.msg_id, content)

    # -- requests that never reached the kernel -------------------------------------------------------

    def on_probe_reply(self, msg_id: str) -> None:
        """Note the kernel's reply to a request of the server's own."""
        if msg_id == self._probe:
            self._answered.set()

    def on_probe_published(self, msg_id: str) -> None:
        """The kernel has published something for a request of the server's own: all before it has been read."""
        if msg_id == self._probe:
            self._published.set()

    def find(self) -> None:
        """Answer the cells in doubt that have ended, and find those that never reached the kernel."""
        if self._finding is not None:
            self._finding.cancel()
        self._finding = asyncio.ensure_future(self._find()) if self._doubted else None

    async def _find(self) -> None:
        """The kernel takes requests on shell in turn.

        If it replies to two probes, and has begun none of the cells meanwhile, no cell is before them.
        """
        executions, quiet = self._connection.executions, 0
        for msg_id in list(self._doubted):
            if (known := executions.get(msg_id)) is None or known.ended:
                self.on_idle(msg_id)
        while unconfirmed := self._unconfirmed():
            self._answered.clear()
            self._published.clear()
            self._probe = self._connection.nudge("shell")
            await self._answered.wait()
            try:  # what the kernel publishes comes another way, and may be much later
                await asyncio.wait_for(self._published.wait(), PROBE_SECONDS)
            except asyncio.TimeoutError:
                continue
            quiet = quiet + 1 if self._unconfirmed() == unconfirmed else 0
            if quiet == 2:
                for msg_id in unconfirmed:
                    self._refuse(msg_id)

    def _unconfirmed(self) -> list[str]:
        found = map(self._connection.executions.get, self._doubted)
        return [execution.msg_id for execution in found if execution and not execution.started and not execution.ended]

    def _refuse(self, msg_id: str) -> None:
        self.on_reply(msg_id)
        execution = self._connection.executions.get(msg_id)
        session = self._connection.sessions.get(execution.session or "") if execution else None
        if execution is not None:
            self._connection.executions.end(msg_id, "lost")
        if execution is not None and session is not None:
            reason = "the kernel never got this cell: run it again"
            self._connection.refuse_cell(session, execution.header, reason, "CellLost")
