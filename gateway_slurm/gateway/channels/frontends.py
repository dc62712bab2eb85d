"""The frontends of every kernel: their sessions' channels, and what of its output has left to all of them."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from gateway_slurm.errors import GatewaySlurmError, LinkError
from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.acks import STATE, Delivery, Position
from gateway_slurm.gateway.channels.channels import KernelChannels
from gateway_slurm.gateway.channels.replay import CatchUp, Kept
from gateway_slurm.provisioner import SlurmProvisioner

# What a client calls its session becomes a ZMQ identity: 255 bytes at most, none of them a NUL at the beginning.
_SESSION_ID = re.compile(r"[\x21-\x7e]{1,200}")
# Seconds for which an earlier server's frontends are waited for: Jupyter's own give up after 31 to 36.
RECONNECT_SECONDS = 60.0
# Seconds for which a launcher is waited for before it is looked whether its kernel is over.
LINK_SECONDS = 5.0


class Frontends:
    """For one kernel manager, on its loop. ``close`` ends what there is for a kernel."""

    def __init__(self, manager: Any, why_dead: Callable[[str], Awaitable[str]]) -> None:
        self._manager, self._why_dead = manager, why_dead
        self._channels: dict[str, dict[str, KernelChannels]] = {}
        self._deliveries: dict[str, Delivery] = {}
        # Kernels of an earlier server's: how far its sessions were, once that is known.
        self._positions: dict[str, asyncio.Future[dict[str, Position]]] = {}
        self._waited_for: dict[str, asyncio.TimerHandle] = {}
        self._reading: dict[str, asyncio.Lock] = {}

    def of(self, kernel_id: str) -> list[KernelChannels]:
        """The channels of every session with this kernel."""
        return list(self._channels.get(kernel_id, {}).values())

    def delivery(self, kernel_id: str) -> Delivery | None:
        """What of a kernel's output has left; None for a kernel that has no launcher of ours."""
        if kernel_id not in self._deliveries:
            provisioner = self._provisioner(kernel_id)
            if provisioner is None:
                return None
            self._deliveries[kernel_id] = Delivery(provisioner.acknowledge)
        return self._deliveries[kernel_id]

    def _provisioner(self, kernel_id: str) -> SlurmProvisioner | None:
        kernel = self._manager.find_kernel(kernel_id)
        provisioner = getattr(kernel, "provisioner", None)
        return provisioner if isinstance(provisioner, SlurmProvisioner) else None

    def channels(self, kernel_id: str, session_id: str) -> KernelChannels:
        """The session's channels to the kernel, made when they are first asked for."""
        sessions = self._channels.setdefault(kernel_id, {})
        if not _SESSION_ID.fullmatch(session_id):
            session_id = uuid.uuid4().hex
        if session_id not in sessions:
            manager = self._manager
            sessions[session_id] = KernelChannels(
                manager.get_kernel(kernel_id),
                session_id,
                ready=partial(self._until_there, kernel_id),
                subscribe_timeout=manager.kernel_info_timeout,
                log=manager.log,
                catch_up=partial(self._catch_up, kernel_id, session_id),
            )
        return sessions[session_id]

    async def _until_there(self, kernel_id: str) -> str:
        reason = await self._why_dead(kernel_id)
        if not reason and kernel_id in self._positions:
            await asyncio.shield(self._positions[kernel_id])
            reason = await self._why_dead(kernel_id)
        return reason

    def _catch_up(self, kernel_id: str, session_id: str) -> CatchUp:
        """Called once the kernel is there."""
        known = self._positions.get(kernel_id)
        position = known.result().pop(session_id, None) if known is not None else None
        return CatchUp(
            self.delivery(kernel_id),
            partial(self._kept, kernel_id),
            position=position,
            is_ours=partial(self._is_ours, kernel_id, session_id),
        )

    def _is_ours(self, kernel_id: str, session_id: str, header: dict[str, Any]) -> bool:
        """Whether a request may be this session's: it names it, or none that is known."""
        named = header.get("session")
        return named == session_id or named not in self._channels.get(kernel_id, {})

    def moved(self, kernel_id: str) -> None:
        """A restart has given the kernel another address: nothing comes from the old one any more."""
        manager = self._manager
        if kernel_id not in manager:  # it was shut down meanwhile
            return
        manager.ports_changed(kernel_id)
        manager.stop_watching_activity(kernel_id)
        manager.start_watching_activity(kernel_id)
        for channels in self.of(kernel_id):
            channels.moved()

    def follow_restart(self, kernel_id: str) -> None:
        """The restarter begins to restart the kernel."""
        for channels in self.of(kernel_id):
            channels.follow_restart()

    def warn(self, kernel_id: str, text: str) -> None:
        """Show every session a warning under the cell that the kernel began last."""
        sessions = self.of(kernel_id)
        began = [channels.last_cell for channels in sessions if channels.last_cell]
        for channels in sessions:
            channels.warn(text, channels.last_cell or (began[0] if began else {}))

    def detached(self, kernel_id: str, channels: KernelChannels) -> None:
        """A websocket closed: of the sessions whose frontend is away only the last one's output is kept."""
        if kernel_id in self._waited_for:
            return
        sessions = self._channels.get(kernel_id, {})
        for session, other in list(sessions.items()):
            if other is not channels and not other.is_attached:
                sessions.pop(session).close("another session went away after it")

    def hand_over(self, kernel_id: str, reason: str) -> None:
        """Close the kernel's channels after a last acknowledgement, from which the next server knows all positions."""
        delivery = self._deliveries.get(kernel_id)
        if delivery is not None:
            delivery.say()
        self.close(kernel_id, reason)

    def close(self, kernel_id: str, reason: str) -> None:
        """The kernel is over, or no longer this server's."""
        delivery = self._deliveries.pop(kernel_id, None)
        if delivery is not None:
            delivery.close()
        for channels in self._channels.pop(kernel_id, {}).values():
            channels.close(reason)
        timer = self._waited_for.pop(kernel_id, None)
        if timer is not None:
            timer.cancel()
        known = self._positions.pop(kernel_id, None)
        if known is not None and not known.done():
            known.set_result({})
        self._reading.pop(kernel_id, None)

    # -- those of an earlier server -------------------------------------------------------------------

    def expect(self, kernel_id: str) -> None:
        """The kernel is an earlier server's: its sessions go on once ``restore`` knows where."""
        self._positions[kernel_id] = asyncio.get_running_loop().create_future()

    async def restore(self, kernel_id: str) -> str:
        """Have the sessions of an earlier server's kernel again; return the kernel's state, "" where it is not known.

        Their output is held from now on, whether their frontends come back or not, for a while.
        """
        known = self._positions[kernel_id]
        state, found = "", {}
        try:
            kept = await self._first_kept(kernel_id)
            if kept is not None:
                found = {session: Position.parse(text) for session, text in kept.positions.items() if session != STATE}
                state = _state_after(kept.positions.get(STATE, ""), kept, self._manager.track_message_type)
        except GatewaySlurmError as error:
            self._manager.log.warning("kernel %s: its output cannot be read: %s", kernel_id, error)
        finally:
            if not known.done():
                known.set_result(found)
        delivery = self.delivery(kernel_id)
        if delivery is None or kernel_id not in self._positions:
            return state
        for session_id, position in list(found.items()):
            # At once: what is heard before they subscribe is theirs to have.
            delivery.join(session_id, position)
            self.channels(kernel_id, session_id)
        if found or state:
            delivery.again(state)
        loop = asyncio.get_running_loop()
        self._waited_for[kernel_id] = loop.call_later(RECONNECT_SECONDS, self._wait_no_more, kernel_id)
        return state

    async def _first_kept(self, kernel_id: str) -> Kept | None:
        """What the launcher has, once it is there; None for a kernel that is over before."""
        while kernel_id in self._positions and (provisioner := self._provisioner(kernel_id)) is not None:
            try:
                await provisioner.until_linked(LINK_SECONDS)
                return await self._kept(kernel_id)
            except LinkError:
                if await provisioner.poll() is not None:
                    break
        return None

    async def _kept(self, kernel_id: str) -> Kept:
        provisioner = self._provisioner(kernel_id)
        if provisioner is None:
            raise LinkError(f"kernel {kernel_id} is over")
        # One after the other: each may be as much as a launcher keeps.
        async with self._reading.setdefault(kernel_id, asyncio.Lock()):
            return await provisioner.kept_output()

    def _wait_no_more(self, kernel_id: str) -> None:
        """Of the sessions that did not come back only one's output is kept on."""
        self._waited_for.pop(kernel_id, None)
        away = [session for session, one in self._channels.get(kernel_id, {}).items() if not one.is_attached]
        for session in away[:-1]:
            self._channels[kernel_id].pop(session).close("its frontend did not come back")


def _state_after(state: str, kept: Kept, tracks: Callable[[str | None], bool]) -> str:
    """What the kernel does, after what was kept."""
    for frames in reversed(kept.messages):
        parts = messages.parts_of(frames)
        if parts and b"status" in parts[0] and messages.header_of(parts).get("msg_type") == "status":
            asked_by = messages.parent_header_of(parts).get("msg_type")
            if tracks(asked_by):
                return str(messages.content_of(parts).get("execution_state", ""))
    return state
