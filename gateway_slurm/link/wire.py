"""Frames and messages between server and launcher: one source for both ends.

The job script carries this file to the compute node, so it needs Python >= 3.9 and the
standard library only. It does no I/O and knows no cryptography (see ``envelope``).

On a connection the server speaks first::

    server    PREAMBLE      magic, version, X25519 public key made for this connection
    launcher  OPENING       a frame: its kind, a clear header, and either
                              HELLO      encapsulated key + sealed hello
                              COMPLAINT  HMAC-SHA256 under the launch token: what keeps it from HELLO
    both      frames        each sealed, each holding one or more messages of MESSAGES

A frame is a 4-byte big-endian length and that many bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import signal
import struct
from typing import Any

VERSION = 1
MAGIC = b"gslurm"
KEY_BYTES = 32
TAG_BYTES = 16
PREAMBLE_BYTES = len(MAGIC) + 1 + KEY_BYTES

# Until a peer has proved who it is it may send one frame of this size, and no more.
OPENING_LIMIT = 8 * 1024
# The largest message is START: an environment (at most 1 MiB) and an argv.
FRAME_LIMIT = 4 * 1024 * 1024

UP, DOWN, BOTH = "up", "down", "both"
JSON, STREAM = "json", "stream"

# The one table of messages: name -> (number, who may send it, form of the body).
# "up" is launcher to server. JSON bodies are objects; STREAM bodies are a stream id and bytes.
MESSAGES: dict[str, tuple[int, str, str]] = {
    "WELCOME": (1, DOWN, JSON),  # authenticated: next token, heartbeat, orphan timeout, streams
    "START": (2, DOWN, JSON),  # start a kernel
    "SIGNAL": (3, DOWN, JSON),  # signal a kernel's process group
    "STOP": (4, DOWN, JSON),  # end a kernel
    "RELEASE": (5, DOWN, JSON),  # end all kernels and exit
    "END_TIME": (6, DOWN, JSON),  # the job's time limit was changed
    "STDERR_LINE": (7, DOWN, JSON),  # a line for a kernel's standard error
    "REDIRECT": (8, DOWN, JSON),  # in place of WELCOME: another server owns this launcher
    "ACK": (9, DOWN, JSON),  # clients have a kernel's output up to here
    "STEP": (10, DOWN, JSON),  # start a job step from inside the job (steps.py)
    "STEP_END": (11, DOWN, JSON),  # end one
    "STEP_ACK": (12, DOWN, JSON),  # how one ended is known here
    "LIST_STEPS": (13, DOWN, JSON),  # which steps run in the job
    "PROBE": (14, DOWN, JSON),  # listen for a moment where a direct kernel would
    "REPORT": (16, UP, JSON),  # after WELCOME: new token taken, kernels and streams as they are
    "STARTED": (17, UP, JSON),  # the kernel listens on all channels
    "FAILED": (18, UP, JSON),  # the kernel did not come up
    "EXIT": (19, UP, JSON),  # a kernel that had come up is gone
    "NOTICE": (20, UP, JSON),  # SIGTERM or SIGUSR1 from Slurm; the walltime is near
    "STEPPED": (21, UP, JSON),  # a step is over
    "STEP_LIST": (22, UP, JSON),  # answer to LIST_STEPS
    "PROBED": (23, UP, JSON),  # answer to PROBE
    "HEARTBEAT": (32, BOTH, JSON),
    "OPEN": (33, DOWN, STREAM),  # payload: kernel id, NUL, channel (or KEPT_OUTPUT)
    "DATA": (34, BOTH, STREAM),
    "CREDIT": (35, BOTH, STREAM),  # payload: 4-byte count of bytes taken
    "CLOSE": (36, BOTH, STREAM),
}
_BY_NUMBER = {number: (name, who, form) for name, (number, who, form) in MESSAGES.items()}

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
# A stream's channel that is none of the kernel's: what the launcher has kept of its output.
KEPT_OUTPUT = "kept"

HELLO, COMPLAINT = 1, 2


class WireError(ValueError):
    """What arrived is not of this protocol."""


def preamble(public_key: bytes) -> bytes:
    """What the server sends on accept."""
    return MAGIC + bytes([VERSION]) + public_key


def parse_preamble(data: bytes) -> bytes:
    """Return the server's public key for this connection."""
    if len(data) != PREAMBLE_BYTES or not data.startswith(MAGIC):
        raise WireError("that is not a gateway_slurm response socket")
    if data[len(MAGIC)] != VERSION:
        raise WireError(f"the server speaks version {data[len(MAGIC)]} of the link, this launcher {VERSION}")
    return bytes(data[len(MAGIC) + 1 :])


def binding(jobid: str, launcher_id: str, public_key: bytes) -> bytes:
    """The envelope's ``info``: an opening fits this version, job, launcher and connection only."""
    fields = (bytes([VERSION]), jobid.encode(), launcher_id.encode(), public_key)
    return b"".join(struct.pack(">H", len(field)) + field for field in fields)


