"""Jobs that a dead server left: found by its records and by their names, and dealt with by a later server."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gateway_slurm._util import Backoff, LogOnce
from gateway_slurm.allocations.identity import COMMENT, identity_of, is_of_store, is_ours
from gateway_slurm.allocations.use import use_without_server
from gateway_slurm.errors import SlurmError, StepsUnknown, StoreError
from gateway_slurm.slurm.driver import SlurmJobs
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.store import LEASE_SECONDS, AllocationRecord, Registry, ServerAllocation, ServerRecord, this_process
from gateway_slurm.store.keep_flags import KeepFlag

# A record without a job id is an intent. For so long after its server's death the job of an sbatch may still appear;
# and the first pause between two looks for it.
INTENT_TIMEOUT, INTENT_RETRY_DELAY = 60.0, 1.0
# Launchers may wait for a server indefinitely (settings: orphan_timeout, 0). Their jobs get this grace.
NO_TIMEOUT_GRACE = 900.0
# Before the first look for orphans: a server that has just started takes its deployment's jobs over, and recovers.
FIRST_LOOK_DELAY = 2 * LEASE_SECONDS
# Between looks for orphans while Slurm or the store does not answer.
ORPHAN_RETRY_DELAY = 60.0


async def living_jobs(driver: SlurmJobs, jobids: Iterable[str]) -> dict[str, JobInfo]:
    """The user's jobs that servers have submitted, and those with these ids, that are not over; at most two squeues."""
    ours = await driver.find(COMMENT)
    others = await driver.jobs(sorted(set(jobids) - set(ours)))
    return {jobid: info for jobid, info in {**ours, **others}.items() if info.meaning is not Meaning.OVER}


# -- Recovery, when a server starts --


async def recover(registry: Registry, driver: SlurmJobs, log: logging.Logger, *, deployment: str = "") -> list[str]:
    """Cancel jobs of dead servers in which no kernel ever ran; return their ids.

    If the launcher had come up, the job is left to it: the launcher ends its kernels and the job after its
    ``orphan_timeout``, so that their results until then are not lost. The record stays until the job is over. For an
    intent, the job is looked for again for INTENT_TIMEOUT. Keep flags go with their jobs. Slurm is not asked where
    there is nothing to recover, and nothing is forgotten while Slurm cannot be asked. Records of servers of
    ``deployment`` are left alone, since they are taken over.
    """
    recovery = _Recovery(registry, driver, log, deployment)
    loop = asyncio.get_running_loop()
    deadline, backoff = loop.time() + INTENT_TIMEOUT, Backoff(INTENT_RETRY_DELAY, INTENT_TIMEOUT)
    while True:
        last = loop.time() >= deadline
        if not await recovery.look(last=last) or last:
            return recovery.cancelled
        await asyncio.sleep(min(backoff.next(), max(0.0, deadline - loop.time())))


