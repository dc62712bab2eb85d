"""The frontends of every kernel: their sessions' channels, and the acknowledgements of the kernels' output."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from gateway_slurm.errors import GatewaySlurmError, LinkError
from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.acks import STATE_KEY, OutputAcks, Position
from gateway_slurm.gateway.channels.channels import KernelChannels
from gateway_slurm.gateway.channels.replay import Replay
from gateway_slurm.link.output import KeptOutput
from gateway_slurm.provisioner import SlurmProvisioner

# A session's id becomes a ZMQ identity: at most 255 bytes, not beginning with a NUL byte.
_SESSION_ID = re.compile(r"[\x21-\x7e]{1,200}")
# Seconds that an earlier server's frontends have to come back; Jupyter's own give up after 31 to 36.
RECONNECT_SECONDS = 60.0
# Warnings that wait for a kernel's first cell; older ones are only in the log.
MAX_EARLY_WARNINGS = 8
# Seconds between two looks at whether a kernel has ended while its launcher has no link.
LINK_SECONDS = 5.0


class Frontends:
    """The frontends of one kernel manager, on its loop. ``close`` ends a kernel's.

    ``why_dead`` waits until a kernel has started and returns "", or the reason why it is dead. ``on_failure_sent`` is
    called with a dead kernel's id each time a frontend has all that was queued for it.
    """

    def __init__(
        self, manager: Any, why_dead: Callable[[str], Awaitable[str]], on_failure_sent: Callable[[str], None]
    ) -> None:
        self._manager, self._why_dead, self._on_failure_sent = manager, why_dead, on_failure_sent
        self._channels: dict[str, dict[str, KernelChannels]] = {}
        self._acks: dict[str, OutputAcks] = {}
        # The sessions' positions for kernels of an earlier server, once they are known.
        self._positions: dict[str, asyncio.Future[dict[str, Position]]] = {}
        self._reconnect_timers: dict[str, asyncio.TimerHandle] = {}
        self._reading: dict[str, asyncio.Lock] = {}
        self._early_warnings: dict[str, deque[str]] = {}

    def channels_of(self, kernel_id: str) -> list[KernelChannels]:
        """The channels of all sessions of this kernel."""
        return list(self._channels.get(kernel_id, {}).values())

    def acks(self, kernel_id: str) -> OutputAcks | None:
        """The acknowledgements of a kernel's output; None for a kernel that has no launcher of ours."""
        if kernel_id not in self._acks and (provisioner := self._provisioner(kernel_id)):
            self._acks[kernel_id] = OutputAcks(provisioner.acknowledge)
        return self._acks.get(kernel_id)

    def _provisioner(self, kernel_id: str) -> SlurmProvisioner | None:
        provisioner = getattr(self._manager.find_kernel(kernel_id), "provisioner", None)
        return provisioner if isinstance(provisioner, SlurmProvisioner) else None

    def open_channels(self, kernel_id: str, session_id: str) -> KernelChannels:
        """The session's channels to the kernel; the first call creates them. Raises HTTPError 404."""
        kernel = self._manager.get_kernel(kernel_id)
        sessions = self._channels.setdefault(kernel_id, {})
        if not _SESSION_ID.fullmatch(session_id):
            session_id = uuid.uuid4().hex
        if session_id not in sessions:
            sessions[session_id] = KernelChannels(
                kernel,
                session_id,
                ready=partial(self._wait_ready, kernel_id),
                subscribe_timeout=self._manager.kernel_info_timeout,
                log=self._manager.log,
                make_replay=partial(self._make_replay, kernel_id, session_id),
                on_cell=partial(self._show_early_warnings, kernel_id),
                on_failure_sent=partial(self._on_failure_sent, kernel_id),
                state=self._manager.state_of(kernel_id),
            )
        return sessions[session_id]

    def refusal(self, kernel_id: str, session_id: str) -> str:
        """Why the kernel is dead; empty where it is not, or where the session does not have all its messages yet."""
        kernel = self._manager.find_kernel(kernel_id)
        channels = self._channels.get(kernel_id, {}).get(session_id)
        if getattr(kernel, "execution_state", "") != "dead" or (channels is not None and channels.has_unsent):
            return ""
        return str(kernel.reason or "it died")

    async def _wait_ready(self, kernel_id: str) -> str:
        reason = await self._why_dead(kernel_id)
        if reason or kernel_id not in self._positions:
            return reason
        await asyncio.shield(self._positions[kernel_id])
        return await self._why_dead(kernel_id)

    def _make_replay(self, kernel_id: str, session_id: str) -> Replay:
        """Called once ``_wait_ready`` has returned."""
        positions = self._positions.get(kernel_id)
        position = positions.result().pop(session_id, None) if positions is not None else None
        return Replay(
            self.acks(kernel_id),
            partial(self._read_kept, kernel_id),
            position=position,
            may_be_ours=partial(self._may_be_ours, kernel_id, session_id),
        )

    def _may_be_ours(self, kernel_id: str, session_id: str, header: dict[str, Any]) -> bool:
        """Whether a request may be this session's: its header names the session, or none that is known."""
        named = header.get("session")
        return named == session_id or named not in self._channels.get(kernel_id, {})

    def reconnect(self, kernel_id: str) -> None:
        """A restart has given the kernel another address: connect all sockets to it."""
        manager = self._manager
        if kernel_id not in manager:  # it was shut down meanwhile
            return
        manager.ports_changed(kernel_id)
        manager.stop_watching_activity(kernel_id)
        manager.start_watching_activity(kernel_id)
        for channels in self.channels_of(kernel_id):
            channels.reconnect()

    def follow_restart(self, kernel_id: str) -> None:
        """The restarter begins to restart the kernel, which has died."""
        died = getattr(self._manager.find_kernel(kernel_id).provisioner, "exit_reason", "")
        reason = f"the kernel died{f' ({died})' if died else ''} and is restarted: run the cells again"
        for channels in self.channels_of(kernel_id):
            channels.follow_restart(reason)

    def show_waiting(self, kernel_id: str, text: str) -> None:
        """Show every session under its first cell why the kernel is not there yet."""
        for channels in self.channels_of(kernel_id):
            channels.show_waiting(text)

    def restart_waiting(self, kernel_id: str, reason: str) -> None:
        """A user restarts a kernel that is not there yet: refuse the cells that wait for it, and say that it starts.

        The frontend that restarts a kernel forgets its cells, and shows "restarting" until it has another status.
        """
        for channels in self.channels_of(kernel_id):
            channels.drop_held(reason)
            channels.send_status("starting")

    def warn(self, kernel_id: str, text: str) -> None:
        """Show every session a warning under the cell that the kernel began last.

        Frontends show nothing that has no cell: before the first cell a warning waits for it.
        """
        sessions = self.channels_of(kernel_id)
        began = [channels.last_cell for channels in sessions if channels.last_cell]
        if not began and kernel_id in self._manager:
            self._early_warnings.setdefault(kernel_id, deque(maxlen=MAX_EARLY_WARNINGS)).append(text)
        for channels in sessions if began else ():
            channels.warn(text, channels.last_cell or began[0])

    def _show_early_warnings(self, kernel_id: str) -> None:
        for text in self._early_warnings.pop(kernel_id, ()):
            self.warn(kernel_id, text)

    def detached(self, kernel_id: str, channels: KernelChannels) -> None:
        """A websocket closed. Close the other sessions without a frontend: output is kept for the last one only."""
        if kernel_id in self._reconnect_timers:
            return
        sessions = self._channels.get(kernel_id, {})
        for session, other in list(sessions.items()):
            if other is not channels and not other.is_attached:
                sessions.pop(session).close("another session went away after it")

    def hand_over(self, kernel_id: str, reason: str) -> None:
        """Close the kernel's channels after a last acknowledgement, which gives the next server all positions."""
        if acks := self._acks.get(kernel_id):
            acks.flush()
        self.close(kernel_id, reason)

    def close(self, kernel_id: str, reason: str) -> None:
        """The kernel has ended, or belongs to another server."""
        if acks := self._acks.pop(kernel_id, None):
            acks.close()
        for channels in self._channels.pop(kernel_id, {}).values():
            channels.close(reason)
        if timer := self._reconnect_timers.pop(kernel_id, None):
            timer.cancel()
        if (positions := self._positions.pop(kernel_id, None)) and not positions.done():
            positions.set_result({})
        self._reading.pop(kernel_id, None)
        self._early_warnings.pop(kernel_id, None)

    # -- sessions of an earlier server ------------------------------------------------------------

    def expect_restore(self, kernel_id: str) -> None:
        """The kernel is an earlier server's: its sessions wait for ``restore``, which finds their positions."""
        self._positions[kernel_id] = asyncio.get_running_loop().create_future()

    async def restore(self, kernel_id: str) -> str:
        """Restore the sessions of an earlier server's kernel; return the kernel's state, "" if it is not known.

        Output is held for each of them, also if its frontend does not come back, for ``RECONNECT_SECONDS``.
        """
        known = self._positions.get(kernel_id)
        if known is None:  # the kernel was removed in the meantime
            return ""
        state, positions = "", {}
        try:
            if kept := await self._read_first_kept(kernel_id):
                texts = dict(kept.positions)
                state = _last_state(texts.pop(STATE_KEY, ""), kept, self._manager.track_message_type)
                positions = {session: Position.parse(text) for session, text in texts.items()}
        except GatewaySlurmError as error:
            self._manager.log.warning("kernel %s: the output kept on its node cannot be read: %s", kernel_id, error)
        finally:
            if not known.done():
                known.set_result(positions)
        acks = self.acks(kernel_id)
        if acks is None or kernel_id not in self._positions:
            return state
        for session_id, position in list(positions.items()):
            # Now, so that no output is acknowledged before they have subscribed.
            acks.join(session_id, position)
            self.open_channels(kernel_id, session_id)
        if positions or state:
            acks.resend(state)
        loop = asyncio.get_running_loop()
        self._reconnect_timers[kernel_id] = loop.call_later(RECONNECT_SECONDS, self._end_reconnecting, kernel_id)
        return state

    async def _read_first_kept(self, kernel_id: str) -> KeptOutput | None:
        """Read what the launcher keeps, once it has a link; None for a kernel that ends before."""
        while kernel_id in self._positions and (provisioner := self._provisioner(kernel_id)) is not None:
            try:
                await provisioner.until_linked(LINK_SECONDS)
                return await self._read_kept(kernel_id)
            except LinkError:
                if await provisioner.poll() is not None:
                    break
        return None

    async def _read_kept(self, kernel_id: str) -> KeptOutput:
        if (provisioner := self._provisioner(kernel_id)) is None:
            raise LinkError(f"kernel {kernel_id} has ended")
        # One at a time: each may be as large as a launcher's memory for output.
        async with self._reading.setdefault(kernel_id, asyncio.Lock()):
            return await provisioner.kept_output()

    def _end_reconnecting(self, kernel_id: str) -> None:
        """Close all but one of the sessions that did not come back."""
        self._reconnect_timers.pop(kernel_id, None)
        sessions = self._channels.get(kernel_id, {})
        away = [session for session, channels in sessions.items() if not channels.is_attached]
        for session in away[:-1]:
            sessions.pop(session).close("its frontend did not come back")


def _last_state(state: str, kept: KeptOutput, tracks: Callable[[str | None], bool]) -> str:
    """The kernel's execution state after the kept messages; ``state`` is the one before them."""
    for frames in reversed(kept.messages):
        parts = messages.parts_of(frames)
        if parts and b"status" in parts[0] and messages.header_of(parts).get("msg_type") == "status":
            parent_type = messages.parent_header_of(parts).get("msg_type")
            if tracks(parent_type):
                return str(messages.content_of(parts).get("execution_state", ""))
    return state
