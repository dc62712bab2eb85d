"""Kernel messages on a websocket: jupyter_server's two formats, to and from ZMQ's parts. Pure.

Parts are those of the wire protocol after the signature: header, parent header, metadata, content (JSON texts), then
buffers. A client's frame is untrusted: every count is checked against the frame's size before it is used.

Source: jupyter_server, "WebSocket kernel wire protocols" (the JSON one, and
``v1.kernel.websocket.jupyter.org``).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from jupyter_client.session import DELIM, Session
from jupyter_server.services.kernels.connection.base import serialize_msg_to_ws_v1

V1 = "v1.kernel.websocket.jupyter.org"
CHANNELS = ("shell", "control", "stdin", "iopub")
_JSON_PARTS = ("header", "parent_header", "metadata", "content")
MAX_PARTS = 4096
# Bytes of a client's content that are parsed.
MAX_PARSED = 1 << 20
# Bytes of a client's header, which the server keeps until the kernel has answered; Jupyter's own have some hundred.
MAX_HEADER = 16 << 10


class MessageError(ValueError):
    """A frame that is not a kernel message."""


def encode(protocol: str, channel: str, parts: Sequence[bytes]) -> bytes | str:
    """A message for the websocket: bytes for a binary frame, str for a text frame."""
    if protocol == V1:
        return serialize_msg_to_ws_v1(parts, channel)  # type: ignore[no-any-return]
    # The parts are JSON already: they are joined, not parsed and written again.
    header = header_of(parts)
    ids = json.dumps({"channel": channel, "msg_id": header.get("msg_id"), "msg_type": header.get("msg_type")})
    named = [b'"%s":%s' % (name.encode(), bytes(part)) for name, part in zip(_JSON_PARTS, parts, strict=False)]
    text = b"{" + b",".join([*named, ids[1:-1].encode()]) + b"}"
    if len(parts) <= len(_JSON_PARTS):
        return text.decode(errors="replace")
    pieces = [text, *parts[len(_JSON_PARTS) :]]
    offsets = accumulate(map(len, pieces[:-1]), initial=4 * (len(pieces) + 1))
    return b"".join([struct.pack(f"!{len(pieces) + 1}I", len(pieces), *offsets), *pieces])


def decode(protocol: str, frame: bytes | str) -> tuple[str, list[bytes]]:
    """Channel and parts of a client's frame; raises MessageError for a malformed one."""
    try:
        channel, parts = _decode_v1(frame) if protocol == V1 else _decode_json(frame)
    except (ValueError, struct.error, RecursionError) as error:
        raise MessageError(f"a frame of {len(frame)} bytes is not a kernel message: {error}") from error
    if channel not in CHANNELS:
        raise MessageError(f"there is no channel {channel[:40]!r}")
    if len(parts[0]) > MAX_HEADER:
        raise MessageError(f"a header of {len(parts[0])} bytes, and {MAX_HEADER} is the limit")
    return channel, parts


def make(session: Session, msg_type: str, content: dict[str, Any], parent: dict[str, Any] | None = None) -> list[bytes]:
    """The parts of a message of the server's own."""
    message = session.msg(msg_type, content, parent=parent)
    return [session.pack(message[name]) for name in _JSON_PARTS]


def parts_of(frames: list[bytes]) -> list[bytes]:
    """The parts of a message from ZMQ, without identities, delimiter and signature; empty for a malformed one."""
    try:
        return frames[frames.index(DELIM) + 2 :]
    except ValueError:
        return []


def header_of(parts: Sequence[bytes]) -> dict[str, Any]:
    """The message's header; empty for a malformed one."""
    return _object(parts, 0)


def parent_header_of(parts: Sequence[bytes]) -> dict[str, Any]:
    """The header of the request that the message belongs to; empty for none."""
    return _object(parts, 1)


def parent_id(parts: Sequence[bytes]) -> str:
    """The id of the request that a message belongs to; empty for none."""
    return str(parent_header_of(parts).get("msg_id", ""))


def metadata_of(parts: Sequence[bytes]) -> dict[str, Any]:
    """The message's metadata; empty for a malformed one."""
    return _object(parts, 2)


def content_of(parts: Sequence[bytes]) -> dict[str, Any]:
    """The message's content; empty for a malformed one."""
    return _object(parts, 3)


def _object(parts: Sequence[bytes], number: int) -> dict[str, Any]:
    try:
        found = json.loads(bytes(parts[number]))
    except (ValueError, IndexError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _decode_v1(frame: bytes | str) -> tuple[str, list[bytes]]:
    """From offsets, channel and parts."""
    if isinstance(frame, str):
        raise MessageError("a text frame, and the protocol has binary ones only")
    (count,) = struct.unpack_from("<Q", frame)
    if not 6 <= count <= MAX_PARTS or len(frame) < 8 * (count + 1):
        raise MessageError(f"{count} offsets")
    offsets = struct.unpack_from(f"<{count}Q", frame, 8)
    if list(offsets) != sorted(offsets) or offsets[0] < 8 * (count + 1) or offsets[-1] > len(frame):
        raise MessageError("offsets that are not in order, or lie outside the frame")
    pieces = [frame[low:high] for low, high in pairwise(offsets)]
    for piece in pieces[1:5]:
        # A large content is not parsed on the loop: the kernel does that.
        if len(piece) <= MAX_PARSED and not isinstance(json.loads(piece), dict):
            raise MessageError("a part that is no JSON object")
    return pieces[0].decode(), pieces[1:]


def _decode_json(frame: bytes | str) -> tuple[str, list[bytes]]:
    """From one text, or from a binary frame with offsets, the text and buffers."""
    text, buffers = _take_buffers(frame) if isinstance(frame, bytes) else (frame, [])
    message = json.loads(text)
    if not isinstance(message, dict):
        raise MessageError("no JSON object")
    parts = []
    for name in _JSON_PARTS:
        part = message.get(name, {} if name != "header" else None)
        if not isinstance(part, dict):
            raise MessageError(f"{name} is no object")
        parts.append(json.dumps(part).encode())
    return str(message.get("channel") or "shell"), [*parts, *buffers]


def _take_buffers(frame: bytes) -> tuple[bytes | str, list[bytes]]:
    (count,) = struct.unpack_from("!I", frame)
    if not 1 <= count <= MAX_PARTS or len(frame) < 4 * (count + 1):
        raise MessageError(f"{count} buffers")
    offsets = [*struct.unpack_from(f"!{count}I", frame, 4), len(frame)]
    if offsets != sorted(offsets) or offsets[0] < 4 * (count + 1):
        raise MessageError("offsets that are not in order, or lie outside the frame")
    pieces = [frame[low:high] for low, high in pairwise(offsets)]
    return pieces[0], pieces[1:]
