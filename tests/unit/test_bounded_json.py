"""JSON that would take long is not parsed."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from typing import Any

import pytest

from gateway_slurm import bounded_json
from gateway_slurm.bounded_json import load_json, loading, split_object


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


def test_signs_in_a_text_are_no_values() -> None:
    """A printed table has many commas, and escaped quotes."""
    text = json.dumps({"text": 'a, "b": [{c}] \\' * 10_000})
    assert load_json(text, 1 << 20) == json.loads(text)
    with pytest.raises(ValueError, match="values"):
        load_json('["\\\\",' + "[]," * 20_000 + "1]", 1 << 20)


def run(steps: Generator[None, None, Any]) -> tuple[Any, float]:
    """What a generator returns, and how long its longest step took, in seconds of this thread."""
    longest = 0.0
    while True:
        begin = time.thread_time()
        try:
            next(steps)
        except StopIteration as end:
            return end.value, max(longest, time.thread_time() - begin)
        longest = max(longest, time.thread_time() - begin)


VALUES = [
    {},
    {"a": 1, "b": -1.5e-7, "c": None, "d": True},
    {"text": 'quotes " and \\" backslashes \\\\ and } { ] [ , :', "name": "é 😀"},
    {"list": [1, [2, {"a": "]"}], "}"], "empty": [], "object": {"x": {"y": "\\"}}},
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_is_split_into_its_members(value: dict[str, Any], indent: int | None) -> None:
    """Each member is the text of its value."""
    text = f" {json.dumps(value, indent=indent)}\n".encode()
    members, _longest = run(split_object(text))
    assert {name: json.loads(member) for name, member in members.items()} == value
    raw, _longest = run(split_object(json.dumps(value, ensure_ascii=False).encode()))
    assert {name: json.loads(member) for name, member in raw.items()} == value


NO_OBJECTS = (
    """[]  {  {"a"  {"a":  {"a":}  {"a":1  {"a":1,}  {"a":1}x  {a:1}  {"a":"  {"a":[}  {"a":"\\"}  {"a" 1}  {,}"""
)


@pytest.mark.parametrize("text", [b"", b'{"a":1 "b":2}', *NO_OBJECTS.encode().split()])
def test_what_is_no_object_is_not_split(text: bytes) -> None:
    """A ValueError says so."""
    with pytest.raises(ValueError):  # noqa: PT011 - the json module's own, too
        run(split_object(text))


LARGE = 2 << 20
HOSTILE = {
    "text": b"x" * LARGE,
    "quotes": b'\\"' * (LARGE // 2),
    "backslashes": b"\\" * LARGE,
    "lines": b"a line\\n" * (LARGE // 8),
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
def test_a_large_text_is_split_and_decoded_in_short_steps(kind: str) -> None:
    """Whatever is in it; each step takes some milliseconds, also on a busy machine."""
    text = b'{"name": "stdout", "text": "%b", "n": 1}' % HOSTILE[kind]
    members, longest = run(split_object(text))
    assert (len(members["text"]), members["n"]) == (LARGE + 2, b"1")
    assert longest < 0.05
    loaded, longest = run(loading(text, len(text), whole=1000))
    assert loaded["text"] == json.loads(members["text"])
    assert longest < 0.05


def test_nested_values_are_skipped_in_short_steps_and_left_out_where_they_are_too_many() -> None:
    """The other members are there."""
    text = b'{"a": %b, "b": [1, 2], "c": {"d": "e", "f": %b}}' % ((b"[" + b"[]," * (LARGE // 3) + b"1]",) * 2)
    loaded, longest = run(loading(text, len(text), whole=1 << 20))
    assert loaded == {"b": [1, 2], "c": {"d": "e"}}
    assert longest < 0.05
    with pytest.raises(ValueError, match="1048576"):
        run(loading(b'{"x": {"y": {"z": %b}}}' % text, 8 * LARGE, whole=1 << 20, lenient=0))


def test_a_string_is_never_cut_inside_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    """Escapes, pairs of escapes and characters of several bytes, at each offset of a cut."""
    monkeypatch.setattr(bounded_json, "_DECODED", 64)
    for unit in ("é", "😀", "\\", "\n", '"', "a😀\\é\n"):
        for shift in range(13):
            value = "x" * shift + unit * (600 // len(unit))
            for ascii_only in (True, False):
                text = json.dumps({"text": value}, ensure_ascii=ascii_only).encode()
                assert run(loading(text, len(text), whole=100))[0] == {"text": value}, (unit, shift)
