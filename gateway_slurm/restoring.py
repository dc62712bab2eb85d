"""What an earlier server process had, made again from its records: allocations, launchers, kernels.

A kernel that is made again is LOST until its launcher, which re-dials, says how it is. Slurm is asked about the
jobs whose launchers do not come. A start that was under way is given up, since whoever asked for it cannot be
told: its job is cancelled, unless kernels run in it or it is kept.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gateway_slurm.allocation import Allocation, Place
from gateway_slurm.errors import GatewaySlurmError, SlurmError
from gateway_slurm.heldkernel import HeldKernel
from gateway_slurm.launcher import Launcher
from gateway_slurm.launching import JOB_NAME, identity_of
from gateway_slurm.processproxy import KernelProcess
from gateway_slurm.recovery import FIRST_PAUSE, INTENT_SECONDS
from gateway_slurm.store import AllocationRecord
from gateway_slurm.store.records import Claimed, KernelRecord, LauncherRecord

if TYPE_CHECKING:
    from gateway_slurm.service import SlurmService


@dataclass(frozen=True)
class Restored:
    """A kernel that an earlier server process had; ``SlurmProvisioner.adopt`` makes a provisioner its own."""

    record: KernelRecord
    held: HeldKernel


class Restoring:
    """For one service, on its loop. Its tasks are the service's own user's allocations'."""

    def __init__(self, service: SlurmService) -> None:
        self._service, self.log = service, service.log
        self._detours: dict[str, str] = {}  # of kernels, why they cannot be dialled

    async def restore(self, claimed: Claimed) -> list[Restored]:
        """Have what was claimed, whatever has become of it meanwhile; the kernels' sockets open soon after."""
        launchers, kernels = _by_record(claimed.launchers), _by_launcher(claimed.kernels)
        self._detours = await self._service.dialling.detours(claimed.kernels)
        restored: list[Restored] = []
        for record in [*claimed.allocations, *_missing(claimed)]:
            if record.jobid:
                restored += self._try_allocation(record, launchers[record.launcher_id], kernels)
        known = {one.record.kernel_id for one in restored}
        for lost in [one for one in claimed.kernels if one.kernel_id not in known]:
            self.log.error("kernel %s cannot be restored: its launcher is not on record", lost.kernel_id)
            self._service.registry.remove_kernel(lost.kernel_id)
        intents = [record for record in claimed.allocations if not record.jobid]
        if intents:
            self._service.allocations.own(self._settle(intents, launchers))
        # A thousand kernels have five thousand sockets: their clients come later, and can wait for them.
        self._service.allocations.own(self._reopen(restored))
        return restored

    def _try_allocation(
        self, record: AllocationRecord, launchers: list[LauncherRecord], kernels: dict[str, list[KernelRecord]]
    ) -> list[Restored]:
        try:
            return self._allocation(record, launchers, kernels)
        except Exception:
            # A record that is not what it should be costs no other job its kernels.
            self.log.exception("job %s cannot be restored", record.jobid)
            return []

    # No await in here: launchers are let in once all of their kernels are known.
    def _allocation(
        self, record: AllocationRecord, launchers: list[LauncherRecord], kernels: dict[str, list[KernelRecord]]
    ) -> list[Restored]:
        allocations = self._service.owners.of(record.owner)
        allocation = allocations.restore(record, launchers)
        restored = [
            one
            for launcher in launchers
            for kernel in kernels[launcher.launcher_id]
            if (one := self._kernel(allocation, allocation.launchers[launcher.launcher_id], kernel)) is not None
        ]
        allocations.let_in(allocation)
        return restored

    def _kernel(self, allocation: Allocation, launcher: Launcher, record: KernelRecord) -> Restored | None:
        service = self._service
        process = KernelProcess(record.kernel_id, launcher, **service.of_kernels())
        try:
            process.restore(record, self._detours.get(record.kernel_id, ""))
        except (KeyError, TypeError, AttributeError) as error:
            launcher.kernels.pop(record.kernel_id)
            self.log.error("kernel %s cannot be restored: its record is incomplete: %r", record.kernel_id, error)
            service.registry.remove_kernel(record.kernel_id)
            return None
        allocation.used = True
        place = Place(record.kernel_id, record.node, launcher)
        allocation.places.add(place)
        held = HeldKernel(service, process, allocation, place)
        held.manager = dict(record.manager)
        service.hold(held)
        return Restored(record, held)

    async def _reopen(self, restored: list[Restored]) -> None:
        for one in restored:
            try:
                await one.held.process.reopen()
            except (OSError, GatewaySlurmError) as error:
                # It lives, and can be restarted, which opens them anew.
                self.log.error("kernel %s: its sockets cannot be opened: %s", one.record.kernel_id, error)
            await asyncio.sleep(0)

    # -- starts that were under way -----------------------------------------------------------------

    async def _settle(self, intents: list[AllocationRecord], launchers: dict[str, list[LauncherRecord]]) -> None:
        """Look for jobs whose sbatch was under way, for a while: they are cancelled, or kept as was asked."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + INTENT_SECONDS, FIRST_PAUSE
        waiting = {record.launcher_id: record for record in intents}
        while waiting:
            try:
                found = {identity_of(info): info for info in (await self._service.everybodys.find(JOB_NAME)).values()}
            except SlurmError as error:
                self.log.warning("jobs that an earlier server may have left could not be looked for: %s", error)
                found = {}
            for key in waiting.keys() & found.keys():
                record = replace(waiting.pop(key), jobid=found[key].jobid)
                self._allocation(record, launchers[key], defaultdict(list))
            if loop.time() >= deadline:
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, max(0.0, deadline - loop.time()) + 0.1)
        for key in waiting:
            self._service.registry.remove(key)
            for launcher in launchers[key]:
                self._service.registry.remove_launcher(launcher.launcher_id)


def _by_record(launchers: Iterable[LauncherRecord]) -> dict[str, list[LauncherRecord]]:
    found: dict[str, list[LauncherRecord]] = defaultdict(list)
    for launcher in launchers:
        found[launcher.record_key].append(launcher)
    return found


def _by_launcher(kernels: Iterable[KernelRecord]) -> dict[str, list[KernelRecord]]:
    found: dict[str, list[KernelRecord]] = defaultdict(list)
    for kernel in kernels:
        found[kernel.launcher_id].append(kernel)
    return found


def _missing(claimed: Claimed) -> list[AllocationRecord]:
    """Of jobs that recovery by another process took for over: kernels are to end with a word on it all the same."""
    known = {record.launcher_id for record in claimed.allocations}
    owners = {kernel.launcher_id: kernel.owner for kernel in claimed.kernels}
    found: dict[str, AllocationRecord] = {}
    for launcher in claimed.launchers:
        key = launcher.record_key
        if key not in known and key not in found and launcher.jobid and launcher.launcher_id in owners:
            ours = key.startswith("gs-")
            found[key] = AllocationRecord(
                launcher_id=key,
                jobid=launcher.jobid,
                ours=ours,
                state="RUNNING",
                owner=owners[launcher.launcher_id],
                identity=key if ours else "",
            )
    return list(found.values())
