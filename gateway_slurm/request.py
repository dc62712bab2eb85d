"""What a kernelspec, or a gateway's client, may ask for: the request fields, as one table.

They come from ``metadata.kernel_provisioner.config`` of a kernel.json, which its user writes: untrusted
input.
Every value that goes into Slurm's argv is bounded and has no control characters and no leading ``-``;
whatever
else a user may write is carried as data, never through a shell.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway_slurm.errors import RequestError
from gateway_slurm.slurm.formats import TIME_FORMATS, TimeFormatError, minutes

MAX_ARGUMENT: Final = (128 << 10) - 1
"""Bytes of one item of kernel_argv: Linux's MAX_ARG_STRLEN, its NUL not counted."""
MAX_ARGUMENTS: Final = 1024
MAX_COMMAND: Final = 1 << 20
"""Bytes of all of kernel_argv: Linux takes 2 MiB with the environment, and START carries both in one message."""
_MAX_WORD: Final = 255
_MAX_INT: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class KernelRequest:
    """One valid request; None is "not asked for". The table in this module says what each field means."""

    project: str | None = None
    partition: str | None = None
    nodes: int | None = None
    runtime: int | None = None
    kernel_argv: tuple[str, ...] = ()
    kernel_name: str | None = None
    kernel_language: str | None = None
    gpus: int = 0
    reservation: str | None = None
    jobid: str | None = None
    node: str | None = None
    qos: str | None = None
    cpus: int | None = None
    memory: str | None = None
    constraint: str | None = None
    gres: str | None = None
    time: str | None = None
    connect: str | None = None
    share: bool = False
    isolate: bool = False
    keep_allocation: bool = False

    def as_config(self) -> dict[str, Any]:
        """The fields that were asked for, as a kernelspec would hold them."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items() if v not in (None, (), False)}

    @property
    def minutes(self) -> int | None:
        """The time asked for; None is no limit, or none given."""
        return minutes(self.time) if self.time is not None else self.runtime

    @property
    def time_limit(self) -> int | str | None:
        """What goes into ``--time``: ``time`` in Slurm's format if it is given, else ``runtime`` in
        minutes.
        """
        return self.time if self.time is not None else self.runtime

    @property
    def gres_list(self) -> list[str]:
        """What goes into ``--gres``, per node: the GPUs and the other generic resources."""
        gpus = [f"gpu:{self.gpus}"] if self.gpus else []
        return gpus + (self.gres.split(",") if self.gres else [])


class _Invalid(ValueError):
    """A field's parser says what is allowed."""


Parser = Callable[[object], Any]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One request field: ``required`` is always, for a new allocation only, or never."""

    name: str
    parse: Parser
    help: str
    required: str = ""


def _integer(lowest: int) -> Parser:
    allowed = f"a whole number from {lowest} to {_MAX_INT}"

    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise _Invalid(allowed)
        if isinstance(value, str) and not re.fullmatch(r"\s*[0-9]{1,9}\s*", value, re.ASCII):
            raise _Invalid(allowed)
        number = int(value)
        if not lowest <= number <= _MAX_INT:
            raise _Invalid(allowed)
        return number

    return parse


def _flag(value: object) -> bool:
    flag = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None
    if isinstance(value, int) and value in (0, 1):
        flag = bool(value)
    if flag is None:
        raise _Invalid("true or false")
    return flag


_FLAGS: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _word(pattern: str, allowed: str, *, longest: int = _MAX_WORD) -> Parser:
    """Parse text for Slurm's argv: ``pattern`` must match all of it, once blanks around it are gone."""
    compiled = re.compile(pattern, re.ASCII)

    def parse(value: object) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise _Invalid(f"text: {allowed}")
        # Not for large ints: Python refuses to write those with over 4300 digits.
        if isinstance(value, int) and abs(value) > 10**18:
            raise _Invalid(allowed)
        text = str(value).strip(" ")
        if len(text) > longest or not compiled.fullmatch(text):
            raise _Invalid(f"{allowed}, at most {longest} characters")
        return text

    return parse


