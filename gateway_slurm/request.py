"""The request fields of a kernelspec, or of a gateway's client, as one table.

The fields come from ``metadata.kernel_provisioner.config`` of a kernel.json. A user writes that file, so its content is
untrusted input. Every value that goes into Slurm's argv is bounded, and has no control characters and no leading ``-``.
All other values are carried as data, and never pass through a shell.
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
"""Bytes of one item of kernel_argv: Linux's MAX_ARG_STRLEN without its NUL."""
MAX_ARGUMENTS: Final = 1024
MAX_COMMAND: Final = 1 << 20
"""Bytes of kernel_argv in all: Linux takes 2 MiB with the environment, and START carries both in one message."""
_MAX_WORD: Final = 255
_MAX_INT: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class KernelRequest:
    """One valid request; None means that the field is not set. FIELDS explains the fields."""

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
    directory: str | None = None
    default_directory: str | None = None
    share: bool = False
    isolate: bool = False
    keep_allocation: bool = False

    def as_config(self) -> dict[str, Any]:
        """The fields that are set, as a kernelspec holds them."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v not in (None, (), False)
        }

    @property
    def minutes(self) -> int | None:
        """The requested time limit in minutes; None if it is UNLIMITED or not set."""
        return minutes(self.time) if self.time is not None else self.runtime

    @property
    def time_limit(self) -> int | str | None:
        """The value of ``--time``: ``time`` in Slurm's format if it is set, else ``runtime`` in minutes."""
        return self.time if self.time is not None else self.runtime

    @property
    def gres_list(self) -> list[str]:
        """The items of ``--gres``, per node: the GPUs and the other generic resources."""
        gpus = [f"gpu:{self.gpus}"] if self.gpus else []
        return gpus + (self.gres.split(",") if self.gres else [])


def resources(request: KernelRequest) -> dict[str, Any]:
    """The size of the request's job, for events."""
    names = ("nodes", "gpus", "gres", "cpus", "memory", "time_limit")
    return {name: getattr(request, name) or None for name in names}


class _Invalid(ValueError):
    """A value is not valid; the message says which values are allowed."""


Parser = Callable[[object], Any]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One request field. ``required`` is ALWAYS, NEW (for a new allocation only), or empty."""

    name: str
    parse: Parser
    help: str
    required: str = ""


def _integer(lowest: int) -> Parser:
    allowed = f"a whole number from {lowest} to {_MAX_INT}"

    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value, re.ASCII):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= _MAX_INT:
            raise _Invalid(allowed)
        return value

    return parse


def _flag(value: object) -> bool:
    flag = _FLAGS.get(value.strip().lower()) if isinstance(value, str) else None
    if isinstance(value, int) and value in (0, 1):
        flag = bool(value)
    if flag is None:
        raise _Invalid("true or false")
    return flag


_FLAGS: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _word(pattern: str, allowed: str, *, max_length: int = _MAX_WORD) -> Parser:
    """A parser of text for Slurm's argv: ``pattern`` must match the text without the spaces around it."""
    compiled = re.compile(pattern, re.ASCII)

    def parse(value: object) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise _Invalid(f"text: {allowed}")
        # Python refuses to convert ints with more than 4300 digits to text.
        if isinstance(value, int) and abs(value) > 10**18:
            raise _Invalid(allowed)
        text = str(value).strip(" ")
        if len(text) > max_length or not compiled.fullmatch(text):
            raise _Invalid(f"{allowed}, at most {max_length} characters")
        return text

    return parse


def _argv(value: object) -> tuple[str, ...]:
    allowed = f"a list of 1 to {MAX_ARGUMENTS} texts without NUL, each at most {MAX_ARGUMENT} bytes, all {MAX_COMMAND}"
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_ARGUMENTS:
        raise _Invalid(allowed)
    if not all(isinstance(item, str) and "\0" not in item and _size(item) <= MAX_ARGUMENT for item in value):
        raise _Invalid(allowed)
    if sum(map(_size, value)) > MAX_COMMAND:
        raise _Invalid(allowed)
    if not value[0]:
        raise _Invalid("a list whose first item, the program, is not empty")
    return tuple(value)


