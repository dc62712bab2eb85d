"""Who uses the gateway, and for whom a kernel is started."""

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
    """Whoever a request comes from; ``username`` has been checked by one of the ways to know users."""

    admin: bool = False
    """May see and end everybody's kernels."""
    service: bool = False
    """Is a program, such as a Jupyter server for many users, that says for whom it asks."""


def can_see(user: Any, owner: str, maker: str) -> bool:
    """Whether a kernel or session is the user's to see: an owner's, an admin's, or the service's that made it."""
    return bool(user.admin) or user.username == owner or (user.service and user.username == maker)


def is_name(text: object) -> bool:
    """Whether ``text`` can be a user's name here: it ends up in argv, paths and records.

    Digits alone are refused, because tools that take a name take a number for a uid.
    """
    return isinstance(text, str) and bool(_NAME.fullmatch(text)) and not text.isdigit()


def kernel_owner(user: GatewayUser, env: Mapping[str, str]) -> str:
    """The name of the user whom a kernel belongs to, from the client's ``KERNEL_USERNAME``.

    It is believed from services only. Raises NotAllowed when anybody else names another user than
    themselves, and RequestError for what is no user's name.
    """
    name = env.get("KERNEL_USERNAME") or user.username
    if not is_name(name):
        shown = repr(name)[:200]
        raise RequestError(f"KERNEL_USERNAME={shown} is no user's name; allowed are {NAMES}", field="KERNEL_USERNAME")
    if name != user.username and not user.service:
        raise NotAllowed(
            f"KERNEL_USERNAME={name!r}: you are {user.username!r} and may start kernels for yourself only. "
            "Leave the variable out; a server for many users needs a service's token",
            field="KERNEL_USERNAME",
        )
    return name
