"""Kernel messages on websockets: both formats, and frames that no honest client sends."""

from __future__ import annotations

import json
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_server.services.kernels.connection import base as jupyter

from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.channels.messages import V1, MessageError

OBJECTS = st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers() | st.none(), max_size=3)
PARTS = st.builds(
    lambda objects, buffers: [json.dumps(one).encode() for one in objects] + buffers,
    st.lists(OBJECTS, min_size=4, max_size=4),
    st.lists(st.binary(max_size=50), max_size=3),
)
CHANNELS = st.sampled_from(messages.CHANNELS)
PROTOCOLS = pytest.mark.parametrize("protocol", ["", V1], ids=["json", "v1"])


@PROTOCOLS
@given(channel=CHANNELS, parts=PARTS)
def test_what_is_encoded_is_decoded(protocol, channel, parts):
    """Channel, parts and buffers come back as they were."""
    decoded_channel, decoded = messages.decode(protocol, messages.encode(protocol, channel, parts))
    assert decoded_channel == channel
    assert [json.loads(part) for part in decoded[:4]] == [json.loads(part) for part in parts[:4]]
    assert decoded[4:] == parts[4:]


@given(channel=CHANNELS, parts=PARTS)
def test_jupyter_server_reads_what_is_written_here_and_writes_what_is_read_here(channel, parts):
    """Both formats are jupyter_server's own."""
    frame = messages.encode(V1, channel, parts)
    assert jupyter.deserialize_msg_from_ws_v1(frame) == (channel, parts)
    assert messages.decode(V1, jupyter.serialize_msg_to_ws_v1(parts, channel)) == (channel, parts)


def test_jupyter_server_reads_the_json_format_with_buffers():
    """A message with buffers is a binary frame of offsets, text and buffers."""
    header = {"msg_id": "1", "msg_type": "comm_msg", "date": "2026-01-01T00:00:00Z"}
    parts = [json.dumps(one).encode() for one in (header, {}, {}, {"data": 1})]
    message = jupyter.deserialize_binary_message(messages.encode("", "iopub", [*parts, b"\0\1", b"two"]))
    assert (message["channel"], message["msg_type"], message["content"]) == ("iopub", "comm_msg", {"data": 1})
    assert message["buffers"] == [b"\0\1", b"two"]


@PROTOCOLS
@given(frame=st.binary(max_size=300) | st.text(max_size=300))
def test_any_other_frame_is_a_message_error(protocol, frame):
    """Whatever bytes or text come, they are a message or they raise MessageError, and nothing else."""
    try:
        channel, parts = messages.decode(protocol, frame)
    except MessageError:
        return
    assert channel in messages.CHANNELS
    assert len(parts) >= 4


@pytest.mark.parametrize("count", [0, 5, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_an_absurd_count_costs_nothing(count):
    """A frame that announces 2^64 parts is refused before anything is made of it."""
    with pytest.raises(MessageError, match="offsets"):
        messages.decode(V1, struct.pack("<Q", count) + b"x" * 100)


@given(parts=PARTS, position=st.integers(0, 200), value=st.integers(0, 255))
def test_a_damaged_frame_is_refused_or_read_within_its_bounds(parts, position, value):
    """One byte that is wrong never reads what lies outside the frame."""
    frame = bytearray(messages.encode(V1, "shell", parts))
    frame[position % len(frame)] = value
    try:
        _channel, decoded = messages.decode(V1, bytes(frame))
    except MessageError:
        return
    assert sum(map(len, decoded)) <= len(frame)


def test_deep_nesting_is_a_message_error():
    """JSON that nests without end does not end the interpreter's stack."""
    with pytest.raises(MessageError):
        messages.decode("", '{"header": ' + '{"a":' * 100_000)


def test_the_kernels_parts_follow_the_delimiter():
    """Identities and signature go; what is no message has no parts."""
    assert messages.parts_of([b"id", messages.DELIM, b"signature", b"{}", b"{}"]) == [b"{}", b"{}"]
    assert messages.parts_of([b"garbage"]) == []
    assert messages.header_of([]) == {}
    assert messages.header_of([b"[1]"]) == {}
    assert messages.parent_id([b"{}", b'{"msg_id": "7"}']) == "7"


@pytest.mark.parametrize("protocol", ["", V1])
def test_a_header_has_a_limit(protocol):
    """The server keeps it until the kernel has answered; contents may be large."""
    large = "x" * messages.MAX_HEADER
    parts = [json.dumps(part).encode() for part in ({"msg_id": "a"}, {}, {}, {"code": large})]
    assert messages.decode(protocol, messages.encode(protocol, "shell", parts)) == ("shell", parts)
    parts[0] = json.dumps({"msg_id": large}).encode()
    with pytest.raises(MessageError, match=f"a header of {len(parts[0])} bytes, and 16384 is the limit"):
        messages.decode(protocol, messages.encode(protocol, "shell", parts))


@pytest.mark.parametrize("protocol", ["", V1])
def test_a_large_content_is_passed_on_in_short_steps_without_a_look_into_it(protocol):
    """The kernel parses it; here a few megabytes of brackets would take a second."""
    content = b'{"data": [%b1], "code": "\\"}"}' % (b"[]," * (4 << 20 >> 2))
    header = {"msg_id": "1", "msg_type": "execute_request"}
    parts = [json.dumps(header).encode(), b"{}", b"{}", content]
    steps, longest = messages.decoding(protocol, messages.encode(protocol, "shell", parts)), 0.0
    while True:
        began = time.thread_time()
        try:
            next(steps)
        except StopIteration as end:
            channel, decoded = end.value
            break
        longest = max(longest, time.thread_time() - began)
    assert (channel, messages.header_of(decoded), decoded[1:]) == ("shell", header, parts[1:])
    assert longest < 0.05
    assert messages.content_of(decoded) == {}


@pytest.mark.parametrize("size", [60_000, 600_000])
def test_a_message_may_have_many_numbers(size):
    """A widget's data."""
    content = {"data": list(range(size // 6))}
    parts = [json.dumps(part).encode() for part in ({"msg_id": "1", "msg_type": "comm_msg"}, {}, {}, content)]
    for protocol in ("", V1):
        _channel, decoded = messages.decode(protocol, messages.encode(protocol, "shell", parts))
        assert json.loads(decoded[3]) == content


def test_a_header_is_bounded_by_its_bytes_and_its_values():
    """Each value would take memory in the server."""
    for header in (b'{"msg_id": "%b"}' % (b"x" * messages.MAX_HEADER), b'{"msg_id": [%b1]}' % (b"[]," * 1000)):
        assert messages.header_of([header, b"{}", b"{}", b"{}"]) == {}
        assert messages.parent_header_of([b"{}", header * 5, b"{}", b"{}"]) == {}
