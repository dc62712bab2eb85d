"""Jobs of ours that have no server any more: found, told from those that have one, and ended where that is the policy.

A launcher without a server ends its job after ``orphan_timeout`` by itself. What is here is for the rest: a launcher
that is stuck or gone, a store that was lost. A job whose launcher has a live link must never be cancelled, and it
is not, since only these are:

- it is known to this store, and each server that has it is dead for good: it said so, its process on this host is
  gone, or it is another host's and its lease has been over for ``grace`` seconds;
- it is known to no row of this store, and *was submitted by it*: a launcher's id, which is in the job's comment,
  begins with its store's. A job of another store, as of a server on another host, is that one's to judge;
- and either was so for ``grace`` seconds, in which a server that comes back would have it again;
- nobody asked to keep it, and no step of somebody else's runs in it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gateway_slurm.errors import SlurmError, StepsUnknown, StoreError
from gateway_slurm.keepmarks import Mark
from gateway_slurm.launching import JOB_NAME, STEP_NAME, identity_of, is_of_store
from gateway_slurm.printable import printable
from gateway_slurm.settings import ServiceSettings
from gateway_slurm.slurm.driver import SlurmJobs
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.slurm.states import Meaning
from gateway_slurm.store import LEASE_SECONDS, AllocationRecord, Found, Registry, ServerRecord, this_process

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
