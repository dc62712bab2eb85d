"""The keys of a project's ``project.json``, as one table, and the project that a file describes.

Admins write these files. A mistake is an error, and so is an unknown key: a limit with a misspelt name would be no
limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway_slurm._util import is_user_name
from gateway_slurm.errors import ConfigError
from gateway_slurm.request import FIELDS
from gateway_slurm.slurm.formats import memory_in_mebibytes

FILE_NAME: Final = "project.json"
NEVER_CLIENT_FIELDS: Final = frozenset({"kernel_argv", "kernel_name", "kernel_language"})
"""Request fields that decide which program runs: a client never sets them."""
CLIENT_FIELDS: Final = ("jobid", "node", "nodes", "gpus", "cpus", "memory", "runtime", "time", "share", "isolate")
"""Request fields that clients may set by default: the size of the kernel's job, or the job to run in.

Not the fields that decide which account, partition or nodes are used (project, partition, qos, reservation, constraint,
gres), nor how the kernel is reached (connect), nor whether nodes stay allocated without a kernel (keep_allocation).
"""

_FIELDS: Final = {field.name: field for field in FIELDS}
_TITLE: Final = re.compile(r"[^\x00-\x1f\x7f]{1,100}")
_GROUP: Final = re.compile(r"[^\x00-\x1f\x7f:,\s]{1,255}")
SPEC_NAME: Final = re.compile(r"[a-z0-9_-][a-z0-9._-]{0,127}", re.ASCII)
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The maximum for one kernel's job, all its nodes together. None is no limit."""

    max_nodes: int | None = None
    max_gpus: int | None = None
    max_cpus: int | None = None
    max_memory: int | None = None
    """MiB."""
    max_runtime: int | None = None
    """Minutes."""

    @property
    def are_any(self) -> bool:
        return self != Limits()


@dataclass(frozen=True, kw_only=True)
class Members:
    """The members of a project: users in one of the three sets."""

    users: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    accounts: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Project:
    """A directory of kernelspecs, with the settings that apply to all of them."""

    name: str
    title: str
    account: str | None = None
    partition: str | None = None
    partitions: tuple[str, ...] | None = None
    default_directory: str | None = None
    default_kernel: str | None = None
    limits: Limits = Limits()
    allowed_client_fields: tuple[str, ...] | None = None
    allowed_envs: tuple[str, ...] = ()
    members: Members | None = None
    """None: every user is a member."""

    @property
    def defaults(self) -> dict[str, object]:
        """Request fields for kernelspecs that do not set them."""
        only = self.partitions[0] if self.partitions and len(self.partitions) == 1 else None
        found = {"project": self.account, "partition": self.partition or only}
        found["default_directory"] = self.default_directory
        return {name: value for name, value in found.items() if value is not None}


# -- The table of keys --


@dataclass(frozen=True)
class Key:
    """One key of the file. A key ``section.key`` is in the JSON object ``section``."""

    name: str
    parse: Callable[[object], Any]
    help: str


def _field(name: str) -> Callable[[object], Any]:
    """A parser as that of the request field ``name``, which requires a value."""

    def parse(value: object) -> Any:
        if value in (None, "", "None"):
            raise ValueError("a value; leave the key out for none")
        return _FIELDS[name].parse(value)

    return parse


def _one_partition(value: object) -> str:
    parsed: str = _field("partition")(value)
    if "," in parsed:
        raise ValueError("one partition's name")
    return parsed


def _memory(value: object) -> int:
    mebibytes = memory_in_mebibytes(_field("memory")(value))
    if mebibytes == 0:
        raise ValueError("an amount above 0")
    return mebibytes


def _each(parse: Callable[[object], str], what: str) -> Callable[[object], tuple[str, ...]]:
    def parse_all(value: object) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise ValueError(f"a list of {what}")
        return tuple(parse(item) for item in value)

    return parse_all


def _set(parse: Callable[[object], str], what: str) -> Callable[[object], frozenset[str]]:
    parse_all = _each(parse, what)
    return lambda value: frozenset(parse_all(value))


