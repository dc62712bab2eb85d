"""What the cells of one kernel have come to: their states and their outputs, whatever becomes of the pages. Pure.

It follows the requests that the server passes on, the replies, and every message on iopub once. A page, or a script,
that was away asks for it. Outputs are folded later, some at a time: until then the messages' bytes are kept.
A later server restores the states from notes, and reads the outputs again from the kernel's journal.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from typing import Any, Final, NamedTuple, TypeGuard

from gateway_slurm.bounded_json import load_json, loading
from gateway_slurm.gateway.folding import DEFAULT_LIMIT, OUTPUT_TYPES, Fold, count_of, display_id_of

# Executions that are remembered; those that are not over stay beyond it, up to MAX_OPEN.
MAX: Final = 200
MAX_OPEN: Final = 10_000
# Characters of outputs, of all executions of a kernel.
MAX_OUTPUT: Final = 32 << 20
# Bytes of messages that wait for their folding: where it begins, and where they are left out.
FOLD_BYTES: Final = 256 << 10
MAX_PENDING: Final = 8 << 20
# Messages of one stream that are parsed and folded together, and their bytes.
MAX_RUN: Final = 256
RUN_BYTES: Final = 64 << 10
# Bytes of a content that is parsed at once; a larger one is taken apart in steps. Bytes of an error's.
WHOLE: Final = 64 << 10
MAX_ERROR_CONTENT: Final = 1 << 20
# Messages that are folded in one step, and steps, when a user asks for the outputs.
STEP_MESSAGES: Final = 64
MAX_STEPS: Final = 1000
# Bytes of a message's content that is folded; a larger one is beyond the limit of a cell.
MAX_CONTENT: Final = DEFAULT_LIMIT
# Seconds that the folding of waiting messages takes at once.
FOLD_SECONDS: Final = 0.004
# Times as long it pauses then: the loop has other work.
FOLD_PAUSE: Final = 4
# What a message costs beside its content.
_MESSAGE_COST: Final = 256
# Characters of a note (SlurmProvisioner.acknowledge), of an id, and of what is kept of a text.
MAX_NOTE, MAX_ID, MAX_TEXT = 4000, 200, 1000
# Characters of an error that a reply which is made here has.
MAX_ERROR: Final = 64 << 10

QUEUED, RUNNING = "queued", "running"
OPEN: Final = (QUEUED, RUNNING)
STATUSES: Final = (*OPEN, "ok", "error", "aborted", "restarted", "died", "refused", "lost")
_REPLY_STATUSES: Final = {"ok": "ok", "error": "error", "aborted": "aborted", "abort": "aborted"}
# The name of the error in a reply, where the server ends an execution.
ERROR_NAMES: Final = {
    "restarted": "KernelRestarted",
    "died": "KernelDied",
    "refused": "CellRefused",
    "lost": "CellLost",
}
# The fields of a request's header with which a reply to it is made.
_HEADER_FIELDS: Final = ("msg_id", "msg_type", "session", "username", "date", "version", "subshell_id")
# Types of messages that are folded; an update also where its parent is no cell.
_FOLDED: Final = OUTPUT_TYPES | {"update_display_data", "clear_output"}
_DISPLAYS: Final = frozenset({"display_data", "execute_result", "update_display_data"})
_FOLLOWED: Final = _FOLDED | {"status", "execute_input"}
# As kernels write it: the header has one field of that name.
_MSG_TYPE: Final = re.compile(rb'"msg_type"\s*:\s*"([a-z_]+)"')
# At an end of a large content. In a text its quotes would be quoted.
_COUNT: Final = re.compile(rb'[{,]\s*"execution_count"\s*:\s*([0-9]{1,9})\s*[,}]')


@dataclass(slots=True, eq=False)
class Execution:
    """One execute_request of any client. Times are UTC in ISO 8601."""

    msg_id: str
    session: str = ""
    cell_id: str | None = None
    header: dict[str, Any] = field(default_factory=dict)
    """The request's header, its small fields only: what a reply needs."""
    queued: str | None = None
    started: str | None = None
    ended: str | None = None
    status: str = QUEUED
    """One of ``STATUSES``."""
    reason: str = ""
    """Why it ended, where the kernel has not said it."""
    execution_count: int | None = None
    first: int = 0
    """The number in the journal of its first message; 0 before it."""
    number: int = 0
    """The number of its last message that has come."""
    end: int = 0
    """The number of the message with which the kernel was done with it; 0 where none has come."""
    is_replied: bool = False
    input: dict[str, Any] | None = None
    """``prompt`` and ``password`` of what it waits for the user to type."""
    is_silent: bool = False
    """Not listed."""
    error: dict[str, Any] | None = None
    """``ename``, ``evalue`` and ``traceback`` of the error that it published."""
    fold: Fold | None = None
    """Its outputs; None where the journal has them."""
    reading: _Reading | None = None
    """The reading that is under way."""

    @property
    def is_open(self) -> bool:
        """Whether it is not over."""
        return self.status in OPEN


