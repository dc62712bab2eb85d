"""Homes whose file system has no locks, as NFS without lockd (ENOLCK) and Lustre without ``flock`` (ENOSYS)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gateway_slurm._util import locked, why_no_locks
from helpers import no_locks

PROGRAM = """
import sys
from pathlib import Path
from gateway_slurm._util import locked
from gateway_slurm.errors import StoreError
from gateway_slurm.store import Registry, engine
engine.BUSY_SECONDS = 0.1
for url in ("", sys.argv[2], "memory:"):
    registry = Registry(Path(sys.argv[1]) / "state", url=url)
    try:
        registry.open()
        print("opened")
    except StoreError as error:
        print(error)
    finally:
        registry.close()
try:
    with locked(Path(sys.argv[1]) / "lock", 1):
        print("locked")
except OSError as error:
    print(error)
"""


def said(directory: Path, url: str, *prefix: str) -> list[str]:
    """What the program says of the default store, of the one in ``url``, of one in memory, and of a lock file."""
    argv = [*prefix, sys.executable, "-c", PROGRAM, str(directory), url]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_store_without_locks_says_so_and_where_it_can_be(tmp_path, number):
    """Neither a full disk nor another process is blamed; what the message offers works where there are locks."""
    elsewhere = f"sqlite:///{tmp_path}/elsewhere/store.sqlite"
    *stores, in_memory, lock = said(tmp_path, elsewhere, sys.executable, no_locks.__file__, number)
    for text in stores:
        assert [words for words in ("another process", "full", "quota") if words in text] == []
        offered = ("no file locks", "sqlite:////", "PostgreSQL", "XDG_STATE_HOME", "lockd", "flock")
        assert [words for words in offered if words not in text] == []
    assert in_memory == "opened"
    assert "no file locks" in lock
    assert said(tmp_path, elsewhere) == ["opened", "opened", "opened", "locked"]


def test_locks_that_work_are_no_reason(tmp_path):
    """Nor is a directory in which no file can be made; and the trial leaves nothing."""
    assert why_no_locks(tmp_path) == ""
    assert why_no_locks(tmp_path / "missing") == ""
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "lock", 1), pytest.raises(TimeoutError), locked(tmp_path / "lock", 0.05):
        pass
