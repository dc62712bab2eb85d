"""A frontend session's channels to one kernel, also before the kernel exists and while the frontend is away.

What the frontend sends while the kernel waits in Slurm's queue, or before the server has subscribed to its iopub, is
held and then sent in order: a cell that is run early runs once the kernel exists, and its output is complete. Output
for a frontend that is away is kept up to a bound, and the frontend is later shown how many messages were dropped. A
frontend that reads slowly fills its own bounded queue, and then its kernel's; other frontends do not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

from jupyter_client.session import DELIM, Session

from gateway_slurm._util import Backoff, TaskSet
from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.notice import WaitingNotice
from gateway_slurm.gateway.channels.queue import QUEUE_LIMIT, OutgoingQueue, QueuedMessage
from gateway_slurm.gateway.channels.replay import Replay
from gateway_slurm.gateway.channels.requests import Request, Requests
from gateway_slurm.gateway.channels.sockets import KernelSocket
from gateway_slurm.gateway.channels.state import ExecutionState

# Bytes, and messages, from a frontend that are held for its kernel.
HELD_LIMIT = 16 << 20
HELD_COUNT = 10_000
# Bytes handed to the websocket before the server waits until they are written.
FLUSH_BYTES = 1 << 20
# Seconds before the first and between later requests that make a kernel publish something.
NUDGE_DELAY, MAX_NUDGE_DELAY = 0.05, 1.0


class Sink(Protocol):
    """An open websocket."""

    @property
    def reads_model(self) -> bool:
        """Whether the frontend reads the kernel's model when the websocket closes and no other can be opened."""

    def write(self, channel: str, parts: list[bytes]) -> asyncio.Future[None] | None:
        """Send a message. The future is done when it is written, or never will be; None: closed. Raises nothing."""

    def end(self, reason: str) -> None:
        """Close: another websocket of the same session has taken over, or the session is over."""

    def end_dead(self, reason: str) -> None:
        """Close, with a code after which the frontend tries to open another: the kernel is dead."""


