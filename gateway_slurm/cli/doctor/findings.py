"""``jupyter slurm doctor``: a kernel's whole path, then what dead servers and ended jobs have left."""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import re
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
from gateway_slurm.allocations.recovery import NEVER_GRACE, Orphan, cancel_orphan, find_orphans, is_gone, living_jobs
from gateway_slurm.cli.common import OwnSlurm
from gateway_slurm.cli.doctor.path import WALK_FAILED, Walk, add_options, walk
from gateway_slurm.config import load_admin_config
from gateway_slurm.errors import ConfigError, GatewaySlurmError, SlurmError, StoreError
from gateway_slurm.link.endpoints import parse_endpoint
from gateway_slurm.link.tunnel import stale_socket_directories
from gateway_slurm.service import SlurmService
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.store import Found, ServerRecord
from gateway_slurm.store.marks import Mark

FOUND, TROUBLE = 1, 2
# A connection file of a kernel that is reached through the tunnel names a socket in a server's directory.
_SOCKET = re.compile(r".*/gs-server\d+-[^/]+/[^/]+")
_LARGEST_CONNECTION_FILE = 1 << 16


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="walk a kernel's whole path; look for what dead servers and ended jobs have left, and mend it",
        description="Walk a kernel's whole path, from the settings to its answer, and name the first step that fails "
        "and what to change; then look for what dead servers and ended jobs have left behind. The exit status is 0 "
        "where all is well, 1 after findings (0 where --fix mended all of them), 2 where something could not be looked "
        "at, 3 where the walk failed.",
    )
    parser.add_argument("--fix", action="store_true", help="mend what can be mended")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_options(parser)
    parser.set_defaults(run=run)


@dataclass
class Finding:
    """One thing that is not as it should be."""

    kind: str
    what: str
    whose: str = ""
    since: float | None = None
    """Seconds since the epoch."""
    fix: str = ""
    """What ``--fix`` does; empty where it is for people to mend."""
    mend: Callable[[], str | None] | None = field(default=None, repr=False)
    """Does it; the reason why it did not, if so. Raises GatewaySlurmError or OSError."""
    mended: bool = False
    left: str = ""
    """Why it was not mended."""

    def line(self) -> str:
        """For people."""
        since = "" if self.since is None else time.strftime("since %Y-%m-%d %H:%M:%S", time.localtime(self.since))
        fix = f"--fix {self.fix}" if self.mend is not None else self.fix
        outcome = "mended" if self.mended else f"not mended: {self.left}" if self.left else fix
        return "; ".join(part for part in (self.what, self.whose, since, outcome) if part)

    def row(self) -> dict[str, Any]:
        """For programs."""
        names = ("kind", "what", "whose", "since", "fix", "mended", "left")
        return {name: getattr(self, name) for name in names} | {"can_fix": self.mend is not None}


def run(arguments: argparse.Namespace) -> int:
    """Walk, look, mend if asked, and tell."""
    walking = walk(arguments) if arguments.walk or arguments.only_walk else None
    doctor = None if arguments.only_walk else _doctor(arguments, ask_slurm=walking is None or walking.slurm_answers)
    if arguments.json:
        _print_json(walking, doctor)
    elif doctor is not None:
        _print(doctor)
    if walking is not None and walking.failed:
        return WALK_FAILED
    if doctor is None:
        return 0
    if doctor.trouble:
        return TROUBLE
    return FOUND if any(not finding.mended for finding in doctor.findings) else 0


def _doctor(arguments: argparse.Namespace, *, ask_slurm: bool) -> Doctor:
    settings = load_admin_config(SlurmService)
    with OwnSlurm(settings.access) as slurm:
        doctor = Doctor(settings, slurm if ask_slurm else None)
        doctor.look()
        if arguments.fix:
            doctor.mend()
    return doctor


def _print_json(walking: Walk | None, doctor: Doctor | None) -> None:
    found: dict[str, Any] = {}
    if walking is not None:
        found["walk"] = [outcome.row() for outcome in walking.outcomes]
    if doctor is not None:
        findings = [finding.row() for finding in doctor.findings]
        found |= {"findings": findings, "trouble": doctor.trouble, "notes": doctor.notes}
    print(json.dumps(found, indent=1))


