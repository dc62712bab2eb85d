"""The user's wish that a job stay after its last kernel: one empty file a job, for all processes of the user's.

A mark is of one job, not of its id alone, which Slurm uses again: its name holds what tells that job
from others with its id (``launching.identity_of``).
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"([0-9]{1,10})\.([A-Za-z0-9_-]{1,64})", re.ASCII)

Mark = tuple[str, str]
"""Job id and identity."""


class KeepMarks:
    """The marks in one directory. OSError is the caller's to handle; a directory that is not there holds none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def all(self) -> frozenset[Mark]:
        """Those that are set; one listing."""
        try:
            names = [path.name for path in self.directory.iterdir()]
        except FileNotFoundError:
            return frozenset()
        return frozenset((match[1], match[2]) for match in map(_NAME.fullmatch, names) if match)

    def set(self, jobid: str, identity: str) -> None:
        """Ask that the job stay; any process of the user's may."""
        path = self._path(jobid, identity)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)

    def remove(self, jobid: str, identity: str) -> None:
        """Take that back, or forget it with the job; one that is not there is fine."""
        self._path(jobid, identity).unlink(missing_ok=True)

    def _path(self, jobid: str, identity: str) -> Path:
        name = f"{jobid}.{identity}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name[:200]!r} is not of a job")
        return self.directory / name
