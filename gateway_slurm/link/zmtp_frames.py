"""ZMTP 3's frames (ZeroMQ RFC 23) and Jupyter's delimiter: what both ends of the link know of a kernel's connections.

A connection's direction is a greeting, then frames: a byte of flags, the body's size in one byte, or in eight where
it is LONG, and the body.
"""

from __future__ import annotations

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4
# Jupyter's message: topic frames, this, signature, header, parent header, metadata, content, buffers.
DELIMITER = b"<IDS|MSG>"
HEADER_FRAME, PARENT_FRAME = 2, 3  # counted from the delimiter


def encode_frame(flags: int, body: bytes) -> bytes:
    """One frame as it goes over the connection."""
    if len(body) > 255:
        return bytes([flags | LONG]) + len(body).to_bytes(8, "big") + body
    return bytes([flags, len(body)]) + body