def _size(text: str) -> int:
    """The size of ``text`` in bytes. Raises _Invalid for half a surrogate pair, which JSON can hold."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise _Invalid("valid Unicode text") from error


def _time(value: object) -> str:
    text: str = _word(r"[0-9A-Za-z:-]+", TIME_FORMATS, max_length=32)(value)
    try:
        limit = minutes(text)
    except TimeFormatError as error:
        raise _Invalid(TIME_FORMATS) from error
    if limit == 0:
        # To Slurm, 0 means no limit, which is not what a user who writes 0 expects.
        raise _Invalid("a time above zero, or UNLIMITED for no limit")
    return text


def _choice(*words: str) -> Parser:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value.strip().lower() not in words:
            raise _Invalid(" or ".join(words))
        return value.strip().lower()

    return parse


_NAME: Final = _word(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*", "letters, digits and _ . @ + -, not beginning with -")
_NAMES: Final = _word(r"[A-Za-z0-9_][A-Za-z0-9_.@+,-]*", "names of letters, digits and _ . @ + -, separated by commas")
_MEMORY: Final = _word(r"[0-9]{1,12}[KMGTkmgt]?[Bb]?", "a number with the unit K, M, G or T (M without a unit)")
_CONSTRAINT: Final = _word(
    r"[A-Za-z0-9_\[(][A-Za-z0-9_.:=+@*&|,\[\]()-]*",
    "features with Slurm's operators & | * [ ] ( )",
    max_length=1024,
)
_GRES: Final = _word(r"[A-Za-z0-9_][A-Za-z0-9_.:,+=/-]*", "name[[:type]:count], separated by commas")
_NODE: Final = _word(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "one node's name")
_JOBID: Final = _word(r"[1-9][0-9]{0,9}(?:[_+](?:0|[1-9][0-9]{0,9}))?", "a job id such as 123")
_KERNEL_NAME: Final = _word(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "a kernelspec's name: letters, digits and _ . -")
_LANGUAGE: Final = _word(r"[^\x00-\x1f\x7f-]?[^\x00-\x1f\x7f]*", "text without control characters", max_length=64)

_DIRECTORY: Final = _word(
    r"(?:[/~]|\$\{?[A-Za-z_])[^\x00-\x1f\x7f]*",
    "a path that begins with /, ~ or $VARIABLE, without control characters",
    max_length=4096,
)

NEW: Final = "for a new allocation"
ALWAYS: Final = "always"

FIELDS: Final[tuple[Field, ...]] = (
    Field(
        name="project",
        parse=_NAME,
        required=NEW,
        help="project; its budget account comes from the site's `account_command`, by default the account of that name",
    ),
    Field(name="partition", parse=_NAMES, required=NEW, help="partition, or several separated by commas"),
    Field(name="nodes", parse=_integer(1), required=NEW, help="number of nodes of the allocation"),
    Field(name="runtime", parse=_integer(1), required=f"{NEW}, without `time`", help="time limit (minutes)"),
    Field(
        name="kernel_argv",
        parse=_argv,
        required=f"{ALWAYS}, without `kernel_name`",
        help="command of the kernel, as a list; `{connection_file}` stands for its connection file",
    ),
    Field(name="gpus", parse=_integer(0), help="number of GPUs per node"),
    Field(name="reservation", parse=_NAMES, help="reservation, or several separated by commas"),
    Field(name="jobid", parse=_JOBID, help="job id of a running allocation of yours, to use it instead of a new one"),
    Field(name="node", parse=_NODE, help="node of the allocation on which the kernel runs"),
    Field(name="kernel_language", parse=_LANGUAGE, help="language of the kernel, as frontends show it"),
    Field(
        name="kernel_name",
        parse=_KERNEL_NAME,
        help="installed kernelspec to run on the node; `kernel_argv` has precedence",
    ),
    Field(name="qos", parse=_NAME, help="quality of service"),
    Field(name="cpus", parse=_integer(1), help="number of CPUs per task"),
    Field(name="memory", parse=_MEMORY, help="memory per node (Slurm's format, such as 4G; MiB without a unit)"),
    Field(name="constraint", parse=_CONSTRAINT, help="features that the nodes must have, with Slurm's operators"),
    Field(name="gres", parse=_GRES, help="generic resources per node, such as `shard:1`"),
    Field(name="time", parse=_time, help=f"time limit (Slurm's format: {TIME_FORMATS}); has precedence over `runtime`"),
    Field(
        name="connect",
        parse=_choice("auto", "direct", "tunnel"),
        help="how the server reaches the kernel: auto, direct (TCP encrypted by CurveZMQ) or tunnel "
        "(default: the admin's setting)",
    ),
    Field(
        name="directory",
        parse=_DIRECTORY,
        help="directory on the node in which the kernel starts; `~` and `$VARIABLE` have the job's values. Where the "
        "node does not have it, or you may not enter it, the start fails (default: the client's directory, if the "
        "node has it)",
    ),
    Field(
        name="default_directory",
        parse=_DIRECTORY,
        help="the same for a client without a directory, or with one that the node does not have or you may not "
        "enter (default: your home directory)",
    ),
    Field(
        name="share",
        parse=_flag,
        help="true: use an allocation of your servers that fits the request, instead of queueing for a new one",
    ),
    Field(
        name="isolate",
        parse=_flag,
        help="true: run the kernel in its own job step with an exact share of CPUs (`cpus`), memory and GPUs",
    ),
    Field(
        name="keep_allocation",
        parse=_flag,
        help="true: keep the allocation after its last kernel, until its time limit or until you release it",
    ),
)
_BY_NAME: Final = {field.name: field for field in FIELDS}


def parse_request(config: Mapping[str, object], *, spec_language: str | None = None) -> KernelRequest:
    """Return the valid request in ``config``; ``"None"``, ``""`` and null mean that a field is not set.

    Numbers may be text. ``spec_language`` is the kernelspec's ``language``, for a request that names none. Raises
    RequestError: its message names the field, the value and the allowed values, and its ``field`` is the field's name.
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


