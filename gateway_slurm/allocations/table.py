"""The table of an owner's allocations: in memory, on record, and the tasks that run for them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from gateway_slurm._util import TaskSet
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.config import ServiceSettings
from gateway_slurm.events import Events
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.watcher import JobWatcher
from gateway_slurm.store import AllocationRecord, Registry
from gateway_slurm.store.records import LauncherRecord

# A command may have a thousand arguments of 128 KiB; the record only has to let people recognise it.
MAX_ARGUMENTS, MAX_CHARACTERS = 20, 200


class AllocationTable:
    """Lives on the service's loop."""

    def __init__(self, registry: Registry, socket: ResponseSocket) -> None:
        self.registry, self._socket = registry, socket
        self.by_jobid: dict[str, Allocation] = {}
        """The allocations that have a job id and are not over."""
        self.tasks = TaskSet()
        """Cancelled when the server ends. After that none begins: the next server does what is on record then."""

    def add(self, allocation: Allocation) -> None:
        """Put an allocation into the table by its job id."""
        self.by_jobid[allocation.jobid] = allocation

    def find(self, jobid: str) -> Allocation | None:
        """The allocation with this id; None for one that is over or not in the table."""
        known = self.by_jobid.get(jobid)
        return None if known is None or known.is_over else known

    def listed(self) -> list[Allocation]:
        """The allocations that are not over. Reads memory only; any thread may call this."""
        return [allocation for allocation in list(self.by_jobid.values()) if not allocation.is_over]

    # -- Allocations --

    def record(self, allocation: Allocation) -> None:
        """Put an allocation on record, for a later server process; one that is over is not recorded."""
        if allocation.is_over:
            return
        config = allocation.request.as_config()
        if argv := config.get("kernel_argv"):
            config["kernel_argv"] = [item[:MAX_CHARACTERS] for item in argv[:MAX_ARGUMENTS]]
        self.registry.put(
            AllocationRecord(
                launcher_id=allocation.assign_record_key(),
                jobid=allocation.jobid or None,
                ours=allocation.ours,
                state=allocation.state,
                nodelist=allocation.nodes,
                end_time=allocation.end_time,
                kernel_ids=allocation.kernel_ids,
                config=config,
                keep=allocation.keep,
                owner=allocation.owner,
                account=allocation.account,
                identity=allocation.identity,
            )
        )

    def discard(self, allocation: Allocation) -> None:
        """Take an allocation out of the table; its record stays."""
        if self.by_jobid.get(allocation.jobid) is allocation:
            del self.by_jobid[allocation.jobid]

    def mark_pending_cancel(self, allocation: Allocation) -> None:
        """Let no kernel join the allocation, and keep its record until Slurm is known to have ended the job."""
        self.registry.pending_cancel.add(allocation.record_key)
        self.discard(allocation)

    def forget(self, allocation: Allocation) -> None:
        """Remove an allocation and its records: the job is over, or this server has no part in it."""
        self.discard(allocation)
        self.registry.pending_cancel.discard(allocation.record_key)
        if allocation.record_key:
            self.registry.remove("allocations", allocation.record_key)
        for launcher_id in allocation.launchers:
            self.registry.remove("launchers", launcher_id)

    # -- Launchers --

    def record_launcher(self, allocation: Allocation, launcher: Launcher) -> None:
        """Put on record what a later server process needs to accept the launcher and to find its kernels."""
        self.registry.put(
            LauncherRecord(
                launcher_id=launcher.launcher_id,
                record_key=allocation.record_key,
                jobid=launcher.jobid,
                tokens=launcher.tokens,
                node=launcher.node if launcher.was_up else "",
                holds_job=launcher.holds_job,
                isolated=launcher.isolated,
                stepid=launcher.stepid,
                nodelist=launcher.nodelist,
                end_time=launcher.end_time,
                slots=dict(launcher.slots),
                epoch=launcher.epoch,
            )
        )

    def remove_launcher(self, allocation: Allocation, launcher: Launcher, reason: str) -> None:
        """The launcher has ended, and its kernels with it."""
        launcher.release()  # Slurm may call a job over whose launcher still answers
        self._socket.forget(launcher.launcher_id)
        self.registry.remove("launchers", launcher.launcher_id)
        allocation.remove_launcher(launcher)
        launcher.end(reason)

    def hand_over_launcher(self, allocation: Allocation, launcher: Launcher) -> None:
        """Another server has the launcher now: close its link here and send it nothing."""
        allocation.remove_launcher(launcher)
        launcher.end("another server has taken over its job")  # kernels that are starting
        self._socket.forget(launcher.launcher_id)
        if launcher.step_watch is not None:
            launcher.step_watch.cancel()


@dataclass(frozen=True)
class OwnerContext:
    """What all objects that handle one owner's allocations share; each lives on the service's loop."""

    owner: str
    """The owner's name; empty for the user of this process."""
    user: str
    """The Unix user that submits the owner's jobs to Slurm."""
    driver: SlurmDriver
    """Reaches Slurm as that user."""
    socket: ResponseSocket
    watcher: JobWatcher
    table: AllocationTable
    settings: ServiceSettings
    events: Events
    log: logging.Logger
