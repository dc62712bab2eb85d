"""Frames and payloads between the server and the login node, and other data in their place."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as some

from gateway_slurm.slurm.ssh.login_node.protocol import HEAD, MAX_FRAME, Frames, count_of, frame, pack, unpack

FRAME = some.tuples(some.integers(0, 255), some.integers(0, 2**32 - 1), some.binary(max_size=300))
FIELDS = some.dictionaries(some.text(), some.none() | some.integers() | some.text(), max_size=4)


@given(some.lists(FRAME, max_size=6), some.data())
def test_frames_are_the_same_however_they_arrive(frames: list[tuple[int, int, bytes]], data: some.DataObject) -> None:
    """The data may be cut anywhere; the rest waits."""
    stream = b"".join(frame(*each) for each in frames)
    reader, found = Frames(), []
    at = 0
    while at < len(stream):
        step = data.draw(some.integers(1, len(stream)))
        found += reader.feed(stream[at : at + step])
        at += step
    assert found == frames


@given(some.lists(some.binary(max_size=40), max_size=5))
def test_any_bytes_are_frames_or_refused(pieces: list[bytes]) -> None:
    """The only error is ValueError."""
    reader = Frames()
    try:
        found = [each for piece in pieces for each in reader.feed(piece)]
    except ValueError:
        return
    assert sum(HEAD.size + len(payload) for _kind, _number, payload in found) <= sum(map(len, pieces))


def test_a_frame_that_is_too_long_is_refused_before_it_comes() -> None:
    """Nothing of it is stored."""
    with pytest.raises(ValueError, match="at most"):
        list(Frames().feed(HEAD.pack(1, 1, MAX_FRAME + 1)))


@given(FIELDS, some.lists(some.binary(max_size=40), max_size=3))
def test_what_is_packed_is_unpacked(fields: dict[str, object], data: list[bytes]) -> None:
    """Fields and data."""
    assert unpack(pack(fields, *data)) == (fields, data)


@given(some.binary(max_size=60) | some.binary(max_size=30).map(lambda text: struct.pack("!I", len(text)) + text))
def test_any_payload_is_unpacked_or_refused(payload: bytes) -> None:
    """The only error is ValueError; an accepted payload has the size that it had."""
    try:
        fields, data = unpack(payload)
    except ValueError:
        return
    assert isinstance(fields, dict)
    assert len(payload) > 4 + sum(4 + len(each) for each in data)


@given(FIELDS, some.binary(min_size=1, max_size=20), some.data())
def test_a_payload_that_is_cut_short_is_refused(fields: dict[str, object], said: bytes, data: some.DataObject) -> None:
    """At any place but between two parts: an incomplete part is never taken for a complete one."""
    whole, without = pack(fields, said), pack(fields)
    cut = data.draw(some.integers(0, len(whole) - 1).filter(lambda at: at != len(without)))
    with pytest.raises(ValueError, match=r"\w"):
        unpack(whole[:cut])


@pytest.mark.parametrize("text", ["[]", "null", "7", "{", "\xff", "[" * 100_000], ids=lambda text: text[:4])
def test_a_payload_needs_fields(text: str) -> None:
    """They must be a JSON object."""
    part = text.encode("latin-1")
    with pytest.raises(ValueError, match=r"\w"):
        unpack(struct.pack("!I", len(part)) + part)
    assert unpack(pack(json.loads('{"a": 1}'))) == ({"a": 1}, [])


@given(some.binary(max_size=8))
def test_a_count_has_four_bytes(data: bytes) -> None:
    """Credit of any other size is refused."""
    if len(data) == 4:
        assert count_of(data) == int.from_bytes(data, "big")
    else:
        with pytest.raises(ValueError, match="bytes"):
            count_of(data)
