"""Logs on the nodes are removed when they are old, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.node import remove_empty_logs, remove_old_logs

ROOT = Path(__file__).parents[3]


def test_only_old_logs_of_ours_are_removed(tmp_path):
    """A user may keep other files beside them; a directory that is not there is no error."""
    names = ["launcher-12.log", "kernel-a.log", "kernel-a.log.1", "notes.log", "kernel-plan.txt"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "registry").mkdir()
    newest = tmp_path.parent / "newest"
    newest.touch()
    remove_old_logs(str(tmp_path), str(newest), 30)
    assert len(list(tmp_path.iterdir())) == 6
    a_month_on = newest.stat().st_mtime + 30 * 86400 + 60
    os.utime(newest, (a_month_on, a_month_on))
    remove_old_logs(str(tmp_path), str(newest), 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel-plan.txt", "notes.log", "registry"]
    remove_old_logs(str(tmp_path / "nowhere"), str(newest), 30)
    remove_old_logs(str(tmp_path), str(tmp_path / "nowhere"), 30)


def test_only_empty_logs_of_kernels_are_removed(tmp_path):
    """What a kernel printed stays; a log that was never made is no error."""
    for name in ("kernel-1-a.log", "kernel-1-b.log"):
        (tmp_path / name).touch()
    (tmp_path / "kernel-1-b.log").write_text("said")
    remove_empty_logs([str(tmp_path / name) for name in ("kernel-1-a.log", "kernel-1-b.log", "kernel-1-c.log")])
    assert [path.name for path in tmp_path.iterdir()] == ["kernel-1-b.log"]


# flock(2) on NFS: a shared lock needs a descriptor for reading, an exclusive one a descriptor for writing.
NFS = """
import errno, fcntl, os
def nfs_flock(descriptor, operation, flock=fcntl.flock):
    wanted = os.O_RDONLY if operation & fcntl.LOCK_SH else os.O_WRONLY
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE not in (wanted, os.O_RDWR):
        raise OSError(errno.EBADF, "Bad file descriptor")
    flock(descriptor, operation)
fcntl.flock = nfs_flock
"""
NO_LOCKS = """
import errno, fcntl
def no_flock(descriptor, operation):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = no_flock
"""


@pytest.mark.parametrize(
    ("file_system", "left_by_the_last"), [("", False), (NFS, False), (NO_LOCKS, True)], ids=["local", "NFS", "no locks"]
)
def test_launchers_that_share_an_empty_log_remove_it_with_the_last_one(tmp_path, file_system, left_by_the_last):
    """A launcher that is a step of its own may not take the file from another one; other files stay in any case.

    Standard error is open for writing alone, as in the job's script.
    """
    code = f"{file_system}\nimport sys; from launchers.node import OwnLog; log = OwnLog(); log.hold()\n"
    code += "print(1, flush=True); sys.stdin.read(); log.remove_if_empty(alone=False)"
    path = tmp_path / "launcher-1.log"

    def launcher(file: Path) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with file.open("a") as log:
            started = subprocess.Popen([sys.executable, "-c", code], stderr=log, cwd=ROOT, **pipes)
        assert started.stdout is not None
        assert started.stdout.readline() == "1\n"
        return started

    first, second, other = launcher(path), launcher(path), launcher(tmp_path / "terminal")
    for process, left in ((first, True), (second, left_by_the_last), (other, left_by_the_last)):
        process.communicate(timeout=30)
        assert path.exists() is left
    assert (tmp_path / "terminal").exists()
