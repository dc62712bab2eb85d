"""The notice under a cell that waits for its kernel: why it waits, and until when.

A display with an id is the only output that a frontend can change later. ``clear_output`` takes it away before the
cell runs. Its ``wait`` is False: a frontend that waits for the next output keeps the notice under a cell without any.
A frontend that saves the notebook meanwhile saves the notice, too: no message is shown and not saved.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any


class WaitingNotice:
    """One session's notice. ``send`` takes the type, the content and the parent header of a message on iopub."""

    def __init__(self, send: Callable[[str, dict[str, Any], dict[str, Any]], None]) -> None:
        self._send = send
        self._text = ""
        # The header of the first cell that is held, where the notice belongs.
        self._cell: dict[str, Any] = {}
        self._display_id = ""

    def cell_held(self, header: dict[str, Any]) -> None:
        """A cell waits for the kernel. Only the first one gets the notice."""
        if not self._cell:
            self._cell = header
            self._show()

    def set_text(self, text: str) -> None:
        """The reason of the wait, as it is now."""
        if text != self._text:
            self._text = text
            self._show()

    def _show(self) -> None:
        if not self._cell or not self._text:
            return
        kind = "update_display_data" if self._display_id else "display_data"
        self._display_id = self._display_id or uuid.uuid4().hex
        data = {"text/plain": self._text}
        content = {"data": data, "metadata": {}, "transient": {"display_id": self._display_id}}
        self._send(kind, content, self._cell)

    def clear(self) -> None:
        """The cell runs now, or is refused: take the notice away."""
        if self._display_id:
            self._send("clear_output", {"wait": False}, self._cell)
        self._text, self._cell, self._display_id = "", {}, ""
