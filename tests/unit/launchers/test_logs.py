"""Logs on the nodes go after a month, and nothing else does."""

from __future__ import annotations

import os

from launchers.node import LOG_RETENTION_SECONDS, remove_old_logs


def test_only_old_logs_of_ours_are_removed(tmp_path):
    """A user may keep other files beside them; a directory that is not there is no error."""
    names = ["launcher-12.log", "kernel-a.log", "kernel-a.log.1", "notes.log", "kernel-plan.txt"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "registry").mkdir()
    newest = tmp_path.parent / "newest"
    newest.touch()
    remove_old_logs(str(tmp_path), str(newest))
    assert len(list(tmp_path.iterdir())) == 6
    a_month_on = newest.stat().st_mtime + LOG_RETENTION_SECONDS + 60
    os.utime(newest, (a_month_on, a_month_on))
    remove_old_logs(str(tmp_path), str(newest))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel-plan.txt", "notes.log", "registry"]
    remove_old_logs(str(tmp_path / "nowhere"), str(newest))
    remove_old_logs(str(tmp_path), str(tmp_path / "nowhere"))
