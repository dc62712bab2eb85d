"""What a server that died has left: found by its records, and dealt with by the next one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from gateway_slurm.errors import SlurmError, StoreError
from gateway_slurm.keepmarks import Mark
from gateway_slurm.launching import JOB_NAME, identity_of
from gateway_slurm.slurm.driver import SlurmJobs
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.slurm.states import Meaning
from gateway_slurm.store import AllocationRecord, Found, Registry

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
