"""Old logs: a user's home is not to fill up with them."""

from __future__ import annotations

import os
import time

KEPT_SECONDS = 30 * 86400
AT_MOST = 10_000


def remove_old_logs(directory: str, now: float | None = None) -> None:
    """Remove logs of launchers and kernels that nobody has written to for KEPT_SECONDS."""
    oldest = (time.time() if now is None else now) - KEPT_SECONDS
    try:
        with os.scandir(os.path.expanduser(directory)) as entries:
            for _count, entry in zip(range(AT_MOST), entries):
                named = entry.name.startswith(("launcher-", "kernel-")) and ".log" in entry.name
                if named and entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < oldest:
                    os.unlink(entry.path)
    except OSError:  # another launcher was first, or the directory is gone: the next one tries again
        return
