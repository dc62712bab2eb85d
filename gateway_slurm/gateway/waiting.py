"""What a user reads about a start that waits for Slurm: in the kernel's model, and under the cell that waits."""

from __future__ import annotations

import time

from gateway_slurm.allocations.owners import QueuedStart

STARTING = "The kernel is starting."
GIVE_UP = "Interrupt the kernel to give it up."


def waiting_text(waiting: QueuedStart, now: float | None = None) -> str:
    """One sentence: job, partition, Slurm's reason, the place in the queue, the expected start, and what to do."""
    text = f"Waiting for {_job(waiting)}"
    if waiting.reason not in ("", "None"):
        text += f" ({waiting.reason})"
    known = []
    if waiting.queue_place:
        known.append(f"number {waiting.queue_place} in the queue")
    if waiting.expected_start:
        known.append(f"expected {_clock(waiting.expected_start, time.time() if now is None else now)}")
    text += f"{': ' if known else ''}{', '.join(known)}"
    return f"{text}; {waiting.advice}." if waiting.advice else f"{text}."


def given_up_text(waiting: QueuedStart | None) -> str:
    """Why a kernel is dead whose start a user has interrupted."""
    where = "" if waiting is None else f" while it waited for {_job(waiting)}"
    return f"The start of this kernel was given up by an interrupt{where}. Start the kernel again to ask for a new job."


def _job(waiting: QueuedStart) -> str:
    return f"job {waiting.jobid}" + (f" in partition {waiting.partition}" if waiting.partition else "")


def _clock(moment: float, now: float) -> str:
    """The server's local time, with its zone: the user's may be another. With the date on any other day."""
    at, today = time.localtime(moment), time.localtime(now)
    same_day = (at.tm_year, at.tm_yday) == (today.tm_year, today.tm_yday)
    return time.strftime("at %H:%M %Z" if same_day else "on %Y-%m-%d at %H:%M %Z", at)
