"""The header of a message that is too large, and the answer to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jupyter_server.services.kernels.connection.base import serialize_msg_to_ws_v1

from gateway_slurm.gateway.channels import messages
from gateway_slurm.gateway.oversized import answer, channel_and_header, reason_of
from gateway_slurm.gateway.tornado_compat import KEPT

HEADER = {"msg_id": "m", "msg_type": "execute_request", "session": "s", "username": "", "date": "d", "version": "5.3"}
# A cell that looks like a message, in text and in JSON.
CODE = '{"header": {"msg_type": "x", "msg_id": "wrong"}, "channel": "control"}' + "a\\" * (2 * KEPT) + '","header":{'
FIELDS: dict[str, Any] = {
    "buffers": [],
    "channel": "shell",
    "content": {"code": CODE, "silent": False},
    "header": HEADER,
    "metadata": {"cellId": "c"},
    "parent_header": {},
}


def known_of(message: bytes) -> tuple[bytes, bytes]:
    """What is kept of it."""
    return message[:KEPT], message[-KEPT:]


@pytest.mark.parametrize(
    "order",
    [
        ("buffers", "channel", "content", "header", "metadata", "parent_header"),  # JupyterLab's
        ("header", "msg_id", "parent_header", "content", "channel"),
        ("channel", "content", "parent_header", "header"),
        ("header", "content"),
    ],
    ids=lambda order: order[0],
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["short", "spaces"])
def test_the_header_in_json_may_be_anywhere(order: tuple[str, ...], separators: tuple[str, str]) -> None:
    """Before the content or after it; a text in the cell that looks like one is none."""
    fields = {**FIELDS, "msg_id": "m"}
    text = json.dumps({name: fields[name] for name in order}, separators=separators).encode()
    assert len(text) > 3 * KEPT
    assert channel_and_header("", *known_of(text)) == ("shell", HEADER)


def test_the_header_of_a_binary_message_is_at_its_beginning() -> None:
    """Also with buffers, in both formats."""
    parts = [json.dumps(part).encode() for part in (HEADER, {}, {}, {"data": {}})]
    frame = serialize_msg_to_ws_v1([*parts, b"x" * (3 * KEPT)], "control")
    assert channel_and_header(messages.V1, *known_of(b"".join([frame]))) == ("control", HEADER)
    text = json.dumps({**FIELDS, "content": {}, "channel": "stdin"}).encode()
    offsets = b"".join(number.to_bytes(4, "big") for number in (2, 12, 12 + len(text)))
    assert channel_and_header("", *known_of(offsets + text + b"\xff" * (3 * KEPT))) == ("stdin", HEADER)


@pytest.mark.parametrize("protocol", ["", messages.V1])
@pytest.mark.parametrize(
    "message",
    [
        *(b"", b"\0" * 100, b"\xff" * 100, b"[" * 100, b'{"header":{"msg_id":5,"msg_type":"x"}}'),
        b'{"header":{"msg_id":"5","msg_type":"x","y":"' + b"z" * 20_000 + b'"}}',
        (6).to_bytes(8, "little") + b"\xff" * 200,
        b'{"header":' + b'{"header":' * 5000,
    ],
)
def test_what_is_no_message_has_no_header(protocol: str, message: bytes) -> None:
    """A client may send anything."""
    assert channel_and_header(protocol, message, message)[1] == {}


def message(protocol: str, header: dict[str, Any]) -> bytes:
    """A large message in the websocket's format."""
    if not protocol:
        return json.dumps({**FIELDS, "header": header}).encode()
    parts = [json.dumps(part).encode() for part in (header, {}, {}, FIELDS["content"])]
    return b"".join([serialize_msg_to_ws_v1(parts, "shell")])


def test_a_refused_cell_ends() -> None:
    """With the error under it, a reply, and idle, in the websocket's format; other requests get a reply of error."""
    reason = reason_of(140 << 20, 128 << 20)
    assert "147 MB" in reason
    for protocol in ("", messages.V1):
        frames = answer(protocol, *known_of(message(protocol, HEADER)), reason)
        decoded = [messages.decode(protocol, frame) for frame in frames]
        assert [(channel, messages.header_of(parts)["msg_type"]) for channel, parts in decoded] == [
            ("iopub", "error"),
            ("shell", "execute_reply"),
            ("iopub", "status"),
        ]
        assert all(messages.parent_header_of(parts) == HEADER for _channel, parts in decoded)
        assert messages.content_of(decoded[0][1])["evalue"] == reason
    kinds = [
        messages.header_of(messages.decode("", frame)[1])["msg_type"]
        for msg_type in ("comm_msg", "inspect_request")
        for frame in answer("", *known_of(message("", {**HEADER, "msg_type": msg_type})), reason)
    ]
    assert kinds == ["status", "inspect_reply", "status"]
    assert answer("", b"no", b"message", reason) == []