class KernelChannels:
    """One session's sockets to one kernel. ``close`` ends its tasks and its sockets.

    ``ready`` waits until the kernel exists and returns "", or the reason why it never will. ``make_replay`` is called
    then; the replay continues the session where an earlier server had it. ``on_cell`` is called when the kernel has
    begun a cell, ``on_failure_sent`` each time the frontend has all that is queued for it and the kernel is dead.
    """

    def __init__(
        self,
        kernel: Any,
        session_id: str,
        *,
        ready: Callable[[], Awaitable[str]],
        subscribe_timeout: float,
        log: logging.Logger,
        make_replay: Callable[[], Replay] = Replay,
        state: ExecutionState,
        on_cell: Callable[[], None] = lambda: None,
        on_failure_sent: Callable[[], None] = lambda: None,
    ) -> None:
        self.kernel, self.log, self._state = kernel, log, state
        self._ready, self._subscribe_timeout = ready, subscribe_timeout
        self._session = Session(session=session_id)
        self._sockets: dict[str, KernelSocket] = {}
        self._sink: Sink | None = None
        self._make_replay, self._replay, self._on_cell = make_replay, Replay(), on_cell
        self._out = OutgoingQueue(lambda item: self._replay.on_sent(item))
        self._requests = Requests()
        self._wake = asyncio.Event()
        # Messages for the kernel; None while they are sent at once.
        self._held: list[tuple[str, list[bytes]]] | None = []
        self._held_bytes = 0
        self._notice = WaitingNotice(lambda kind, content, cell: self._put(*self._make_message(kind, content, cell)))
        self.failure = ""
        self._on_failure_sent = on_failure_sent
        # Whether the frontend gets the reason with what is queued for it, and whether it has it.
        self._failure_queued = self.failure_shown = False
        self._reporting: asyncio.Task[None] | None = None
        # The header of the request whose cell the kernel began last.
        self.last_cell: dict[str, Any] = {}
        self._closed = False
        self._subscribed = asyncio.Event()
        # After a restart, messages of the old process do not prove that the new one publishes to this session.
        self._restarted = False
        self._catching_up = asyncio.Lock()
        self._finding: asyncio.Task[None] | None = None
        self._nudges: set[str] = set()
        self._tasks = TaskSet()
        self._tasks.create_task(self._pump())
        self._tasks.create_task(self._connect())

    @property
    def is_attached(self) -> bool:
        return self._sink is not None

    @property
    def has_unsent(self) -> bool:
        """Whether the frontend does not have all that is queued for it."""
        return not self._out.flushed.is_set()

    # -- the frontend -------------------------------------------------------------------------

    def attach(self, sink: Sink) -> None:
        """Send to this websocket what is queued, and all that follows."""
        older, self._sink = self._sink, sink
        self._out.requeue_unsent()
        if older is not None:
            older.end("a newer websocket of the same session")
        if self._out.dropped:
            text = f"gateway_slurm: {self._out.dropped} messages of output were dropped while no frontend was there\n"
            self._out.put_first(QueuedMessage(*self._make_message("stream", {"name": "stderr", "text": text})))
            self._out.dropped = 0
        if self.failure:
            if not sink.reads_model:
                self.send_status("starting")
            self._report_failure()
        elif self._held is not None:
            self.send_status(self.kernel.execution_state or "starting")
        self._wake.set()

    def detach(self, sink: Sink) -> None:
        """The websocket has closed: keep what follows for the session's next websocket."""
        if self._sink is sink:
            self._sink = None
            self._out.requeue_unsent()
            self._read_iopub()

    def from_client(self, channel: str, parts: list[bytes]) -> None:
        """Take a message for the kernel; raises MessageError when too much is held already."""
        if self.failure:
            self._failure_queued |= self._refuse(channel, parts, self.failure)
            self._report_failure()
        elif self._held is None:
            self._send(channel, parts)
        else:
            self._held_bytes += sum(map(len, parts))
            if self._held_bytes > HELD_LIMIT or len(self._held) >= HELD_COUNT:
                raise messages.MessageError("too much was sent before the kernel had started")
            self._held.append((channel, parts))
            if channel == "shell" and _is_cell(parts) and not _is_silent(parts):
                self._notice.cell_held(messages.header_of(parts))

    async def send_dead(self) -> None:
        """Send the status ``dead``, and wait until the frontend, if it is there, has all that is queued."""
        self.send_status("dead")
        await self.flushed()

    def send_status(self, state: str) -> None:
        """Send the frontend the kernel's state, where the kernel itself cannot."""
        self._put(*self._make_message("status", {"execution_state": state}))

    def warn(self, text: str, cell: dict[str, Any]) -> None:
        """Show a text on stderr under a cell, given by the header of its request."""
        if not self.failure:
            self._put(*self._make_message("stream", {"name": "stderr", "text": text}, cell))

    def show_waiting(self, text: str) -> None:
        """Show under the first cell that is held why the kernel is not there yet; the text replaces an earlier one."""
        if self._held is not None and self._sink is not None:
            self._notice.set_text(text)

    def fail(self, reason: str) -> None:
        """The kernel is dead: answer all cells that wait with the reason, and later ones with the last reason."""
        was_dead, self.failure = bool(self.failure), reason
        if was_dead:
            return
        had_cells = self._answer_open(reason)
        self._failure_queued = self.refuse_held(reason) or had_cells
        self._report_failure()

    def refuse_held(self, reason: str) -> bool:
        """Answer with this reason all cells that are held for the kernel; they will not be sent to it.

        Return whether the frontend has the reason now: it shows none for a silent request.
        """
        held, self._held = self._held or [], None
        self._notice.clear()
        shown = [self._refuse(channel, parts, reason) for channel, parts in held]
        return any(shown)

    def drop_held(self, reason: str) -> None:
        """The same while the kernel still waits: what is sent from now on is held again."""
        if self._held is not None:
            kept = [(channel, parts) for channel, parts in self._held if channel != "shell" or not _is_cell(parts)]
            self.refuse_held(reason)
            self._held, self._held_bytes = kept, sum(len(part) for _channel, parts in kept for part in parts)

    def _refuse(self, channel: str, parts: list[bytes], reason: str) -> bool:
        """Refuse a message if it is a cell; return whether the frontend shows the reason."""
        if channel != "shell" or not _is_cell(parts):
            return False
        self._refuse_cell(messages.header_of(parts), reason)
        return not _is_silent(parts)

    def _clear_failure(self) -> None:
        """The kernel is no longer dead."""
        self.failure, self._failure_queued, self.failure_shown = "", False, False

    def _report_failure(self) -> None:
        """Call ``on_failure_sent`` once the frontend has all; one that is away has it after its next websocket.

        The frontend gets the reason: one that reads the kernel's model, from there; any other, under its cell. The
        status ``dead`` would make it forget the kernel, after which it shows no reason and no reply: its cells would
        not end. So it gets that only when the kernel is removed, soon after this.
        """
        if self._reporting is not None:
            self._reporting.cancel()
        if self._sink is not None:
            self._reporting = self._tasks.create_task(self._report_when_sent(self._sink))

    async def _report_when_sent(self, sink: Sink) -> None:
        await self._out.flushed.wait()
        if not self.failure or self._sink is not sink:
            return
        self.failure_shown = self.failure_shown or self._failure_queued or sink.reads_model
        self._on_failure_sent()
        if sink.reads_model:
            sink.end_dead(self.failure)

    def _answer_open(self, reason: str, name: str = "KernelDied") -> bool:
        """Answer with this reason all that the kernel's process had; return whether a cell was among it."""
        cells = {str(header.get("msg_id")): header for header in self._replay.cells.take()}
        had_cells = bool(cells)
        for request in self._requests.take():
            cells.pop(str(request.header.get("msg_id")), None)
            self._refuse_request(request, reason, name)
        for header in cells.values():  # an earlier server passed them on
            self._refuse_cell(header, reason, name)
        self._replay.acknowledge_cells()
        return had_cells

    def _refuse_request(self, request: Request, reason: str, name: str = "KernelDied") -> None:
        if request.header.get("msg_type") == "execute_request" and not request.is_replied:
            self._refuse_cell(request.header, reason, name)
            return
        if request.reply_type:
            error = {"status": "error", "ename": name, "evalue": reason, "traceback": [reason]}
            self._put(request.channel, self._make_message(request.reply_type, error, request.header)[1])
        # Without a reply, or after it, a frontend still waits for this.
        self._put(*self._make_message("status", {"execution_state": "idle"}, request.header))

    def _refuse_cell(self, header: dict[str, Any], reason: str, name: str = "KernelDied") -> None:
        error = {"ename": name, "evalue": reason, "traceback": [reason]}
        self._put(*self._make_message("error", error, header))
        self._send_reply(header, {"status": "error", "execution_count": None, **error})
        self._put(*self._make_message("status", {"execution_state": "idle"}, header))

    def _send_reply(self, header: dict[str, Any], content: dict[str, Any]) -> None:
        """Send a reply that is made here. With it the cell is over: a kernel that never had it would stay busy."""
        msg_id = str(header.get("msg_id"))
        self._requests.remove(msg_id)
        self._state.replied(msg_id)
        self._put("shell", self._make_message("execute_reply", content, header)[1])

    def _make_message(
        self, msg_type: str, content: dict[str, Any], parent: dict[str, Any] | None = None
    ) -> tuple[str, list[bytes]]:
        """A message of the server's own: iopub, and its parts."""
        message = self._session.msg(msg_type, content, parent=parent)
        return "iopub", [
            self._session.pack(message[name]) for name in ("header", "parent_header", "metadata", "content")
        ]

    # -- the kernel ---------------------------------------------------------------------------

    async def _connect(self) -> None:
        reason = await self._ready()
        if reason:
            self.fail(reason)
            return
        self._replay = self._make_replay()
        self._replay.begin(self._session.session, self._send_lost_reply)
        # A cell of an earlier server's that still runs: warnings wait for no other.
        self.last_cell = self._replay.cells.running()
        if self.last_cell:
            self._on_cell()
        self._open()
        await self._continue()

    def hold(self, reason: str, name: str = "KernelRestarted") -> None:
        """The kernel is being restarted: hold what the frontend sends until the new process publishes to it.

        What the old process had is answered with the reason, and no longer reaches the new one, which answers requests
        for the kernel's info: JupyterLab takes no second answer to those.
        """
        self._clear_failure()
        if self._held is None:
            self._held = [(request.channel, request.parts) for request in self._requests.take_repeatable()]
            self._held_bytes = 0
        self._answer_open(reason, name)
        for channel in ("shell", "control", "stdin"):
            if socket := self._sockets.pop(channel, None):
                socket.close()
        self._restarted = True
        self._subscribed.clear()

    def follow_restart(self, reason: str) -> None:
        """The restarter begins to restart the kernel: hold what the frontend sends, as for a restart by the user.

        The answers come first: at "restarting" JupyterLab forgets its requests.
        """
        self.hold(reason, "KernelDied")
        self.send_status("restarting")
        self._tasks.create_task(self.resume())

    async def resume(self) -> None:
        """The restart is over. Sockets subscribe again by themselves, unless the kernel has another address.

        Does nothing if the channels were closed meanwhile.
        """
        if self._closed:
            return
        self._clear_failure()  # also that of a first restart that failed while a second one was under way
        self._open()
        await self._continue()

    def reconnect(self) -> None:
        """The restart that is under way has given the kernel another address."""
        if self._sockets:
            self._close_sockets()
            self._open()

    def _close_sockets(self) -> None:
        for socket in self._sockets.values():
            socket.close()
        self._sockets.clear()

    async def _continue(self) -> None:
        await self._wait_subscribed()
        if self._closed:
            return
        async with self._catching_up:
            if self._replay.is_behind:
                await self._replay_missed()
                self.send_status(self.kernel.execution_state)
        if not self.failure:
            held, self._held = self._held or [], None
            self._notice.clear()
            for channel, parts in held:
                self._send(channel, parts)
            if self._finding is not None:
                self._finding.cancel()
            finding = self._replay.find_lost_cells(partial(self._nudge, "shell"), self._refuse_lost)
            self._finding = self._tasks.create_task(finding)

    async def _replay_missed(self) -> None:
        """Queue what the session has not had: the kept messages, then those that came meanwhile."""
        session = self._session
        missed = await self._replay.missed_messages(set(self._out.ids()), session.sign, self.log)
        if missed.dropped:
            # Under the cell of the first message that is left, where a frontend shows the output.
            parent = messages.parent_header_of(missed.kept[0][0]) if missed.kept else None
            self._put(*self._make_message("stream", {"name": "stderr", "text": missed.dropped_text}, parent or None))
        for parts, msg_id in missed.kept:
            self._deliver_iopub(parts, msg_id, kept=True)
        for channel, parts in missed.live:
            self._deliver(channel, parts)
        self._replay.finish()

    def _open(self) -> None:
        self._session.key = self.kernel.session.key
        identity = self._session.bsession
        for channel in messages.CHANNELS:
            if channel not in self._sockets:
                received, renewed = partial(self._from_kernel, channel), partial(self._renewed, channel)
                self._sockets[channel] = KernelSocket(self.kernel, channel, identity, received, renewed)

    def _send(self, channel: str, parts: list[bytes]) -> None:
        if channel not in self._sockets:
            return
        try:
            self._sockets[channel].send([DELIM, self._session.sign(parts[:4]), *parts])
        except messages.MessageError as error:
            if channel == "shell" and _is_cell(parts):
                self._refuse(channel, parts, f"the kernel does not take this cell: {error}")
            elif self._sink is not None:
                self._sink.end(str(error))
            return
        header = messages.header_of(parts)
        if header.get("msg_id") not in self._nudges:
            self._requests.add(channel, header, parts)
        if channel == "shell" and header.get("msg_type") == "execute_request":
            self._state.sent(header)
            if self._replay.cells.add_request(header):
                self._replay.acknowledge_cells()

    def _renewed(self, channel: str) -> None:
        """The kernel sent something that ended its connection for good, and there is a new one."""
        self.log.warning(
            "kernel %s: its connection for %s was ended by a message that is malformed or too large, and made again",
            self.kernel.kernel_id,
            channel,
        )
        text = (
            f"\ngateway_slurm: the kernel's connection for {channel} was ended by a message that is malformed or too "
            "large (SlurmMappingKernelManager.max_message_size), and made again; messages may be missing\n"
        )
        self.warn(text, self.last_cell)
        if channel == "iopub":
            self._replay.subscription_lost()
            self._subscribed.clear()
        elif channel == "shell":
            self._replay.shell_lost()
        if channel in ("iopub", "shell") and self._held is None:  # else a restart is under way, and continues later
            self._tasks.create_task(self._continue())

    async def _wait_subscribed(self) -> None:
        """Wait until the kernel publishes to this session: its welcome message (JEP 65), or any other, proves it.

        A kernel without a welcome message is sent requests that make it publish something.
        """
        delays = Backoff(NUDGE_DELAY, MAX_NUDGE_DELAY)
        deadline = asyncio.get_running_loop().time() + self._subscribe_timeout
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._subscribed.wait(), delays.next())
                return
            if asyncio.get_running_loop().time() > deadline:
                self.log.warning("kernel %s: no message came on iopub; continuing", self.kernel.kernel_id)
                return
            self._nudge("control")

    def _nudge(self, channel: str) -> str:
        """Request the kernel's info, only to make the kernel answer; return the request's id."""
        parts = self._make_message("kernel_info_request", {})[1]
        if len(self._nudges) > HELD_COUNT:
            self._nudges.clear()
        msg_id = str(messages.header_of(parts)["msg_id"])
        self._nudges.add(msg_id)
        self._send(channel, parts)
        return msg_id

    def _from_kernel(self, channel: str, frames: list[bytes]) -> None:
        parts = messages.parts_of(frames)
        if self._is_for_server(channel, parts):
            if channel == "shell":
                self._replay.on_probe_reply(messages.parent_id(parts))
        elif not self._replay.hold_back(channel, parts):
            self._deliver(channel, parts)

    def _deliver(self, channel: str, parts: list[bytes]) -> None:
        if channel == "iopub":
            self._deliver_iopub(parts, self._replay.id_of(parts))
            return
        request = messages.parent_id(parts)
        self._requests.on_reply(request)
        if channel != "shell":
            self._put(channel, parts)
            return
        self._state.replied(request)
        if self._replay.on_reply(request):
            self._put(channel, parts, cell=request)

    def _deliver_iopub(self, parts: list[bytes], msg_id: str, *, kept: bool = False) -> None:
        begins = bool(parts) and b'"execute_input"' in parts[0]
        if begins:
            self.last_cell = messages.parent_header_of(parts)
        elif parts and b'"status"' in parts[0] and messages.content_of(parts).get("execution_state") == "idle":
            self._requests.on_idle(messages.parent_id(parts))
        self._replay.on_iopub(parts, msg_id, kept=kept)
        self._put("iopub", parts, msg_id)
        if begins:
            self._on_cell()

    def _is_for_server(self, channel: str, parts: list[bytes]) -> bool:
        """Whether a message is the welcome or a nudge's answer. Sets ``_subscribed`` if the message proves it."""
        waits = channel == "iopub" and not self._subscribed.is_set()
        for_server = (waits and messages.header_of(parts).get("msg_type") == "iopub_welcome") or (
            bool(self._nudges) and messages.parent_id(parts) in self._nudges
        )
        if waits and (for_server or not self._restarted):
            self._subscribed.set()
        return for_server

    def _send_lost_reply(self, header: dict[str, Any], content: dict[str, Any]) -> None:
        """Send the reply to a cell whose own reply was lost."""
        if not self.failure:
            self._send_reply(header, content)

    def _refuse_lost(self, headers: list[dict[str, Any]]) -> None:
        for header in headers:
            self._refuse_cell(header, "the kernel never got this cell: run it again", "CellLost")

    # -- the queue to the frontend ---------------------------------------------------------------

    def _put(self, channel: str, parts: list[bytes], msg_id: str = "", cell: str = "") -> None:
        self._out.put(QueuedMessage(channel, parts, msg_id, cell))
        if self._out.queued > QUEUE_LIMIT:
            # Stop reading the kernel's iopub while the frontend is there; drop the oldest output while it is away.
            if self._sink is None:
                self._out.drop_oldest()
            elif "iopub" in self._sockets:
                self._sockets["iopub"].pause()
        self._wake.set()

    def _read_iopub(self) -> None:
        if "iopub" in self._sockets:
            self._sockets["iopub"].resume()

    async def _pump(self) -> None:
        """Hand the queue to the websocket, no faster than the websocket writes."""
        unflushed = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._out and self._sink is not None:
                item = self._out.take()
                written = self._sink.write(item.channel, item.parts)
                self._out.track(item, written)
                if written is None:  # the websocket is closed, and will detach
                    break
                unflushed += item.size
                if unflushed > FLUSH_BYTES:
                    await asyncio.wait({written})
                    unflushed = 0
                if self._out.queued < QUEUE_LIMIT // 2:
                    self._read_iopub()

    async def flushed(self) -> None:
        """Wait until the frontend, if it is there, has all that is queued."""
        if self._sink is not None:
            await self._out.flushed.wait()

    def close(self, reason: str) -> None:
        self._closed = True
        self._subscribed.set()  # no message will come
        self._tasks.cancel()
        self._close_sockets()
        self._out.clear()
        self._replay.end()
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.end(reason)


def _is_cell(parts: list[bytes]) -> bool:
    return messages.header_of(parts).get("msg_type") == "execute_request"


def _is_silent(parts: list[bytes]) -> bool:
    """Whether a frontend shows no output of the request."""
    return bool(messages.content_of(parts).get("silent"))
