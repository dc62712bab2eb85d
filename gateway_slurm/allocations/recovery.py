"""What a server that died has left: found by its records, and dealt with by the next one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gateway_slurm._util import printable
from gateway_slurm.allocations.identity import JOB_NAME, STEP_NAME, identity_of, is_of_store
from gateway_slurm.config import ServiceSettings
from gateway_slurm.errors import SlurmError, StepsUnknown, StoreError
from gateway_slurm.slurm.driver import SlurmJobs
from gateway_slurm.slurm.formats import Meaning
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.store import LEASE_SECONDS, AllocationRecord, Found, Registry, ServerRecord, this_process
from gateway_slurm.store.marks import Mark

# An sbatch that a dead server had under way may still go on, and its job be there a moment later.
INTENT_SECONDS = 60.0
FIRST_PAUSE = 1.0


async def living_jobs(driver: SlurmJobs, jobids: Iterable[str]) -> dict[str, JobInfo]:
    """The user's jobs that servers have submitted, and those with these ids, that are not over; at most two squeues."""
    ours = await driver.find(JOB_NAME)
    others = await driver.jobs(sorted(set(jobids) - set(ours)))
    return {jobid: info for jobid, info in {**ours, **others}.items() if info.meaning is not Meaning.OVER}


async def recover(registry: Registry, driver: SlurmJobs, log: logging.Logger, *, deployment: str = "") -> list[str]:
    """Cancel jobs of dead servers in which no kernel ever was; return their ids.

    One whose launcher had come up is left to it: it ends its kernels and the job after its
    ``orphan_timeout``, and what they compute until then is not lost. Its record stays until the job is
    over. An intent whose job is not there yet is looked for again, for ``INTENT_SECONDS``. Marks to keep
    a job go when that job is over. Where there is nothing to recover Slurm is not asked. While Slurm
    cannot be asked nothing is forgotten. What servers of ``deployment`` left is taken over, and not looked at here.
    """
    return await _Recovery(registry, driver, log, deployment).run()


class _Recovery:
    def __init__(self, registry: Registry, driver: SlurmJobs, log: logging.Logger, deployment: str) -> None:
        self._registry, self._driver, self.log, self._deployment = registry, driver, log, deployment
        self._cancelled: list[str] = []
        self._told: set[str] = set()

    async def run(self) -> list[str]:
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + INTENT_SECONDS, FIRST_PAUSE
        while True:
            last = loop.time() >= deadline
            if not await self._look(last=last) or last:
                return self._cancelled
            await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
            pause *= 2

    async def _look(self, *, last: bool) -> bool:
        """Deal with all that is there; return whether there is reason to look again."""
        try:
            orphans, marks = await asyncio.to_thread(self._found)
            if not orphans and not marks:
                return False
            used = await asyncio.to_thread(self._registry.used_jobs)
            jobids = {record.jobid for _server, record in orphans if record.jobid} | {jobid for jobid, _other in marks}
            jobs = await living_jobs(self._driver, jobids)
            served, waiting = await self._settle_all(orphans, jobs, marks, used)
            await asyncio.to_thread(self._registry.drop, served + (waiting if last else []))
        except (SlurmError, StoreError, OSError) as error:
            self._tell("", "jobs that an earlier server may have left could not be looked for: %s", error)
            return True
        living = {(jobid, identity_of(info)) for jobid, info in jobs.items()}
        for mark in marks - living:
            self._registry.marks.remove(*mark)
        return bool(waiting)

    def _found(self) -> tuple[list[Found], frozenset[Mark]]:
        # Before Slurm is asked: one that is set meanwhile may be of a job that its answer lacks.
        marks = self._registry.marks.all()
        orphans = self._registry.orphans()
        return [one for one in orphans if not self._deployment or one[0].deployment != self._deployment], marks

    async def _settle_all(
        self, orphans: list[Found], jobs: dict[str, JobInfo], marks: frozenset[Mark], used: set[str]
    ) -> tuple[list[Found], list[Found]]:
        """Return the records that have served, and the intents whose job may still come."""
        served: list[Found] = []
        waiting: list[Found] = []
        for server, record in orphans:
            info = _job_of(record, jobs)
            if info is not None and info.jobid not in used and await self._settle(record, info, marks):
                served.append((server, record))
            elif info is None:
                (waiting if record.jobid is None else served).append((server, record))
        return served, waiting

    async def _settle(self, record: AllocationRecord, info: JobInfo, marks: frozenset[Mark]) -> bool:
        """Deal with one job; return whether its record has served."""
        mark = (info.jobid, identity_of(info))
        unmarked = record.keep and record.jobid is None
        if unmarked:
            self._registry.marks.set(*mark)  # its server died before it could
        if not record.ours or unmarked or mark in marks:
            return False
        never_ran = record.state in ("", "PENDING")
        if not never_ran or info.meaning not in (Meaning.WAITING, Meaning.HELD, Meaning.USABLE):
            kernels = ", ".join(record.kernel_ids) or "none"
            words = "job %s is of a server that died; its launcher will end it (kernels: %s)"
            self._tell(info.jobid, words, info.jobid, kernels)
            return False
        await self._driver.cancel(info.jobid)
        self._cancelled.append(info.jobid)
        self.log.warning("job %s, which a server that died had left in the queue, was cancelled", info.jobid)
        return True

    def _tell(self, key: str, words: str, *arguments: object) -> None:
        """Once, however often it is looked at."""
        if key not in self._told:
            self._told.add(key)
            self.log.warning(words, *arguments)


