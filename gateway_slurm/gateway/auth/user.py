"""The user of a request, and the user who owns a kernel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from jupyter_server.auth import User

from gateway_slurm.errors import NotAllowed, RequestError

NAMES: Final = "1 to 64 letters, digits and _ . @ -, beginning with a letter, a digit or _, and not digits alone"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}", re.ASCII)


@dataclass
class GatewayUser(User):
    """The user of a request. An authenticator has checked ``username``."""

    admin: bool = False
    """May see and end all users' kernels."""
    service: bool = False
    """Is a program, such as a Jupyter server for many users, that names the user of each request."""


def can_see(user: Any, owner: str, maker: str) -> bool:
    """Whether the user may see a kernel or session: as its owner, as an admin, or as the service that made it."""
    return bool(user.admin) or user.username == owner or (user.service and user.username == maker)


def is_name(text: object) -> bool:
    """Whether ``text`` can be a user's name here. The name becomes part of argv, paths and records.

    Digits alone are refused: tools that accept a name take a number for a uid.
    """
    return isinstance(text, str) and bool(_NAME.fullmatch(text)) and not text.isdigit()


def kernel_owner(user: GatewayUser, env: Mapping[str, str]) -> str:
    """The name of the user who owns a new kernel: the client's ``KERNEL_USERNAME``, or else the user's own name.

    Only services may name another user. Raises NotAllowed for any other client that does, and RequestError for a
    value that is not a user's name.
    """
    name = env.get("KERNEL_USERNAME") or user.username
    if not is_name(name):
        message = f"KERNEL_USERNAME={repr(name)[:200]} is not a user's name; allowed are {NAMES}"
        raise RequestError(message, field="KERNEL_USERNAME")
    if name != user.username and not user.service:
        raise NotAllowed(
            f"KERNEL_USERNAME={name!r}: you are {user.username!r} and may start kernels for yourself only. "
            "Leave the variable out; a server for many users needs a service's token",
            field="KERNEL_USERNAME",
        )
    return name
