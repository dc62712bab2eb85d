"""Logs on the nodes go after a month, and nothing else does."""

from __future__ import annotations

import time

from launchers.node import LOG_RETENTION_SECONDS, remove_old_logs


def test_only_old_logs_of_ours_are_removed(tmp_path):
    """A user may keep other files beside them; a directory that is not there is no error."""
    names = ["launcher-12.log", "kernel-a.log", "kernel-a.log.1", "notes.log", "kernel-plan.txt"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "registry").mkdir()
    remove_old_logs(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 6
    remove_old_logs(str(tmp_path), now=time.time() + LOG_RETENTION_SECONDS + 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel-plan.txt", "notes.log", "registry"]
    remove_old_logs(str(tmp_path / "nowhere"))
