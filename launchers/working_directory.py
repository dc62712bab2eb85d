"""The directories of a kernel, chosen on its node: only the node can tell whether it has a directory.

The directory that a client names is a hint. The client may be on a laptop, whose paths mean nothing here. The same
holds for the home directory in the environment of a server.
"""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# A path that a message quotes is cut to this length (characters).
MAX_QUOTED = 300


class NoDirectory(Exception):
    """The kernel can start in no directory that it may start in; the message is for the user."""


@dataclass(frozen=True)
class Directory:
    """Where the kernel starts, and why it is not where the client or the admin wanted; "" where it is."""

    path: str
    why: str = ""


def choose(spec: dict[str, Any]) -> Directory:
    """The first directory that the kernel's process can enter; raises NoDirectory.

    ``directory`` of START is an order of the kernelspec or the admin: nothing else is tried. Otherwise the client's
    ``cwd`` comes first, then the admin's ``default_directory``, and then the home directory on this node. A path that
    is not absolute begins at the home directory.
    """
    order = spec.get("directory")
    if order:
        path = _expanded(order)
        problem = _problem(path)
        if problem:
            raise NoDirectory(
                f"the kernel has no working directory: {_lacks(path, problem)}, and 'directory' allows no other"
            )
        return Directory(path)
    missing: list[str] = []
    for path in _wanted(spec.get("cwd"), spec.get("default_directory")):
        problem = _problem(path)
        if not problem:
            return Directory(path, "; ".join(missing))
        missing.append(_lacks(path, problem))
    raise NoDirectory(
        f"the kernel has no working directory: {'; '.join(missing)}. Start it in a directory of the compute nodes; "
        "'default_directory' of the kernelspec or of the project names one"
    )


def home(environment: Mapping[str, str]) -> str:
    """The home directory: ``HOME``, if it is a directory of this node, or else that of the user's account."""
    named = environment.get("HOME", "")
    if os.path.isdir(named):
        return named
    try:
        account = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return named
    return account if os.path.isdir(account) else named


def _wanted(hint: str | None, default: str | None) -> Iterable[str]:
    if hint:
        yield _absolute(os.path.expanduser(hint))
    if default:
        yield _expanded(default)
    yield os.path.expanduser("~")


def _expanded(path: str) -> str:
    """An admin's path: ``~`` and ``$VARIABLE`` have the job's values."""
    return _absolute(os.path.expandvars(os.path.expanduser(path)))


def _absolute(path: str) -> str:
    return os.path.join(os.path.expanduser("~"), path)


def _problem(path: str) -> str:
    """Why a process of this user cannot start in ``path``, in the system's words; "" where it can."""
    here = os.open(".", os.O_PATH)
    try:
        # Only chdir(2) itself tells: access(2) does not know what a file server decides.
        os.chdir(path)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", "") or str(error)
    else:
        os.fchdir(here)
    finally:
        os.close(here)
    return ""


def _lacks(path: str, problem: str) -> str:
    shown = path if len(path) <= MAX_QUOTED else path[:MAX_QUOTED] + "…"
    return f"node {socket.gethostname()} cannot start it in {shown!r} ({problem})"
