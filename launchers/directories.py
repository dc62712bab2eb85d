"""The kernels' private directories on this node: in the first place that has room when a kernel starts."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable

from gateway_slurm.link import directories

PREFIX = "gs-"
# The path of a kernel's socket below the launcher's directory; slots are small numbers.
LONGEST = os.path.join("99999", "c-5")
# /dev/shm is memory and comes last: a kernel's log may be there if the home is full.
PLACES = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - mkdtemp is made for it


class Directories:
    """The launcher's directories. ``added`` is called with each, for the guard; ``close`` removes them."""

    def __init__(self, added: Callable[[str], None]) -> None:
        self._added = added
        self._roots: list[str] = []

    def for_kernel(self, slot: str) -> str:
        """A 0700 directory in which a kernel's files and sockets fit; on a restart the same, if it still works.

        Raises OSError, with each place and the reason.
        """
        if self._roots:
            with contextlib.suppress(OSError):
                return self._in_root(self._roots[-1], slot)
        try:
            root = directories.make_private((os.environ.get("TMPDIR", ""), *PLACES), PREFIX, LONGEST)
        except directories.NoDirectory as error:
            raise OSError(
                f"{error} (node {socket.gethostname()}); make room there, or set TMPDIR for the jobs to a place with "
                "room and a short path"
            ) from error
        self._roots.append(root)
        self._added(root)
        return self._in_root(root, slot)

    def _in_root(self, root: str, slot: str) -> str:
        directory = os.path.join(root, slot)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        directories.check(directory)
        return directory

    def close(self) -> None:
        """Remove the directories."""
        for root in self._roots:
            shutil.rmtree(root, ignore_errors=True)
