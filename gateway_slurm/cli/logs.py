"""``jupyter slurm logs``: list the logs of the user's kernels and launchers, and show those of one kernel."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

from gateway_slurm._util import in_one_line, printable
from gateway_slurm.cli.common import BlockingSlurm, print_table
from gateway_slurm.config import load_admin_config
from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.service import SlurmService
from gateway_slurm.slurm.access import LogFile, LogPart
from gateway_slurm.slurm.names import file_of, launcher_log, parse_log

COLUMNS = ("CHANGED", "JOB", "KERNEL", "NOTEBOOK", "SIZE")
MAX_LISTED = 200
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Log:
    """A file with its job, kernel and notebook; a launcher's log has no kernel."""

    file: LogFile
    jobid: str
    kernel_id: str
    notebook: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    text = "list the logs of your kernels, newest first, or show those of one kernel and of its launcher"
    parser = subparsers.add_parser("logs", help=text, description=text)
    parser.set_defaults(run=_run)
    parser.add_argument(
        "kernel",
        metavar="KERNEL|NOTEBOOK",
        nargs="?",
        help="the beginning of a kernel's id, a notebook's file name, or a job id; the newest that fits is shown",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written, until Ctrl-C")


def _run(arguments: argparse.Namespace) -> int:
    settings = load_admin_config(SlurmService)
    with BlockingSlurm(settings.access) as slurm:
        reader = Reader(slurm, settings.log_directory)
        logs = reader.logs()
        if arguments.kernel is None:
            if arguments.follow:
                raise GatewaySlurmError("--follow needs a kernel or a notebook; see: jupyter slurm logs")
            return _list(logs, settings.log_directory)
        shown = _find(logs, arguments.kernel)
        if shown is None:
            raise GatewaySlurmError(
                f"there is no log of a kernel, notebook or job {arguments.kernel[:80]!r} in {settings.log_directory} "
                "on this machine, or on the login node; a kernel that prints nothing outside its cells leaves none"
            )
        positions = reader.show(shown)
        if arguments.follow:
            reader.follow(positions)
    return 0


def _list(logs: list[Log], directory: str) -> int:
    if not logs:
        print(f"There are no logs in {directory}. If the nodes have other home directories, look for them there.")
        return 0
    print_table(COLUMNS, [_row(log) for log in logs[:MAX_LISTED]])
    return 0


def _row(log: Log) -> tuple[str, ...]:
    changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(log.file.changed))
    kernel = log.kernel_id or "(launcher)"
    return changed, log.jobid, *(in_one_line(text)[:60] for text in (kernel, log.notebook)), f"{log.file.size}"


def _find(logs: list[Log], text: str) -> list[Log] | None:
    """The newest log that ``text`` names, and the launcher's of the same job; None if there is none.

    A number is first a job's: the id of a kernel of another job may begin with it.
    """
    name = file_of(text)
    of_job = [log for log in logs if log.jobid == text]
    named = [log for log in logs if log.kernel_id.startswith(text) or (log.notebook and log.notebook == name)]
    for log in [*of_job, *named]:
        others = [other for other in logs if other.jobid == log.jobid and other is not log]
        launchers = [other for other in others if other.file.name == launcher_log(log.jobid)]
        return [*launchers, log]
    return None


class Reader:
    """Reads the logs in ``directory``, which are on this machine or on the login node."""

    def __init__(self, slurm: BlockingSlurm, directory: str) -> None:
        self._slurm, self._directory = slurm, directory

    def logs(self) -> list[Log]:
        """The user's logs, the newest first."""
        files = self._slurm.run(self._slurm.access.logs(self._directory))
        found = [Log(file, *parsed) for file in files if (parsed := parse_log(file.name)) is not None]
        return sorted(found, key=lambda log: log.file.changed, reverse=True)

    def _read(self, name: str, start: int) -> LogPart:
        return self._slurm.run(self._slurm.access.read_log(f"{self._directory}/{name}", start))

    def show(self, logs: list[Log]) -> dict[Log, int]:
        """Print the end of each log, under its name; return the byte up to which each was printed."""
        positions = {}
        for log in logs:
            print(f"==> {in_one_line(log.file.name)} <==")
            part = self._read(log.file.name, -1)
            positions[log] = part.end
            _print(part.content)
        return positions

    def follow(self, positions: dict[Log, int]) -> None:
        """Print what is added to the logs after these bytes, until Ctrl-C."""
        last = list(positions)[-1]
        while True:
            time.sleep(POLL_SECONDS)
            for log, position in positions.items():
                added = self.added(log, position)
                if added.content and log is not last:
                    print(f"==> {in_one_line(log.file.name)} <==")
                    last = log
                positions[log] = added.end
                _print(added.content)

    def added(self, log: Log, position: int) -> LogPart:
        """What the log has after ``position``. If the launcher began a new file, first the rest of the full one."""
        part = self._read(log.file.name, position)
        if part.start == position:
            return part
        full = self._read(f"{log.file.name}.1", position)
        rest = full.content if full.start == position else b""
        return LogPart(part.start - len(rest), rest + part.content)


def _print(content: bytes) -> None:
    """Print bytes of a log. A kernel prints what it likes: nothing of it is for the terminal to obey."""
    text = content.decode(errors="replace").replace("\r\n", "\n")
    if text:
        print(printable(text, "\n"), end="" if text.endswith("\n") else "\n")
    sys.stdout.flush()
