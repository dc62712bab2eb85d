"""Frames and messages between server and launcher. Both ends use this file.

The job script carries it to the compute node, so it needs Python >= 3.9 and the standard library only. It does no I/O,
and contains no cryptography (see ``envelope``).

On a connection the server speaks first::

    server    PREAMBLE      magic, version, X25519 public key for this connection
    launcher  OPENING       a frame: its kind, a clear header, and either
                              HELLO      encapsulated key + sealed hello
                              COMPLAINT  HMAC-SHA256 under the launch token: why it cannot send HELLO
    both      frames        each sealed, with one or more messages of MESSAGES

A frame is a 4-byte big-endian length and that many bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import signal
import struct
from typing import Any

VERSION = 2
MAGIC = b"gslurm"
KEY_BYTES = 32
TAG_BYTES = 16
PREAMBLE_BYTES = len(MAGIC) + 1 + KEY_BYTES

# An unauthenticated peer may send one frame of this size, and no more.
OPENING_LIMIT = 8 * 1024
# The largest message is START: an environment (at most 1 MiB) and an argv.
FRAME_LIMIT = 4 * 1024 * 1024

# The largest message of a launcher is REPORT; the other bounds of what launchers say are in ``bounds``.
MAX_REPORT = 2 * 1024 * 1024

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
    "END_TIME": (6, DOWN, JSON),  # seconds until the end of the job, after a change of its time limit
    "STDERR_LINE": (7, DOWN, JSON),  # a line for a kernel's standard error
    "REDIRECT": (8, DOWN, JSON),  # instead of WELCOME: another server owns this launcher
    "ACK": (9, DOWN, JSON),  # what a kernel's journal keeps for the next server: positions of sessions, and notes
    "STEP": (10, DOWN, JSON),  # start a job step from inside the job (steps.py)
    "STEP_END": (11, DOWN, JSON),  # end a job step
    "STEP_ACK": (12, DOWN, JSON),  # the server knows how a step ended
    "LIST_STEPS": (13, DOWN, JSON),  # ask for the job's running steps
    "PROBE": (14, DOWN, JSON),  # listen briefly on the ports of a direct kernel
    "READ_LOG": (15, DOWN, JSON),  # ask for the ends of a kernel's log and of the launcher's
    "REPORT": (16, UP, JSON),  # after WELCOME: new token taken, state of kernels, steps and streams
    "STARTED": (17, UP, JSON),  # the kernel listens on all channels
    "FAILED": (18, UP, JSON),  # the kernel did not start
    "EXIT": (19, UP, JSON),  # a started kernel has ended
    "NOTICE": (20, UP, JSON),  # SIGTERM or SIGUSR1 from Slurm; the time limit is near; other events on the node
    "STEPPED": (21, UP, JSON),  # a step has ended
    "STEP_LIST": (22, UP, JSON),  # answer to LIST_STEPS
    "PROBED": (23, UP, JSON),  # answer to PROBE
    "LOG": (24, UP, JSON),  # answer to READ_LOG
    "HEARTBEAT": (32, BOTH, JSON),
    "OPEN": (33, DOWN, STREAM),  # payload: kernel id, NUL, channel (or JOURNAL)
    "DATA": (34, BOTH, STREAM),
    "CREDIT": (35, BOTH, STREAM),  # payload: 4-byte count of bytes taken
    "CLOSE": (36, BOTH, STREAM),
}
_BY_NUMBER = {number: (name, who, form) for name, (number, who, form) in MESSAGES.items()}

CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
# The channel of a stream that reads a kernel's journal, for which no channel of the kernel is needed, is
# ``journal:START:UPTO``. START is a number, or empty: where the last server had read up to. After the message UPTO, or
# the last one if there are fewer, the launcher closes the stream; with 0 it sends every new message.
JOURNAL = "journal:"
# Bytes of a record in it, and its frames. A kernel's message that needs more is lost.
MAX_RECORD, MAX_RECORD_FRAMES = 512 << 20, 1 << 16
# Numbers of messages are smaller than this: JavaScript has all integers up to here, too.
MAX_NUMBER = 1 << 53
# What the journal keeps for the next server: positions of sessions, with ids of so many characters, and notes, each of
# so many characters, and so many together, with their keys.
MAX_POSITIONS, MAX_NOTES, MAX_ID, MAX_NOTE, MAX_NOTES_SIZE = 1024, 1024, 200, 4096, 1 << 20

HELLO, COMPLAINT = 1, 2


class WireError(ValueError):
    """The received bytes do not follow this protocol."""


def preamble(public_key: bytes) -> bytes:
    """The first bytes of the server on a new connection."""
    return MAGIC + bytes([VERSION]) + public_key


def parse_preamble(data: bytes) -> bytes:
    """Return the server's public key for this connection."""
    if len(data) != PREAMBLE_BYTES or not data.startswith(MAGIC):
        raise WireError("the peer is not a gateway_slurm response socket")
    if data[len(MAGIC)] != VERSION:
        raise WireError(f"the server speaks version {data[len(MAGIC)]} of the link, this launcher {VERSION}")
    return bytes(data[len(MAGIC) + 1 :])