def _job_of(record: AllocationRecord, jobs: dict[str, JobInfo]) -> JobInfo | None:
    """The job of ours with the record's comment, or the adopted one with its id; never another with that id."""
    if record.ours:
        return next((info for info in jobs.values() if identity_of(info) == record.launcher_id), None)
    info = jobs.get(record.jobid or "")
    return info if info is not None and identity_of(info) == record.identity else None


# -- Jobs of ours that have no server any more: found, and ended where that is the policy. --


# What launchers wait for a server where they may wait for ever (settings: orphan_timeout, 0): to be sure of the rest.
NEVER_GRACE = 900.0
# Between attempts while Slurm or the store does not answer.
RETRY_SECONDS = 60.0
# What the first look waits for: a server that has just started takes over what is its deployment's, and recovers.
FIRST_SECONDS = 2 * LEASE_SECONDS


@dataclass(frozen=True, kw_only=True)
class Orphan:
    """A job that lives and that no living server has."""

    info: JobInfo
    server: ServerRecord | None = None
    """The last that had it; None where no row of the store knows the job."""
    record: AllocationRecord | None = None
    since: float
    """Since when nobody has it, as far as is known; seconds since the epoch."""
    kept: bool = False
    foreign: bool = False
    """Another store's: nothing is known of it here."""
    due: float
    """From when on it may be cancelled; a server may come back for it until then."""

    @property
    def jobid(self) -> str:
        return self.info.jobid

    @property
    def what(self) -> str:
        """In words."""
        if self.foreign:
            return f"job {self.jobid} is of another store's server, on another host perhaps"
        if self.record is None:
            return f"job {self.jobid} was submitted by a server of this store, and no row of it knows the job"
        kernels = len(self.record.kernel_ids)
        reached = f"; nobody reaches its kernels ({kernels})" if kernels else ""
        return f"job {self.jobid} is of a server that is dead{reached}"

    def why_left(self, now: float) -> str:
        """Why it must not be cancelled now; empty where it may be, if nobody else works in it."""
        if self.foreign:
            return "a server of that store may have it"
        if self.kept:
            return f"it is to be kept; to end it: jupyter slurm allocations cancel {self.jobid}"
        if now < self.due:
            return f"until {_clock(self.due)} a server may come back for it, and then its launcher ends it"
        return ""

    def forget(self, registry: Registry) -> None:
        """Its job is cancelled: so much for its row. Blocking; raises StoreError."""
        if self.server is not None and self.record is not None:
            registry.drop([(self.server, self.record)])


