"""The user of a request, and the user who owns a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jupyter_server.auth import User

from gateway_slurm._util import USER_NAMES, is_user_name
from gateway_slurm.errors import NotAllowed, RequestError


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


def kernel_owner(user: GatewayUser, env: Mapping[str, str]) -> str:
    """The name of the user who owns a new kernel: the client's ``KERNEL_USERNAME``, or else the user's own name.

    Only services may name another user. Raises NotAllowed for any other client that does, and RequestError for a
    value that is not a user's name.
    """
    name = env.get("KERNEL_USERNAME") or user.username
    if not is_user_name(name):
        message = f"KERNEL_USERNAME={repr(name)[:200]} is not a user's name; allowed are {USER_NAMES}"
        raise RequestError(message, field="KERNEL_USERNAME")
    if name != user.username and not user.service:
        raise NotAllowed(
            f"KERNEL_USERNAME={name!r}: you are {user.username!r} and may start kernels for yourself only. "
            "Leave the variable out; a server for many users needs a service's token",
            field="KERNEL_USERNAME",
        )
    return name
