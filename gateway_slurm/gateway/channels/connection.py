"""A server's connection to one kernel, also before the kernel exists: all of its frontends share it.

What frontends send while the kernel waits in Slurm's queue, or is being restarted, is held and then sent in order: a
cell that is run early runs once the kernel exists, and its output is complete. What the kernel publishes is read once,
into one window, in which each session has its own place.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from types import MappingProxyType
from typing import Any

from jupyter_client.session import DELIM
from jupyter_client.session import Session as Signer

from gateway_slurm._util import Backoff, TaskSet, call_on, printable
from gateway_slurm.budget import Budget
from gateway_slurm.errors import LinkError
from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.lost import LostReplies
from gateway_slurm.gateway.channels.notice import WaitingNotice
from gateway_slurm.gateway.channels.requests import Request, Requests
from gateway_slurm.gateway.channels.session import Session, Sink
from gateway_slurm.gateway.channels.signatures import Signatures, is_large
from gateway_slurm.gateway.channels.sockets import KernelSocket
from gateway_slurm.gateway.channels.sources import JournalSource, SocketSource
from gateway_slurm.gateway.channels.state import ExecutionState
from gateway_slurm.gateway.channels.window import OVERHEAD, OWN_REQUEST, Published, Window
from gateway_slurm.gateway.executions import Executions
from gateway_slurm.link import wire
from gateway_slurm.link.journal import JournalHeader, JournalReading, Record
from gateway_slurm.provisioner import SlurmProvisioner

# Messages that are held for a kernel.
HELD_COUNT = 10_000
# Sessions without a frontend that a kernel keeps; the one that went first is closed first.
MAX_AWAY = 20
# Seconds before the first and between later requests that make a kernel publish something.
NUDGE_DELAY, MAX_NUDGE_DELAY = 0.05, 1.0
# Seconds between two acknowledgements; the first one does not wait.
ACK_INTERVAL = 0.02
READ_KEY = " read"
"""The key, among the positions, of the number up to which the server has processed. No session has this id."""
# Warnings that wait for a kernel's first cell; older ones are only in the log.
MAX_EARLY_WARNINGS = 8
# Seconds of each wait for a frontend that has fallen behind.
WAIT_SECONDS = 0.02
# Seconds between a reply and the status "idle", which comes by another connection, before it is taken for lost.
IDLE_GRACE = 1.0


class KernelConnection:
    """The sockets, the window, the executions and the sessions of one kernel. ``close`` ends them.

    ``manager`` is the server's kernel manager. ``ready`` waits until the kernel exists and returns "", or the reason
    why it never will. ``on_failure_sent`` is called each time a frontend has all that was meant for it, and the kernel
    is dead. With ``is_restored`` the kernel, and its sessions, are those of an earlier server.
    """

    def __init__(
        self,
        manager: Any,
        kernel: Any,
        *,
        ready: Callable[[], Awaitable[str]],
        state: ExecutionState,
        on_failure_sent: Callable[[], None] = lambda: None,
        is_restored: bool = False,
    ) -> None:
        self._manager, self.kernel, self.log = manager, kernel, manager.log
        self._ready, self._state, self._on_failure_sent = ready, state, on_failure_sent
        self.window, self.is_known = Window(), False
        self.user: str = manager.owner_of(kernel.kernel_id)
        self.budget: Budget = manager.budget
        self._window_holding = self.budget.holding(self.user, "window", self._shed_window)
        self._executions_holding = self.budget.holding(self.user, "executions", self._shed_executions)
        self._held_holding = self.budget.holding(self.user, "held")
        self._requests_holding = self.budget.holding(self.user, "to_kernel")
        self.executions, self.sessions = Executions(), dict[str, Session]()
        self.folding = asyncio.Lock()  # one reading for the executions at a time
        self._requests, self._signer = Requests(), Signer()  # which has no key
        self._signatures, self._refused_count = Signatures(kernel), 0
        self._lost = LostReplies(self)
        self._source: JournalSource | SocketSource | None = None
        self._sockets: dict[str, KernelSocket] = {}
        # Messages for the kernel, each with its session and channel; None while they are sent at once.
        self._held: list[tuple[Session, str, list[bytes]]] | None = []
        self._notices: dict[str, WaitingNotice] = {}
        self.failure = ""
        # The header of the request whose cell the kernel began last.
        self.last_cell: dict[str, Any] = {}
        self._early_warnings: deque[str] = deque(maxlen=MAX_EARLY_WARNINGS)
        # Set once the kernel's present process has published something: from then on it is heard.
        self._heard = asyncio.Event()
        # After a restart, messages of the old process do not prove that the new one is heard.
        self._awaits_process = False
        self._has_gap = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self._moved = asyncio.Event()  # a frontend has taken something
        self._positions: dict[str, int] | None = None  # the last acknowledgement's
        self._acked_at = 0.0
        self._ack_timer: asyncio.TimerHandle | None = None
        self._is_acking = self._closed = False
        self._is_restored, self._journal_next = is_restored, 0
        # The kernel exists; its sockets are opened for its first session, since most kernels of a restart have none.
        self._exists = self._is_open = False
        self.restored = asyncio.Event()
        """Set once the sessions and the executions of a restored kernel are known."""
        if not is_restored:
            self.restored.set()
        self._tasks = TaskSet()
        self._tasks.create_task(self._connect())

    # -- sessions ---------------------------------------------------------------------------------

    def session(self, session_id: str) -> Session:
        """The session of this id, made by the first call: it gets what the kernel publishes from now on."""
        if session_id not in self.sessions:
            self.sessions[session_id] = Session(self, session_id, self.newest if self.is_known else -1)
            self._open_for_sessions()
        return self.sessions[session_id]

    def _open_for_sessions(self) -> None:
        if self._exists and not self._is_open and self.sessions and not self._closed:
            self._open()
            self._tasks.create_task(self._continue())

    def attached(self, session: Session, sink: Sink) -> None:
        """A websocket of the session has opened."""
        if self.failure:
            if not sink.reads_model:
                self._send_status(session, "starting")
        elif self._held is not None:
            self._send_status(session, self.kernel.execution_state or "starting")
        for execution in self.executions.open():
            if execution.input is not None and not self._is_here(execution.session):
                self._ask(session, execution)

    def detached(self, session: Session) -> None:
        """A websocket has closed. Close the sessions that went first, where there are too many without a frontend."""
        if session.id in self.sessions and not session.is_attached:
            self.sessions[session.id] = self.sessions.pop(session.id)  # the last one now
        away = [other for other in self.sessions.values() if not other.is_attached]
        for other in away[:-MAX_AWAY]:
            del self.sessions[other.id]
            other.close("too many other sessions went away after it")
        if self._source is not None:  # it may have waited for the one that went
            self._source.pace(self._lag())

    def _is_here(self, session_id: str | None) -> bool:
        session = self.sessions.get(session_id or "")
        return session is not None and session.is_attached

    def progressed(self, session: Session) -> None:
        """The session's websocket has written something."""
        self._moved.set()
        self._acknowledge_soon()
        if self._source is not None:
            self._source.pace(self._lag())
        if self.failure and not session.has_unsent:
            self._report_failure(session)

    def dropped(self, msg_ids: list[str]) -> None:
        """Replies were dropped, because their user had too much: the cells among them get a short one."""
        for execution in map(self.executions.get, msg_ids):
            if execution is not None and execution.ended:
                execution.is_replied = False
        self._lost.doubt()
        self._lost.find()

    def _lag(self) -> int:
        return min((session.lag for session in self.sessions.values() if session.is_attached), default=0)

    def from_client(self, session: Session, channel: str, parts: list[bytes]) -> None:
        """Take a message for the kernel."""
        if self.failure:
            session.failure_queued |= self._refuse(session, channel, parts, self.failure)
            self.progressed(session)
        elif self._held is None:
            self._send(session, channel, parts)
        elif len(self._held) >= HELD_COUNT:
            self._refuse(session, channel, parts, "too much was sent before the kernel had started: run it later")
        elif not self._held_holding.try_add(_size(parts)):
            self._refuse(session, channel, parts, self._held_holding.refusal())
        else:
            self._held.append((session, channel, parts))
            if channel == "shell" and _is_cell(parts) and not _is_silent(parts):
                self._notice_of(session).cell_held(messages.header_of(parts))

    # -- messages of the server's own -----------------------------------------------------------------

    def _make(self, msg_type: str, content: dict[str, Any], parent: dict[str, Any] | None = None) -> list[bytes]:
        return messages.make(self._signer, msg_type, content, parent)

    def _publish(self, session: Session, kind: str, content: dict[str, Any], parent: dict[str, Any]) -> None:
        session.put("iopub", self._make(kind, content, parent))

    def _send_status(self, session: Session, state: str, parent: dict[str, Any] | None = None) -> None:
        self._publish(session, "status", {"execution_state": state}, parent or {})

    def send_status(self, state: str) -> None:
        """Send all frontends the kernel's state, where the kernel itself cannot."""
        for session in self.sessions.values():
            self._send_status(session, state)

    async def send_dead(self) -> None:
        """Send the status ``dead``, and wait until all frontends that are there have all that is meant for them."""
        self.send_status("dead")
        await self.flushed()

    async def flushed(self) -> None:
        """Wait until all frontends that are there have all that is meant for them."""
        await asyncio.gather(*(session.flushed() for session in self.sessions.values()))

    def warn(self, text: str) -> None:
        """Show a text on stderr under the cell that the kernel began last; before the first cell it waits for that."""
        if not self.last_cell:
            self._early_warnings.append(text)
        elif not self.failure:
            for session in self.sessions.values():
                self._publish(session, "stream", {"name": "stderr", "text": text}, self.last_cell)

    def show_waiting(self, text: str) -> None:
        """Show under each session's first cell that is held why the kernel is not there yet."""
        for session in self.sessions.values():
            if self._held is not None and session.is_attached:
                self._notice_of(session).set_text(text)

    def _notice_of(self, session: Session) -> WaitingNotice:
        return self._notices.setdefault(session.id, WaitingNotice(partial(self._publish, session)))

    def _take_held(self) -> list[tuple[Session, str, list[bytes]]]:
        """What is held, which is not held any more."""
        held, self._held = self._held or [], None
        self._held_holding.set(0)
        for notice in self._notices.values():
            notice.clear()
        self._notices.clear()
        return held

    def instead_of(self, session: Session, after: int, upto: int, parent: dict[str, Any]) -> list[list[bytes]]:
        """What a session gets in place of the messages after ``after`` up to ``upto``, which are lost."""
        content = {"name": "stderr", "text": wire.missed_text(upto - after)}
        made = [self._make("stream", content, parent or self.last_cell)]
        for execution in self.executions.ended_between(after, upto):
            if execution.session == session.id:
                made.append(self._make("status", {"execution_state": "idle"}, execution.header))
        return made

    # -- a dead kernel ------------------------------------------------------------------------------

    def fail(self, reason: str) -> None:
        """The kernel is dead: answer all cells that wait with the reason, and later ones with the last reason."""
        was_dead, self.failure = bool(self.failure), reason
        self._set_restored("")  # a launcher that is gone says no more
        if was_dead:
            return
        self._answer_open(reason, "KernelDied", "died")
        self.refuse_held(reason)
        for session in list(self.sessions.values()):
            self.progressed(session)

    def refuse_held(self, reason: str) -> None:
        """Answer with this reason all cells that are held for the kernel; they will not be sent to it."""
        for session, channel, parts in self._take_held():
            session.failure_queued |= self._refuse(session, channel, parts, reason)

    def _drop_held(self, reason: str) -> None:
        """The same while the kernel still waits: what is sent from now on is held again."""
        if self._held is not None:
            kept = [item for item in self._held if item[1] != "shell" or not _is_cell(item[2])]
            self.refuse_held(reason)
            self._held = kept
            self._held_holding.set(sum(_size(parts) for _session, _channel, parts in kept))

    def _refuse(self, session: Session, channel: str, parts: list[bytes], reason: str) -> bool:
        """Refuse a message if it is a cell; return whether the frontend shows the reason."""
        if channel != "shell" or not _is_cell(parts):
            return False
        self.refuse_cell(session, messages.header_of(parts), reason)
        return not _is_silent(parts)

    def refuse_cell(self, session: Session, header: dict[str, Any], reason: str, name: str = "KernelDied") -> None:
        """Answer a cell with an error."""
        error = {"ename": name, "evalue": reason, "traceback": [reason]}
        self._publish(session, "error", error, header)
        self.send_reply(session, header, {"status": "error", "execution_count": None, **error})
        self._send_status(session, "idle", header)

    def send_reply(self, session: Session, header: dict[str, Any], content: dict[str, Any]) -> None:
        """Send a reply that is made here. With it the cell is over: a kernel that never had it would stay busy."""
        msg_id = str(header.get("msg_id"))
        self._requests.remove(msg_id)
        self._state.replied(msg_id)
        self.executions.replied(msg_id, content)
        session.put("shell", self._make("execute_reply", content, header))
        self._acknowledge_soon()

    def _answer_open(self, reason: str, name: str, status: str) -> None:
        """Answer with this reason all that the kernel's process had; note whose frontend has it then."""
        cells = {execution.msg_id: execution for execution in self.executions.interrupted_all(status, reason)}
        for request in self._requests.take():
            execution = cells.pop(request.msg_id, None)
            if session := self.sessions.get(request.session):
                session.failure_queued |= execution is not None
                self._refuse_request(session, request, reason, name)
        for execution in cells.values():  # an earlier server passed them on
            if not execution.is_replied and (session := self.sessions.get(execution.session or "")):
                self.refuse_cell(session, execution.header, reason, name)
                session.failure_queued = True
        self._lost.forget()
        self._acknowledge_soon()

    def _refuse_request(self, session: Session, request: Request, reason: str, name: str) -> None:
        self._send_waiting_reply(request, self.window.next - 1)
        if request.header.get("msg_type") == "execute_request" and not request.is_replied:
            self.refuse_cell(session, request.header, reason, name)
            return
        if request.reply_type:
            error = {"status": "error", "ename": name, "evalue": reason, "traceback": [reason]}
            session.put(request.channel, self._make(request.reply_type, error, request.header))
        # Without a reply, or after it, a frontend still waits for this.
        self._send_status(session, "idle", request.header)

    def _report_failure(self, session: Session) -> None:
        """A frontend has all that was meant for it.

        It has the reason, too: one that reads the kernel's model, from there; any other, under its cell. The status
        ``dead`` would make it forget the kernel, after which it shows no reason and no reply: its cells would not end.
        So it gets that only when the kernel is removed, soon after this.
        """
        sink = session.sink
        if sink is None:
            return
        session.failure_shown = session.failure_shown or session.failure_queued or sink.reads_model
        self._on_failure_sent()
        if sink.reads_model:
            sink.end_dead(self.failure)

    def _clear_failure(self) -> None:
        self.failure = ""
        for session in self.sessions.values():
            session.failure_queued = session.failure_shown = False

    # -- start and restart ----------------------------------------------------------------------------

    async def _connect(self) -> None:
        reason = await self._ready()
        if reason:
            self._set_restored("")
            self.fail(reason)
            return
        self._exists = True
        if self._source is None:
            self._open_source()
        self._open_for_sessions()

    def _open_source(self) -> None:
        provisioner = getattr(self.kernel, "provisioner", None)
        if isinstance(provisioner, SlurmProvisioner) and provisioner.has_journal:
            self._source = JournalSource(
                provisioner,
                next_number=self._next_number,
                on_header=self._on_header,
                holding=partial(self.budget.holding, self.user, "reading"),
                on_skipped=self._skipped,
                take=self.take,
                wait=self._wait_for_slow_readers,
                turn=self.turn,
                check=self.check_large,
                log=self.log,
            )
        else:
            first = self.window.next
            self._source = SocketSource(
                self.kernel,
                first=first,
                take=self.take,
                holding=self.budget.holding(self.user, "window"),
                on_renewed=partial(self._renewed, "iopub"),
                post=self.post,
            )
            self._set_known(first)
            self._set_restored("")
        self.window.limit = self._source.window_bytes

    def _skipped(self, size: int, reason: str) -> None:
        """A message of the kernel's was left out."""
        self.warn(f"\ngateway_slurm: an output of {size >> 20} MiB is left out: {reason}\n")

    def _set_restored(self, state: str) -> None:
        if not self.restored.is_set():
            self.restored.set()
            self._state.restored(state)

    def _next_number(self) -> int | None:
        """Where to read on. A new kernel is read from its first word; a restored one, from where its server was."""
        return None if self._is_restored and not self.is_known else self.window.next

    def _set_known(self, start: int, positions: Mapping[str, int] = MappingProxyType({})) -> None:
        """The next number is known, and so is where each session is; ``positions`` are an earlier server's."""
        if self.is_known:  # a source that goes on
            return
        self.window.next, self.is_known = max(start, self.window.next), True
        for session_id in [name for name in positions if name not in self.sessions]:
            self.sessions[session_id] = Session(self, session_id, -1)
        for session in self.sessions.values():
            if session.position < 0:
                session.position = positions.get(session.id, self.window.next - 1)
            session.go_to(session.position)
            session.push()
        self._open_for_sessions()

    @property
    def newest(self) -> int:
        """The number of the last message, as far as it is known."""
        return max(self.window.next, self._journal_next) - 1

    def _on_header(self, header: JournalHeader) -> None:
        """Reading begins, the first time or again."""
        if header.subscribed and header.start >= header.next and not self._awaits_process:
            self._heard.set()
        if header.trouble:
            self.log.warning("kernel %s: its output is lost: %s", self.kernel.kernel_id, printable(header.trouble))
            self.warn(f"\ngateway_slurm: the kernel's output is lost: {header.trouble}; restart it\n")
        if self.is_known:
            return
        self.executions.restore(header.notes, header.start - 1)
        self._journal_next = header.next
        self._set_known(header.start, {name: number for name, number in header.positions.items() if name != READ_KEY})
        running = [execution for execution in self.executions.open() if execution.started]
        self.last_cell = running[-1].header if running else {}
        self.executions.doubt_replies(header.positions)
        self._lost.doubt()
        self._set_restored("busy" if running else "idle")
        self._acknowledge_soon()

    def hold(self, reason: str, name: str = "KernelRestarted") -> None:
        """The kernel is being restarted: hold what the frontends send until the new process is heard.

        What the old process had is answered with the reason, and no longer reaches the new one, which answers requests
        for the kernel's info: JupyterLab takes no second answer to those.
        """
        self._clear_failure()
        if self._held is None:
            self._held = [
                (session, request.channel, request.parts)
                for request in self._requests.take_repeatable()
                if (session := self.sessions.get(request.session))
            ]
            self._answer_open(reason, name, "restarted")
        self._heard.clear()
        self._awaits_process, self._exists, self._refused_count = True, False, 0
        self._close_sockets()
        provisioner = getattr(self.kernel, "provisioner", None)
        if isinstance(provisioner, SlurmProvisioner):
            # A direct kernel may come back behind the tunnel: the journal's numbers go on where these end.
            if isinstance(self._source, SocketSource):
                self._source.close()
                self._source = None
            provisioner.has_delivered(self.newest)

    def follow_restart(self, reason: str) -> None:
        """The restarter begins to restart the kernel: hold what the frontends send, as for a restart by the user.

        The answers come first: at "restarting" JupyterLab forgets its requests.
        """
        self.hold(reason)
        self.send_status("restarting")
        self._tasks.create_task(self.resume())

    def restart_waiting(self, reason: str) -> None:
        """A user restarts a kernel that is not there yet: refuse the cells that wait for it, and say that it starts.

        The frontend that restarts a kernel forgets its cells, and shows "restarting" until it has another status.
        """
        self._drop_held(reason)
        self.send_status("starting")

    async def resume(self) -> None:
        """The restart is over. Does nothing if the connection was closed meanwhile."""
        if self._closed:
            return
        self._clear_failure()  # also that of a first restart that failed while a second one was under way
        self._exists = True
        if self._source is None:
            self._open_source()
        assert self._source is not None
        self._source.kernel_listens()
        if self.sessions:
            self._open()
            await self._continue()

    def reconnect(self) -> None:
        """The restart that is under way has given the kernel another address."""
        if self._sockets:
            self._close_sockets()
            self._open()
        if isinstance(self._source, SocketSource):
            self._source.close()
            self._open_source()

    async def _continue(self) -> None:
        await self._wait_heard()
        if self._closed or self.failure:
            return
        for session, channel, parts in self._take_held():
            self._send(session, channel, parts)
        self._lost.find()

    async def _wait_heard(self) -> None:
        """Wait until something of the kernel's present process has come: its welcome message (JEP 65), or any other.

        A kernel without a welcome message is sent requests that make it publish something.
        """
        delays = Backoff(NUDGE_DELAY, MAX_NUDGE_DELAY)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._manager.kernel_info_timeout
        while not self._closed:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._heard.wait(), delays.next())
                return
            if loop.time() > deadline:
                self.log.warning("kernel %s: no message came on iopub; continuing", self.kernel.kernel_id)
                return
            self.nudge("control")

    def nudge(self, channel: str) -> str:
        """Request the kernel's info, only to make the kernel answer; return the request's id."""
        msg_id = f"{OWN_REQUEST}{uuid.uuid4().hex}"
        header = {**self._signer.msg_header("kernel_info_request"), "msg_id": msg_id}
        self._send_to_kernel(channel, [self._signer.pack(part) for part in (header, {}, {}, {})])
        return msg_id

    # -- to the kernel ------------------------------------------------------------------------------

    def _open(self) -> None:
        self._is_open = True
        # The same for all servers that come after one another: a reply, or the answer to input(), finds the next one.
        identity = f"{OWN_REQUEST}{self.kernel.kernel_id}".encode()
        for channel in ("shell", "control", "stdin"):
            if channel not in self._sockets:
                received, renewed = partial(self._from_kernel, channel), partial(self._renewed, channel)
                holding = self.budget.holding(self.user, "to_kernel")
                self._sockets[channel] = KernelSocket(
                    self.kernel, channel, identity, received, holding, renewed, post=self.post
                )

    def _close_sockets(self) -> None:
        self._is_open = False
        for socket in self._sockets.values():
            socket.close()
        self._sockets.clear()

    def _send_to_kernel(self, channel: str, parts: list[bytes]) -> str:
        """Send a message; return why that is not possible, or ""."""
        if channel not in self._sockets:
            return ""
        try:
            self._sockets[channel].send([DELIM, self._signatures.sign(parts), *parts])
        except messages.MessageError as error:
            return str(error)
        return ""

    def _send(self, session: Session, channel: str, parts: list[bytes]) -> None:
        if error := self._send_to_kernel(channel, parts):
            if channel == "shell" and _is_cell(parts):
                self._refuse(session, channel, parts, f"the kernel does not take this cell: {error}")
            elif sink := session.sink:
                self.warn(f"\ngateway_slurm: {error}\n")
                sink.refuse(error)
            return
        header = messages.header_of(parts)
        self._requests.add(session.id, channel, header, parts)
        self._requests_holding.set(self._requests.size)
        if channel == "stdin":
            for execution in self.executions.open():
                if execution.input is not None:
                    self.executions.input_answered(execution.msg_id)
        elif channel == "shell" and header.get("msg_type") == "execute_request":
            self._state.sent(header)
            known = {**header, "session": session.id}
            self.executions.queued(known, messages.metadata_of(parts), silent=_is_silent(parts))
        self._acknowledge_soon()

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
        self.warn(text)
        if channel == "shell":
            self._lost.doubt()
            self._lost.find()

    # -- from the kernel ----------------------------------------------------------------------------

    def signing(self, parts: list[bytes]) -> Generator[None, None, list[bytes]]:
        """Sign a large message for the kernel, in steps; return its parts."""
        return self._signatures.signing(parts)

    async def check_large(self, records: list[Record]) -> list[Record]:
        """The records, with the signatures of the large ones checked, in turns of the kernel's owner."""
        if not any(is_large(record.frames) for record in records):
            return records
        turns, checking = self._manager.turns, self._signatures.checking
        return [
            replace(record, frames=await turns.run_steps(self.user, checking(record.frames)))
            if is_large(record.frames)
            else record
            for record in records
        ]

    def parse(self, record: Record) -> tuple[Published, dict[str, Any]]:
        """The message of a record, and its header. What the kernel has not signed has no content, and is hidden."""
        if record.frames and not self._signatures.is_valid(record.frames):
            self._refuse_unsigned("iopub")
            return Published(record.first, record.number, (), {}), {}
        return Published.parse(record.first, record.number, record.frames)

    def _refuse_unsigned(self, channel: str) -> None:
        """A message was not signed with the kernel's key. Say so for the first of the kernel's process."""
        self._refused_count += 1
        if self._refused_count > 1:
            return
        text = "kernel %s: a message on %s is ignored: it is not signed with the kernel's key"
        self.log.warning(text, self.kernel.kernel_id, channel)
        self.warn(
            f"\ngateway_slurm: a message on {channel} is not shown: it is not signed with the kernel's key. Another "
            "process may have taken the kernel's port; restart the kernel\n"
        )

    def post(self, function: Callable[[], object]) -> None:
        """Call the function, which takes some milliseconds at most, in a turn of the kernel's owner."""
        self._manager.turns.post(self.user, function)

    async def turn(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The same, and return what it returns."""
        return await self._manager.turns.run(self.user, function, *arguments)

    def _from_kernel(self, channel: str, frames: list[bytes]) -> None:
        if not self._signatures.is_valid(frames):
            self._refuse_unsigned(channel)
            return
        parts = messages.parts_of(frames)
        parent = messages.parent_header_of(parts)
        msg_id = str(parent.get("msg_id", ""))
        if msg_id.startswith(OWN_REQUEST):
            self._lost.on_probe_reply(msg_id)
            return
        execution = self.executions.get(msg_id)
        if channel == "stdin":
            content = messages.content_of(parts, "input_request")
            self.executions.input_requested(msg_id, content)
            asks = execution or self._requests.find(msg_id)
            for session in self._asked_sessions(asks.session if asks else str(parent.get("session"))):
                session.put(channel, parts)
            self._acknowledge_soon()
            return
        request = self._requests.find(msg_id)
        self._requests.on_reply(msg_id)
        if channel == "shell":
            self._state.replied(msg_id)
            if execution is not None:
                if execution.is_replied:  # by a reply that was made here
                    return
                self.executions.replied(msg_id, messages.content_of(parts, "execute_reply"))
                self._lost.on_reply(msg_id)
                self._acknowledge_soon()
        if channel == "shell" and request is not None and not request.is_idle:
            # What the kernel has published before the reply comes another way, and may be later.
            self._requests.keep_reply(request, parts)
            self._requests_holding.set(self._requests.size)
            asyncio.get_running_loop().call_later(IDLE_GRACE, self._send_waiting_reply, request)
            return
        owner = request.session if request else execution.session if execution else str(parent.get("session"))
        if owner in self.sessions:
            self.sessions[owner].put(channel, parts)

    def _send_waiting_reply(self, request: Request, after: int | None = None) -> None:
        """Send the reply that waits for the output before it: its status "idle" has come, or is late or lost."""
        parts = self._requests.take_reply(request)
        self._requests_holding.set(self._requests.size)
        if parts and not self._closed and (session := self.sessions.get(request.session)):
            session.put("shell", parts, after)
            if self._has_gap and after is None:
                self._look_for_idle()

    def _look_for_idle(self) -> None:
        if self._idle_timer is None and not self._closed:
            seen = self.window.next, [request.msg_id for request in self._requests.replied()]
            self._idle_timer = asyncio.get_running_loop().call_later(IDLE_GRACE, self._end_without_idle, seen)

    def _end_without_idle(self, seen: tuple[int, list[str]]) -> None:
        """The status "idle" after a reply was among the messages that are lost: frontends wait for it.

        The reply comes another way, and may be far before the output: nothing more must have come for a while.
        """
        self._idle_timer = None
        waiting = self._requests.replied()
        if waiting and seen != (self.window.next, [request.msg_id for request in waiting]):
            self._look_for_idle()
            return
        for request in waiting:
            self._send_waiting_reply(request, self.window.next - 1)
            self._requests.remove(request.msg_id)
            if session := self.sessions.get(request.session):
                self._send_status(session, "idle", request.header)

    def _asked_sessions(self, session_id: str | None) -> list[Session]:
        """Who may answer input(): the cell's own session, or, where its frontend has gone, any that is there."""
        own = self.sessions.get(session_id or "")
        here = [session for session in self.sessions.values() if session.is_attached]
        return [own] if own is not None and (own.is_attached or not here) else here

    def _ask(self, session: Session, execution: Any) -> None:
        session.put("stdin", self._make("input_request", dict(execution.input), execution.header))

    def take(self, records: Iterable[Record]) -> None:
        """Take what the kernel has published, in its order."""
        for record in records:
            if record.number >= self.window.next:
                self._take_record(record)
        self._executions_holding.set(self.executions.size)
        self._requests_holding.set(self._requests.size)
        for session in list(self.sessions.values()):
            if session.is_attached:
                session.push()
        self._acknowledge_soon()
        if self._source is not None:
            self._source.pace(self._lag())

    async def _wait_for_slow_readers(self) -> None:
        """Read on no faster than frontends that read: what the node drops meanwhile, they would miss."""
        loop = asyncio.get_running_loop()
        while slow := [session for session in self.sessions.values() if session.is_worth_waiting_for]:
            began = loop.time()
            self._moved.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._moved.wait(), WAIT_SECONDS)
            for session in slow:
                session.patience -= loop.time() - began

    def _take_record(self, record: Record) -> None:
        if record.first > self.window.next:
            self._has_gap = True
            if self._requests.replied():
                self._look_for_idle()
        item, header = self.parse(record)
        if not record.frames:
            self._begin_process()
        elif not header:  # malformed, or not the kernel's: it proves nothing
            pass
        elif item.is_hidden or not self._awaits_process:
            self._awaits_process = False
            if record.number + 1 >= self._journal_next:  # what was there before this server may be of an older process
                self._heard.set()
        self.window.add(item)
        self._window_holding.set(self.window.bytes)
        if item.is_hidden:
            self._lost.on_probe_published(str(item.parent.get("msg_id", "")))
            return
        try:
            self._process(item, header)
        except Exception:
            # The message of a hostile kernel must not end the reading; frontends get it as it is.
            self.log.exception("kernel %s: a message cannot be followed", self.kernel.kernel_id)

    def _shed_window(self, _reason: str) -> None:
        """The user has too much: what the window has is on the kernel's node as well, if there is a journal."""
        self.window.clear()
        self._window_holding.set(0)

    def _shed_executions(self, _reason: str) -> None:
        self.executions.drop_outputs()
        self._executions_holding.set(0)

    def _begin_process(self) -> None:
        """A new process of the kernel was started: what comes now is its."""
        self._heard.clear()
        self._awaits_process, self._refused_count = False, 0
        # Where this server has restarted the kernel, all is answered already.
        self._answer_open("the kernel was restarted: run the cell again", "KernelRestarted", "restarted")

    def _process(self, item: Published, header: dict[str, Any]) -> None:
        kind, parent, msg_id = str(header.get("msg_type")), item.parent, str(item.parent.get("msg_id", ""))
        state = str(messages.content_of(item.parts, kind).get("execution_state", "")) if kind == "status" else ""
        tracks = self._manager.track_message_type
        if tracks(kind) or tracks(parent.get("msg_type")) or self._state.is_busy:
            self._manager.last_kernel_activity = self.kernel.last_activity = datetime.now(timezone.utc)
        self.executions.published(item.first, item.number, kind, parent, item.parts)
        self._state.published(header, parent, state)
        if state == "idle":
            if request := self._requests.find(msg_id):
                self._send_waiting_reply(request, item.first - 1)
            self._requests.on_idle(msg_id)
            self._lost.on_idle(msg_id)
        elif kind == "execute_input":
            self.last_cell = parent
            while self._early_warnings:
                self.warn(self._early_warnings.popleft())

    # -- for the next server --------------------------------------------------------------------------

    @property
    def can_read(self) -> bool:
        """Whether the kernel's node has what has left the window."""
        return isinstance(self._source, JournalSource)

    def read(self, start: int, upto: int) -> JournalReading:
        """Read these numbers from the node. Raises LinkError where that is not possible."""
        if self._source is None:
            raise LinkError("the kernel is being restarted")
        return self._source.read(start, upto)

    def _acknowledge_soon(self) -> None:
        if self._ack_timer is None and not self._is_acking and not self._closed and self.can_read and self.is_known:
            loop = asyncio.get_running_loop()
            self._ack_timer = loop.call_at(max(self._acked_at + ACK_INTERVAL, loop.time()), self.acknowledge)

    def acknowledge(self) -> None:
        """Put on the kernel's node, for the next server, the position of each session and what the cells are."""
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        if not self.can_read or not self.is_known:
            return
        positions = {READ_KEY: self.window.next - 1}
        positions |= {session.id: max(0, session.position) for session in self.sessions.values()}
        notes = self.executions.changed_notes()
        if positions == self._positions and not notes:
            return
        loop = asyncio.get_running_loop()
        self._positions, self._acked_at = positions, loop.time()
        if sending := self.kernel.provisioner.acknowledge(positions, notes):
            # One at a time: while the service is busy, later ones are put together rather than queued.
            self._is_acking = True
            sending.add_done_callback(lambda _done: call_on(loop, self._was_acknowledged))

    def _was_acknowledged(self) -> None:
        self._is_acking = False
        self._acknowledge_soon()

    def close(self, reason: str) -> None:
        self._closed = True
        self._heard.set()
        if self._ack_timer is not None:
            self._ack_timer.cancel()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._tasks.cancel()
        self._lost.forget()
        if self._source is not None:
            self._source.close()
        self._close_sockets()
        self.restored.set()
        for session in self.sessions.values():
            session.close(reason)
        self.sessions.clear()
        for holding in (self._window_holding, self._executions_holding, self._held_holding, self._requests_holding):
            holding.close()


def _size(parts: list[bytes]) -> int:
    return OVERHEAD + sum(map(len, parts))


def _is_cell(parts: list[bytes]) -> bool:
    return messages.header_of(parts).get("msg_type") == "execute_request"


def _is_silent(parts: list[bytes]) -> bool:
    """Whether a frontend shows no output of the request. None with a large content is silent."""
    return len(parts[3]) <= messages.MAX_PARSED and bool(messages.content_of(parts).get("silent"))
