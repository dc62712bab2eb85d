"""``jupyter slurm doctor``: check a kernel's whole path, then find what dead servers and ended jobs have left."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_runtime_dir

from gateway_slurm._util import printable
from gateway_slurm.addresses import endpoints, interface_addresses
from gateway_slurm.allocations.identity import identity_of
from gateway_slurm.allocations.recovery import (
    NO_TIMEOUT_GRACE,
    Orphan,
    cancel_orphan,
    find_orphans,
    is_gone,
    living_jobs,
)
from gateway_slurm.cli.common import BlockingSlurm
from gateway_slurm.cli.doctor.path import (
    PATH_CHECK_FAILED,
    PathCheck,
    add_path_check_options,
    check_path,
    print_line,
)
from gateway_slurm.config import load_admin_config
from gateway_slurm.errors import ConfigError, GatewaySlurmError, LinkError, SlurmError, StoreError
from gateway_slurm.link.endpoints import parse_endpoint
from gateway_slurm.link.tunnel import make_socket_directory, pid_in, stale_socket_directories
from gateway_slurm.service import SlurmService
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.store import ServerAllocation, ServerRecord
from gateway_slurm.store.keep_flags import KeepFlag

FOUND, TROUBLE = 1, 2  # exit statuses
_MAX_CONNECTION_FILE = 1 << 16  # bytes


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check a kernel's whole path; find what dead servers and ended jobs have left, and fix it",
        description="Check a kernel's whole path, from the settings to its first answer, and report the first step "
        "that fails and what to change; then look for what dead servers and ended jobs have left behind. The exit "
        "status is 0 if all is well, 1 after findings (0 if --fix fixed all of them), 2 if something could not be "
        "checked, 3 if the path check failed.",
    )
    parser.add_argument("--fix", action="store_true", help="fix what can be fixed")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_path_check_options(parser)
    add_client_options(parser)
    parser.set_defaults(run=run)


@dataclass
class Finding:
    """One thing that is not as it should be."""

    kind: str
    problem: str
    owner: str = ""
    """The server and the Unix user that it belongs to, as text."""
    since: float | None = None
    """Seconds since the epoch."""
    remedy: str = ""
    """What ``--fix`` does; without ``fix`` a hint for the user."""
    fix: Callable[[], str | None] | None = field(default=None, repr=False)
    """Fixes it, or returns the reason why not. Raises GatewaySlurmError or OSError."""
    is_fixed: bool = False
    failure: str = ""
    """Why it was not fixed."""

    def line(self) -> str:
        """The line that is printed without ``--json``."""
        since = "" if self.since is None else time.strftime("since %Y-%m-%d %H:%M:%S", time.localtime(self.since))
        remedy = f"--fix {self.remedy}" if self.fix is not None else self.remedy
        outcome = "fixed" if self.is_fixed else f"not fixed: {self.failure}" if self.failure else remedy
        return "; ".join(part for part in (self.problem, self.owner, since, outcome) if part)

    def row(self) -> dict[str, Any]:
        """The JSON that ``--json`` prints."""
        return {
            "kind": self.kind,
            "what": self.problem,
            "whose": self.owner,
            "since": self.since,
            "fix": self.remedy,
            "mended": self.is_fixed,
            "left": self.failure,
            "can_fix": self.fix is not None,
        }


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the check of a gateway's client."""
    group = parser.add_argument_group(
        "client of a gateway",
        "Instead of all the rest: check a gateway as your Jupyter server reaches it, from its settings to a kernel.",
    )
    group.add_argument("--gateway-url", default="", metavar="URL", help="the gateway to check; needs no Slurm here")
    group.add_argument(
        "--token-file",
        default="",
        metavar="FILE",
        help="the file with your token (default: the token of your Jupyter configuration)",
    )


def _check_client(arguments: argparse.Namespace) -> int:
    # Its imports take a second, which no other command needs.
    from gateway_slurm.cli.doctor.client import check_client

    check = check_client(arguments, (lambda _line: None) if arguments.json else print_line)
    if arguments.json:
        print(json.dumps({"walk": [result.row() for result in check.results]}, indent=1))
    return PATH_CHECK_FAILED if check.failed else 0


def run(arguments: argparse.Namespace) -> int:
    """Check the path, look for leftovers, fix them if asked, and print the results; return the exit status."""
    if arguments.gateway_url:
        return _check_client(arguments)
    path_check = check_path(arguments) if arguments.walk or arguments.only_walk else None
    ask_slurm = path_check is None or path_check.slurm_answers
    doctor = None if arguments.only_walk else _doctor(arguments, ask_slurm=ask_slurm)
    if arguments.json:
        _print_json(path_check, doctor)
    elif doctor is not None:
        _print(doctor)
    if path_check is not None and path_check.failed:
        return PATH_CHECK_FAILED
    if doctor is None:
        return 0
    if doctor.trouble:
        return TROUBLE
    return FOUND if any(not finding.is_fixed for finding in doctor.findings) else 0


