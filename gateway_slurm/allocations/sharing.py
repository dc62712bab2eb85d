"""Whether a kernel may join an existing allocation, and which one: pure functions that explain their choice.

A request with ``share`` joins only an allocation of the same user, in the same partition, account, reservation, QOS
and constraint, with at least the requested resources and enough time left. Of those that fit, the one with the least
to spare is taken, and of equals the one with the lowest job id, so that the choice is always the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway_slurm.allocations.identity import identity_of
from gateway_slurm.errors import RequestError, SlurmError, StoreError
from gateway_slurm.request import KernelRequest, parse_request
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.formats import Meaning, memory_in_mebibytes
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.store import AllocationRecord, Registry, ServerAllocation, by_job
from gateway_slurm.store.keep_flags import KeepFlag

# An allocation is older than the request that would join it, so it never has the whole time left.
TIME_FRACTION = 0.5


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What an allocation has: the request that it was made for, the time left, the number of kernels in it."""

    jobid: str
    request: KernelRequest
    account: str
    seconds_left: float | None
    """None means no limit."""
    kernels: int


def misfit(request: KernelRequest, account: str, offer: Offer) -> str:
    """Why ``offer`` does not fit, in a few words; empty where it does."""
    theirs = offer.request
    for name in ("partition", "reservation", "qos", "constraint"):
        asked, offered = getattr(request, name), getattr(theirs, name)
        if asked != offered:
            return f"{name} is {offered}, not {asked}"
    if account != offer.account:
        return f"account is {offer.account}, not {account}"
    for name, asked, offered in _amounts(request, theirs):
        if asked > offered:
            return f"{name}: {offered} of {asked}"
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
    """The best fit, or None; and lines that explain the choice."""
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
    """What the offer has to spare, scarce things first: GPUs, nodes, CPUs, memory, then kernels in it and time."""
    nodes, gpus, cpus, memory = (offered - asked for _name, asked, offered in _amounts(request, offer.request))
    left = float("inf") if offer.seconds_left is None else offer.seconds_left
    return gpus, nodes, cpus, memory, offer.kernels, left, int(offer.jobid)


# -- Allocations of the same owner that other servers have --


@dataclass(frozen=True)
class ForeignAllocations:
    """Finds them on record. ``owner`` is the name in records, ``user`` the one in Slurm."""

    driver: SlurmDriver
    registry: Registry
    owner: str
    user: str
    log: logging.Logger

    async def offers(self, own: Iterable[str]) -> dict[str, tuple[Offer, JobInfo]]:
        """Their offers by job id, without this server's ``own`` jobs; one squeue at most, and none without records."""
        try:
            found, flags = await asyncio.to_thread(self._on_record)
        except StoreError as error:
            self.log.info("share: other servers' jobs are not joined, since they cannot be read: %s", error)
            return {}
        taken = set(own)
        # A job may have several records: an earlier job had the same id, or another server joined it.
        records = [
            record
            for server, record in found
            if record.jobid and record.jobid not in taken and record.ours and record.owner == self.owner
            # Without its server a job is about to end, unless it is kept.
            if not server.is_gone or (record.jobid, record.identity) in flags
        ]
        try:
            jobs = await self.driver.jobs(sorted({record.jobid or "" for record in records}))
        except SlurmError as error:
            self.log.info("share: other servers' jobs are not joined, since Slurm does not confirm them: %s", error)
            return {}
        kernels = {jobid: len(record.kernel_ids) for jobid, (_server, record) in by_job(found).items()}
        reasons = [(record, self._unconfirmed(record, jobs)) for record in records]
        confirmed = {record.jobid or "": record for record, reason in reasons if not reason}
        for record, reason in reasons:
            if record.jobid not in confirmed:
                self.log.info("share: job %s of another server is not joined: %s", record.jobid, reason)
        return {
            jobid: (_offer(record, jobs[jobid], kernels.get(jobid, 0)), jobs[jobid])
            for jobid, record in sorted(confirmed.items())
        }

    def _on_record(self) -> tuple[list[ServerAllocation], frozenset[KeepFlag]]:
        try:
            flags = self.registry.keep_flags.all()
        except OSError:
            flags = frozenset()
        return self.registry.all_allocations(), flags

    def _unconfirmed(self, record: AllocationRecord, jobs: Mapping[str, JobInfo]) -> str:
        """Why the record is not trusted; empty where Slurm confirms it."""
        info = jobs.get(record.jobid or "")
        if info is None:
            return "Slurm does not know it"
        if info.user != self.user or identity_of(info) != record.identity:
            return "the job with that id is another one"
        if info.meaning not in (Meaning.USABLE, Meaning.WAITING):
            return f"it is {info.state}"
        try:
            parse_request(record.config)
        except RequestError as error:
            return f"the request that it was made for is not known: {error}"
        return ""


def _offer(record: AllocationRecord, info: JobInfo, kernels: int) -> Offer:
    left = None if info.time_limit is None else 60.0 * info.time_limit
    if info.meaning is Meaning.USABLE and info.end_time:
        left = info.end_time - time.time()
    return Offer(
        jobid=info.jobid,
        request=parse_request(record.config),
        account=record.account,
        seconds_left=left,
        kernels=kernels,
    )
