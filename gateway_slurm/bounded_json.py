"""JSON that another process wrote, parsed only where that takes some milliseconds.

``json.loads`` holds all threads of the process while it parses: 16 MiB of ``[[],[],…`` take seconds, on a loop or in a
thread. The time goes with the number of values, not with the bytes of a long text.
"""

from __future__ import annotations

import json
from typing import Any, Final

MAX_VALUES: Final = 20_000
"""Commas, colons and brackets of a text that is parsed, those inside its strings included."""


def load_json(data: bytes | bytearray | memoryview | str, limit: int, *, values: int = MAX_VALUES) -> Any:
    """Parse at most ``limit`` bytes with at most ``values`` values. Raises ValueError, also for what nests too deep."""
    if len(data) > limit:
        raise ValueError(f"JSON of {len(data)} bytes, and the limit is {limit}")
    text = data if isinstance(data, str) else bytes(data)
    if len(text) > values:
        signs: tuple[Any, ...] = (",", ":", "[", "{") if isinstance(text, str) else (b",", b":", b"[", b"{")
        found = sum(map(text.count, signs))
        if found > values:
            raise ValueError(f"JSON of {found} values, and the limit is {values}")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that nests too deep") from None
