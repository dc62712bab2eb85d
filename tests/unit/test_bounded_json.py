"""JSON that would take long is not parsed."""

from __future__ import annotations

import time

import pytest

from gateway_slurm.bounded_json import load_json


@pytest.mark.parametrize("data", [b"[[],[]", b"[" * 19_000, b"x", b"\xff"])
def test_what_is_no_json_is_a_value_error(data: bytes) -> None:
    """Also what nests too deep for the parser."""
    with pytest.raises(ValueError):  # noqa: PT011 - the json module's own, too
        load_json(data, 1 << 20)


def test_many_values_are_refused_at_once_and_one_long_text_is_taken() -> None:
    """Bytes alone cost little; values do."""
    begin = time.monotonic()
    with pytest.raises(ValueError, match="values, and the limit is 20000"):
        load_json(b"[" + b"[]," * 5_000_000 + b"1]", 16 << 20)
    assert time.monotonic() - begin < 1
    with pytest.raises(ValueError, match="the limit is 10"):
        load_json('"' + "a" * 10 + '"', 10)
    assert load_json(b'"' + b"a" * (4 << 20) + b'"', 8 << 20) == "a" * (4 << 20)