class _Recovery:
    def __init__(self, registry: Registry, driver: SlurmJobs, log: logging.Logger, deployment: str) -> None:
        self._registry, self._driver, self.log, self._deployment = registry, driver, log, deployment
        self._complaints = LogOnce(log)
        self.cancelled: list[str] = []

    async def look(self, *, last: bool) -> bool:
        """Deal with all records and flags; return whether there is reason to look again."""
        settled: list[ServerAllocation] = []
        waits = False
        try:
            # Before Slurm is asked: a flag that is set meanwhile may be of a job that Slurm's answer lacks.
            flags = await asyncio.to_thread(self._registry.keep_flags.all)
            found = await asyncio.to_thread(self._registry.orphans)
            orphans = [pair for pair in found if not self._deployment or pair[0].deployment != self._deployment]
            if not orphans and not flags:
                return False
            used = await asyncio.to_thread(self._registry.used_jobs)
            jobids = {record.jobid for _server, record in orphans if record.jobid} | {jobid for jobid, _other in flags}
            jobs = await living_jobs(self._driver, jobids)
            for server, record in orphans:
                info = _job_of(record, jobs)
                if info is None and record.jobid is None and not last:
                    waits = True  # the job of an intent may still appear
                elif info is None or (info.jobid not in used and await self._settle(record, info, flags)):
                    settled.append((server, record))
            await asyncio.to_thread(self._registry.drop, settled)
        except (SlurmError, StoreError, OSError) as error:
            self._complaints.warning("", "jobs that an earlier server may have left could not be looked for: %s", error)
            return True
        living = {(jobid, identity_of(info)) for jobid, info in jobs.items()}
        for flag in flags - living:
            self._registry.keep_flags.remove(*flag)
        return waits

    async def _settle(self, record: AllocationRecord, info: JobInfo, flags: frozenset[KeepFlag]) -> bool:
        """Deal with one job; return whether its record can be dropped."""
        flag = (info.jobid, identity_of(info))
        unflagged = record.keep and record.jobid is None
        if unflagged:
            self._registry.keep_flags.set(*flag)  # its server died before it could
        if not record.ours or unflagged or flag in flags:
            return False
        never_ran = record.state in ("", "PENDING")
        if not never_ran or (info.meaning is not Meaning.USABLE and not info.is_waiting):
            kernels = ", ".join(record.kernel_ids) or "none"
            text = "job %s belongs to a dead server; its launcher will end it (kernels: %s)"
            self._complaints.warning(info.jobid, text, info.jobid, kernels)
            return False
        await self._driver.cancel(info.jobid)
        self.cancelled.append(info.jobid)
        self.log.warning("job %s, which a dead server had left in the queue, was cancelled", info.jobid)
        return True


def _job_of(record: AllocationRecord, jobs: dict[str, JobInfo]) -> JobInfo | None:
    """The job of a record: by its comment, or by the id of an adopted job; never another job with that id."""
    if record.ours:
        return next((info for info in jobs.values() if identity_of(info) == record.launcher_id), None)
    info = jobs.get(record.jobid or "")
    return info if info is not None and identity_of(info) == record.identity else None


# -- Orphans: jobs of ours that no server has --


@dataclass(frozen=True, kw_only=True)
class Orphan:
    """A live job that no live server has."""

    info: JobInfo
    server: ServerRecord | None = None
    """The last server that had it; None where the store has no record of the job."""
    record: AllocationRecord | None = None
    since: float
    """Since when no server has it, as far as is known; seconds since the epoch."""
    kept: bool = False
    foreign: bool = False
    """Whether it belongs to another store, so that nothing is known of it here."""
    due: float
    """When it may be cancelled, in seconds since the epoch; a server may take it over until then."""

    @property
    def jobid(self) -> str:
        return self.info.jobid

    @property
    def what(self) -> str:
        """The orphan in words, for messages."""
        if self.foreign:
            return f"job {self.jobid} belongs to a server of another store, perhaps on another host"
        if self.record is None:
            return f"job {self.jobid} was submitted by a server of this store, which has no record of the job"
        kernels = len(self.record.kernel_ids)
        unreachable = f"; its kernels ({kernels}) are out of reach" if kernels else ""
        return f"job {self.jobid} belongs to a dead server{unreachable}"

    def why_left(self, now: float) -> str:
        """Why it must not be cancelled now; empty where it may be, if no other step runs in it."""
        if self.foreign:
            return "a server of that store may have it"
        if self.kept:
            return f"it must be kept; to end it: jupyter slurm allocations cancel {self.jobid}"
        if now < self.due:
            clock = time.strftime("%H:%M:%S", time.localtime(self.due))
            return f"a server may take it over until {clock}; after that its launcher ends it"
        return ""


