"""Which Unix users kernels are run for."""

from __future__ import annotations

import os
import pwd
import re
from typing import Final

from gateway_slurm.asuser.helper import NOBODY
from gateway_slurm.errors import NotAllowed

# What useradd(8) takes, and capitals: nothing that sudo could read as an option or as a number (``#0``).
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}", re.ASCII)


def process_user() -> str:
    """The name of the Unix user that this process runs as."""
    return pwd.getpwuid(os.geteuid()).pw_name


def check_user(name: str, *, min_uid: int, allow_own: bool) -> None:
    """Return if kernels may be run as this Unix user; may ask a directory service, and wait for it.

    Raises NotAllowed: the reason is the same for one who is not there and one who may not, but for the
    process's own account, which is a matter of settings.
    """
    if not _NAME.fullmatch(name):
        raise NotAllowed(f"not allowed to run kernels: {name[:40]!r} is not the name of a user")
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise NotAllowed(f"not allowed to run kernels: there is no user {name!r} on this machine") from None
    # A directory service may find Root for root.
    if found.pw_name != name or found.pw_uid == 0 or found.pw_uid == NOBODY or found.pw_uid < min_uid:
        raise NotAllowed(
            f"not allowed to run kernels: {name!r} is a system account (SlurmService.min_user_uid is {min_uid})"
        )
    if found.pw_uid == os.geteuid() and not allow_own:
        raise NotAllowed(
            f"not allowed to run kernels: {name!r} is this server's own account (SlurmService.allow_own_user)"
        )
