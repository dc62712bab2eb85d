"""What tells our jobs, steps and launchers from others."""

from __future__ import annotations

import re
import secrets

from gateway_slurm.slurm.model import JobInfo

TOKEN_VARIABLE = "GATEWAY_SLURM_TOKEN"  # noqa: S105 - a variable's name, not a token


# By these a later process, and an admin, know our jobs and steps.
JOB_NAME = "gateway_slurm"


STEP_NAME = "gateway_slurm-launcher"


# Of a store's id, in the ids of its launchers: a user has few stores.
STORE_DIGITS = 8


_LAUNCHER_ID = re.compile(rf"{JOB_NAME}:([A-Za-z0-9-]{{1,60}})", re.ASCII)


def identity_of(info: JobInfo) -> str:
    """What tells a job from others with its id: the launcher that a job of ours was made with, else when it was made.

    By the comment alone: its user may give the job another name. It is fit for a file's name.
    """
    ours = _LAUNCHER_ID.fullmatch(info.comment)
    return ours[1] if ours else f"{info.submit_time or 0:.0f}"


def new_launcher_id(store_id: str) -> str:
    """An id for a launcher, which says in which store its record is."""
    return "-".join(["gs", *filter(None, [store_id[:STORE_DIGITS]]), secrets.token_hex(8)])


def is_of_store(launcher_id: str, store_id: str) -> bool:
    """Whether a launcher's record is in this store, or was."""
    return bool(store_id) and launcher_id.startswith(f"gs-{store_id[:STORE_DIGITS]}-")