def find_orphans(
    jobs: Mapping[str, JobInfo],
    found: Iterable[ServerAllocation],
    flags: frozenset[KeepFlag],
    *,
    store_id: str,
    orphan_timeout: float,
    now: float | None = None,
    seen: dict[str, float] | None = None,
) -> list[Orphan]:
    """Return the user's ``jobs`` that no live server has; ``found`` are all records of the store, dead servers' too.

    The time of death of a server without a lease is not known: ``seen`` remembers when it was first found dead, by
    the job's identity.
    """
    seen = {} if seen is None else seen
    now = time.time() if now is None else now
    grace = orphan_timeout or NO_TIMEOUT_GRACE
    by_identity: dict[str, list[ServerAllocation]] = {}
    for server, record in found:
        by_identity.setdefault(record.identity or record.launcher_id, []).append((server, record))
    orphans = []
    for info in jobs.values():
        identity = identity_of(info)
        known = by_identity.get(identity, [])
        if not is_ours(info) or info.meaning is Meaning.OVER:
            continue
        if any(not is_gone(server, now, grace) for server, _record in known):
            continue
        # The server that submitted the job knows the most of it; else the last one.
        last, latest = max(known, key=lambda pair: (pair[1].ours, pair[0].lease_until), default=(None, None))
        since = info.submit_time or now if last is None else last.lease_until
        if since >= now:
            since = seen.setdefault(identity, now)
        orphans.append(
            Orphan(
                info=info,
                server=last,
                record=latest,
                since=since,
                kept=(info.jobid, identity) in flags,
                foreign=latest is None and not is_of_store(identity, store_id),
                due=since + grace,
            )
        )
    return sorted(orphans, key=lambda orphan: int(orphan.jobid))


def is_gone(server: ServerRecord, now: float, grace: float) -> bool:
    """Whether a server is dead, and not only late with its lease, as a suspended one is."""
    if server.ended or server.process.is_dead:
        return True
    return server.process.host != this_process().host and now > server.lease_until + grace


async def cancel_orphan(driver: SlurmJobs, registry: Registry, orphan: Orphan) -> str:
    """End its job and drop its record, unless another step runs in the job.

    Return why it was left, or an empty text. Raises SlurmError or StoreError.
    """
    try:
        if orphan.info.meaning is Meaning.USABLE:
            use, what = await use_without_server(driver, orphan.jobid, identity_of(orphan.info))
            if use is not None:
                return use.in_words(what)
    except StepsUnknown as error:
        return str(error)
    await driver.cancel(orphan.jobid)
    if orphan.server is not None and orphan.record is not None:
        await asyncio.to_thread(registry.drop, [(orphan.server, orphan.record)])
    return ""


async def watch_orphans(
    registry: Registry,
    driver: SlurmJobs,
    log: logging.Logger,
    *,
    policy: str,
    orphan_timeout: float,
    pause: Callable[[float], float] = lambda seconds: seconds,
) -> None:
    """Look for orphans once, and again when the youngest can be judged. The caller owns the task.

    ``policy`` is what is done with each (settings: ``orphan_jobs``), ``leave`` or ``cancel``. ``orphan_timeout`` is in
    seconds. ``pause`` maps the seconds to wait to those that are waited.
    """
    seen: dict[str, float] = {}
    complaints = LogOnce(log)
    await asyncio.sleep(pause(FIRST_LOOK_DELAY))
    while True:
        due = []  # when to look at an orphan again
        try:
            # Slurm first: a job is on record before it is submitted, so no job in Slurm's answer can lack its record.
            jobs = await driver.find(COMMENT)
            if not jobs:
                return
            flags = await asyncio.to_thread(registry.keep_flags.all)
            found = await asyncio.to_thread(registry.all_allocations)
            store_id = registry.store_id
            orphans = find_orphans(jobs, found, flags, store_id=store_id, orphan_timeout=orphan_timeout, seen=seen)
            for orphan in orphans:
                if orphan.foreign or orphan.kept:
                    continue
                if time.time() < orphan.due:
                    due.append(orphan.due)
                    continue
                why = "SlurmService.orphan_jobs is leave; see: jupyter slurm doctor"
                if policy == "cancel":
                    why = await cancel_orphan(driver, registry, orphan)
                if why:
                    complaints.warning(orphan.jobid, "%s; it is left: %s", orphan.what, why)
                else:
                    log.warning("%s; it was cancelled (SlurmService.orphan_jobs)", orphan.what)
        except (SlurmError, StoreError, OSError) as error:
            complaints.warning("", "jobs without a server could not be looked for: %s", error)
            due = [time.time() + ORPHAN_RETRY_DELAY]
        if not due:
            return
        now = time.time()
        await asyncio.sleep(pause(max(1.0, *(moment - now for moment in due))))
