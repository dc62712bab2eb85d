"""A frontend session's channels to one kernel: there before the kernel is, and while the frontend is away.

What the frontend sends while the kernel waits in Slurm's queue, or while its iopub is not subscribed
yet, is held and sent on in order: a cell that is run early runs once the kernel is there, and its
output is not missed. What the kernel says while the frontend is away is kept up to a bound, and what
had to be dropped is said. A frontend that reads slowly fills its own bounded queue, and then its
kernel's; no other waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from jupyter_client.session import Session

from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.queue import QUEUE_LIMIT, Item, Outgoing
from gateway_slurm.gateway.channels.replay import CatchUp
from gateway_slurm.gateway.channels.sockets import KernelSocket

# Bytes, and messages, from a frontend that wait for its kernel.
HELD_LIMIT = 16 << 20
HELD_COUNT = 10_000
# Bytes handed to the websocket before one waits until they have left.
FLUSH_EVERY = 1 << 20
NUDGE_PAUSES = (0.05, 0.1, 0.2, 0.4)
LONGEST_NUDGE = 1.0


class Sink(Protocol):
    """A websocket that is open."""

    def write(self, channel: str, parts: list[bytes]) -> asyncio.Future[None] | None:
        """Send a message; the future is done when it has left, or never will. Raises nothing."""

    def end(self, reason: str) -> None:
        """Close: another websocket of the same session has taken over, or the session is over."""


class KernelChannels:
    """One session's sockets to one kernel. ``close`` ends its tasks and its sockets.

    ``ready`` returns once the kernel is there, or the reason for which it never will be. ``catch_up``,
    which is called then, is how the session goes on where an earlier server had it.
    """

    def __init__(
        self,
        kernel: Any,
        session_id: str,
        *,
        ready: Callable[[], Awaitable[str]],
        subscribe_timeout: float,
        log: logging.Logger,
        catch_up: Callable[[], CatchUp] = CatchUp,
    ) -> None:
        self.kernel = kernel
        self.log = log
        self._ready = ready
        self._subscribe_timeout = subscribe_timeout
        self._session = Session(session=session_id)
        self._sockets: dict[str, KernelSocket] = {}
        self._sink: Sink | None = None
        self._out = Outgoing(self._left)
        self._wake = asyncio.Event()
        # For the kernel: None once it is passed on at once.
        self._held: list[tuple[str, list[bytes]]] | None = []
        self._held_bytes = 0
        self._make_catch_up, self._catch_up = catch_up, CatchUp()
        self.failure = ""
        # The header of the request whose cell the kernel began last.
        self.last_cell: dict[str, Any] = {}
        self._closed = False
        self._subscribed = asyncio.Event()
        # After a restart what the old kernel said last proves nothing.
        self._restarted = False
        self._nudges: set[str] = set()
        self._tasks = {asyncio.ensure_future(self._pump()), asyncio.ensure_future(self._connect())}

    @property
    def is_attached(self) -> bool:
        return self._sink is not None

    # -- the frontend -------------------------------------------------------------------------

    def attach(self, sink: Sink) -> None:
        """Give this websocket what is queued, and what comes."""
        older, self._sink = self._sink, sink
        self._out.take_back()
        if older is not None:
            older.end("a newer websocket of the same session")
        if self._out.dropped:
            self._say_dropped(self._out.dropped, "while no frontend was there")
            self._out.dropped = 0
        if self.failure:
            self.say_status("dead")
        elif self._held is not None:
            self.say_status(self.kernel.execution_state or "starting")
        self._wake.set()

    def detach(self, sink: Sink) -> None:
        """The websocket is gone; what comes from now on is kept for the next one of this session."""
        if self._sink is sink:
            self._sink = None
            self._out.take_back()
            self._read_iopub()

    def from_client(self, channel: str, parts: list[bytes]) -> None:
        """A message for the kernel; raises MessageError when too much waits already."""
        if self.failure:
            self._refuse(channel, parts)
        elif self._held is None:
            self._send(channel, parts)
        else:
            self._held_bytes += sum(map(len, parts))
            if self._held_bytes > HELD_LIMIT or len(self._held) >= HELD_COUNT:
                raise messages.MessageError("too much was sent before the kernel was there")
            self._held.append((channel, parts))

    def say_status(self, state: str) -> None:
        """Tell the frontend of the kernel's state, where the kernel itself cannot."""
        self._put(*self._own("status", {"execution_state": state}))

    def warn(self, text: str, cell: dict[str, Any]) -> None:
        """Show a text on stderr under a cell, given by the header of its request."""
        if not self.failure:
            self._put(*self._own("stream", {"name": "stderr", "text": text}, cell))

    def fail(self, reason: str) -> None:
        """The kernel is dead, and this is why: so say the cells that wait for it."""
        if self.failure:
            return
        self.failure = reason
        for _msg_id, header in self._catch_up.cells.take_all():
            self._refuse_cell(header, reason)
        self._catch_up.told()
        self.give_back(reason)
        self.say_status("dead")

    def give_back(self, reason: str) -> None:
        """What the kernel has not been sent yet never will be, and this is why."""
        held, self._held = self._held or [], None
        for channel, parts in held:
            self._refuse(channel, parts, reason)

    def _refuse(self, channel: str, parts: list[bytes], reason: str = "") -> None:
        header = messages.header_of(parts)
        if channel == "shell" and header.get("msg_type") == "execute_request":
            self._refuse_cell(header, reason or self.failure)

    def _refuse_cell(self, header: dict[str, Any], reason: str, name: str = "KernelDied") -> None:
        error = {"ename": name, "evalue": reason, "traceback": [reason]}
        self._put(*self._own("error", error, header))
        self._reply(header, {"status": "error", "execution_count": None, **error})
        self._put(*self._own("status", {"execution_state": "idle"}, header))

    def _reply(self, header: dict[str, Any], content: dict[str, Any]) -> None:
        self._put("shell", self._own("execute_reply", content, header)[1])

    def _say_dropped(self, count: int, why: str, parent: dict[str, Any] | None = None) -> None:
        text = f"gateway_slurm: {count} messages of output were dropped {why}\n"
        self._out.put_first(Item(*self._own("stream", {"name": "stderr", "text": text}, parent)))

    def _own(
        self, msg_type: str, content: dict[str, Any], parent: dict[str, Any] | None = None
    ) -> tuple[str, list[bytes]]:
        """A message of ours, for iopub."""
        message = self._session.msg(msg_type, content, parent=parent)
        pack = self._session.pack
        parts = [pack(message[name]) for name in ("header", "parent_header", "metadata", "content")]
        return "iopub", parts

    # -- the kernel ---------------------------------------------------------------------------

    async def _connect(self) -> None:
        reason = await self._ready()
        if reason:
            self.fail(reason)
            return
        self._catch_up = self._make_catch_up()
        self._catch_up.begin(self._session.session, self._answer)
        self._open()
        await self._go_on()

    def hold(self) -> None:
        """The kernel is being restarted: what the frontend sends waits until the new one is subscribed to."""
        if self._held is None and not self.failure:
            self._held, self._held_bytes = [], 0
        self._catch_up.cells.take_all()
        self._catch_up.told()
        self._restarted = True
        self._subscribed.clear()

    def follow_restart(self) -> None:
        """The restarter begins to restart the kernel: what is sent meanwhile waits, as with one that is asked for."""
        self.say_status("restarting")
        self.hold()
        self._own_task(self.resume())

    async def resume(self) -> None:
        """The restart is over; the sockets, whose addresses are the same as a rule, subscribe anew by themselves.

        Channels that were closed meanwhile stay so.
        """
        if self._closed:
            return
        self.failure = ""
        if not self._sockets:
            self._open()
        await self._go_on()

    def moved(self) -> None:
        """The restart that is under way has given the kernel another address."""
        if self._sockets:
            self._close_sockets()
            self._open()

    def _close_sockets(self) -> None:
        for socket in self._sockets.values():
            socket.close()
        self._sockets.clear()

    async def _go_on(self) -> None:
        await self._until_subscribed()
        if self._closed:
            return
        if self._catch_up.is_behind:
            await self._replay()
            self.say_status(self.kernel.execution_state)
        if not self.failure:
            self._release()
            self._own_task(self._catch_up.find_unheard(self._ask_shell, self._never_arrived))

    async def _replay(self) -> None:
        """Queue what the session has not had: what was kept, then what came meanwhile."""
        session = self._session
        found = await self._catch_up.missed_messages(set(self._out.ids()), session.sign, self.log)
        if found.dropped:
            # A frontend shows it where it shows the output that is there.
            parent = messages.parent_header_of(found.kept[0][0]) if found.kept else None
            self._put(*self._own("stream", {"name": "stderr", "text": found.words}, parent or None))
        for parts, msg_id in found.kept:
            self._from_iopub(parts, msg_id, kept=True)
        for channel, parts in found.live:
            self._deliver(channel, parts)
        self._catch_up.caught_up()

    def _release(self) -> None:
        held, self._held = self._held or [], None
        for channel, parts in held:
            self._send(channel, parts)

    def _open(self) -> None:
        self._session.key = self.kernel.session.key
        identity = self._session.bsession
        for channel in messages.CHANNELS:
            self._sockets[channel] = KernelSocket(self.kernel, channel, identity, partial(self._from_kernel, channel))

    def _send(self, channel: str, parts: list[bytes]) -> None:
        if channel not in self._sockets:
            return
        if channel == "shell" and self._catch_up.cells.asked(messages.header_of(parts)):
            self._catch_up.told()
        self._sockets[channel].send([messages.DELIMITER, self._session.sign(parts[:4]), *parts])

    async def _until_subscribed(self) -> None:
        """Wait until the kernel publishes to us: its welcome (JEP 65), or any message, says so.

        A kernel that says no welcome is asked for something that it answers on iopub.
        """
        pauses = [*NUDGE_PAUSES]
        deadline = asyncio.get_running_loop().time() + self._subscribe_timeout
        while True:
            pause = pauses.pop(0) if pauses else LONGEST_NUDGE
            try:
                await asyncio.wait_for(self._subscribed.wait(), pause)
            except asyncio.TimeoutError:
                if asyncio.get_running_loop().time() > deadline:
                    self.log.warning("kernel %s: nothing came on iopub; going on", self.kernel.kernel_id)
                    return
                self._ask("control")
            else:
                return

    def _ask(self, channel: str) -> str:
        """Ask for the kernel's info, for the answer's sake alone; the request's id."""
        parts = self._own("kernel_info_request", {})[1]
        if len(self._nudges) > HELD_COUNT:
            self._nudges.clear()
        msg_id = str(messages.header_of(parts)["msg_id"])
        self._nudges.add(msg_id)
        self._send(channel, parts)
        return msg_id

    def _ask_shell(self) -> str:
        return self._ask("shell")

    def _from_kernel(self, channel: str, frames: list[bytes]) -> None:
        parts = messages.parts_of(frames)
        if self._is_for_us(channel, parts):
            if channel == "shell":
                self._catch_up.heard_answer(messages.parent_id(parts))
            return
        if not self._catch_up.waits(channel, parts):
            self._deliver(channel, parts)

    def _deliver(self, channel: str, parts: list[bytes]) -> None:
        if channel == "iopub":
            self._from_iopub(parts, self._catch_up.id_of(parts))
        elif channel != "shell":
            self._put(channel, parts)
        else:
            cell = messages.parent_id(parts)
            if self._catch_up.answered(cell):
                self._put(channel, parts, cell=cell)

    def _from_iopub(self, parts: list[bytes], msg_id: str, *, kept: bool = False) -> None:
        if parts and b'"execute_input"' in parts[0]:
            self.last_cell = messages.parent_header_of(parts)
        self._catch_up.heard(parts, msg_id, kept=kept)
        self._put("iopub", parts, msg_id)

    def _is_for_us(self, channel: str, parts: list[bytes]) -> bool:
        """Whether a message is an answer to a nudge, or the welcome; with the proof that it may be."""
        waits = channel == "iopub" and not self._subscribed.is_set()
        ours = (waits and messages.header_of(parts).get("msg_type") == "iopub_welcome") or (
            bool(self._nudges) and messages.parent_id(parts) in self._nudges
        )
        if waits and (ours or not self._restarted):
            self._subscribed.set()
        return ours

    def _answer(self, header: dict[str, Any], content: dict[str, Any]) -> None:
        """The reply to a cell, whose own was lost."""
        if not self.failure:
            self._reply(header, content)

    def _never_arrived(self, headers: list[dict[str, Any]]) -> None:
        for header in headers:
            self._refuse_cell(header, "the kernel never got this cell: run it again", "CellLost")

    # -- the queue between them ------------------------------------------------------------------

    def _put(self, channel: str, parts: list[bytes], msg_id: str = "", cell: str = "") -> None:
        self._out.put(Item(channel, parts, msg_id, cell))
        if self._out.queued > QUEUE_LIMIT:
            self._overflow()
        self._wake.set()

    def _overflow(self) -> None:
        """A frontend that is there slows its kernel's iopub down; without one the oldest output goes."""
        if self._sink is None:
            self._out.drop_oldest()
        elif "iopub" in self._sockets:
            self._sockets["iopub"].pause()

    def _left(self, item: Item) -> None:
        self._catch_up.left(item)

    def _read_iopub(self) -> None:
        if "iopub" in self._sockets:
            self._sockets["iopub"].resume()

    async def _pump(self) -> None:
        """Hand the queue to the websocket, no faster than it takes it."""
        unflushed = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._out and self._sink is not None:
                item = self._out.take()
                written = self._sink.write(item.channel, item.parts)
                self._out.wrote(item, written)
                if written is None:  # the websocket is closed, and says so itself
                    break
                unflushed += item.size
                if unflushed > FLUSH_EVERY:
                    await asyncio.wait({written})
                    unflushed = 0
                if self._out.queued < QUEUE_LIMIT // 2:
                    self._read_iopub()

    async def flushed(self) -> None:
        """Wait until the frontend, if it is there, has all that is queued."""
        if self._sink is not None:
            await self._out.flushed.wait()

    def _own_task(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self, reason: str) -> None:
        """End the sockets, the tasks and the websocket."""
        self._closed = True
        self._subscribed.set()  # nothing will come
        for task in list(self._tasks):
            task.cancel()
        self._close_sockets()
        self._out.clear()
        self._catch_up.end()
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.end(reason)