def frame(body: bytes) -> bytes:
    """Prefix ``body`` with its length."""
    return struct.pack(">I", len(body)) + body


def pack(bodies: list[bytes]) -> bytes:
    """Messages that go in one frame: sealing costs more than most messages are long."""
    return b"".join([part for body in bodies for part in (struct.pack(">I", len(body)), body)])


def unpack(plain: bytes) -> list[bytes]:
    """The messages of one frame; raise WireError when they do not fill it exactly."""
    bodies = []
    start = 0
    while start < len(plain):
        end = start + 4 + int.from_bytes(plain[start : start + 4], "big")
        bodies.append(plain[start + 4 : end])
        start = end
    if start != len(plain):
        raise WireError("a frame that ends inside a message")
    return bodies


class FrameReader:
    """Cut a byte stream into frames, none longer than ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take what arrived and return the frames that are complete; raise WireError past the limit."""
        buffer = self._buffer
        buffer += data
        frames: list[bytes] = []
        start = 0
        while len(buffer) - start >= 4:
            length = int.from_bytes(buffer[start : start + 4], "big")
            if length > self.limit:
                raise WireError(f"a frame of {length} bytes, where {self.limit} are allowed")
            if len(buffer) - start - 4 < length:
                break
            with memoryview(buffer) as view:
                frames.append(bytes(view[start + 4 : start + 4 + length]))
            start += 4 + length
        if start:
            del buffer[:start]
        return frames


def encode(name: str, **fields: Any) -> bytes:
    """A message with a JSON body."""
    return bytes([MESSAGES[name][0]]) + json.dumps(fields, separators=(",", ":")).encode()


def encode_stream(name: str, stream: int, payload: bytes = b"") -> bytes:
    """A message of a tunnel stream."""
    return struct.pack(">BI", MESSAGES[name][0], stream) + payload


def decode(body: bytes, sender: str) -> tuple[str, Any]:
    """Return ``(name, fields)`` or ``(name, (stream, payload))``; raise WireError for anything else."""
    name, who, form = _BY_NUMBER.get(body[0] if body else -1, ("", "", ""))
    if who not in (sender, BOTH):
        raise WireError(f"no message that the {sender} side may send begins with {bytes(body[:1])!r}")
    if form == STREAM:
        if len(body) < 5:
            raise WireError(f"{name} without a stream id")
        return name, (int.from_bytes(body[1:5], "big"), body[5:])
    return name, _json_object(body[1:], name)


def _json_object(text: bytes, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{name} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise WireError(f"{name} is not a JSON object")
    return fields


class Opening:
    """A launcher's first frame: ``kind``, who it says it is, and what proves it."""

    def __init__(self, kind: int, launcher_id: str, jobid: str, proof: bytes, reason: str = "") -> None:
        self.kind = kind
        self.launcher_id = launcher_id
        self.jobid = jobid
        self.proof = proof
        self.reason = reason

    def encode(self) -> bytes:
        header = opening_header(self.launcher_id, self.jobid, self.reason)
        return struct.pack(">BH", self.kind, len(header)) + header + self.proof

    @classmethod
    def decode(cls, body: bytes) -> Opening:
        """Parse an opening; raise WireError when it is not one."""
        if len(body) < 3 or body[0] not in (HELLO, COMPLAINT):
            raise WireError("the first frame is neither HELLO nor COMPLAINT")
        end = 3 + int.from_bytes(body[1:3], "big")
        if len(body) < end:
            raise WireError("the opening is shorter than its header")
        fields = _json_object(body[3:end], "the opening")
        texts = [fields.get(key, "") for key in ("launcher", "jobid", "reason")]
        if not all(isinstance(text, str) for text in texts):
            raise WireError("the opening's header has fields that are not strings")
        return cls(body[0], texts[0], texts[1], bytes(body[end:]), texts[2])


def opening_header(launcher_id: str, jobid: str, reason: str = "") -> bytes:
    """The clear part of an opening."""
    fields = {"launcher": launcher_id, "jobid": jobid, "reason": reason[:2000]}
    return json.dumps(fields, separators=(",", ":")).encode()


def complaint_tag(token: bytes, public_key: bytes, launcher_id: str, jobid: str, reason: str) -> bytes:
    """Prove a complaint by the launch token, for this connection only (RFC 2104)."""
    bound = binding(jobid, launcher_id, public_key) + opening_header(launcher_id, jobid, reason)
    return hmac.new(token, b"complaint" + bound, hashlib.sha256).digest()


def same(one: bytes, other: bytes) -> bool:
    """Compare secrets in constant time."""
    return hmac.compare_digest(one, other)


def describe_exit(returncode: int) -> str:
    """A kernel's end in words: ``exit code 1`` or ``signal 9 (SIGKILL)``."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"signal {-returncode} ({signal.Signals(-returncode).name})"
    except ValueError:
        return f"signal {-returncode}"
