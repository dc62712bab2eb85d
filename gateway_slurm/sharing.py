"""Whether a kernel may join an allocation that is there, and which of several: pure, and explained.

A request with ``share`` joins only an allocation of the same user's, in the same partition, account,
reservation, QOS and constraint, with at least the resources asked for and enough time left. Of
those that fit, the one with the least to spare is taken; equals are told apart by their job id, so
that the same question always has the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gateway_slurm.request import KernelRequest, memory_in_mebibytes

# An allocation is older than the request that would join it, so it never has the whole time left.
TIME_FRACTION = 0.5


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What an allocation has: the request that it was made for, what is left of it, who is in it."""

    jobid: str
    request: KernelRequest
    account: str
    seconds_left: float | None
    """None is no limit."""
    kernels: int


def misfit(request: KernelRequest, account: str, offer: Offer) -> str:
    """Why ``offer`` does not fit, in a few words; empty where it does."""
    theirs = offer.request
    for name in ("partition", "reservation", "qos", "constraint"):
        asked, there = getattr(request, name), getattr(theirs, name)
        if asked != there:
            return f"{name} is {there}, not {asked}"
    if account != offer.account:
        return f"account is {offer.account}, not {account}"
    for name, asked, there in _amounts(request, theirs):
        if asked > there:
            return f"{name}: {there} of {asked}"
    missing = set(request.gres_list) - set(theirs.gres_list) - {f"gpu:{request.gpus}"}
    if missing:
        return f"no {', '.join(sorted(missing))}"
    return _too_short(request, offer.seconds_left)


def _amounts(request: KernelRequest, theirs: KernelRequest) -> Iterable[tuple[str, int, int]]:
    for name in ("nodes", "gpus", "cpus"):
        yield name, getattr(request, name) or 0, getattr(theirs, name) or 0
    yield "memory (MiB)", memory_in_mebibytes(request.memory), memory_in_mebibytes(theirs.memory)


def _too_short(request: KernelRequest, seconds_left: float | None) -> str:
    minutes = request.minutes
    if seconds_left is None or (minutes is not None and seconds_left >= 60 * minutes * TIME_FRACTION):
        return ""
    asked = "no limit" if minutes is None else f"{minutes} min"
    return f"{seconds_left / 60:.0f} min left, {asked} asked for"


def choose(request: KernelRequest, account: str, offers: Iterable[Offer]) -> tuple[Offer | None, list[str]]:
    """The best fit, or None; and for each offer a line that says why it was taken or not."""
    fitting: list[Offer] = []
    lines: list[str] = []
    for offer in offers:
        reason = misfit(request, account, offer)
        if reason:
            lines.append(f"job {offer.jobid} does not fit: {reason}")
        else:
            fitting.append(offer)
    if not fitting:
        return None, lines
    best = min(fitting, key=lambda offer: _to_spare(request, offer))
    lines.append(f"job {best.jobid} fits best of {len(fitting)}")
    return best, lines


def _to_spare(request: KernelRequest, offer: Offer) -> tuple[object, ...]:
    """Scarce things first: GPUs, nodes, CPUs, memory, then the crowd in it and its time."""
    nodes, gpus, cpus, memory = (there - asked for _name, asked, there in _amounts(request, offer.request))
    left = float("inf") if offer.seconds_left is None else offer.seconds_left
    return gpus, nodes, cpus, memory, offer.kernels, left, int(offer.jobid)
