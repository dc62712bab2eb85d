"""The outputs of one cell as a notebook has them, from the messages that the kernel publishes. Pure.

It does what JupyterLab's output area does with the same messages: texts of one stream are joined, carriage return and
backspace move in the current line, ``clear_output`` clears now or with the next output, and a display is updated by
its id. What is beyond the limit is left out from the middle: a user looks for how a cell began and for how it ended.

Sources: JupyterLab's ``OutputAreaModel``, nbclient's ``process_message``, nbformat 4.5.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Final

DEFAULT_LIMIT: Final = 8 << 20
# Of the limit, the part that the first outputs have.
_HEAD_SHARE: Final = 4
# What an output costs beside its characters: so that many small ones are bounded as well.
_OUTPUT_COST: Final = 512
# Characters of a line in which "\r" and "\b" move. What is before them in a longer line is final.
MAX_LINE: Final = 16 << 10
# Characters of the texts that are joined to one.
_PIECE: Final = 64 << 10
_PIECE_TEXTS: Final = 1024
# More "\r" and "\b" than this in one text are too slow to follow one by one. No progress bar writes that many.
MAX_CONTROLS: Final = 10_000
_CONTROLS: Final = re.compile("([\r\b])")
# A character, and the step back over it.
_TAKEN_BACK: Final = re.compile("[^\n\r\b]\b")

OUTPUT_TYPES: Final = frozenset({"stream", "display_data", "execute_result", "error"})
TYPES: Final = OUTPUT_TYPES | {"update_display_data", "clear_output", "execute_input"}


class _Output:
    """One output; of a stream, the texts that no carriage return reaches any more."""

    __slots__ = ("continues", "display_id", "fields", "in_head", "pieces", "recent", "recent_size", "size")

    def __init__(self, fields: dict[str, Any], size: int = 0, display_id: str = "") -> None:
        self.fields, self.size, self.display_id = fields, size + _OUTPUT_COST, display_id
        self.in_head = False
        self.continues = False
        """Whether it is the rest of the last stream of the head."""
        self.pieces: deque[str] = deque()
        self.recent: list[str] = []
        self.recent_size = 0

    @property
    def is_stream(self) -> bool:
        return bool(self.fields["output_type"] == "stream")

    def append(self, text: str, piece: int) -> None:
        self.recent.append(text)
        self.recent_size += len(text)
        self.size += len(text)
        if self.recent_size >= piece or len(self.recent) >= _PIECE_TEXTS:
            whole = "".join(self.recent)
            self.pieces.extend(whole[start : start + piece] for start in range(0, len(whole), piece))
            self.recent, self.recent_size = [], 0

    @property
    def text(self) -> str:
        return "".join([*self.pieces, *self.recent])


class Fold:
    """The outputs of one cell; at most ``limit`` characters are kept, the first quarter and the last ones."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.execution_count: int | None = None
        self._limit = max(limit, 8 * _OUTPUT_COST)
        self._piece = min(_PIECE, self._limit // 16)
        self._reset()

    def _reset(self) -> None:
        self._head: list[_Output] = []
        self._tail: deque[_Output] = deque()
        self._head_size = self._tail_size = 0
        self._displays: dict[str, list[_Output]] = {}
        self._clears_next = False
        # The stream that the next text of its name is joined to, its current line, and the place in that line.
        self._stream: _Output | None = None
        self._line, self._column = "", 0
        self._left_out = 0
        self._refused = 0

    @property
    def dropped(self) -> int:
        """Characters that are left out, beyond the limit."""
        return self._left_out + self._refused

    @property
    def size(self) -> int:
        """Characters that are kept; each output counts as some more."""
        return self._head_size + self._tail_size + len(self._line)

    @property
    def has_displays(self) -> bool:
        """Whether ``update_display`` can find an output."""
        return bool(self._displays)

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """nbformat's outputs; where some are left out, a text on stderr says so in their place."""
        made: list[dict[str, Any]] = []
        if self._left_out and not self._tail:
            return [*map(self._as_dict, self._head), _notice(self._left_out)]
        made.extend(map(self._as_dict, self._head))
        if self._left_out:
            made.append(_notice(self._left_out))
        for output in self._tail:
            fields = self._as_dict(output)
            if output.continues and not self._left_out and made:
                made[-1]["text"] += fields["text"]
            else:
                made.append(fields)
        return made

    def _as_dict(self, output: _Output) -> dict[str, Any]:
        if not output.is_stream:
            return dict(output.fields)
        text = output.text
        return {**output.fields, "text": text + self._line if output is self._stream else text}

    # -- Messages -------------------------------------------------------------------------------

    def take(self, msg_type: str, content: Mapping[str, Any], size: int | None = None) -> None:
        """Take a message that the kernel published for this cell, in the kernel's order; ``content`` is untrusted.

        ``size`` is that of the content's JSON text, in bytes; by default it is estimated. Other types are ignored.
        """
        if msg_type == "stream":
            self._take_stream(content)
        elif msg_type == "display_data" or msg_type == "execute_result":
            self._take_display(msg_type, content, size)
        elif msg_type == "update_display_data":
            self.update_display(display_id_of(content), content.get("data"), content.get("metadata"), size)
        elif msg_type == "clear_output":
            self._clear(wait=bool(content.get("wait")))
        elif msg_type == "error":
            ename, evalue = _text(content.get("ename")), _text(content.get("evalue"))
            traceback = content.get("traceback")
            lines = [line for line in traceback if isinstance(line, str)] if isinstance(traceback, list) else []
            fields = {"output_type": "error", "ename": ename, "evalue": evalue, "traceback": lines}
            self._add(_Output(fields, len(ename) + len(evalue) + sum(map(len, lines))))
        elif msg_type == "execute_input":
            self.execution_count = count_of(content)

    def take_streams(self, contents: Iterable[Mapping[str, Any]]) -> None:
        """Take stream messages that follow one another; this is faster than to take each."""
        name, texts = "", list[str]()
        for content in contents:
            text, its_name = content.get("text"), content.get("name")
            if not isinstance(text, str) or not isinstance(its_name, str):
                text, its_name = _text(text), _text(its_name)
            if its_name != name and texts:
                self._take_stream({"name": name, "text": "".join(texts)})
                texts.clear()
            name = its_name
            texts.append(text)
        if texts:
            self._take_stream({"name": name, "text": "".join(texts)})

    def leave_out(self, size: int) -> None:
        """An output of this size, beyond what can be folded in time, is left out without a look at it."""
        self._end_stream()
        self._left_out += size

    def skip(self, size: int) -> None:
        """An output of this size, which is larger than the limit, is left out without a look at it."""
        self._refused += size
        notice = _notice(size)
        output = _Output({**notice, "text": ""})
        output.append(notice["text"], self._piece)
        self._add(output)
        self._end_stream()

    def update_display(self, display_id: str, data: object, metadata: object, size: int | None = None) -> bool:
        """Update every output of this display; return whether there is one."""
        found = self._displays.get(display_id, ()) if display_id else ()
        data, metadata = _object(data), _object(metadata)
        size = (_estimate(data) if size is None else size) + _OUTPUT_COST if found else 0
        if size > self._limit:
            self._refused += size
            return True
        for output in found:
            output.fields.update(data=data, metadata=metadata)
            self._grow(output, size - output.size)
            output.size = size
        if found:
            self._trim()
        return bool(found)

    def _take_display(self, msg_type: str, content: Mapping[str, Any], size: int | None) -> None:
        display_id = display_id_of(content)
        data, metadata = _object(content.get("data")), _object(content.get("metadata"))
        size = _estimate(data) if size is None else size
        if display_id:
            # As JupyterLab and nbclient do: the others of this id show the same.
            self.update_display(display_id, data, metadata, size)
        fields: dict[str, Any] = {"output_type": msg_type, "data": data, "metadata": metadata}
        if msg_type == "execute_result":
            fields["execution_count"] = count_of(content)
        self._add(_Output(fields, size, display_id))

    def _clear(self, *, wait: bool) -> None:
        self._end_stream()
        if wait:
            self._clears_next = True
        else:
            self._reset()

    def _add(self, output: _Output) -> None:
        if self._clears_next:
            self._reset()
        self._end_stream()
        if output.size > self._limit:
            self.skip(output.size)
            return
        if output.display_id:
            self._displays.setdefault(output.display_id, []).append(output)
        if output.is_stream:
            self._stream = output
        self._place(output)
        self._trim()

    def _place(self, output: _Output) -> None:
        output.in_head = not self._tail and not self._left_out and output.size <= self._head_room
        (self._head if output.in_head else self._tail).append(output)
        self._grow(output, output.size)

    @property
    def _head_room(self) -> int:
        return max(0, self._limit // _HEAD_SHARE - self._head_size)

    def _grow(self, output: _Output, size: int) -> None:
        if output.in_head:
            self._head_size += size
        else:
            self._tail_size += size

    # -- Streams --------------------------------------------------------------------------------

    def _take_stream(self, content: Mapping[str, Any]) -> None:
        name, text = _text(content.get("name")) or "stdout", _text(content.get("text"))
        stream = self._stream
        if self._clears_next or stream is None or stream.fields["name"] != name:
            self._add(_Output({"output_type": "stream", "name": name, "text": ""}))
        if "\r\n" in text:
            text = text.replace("\r\n", "\n")
        if "\r" not in text and "\b" not in text and self._column == len(self._line):
            self._write(text)
        else:
            self._write_controlled(text)
        self._trim()

    def _write(self, text: str) -> None:
        """Write a text without controls at the end of the stream."""
        end = text.rfind("\n") + 1
        if end:
            self._finish(self._line + text[:end] if self._line else text[:end])
            self._line = text[end:]
        else:
            self._line += text
        if len(self._line) > MAX_LINE:
            self._finish(self._line)
            self._line = ""
        self._column = len(self._line)

    def _write_controlled(self, text: str) -> None:
        lines = text.split("\n")
        if text.count("\b") + text.count("\r") > MAX_CONTROLS:
            lines = [_without_overwritten(line) for line in lines]
        first, *others = lines
        self._edit(first)
        for line in others:
            # A new line begins at the end of the text, wherever in the line the place was.
            self._column = len(self._line)
            self._write("\n")
            self._edit(line)

    def _edit(self, text: str) -> None:
        """Write a text without line ends at the current place of the current line."""
        if "\b" in text and self._column == len(self._line) and "\r" not in text:
            text = _TAKEN_BACK.sub("", text)
        if "\b" in text:
            for part in _CONTROLS.split(text):
                self._step(part)
        else:
            first, *others = text.split("\r")
            self._overwrite(first)
            if others:
                self._overwrite_from_start(others)
        if len(self._line) > MAX_LINE and self._column == len(self._line):
            self._finish(self._line)
            self._line, self._column = "", 0

    def _step(self, part: str) -> None:
        if part == "\r":
            self._column = 0
        elif part != "\b":
            self._overwrite(part)
        elif self._column:
            # At the end of the line one character goes; before it, two, as in JupyterLab.
            self._line = self._line[: self._column - 1] + self._line[self._column + 1 :]
            self._column -= 1

    def _overwrite_from_start(self, texts: list[str]) -> None:
        """Each text begins at the start of the line: from the last one back, what a later one covers is not seen."""
        seen = last = texts[-1]
        for text in reversed(texts):
            if len(text) > len(seen):
                seen += text[len(seen) :]
        self._column = 0
        self._overwrite(seen)
        self._column = len(last)

    def _overwrite(self, text: str) -> None:
        end = self._column + len(text)
        self._line = self._line[: self._column] + text + self._line[end:]
        self._column = end

    def _finish(self, text: str) -> None:
        """Append a text to what is final of the current stream."""
        stream = self._stream
        assert stream is not None
        if stream.in_head and len(text) > (room := self._head_room):
            stream.append(text[:room], self._piece)
            self._grow(stream, room)
            text = text[room:]
            stream = self._stream = _Output(dict(stream.fields))
            stream.continues = True
            self._tail.append(stream)
            self._grow(stream, stream.size)
        stream.append(text, self._piece)
        self._grow(stream, len(text))

    def _end_stream(self) -> None:
        """The next output is no text of this stream: its current line is final."""
        if self._stream is not None and self._line:
            self._finish(self._line)
        self._stream, self._line, self._column = None, "", 0

    # -- The limit ------------------------------------------------------------------------------

    def _trim(self) -> None:
        """Leave out what is between the head and the last outputs; the stream that is being written stays."""
        while self.size > self._limit:
            first = self._tail[0] if self._tail else None
            if first is not None and first.pieces:
                size = len(first.pieces.popleft())
                first.size -= size
                self._grow(first, -size)
            elif first is not None and first is not self._stream:
                size = self._remove(first)
            elif self._head and self._head[-1] is not self._stream:  # a display in it has grown
                size = self._remove(self._head[-1])
            else:
                return
            self._left_out += size

    def _remove(self, output: _Output) -> int:
        if output.in_head:
            self._head.pop()
        else:
            self._tail.popleft()
        if output.display_id:
            left = self._displays[output.display_id]
            left.remove(output)
            if not left:
                del self._displays[output.display_id]
        self._grow(output, -output.size)
        return output.size - _OUTPUT_COST


def display_id_of(content: Mapping[str, Any]) -> str:
    """The id of a display, by which it can be updated; empty for none."""
    display_id = _object(content.get("transient")).get("display_id")
    return display_id if isinstance(display_id, str) else ""


def count_of(content: Mapping[str, Any]) -> int | None:
    """The number of an execution, as a notebook shows it."""
    count = content.get("execution_count")
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def _without_overwritten(line: str) -> str:
    """Of a line with too many controls, what follows the last carriage return."""
    shown = line.rstrip("\r")
    start = shown.rfind("\r") + 1
    return ("\r" if start else "") + shown[start:].replace("\b", "") + ("\r" if len(shown) < len(line) else "")


def _notice(size: int) -> dict[str, Any]:
    text = f"\n[{size} characters of output are left out here: the cell printed more than the gateway keeps]\n"
    return {"output_type": "stream", "name": "stderr", "text": text}


def _text(value: object) -> str:
    if isinstance(value, list):
        return "".join(line for line in value if isinstance(line, str))
    return value if isinstance(value, str) else ""


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _estimate(data: Mapping[str, Any]) -> int:
    return sum(len(value) if isinstance(value, str) else len(str(value)) for value in data.values())
