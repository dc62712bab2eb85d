"""Slurm's releases say and do some things in different ways: where tests look at these, one table of them.

docs/admins/versions.md tells which of them a user may notice.
"""

from __future__ import annotations

from typing import Final

from gateway_slurm.testing.packages import slurm_version

# Each release from which it is so, the oldest first.
_TABLE: Final[dict[str, dict[tuple[int, int], str]]] = {
    "a step with more GPUs than its job": {
        (22, 5): "gres_per_node=gpu:2 is more than the job's",
        (24, 11): "Invalid generic resource (gres) specification",
    },
    "a job with more nodes than there are": {(22, 5): "waits", (24, 11): "refused", (26, 5): "waits"},
    "scontrol's TresPerNode of one GPU": {(22, 5): "gres:gpu:1", (24, 11): "gres/gpu:1"},
    # slurmrestd of 22.05 has no word for it; ours are then for either cause.
    "a token that has expired": {
        (22, 5): "token has expired or is not valid",
        (24, 11): "refuses root's token",
    },
}


def slurm_says(what: str) -> str:
    """What the Slurm that runs the tests says or does."""
    release = slurm_version()
    return [said for since, said in _TABLE[what].items() if since <= release][-1]