def find_orphans(
    jobs: Mapping[str, JobInfo],
    found: Iterable[Found],
    marks: frozenset[Mark],
    *,
    store_id: str,
    orphan_timeout: float,
    now: float | None = None,
    seen: dict[str, float] | None = None,
) -> list[Orphan]:
    """Which of the user's ``jobs`` no living server has; ``found`` are all rows of the store, dead servers' too.

    When a server without a lease died is not known: ``seen`` remembers when that was seen first, by identity.
    """
    seen = {} if seen is None else seen
    now = time.time() if now is None else now
    grace = orphan_timeout or NEVER_GRACE
    rows: dict[str, list[Found]] = {}
    for one in found:
        rows.setdefault(one[1].identity or one[1].launcher_id, []).append(one)
    orphans = []
    for info in jobs.values():
        identity = identity_of(info)
        known = rows.get(identity, [])
        if info.name != JOB_NAME or info.meaning is Meaning.OVER:
            continue
        if any(not is_gone(server, now, grace) for server, _record in known):
            continue
        # The one that submitted it knows the most of it; else the last.
        server, record = max(known, key=lambda one: (one[1].ours, one[0].lease_until), default=(None, None))
        since = info.submit_time or now if server is None else server.lease_until
        if since >= now:
            since = seen.setdefault(identity, now)
        orphans.append(
            Orphan(
                info=info,
                server=server,
                record=record,
                since=since,
                kept=(info.jobid, identity) in marks,
                foreign=record is None and not is_of_store(identity, store_id),
                due=since + grace,
            )
        )
    return sorted(orphans, key=lambda orphan: int(orphan.jobid))


def is_gone(server: ServerRecord, now: float, grace: float) -> bool:
    """Whether a server is dead for good, and not only late with its lease, as one is that was suspended."""
    if server.ended or server.process.is_dead:
        return True
    return server.process.host != this_process().host and now > server.lease_until + grace


async def cancel_orphan(driver: SlurmJobs, orphan: Orphan) -> str:
    """End its job, unless somebody else works in it; why it was left, or nothing. Raises SlurmError."""
    try:
        steps = await driver.steps(orphan.jobid) if orphan.info.meaning is Meaning.USABLE else []
    except StepsUnknown as error:
        return str(error)
    others = [step for step in steps if step.number not in ("batch", "extern") and step.name != STEP_NAME]
    if others:
        return f"step {others[0].stepid} ({printable(others[0].name)}) runs in it"
    await driver.cancel(orphan.jobid)
    return ""


async def see_to_orphans(
    registry: Registry,
    driver: SlurmJobs,
    settings: ServiceSettings,
    log: logging.Logger,
    *,
    pause: Callable[[float], float] = lambda seconds: seconds,
) -> None:
    """Look for orphans once, and again when the youngest may be judged; ``orphan_jobs`` says what is done with each.

    ``pause`` maps what there is to wait to what is waited (seconds). Whoever calls this owns the task.
    """
    await _Policy(registry, driver, settings, log).run(pause)


class _Policy:
    def __init__(self, registry: Registry, driver: SlurmJobs, settings: ServiceSettings, log: logging.Logger) -> None:
        self._registry, self._driver, self._settings, self.log = registry, driver, settings, log
        self._seen: dict[str, float] = {}
        self._told: set[str] = set()

    async def run(self, pause: Callable[[float], float]) -> None:
        complained = False
        await asyncio.sleep(pause(FIRST_SECONDS))
        while True:
            try:
                due = [await self._settle(orphan) for orphan in await self._look()]
            except (SlurmError, StoreError, OSError) as error:
                if not complained:
                    self.log.warning("jobs without a server could not be looked for: %s", error)
                complained, due = True, [time.time() + RETRY_SECONDS]
            waits = [moment - time.time() for moment in due if moment]
            if not waits:
                return
            await asyncio.sleep(pause(max(1.0, *waits)))

    async def _look(self) -> list[Orphan]:
        # Slurm first: a row is there before its job is, so no job of its answer can lack one that is under way.
        jobs = await self._driver.find(JOB_NAME)
        if not jobs:
            return []
        marks = await asyncio.to_thread(self._registry.marks.all)
        found = await asyncio.to_thread(self._registry.all_records)
        timeout = self._settings.orphan_timeout
        return find_orphans(
            jobs, found, marks, store_id=self._registry.store_id, orphan_timeout=timeout, seen=self._seen
        )

    async def _settle(self, orphan: Orphan) -> float:
        """Deal with one; return when to look at it again, or 0 where there is nothing more to do."""
        now = time.time()
        if orphan.foreign or orphan.kept:
            return 0.0
        if now < orphan.due:
            return orphan.due
        why = "SlurmService.orphan_jobs is leave; see: jupyter slurm doctor"
        if self._settings.orphan_jobs == "cancel":
            why = await cancel_orphan(self._driver, orphan)
        if not why:
            await asyncio.to_thread(orphan.forget, self._registry)
            self.log.warning("%s; it was cancelled (SlurmService.orphan_jobs)", orphan.what)
        elif orphan.jobid not in self._told:
            self._told.add(orphan.jobid)
            self.log.warning("%s; it is left: %s", orphan.what, why)
        return 0.0


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))
