"""``jupyter slurm logs``: which log is meant, and what --follow prints of a log that is written meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_slurm.cli import logs
from gateway_slurm.cli.logs import Log, Reader
from gateway_slurm.slurm.access import ClusterAccess, LogFile
from gateway_slurm.slurm.runner import CommandResult, Runner
from gateway_slurm.slurm.ssh.access import SshAccess

NAME = "kernel-14-ab.log"
LOG = Log(LogFile(NAME, 0, 1.0), "14", "ab", "")


class OverSsh(SshAccess):
    """The shell commands for the login node, run on this machine."""

    def __init__(self) -> None:
        async def run(argv: list[str]) -> CommandResult:
            process = await asyncio.create_subprocess_exec(*argv, stdout=-1, stderr=-1)
            out, err = await process.communicate()
            return CommandResult(process.returncode or 0, out.decode(), err.decode())

        self.runner = SimpleNamespace(run=run)  # type: ignore[assignment]


@pytest.fixture(params=[lambda: ClusterAccess(Runner()), OverSsh], ids=["local", "ssh"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Reader:
    """A reader of the logs in a directory."""
    slurm: Any = SimpleNamespace(run=asyncio.run, access=request.param())
    return Reader(slurm, str(tmp_path))


def followed(reader: Reader, monkeypatch: pytest.MonkeyPatch, *between: Callable[[], object]) -> None:
    """Show the log and follow it; each of ``between`` happens before a look, and Ctrl-C then."""
    happenings = iter(between)

    def sleep(_seconds: float) -> None:
        happening = next(happenings, None)
        if happening is None:
            raise KeyboardInterrupt
        happening()

    monkeypatch.setattr(logs.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        reader.follow(reader.show([LOG]))


def test_each_line_is_printed_once_also_where_the_launcher_begins_a_new_file(reader, tmp_path, monkeypatch, capsys):
    """What was written after the listing is shown, and not again; the end of the full file comes before the new one."""
    path = tmp_path / NAME
    path.write_text("first line\nwritten after the listing\n")

    def rotate() -> None:
        with path.open("a") as file:
            file.write("the last of the full file\n")
        path.rename(f"{path}.1")
        path.write_text("new\n")

    def write() -> None:
        with path.open("a") as file:
            file.write("and more\n")

    followed(reader, monkeypatch, lambda: None, rotate, lambda: None, write, path.unlink)
    assert capsys.readouterr().out.splitlines() == [
        f"==> {NAME} <==",
        "first line",
        "written after the listing",
        "the last of the full file",
        "new",
        "and more",
    ]


def test_a_number_is_a_job_before_it_is_the_beginning_of_a_kernels_id():
    """However new that kernel is. Without such a job it is the kernel."""
    other = Log(LogFile("kernel-20-14cd.log", 0, 2.0), "20", "14cd", "")
    launcher = Log(LogFile("launcher-14.log", 0, 0.5), "14", "", "")
    assert logs._find([other, LOG, launcher], "14") == [launcher, LOG]
    assert logs._find([other], "14") == [other]
    assert logs._find([other], "15") is None