@dataclass(slots=True)
class _Reading:
    """Outputs that are read from the journal up to a number; what comes after it is held."""

    upto: int
    fold: Fold = field(default_factory=Fold)
    last: int = 0
    held: list[_Message] = field(default_factory=list)
    held_bytes: int = 0
    # The parent header of the last message, and whether it names this cell: many messages have the same.
    _parent: tuple[bytes, bool] = (b"", False)
    # Of a stream, the contents that are folded together.
    _run: list[bytes] = field(default_factory=list)
    _run_bytes: int = 0

    def take(self, msg_id: str, parts: Sequence[bytes]) -> Generator[None, None, None]:
        """Take a message that was read, in steps. One of another cell counts where it may show the same display."""
        if parts[1] != self._parent[0]:
            is_own = msg_id.encode() in parts[1] and _object(parts[1]).get("msg_id") == msg_id
            self._parent = parts[1], is_own
        is_own, size = self._parent[1], len(parts[3])
        if not is_own and b'"display_id"' not in parts[3]:
            return
        found = _MSG_TYPE.search(parts[0])
        msg_type = found[1].decode() if found else ""
        if is_own and msg_type == "stream" and size <= RUN_BYTES // 4:
            self._run.append(parts[3])
            self._run_bytes += size
            if len(self._run) >= MAX_RUN or self._run_bytes >= RUN_BYTES:
                self.end_run()
            return
        self.end_run()
        if size > MAX_CONTENT:
            if is_own and msg_type in OUTPUT_TYPES:
                self.fold.skip(size)
        elif is_own and msg_type in _FOLDED:
            content = yield from _opening(parts[3])
            if content or size <= WHOLE:
                self.fold.take(msg_type, content, size)
            else:
                self.fold.skip(size)
        elif msg_type in _DISPLAYS:
            self.fold.take("update_display_data", (yield from _opening(parts[3])), size)

    def end_run(self) -> None:
        """Fold what is there of a stream."""
        if self._run:
            self.fold.take_streams(_objects(self._run))
            self._run.clear()
            self._run_bytes = 0


class _Message(NamedTuple):
    """What is kept of a message until it is folded."""

    execution: Execution | None
    number: int
    msg_type: str
    content: bytes | Mapping[str, Any]
    """Nothing where it is larger than ``MAX_CONTENT``: such a message is only counted."""
    size: int

    def read(self) -> Mapping[str, Any]:
        """The content, parsed; empty for a malformed one."""
        return _object(self.content) if isinstance(self.content, bytes) else self.content


