"""The kernelspecs on disk: ``<root>/<project>/<name>/kernel.json``, with ``<root>/<project>/project.json``.

Each file is read once until it changes. A broken file makes its project or its kernelspec unavailable, and no other.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Generic, TypeVar

from jupyter_client.kernelspec import KernelSpec
from traitlets import TraitError

from gateway_slurm.errors import ConfigError, GatewaySlurmError, NotAllowed
from gateway_slurm.gateway.specs.limits import check_request, merge_fields
from gateway_slurm.gateway.specs.projects import FILE_NAME, SPEC_NAME, Project, load_object, parse_project
from gateway_slurm.request import parse_request

T = TypeVar("T")

MAX_FILE_BYTES: Final = 1 << 20
"""Of a kernel.json, a project.json or a tokens file. A larger file is an error."""
SETTLED_SECONDS: Final = 1.0
"""A file that changed less than this ago may change again with the same time stamp. It is read each time."""

PROVISIONER: Final = "slurm-provisioner"
SPEC_FILE: Final = "kernel.json"
MAX_RESOURCE_BYTES: Final = 4 << 20
"""Of a logo, kernel.js or kernel.css."""

_PROJECT_NAME: Final = re.compile(r"[a-z0-9_-]{1,64}", re.ASCII)
_KEYS: Final = frozenset(KernelSpec.class_trait_names()) - {"resource_dir"}
_RESOURCE: Final = re.compile(r"kernel\.(?:js|css)|logo-[A-Za-z0-9_.-]+", re.ASCII)
# Values for required fields, so that a kernelspec can be checked before a client adds its own.
_PLACEHOLDERS: Final = {"project": "any", "partition": "any", "nodes": 1, "runtime": 1, "kernel_argv": ["any"]}

Stamp = tuple[int, int, int, int, int, int, int]
"""The facts of a file's status that differ after a change."""

# -- Files --


def stamp(status: os.stat_result) -> Stamp:
    """The stamp of a file. Owner and mode are part of it: they decide whether the file is trusted."""
    s = status
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_uid, s.st_mode


@contextlib.contextmanager
def open_plain(path: Path, within: Path | None = None) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open a plain file and return it with its status. Both are of one file, even if it is replaced meanwhile.

    With ``within`` the file must lie in that directory, with links followed. Raises OSError, and ValueError for a file
    that is not plain or lies elsewhere.
    """
    # O_NONBLOCK: opening a named pipe does not wait for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    target, more = (path, 0) if within is None else (os.path.realpath(path), os.O_NOFOLLOW)
    descriptor = os.open(target, flags | more)
    # Before open(), whose error for a directory would name the descriptor's number.
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError("it is not a plain file")
    with open(descriptor, "rb") as file:
        # A directory above the file may have become a link since realpath(): the descriptor has its real path.
        real = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if within is not None and not real.is_relative_to(os.path.realpath(within)):
            raise ValueError(f"it is a link that leads out of {within}")
        yield file, status


def read_bounded(file: BinaryIO, largest: int) -> bytes:
    """The file's content. Raises ValueError for more than ``largest`` bytes."""
    content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest} bytes")
    return content


@dataclass(frozen=True)
class _Known(Generic[T]):
    """The result of parsing a file: a value, or the error that was raised."""

    stamp: Stamp
    settled: bool
    value: T | None
    error: Exception | None


class FileCache(Generic[T]):
    """The parsed content of files. ``parse`` gets path, content and status. Any thread may use a cache.

    An error of ``parse`` is kept and raised again until the file changes. A cached answer costs one stat(2).
    """

    def __init__(self, parse: Callable[[Path, bytes, os.stat_result], T]) -> None:
        self._parse = parse
        self._known: dict[Path, _Known[T]] = {}
        self.reads = 0
        """How often a file was read."""

    def get(self, path: Path, within: Path | None = None) -> T:
        """The parsed content. Raises as ``open_plain``, ValueError for a file that is too large, and as ``parse``."""
        known = self._known.get(path)
        if known is None or not known.settled or known.stamp != stamp(path.stat()):
            known = self._known[path] = self._read(path, within)
        if known.error is not None:
            raise known.error.with_traceback(None)
        assert known.value is not None
        return known.value

    def forget_others(self, paths: Collection[Path]) -> None:
        """Forget all files but ``paths``, so that removed files do not pile up."""
        for path in [path for path in list(self._known) if path not in paths]:
            self._known.pop(path, None)

    def _read(self, path: Path, within: Path | None) -> _Known[T]:
        now = time.time()
        with open_plain(path, within) as (file, status):
            self.reads += 1
            settled = now - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS
            try:
                content = read_bounded(file, MAX_FILE_BYTES)
                return _Known(stamp(status), settled, self._parse(path, content, status), None)
            except Exception as error:  # noqa: BLE001 - any error of a parser is raised to the caller
                return _Known(stamp(status), settled, None, error)


# -- Kernelspecs --


