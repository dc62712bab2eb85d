"""The data of a kernel's start, as the provisioner makes it and the store records it, and the phases of its life."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class KernelLaunch:
    """All that a kernel is started with; the same on every node."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(repr=False)
    cwd: str | None  # the client's: a hint
    # For the connection file on the node: key, signature scheme, kernel name, Curve keys.
    connection: dict[str, str] = field(repr=False)
    mode: str  # direct | ipc (tunnel); auto until the transport is selected (transport.py)
    language: str
    start_timeout: float
    port_range: tuple[int, int] | None
    log_dir: str
    umask: int = 0o022  # the kernels of a record without one had environment.DEFAULT_UMASK
    why: str = ""  # why it is this mode, and what that costs
    directory: str | None = None  # the kernelspec's or the admin's: no other is taken
    default_directory: str | None = None  # where the node does not have ``cwd``

    def direct(self, why: str) -> KernelLaunch:
        """The same launch by TCP with CurveZMQ."""
        return replace(self, mode="direct", why=why)

    def tunnelled(self, why: str) -> KernelLaunch:
        """The same launch through the tunnel, whose ends are not CurveZMQ sockets."""
        connection = {name: value for name, value in self.connection.items() if not name.startswith("curve_")}
        return replace(self, mode="ipc", why=why, connection=connection)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> KernelLaunch:
        """The launch on record. Raises TypeError or KeyError for a record that lacks a field."""
        known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        ports = known["port_range"]
        known |= {"argv": tuple(known["argv"]), "port_range": tuple(ports) if ports else None}
        return cls(**known)


class Phase(enum.Enum):
    """Where a kernel is between its start and its end."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    LOST = "lost"  # its launcher has no link: the kernel may live, and the launcher may dial again
    EXITED = "exited"  # its process has ended; whether its job ends with it is not known yet
    DEAD = "dead"


# The phases that may follow each phase; any other transition is a bug and raises.
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    # LOST after NEW: an earlier server started the kernel, and its launcher has not dialled this one yet.
    Phase.NEW: frozenset({Phase.STARTING, Phase.LOST, Phase.DEAD}),
    Phase.STARTING: frozenset({Phase.RUNNING, Phase.DEAD}),
    Phase.RUNNING: frozenset({Phase.LOST, Phase.EXITED, Phase.DEAD}),
    Phase.LOST: frozenset({Phase.RUNNING, Phase.EXITED, Phase.DEAD}),
    Phase.EXITED: frozenset({Phase.DEAD}),
    Phase.DEAD: frozenset({Phase.STARTING}),
}