def _matching(matches: Callable[[str], object], allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or not matches(value):
            raise ValueError(allowed)
        return value

    return parse


_CLIENT_FIELD: Final = _matching(
    lambda text: text in _FIELDS and text not in NEVER_CLIENT_FIELDS,
    f"request fields except {', '.join(sorted(NEVER_CLIENT_FIELDS))}",
)
_TEXT: Final = _matching(_TITLE.fullmatch, "text of 1 to 100 characters without control characters")
_SPEC: Final = _matching(SPEC_NAME.fullmatch, "the name of a kernelspec's directory")
_ENV: Final = _matching(_VARIABLE.fullmatch, "names of variables, or beginnings of names followed by *")


def _account(value: object) -> str:
    # Slurm keeps account names in lower case.
    return str(_field("project")(value)).lower()


KEYS: Final[tuple[Key, ...]] = (
    Key("title", _TEXT, "the project's display name (default: the directory's name)"),
    Key("account", _field("project"), "`project` of kernelspecs that do not set it"),
    Key("partition", _one_partition, "`partition` of kernelspecs that do not set it"),
    Key("partitions", _each(_one_partition, "partitions"), "the allowed partitions; a single one is also the default"),
    Key("default_directory", _field("default_directory"), "`default_directory` of kernelspecs that do not set it"),
    Key("default_kernel", _SPEC, "the project's kernelspec (its directory's name) for clients that do not name one"),
    Key("limits.max_nodes", _FIELDS["nodes"].parse, "nodes"),
    Key("limits.max_gpus", _FIELDS["gpus"].parse, "GPUs: `gpus` and those in `gres`, times nodes"),
    Key("limits.max_cpus", _FIELDS["cpus"].parse, "CPUs: `cpus` (1 if unset) times nodes"),
    Key(
        "limits.max_memory",
        _memory,
        "memory: `memory` times nodes (Slurm's format; MiB if it has no unit); then `memory` must be set",
    ),
    Key("limits.max_runtime", _FIELDS["runtime"].parse, "`runtime` and `time` (minutes)"),
    Key(
        "allowed_client_fields",
        _each(_CLIENT_FIELD, "request fields"),
        "request fields that clients may set by `KERNEL_SLURM_<FIELD>` (default: the gateway's setting)",
    ),
    Key(
        "allowed_envs",
        _each(_ENV, "names"),
        "variables of the client that kernels get, besides `KERNEL_*` and those of the gateway's setting",
    ),
    Key("members.users", _set(_matching(is_user_name, "users' names"), "users"), "users who are members"),
    Key(
        "members.groups",
        _set(_matching(_GROUP.fullmatch, "names of groups"), "groups"),
        "Unix groups of the gateway's host; their users are members",
    ),
    Key("members.accounts", _set(_account, "accounts"), "Slurm accounts; their users are members (needs slurmdbd)"),
)
_KEYS: Final = {key.name: key for key in KEYS}
_SECTIONS: Final = frozenset(name.partition(".")[0] for name in _KEYS if "." in name)


# -- Parsing --


def parse_project(name: str, text: str | bytes) -> Project:
    """The project that the file's ``text`` describes. Raises ConfigError that names the key and what is allowed."""
    sections: dict[str, dict[str, Any]] = {"": {"title": name}}
    content = load_object(text)
    for key, value in _flat(content):
        section, _dot, field = key.rpartition(".")
        sections.setdefault(section, {})[field] = _parse(key, value)
    project = Project(
        name=name,
        limits=Limits(**sections.get("limits", {})),
        members=Members(**sections.get("members", {})) if "members" in content else None,
        **sections[""],
    )
    if project.partition and project.partitions is not None and project.partition not in project.partitions:
        raise ConfigError(f"partition={project.partition!r} is not one of the project's partitions")
    return project


def load_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ConfigError for anything else, and for a key that occurs twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _value in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the key {twice[:100]!r} occurs twice")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError("it is not a JSON object ({…})")
    return content


def _flat(content: Mapping[str, object]) -> Iterable[tuple[str, object]]:
    for name, value in content.items():
        if name not in _SECTIONS:
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            raise ConfigError(f"{name} is not a JSON object ({{…}})")


def _parse(name: str, value: object) -> object:
    if name not in _KEYS:
        raise ConfigError(f"the key {name[:100]!r} is unknown; known are {', '.join(_KEYS)}")
    try:
        return _KEYS[name].parse(value)
    except ValueError as error:
        raise ConfigError(f"{name}={repr(value)[:200]} is not valid; allowed is {error}") from error