@dataclass(frozen=True)
class SpecFile:
    """The content of a kernel.json."""

    content: Mapping[str, Any]
    provisioner: str
    config: Mapping[str, Any]
    """The request fields, without the lists of authorized and unauthorized users."""
    authorized: tuple[frozenset[str], ...]
    """A user must be in each of these sets."""
    unauthorized: frozenset[str]

    @property
    def is_local(self) -> bool:
        """Whether its kernels would run on this host."""
        return self.provisioner != PROVISIONER

    def admits(self, user: str) -> bool:
        """Whether the lists of authorized and unauthorized users let this user use the kernelspec."""
        return user not in self.unauthorized and all(user in names for names in self.authorized)


@dataclass(frozen=True)
class ServedSpec:
    """A kernelspec and its name in the gateway. ``project`` is None for a kernelspec on Jupyter's path."""

    name: str
    directory: Path
    file: SpecFile
    project: Project | None

    @property
    def is_project_default(self) -> bool:
        """Whether its project names it as ``default_kernel``."""
        return self.project is not None and self.name == f"{self.project.name}.{self.project.default_kernel}"

    def kernel_spec(self, cls: type[KernelSpec] = KernelSpec) -> KernelSpec:
        """A new KernelSpec each time: callers change them."""
        return cls(resource_dir=str(self.directory), **copy.deepcopy(dict(self.file.content)))


class Catalog:
    """The projects below ``root``, and the kernelspecs on Jupyter's path. Any thread may use it; it keeps no file open.

    ``root`` is None if there are no projects.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._projects = FileCache(lambda path, content, _status: parse_project(path.parent.name, content))
        self._specs = FileCache(_strict_spec_file)
        self._installed = FileCache(_spec_file)
        self._resources: dict[Path, tuple[Stamp, list[str]]] = {}

    # -- Projects --

    def load(self, name: str) -> ServedSpec | None:
        """The kernelspec ``<project>.<name>``; None if it does not exist. Raises ConfigError if it is broken."""
        project_name, _dot, spec_name = name.partition(".")
        if self._root is None or not _PROJECT_NAME.fullmatch(project_name) or not SPEC_NAME.fullmatch(spec_name):
            return None
        path = self._root / project_name / spec_name / SPEC_FILE
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        try:
            file = self._specs.get(path, within=path.parent.parent)
        except (OSError, ValueError, ConfigError) as error:
            raise ConfigError(f"{path}: {error}") from error
        return ServedSpec(name, path.parent, file, self.project(project_name))

    def project(self, name: str) -> Project:
        """The project of this name. Raises ConfigError that names the file."""
        assert self._root is not None
        path = self._root / name / FILE_NAME
        try:
            return self._projects.get(path, within=path.parent)
        except FileNotFoundError as error:
            raise ConfigError(f"{path} is missing, so no user sees this project; a file with {{}} is enough") from error
        except (OSError, ValueError, ConfigError) as error:
            raise ConfigError(f"{path}: {error}") from error

    def scan(self) -> tuple[dict[str, ServedSpec], list[str]]:
        """All kernelspecs of all projects by name, and the problems of those that are broken."""
        found: dict[str, ServedSpec] = {}
        problems: list[str] = []
        for folder in self._folders(self._root, _PROJECT_NAME, problems):
            try:
                self.project(folder.name)
            except ConfigError as error:
                problems.append(str(error))
                continue
            for directory in self._folders(folder, SPEC_NAME, problems):
                self._scan_one(f"{folder.name}.{directory.name}", found, problems)
        self._forget(found)
        return found, problems

    def _scan_one(self, name: str, found: dict[str, ServedSpec], problems: list[str]) -> None:
        try:
            served = self.load(name)
        except ConfigError as error:
            problems.append(str(error))
            return
        if served is not None:
            found[name] = served
            problems += [f"{served.directory / SPEC_FILE}: {text}" for text in _beyond_limits(served)]

    def _folders(self, parent: Path | None, pattern: re.Pattern[str], problems: list[str]) -> Iterator[Path]:
        """The directories in ``parent`` in the order of their names, without hidden ones."""
        if parent is None:
            return
        try:
            with os.scandir(parent) as entries:
                names = sorted(entry.name for entry in entries if entry.name[0] != "." and os.path.isdir(entry))
        except OSError as error:
            problems.append(f"{parent} cannot be read: {error.strerror}")
            return
        for name in names:
            if pattern.fullmatch(name):
                yield parent / name
            elif pattern is _PROJECT_NAME or os.path.isfile(parent / name / SPEC_FILE):
                dot = "_ - and ." if pattern is SPEC_NAME else "_ and -"
                problems.append(f"{parent / name} is not served: its name may have small letters, digits, {dot} only")

    def _forget(self, found: Mapping[str, ServedSpec]) -> None:
        directories = {served.directory for served in found.values()}
        self._specs.forget_others({directory / SPEC_FILE for directory in directories})
        self._projects.forget_others({directory.parent / FILE_NAME for directory in directories})
        for path in list(self._resources):
            if path not in directories and self._root in path.parents:
                self._resources.pop(path, None)

    # -- Jupyter's path --

    def installed(self, name: str, directory: Path) -> ServedSpec:
        """A kernelspec on Jupyter's path. Raises ConfigError if it is broken, OSError if it does not exist."""
        path = directory / SPEC_FILE
        try:
            return ServedSpec(name, directory, self._installed.get(path), None)
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{path}: {error}") from error

    # -- Resources --

    def resources(self, served: ServedSpec) -> list[str]:
        """The names of the kernelspec's files that clients may read: logos, kernel.js and kernel.css."""
        try:
            now = stamp(served.directory.stat())
            known = self._resources.get(served.directory)
            if known is None or known[0] != now:
                names = sorted(name for name in os.listdir(served.directory) if _RESOURCE.fullmatch(name))
                known = self._resources[served.directory] = now, names
        except OSError:
            return []
        return [name for name in known[1] if _can_be_opened(served, name)]

    def resource(self, served: ServedSpec, name: str) -> bytes | None:
        """The content of such a file; None if it does not exist, leads out of the project, or is too large."""
        if not _RESOURCE.fullmatch(name):
            return None
        with contextlib.suppress(OSError, ValueError), _opened_resource(served, name) as (file, _status):
            return read_bounded(file, MAX_RESOURCE_BYTES)
        return None


