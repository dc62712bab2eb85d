"""What users, their jobs and kernels say, as it may stand in a log or on a terminal."""

from __future__ import annotations


def printable(text: object, line_end: str = "\n    ") -> str:
    """``text`` with escapes for what a terminal would obey or that changes the order of what is read.

    That is all that Python calls not printable, but for tabs: C0 and C1, marks of writing direction, ends of lines of
    other kinds. A line's end becomes ``line_end``, so that no line of a log begins with what the text says.
    """
    lines = str(text).replace("\r\n", "\n").split("\n")
    return line_end.join("".join(map(_shown, line)) for line in lines)


def in_one_line(text: object) -> str:
    """The same for a cell of a table."""
    return printable(text, "\\n")


def _shown(character: str) -> str:
    if character.isprintable() or character == "\t":
        return character
    return character.encode("unicode_escape").decode()
