"""The names and ids by which a later process, or an admin, recognises our jobs, job steps and launchers."""

from __future__ import annotations

import re
import secrets

from gateway_slurm.slurm.model import JobInfo

TOKEN_VARIABLE = "GATEWAY_SLURM_TOKEN"  # noqa: S105 - a variable's name, not a token
JOB_NAME = "gateway_slurm"
COMMENT = "gateway_slurm:"
"""What the comment of each job of ours begins with; its first launcher's id follows. Names of jobs are the admin's."""
STEP_NAME = "gateway_slurm-launcher"
# Digits of a store's id in the ids of its launchers. A user has few stores.
STORE_DIGITS = 8
_LAUNCHER_ID = re.compile(rf"{COMMENT}([A-Za-z0-9-]{{1,60}})", re.ASCII)


def identity_of(info: JobInfo) -> str:
    """What tells a job from others with its id: its first launcher's id for a job of ours, else its submit time.

    A job of ours is recognised by the comment alone, since its user may rename it. The text is fit for a file's name.
    """
    ours = _LAUNCHER_ID.fullmatch(info.comment)
    return ours[1] if ours else f"{info.submit_time or 0:.0f}"


def is_ours(info: JobInfo) -> bool:
    """Whether a server of this package submitted the job, by its comment."""
    return _LAUNCHER_ID.fullmatch(info.comment) is not None


def is_launcher_id(identity: str) -> bool:
    """Whether a job with this identity has one of our launchers as its script; else its identity is a submit time."""
    return not identity.isdecimal()


def new_launcher_id(store_id: str) -> str:
    """A new launcher id, which names the store that has the launcher's record."""
    return "-".join(["gs", *filter(None, [store_id[:STORE_DIGITS]]), secrets.token_hex(8)])


def is_of_store(launcher_id: str, store_id: str) -> bool:
    """Whether this store has, or had, the launcher's record."""
    return bool(store_id) and launcher_id.startswith(f"gs-{store_id[:STORE_DIGITS]}-")