def _print(doctor: Doctor) -> None:
    for line in [*doctor.notes, *(finding.line() for finding in doctor.findings)]:
        print(printable(line))
    for line in doctor.trouble:
        print(printable(line), file=sys.stderr)
    if not doctor.findings and not doctor.trouble:
        print("Nothing is left of dead servers, and nothing is wrong.")


class Doctor:
    """Looks at all that this user has on this machine; nothing is changed before ``mend``.

    Without ``slurm`` jobs are not judged.
    """

    def __init__(self, settings: SlurmService, slurm: OwnSlurm | None) -> None:
        self.settings = settings
        self.findings: list[Finding] = []
        self.trouble: list[str] = []
        """What could not be looked at, and why."""
        self.notes: list[str] = []
        """What is as it should be, or is not ours to judge."""
        self._slurm = slurm
        self._registry = settings.make_registry()
        self._grace = settings.orphan_timeout or NEVER_GRACE

    def look(self) -> None:
        """One look at everything."""
        found = self._look_at_store()
        marks = self._registry.marks.all()
        jobs = self._ask_slurm(found, marks)
        if found is not None and jobs is not None:
            self._look_for_orphans(jobs, found, marks)
            self._look_for_old_rows(jobs, found)
        if jobs is not None:
            self._look_for_old_marks(jobs, marks)
        self._look_for_files()
        self._look_at_address()

    def mend(self) -> None:
        """Do what can be done; what fails is told with its finding."""
        for finding in self.findings:
            if finding.mend is None:
                continue
            try:
                finding.left = finding.mend() or ""
            except (GatewaySlurmError, OSError) as error:
                finding.left = str(error)
            finding.mended = not finding.left

    # -- store and Slurm ----------------------------------------------------------------------------

    def _look_at_store(self) -> list[Found] | None:
        """Every row of allocations; None where the store cannot be used."""
        try:
            # Opening it looks at its version, its key and its health, and writes to it.
            self.notes.append(f"store: {self._registry.store.shown} can be used")
            found = self._registry.all_records()
        except StoreError as error:
            self.trouble.append(f"the store cannot be used: {error}")
            return None
        return found

    def _ask_slurm(self, found: list[Found] | None, marks: frozenset[Mark]) -> dict[str, JobInfo] | None:
        """The jobs that are not over, of ours and of those on record; None where Slurm does not answer."""
        if self._slurm is None:
            self.trouble.append("Slurm was not asked about jobs: the walk did not reach it")
            return None
        jobids = {record.jobid for _server, record in found or [] if record.jobid} | {jobid for jobid, _other in marks}
        try:
            jobs = self._slurm.run(living_jobs(self._slurm.driver, jobids))
        except SlurmError as error:
            self.trouble.append(f"Slurm does not answer: {error}")
            return None
        self.notes.append(f"Slurm: it answers; jobs of ours: {len(jobs)}")
        return jobs

    # -- jobs and rows ------------------------------------------------------------------------------

    def _look_for_orphans(self, jobs: Mapping[str, JobInfo], found: list[Found], marks: frozenset[Mark]) -> None:
        store_id = self._registry.store_id
        timeout = self.settings.orphan_timeout
        for orphan in find_orphans(jobs, found, marks, store_id=store_id, orphan_timeout=timeout):
            why = orphan.why_left(time.time())
            if orphan.foreign:
                self.notes.append(f"{orphan.what}: {why}")
                continue
            finding = Finding("job", orphan.what, _whose(orphan.server, orphan.info.user), orphan.since, fix=why)
            if not why:
                finding.fix, finding.mend = "cancels it", partial(self._cancel, orphan)
            self.findings.append(finding)

    def _cancel(self, orphan: Orphan) -> str:
        assert self._slurm is not None
        why = self._slurm.run(cancel_orphan(self._slurm.driver, orphan))
        if not why:
            orphan.forget(self._registry)
        return why

    def _look_for_old_rows(self, jobs: Mapping[str, JobInfo], found: list[Found]) -> None:
        """Rows of dead servers whose jobs are over: the next server drops them, too."""
        living = {identity_of(info) for info in jobs.values()}
        for server, record in found:
            identity = record.identity or record.launcher_id
            if identity not in living and is_gone(server, time.time(), self._grace):
                job = f"job {record.jobid}" if record.jobid else "a job that was never submitted"
                what = f"the store has a row of {job}, which is over, with {len(record.kernel_ids)} kernels"
                drop = partial(self._registry.drop, [(server, record)])
                since = server.lease_until if server.lease_until < time.time() else None
                self._add("row", what, _whose(server, record.owner), since, "removes the row", drop)

    def _look_for_old_marks(self, jobs: Mapping[str, JobInfo], marks: frozenset[Mark]) -> None:
        living = {(jobid, identity_of(info)) for jobid, info in jobs.items()}
        for jobid, identity in sorted(marks - living):
            remove = partial(self._registry.marks.remove, jobid, identity)
            self._add("mark", f"job {jobid} is marked to be kept, and is over", "", None, "removes the mark", remove)

    # -- files ----------------------------------------------------------------------------------------

    def _look_for_files(self) -> None:
        try:
            stale = stale_socket_directories(self.settings.tunnel_directory)
        except OSError as error:
            self.trouble.append(f"SlurmService.tunnel_directory cannot be read: {error}")
            stale = []
        for path in stale:
            since = _modified(path)
            whose = "a server that is gone"
            self._add("sockets", f"{path} holds no socket any more", whose, since, "removes it", partial(_rmtree, path))
        for path, name in _dead_connection_files(Path(jupyter_runtime_dir())):
            what = f"{path} is the connection file of a kernel whose sockets are gone"
            self._add("connection", what, name, _modified(path), "removes it", partial(os.unlink, path))
        for private in self._private_files():
            mode = stat.S_IMODE(private.stat().st_mode)
            if mode & 0o077:
                right = 0o700 if private.is_dir() else 0o600
                what = f"others may use {private} (mode {mode:04o}), which is yours alone"
                self._add("mode", what, "", None, f"makes it {right:04o}", partial(private.chmod, right))

    def _private_files(self) -> Iterable[Path]:
        """The state directory and what is in it, as the store's key; a named key file is checked when read."""
        directory = self._registry.directory
        own = [directory, *sorted(directory.glob("*"))] if directory.is_dir() else []
        return [path for path in own if not path.is_symlink()]

    # -- the response address ---------------------------------------------------------------------------

    def _look_at_address(self) -> None:
        name = self.settings.response_interface
        try:
            hosts = interface_addresses(name) if name else None
        except ConfigError as error:
            self._add("address", str(error))
            return
        announced = endpoints(self.settings.response_address, hosts, 1)
        names = [host for host, _port in filter(None, map(parse_endpoint, announced))]
        if self.settings.response_address and not _resolves(names[0]):
            self._add("address", f"SlurmService.response_address: this machine cannot find {names[0]!r}")
        elif all(map(_is_loopback, names[:-1])):  # the last is the host's name
            what = "launchers on other hosts find no address of this one: set SlurmService.response_address"
            self._add("address", what)
        else:
            self.notes.append(f"response address: launchers dial {', '.join(names)}")

    def _add(
        self,
        kind: str,
        what: str,
        whose: str = "",
        since: float | None = None,
        fix: str = "",
        mend: Callable[[], None] | None = None,
    ) -> None:
        self.findings.append(Finding(kind, what, whose, since, fix, mend))


def _whose(server: ServerRecord | None, user: str) -> str:
    if server is None:
        return f"user {user}" if user else ""
    words = f"of {server.process.host}, process {server.process.pid}"
    return words + (f", user {user}" if user else "")


def _dead_connection_files(directory: Path) -> list[tuple[str, str]]:
    """Path and kernel's name of each file that leads to sockets which are not there."""
    found = []
    for path in sorted(directory.glob("kernel-*.json")):
        try:
            if path.stat().st_size > _LARGEST_CONNECTION_FILE:
                continue
            content = json.loads(path.read_bytes())
            prefix = str(content["ip"]) if content["transport"] == "ipc" else ""
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not one of ours
        if _SOCKET.fullmatch(prefix) and not os.path.isdir(os.path.dirname(prefix)):
            found.append((str(path), str(content.get("kernel_name", ""))))
    return found


def _modified(path: str) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def _rmtree(path: str) -> None:
    shutil.rmtree(path)


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
