"""A session's cells that wait for an answer, and the answers that the kernel's were lost of.

A reply goes to the connection that was there when the kernel sent it. Where that broke, or its server
ended, no other will come: what iopub said of the cell is enough to make one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gateway_slurm.gateway import messages

MOST = 10_000
# How far a cell is: the kernel was asked; it has begun, or failed, with the count ("+3", "!3"); one that is over
# has its status and count, as in "ok:3".
ASKED, BEGUN, FAILED = "-", "+", "!"
# Told of on iopub under the cell's request.
_TOLD = (b"status", b"execute_input", b"error")


@dataclass(slots=True)
class Cell:
    """One execute_request that the kernel has, as far as is known."""

    header: dict[str, Any]
    begun: bool = False
    ended: bool = False
    count: int | None = None
    error: dict[str, Any] | None = None
    let_go: bool = False
    """Whether it ended without having run, since a cell before it failed."""
    missed: bool = False
    """Whether its reply may have been lost."""


class Cells:
    """The session's cells, from their requests to their replies."""

    def __init__(self) -> None:
        self._cells: dict[str, Cell] = {}
        # Those that were answered here: a reply that comes nevertheless is one too many.
        self._made: dict[str, None] = {}
        self._error_seen = False

    def __bool__(self) -> bool:
        return bool(self._cells)

    def __contains__(self, msg_id: str) -> bool:
        return msg_id in self._cells

    def marks(self) -> dict[str, str]:
        """Every cell without an answer, and how far it is."""
        return {msg_id: self._mark(cell) for msg_id, cell in self._cells.items()}

    def mark(self, msg_id: str) -> str:
        """How far this cell is; nothing for one that is not known."""
        cell = self._cells.get(msg_id)
        return self._mark(cell) if cell is not None else ""

    def _mark(self, cell: Cell) -> str:
        count = "" if cell.count is None else str(cell.count)
        if cell.ended:
            return f"{self._reply(cell)['status']}:{count}"
        if not cell.begun:
            return ASKED
        return (BEGUN if cell.error is None else FAILED) + count

    def ended(self) -> Iterator[str]:
        """Those that are over, and whose reply may have been lost."""
        return (msg_id for msg_id, cell in self._cells.items() if cell.ended and cell.missed)

    def unheard(self) -> set[str]:
        """Those that may never have reached the kernel."""
        return {msg_id for msg_id, cell in self._cells.items() if cell.missed and not cell.begun}

    def asked(self, header: dict[str, Any]) -> bool:
        """A request is on its way to the kernel; whether it is a cell's."""
        if header.get("msg_type") != "execute_request" or len(self._cells) >= MOST:
            return False
        self._cells[str(header.get("msg_id"))] = Cell(header)
        return True

    def remembered(self, marks: Mapping[str, str]) -> None:
        """Cells that a server before this one passed on, and how far they were."""
        for msg_id, mark in marks.items():
            header = {"msg_id": msg_id, "msg_type": "execute_request"}
            cell = self._cells[msg_id] = Cell(header, begun=mark != ASKED, missed=True)
            status, colon, count = mark.partition(":") if ":" in mark else (mark[:1], "", mark[1:])
            cell.ended, cell.count = bool(colon), int(count) if count.isdecimal() else None
            if status in ("error", FAILED):
                # Its words were delivered, by iopub.
                cell.error = {"ename": "", "evalue": "", "traceback": []}
                self._error_seen = True
            cell.let_go = status == "aborted"

    def is_answered(self, msg_id: str) -> bool:
        """A reply came. Returns False for one too many: it was made here already."""
        self._cells.pop(msg_id, None)
        return msg_id not in self._made

    def heard(self, parts: list[bytes], is_ours: Callable[[dict[str, Any]], bool] | None = None) -> tuple[bool, str]:
        """iopub told this. Returns whether a cell is further, and the one that is over and may have lost its reply.

        With ``is_ours`` also a cell counts that is not known yet, where it says so of the request's header.
        """
        if not parts or not (self._cells or is_ours) or not any(word in parts[0] for word in _TOLD):
            return False, ""
        parent = messages.parent_header_of(parts)
        msg_id = str(parent.get("msg_id", ""))
        cell = self._cells.get(msg_id)
        if cell is None and is_ours and parent.get("msg_type") == "execute_request" and is_ours(parent):
            cell = self._cells[msg_id] = Cell(parent, missed=True)
        if cell is None:
            return False, ""
        if len(cell.header) < len(parent):
            cell.header = parent
        before = self._mark(cell)
        self._note(cell, messages.header_of(parts).get("msg_type"), messages.content_of(parts))
        return before != self._mark(cell), msg_id if cell.ended and cell.missed else ""

    def _note(self, cell: Cell, msg_type: object, content: dict[str, Any]) -> None:
        cell.begun = True
        if msg_type == "execute_input":
            count = content.get("execution_count")
            cell.count = count if isinstance(count, int) else None
        elif msg_type == "error":
            cell.error = {name: content.get(name) for name in ("ename", "evalue", "traceback")}
            self._error_seen = True
        elif msg_type == "status" and content.get("execution_state") == "idle":
            cell.ended = True
            cell.let_go = cell.count is None and cell.error is None and self._error_seen

    def answer(self, msg_id: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The request's header and its reply's content, as iopub has told them; None for one that is answered."""
        cell = self._cells.pop(msg_id, None)
        if cell is None:
            return None
        self._made[msg_id] = None
        while len(self._made) > MOST:
            self._made.pop(next(iter(self._made)))
        return cell.header, self._reply(cell)

    def _reply(self, cell: Cell) -> dict[str, Any]:
        if cell.error is not None:
            return {"status": "error", "execution_count": cell.count, **cell.error}
        if cell.let_go:
            return {"status": "aborted", "execution_count": None}
        return {"status": "ok", "execution_count": cell.count, "payload": [], "user_expressions": {}}

    def take_all(self) -> list[tuple[str, dict[str, Any]]]:
        """All of them, ids and headers, which are then nobody's any more."""
        taken = [(msg_id, cell.header) for msg_id, cell in self._cells.items()]
        self._cells.clear()
        return taken

    def take(self, msg_ids: set[str]) -> list[dict[str, Any]]:
        """The headers of these, which are then nobody's any more."""
        return [self._cells.pop(msg_id).header for msg_id in list(self._cells) if msg_id in msg_ids]
