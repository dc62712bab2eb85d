"""Slurm's host lists: ``a[1-2,07],b03,gpu[08-10]-ib`` to the names in it.

Source: scontrol(1), "show hostnames". Slurm itself expands a bracket group that ends the name or is followed
by another group; text after the last group (``-ib``) is what sites append for another network, and is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Final

from gateway_slurm.errors import GatewaySlurmError

MAX_HOSTS: Final = 65536
"""As many hosts as Slurm's own default for a list (MAX_RANGE, 64 k); more is refused."""
_MAX_TEXT: Final = 1 << 20
_MAX_DIGITS: Final = 18
_MAX_NAME: Final = 255
"""Characters of one host name, as RFC 1123 has it, section 2.1."""

_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_NAME = re.compile(r"[^\s,\[\]\x00-\x1f\x7f]+")


class HostListError(GatewaySlurmError, ValueError):
    """The text is no Slurm host list, or it names too many hosts."""


def expand(text: str, limit: int = MAX_HOSTS) -> list[str]:
    """Return the host names in Slurm's order; ``""`` and ``(null)``, a job without nodes, give ``[]``.

    Raises HostListError for unbalanced brackets, ranges that run backwards, and more than ``limit`` names.
    """
    if len(text) > _MAX_TEXT:
        raise HostListError(f"a host list of {len(text)} characters; at most {_MAX_TEXT} are read")
    text = text.strip()
    if text in ("", "(null)", "None assigned"):
        return []
    names: list[str] = []
    for item in _items(text):
        names.extend(_expand_item(item, limit - len(names)))
    return names


def _items(text: str) -> Iterator[str]:
    """Split at the commas that are outside of brackets; empty items are skipped, as Slurm does."""
    depth = start = 0
    for at, char in enumerate(text):
        if char == "[":
            depth += 1
        elif char == "]":
            depth -= 1
        if depth not in (0, 1):
            raise HostListError(f"unbalanced brackets in the host list {text[:200]!r}")
        if char == "," and depth == 0:
            if at > start:
                yield text[start:at]
            start = at + 1
    if depth:
        raise HostListError(f"unbalanced brackets in the host list {text[:200]!r}")
    if start < len(text):
        yield text[start:]


def _expand_item(item: str, room: int) -> list[str]:
    choices: list[list[str]] = []
    total, longest = 1, 0
    for group, literal in _PART.findall(item):
        part = [literal] if literal else _expand_group(group, item, room)
        total *= len(part)
        if total > room:
            raise HostListError(f"the host list names too many hosts at {item[:200]!r}")
        longest += max(map(len, part))
        if longest > _MAX_NAME:
            raise HostListError(f"a host name of more than {_MAX_NAME} characters in the host list: {item[:200]!r}")
        choices.append(part)
    names = ["".join(parts) for parts in product(*choices)]
    if not _NAME.fullmatch(names[0]):
        raise HostListError(f"{item[:200]!r} in the host list is no host name")
    return names


def _expand_group(group: str, item: str, room: int) -> list[str]:
    """Expand what is between brackets; zeros that pad a range's first number pad all of it."""
    values: list[str] = []
    for text in group.split(","):
        match = _RANGE.fullmatch(text)
        if match is None or len(text) > 2 * _MAX_DIGITS:
            raise HostListError(f"{text[:200]!r} in the host list item {item[:200]!r} is no range of numbers")
        low, high = match[1], match[2] or match[1]
        first, last = int(low), int(high)
        if last < first:
            raise HostListError(f"the range {text[:200]!r} in the host list item {item[:200]!r} runs backwards")
        if last - first >= room - len(values):
            raise HostListError(f"the host list names too many hosts at {item[:200]!r}")
        values += [str(number).zfill(len(low)) for number in range(first, last + 1)]
    return values