def binding(jobid: str, launcher_id: str, public_key: bytes) -> bytes:
    """The ``info`` of HPKE: an opening is valid for this version, job, launcher and connection only."""
    fields = (bytes([VERSION]), jobid.encode(), launcher_id.encode(), public_key)
    return b"".join(struct.pack(">H", len(field)) + field for field in fields)


def frame(body: bytes) -> bytes:
    """Prefix ``body`` with its length."""
    return struct.pack(">I", len(body)) + body


def pack(bodies: list[bytes]) -> bytes:
    """Put messages into one frame, because sealing a frame costs more than most messages are long."""
    return b"".join([part for body in bodies for part in (struct.pack(">I", len(body)), body)])


def unpack(plain: bytes, start: int = 0, limit: int | None = None) -> list[bytes]:
    """The messages of one frame; raise WireError if they do not fill it exactly, or are more than ``limit``."""
    bodies: list[bytes] = []
    while start < len(plain):
        if len(bodies) == limit:
            raise WireError(f"a frame of more than {limit} messages")
        end = start + 4 + int.from_bytes(plain[start : start + 4], "big")
        bodies.append(plain[start + 4 : end])
        start = end
    if start != len(plain):
        raise WireError("a frame ends inside a message")
    return bodies


class FrameReader:
    """Cut a byte stream into frames of at most ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    @property
    def waiting(self) -> int:
        """The bytes of an incomplete frame."""
        return len(self._buffer)

    @property
    def announced(self) -> int:
        """The size of an incomplete frame; 0 where that has not come yet."""
        return int.from_bytes(self._buffer[:4], "big") if len(self._buffer) >= 4 else 0

    def feed(self, data: bytes) -> list[bytes]:
        """Take received bytes and return the complete frames; raise WireError for a frame over the limit."""
        buffer = self._buffer
        buffer += data
        frames: list[bytes] = []
        start = 0
        while len(buffer) - start >= 4:
            length = int.from_bytes(buffer[start : start + 4], "big")
            if length > self.limit:
                raise WireError(f"a frame has {length} bytes, and the limit is {self.limit}")
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


def split(body: bytes, sender: str) -> tuple[str, Any]:
    """Return the name and the JSON that is not parsed yet (a memoryview), or the name and ``(stream, payload)``.

    Raises WireError for anything else.
    """
    name, who, form = _BY_NUMBER.get(body[0] if body else -1, ("", "", ""))
    if who not in (sender, BOTH):
        raise WireError(f"the {sender} side may not send a message that begins with {bytes(body[:1])!r}")
    if form == STREAM:
        if len(body) < 5:
            raise WireError(f"{name} has no stream id")
        return name, (int.from_bytes(body[1:5], "big"), body[5:])
    return name, memoryview(body)[1:]


def decode(body: bytes, sender: str) -> tuple[str, Any]:
    """Return ``(name, fields)`` or ``(name, (stream, payload))``; raise WireError for anything else.

    The server decodes what launchers say by ``bounds`` instead.
    """
    name, payload = split(body, sender)
    return name, _json_object(bytes(payload), name) if isinstance(payload, memoryview) else payload


def _json_object(text: bytes, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{name} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise WireError(f"{name} is not a JSON object")
    return fields


def is_number(value: Any) -> bool:
    """Whether this is a message's number in a journal, or 0."""
    return type(value) is int and 0 <= value < MAX_NUMBER


