"""Kernel messages on a websocket: jupyter_server's two formats, to and from ZMQ's parts. Pure.

Parts are those of the wire protocol after the signature: header, parent header, metadata, content (JSON texts), then
buffers. A client's frame is untrusted: every count is checked against the frame's size before it is used.

Source: jupyter_server, "WebSocket kernel wire protocols" (the JSON one, and
``v1.kernel.websocket.jupyter.org``).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Generator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from jupyter_client.session import DELIM, Session
from jupyter_server.services.kernels.connection.base import serialize_msg_to_ws_v1

from gateway_slurm.bounded_json import MAX_VALUES, load_json, split_object

V1 = "v1.kernel.websocket.jupyter.org"
CHANNELS = ("shell", "control", "stdin", "iopub")
_JSON_PARTS = ("header", "parent_header", "metadata", "content")
MAX_PARTS = 4096
# Bytes of a part that are parsed at once, unless its type has a bound of its own.
MAX_PARSED = 64 << 10
# Bytes of a header, which the server keeps until the kernel has answered; Jupyter's own have some hundred. A kernel
# that writes ASCII repeats it in several times as many.
MAX_HEADER, MAX_PARENT = 16 << 10, 64 << 10
# Values of a header, each of which takes memory; bytes of a channel's name.
MAX_HEADER_VALUES, MAX_CHANNEL = 500, 100
# Bytes of a kernel's content that are parsed, by the type of message; of a larger one nothing is believed.
CONTENT_LIMITS = {"status": 4 << 10, "input_request": 64 << 10, "execute_reply": 1 << 20}


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
    steps = decoding(protocol, frame)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            channel, parts = end.value
            return channel, parts


def decoding(protocol: str, frame: bytes | str) -> Generator[None, None, tuple[str, list[bytes]]]:
    """``decode`` in steps of about a millisecond."""
    try:
        channel, parts = _decode_v1(frame) if protocol == V1 else (yield from _decode_json(frame))
    except (ValueError, struct.error, RecursionError) as error:
        raise MessageError(f"a frame of {len(frame)} bytes is not a kernel message: {error}") from error
    if channel not in CHANNELS:
        raise MessageError(f"there is no channel {channel[:40]!r}")
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
    return _object(parts, 0, MAX_HEADER, MAX_HEADER_VALUES)


def parent_header_of(parts: Sequence[bytes]) -> dict[str, Any]:
    """The header of the request that the message belongs to; empty for none."""
    return _parsed_parent(bytes(parts[1])) if len(parts) > 1 else {}


@lru_cache(maxsize=256)
def _parsed_parent(part: bytes) -> dict[str, Any]:
    """All messages of a cell have the same one."""
    return _object([part], 0, MAX_PARENT, MAX_HEADER_VALUES)


def parent_id(parts: Sequence[bytes]) -> str:
    """The id of the request that a message belongs to; empty for none."""
    return str(parent_header_of(parts).get("msg_id", ""))


def metadata_of(parts: Sequence[bytes]) -> dict[str, Any]:
    """The message's metadata; empty for a malformed one."""
    return _object(parts, 2, MAX_PARSED)


def content_of(parts: Sequence[bytes], msg_type: str = "") -> dict[str, Any]:
    """The message's content; empty for a malformed one, and for one that is larger than its type may be."""
    return _object(parts, 3, CONTENT_LIMITS.get(msg_type, MAX_PARSED))


def _object(parts: Sequence[bytes], number: int, limit: int, values: int = MAX_VALUES) -> dict[str, Any]:
    try:
        found = load_json(parts[number], limit, values=values)
    except (ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_parts(parts: Sequence[bytes]) -> None:
    """Raise ValueError where a client's parts are no JSON objects. A large one is parsed by the kernel alone."""
    if len(parts[0]) > MAX_HEADER:
        raise MessageError(f"a header of {len(parts[0])} bytes, and {MAX_HEADER} is the limit")
    for part in parts[: len(_JSON_PARTS)]:
        is_object = (
            part[:1] == b"{"
            if len(part) > MAX_PARSED
            else isinstance(load_json(part, MAX_PARSED, values=MAX_PARSED), dict)
        )
        if not is_object:
            raise MessageError("a part that is no JSON object")


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
    _check_parts(pieces[1:])
    return pieces[0].decode(), pieces[1:]


def _decode_json(frame: bytes | str) -> Generator[None, None, tuple[str, list[bytes]]]:
    """From one text, or from a binary frame with offsets, the text and buffers."""
    text, buffers = _take_buffers(frame) if isinstance(frame, bytes) else (frame, [])
    yield
    message = yield from split_object(text.encode() if isinstance(text, str) else text)
    parts = [message.get(name, b"{}" if name != "header" else b"null") for name in _JSON_PARTS]
    _check_parts(parts)
    channel = load_json(message.get("channel", b'""'), MAX_CHANNEL)
    return str(channel or "shell"), [*parts, *buffers]


def _take_buffers(frame: bytes) -> tuple[bytes | str, list[bytes]]:
    (count,) = struct.unpack_from("!I", frame)
    if not 1 <= count <= MAX_PARTS or len(frame) < 4 * (count + 1):
        raise MessageError(f"{count} buffers")
    offsets = [*struct.unpack_from(f"!{count}I", frame, 4), len(frame)]
    if offsets != sorted(offsets) or offsets[0] < 4 * (count + 1):
        raise MessageError("offsets that are not in order, or lie outside the frame")
    pieces = [frame[low:high] for low, high in pairwise(offsets)]
    return pieces[0], pieces[1:]
