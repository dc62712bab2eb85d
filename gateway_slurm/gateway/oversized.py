"""Messages of a frontend that are larger than a server takes: each is answered as a request that failed.

Of such a message only the beginning and the end are kept, see ``tornado_compat``. The header is in one of them: at the
beginning of a binary frame; in JSON text JupyterLab writes it after the content. Pure.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

from jupyter_client.session import Session

from gateway_slurm.gateway.channels import messages

NAME: Final = "MessageTooLarge"
# The code with which a websocket closes (RFC 6455, section 7.4.1), where its message has no header to answer.
MESSAGE_TOO_BIG: Final = 1009
# A field's name has "{" or "," before it; in a text, which quotes its quotes, that cannot be.
_HEADER: Final = re.compile(r'[{,]\s*"header"\s*:\s*(?=\{)')
_CHANNEL: Final = re.compile(r'[{,]\s*"channel"\s*:\s*"([a-z]{1,20})"')
# Places that may be a header; each costs time.
MAX_LOOKS: Final = 20
_DECODER: Final = json.JSONDecoder()


def reason_of(size: int, limit: int) -> str:
    """What the user reads."""
    return (
        f"the message has {size / 1e6:.0f} MB, and this server takes {limit / 1e6:.0f} MB "
        "(SlurmMappingKernelManager.max_request_size): write the data to a file and read it in the cell"
    )


def channel_and_header(protocol: str, beginning: bytes, end: bytes) -> tuple[str, dict[str, Any]]:
    """Channel and header of a message of which these parts are known; the header is empty if it is in neither."""
    found = _from_v1(beginning) if protocol == messages.V1 else _from_json(beginning, end)
    channel, header = found
    is_message = channel in messages.CHANNELS and all(
        isinstance(header.get(name), str) for name in ("msg_id", "msg_type")
    )
    if not is_message or len(json.dumps(header)) > messages.MAX_HEADER:
        return "shell", {}
    return channel, header


def _from_v1(beginning: bytes) -> tuple[str, dict[str, Any]]:
    try:
        (count,) = struct.unpack_from("<Q", beginning)
        if not 6 <= count <= messages.MAX_PARTS:
            return "", {}
        offsets = struct.unpack_from("<3Q", beginning, 8)
        channel, header = beginning[offsets[0] : offsets[1]], beginning[offsets[1] : offsets[2]]
        found = json.loads(header)
    except (struct.error, ValueError, RecursionError):
        return "", {}
    return channel.decode(errors="replace"), found if isinstance(found, dict) else {}


def _from_json(beginning: bytes, end: bytes) -> tuple[str, dict[str, Any]]:
    texts = [part.decode(errors="replace") for part in (beginning, end)]
    header = next((header for text in texts for header in _headers(text)), {})
    channels = [found[1] for text in texts if (found := _CHANNEL.search(text))]
    return next((name for name in channels if name in messages.CHANNELS), "shell"), header


def _headers(text: str) -> Iterator[dict[str, Any]]:
    """The objects in a text that look like a request's header."""
    for place in islice(_HEADER.finditer(text), MAX_LOOKS):
        try:
            found, _end = _DECODER.raw_decode(text, place.end())
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("msg_type"), str) and "msg_id" in found:
            yield found


def answer(protocol: str, beginning: bytes, end: bytes, reason: str) -> list[bytes | str]:
    """The frames for the websocket: error, reply and idle, as of a cell that failed; none if no header is known."""
    channel, header = channel_and_header(protocol, beginning, end)
    return _refusal(protocol, channel, header, reason) if header else []


def _refusal(protocol: str, channel: str, header: dict[str, Any], reason: str) -> list[bytes | str]:
    session = Session()
    error = {"ename": NAME, "evalue": reason, "traceback": [reason]}
    made: list[tuple[str, str, dict[str, Any]]] = []
    msg_type = header["msg_type"]
    if msg_type == "execute_request":
        made.append(("iopub", "error", error))
    if msg_type.endswith("_request"):
        reply = {"status": "error", "execution_count": None, **error}
        made.append((channel, msg_type.removesuffix("_request") + "_reply", reply))
    made.append(("iopub", "status", {"execution_state": "idle"}))
    frames = []
    for its_channel, its_type, content in made:
        parts = messages.make(session, its_type, content, header)
        frames.append(messages.encode(protocol, its_channel, parts))
    return frames
