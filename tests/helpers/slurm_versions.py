"""A table of the differences between Slurm releases that tests depend on.

docs/admins/versions.md explains those that a user may notice.
"""

from __future__ import annotations

from typing import Final

from gateway_slurm.testing.packages import slurm_version

# The behaviour from each release on, the oldest first.
_TABLE: Final[dict[str, dict[tuple[int, int], str]]] = {
    "a step with more GPUs than its job": {
        (22, 5): "gres_per_node=gpu:2 is more than the job's",
        (24, 11): "Invalid generic resource (gres) specification",
    },
    "a job with more nodes than there are": {(22, 5): "waits", (24, 11): "refused", (26, 5): "waits"},
    "scontrol's TresPerNode of one GPU": {(22, 5): "gres:gpu:1", (24, 11): "gres/gpu:1"},
    # slurmrestd of 22.05 does not report the cause, so this package's message names both causes.
    "a token that has expired": {
        (22, 5): "token has expired or is not valid",
        (24, 11): "refuses root's token",
    },
}


def slurm_says(what: str) -> str:
    """The behaviour of the installed Slurm release."""
    release = slurm_version()
    return [behaviour for since, behaviour in _TABLE[what].items() if since <= release][-1]
