"""Framing, messages and openings: whatever arrives is understood or refused, and nothing else happens."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_slurm.link import endpoints, envelope, program, wire

texts = st.text(max_size=50)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda v: st.lists(v, max_size=3))
SIDES = (wire.UP, wire.DOWN)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """``data`` in pieces, as TCP may deliver it."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(st.lists(st.binary(max_size=200), max_size=8), st.lists(st.integers(0, 2000), max_size=12))
def test_frames_come_out_as_they_went_in_however_they_are_cut(bodies, places):
    """A byte stream in any pieces gives the frames that were sent, in order."""
    reader = wire.FrameReader(limit=200)
    stream = b"".join(map(wire.frame, bodies))
    assert [frame for piece in cut(stream, places) for frame in reader.feed(piece)] == bodies


@given(st.binary(max_size=300))
def test_a_reader_never_holds_more_than_its_limit(noise):
    """Noise gives frames within the limit, or WireError; nothing else is raised and nothing piles up."""
    reader = wire.FrameReader(limit=64)
    try:
        frames = reader.feed(noise)
    except wire.WireError:
        return
    assert all(len(frame) <= 64 for frame in frames)
    assert len(reader._buffer) < 64 + 4


@given(st.lists(st.binary(max_size=100), max_size=8))
def test_messages_packed_into_a_frame_come_out_again(bodies):
    """One frame may hold several messages."""
    assert wire.unpack(wire.pack(bodies)) == bodies


@given(st.binary(max_size=100))
def test_unpacking_noise_gives_messages_or_a_wire_error(noise):
    """What does not fill the frame exactly is refused."""
    with contextlib.suppress(wire.WireError):
        assert wire.pack(wire.unpack(noise)) == noise


@given(
    st.sampled_from(sorted(wire.MESSAGES)), st.dictionaries(texts, json_values, max_size=4), st.integers(0, 2**32 - 1)
)
def test_every_message_of_the_table_round_trips_from_its_senders_only(name, fields, stream):
    """The table says who may send what; the other side's messages are refused."""
    _number, who, form = wire.MESSAGES[name]
    is_json = form == wire.JSON
    body = wire.encode(name, **fields) if is_json else wire.encode_stream(name, stream, b"\0\xff")
    payload = fields if is_json else (stream, b"\0\xff")
    for side in SIDES:
        if who in (side, wire.BOTH):
            assert wire.decode(body, side) == (name, payload)
        else:
            with pytest.raises(wire.WireError):
                wire.decode(body, side)


@given(st.binary(max_size=200), st.sampled_from(SIDES))
def test_decoding_noise_gives_a_message_or_a_wire_error(noise, side):
    """Nothing that arrives raises anything else."""
    try:
        name, _payload = wire.decode(noise, side)
    except wire.WireError:
        return
    assert name in wire.MESSAGES


@given(texts, texts, st.binary(max_size=100), texts)
def test_an_opening_round_trips(launcher_id, jobid, proof, reason):
    """What the launcher says of itself arrives as it was said."""
    opening = wire.Opening.decode(wire.Opening(wire.COMPLAINT, launcher_id, jobid, proof, reason).encode())
    assert (opening.launcher_id, opening.jobid, opening.proof, opening.reason) == (launcher_id, jobid, proof, reason)


@given(st.binary(max_size=200))
def test_an_opening_of_noise_is_refused(noise):
    """Every first frame is an opening or a WireError."""
    with contextlib.suppress(wire.WireError):
        wire.Opening.decode(noise)


@given(texts, texts, texts, texts)
def test_the_binding_tells_every_field_apart(jobid, launcher_id, other_jobid, other_launcher_id):
    """No two openings are bound to the same bytes unless job and launcher are the same."""
    key = bytes(32)
    same = (jobid, launcher_id) == (other_jobid, other_launcher_id)
    assert (wire.binding(jobid, launcher_id, key) == wire.binding(other_jobid, other_launcher_id, key)) == same


@given(st.text(max_size=60))
def test_endpoints_are_parsed_or_none(text):
    """Any text is an endpoint or not; none of them raises."""
    endpoint = endpoints.parse_endpoint(text)
    assert endpoint is None or 0 < endpoint[1] < 65536


def test_a_preamble_of_another_version_is_named():
    """A launcher that meets a newer server says so."""
    other = wire.MAGIC + bytes([wire.VERSION + 1]) + bytes(wire.KEY_BYTES)
    with pytest.raises(wire.WireError, match=f"version {wire.VERSION + 1}"):
        wire.parse_preamble(other)


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.integers(0, 10_000))
def test_sealed_frames_open_in_order_and_a_changed_bit_is_refused(plains, place):
    """Both directions carry frames that only the other end opens, once, and unchanged."""
    token, key = os.urandom(32), envelope.ReceiverKey()
    opening, up_seal, down_unseal = envelope.seal_hello(key.public, token, "L", "1", {"pid": 1})
    hello, down_seal, up_unseal = key.open_hello(wire.Opening.decode(opening.encode()), [os.urandom(32), token])
    assert hello == {"pid": 1}
    for seal, unseal in ((up_seal, up_unseal), (down_seal, down_unseal)):
        sealed = [seal(plain) for plain in plains]
        assert [unseal(frame) for frame in sealed] == plains
        with pytest.raises(wire.WireError):
            unseal(sealed[0])
    broken = bytearray(up_seal(plains[0]))
    broken[place % len(broken)] ^= 1
    with pytest.raises(wire.WireError):
        up_unseal(bytes(broken))


def test_what_the_node_runs_is_python_3_9():
    """The launcher and what it shares with the package parse as Python 3.9, the oldest that nodes may have."""
    text = program.launcher_program()
    ast.parse(text, feature_version=(3, 9))
    sources = ast.literal_eval(ast.parse(text).body[0].value)
    assert {"gateway_slurm.link.wire", "gateway_slurm.link.envelope", "launchers.main"} <= set(sources)
    for source in sources.values():
        ast.parse(source, feature_version=(3, 9))


def test_the_program_carries_the_sources_verbatim():
    """What the tests and the type checker see is what runs on the node."""
    sources = ast.literal_eval(ast.parse(program.launcher_program()).body[0].value)
    assert sources["launchers.main"] == (program.launchers_directory() / "main.py").read_text()