def _doctor(arguments: argparse.Namespace, *, ask_slurm: bool) -> Doctor:
    settings = load_admin_config(SlurmService)
    with BlockingSlurm(settings.access) as slurm:
        doctor = Doctor(settings, slurm if ask_slurm else None)
        doctor.examine()
        if arguments.fix:
            doctor.fix()
    return doctor


def _print_json(path_check: PathCheck | None, doctor: Doctor | None) -> None:
    document: dict[str, Any] = {}
    if path_check is not None:
        document["walk"] = [result.row() for result in path_check.results]
    if doctor is not None:
        findings = [finding.row() for finding in doctor.findings]
        document |= {"findings": findings, "trouble": doctor.trouble, "notes": doctor.notes}
    print(json.dumps(document, indent=1))


def _print(doctor: Doctor) -> None:
    for line in [*doctor.notes, *(finding.line() for finding in doctor.findings)]:
        print(printable(line))
    for line in doctor.trouble:
        print(printable(line), file=sys.stderr)
    if not doctor.findings and not doctor.trouble:
        print("Nothing is left of dead servers, and nothing is wrong.")


class Doctor:
    """Examines what this user has on this machine; only ``fix`` changes it. Without ``slurm``, jobs are left out."""

    def __init__(self, settings: SlurmService, slurm: BlockingSlurm | None) -> None:
        self.settings = settings
        self.findings: list[Finding] = []
        self.trouble: list[str] = []
        """What could not be checked, and why."""
        self.notes: list[str] = []
        """What is in order, or belongs to another store."""
        self._slurm = slurm
        self._registry = settings.make_registry()
        self._grace = settings.orphan_timeout or NO_TIMEOUT_GRACE

    def examine(self) -> None:
        """Check the store, the jobs, the files and the response address; fill ``findings``."""
        rows = self._read_store()
        marks = self._registry.keep_flags.all()
        jobs = self._ask_slurm(rows, marks)
        if rows is not None and jobs is not None:
            self._find_orphans(jobs, rows, marks)
            self._find_old_rows(jobs, rows)
        if jobs is not None:
            self._find_old_marks(jobs, marks)
        self._find_files()
        self._check_address()

    def fix(self) -> None:
        """Fix what can be fixed; a failure is noted in its finding."""
        for finding in self.findings:
            if finding.fix is None:
                continue
            try:
                finding.failure = finding.fix() or ""
            except (GatewaySlurmError, OSError) as error:
                finding.failure = str(error)
            finding.is_fixed = not finding.failure

    # -- store and Slurm ----------------------------------------------------------------------------

    def _read_store(self) -> list[ServerAllocation] | None:
        """All rows of allocations; None if the store cannot be used."""
        try:
            # Opening the store checks its version and its key, and writes to it.
            self.notes.append(f"store: {self._registry.store.name} can be used")
            return self._registry.all_allocations()
        except StoreError as error:
            self.trouble.append(f"the store cannot be used: {error}")
            return None

    def _ask_slurm(self, rows: list[ServerAllocation] | None, marks: frozenset[KeepFlag]) -> dict[str, JobInfo] | None:
        """The jobs that are not over: this package's, and those on record or marked. None if Slurm does not answer."""
        if self._slurm is None:
            self.trouble.append("Slurm was not asked about jobs: the path check did not reach it")
            return None
        jobids = {record.jobid for _server, record in rows or [] if record.jobid} | {
            jobid for jobid, _identity in marks
        }
        try:
            jobs = self._slurm.run(living_jobs(self._slurm.driver, jobids))
        except SlurmError as error:
            self.trouble.append(f"Slurm does not answer: {error}")
            return None
        self.notes.append(f"Slurm: it answers; jobs of this package: {len(jobs)}")
        return jobs

    # -- jobs and rows ------------------------------------------------------------------------------

    def _find_orphans(
        self, jobs: Mapping[str, JobInfo], rows: list[ServerAllocation], marks: frozenset[KeepFlag]
    ) -> None:
        store_id = self._registry.store_id
        timeout = self.settings.orphan_timeout
        for orphan in find_orphans(jobs, rows, marks, store_id=store_id, orphan_timeout=timeout):
            why = orphan.why_left(time.time())
            if orphan.foreign:
                self.notes.append(f"{orphan.what}: {why}")
                continue
            owner = _ownership(orphan.server, orphan.info.user)
            finding = Finding("job", orphan.what, owner, orphan.since, remedy=why)
            if not why:
                finding.remedy, finding.fix = "cancels it", partial(self._cancel, orphan)
            self.findings.append(finding)

    def _cancel(self, orphan: Orphan) -> str:
        assert self._slurm is not None
        return self._slurm.run(cancel_orphan(self._slurm.driver, self._registry, orphan))

    def _find_old_rows(self, jobs: Mapping[str, JobInfo], rows: list[ServerAllocation]) -> None:
        """Find rows of dead servers whose jobs are over. The next server drops such rows as well."""
        living = {identity_of(info) for info in jobs.values()}
        for server, record in rows:
            identity = record.identity or record.launcher_id
            if identity not in living and is_gone(server, time.time(), self._grace):
                job = f"job {record.jobid}" if record.jobid else "a job that was never submitted"
                what = f"the store has a row of {job}, which is over, with {len(record.kernel_ids)} kernels"
                drop = partial(self._registry.drop, [(server, record)])
                since = server.lease_until if server.lease_until < time.time() else None
                self._add("row", what, _ownership(server, record.owner), since, "removes the row", drop)

    def _find_old_marks(self, jobs: Mapping[str, JobInfo], marks: frozenset[KeepFlag]) -> None:
        living = {(jobid, identity_of(info)) for jobid, info in jobs.items()}
        for jobid, identity in sorted(marks - living):
            remove = partial(self._registry.keep_flags.remove, jobid, identity)
            self._add("mark", f"job {jobid} is marked as kept, and is over", "", None, "removes the mark", remove)

    # -- files ----------------------------------------------------------------------------------------

    def _find_files(self) -> None:
        try:
            shutil.rmtree(make_socket_directory(self.settings.tunnel_directory, clean=False))
        except LinkError as error:
            self.trouble.append(str(error))
        for path in stale_socket_directories(self.settings.tunnel_directory):
            since = _modified(path)
            what = f"{path} holds no socket any more"
            self._add("sockets", what, "a server that is gone", since, "removes it", partial(shutil.rmtree, path))
        for path, name in _dead_connection_files(Path(jupyter_runtime_dir())):
            what = f"{path} is the connection file of a kernel whose sockets are gone"
            self._add("connection", what, name, _modified(path), "removes it", partial(os.unlink, path))
        for private in self._private_files():
            mode = stat.S_IMODE(private.stat().st_mode)
            if mode & 0o077:
                right = 0o700 if private.is_dir() else 0o600
                what = f"other users may open {private} (mode {mode:04o}), which must be yours alone"
                self._add("mode", what, "", None, f"makes it {right:04o}", partial(private.chmod, right))

    def _private_files(self) -> Iterable[Path]:
        """The state directory and its files, such as the store's key. ``store_key_file`` is checked when it is read."""
        directory = self._registry.directory
        paths = [directory, *sorted(directory.glob("*"))] if directory.is_dir() else []
        return [path for path in paths if not path.is_symlink()]

    # -- the response address ---------------------------------------------------------------------------

    def _check_address(self) -> None:
        name = self.settings.response_interface
        try:
            hosts = interface_addresses(name) if name else None
        except ConfigError as error:
            self._add("address", str(error))
            return
        announced = endpoints(self.settings.response_address, hosts, 1)
        names = [host for host, _port in filter(None, map(parse_endpoint, announced))]
        if self.settings.response_address and not _resolves(names[0]):
            self._add("address", f"SlurmService.response_address: this machine cannot resolve {names[0]!r}")
        elif all(map(_is_loopback, names[:-1])):  # the last is the host's name
            what = "launchers on other hosts cannot dial this machine: it has loopback addresses only"
            self._add("address", f"{what}; set SlurmService.response_address")
        else:
            self.notes.append(f"response address: launchers dial {', '.join(names)}")

    def _add(
        self,
        kind: str,
        problem: str,
        owner: str = "",
        since: float | None = None,
        remedy: str = "",
        fix: Callable[[], None] | None = None,
    ) -> None:
        self.findings.append(Finding(kind, problem, owner, since, remedy, fix))


def _ownership(server: ServerRecord | None, user: str) -> str:
    """The server and the user that something belongs to, as text."""
    process = f"of {server.process.host}, process {server.process.pid}" if server is not None else ""
    return ", ".join(filter(None, (process, user and f"user {user}")))


def _dead_connection_files(directory: Path) -> list[tuple[str, str]]:
    """The path and the kernel's name of each connection file whose sockets were on this host, and are gone.

    The connection file of a kernel behind the tunnel names a socket in a directory of its server. Hosts may share the
    files, and do not see each other's sockets.
    """
    found = []
    for path in sorted(directory.glob("kernel-*.json")):
        try:
            if path.stat().st_size > _MAX_CONNECTION_FILE:
                continue
            content = json.loads(path.read_bytes())
            prefix = str(content["ip"]) if content["transport"] == "ipc" else ""
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a connection file of this package
        directory_of_socket = os.path.dirname(prefix)
        made_here = pid_in(os.path.basename(directory_of_socket)) is not None
        if made_here and not os.path.isdir(directory_of_socket):
            found.append((str(path), str(content.get("kernel_name", ""))))
    return found


def _modified(path: str) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, 1))
    except OSError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
