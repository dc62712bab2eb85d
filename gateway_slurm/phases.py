"""Where a kernel is in its life, and what may follow what."""

from __future__ import annotations

import enum


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