def _argv(value: object) -> tuple[str, ...]:
    allowed = f"a list of 1 to {MAX_ARGUMENTS} texts without NUL, each at most {MAX_ARGUMENT} bytes, all {MAX_COMMAND}"
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_ARGUMENTS:
        raise _Invalid(allowed)
    for item in value:
        if not isinstance(item, str) or "\0" in item or _size(item) > MAX_ARGUMENT:
            raise _Invalid(allowed)
    if sum(map(_size, value)) > MAX_COMMAND:
        raise _Invalid(allowed)
    if not value[0]:
        raise _Invalid("a list whose first item, the program, is not empty")
    return tuple(value)


def _size(text: str) -> int:
    """Return the bytes of ``text`` as an argument; half a surrogate pair, which JSON can hold, is no text."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise _Invalid("valid Unicode text") from error


def _time(value: object) -> str:
    text: str = _word(r"[0-9A-Za-z:-]+", TIME_FORMATS, longest=32)(value)
    try:
        limit = minutes(text)
    except TimeFormatError as error:
        raise _Invalid(TIME_FORMATS) from error
    if limit == 0:
        # To Slurm, 0 means no limit at all, which nobody who writes 0 expects.
        raise _Invalid("a time above zero; for none, UNLIMITED")
    return text


def _choice(*words: str) -> Parser:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value.strip().lower() not in words:
            raise _Invalid(" or ".join(words))
        return value.strip().lower()

    return parse


_NAME: Final = _word(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*", "letters, digits and _ . @ + -, not beginning with -")
_NAMES: Final = _word(r"[A-Za-z0-9_][A-Za-z0-9_.@+,-]*", "names of letters, digits and _ . @ + -, separated by commas")
_MEMORY: Final = _word(r"[0-9]{1,12}[KMGTkmgt]?[Bb]?", "a number with K, M, G or T (M if none)")
_CONSTRAINT: Final = _word(
    r"[A-Za-z0-9_\[(][A-Za-z0-9_.:=+@*&|,\[\]()-]*",
    "features with Slurm's operators & | * [ ] ( )",
    longest=1024,
)
_GRES: Final = _word(r"[A-Za-z0-9_][A-Za-z0-9_.:,+=/-]*", "name[[:type]:count], separated by commas")
_NODE: Final = _word(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "one node's name")
_JOBID: Final = _word(r"[0-9]{1,10}(?:[_+][0-9]{1,10})?", "a job id such as 123")
_KERNEL_NAME: Final = _word(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "a kernelspec's name: letters, digits and _ . -")
_LANGUAGE: Final = _word(r"[^\x00-\x1f\x7f-]?[^\x00-\x1f\x7f]*", "text without control characters", longest=64)

NEW: Final = "for a new allocation"
ALWAYS: Final = "always"

FIELDS: Final[tuple[Field, ...]] = (
    Field(name="project", parse=_NAME, required=NEW, help="budget account, through the site's account hook"),
    Field(name="partition", parse=_NAMES, required=NEW, help="partition, or several with commas"),
    Field(name="nodes", parse=_integer(1), required=NEW, help="nodes of the allocation (count)"),
    Field(name="runtime", parse=_integer(1), required=f"{NEW}, if not `time`", help="time limit (minutes)"),
    Field(
        name="kernel_argv",
        parse=_argv,
        required=f"{ALWAYS}, if not `kernel_name`",
        help="the kernel's command as a list; `{connection_file}` stands for its connection file",
    ),
    Field(name="gpus", parse=_integer(0), help="GPUs per node (count, 0 for none)"),
    Field(name="reservation", parse=_NAMES, help="reservation to use"),
    Field(name="jobid", parse=_JOBID, help="a running allocation of yours to use instead of a new one"),
    Field(name="node", parse=_NODE, help="node of the allocation that the kernel runs on"),
    Field(name="kernel_language", parse=_LANGUAGE, help="the kernel's language, as frontends show it"),
    Field(
        name="kernel_name",
        parse=_KERNEL_NAME,
        help="an installed kernelspec to wrap; kernel_argv wins over it",
    ),
    Field(name="qos", parse=_NAME, help="quality of service"),
    Field(name="cpus", parse=_integer(1), help="CPUs per task (count)"),
    Field(name="memory", parse=_MEMORY, help="memory per node (Slurm's format: 4G; MiB if it has no unit)"),
    Field(name="constraint", parse=_CONSTRAINT, help="features that the nodes must have, with Slurm's operators"),
    Field(name="gres", parse=_GRES, help="generic resources per node, such as `shard:1`"),
    Field(name="time", parse=_time, help=f"time limit (Slurm's format: {TIME_FORMATS}); wins over runtime"),
    Field(
        name="connect",
        parse=_choice("auto", "direct", "tunnel"),
        help="how the server reaches the kernel: auto, direct (Curve-encrypted TCP) or tunnel; "
        "unset is what the admin chose",
    ),
    Field(
        name="share",
        parse=_flag,
        help="true: join a fitting allocation that servers of yours have made, instead of queueing for a new one",
    ),
    Field(
        name="isolate",
        parse=_flag,
        help="true: a job step of its own with an exact share of CPUs (`cpus`), memory (`memory`) and GPUs (`gpus`)",
    ),
    Field(
        name="keep_allocation",
        parse=_flag,
        help="true: the allocation stays after its last kernel, until its time limit or until it is released",
    ),
)
_BY_NAME: Final = {field.name: field for field in FIELDS}


def parse_request(config: Mapping[str, object], *, spec_language: str | None = None) -> KernelRequest:
    """Return the valid request in ``config``; ``"None"``, ``""`` and null mean unset, numbers may be text.

    ``spec_language`` is the kernelspec's ``language``, used when the request names none. Raises RequestError
    whose message names the field, the value and what is allowed, and whose ``field`` is the field's name.
    """
    values: dict[str, Any] = {}
    for name, value in config.items():
        if name not in _BY_NAME:
            raise _unknown(name)
        if not _unset(value):
            values[name] = _parse(_BY_NAME[name], value)
    if "jobid" in values:
        _refuse_components(values["jobid"])
    _require(values)
    if spec_language and "kernel_language" not in values:
        values["kernel_language"] = spec_language
    return KernelRequest(**values)


def fields_table() -> str:
    """Draw the fields as markdown, one line per field."""
    lines = ["| field | required | meaning (unit) |", "|---|---|---|"]
    lines += [f"| `{field.name}` | {field.required or 'no'} | {field.help} |" for field in FIELDS]
    return "\n".join(lines) + "\n"


def _unset(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.strip() in ("", "None"))


def _parse(field: Field, value: object) -> object:
    try:
        return field.parse(value)
    except _Invalid as error:
        message = f"request field {field.name!r}: {_shown(value)} is not valid; allowed is {error}"
        raise RequestError(message, field=field.name) from error


def _shown(value: object) -> str:
    """Return the value's repr, cut; a huge number's repr is itself an error in Python."""
    try:
        text = repr(value)
    except ValueError:
        text = f"<a {type(value).__name__} that is too large>"
    return text if len(text) <= 200 else text[:200] + "…"


def _unknown(name: object) -> RequestError:
    near = difflib.get_close_matches(str(name)[:100], _BY_NAME, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    message = f"unknown request field {_shown(name)}{hint} The fields are: {', '.join(_BY_NAME)}"
    return RequestError(message.replace("' The", "'. The"), field=str(name)[:100])


def _refuse_components(jobid: str) -> None:
    if not jobid.isdigit():
        raise RequestError(
            f"request field 'jobid': {jobid!r} is an array task or a heterogeneous component; "
            "array tasks and heterogeneous components cannot be adopted yet. Name a plain job, such as 123",
            field="jobid",
        )


def _require(values: Mapping[str, object]) -> None:
    """Raise for the first field that is missing: what runs, and, unless a job is adopted, what is to be
    allocated.
    """
    needed = [("kernel_argv", "kernel_name")]
    if "jobid" not in values:
        needed += [("project", ""), ("partition", ""), ("nodes", ""), ("runtime", "time")]
    for name, instead in needed:
        if name not in values and instead not in values:
            other = f" (or {instead!r})" if instead else ""
            raise RequestError(
                f"request field {name!r}{other} is missing; it is {_BY_NAME[name].help}. "
                "Set it in metadata.kernel_provisioner.config of the kernel.json",
                field=name,
            )