def checked_positions(given: Any) -> dict[str, int]:
    """The valid positions of sessions among these, MAX_POSITIONS at most."""
    pairs = list(given.items())[:MAX_POSITIONS] if isinstance(given, dict) else []
    return {key: number for key, number in pairs if _is_text(key, MAX_ID) and is_number(number)}


def missed_text(count: int) -> str:
    """What a user reads in place of messages that are lost."""
    words = "1 message was" if count == 1 else f"{count} messages were"
    return f"\ngateway_slurm: {words} dropped here: the kernel published more than is kept (kept_output)\n"


class Notes:
    """The notes beside a journal, as many as it keeps: of more, those that were changed last."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._size = 0

    def change(self, changes: Any) -> dict[str, str | None]:
        """Take the valid ones among these, and return them. None is a removed note."""
        valid = {
            key: text
            for key, text in (changes.items() if isinstance(changes, dict) else ())
            if _is_text(key, MAX_ID) and (text is None or _is_text(text, MAX_NOTE))
        }
        for key, text in valid.items():
            self._remove(key)
            if text is not None:
                self.texts[key] = text
                self._size += len(key) + len(text)
        while len(self.texts) > MAX_NOTES or self._size > MAX_NOTES_SIZE:
            self._remove(next(iter(self.texts)))
        return valid

    def _remove(self, key: str) -> None:
        text = self.texts.pop(key, None)
        if text is not None:
            self._size -= len(key) + len(text)


def _is_text(value: Any, limit: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= limit


class Opening:
    """A launcher's first frame: ``kind``, the claimed launcher id and job id, and their proof."""

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
        """Parse an opening; raise WireError if it is malformed."""
        if len(body) < 3 or body[0] not in (HELLO, COMPLAINT):
            raise WireError("the first frame is neither HELLO nor COMPLAINT")
        end = 3 + int.from_bytes(body[1:3], "big")
        if len(body) < end:
            raise WireError("the opening is shorter than its header")
        fields = _json_object(body[3:end], "the opening")
        texts = [fields.get(key, "") for key in ("launcher", "jobid", "reason")]
        if not all(isinstance(text, str) and _is_encodable(text) for text in texts):
            raise WireError("the opening's header has fields that are not strings")
        return cls(body[0], texts[0], texts[1], bytes(body[end:]), texts[2])


def _is_encodable(text: str) -> bool:
    """Whether the text has no lone surrogate, which JSON can hold and UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def opening_header(launcher_id: str, jobid: str, reason: str = "") -> bytes:
    """The clear part of an opening."""
    fields = {"launcher": launcher_id, "jobid": jobid, "reason": reason[:2000]}
    return json.dumps(fields, separators=(",", ":")).encode()


def complaint_tag(token: bytes, public_key: bytes, launcher_id: str, jobid: str, reason: str) -> bytes:
    """The proof of a complaint: an HMAC under the launch token, for this connection only (RFC 2104)."""
    bound = binding(jobid, launcher_id, public_key) + opening_header(launcher_id, jobid, reason)
    return hmac.new(token, b"complaint" + bound, hashlib.sha256).digest()


def same(first: bytes, second: bytes) -> bool:
    """Compare secrets in constant time."""
    return hmac.compare_digest(first, second)


def describe_exit(returncode: int) -> str:
    """A kernel's end in words: ``exit code 1`` or ``signal 9 (SIGKILL)``."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"signal {-returncode} ({signal.Signals(-returncode).name})"
    except ValueError:
        return f"signal {-returncode}"
