"""A kernel's execution state, decided here and nowhere else.

It follows the requests that the kernel works on, in the kernel's own order: the kernel is busy while one of them is not
done. Its first word, "starting", comes late or never, and the messages of a process that was restarted may come after
those of the next one; neither changes the state. A request on the control channel says nothing about the cell beside
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

# Requests that the kernel takes in turn, each in its subshell (messaging protocol; JEP 91).
_IN_TURN = frozenset(
    {
        *("execute_request", "complete_request", "inspect_request", "history_request", "is_complete_request"),
        *("comm_open", "comm_msg", "comm_close"),
    }
)
# Requests that are remembered, and processes of one kernel.
MAX_REQUESTS, MAX_PROCESSES = 10_000, 20
# Stands for the request, not known here, that a restored kernel works on.
_UNKNOWN = ""


class ExecutionState:
    """Sets ``execution_state`` of one kernel's manager, from what the server does and from what the kernel publishes.

    ``tracks`` says of a message type whether it is work: ``MappingKernelManager.track_message_type``.
    """

    def __init__(self, kernel: Any, tracks: Callable[[str | None], bool], state: str = "starting") -> None:
        self._kernel, self._tracks = kernel, tracks
        # What the server did; "running" leaves the state to the kernel.
        self._life = state if state in ("starting", "restarting", "unknown", "dead") else "running"
        # The kernel's requests that have begun, each with its subshell and whether it is one of ``_IN_TURN``.
        self._begun: dict[str, tuple[str, bool]] = {}
        # Cells that the server has passed on, in that order, each with its session and subshell.
        self._sent: dict[str, tuple[str, str]] = {}
        self._ended: deque[str] = deque(maxlen=MAX_REQUESTS)
        self._ended_ids: set[str] = set()
        # Each process of the kernel has a session id of its own in its messages.
        self._processes: deque[str] = deque(maxlen=MAX_PROCESSES)
        self._old_processes: deque[str] = deque(maxlen=MAX_PROCESSES)
        self._set()

    @property
    def is_busy(self) -> bool:
        """Whether the kernel works on a request."""
        return bool(self._begun or self._sent)

    @property
    def is_dead(self) -> bool:
        return self._life == "dead"

    # -- What the server does -------------------------------------------------------------------

    def listens(self) -> None:
        """The kernel has started, or was restarted."""
        if self._life in ("starting", "restarting"):
            self._life = "running"
            self._set()

    def restarts(self) -> None:
        """The kernel is being restarted: what its old process still publishes does not count."""
        self._life = "restarting"
        self._forget()
        self._old_processes.extend(self._processes)
        self._processes.clear()
        self._set()

    def dies(self) -> None:
        """The kernel is dead until it is restarted."""
        self._life = "dead"
        self._forget()
        self._set()

    def restored(self, state: str) -> None:
        """``state`` is what an earlier server, and the output since then, say of a running kernel; "" for nothing."""
        if self._life == "unknown":
            self._life = "running"
            if state == "busy" and not self._ended:
                self._begun.setdefault(_UNKNOWN, ("", True))
            self._set()

    def sent(self, header: dict[str, Any]) -> None:
        """The server passes a cell on to the kernel, which is busy until it has taken it and is done."""
        msg_id = str(header.get("msg_id", ""))
        if msg_id and msg_id not in self._ended_ids and len(self._sent) < MAX_REQUESTS:
            self._sent[msg_id] = str(header.get("session", "")), str(header.get("subshell_id") or "")
            self._set()

    def replied(self, msg_id: str) -> None:
        """The kernel's reply to a request has come; its status "idle" may be late, or lost."""
        if msg_id in self._sent or msg_id in self._begun:
            self._end(msg_id)
            self._set()

    # -- What the kernel publishes --------------------------------------------------------------

    def published(self, header: dict[str, Any], parent: dict[str, Any], state: str = "") -> None:
        """Take a message on iopub; ``state`` is that of a status, and empty for other messages."""
        if self._life == "dead" or self._is_of_old_process(header, parent) or state == "starting":
            return
        if self._life in ("starting", "restarting") and state:
            self._life = "running"
        msg_id, kind = str(parent.get("msg_id") or ""), parent.get("msg_type")
        if msg_id and self._tracks(kind):
            if state == "idle":
                self._end(msg_id)
            # A cell's output shows that it runs, where its status was lost; threads print also after its end.
            elif state == "busy" or (kind == "execute_request" and msg_id not in self._ended_ids):
                self._begin(msg_id, str(parent.get("subshell_id") or ""), in_turn=kind in _IN_TURN)
            if self._life == "unknown":
                self._life = "running"
        self._set()

    def _is_of_old_process(self, header: dict[str, Any], parent: dict[str, Any]) -> bool:
        session = str(header.get("session") or "")
        if not session or session == parent.get("session"):
            return False  # some kernels repeat the session of the request
        if session in self._old_processes:
            return True
        if session not in self._processes:
            self._processes.append(session)
        return False

    # -- Requests -------------------------------------------------------------------------------

    def _begin(self, msg_id: str, subshell: str, *, in_turn: bool) -> None:
        if msg_id in self._begun:
            return
        if in_turn:
            # The one before it is done, though its "idle" was lost.
            for other, place in list(self._begun.items()):
                if place == (subshell, True):
                    self._end(other)
        self._end_sent_before(msg_id)
        if len(self._begun) < MAX_REQUESTS:
            self._begun[msg_id] = subshell, in_turn

    def _end(self, msg_id: str) -> None:
        self._end_sent_before(msg_id)
        self._begun.pop(_UNKNOWN, None)
        self._begun.pop(msg_id, None)
        self._sent.pop(msg_id, None)
        if msg_id and msg_id not in self._ended_ids:
            if len(self._ended) == MAX_REQUESTS:
                self._ended_ids.discard(self._ended[0])
            self._ended.append(msg_id)
            self._ended_ids.add(msg_id)

    def _end_sent_before(self, msg_id: str) -> None:
        """The kernel takes a session's cells in turn: those before this one are done, or never came."""
        place = self._sent.get(msg_id)
        if place is None:
            return
        for other, other_place in list(self._sent.items()):
            if other == msg_id:
                return
            if other_place == place:
                del self._sent[other]

    def _forget(self) -> None:
        for msg_id in [*self._begun, *self._sent]:
            self._end(msg_id)

    def _set(self) -> None:
        state = self._life
        if state == "running":
            state = "busy" if self.is_busy else "idle"
        if state != getattr(self._kernel, "execution_state", None):
            self._kernel.execution_state = state