def _opened_resource(served: ServedSpec, name: str) -> AbstractContextManager[tuple[BinaryIO, os.stat_result]]:
    within = served.directory.parent if served.project else served.directory
    return open_plain(served.directory / name, within)


def _can_be_opened(served: ServedSpec, name: str) -> bool:
    with contextlib.suppress(OSError, ValueError), _opened_resource(served, name):
        return True
    return False


def _beyond_limits(served: ServedSpec) -> list[str]:
    """What the kernelspec requests beyond its project's limits. It is served: a client may request less."""
    if served.file.is_local:
        return []
    partitions = served.project.partitions if served.project else None
    partition = {"partition": partitions[0]} if partitions else {}
    try:
        fields = {**_PLACEHOLDERS, **partition, **merge_fields(served.project, served.file.config, {})}
        check_request(fields, served.project)
    except NotAllowed as error:
        return [f"no start will be allowed as it stands: {error}"]
    except GatewaySlurmError:
        pass  # the client's own fields may mend it
    return []


# -- Parsers of the files --


def _strict_spec_file(path: Path, content: bytes, status: os.stat_result) -> SpecFile:
    """As ``_spec_file``, but unknown keys and invalid request fields are errors. Raises ConfigError."""
    unknown = load_object(content).keys() - _KEYS
    if unknown:
        raise ConfigError(f"unknown keys {sorted(unknown)}; known are {', '.join(sorted(_KEYS))}")
    file = _spec_file(path, content, status)
    if not file.is_local:
        try:
            given = {name: value for name, value in file.config.items() if value not in (None, "", "None")}
            parse_request({**_PLACEHOLDERS, **given})
        except GatewaySlurmError as error:
            raise ConfigError(str(error)) from error
    return file


def _spec_file(_path: Path, content: bytes, _status: os.stat_result) -> SpecFile:
    """Parse a kernel.json. Raises ConfigError if it is not a kernelspec."""
    spec = load_object(content)
    if "resource_dir" in spec:
        raise ConfigError("it sets resource_dir, which is always its own directory")
    argv = spec.get("argv", [])
    # traitlets would accept a text as a list of letters.
    if not isinstance(argv, list) or not all(isinstance(item, str) for item in argv):
        raise ConfigError("argv is not a list of texts")
    metadata = spec.get("metadata", {})
    stanza = _object(metadata, "kernel_provisioner")
    config = _object(stanza, "config")
    authorized, unauthorized = [], []
    for place in (_object(_object(metadata, "process_proxy"), "config"), metadata, config):
        authorized.append(_users(place, "authorized_users"))
        unauthorized.append(_users(place, "unauthorized_users"))
    fields = {name: value for name, value in config.items() if name not in ("authorized_users", "unauthorized_users")}
    if "kernel_provisioner" in metadata:
        # The gateway checks the lists of users. To the provisioner they would be unknown request fields.
        spec["metadata"] = {**metadata, "kernel_provisioner": {**stanza, "config": fields}}
    try:
        KernelSpec(**copy.deepcopy(spec))
    except (TraitError, TypeError) as error:
        raise ConfigError(f"it is not a kernelspec: {error}") from error
    return SpecFile(
        content=spec,
        provisioner=str(stanza.get("provisioner_name", "")),
        config=fields,
        authorized=tuple(names for names in authorized if names),
        unauthorized=frozenset().union(*unauthorized),
    )


def _object(parent: object, key: str) -> dict[str, Any]:
    if not isinstance(parent, dict):
        raise ConfigError("its metadata is not a JSON object ({…})")
    value = parent.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is not a JSON object ({{…}})")
    return value


def _users(place: Mapping[str, Any], key: str) -> frozenset[str]:
    """Names separated by commas, as in Enterprise Gateway, or a list."""
    value = place.get(key) or []
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{key} is neither a list of names nor names separated by commas")
    return frozenset(name.strip() for name in names if name.strip())
