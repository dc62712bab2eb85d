"""The bounds of all that a launcher says: every message, field, list, number and text, in one table.

A launcher belongs to its user, and may be another program. What it sends is taken as follows:

- A message with more bytes than its bound ends the link: no launcher of ours sends one.
- A field that is not in the table, or is not what its bound says, is left out, as if it was not sent; so is an entry of
  a list. A text or a list that is too long is cut.
- A message that lacks a field without which it means nothing is refused as a whole.

So readers get each field as the table describes it, or not at all. Only the server uses this file.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from gateway_slurm.bounded_json import MAX_VALUES, load_json
from gateway_slurm.errors import MessageRefused
from gateway_slurm.link import flow, steps, wire

KIB: Final = 1 << 10
TEN_YEARS: Final = 10 * 366 * 86400.0
MAX_KERNELS: Final = 512
"""Kernels of a launcher in REPORT."""
MAX_STREAMS: Final = 4096
"""Streams of a launcher in REPORT."""
MAX_STEPS: Final = 4 * steps.MAX_STEPS
"""Steps in REPORT: those that run, and those that have ended since the last link."""
MAX_NODELIST: Final = wire.OPENING_LIMIT
LEFT_OUT: Final = object()
"""What a bound returns for a value that is not within it."""


class Bound(Protocol):
    """What a value may be."""

    def take(self, value: Any) -> Any:
        """The value, cut to its length where it is too long; LEFT_OUT where it is not what it must be."""


@dataclass(frozen=True)
class Text:
    """A text of at most ``limit`` characters, of which the first (or, with ``is_end``, the last) are taken."""

    limit: int
    is_end: bool = False

    def take(self, value: Any) -> Any:
        if not isinstance(value, str):
            return LEFT_OUT
        text = value[-self.limit :] if self.is_end else value[: self.limit]
        # A lone surrogate cannot be written to a log, a record or a socket.
        return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Name:
    """A text that is this pattern as a whole: it names something, and a part of it would name something else."""

    pattern: str

    def take(self, value: Any) -> Any:
        return value if isinstance(value, str) and re.fullmatch(self.pattern, value, re.ASCII) else LEFT_OUT


@dataclass(frozen=True)
class Number:
    """A whole number from ``low`` to ``high``."""

    low: int
    high: int

    def take(self, value: Any) -> Any:
        return value if type(value) is int and self.low <= value <= self.high else LEFT_OUT


@dataclass(frozen=True)
class Seconds:
    """A duration or a moment in seconds: a number that is from ``low`` to ``high``."""

    low: float = -TEN_YEARS
    high: float = TEN_YEARS

    def take(self, value: Any) -> Any:
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            return LEFT_OUT
        return value


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def take(self, value: Any) -> Any:
        return value if isinstance(value, bool) else LEFT_OUT


@dataclass(frozen=True)
class OrNone:
    """Something, or null."""

    bound: Bound

    def take(self, value: Any) -> Any:
        return None if value is None else self.bound.take(value)


@dataclass(frozen=True)
class ListOf:
    """A list of at most ``limit`` entries. Entries that are not within their bound are left out."""

    bound: Bound
    limit: int

    def take(self, value: Any) -> Any:
        if not isinstance(value, list):
            return LEFT_OUT
        taken = map(self.bound.take, value[: self.limit])
        return [entry for entry in taken if entry is not LEFT_OUT]


@dataclass(frozen=True)
class Tuple:
    """A list of these entries, each within its own bound."""

    bounds: Sequence[Bound]

    def take(self, value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(self.bounds):
            return LEFT_OUT
        taken = [bound.take(entry) for bound, entry in zip(self.bounds, value, strict=True)]
        return LEFT_OUT if any(entry is LEFT_OUT for entry in taken) else taken


@dataclass(frozen=True)
class MapOf:
    """An object of at most ``limit`` names, whose values have one bound."""

    name: Bound
    value: Bound
    limit: int

    def take(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return LEFT_OUT
        taken = {}
        for key, entry in itertools.islice(value.items(), self.limit):
            pair = self.name.take(key), self.value.take(entry)
            if LEFT_OUT not in pair:
                taken[pair[0]] = pair[1]
        return taken


@dataclass(frozen=True)
class Table:
    """An object of at most ``limit`` names, whose values the reader checks, since it looks few of them up."""

    limit: int

    def take(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return LEFT_OUT
        return dict(itertools.islice(value.items(), self.limit))


@dataclass(frozen=True)
class Fields:
    """An object with these fields; without one of ``needed`` it is left out as a whole."""

    bounds: Mapping[str, Bound]
    needed: frozenset[str] = frozenset()

    def take(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return LEFT_OUT
        taken = {name: bound.take(value[name]) for name, bound in self.bounds.items() if name in value}
        found = {name: entry for name, entry in taken.items() if entry is not LEFT_OUT}
        return found if self.needed <= found.keys() else LEFT_OUT


def _fields(*needed: str, **bounds: Bound) -> Fields:
    return Fields(bounds, frozenset(needed))


# -- The table --------------------------------------------------------------------------------------

_KERNEL_ID = Name("[^\\x00-\\x1f\\ud800-\\udfff]{1,100}")
_STEP = Name(r"[A-Za-z0-9-]{1,64}")
_QUESTION = Name(r"[0-9a-f]{1,64}")
_PID = Number(0, 1 << 30)
_GENERATION = Number(0, 1 << 31)
_PORTS = MapOf(Name("|".join(wire.CHANNELS)), Number(1, 65535), len(wire.CHANNELS))
_ENDPOINT = Text(300)
_LOG = Text(64 * KIB)
_SRUN_WORDS = Text(8 * KIB, is_end=True)

_KERNEL: Final[dict[str, Bound]] = {
    "kernel_id": _KERNEL_ID,
    "generation": _GENERATION,
    "slot": Number(0, 1 << 31),
    "state": Name("starting|running|exited|failed"),
    "pid": _PID,
    "mode": Name("direct|ipc|tcp"),
    "ip": Text(200),
    "ports": _PORTS,
    "directory": Text(4096),
    "directory_why": Text(4096),
    "returncode": Number(-128, 255),
    "output_tail": Text(4096, is_end=True),
    "oom": Flag(),
    "kind": Text(20),
    "message": Text(4096),
    "argv": ListOf(Text(200), 20),
}
_STEP_RESULT: Final[dict[str, Bound]] = {
    "step": _STEP,
    "status": OrNone(Number(-128, 255)),
    "stderr": _SRUN_WORDS,
}
_OF_A_KERNEL = Fields(_KERNEL, frozenset({"kernel_id", "generation"}))


@dataclass(frozen=True)
class Message:
    """The bounds of one message: bytes of its body, its fields, and the values in its JSON (see ``bounded_json``)."""

    size: int
    fields: Fields = field(default_factory=_fields)
    values: int = MAX_VALUES


MESSAGES: Final[dict[str, Message]] = {
    "REPORT": Message(
        wire.MAX_REPORT,
        _fields(
            kernels=ListOf(Fields(_KERNEL, frozenset({"kernel_id", "generation", "state"})), MAX_KERNELS),
            steps=ListOf(Fields(_STEP_RESULT, frozenset({"step"})), MAX_STEPS),
            streams=Table(MAX_STREAMS),  # flow.Outbox.resume checks the positions of those that it has
            opened=Number(0, (1 << 32) - 1),
        ),
        values=40_000,
    ),
    "STARTED": Message(64 * KIB, _OF_A_KERNEL),
    "FAILED": Message(128 * KIB, _OF_A_KERNEL),
    "EXIT": Message(64 * KIB, _OF_A_KERNEL),
    "NOTICE": Message(
        16 * KIB,
        _fields("kind", kind=Text(20), kernel_id=_KERNEL_ID, message=Text(1000), remaining=Seconds(), missing=Flag()),
    ),
    "STEPPED": Message(64 * KIB, Fields(_STEP_RESULT, frozenset({"step"}))),
    "STEP_LIST": Message(
        1280 * KIB,
        _fields("asked", asked=_QUESTION, status=Number(-128, 255), listed=Text(1024 * KIB), stderr=_SRUN_WORDS),
    ),
    "PROBED": Message(4 * KIB, _fields("probe", probe=_QUESTION, ports=_PORTS, error=Text(200))),
    "LOG": Message(800 * KIB, _fields("asked", asked=_QUESTION, kernel=_LOG, launcher=_LOG)),
    "HEARTBEAT": Message(KIB),
    "DATA": Message(5 + flow.CHUNK),
    "CREDIT": Message(5 + 4),
    "CLOSE": Message(5),
}
"""Each message that a launcher may send."""

HELLO: Final = _fields(
    hostname=Text(255),
    pid=_PID,
    ip=Text(64),
    reads_logs=Flag(),
    probes=Flag(),
    dialled=_fields(reached=_ENDPOINT, in_vain=ListOf(Tuple((_ENDPOINT, _ENDPOINT)), 32)),
    age=Seconds(low=0),
    remaining=Seconds(),
    clock=Seconds(high=4e9),
    end_time=Seconds(high=4e9),
    python=Text(50),
    executable=Text(500),
    slurm_job_nodelist=Text(MAX_NODELIST),
    slurmd_nodename=Text(255),
    slurm_step_id=Text(20),
    slurm_job_end_time=Name("[0-9]{1,12}"),
)
"""The fields of HELLO, whose bytes ``wire.OPENING_LIMIT`` bounds."""

FRAME_LIMIT: Final = flow.CHUNK + max(message.size for message in MESSAGES.values()) + KIB
"""Bytes of a launcher's frame: messages of a CHUNK together, the last of which may be a large one."""
MAX_MESSAGES: Final = flow.CHUNK // 5
"""Messages of a launcher's frame; the smallest of ours has five bytes."""


def decode(body: bytes) -> tuple[str, Any]:
    """A launcher's message, like ``wire.decode``, within its bounds.

    Raises MessageRefused where it lacks a needed field, and WireError where the link must end.
    """
    name, payload = wire.split(body, wire.UP)
    message = MESSAGES[name]
    if len(body) > message.size:
        raise wire.WireError(f"{name} has {len(body)} bytes, and the limit is {message.size}")
    if not isinstance(payload, memoryview):
        return name, payload
    try:
        fields = load_json(payload, message.size, values=message.values)
    except ValueError as error:
        raise wire.WireError(f"{name} is not readable: {error}") from error
    taken = message.fields.take(fields)
    if taken is LEFT_OUT:
        needed = ", ".join(sorted(message.fields.needed))
        raise MessageRefused(f"{name} was left out: it lacks a valid {needed or 'JSON object'}")
    return name, taken


def hello(fields: Any) -> dict[str, Any]:
    """The valid fields of HELLO."""
    taken = HELLO.take(fields)
    return {} if taken is LEFT_OUT else taken
