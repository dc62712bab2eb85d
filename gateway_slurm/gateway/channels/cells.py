"""A session's cells, from their requests to their replies, as far as the messages on iopub show them.

A reply goes to the server that passed the request on. When that server stops, the reply is lost, and the next server
makes one from what iopub said about the cell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gateway_slurm.gateway.channels import messages

# Cells without a reply, and replies made here, that a session's memory holds.
MAX_CELLS = 10_000
# A cell's mark is its state as text: "-" the request was sent; "+3" the kernel has begun, with this count; "!3" it has
# reported an error; "ok:3", "error:3" or "aborted:" it has ended, with this status.
SENT, BEGUN, FAILED = "-", "+", "!"
# The types of messages on iopub, under a cell's request, that change the cell's state.
_CELL_MESSAGES = (b"status", b"execute_input", b"error")


@dataclass(slots=True)
class Cell:
    """One execute_request that was sent to the kernel and has no reply yet."""

    header: dict[str, Any]
    begun: bool = False
    ended: bool = False
    count: int | None = None
    error: dict[str, Any] | None = None
    aborted: bool = False
    """Whether it ended without having run, since a cell before it failed."""
    reply_uncertain: bool = False
    """Whether its reply may have been lost, with an earlier server or a connection."""

    @property
    def mark(self) -> str:
        """The cell's state as text."""
        count = "" if self.count is None else str(self.count)
        if self.ended:
            return f"{self.reply()['status']}:{count}"
        if not self.begun:
            return SENT
        return (BEGUN if self.error is None else FAILED) + count

    def reply(self) -> dict[str, Any]:
        """The content of a reply that says what iopub said."""
        if self.error is not None:
            return {"status": "error", "execution_count": self.count, **self.error}
        if self.aborted:
            return {"status": "aborted", "execution_count": None}
        return {"status": "ok", "execution_count": self.count, "payload": [], "user_expressions": {}}


class Cells:
    """The cells of one session that have no reply yet."""

    def __init__(self) -> None:
        self._cells: dict[str, Cell] = {}
        # Cells with a reply made here; the kernel's own reply would be a second one.
        self._replied: dict[str, None] = {}
        self._error_seen = False

    def __bool__(self) -> bool:
        return bool(self._cells)

    def __contains__(self, msg_id: str) -> bool:
        return msg_id in self._cells

    def marks(self) -> dict[str, str]:
        """The marks of all cells, by the ids of their requests."""
        return {msg_id: cell.mark for msg_id, cell in self._cells.items()}

    def mark(self, msg_id: str) -> str:
        """The mark of one cell; empty for one that is not known."""
        cell = self._cells.get(msg_id)
        return cell.mark if cell is not None else ""

    def running(self) -> dict[str, Any]:
        """The header of the request that the kernel has begun and not ended; empty for none."""
        return next((cell.header for cell in self._cells.values() if cell.begun and not cell.ended), {})

    def ended(self) -> Iterator[str]:
        """The cells that have ended, and whose reply may have been lost."""
        return (msg_id for msg_id, cell in self._cells.items() if cell.ended and cell.reply_uncertain)

    def doubt_replies(self) -> None:
        """The requests of all cells, and the replies to them, may have been lost."""
        for cell in self._cells.values():
            cell.reply_uncertain = True

    def unconfirmed(self) -> set[str]:
        """The cells that may never have reached the kernel, of those whose reply may have been lost."""
        return {msg_id for msg_id, cell in self._cells.items() if cell.reply_uncertain and not cell.begun}

    def add_request(self, header: dict[str, Any]) -> bool:
        """Note a request that is sent to the kernel; return whether it is a cell's."""
        if header.get("msg_type") != "execute_request" or len(self._cells) >= MAX_CELLS:
            return False
        self._cells[str(header.get("msg_id"))] = Cell(header)
        return True

    def restore(self, marks: Mapping[str, str]) -> None:
        """Add the cells that an earlier server sent to the kernel, from their marks."""
        for msg_id, mark in marks.items():
            header = {"msg_id": msg_id, "msg_type": "execute_request"}
            cell = self._cells[msg_id] = Cell(header, begun=mark != SENT, reply_uncertain=True)
            status, colon, count = mark.partition(":") if ":" in mark else (mark[:1], "", mark[1:])
            cell.ended, cell.count = bool(colon), int(count) if count.isdecimal() else None
            if status in ("error", FAILED):
                # The frontend has its text, from iopub.
                cell.error = {"ename": "", "evalue": "", "traceback": []}
                self._error_seen = True
            cell.aborted = status == "aborted"

    def on_reply(self, msg_id: str) -> bool:
        """Note the kernel's reply. Return False if the frontend has one already, which was made here."""
        self._cells.pop(msg_id, None)
        return msg_id not in self._replied

    def on_iopub(
        self, parts: list[bytes], may_be_ours: Callable[[dict[str, Any]], bool] | None = None
    ) -> tuple[bool, str]:
        """Note a message on iopub.

        Returns whether a cell's mark has changed, and the cell that has ended and whose reply may have been lost.
        ``may_be_ours`` gets the header of a request that is not known, and returns whether to add it as a cell.
        """
        if not parts or not (self._cells or may_be_ours) or not any(kind in parts[0] for kind in _CELL_MESSAGES):
            return False, ""
        parent = messages.parent_header_of(parts)
        msg_id = str(parent.get("msg_id", ""))
        cell = self._cells.get(msg_id)
        if cell is None and may_be_ours and parent.get("msg_type") == "execute_request" and may_be_ours(parent):
            cell = self._cells[msg_id] = Cell(parent, reply_uncertain=True)
        if cell is None:
            return False, ""
        if len(cell.header) < len(parent):
            cell.header = parent
        before, cell.begun = cell.mark, True
        msg_type, content = messages.header_of(parts).get("msg_type"), messages.content_of(parts)
        if msg_type == "execute_input":
            count = content.get("execution_count")
            cell.count = count if isinstance(count, int) else None
        elif msg_type == "error":
            cell.error = {name: content.get(name) for name in ("ename", "evalue", "traceback")}
            self._error_seen = True
        elif msg_type == "status" and content.get("execution_state") == "idle":
            cell.ended = True
            cell.aborted = cell.count is None and cell.error is None and self._error_seen
        return before != cell.mark, msg_id if cell.ended and cell.reply_uncertain else ""

    def make_reply(self, msg_id: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The request's header and the content of a reply to it; None for a cell that has one."""
        cell = self._cells.pop(msg_id, None)
        if cell is None:
            return None
        self._replied[msg_id] = None
        while len(self._replied) > MAX_CELLS:
            self._replied.pop(next(iter(self._replied)))
        return cell.header, cell.reply()

    def take(self, msg_ids: Collection[str] | None = None) -> list[dict[str, Any]]:
        """Remove these cells, by default all; return the headers of their requests."""
        wanted = [msg_id for msg_id in self._cells if msg_ids is None or msg_id in msg_ids]
        return [self._cells.pop(msg_id).header for msg_id in wanted]