class Executions:
    """The executions of one kernel, on one loop."""

    def __init__(self) -> None:
        self._all: dict[str, Execution] = {}
        self._over: dict[str, Execution] = {}
        self._number = 0
        self._running: dict[str, Execution] = {}
        # Sessions in which a cell has failed: the kernel aborts what was sent after it.
        self._failed: dict[str, None] = {}
        self._pending: list[_Message] = []
        self._pending_bytes = 0
        self._fold_after = 0.0
        # The large message that is being parsed.
        self._opened: tuple[_Message, Generator[None, None, Mapping[str, Any]]] | None = None
        # Characters of all outputs, and the executions that an update of a display may concern.
        self._kept = 0
        self._displaying: dict[Execution, None] = {}
        self._changed: dict[str, None] = {}

    @property
    def number(self) -> int:
        """The number of the last message taken."""
        return self._number

    @property
    def size(self) -> int:
        """Bytes of outputs, folded and not."""
        return self._kept + self._pending_bytes

    def drop_outputs(self) -> None:
        """Drop all outputs: the journal, where there is one, has them."""
        self._pending, self._pending_bytes = [], 0
        for execution in self._all.values():
            execution.reading = None  # the next reading has these as well
            self._drop(execution)

    def get(self, msg_id: str) -> Execution | None:
        """The execution of this request; None where it is not known, or not any more."""
        return self._all.get(msg_id)

    def open(self) -> list[Execution]:
        """Those that are not over, the oldest first."""
        return [execution for execution in self._all.values() if execution.status in OPEN]

    def unreplied(self) -> list[Execution]:
        """Those without a reply, the oldest first."""
        return [execution for execution in self._all.values() if not execution.is_replied]

    def doubt_replies(self, positions: Mapping[str, int]) -> None:
        """A session may lack the reply to a cell that published something after the session's position."""
        for execution in self._all.values():
            position = positions.get(execution.session)
            has_no_end = not execution.end and execution.status in _REPLY_STATUSES.values()
            if position is not None and (has_no_end or position < max(execution.end, execution.number)):
                execution.is_replied = False

    def ended_between(self, low: int, high: int) -> list[Execution]:
        """Those that the kernel has ended with a message of a number above ``low``, and at most ``high``."""
        return sorted(
            (execution for execution in self._all.values() if low < execution.end <= high), key=lambda one: one.end
        )

    # -- What happens ---------------------------------------------------------------------------

    def queued(self, header: Mapping[str, Any], metadata: Mapping[str, Any], *, silent: bool = False) -> None:
        """A client's execute_request is taken, to be passed on to the kernel; both are untrusted."""
        msg_id = header.get("msg_id")
        if not _is_id(msg_id) or msg_id in self._all:
            return
        cell_id = metadata.get("cellId")
        self._add(
            msg_id,
            header,
            cell_id=cell_id[:MAX_ID] if isinstance(cell_id, str) else None,
            queued=_now(),
            is_silent=silent,
        )

    def published(
        self, first: int, number: int, msg_type: str, parent: Mapping[str, Any], parts: Sequence[bytes]
    ) -> None:
        """Take a message on iopub, in the order of the numbers; a number that was taken is ignored.

        ``parts`` are header, parent header, metadata, content and buffers; of a marker, none, and its type is "".
        """
        if number <= self._number:
            return
        self._number = number
        if msg_type not in _FOLLOWED:
            return
        msg_id = parent.get("msg_id")
        execution = self._all.get(msg_id) if isinstance(msg_id, str) else None
        if execution is None and parent.get("msg_type") == "execute_request" and _is_id(msg_id):
            execution = self._add(msg_id, parent)  # another client's, or one that no note has
        if execution is not None:
            execution.number = number
            if not execution.first:
                execution.first = first
        is_shown = msg_type in _FOLDED and (execution is not None or msg_type == "update_display_data")
        if is_shown and len(parts) > 3:
            self._keep(execution, number, msg_type, parts[3], len(parts[3]))
        if execution is not None and (msg_type == "error" or msg_type not in _FOLDED):
            self._follow(execution, msg_type, parts[3] if len(parts) > 3 else b"")

    def replied(self, msg_id: str, content: Mapping[str, Any]) -> None:
        """The execute_reply has come from the kernel, or was made here: the execution is over."""
        execution = self._all.get(msg_id)
        if execution is None:
            return
        execution.is_replied = True
        status = _REPLY_STATUSES.get(str(content.get("status")))
        if (count := count_of(content)) is not None:
            execution.execution_count = count
        if execution.is_open:
            self._close(execution, status or "ok")
        elif status and execution.status in _REPLY_STATUSES.values():
            execution.status = status
        payload = content.get("payload")
        for page in payload if isinstance(payload, list) else ():
            # As JupyterLab shows it: the text of "name?", say.
            if isinstance(page, dict) and page.get("source") == "page":
                shown = {"data": page.get("data")}
                self._keep(execution, execution.number, "display_data", shown, len(str(shown)))
        self._changed[msg_id] = None

    def end(self, msg_id: str, status: str, reason: str = "") -> Execution | None:
        """End one that is open with this status; None where it is not."""
        execution = self._all.get(msg_id)
        if execution is None or not execution.is_open:
            return None
        execution.reason = reason[:MAX_TEXT]
        self._close(execution, status)
        return execution

    def interrupted_all(self, status: str, reason: str = "") -> list[Execution]:
        """End all that are open, with this status; return them."""
        return [one for one in self.open() if self.end(one.msg_id, status, reason)]

    def input_requested(self, msg_id: str, content: Mapping[str, Any]) -> None:
        """The execution waits for the user to type."""
        execution = self._all.get(msg_id)
        if execution is not None and execution.is_open:
            execution.input = _input_of(content)
            self._changed[msg_id] = None

    def input_answered(self, msg_id: str) -> None:
        """The user has typed."""
        if (execution := self._all.get(msg_id)) is not None:
            execution.input = None
            self._changed[msg_id] = None

    # -- Another server -------------------------------------------------------------------------

    def changed_notes(self) -> dict[str, str | None]:
        """The notes that have changed since the last call, by msg_id; None for one that is forgotten."""
        changed, self._changed = self._changed, {}
        return {msg_id: _note(one) if (one := self._all.get(msg_id)) else None for msg_id in changed}

    def restore(self, notes: Mapping[str, str], number: int = 0) -> None:
        """Add the executions of an earlier server's notes, which are untrusted; what cannot be read is ignored.

        ``number`` is that of the last message which the earlier server took: the next one is ``published`` here.
        """
        self._number = max(self._number, number)
        restored = [one for msg_id, text in notes.items() if (one := _restored(msg_id, text)) is not None]
        restored.sort(key=lambda one: (one.queued or one.started or "", one.first))
        for execution in restored:
            if execution.msg_id not in self._all:
                self._all[execution.msg_id] = execution
                if not execution.is_open:
                    self._over[execution.msg_id] = execution
        self._forget_oldest(MAX)

    def needs_reading(self, msg_id: str) -> tuple[int, int] | None:
        """The first and last number to read from the journal for its outputs; None where they are here.

        Call ``refold`` with what is read. One reading of a kernel's at a time.
        """
        execution = self._all.get(msg_id)
        if execution is None or execution.fold is not None or not execution.first:
            return None
        self._fold_all()  # what has come belongs to the reading
        if execution.reading is None:
            upto = self._number if execution.is_open else execution.number
            execution.reading = _Reading(max(upto, execution.first))
            self._displaying[execution] = None
        return execution.first, execution.reading.upto

    def refold(self, msg_id: str, messages: Iterable[tuple[int, Sequence[bytes]]], *, done: bool = True) -> None:
        """Fold messages that were read, (number, parts) of all cells, in order; also in steps, the last one ``done``.

        Those up to the last number of ``needs_reading`` count. What came after it follows, none twice.
        """
        for _step in self.refolding(msg_id, messages, done=done):
            pass

    def refolding(
        self, msg_id: str, messages: Iterable[tuple[int, Sequence[bytes]]], *, done: bool = True
    ) -> Generator[None, None, None]:
        """``refold`` in steps of some milliseconds."""
        execution = self._all.get(msg_id)
        reading = execution.reading if execution is not None else None
        if execution is None or reading is None:
            return
        for place, (number, parts) in enumerate(messages, 1):
            if reading.last < number <= reading.upto and len(parts) > 3:
                reading.last = number
                yield from reading.take(msg_id, parts)
            if place % STEP_MESSAGES == 0:
                yield
        if done:
            self._end_reading(execution, reading)

    def _end_reading(self, execution: Execution, reading: _Reading) -> None:
        reading.end_run()
        self._fold_all()
        execution.fold, execution.reading = reading.fold, None
        self._kept += reading.fold.size
        for message in reading.held:
            self._fold_own(message, reading.fold)
        if reading.fold.has_displays:
            self._displaying[execution] = None
        else:
            self._displaying.pop(execution, None)
        self._drop_outputs(but=execution)

    # -- Models ---------------------------------------------------------------------------------

    def model(self, execution: Execution) -> dict[str, Any]:
        """The model of the REST API."""
        return {
            "msg_id": execution.msg_id,
            "cell_id": execution.cell_id,
            "session": execution.session,
            "status": execution.status,
            "reason": execution.reason,
            "execution_count": execution.execution_count,
            "queued": execution.queued,
            "started": execution.started,
            "ended": execution.ended,
            "input": execution.input,
            "first": execution.first,
            "number": execution.number,
            "running": execution.is_open,
        }

    def models(self) -> list[dict[str, Any]]:
        """The models of all that are listed, the newest first."""
        return [self.model(one) for one in reversed(self._all.values()) if not one.is_silent]

    def fold(self) -> Generator[None, None, None]:
        """Fold what has come, in steps of some milliseconds."""
        for _ in range(MAX_STEPS):
            if not self._pending:
                return
            self._fold_some()
            yield

    def outputs(self, msg_id: str) -> dict[str, Any]:
        """The model with ``outputs``, and the number up to which they are folded. Raises KeyError."""
        execution = self._all[msg_id]
        self._fold_all()
        fold = execution.fold
        return {
            **self.model(execution),
            "number": self._number,
            "outputs": fold.outputs if fold else [],
            "dropped": fold.dropped if fold else 0,
            "complete": fold is not None,
        }

    # -- States ---------------------------------------------------------------------------------

    def _add(self, msg_id: str, header: Mapping[str, Any], **fields: Any) -> Execution | None:
        self._forget_oldest(MAX - 1)
        if len(self._all) >= MAX_OPEN:
            return None
        small = _small_header(header)
        execution = Execution(msg_id, small.get("session", ""), header=small, fold=Fold(), **fields)
        self._all[msg_id] = execution
        self._changed[msg_id] = None
        return execution

    def _forget_oldest(self, most: int) -> None:
        """Forget executions that are over, the oldest first, until as many as this are left."""
        while len(self._all) > most and self._over:
            msg_id = next(iter(self._over))
            self._drop(self._over.pop(msg_id))
            del self._all[msg_id]
            self._changed[msg_id] = None

    def _follow(self, execution: Execution, msg_type: str, content: bytes) -> None:
        if msg_type == "status":
            state = _object(content).get("execution_state")
            if state == "busy":
                self._begin(execution)
            elif state == "idle":
                self._idle(execution)
        elif msg_type == "execute_input":
            self._begin(execution)
            execution.execution_count = _count_in(content)
            self._changed[execution.msg_id] = None
        else:
            execution.error = _short_error(_object(content, MAX_ERROR_CONTENT))
            while len(self._failed) >= MAX:
                del self._failed[next(iter(self._failed))]
            self._failed[execution.session] = None
            self._changed[execution.msg_id] = None

    def _begin(self, execution: Execution) -> None:
        if execution.started is None:
            execution.started = _now()
            self._changed[execution.msg_id] = None
        if execution.status != QUEUED:
            return
        execution.status = RUNNING
        subshell = execution.header.get("subshell_id", "")
        before = self._running.get(subshell)
        self._running[subshell] = execution
        if before is not None and before.is_open:
            # The kernel takes cells in turn: what it said at the end of the one before is lost.
            before.end = execution.number
            self._close(before, "error" if before.error else "ok")

    def _idle(self, execution: Execution) -> None:
        if not execution.end:
            execution.end = execution.number
            self._changed[execution.msg_id] = None
        if execution.is_open:
            is_aborted = execution.execution_count is None and not execution.is_silent
            if execution.error is not None:
                self._close(execution, "error")
            else:
                self._close(execution, "aborted" if is_aborted and execution.session in self._failed else "ok")

    def _close(self, execution: Execution, status: str) -> None:
        execution.status, execution.ended, execution.input = status, execution.ended or _now(), None
        self._over[execution.msg_id] = execution
        self._changed[execution.msg_id] = None
        subshell = execution.header.get("subshell_id", "")
        if self._running.get(subshell) is execution:
            del self._running[subshell]

    # -- Outputs --------------------------------------------------------------------------------

    def _keep(
        self, execution: Execution | None, number: int, msg_type: str, content: bytes | Mapping[str, Any], size: int
    ) -> None:
        if size > MAX_CONTENT:
            content = b""
        self._pending.append(_Message(execution, number, msg_type, content, size))
        self._pending_bytes += len(content) + _MESSAGE_COST
        if self._pending_bytes > FOLD_BYTES and time.perf_counter() > self._fold_after:
            self._fold_some()
        if self._pending_bytes > MAX_PENDING:
            self._leave_out()

    def _fold_all(self) -> None:
        done = 0
        while done < len(self._pending):
            if self._is_open(done):
                done = self._fold_next(done)
        self._pending, self._pending_bytes = [], 0
        self._drop_outputs()

    def _fold_some(self) -> None:
        """Fold for a few milliseconds; what is left waits for the next message."""
        began, done = time.perf_counter(), 0
        while done < len(self._pending) and time.perf_counter() < began + FOLD_SECONDS:
            if self._is_open(done):
                done = self._fold_next(done)
        self._fold_after = time.perf_counter() + FOLD_PAUSE * (time.perf_counter() - began)
        for message in self._pending[:done]:
            self._pending_bytes -= len(message.content) + _MESSAGE_COST
        del self._pending[:done]
        self._drop_outputs()

    def _is_open(self, place: int) -> bool:
        """Whether the content of the message at this place is parsed, or small; if not, take a step of the parsing."""
        message = self._pending[place]
        if not isinstance(message.content, bytes) or len(message.content) <= WHOLE:
            return True
        if self._opened is None or self._opened[0] is not message:
            self._opened = message, _opening(message.content)
        try:
            next(self._opened[1])
        except StopIteration as end:
            self._pending[place] = _Message(*message[:3], end.value, message.size)
            self._pending_bytes += len(end.value) - len(message.content)
            self._opened = None
        return False

    def _leave_out(self) -> None:
        """A flood: leave out the oldest outputs that wait. They would leave the fold again anyway."""
        done = 0
        for message in self._pending:
            if self._pending_bytes <= MAX_PENDING // 2:
                break
            done += 1
            self._pending_bytes -= len(message.content) + _MESSAGE_COST
            fold = message.execution.fold if message.execution is not None else None
            if fold is not None and message.msg_type in OUTPUT_TYPES:
                fold.leave_out(message.size)
            else:
                self._fold(message)
        del self._pending[:done]

    def _fold_next(self, start: int) -> int:
        """Fold the waiting message at this place, of a stream those after it as well; return the next place."""
        message = self._pending[start]
        execution, run, size = message.execution, list[bytes](), 0
        if execution is None or execution.fold is None or message.msg_type != "stream":
            self._fold(message)
            return start + 1
        for other in islice(self._pending, start, start + MAX_RUN):
            size += other.size
            is_same = other.msg_type == "stream" and other.execution is execution
            if not is_same or size > RUN_BYTES or not isinstance(other.content, bytes):
                break
            run.append(other.content)
        if not run:
            self._fold(message)
            return start + 1
        before = execution.fold.size
        execution.fold.take_streams(_objects(run))
        self._kept += execution.fold.size - before
        return start + len(run)

    def _fold(self, message: _Message) -> None:
        execution, msg_type = message.execution, message.msg_type
        content = message.read()
        if msg_type in _DISPLAYS and (display_id := display_id_of(content)):
            self._update_displays(message, display_id, content)
        if execution is None or msg_type == "update_display_data":
            return
        if execution.fold is not None:
            self._fold_own(message, execution.fold, content)
            if execution.fold.has_displays:
                self._displaying[execution] = None
        elif execution.reading is not None:
            self._hold(execution, message)

    def _fold_own(self, message: _Message, fold: Fold, content: Mapping[str, Any] | None = None) -> None:
        """Fold a message into the outputs of its own cell."""
        before = fold.size
        content = message.read() if content is None else content
        if message.size > MAX_CONTENT or (message.size > WHOLE and not content):
            fold.skip(message.size)
        else:
            fold.take(message.msg_type, content, message.size)
        self._kept += fold.size - before

    def _update_displays(self, message: _Message, display_id: str, content: Mapping[str, Any]) -> None:
        """A display is updated in all cells that show it."""
        is_update = message.msg_type == "update_display_data"
        for execution in list(self._displaying):
            fold = execution.fold
            if execution is message.execution and not is_update:
                continue
            if fold is not None:
                before = fold.size
                if fold.update_display(display_id, content.get("data"), content.get("metadata"), message.size):
                    execution.number = max(execution.number, message.number)
                    self._kept += fold.size - before
                elif not fold.has_displays:
                    del self._displaying[execution]
            elif execution.reading is not None:
                update = _Message(execution, message.number, "update_display_data", content, message.size)
                self._hold(execution, update)
            else:
                del self._displaying[execution]

    def _hold(self, execution: Execution, message: _Message) -> None:
        """Keep a message that comes while the outputs before it are read."""
        reading = execution.reading
        if reading is None or message.number <= reading.upto:
            return
        reading.held.append(message)
        reading.held_bytes += message.size + _MESSAGE_COST
        if reading.held_bytes > MAX_PENDING:
            execution.reading = None  # the next reading reads these as well

    def _drop_outputs(self, but: Execution | None = None) -> None:
        """Drop the oldest outputs beyond the limit, those of executions that are over first."""
        if self._kept <= MAX_OUTPUT:
            return
        have = [one for one in self._all.values() if one.fold is not None and one.fold.size and one is not but]
        for execution in sorted(have, key=lambda one: one.is_open):
            if self._kept <= MAX_OUTPUT:
                return
            self._drop(execution)

    def _drop(self, execution: Execution) -> None:
        if execution.fold is not None:
            self._kept -= execution.fold.size
            execution.fold = None
        self._displaying.pop(execution, None)


