"""What a kernel is started with: made by the provisioner, settled for a way, kept on record."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class KernelLaunch:
    """What a kernel is started with; the same on every node and through every link."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(repr=False)
    cwd: str | None
    # Goes into the connection file on the node: key, signature scheme, kernel name, Curve keys.
    connection: dict[str, str] = field(repr=False)
    mode: str  # direct | ipc (tunnel); auto until it is settled (dialling.py)
    language: str
    start_timeout: float
    port_range: tuple[int, int] | None
    log_dir: str
    why: str = ""  # why it is this mode, and what that costs

    def direct(self, why: str) -> KernelLaunch:
        """The same by TCP with CurveZMQ."""
        return replace(self, mode="direct", why=why)

    def tunnelled(self, why: str) -> KernelLaunch:
        """The same through the tunnel, whose ends are no CurveZMQ sockets."""
        connection = {name: value for name, value in self.connection.items() if not name.startswith("curve_")}
        return replace(self, mode="ipc", why=why, connection=connection)

    def as_json(self) -> dict[str, Any]:
        """For the record; it holds secrets."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> KernelLaunch:
        """From a record that any version wrote: raises TypeError or KeyError where it lacks what is needed."""
        known = {name: fields[name] for name in cls.__dataclass_fields__ if name != "why"}
        ports = known["port_range"]
        known |= {"argv": tuple(known["argv"]), "port_range": tuple(ports) if ports else None}
        return cls(**known, why=str(fields.get("why", "")))


# -- Where a kernel is in its life, and what may follow what. --


class Phase(enum.Enum):
    """Where a kernel is between its start and its end."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    LOST = "lost"  # no link to its launcher, or none yet: nothing is known, recovery is tried
    DEAD = "dead"


# The one table of what may follow what; anything else is a fault of ours and raises.
TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    # LOST: started by an earlier server process, and its launcher has not been heard of yet.
    Phase.NEW: frozenset({Phase.STARTING, Phase.LOST, Phase.DEAD}),
    Phase.STARTING: frozenset({Phase.RUNNING, Phase.DEAD}),
    Phase.RUNNING: frozenset({Phase.LOST, Phase.DEAD}),
    Phase.LOST: frozenset({Phase.RUNNING, Phase.DEAD}),
    Phase.DEAD: frozenset({Phase.STARTING}),
}
