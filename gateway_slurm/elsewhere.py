"""Allocations of the same owner's that other servers hold, or none any more: what a kernel that may share can join.

The records say which there are and what they were made for; whether one is there, as whose, and for how
long, is Slurm's word at that moment. One that Slurm does not confirm is not offered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gateway_slurm.errors import RequestError, SlurmError, StoreError
from gateway_slurm.keepmarks import Mark
from gateway_slurm.launching import identity_of
from gateway_slurm.request import parse_request
from gateway_slurm.sharing import Offer
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.slurm.states import Meaning
from gateway_slurm.store import AllocationRecord, Found, Registry, by_job


@dataclass(frozen=True)
class Elsewhere:
    """Where to look: ``owner`` is as records name it, ``user`` as Slurm does."""

    driver: SlurmDriver
    registry: Registry
    owner: str
    user: str
    log: logging.Logger

    async def offers(self, own: Iterable[str]) -> dict[str, tuple[Offer, JobInfo]]:
        """What is on offer but this server's ``own`` jobs, by job id; at most one squeue, and none without records."""
        try:
            found, marks = await asyncio.to_thread(self._on_record)
        except StoreError as error:
            self.log.info("share: other servers' jobs are not joined, since they cannot be read: %s", error)
            return {}
        taken = set(own)
        # Of one job there may be several: a job of long ago had the same id, or another server joined it.
        records = [
            record
            for server, record in found
            if record.jobid and record.jobid not in taken and record.ours and record.owner == self.owner
            # Without its server a job is about to end, unless it is kept.
            if not server.is_gone or (record.jobid, record.identity) in marks
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

    def _on_record(self) -> tuple[list[Found], frozenset[Mark]]:
        try:
            marks = self.registry.marks.all()
        except OSError:
            marks = frozenset()
        return self.registry.all_records(), marks

    def _unconfirmed(self, record: AllocationRecord, jobs: Mapping[str, JobInfo]) -> str:
        """Why what the record says is not to be believed; empty where Slurm confirms it."""
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
            return f"what it was made for is not known: {error}"
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