def reply_of(execution: Execution) -> dict[str, Any]:
    """The content of an execute_reply that says what the execution has come to, where the kernel's own is lost."""
    count = execution.execution_count
    if execution.status == "aborted":
        return {"status": "aborted", "execution_count": count}
    if execution.status == "ok":
        return {"status": "ok", "execution_count": count, "payload": [], "user_expressions": {}}
    if execution.error is not None:
        error = execution.error
    else:  # the frontend has its text from iopub, or the server has said the reason
        name = ERROR_NAMES.get(execution.status, "")
        lines = [execution.reason] if execution.reason else []
        error = {"ename": name, "evalue": execution.reason, "traceback": lines}
    return {"status": "error", "execution_count": count, **error}


def _is_id(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID and value.isascii() and value.isprintable()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _object(part: bytes, limit: int = WHOLE) -> dict[str, Any]:
    """A part of a message; empty for one that is malformed, or larger than what is parsed at once."""
    try:
        found = load_json(part, limit, values=WHOLE, nan=False)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _opening(part: bytes) -> Generator[None, None, dict[str, Any]]:
    """A content, parsed in steps; without what cannot be parsed in time."""
    try:
        found = yield from loading(part, MAX_CONTENT, whole=WHOLE)
    except ValueError:
        return {}
    is_shown = isinstance(found, dict) and found.get("data", True)
    return found if is_shown else {}


def _count_in(part: bytes) -> int | None:
    """The number of an execute_input. Beside it is the cell's text, which may be large."""
    if len(part) <= WHOLE:
        return count_of(_object(part))
    found = _COUNT.search(part[-MAX_TEXT:]) or _COUNT.search(part[:MAX_TEXT])
    return int(found[1]) if found else None


def _objects(parts: list[bytes]) -> list[dict[str, Any]]:
    """``_object`` of many parts, in a fifth of the time."""
    try:
        found = load_json(b"[%b]" % b",".join(parts), MAX_CONTENT, values=WHOLE, nan=False)
        if len(found) == len(parts):
            return [one if isinstance(one, dict) else {} for one in found]
    except ValueError:
        pass
    return [_object(part) for part in parts]


def _short_error(content: Mapping[str, Any]) -> dict[str, Any]:
    """An error with as much of its traceback as a reply may have."""
    ename, evalue = content.get("ename"), content.get("evalue")
    traceback, lines, left = content.get("traceback"), [], MAX_ERROR
    for line in traceback if isinstance(traceback, list) else ():
        if isinstance(line, str) and (left := left - len(line)) > 0:
            lines.append(line)
    return {
        "ename": ename[:MAX_TEXT] if isinstance(ename, str) else "",
        "evalue": evalue[:MAX_TEXT] if isinstance(evalue, str) else "",
        "traceback": lines,
    }


# -- Notes for another server --------------------------------------------------------------------

# The fields of a note, and the type of each; one that is missing has the default.
_NOTE_TEXTS: Final = ("session", "cell_id", "queued", "started", "ended", "status", "reason")
_NOTE_NUMBERS: Final = ("execution_count", "first", "number", "end")
_NOTE_FLAGS: Final = ("is_replied", "is_silent")


def _note(execution: Execution) -> str:
    """At most ``MAX_NOTE`` characters; what does not fit is left out."""
    note: dict[str, Any] = {
        name: value
        for name in (*_NOTE_TEXTS, *_NOTE_NUMBERS, *_NOTE_FLAGS)
        if (value := getattr(execution, name)) not in (None, "", 0, False)
    }
    note["header"] = execution.header
    note["has_error"] = execution.error is not None
    if execution.input is not None:
        note["input"] = execution.input
    for name in ("header", "reason", "input", "cell_id", "session"):
        text = json.dumps(note, separators=(",", ":"))
        if len(text) <= MAX_NOTE:
            break
        note.pop(name, None)
    return text


def _restored(msg_id: str, text: str) -> Execution | None:
    """The execution that a note describes; None where it describes none."""
    note = _object(text.encode(errors="replace")) if isinstance(text, str) and len(text) <= MAX_NOTE else {}
    status = note.get("status")
    if not _is_id(msg_id) or status not in STATUSES:
        return None
    execution = Execution(msg_id)
    for name in _NOTE_TEXTS:
        if isinstance(value := note.get(name), str):
            setattr(execution, name, value[:MAX_TEXT])
    for name in _NOTE_NUMBERS:
        if isinstance(value := note.get(name), int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
            setattr(execution, name, value)
    for name in _NOTE_FLAGS:
        setattr(execution, name, note.get(name) is True)
    named = {"session": execution.session} if execution.session else {}
    own = {"msg_id": msg_id, "msg_type": "execute_request"}
    execution.header = named | _small_header(note.get("header")) | own
    if isinstance(asked := note.get("input"), dict) and execution.is_open:
        execution.input = _input_of(asked)
    if note.get("has_error") is True:
        execution.error = {"ename": "", "evalue": "", "traceback": []}
    if not execution.first and execution.is_open:
        execution.fold = Fold()  # its first message is still to come
    return execution


def _input_of(content: Mapping[str, Any]) -> dict[str, Any]:
    prompt = content.get("prompt")
    return {"prompt": prompt[:MAX_TEXT] if isinstance(prompt, str) else "", "password": bool(content.get("password"))}


def _small_header(header: object) -> dict[str, Any]:
    if not isinstance(header, Mapping):
        return {}
    return {name: text[:MAX_ID] for name in _HEADER_FIELDS if isinstance(text := header.get(name), str)}
