"""The user's wish that a job stay after its last kernel: one empty file per job, read by all of the user's processes.

Slurm uses job ids again. A file name therefore holds the job id and the identity that tells the job from others
with the same id (``AllocationRecord.identity``).
"""

from __future__ import annotations

import re
from pathlib import Path

from gateway_slurm._util import make_private_directory

_NAME = re.compile(r"([0-9]{1,10})\.([A-Za-z0-9_-]{1,64})", re.ASCII)

KeepFlag = tuple[str, str]
"""Job id and identity."""


class KeepFlagFiles:
    """The flag files in one directory. Every method may raise OSError. A directory that does not exist has no flags."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def all(self) -> frozenset[KeepFlag]:
        """The flags that are set, from one directory listing."""
        try:
            names = [path.name for path in self.directory.iterdir()]
        except FileNotFoundError:
            return frozenset()
        return frozenset((match[1], match[2]) for match in map(_NAME.fullmatch, names) if match)

    def set(self, jobid: str, identity: str) -> None:
        """Ask that the job stay. Raises ValueError for a job id or identity that cannot be part of a file name."""
        path = self._path(jobid, identity)
        make_private_directory(self.directory)
        path.touch(mode=0o600)

    def remove(self, jobid: str, identity: str) -> None:
        """Remove the flag, if it is set. Raises ValueError as ``set`` does."""
        self._path(jobid, identity).unlink(missing_ok=True)

    def _path(self, jobid: str, identity: str) -> Path:
        name = f"{jobid}.{identity}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name[:200]!r} is not a job id and an identity")
        return self.directory / name