def _unset(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.strip() in ("", "None"))


def _parse(field: Field, value: object) -> object:
    try:
        return field.parse(value)
    except _Invalid as error:
        message = f"request field {field.name!r}: {_short_repr(value)} is not valid; allowed: {error}"
        raise RequestError(message, field=field.name) from error


def _short_repr(value: object) -> str:
    """The value's repr, shortened. Python refuses to convert a huge number, which is then described."""
    try:
        text = repr(value)
    except ValueError:
        text = f"<a {type(value).__name__} that is too large>"
    return text if len(text) <= 200 else text[:200] + "…"


def _unknown(name: object) -> RequestError:
    near = difflib.get_close_matches(str(name)[:100], _BY_NAME, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    message = f"unknown request field {_short_repr(name)}{hint} The fields are: {', '.join(_BY_NAME)}"
    return RequestError(message, field=str(name)[:100])


def _refuse_components(jobid: str) -> None:
    if not jobid.isdigit():
        raise RequestError(
            f"request field 'jobid': {jobid!r} is an array task or a component of a heterogeneous job, "
            "which cannot be adopted yet. Name a plain job, such as 123",
            field="jobid",
        )


def _require(values: Mapping[str, object]) -> None:
    """Raise RequestError for the first missing field: a command, and, without ``jobid``, the fields of a new job."""
    needed = [("kernel_argv", "kernel_name")]
    if "jobid" not in values:
        needed += [("project", ""), ("partition", ""), ("nodes", ""), ("runtime", "time")]
    for name, instead in needed:
        if name not in values and instead not in values:
            other = f" (or {instead!r})" if instead else ""
            raise RequestError(
                f"request field {name!r}{other} is missing: {_BY_NAME[name].help}. "
                "Set it in metadata.kernel_provisioner.config of the kernel.json",
                field=name,
            )
