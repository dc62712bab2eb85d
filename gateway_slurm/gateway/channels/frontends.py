"""The connections of all kernels of one kernel manager, each with its frontends."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from gateway_slurm.errors import LinkError
from gateway_slurm.gateway.channels.connection import KernelConnection
from gateway_slurm.gateway.channels.session import Session
from gateway_slurm.gateway.http_errors import PlainHTTPError

# Seconds that a request waits for the link to a kernel that an earlier server started.
RESTORED_SECONDS = 10.0
# A session's id is a key on the kernel's node: at most 200 characters, none of them a space.
_SESSION_ID = re.compile(r"[\x21-\x7e]{1,200}")


class Frontends:
    """The frontends of one kernel manager, on its loop. ``close`` ends a kernel's.

    ``why_dead`` waits until a kernel has started and returns "", or the reason why it is dead. ``on_failure_sent`` is
    called with a dead kernel's id each time a frontend has all that was meant for it.
    """

    def __init__(
        self, manager: Any, why_dead: Callable[[str], Awaitable[str]], on_failure_sent: Callable[[str], None]
    ) -> None:
        self._manager, self._why_dead, self._on_failure_sent = manager, why_dead, on_failure_sent
        self._connections: dict[str, KernelConnection] = {}
        self.websockets: Counter[str] = Counter()
        """Open websockets to the kernels of each user."""

    def connection(self, kernel_id: str, *, is_restored: bool = False) -> KernelConnection:
        """The connection to a kernel; the first call makes it. Raises HTTPError 404."""
        if kernel_id not in self._connections:
            self._connections[kernel_id] = KernelConnection(
                self._manager,
                self._manager.get_kernel(kernel_id),
                ready=partial(self._why_dead, kernel_id),
                state=self._manager.state_of(kernel_id),
                on_failure_sent=partial(self._on_failure_sent, kernel_id),
                is_restored=is_restored,
            )
        return self._connections[kernel_id]

    def find(self, kernel_id: str) -> KernelConnection | None:
        """The connection to a kernel, where there is one."""
        return self._connections.get(kernel_id)

    def sessions(self, kernel_id: str) -> list[Session]:
        """All sessions of a kernel."""
        connection = self.find(kernel_id)
        return list(connection.sessions.values()) if connection is not None else []

    def open_session(self, kernel_id: str, session_id: str) -> Session:
        """The session of this id with the kernel; the first call makes it. Raises HTTPError 404."""
        name = session_id if _SESSION_ID.fullmatch(session_id) else uuid.uuid4().hex
        return self.connection(kernel_id).session(name)

    def refusal(self, kernel_id: str, session_id: str) -> str:
        """Why the kernel is dead; empty where it is not, or where the session does not have all its messages yet."""
        kernel, connection = self._manager.find_kernel(kernel_id), self.find(kernel_id)
        session = connection.sessions.get(session_id) if connection is not None else None
        if getattr(kernel, "execution_state", "") != "dead" or (session is not None and session.has_unsent):
            return ""
        return str(kernel.reason or "it died")

    def reconnect(self, kernel_id: str) -> None:
        """A restart has given the kernel another address: connect all sockets to it."""
        if kernel_id in self._manager:  # it was not shut down meanwhile
            self._manager.ports_changed(kernel_id)
            if connection := self.find(kernel_id):
                connection.reconnect()

    def follow_restart(self, kernel_id: str) -> None:
        """The restarter begins to restart the kernel, which has died."""
        died = getattr(self._manager.find_kernel(kernel_id).provisioner, "exit_reason", "")
        if connection := self.find(kernel_id):
            died = f" ({died})" if died else ""
            connection.follow_restart(f"the kernel died{died} and is restarted: run the cells again")

    def warn(self, kernel_id: str, text: str) -> None:
        """Show every session a warning under the cell that the kernel began last, or begins first."""
        if kernel_id in self._manager:
            self.connection(kernel_id).warn(text)

    def hand_over(self, kernel_id: str, reason: str) -> None:
        """Close the kernel's connection after a last acknowledgement, which gives the next server all positions."""
        if connection := self.find(kernel_id):
            connection.acknowledge()
        self.close(kernel_id, reason)

    def close(self, kernel_id: str, reason: str) -> None:
        """The kernel has ended, or belongs to another server."""
        if connection := self._connections.pop(kernel_id, None):
            connection.close(reason)

    # -- executions -------------------------------------------------------------------------------

    async def executions(self, kernel_id: str) -> list[dict[str, Any]]:
        """The models of the kernel's last executions, the newest first. Raises HTTPError 404."""
        connection = await self._restored(kernel_id)
        return connection.executions.models()

    async def execution(self, kernel_id: str, msg_id: str) -> dict[str, Any] | None:
        """One execution with its outputs; None for one that is not known. Raises HTTPError 404."""
        connection = await self._restored(kernel_id)
        async with connection.folding:
            await self._manager.turns.run_steps(connection.user, connection.executions.fold())
            if numbers := connection.executions.needs_reading(msg_id):
                await self._read_again(connection, msg_id, *numbers)
        await self._manager.turns.run_steps(connection.user, connection.executions.fold())
        try:
            return connection.executions.outputs(msg_id)
        except KeyError:
            return None

    async def _restored(self, kernel_id: str) -> KernelConnection:
        """The connection, once it has what an earlier server knew. Raises HTTPError 404, and 503 without a link."""
        connection = self.connection(kernel_id)
        try:
            await asyncio.wait_for(connection.restored.wait(), RESTORED_SECONDS)
        except asyncio.TimeoutError:
            raise PlainHTTPError(503, "the link to the kernel's node is down: try again") from None
        return connection

    async def _read_again(self, connection: KernelConnection, msg_id: str, first: int, last: int) -> None:
        """Read from the kernel's node what an earlier server had folded."""
        executions, turns = connection.executions, self._manager.turns
        try:
            reading = connection.read(first, last)
            try:
                async for records in reading:
                    checked = await connection.check_large(records)
                    read = [(record.number, connection.parse(record)[0].parts) for record in checked]
                    await turns.run_steps(connection.user, executions.refolding(msg_id, read, done=False))
                executions.refold(msg_id, [])
            finally:
                reading.close()
        except LinkError as error:
            self._manager.log.info("what a kernel's node keeps cannot be read: %s", error)
