"""The flags of jobs that their users keep."""

from __future__ import annotations

import os

from gateway_slurm.store.keep_flags import KeepFlagFiles


def test_the_directories_of_the_flags_are_private_whatever_the_umask_is(tmp_path):
    """Also those above, where nothing else has made them yet."""
    flags, before = KeepFlagFiles(tmp_path / "registry" / "keep"), os.umask(0o022)
    try:
        flags.set("7", "gs-1")
    finally:
        os.umask(before)
    assert flags.all() == {("7", "gs-1")}
    made = [tmp_path / "registry", flags.directory]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700, 0o700]
