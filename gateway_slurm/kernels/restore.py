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

from gateway_slurm.allocations.identity import JOB_NAME, identity_of
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation, Place
from gateway_slurm.allocations.recovery import INTENT_RETRY_DELAY, INTENT_TIMEOUT
from gateway_slurm.errors import GatewaySlurmError, SlurmError
from gateway_slurm.kernels.held import HeldKernel
from gateway_slurm.kernels.process import KernelProcess
from gateway_slurm.link.endpoints import parse_endpoint
from gateway_slurm.store import AllocationRecord
from gateway_slurm.store.records import ClaimedRows, KernelRecord, LauncherRecord

if TYPE_CHECKING:
    from gateway_slurm.service import SlurmService
import contextlib
from collections.abc import Sequence

from gateway_slurm.errors import StoreError
from gateway_slurm.link.server import Redirect
from gateway_slurm.store import LostRows, ServerRecord, this_process


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

    async def restore(self, claimed: ClaimedRows) -> list[Restored]:
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
            self._service.allocations.create_task(self._settle(intents, launchers))
        # A thousand kernels have five thousand sockets: their clients come later, and can wait for them.
        self._service.allocations.create_task(self._reopen(restored))
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
        allocations.allow_reconnect(allocation)
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
        allocation.mark_used()
        place = Place(record.kernel_id, record.node, launcher)
        allocation.add_place(place)
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
        deadline, pause = loop.time() + INTENT_TIMEOUT, INTENT_RETRY_DELAY
        waiting = {record.launcher_id: record for record in intents}
        while waiting:
            try:
                found = {identity_of(info): info for info in (await self._service.all_jobs.find(JOB_NAME)).values()}
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
            self._service.registry.remove_allocation(key)
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


def _missing(claimed: ClaimedRows) -> list[AllocationRecord]:
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


# -- Which kernels are this server's: those of dead ones of its deployment become so, those that another took go. --


# Between two looks for dead servers, in seconds: a lease is over after LEASE_SECONDS.
LOOK_SECONDS = 2.5
# Ports of dead servers that are told to the next one: launchers learn newer ones as soon as they are linked.
MAX_ANSWERED = 8


class FailOver:
    """For one service, on its loop; its tasks are the service's own user's allocations'."""

    def __init__(self, service: SlurmService) -> None:
        self._service, self.log = service, service.log
        self._restoring = Restoring(service)
        # A launcher that dials while its records are being claimed waits for that.
        self._claiming = asyncio.Lock()
        self._others: list[str] = []
        self._answered: list[str] = []
        """Addresses of dead servers where this one listens, too: the next one is to do so, if this one dies soon."""
        self._watching = False
        self._complained = False

    def addresses(self) -> list[str]:
        """Where launchers may dial, this server first; memory only."""
        own = self._service.access.endpoints(self._service.endpoints)
        return [*own, *(address for address in self._others if address not in own)]

    def announce(self) -> None:
        """Put on record where launchers reach this server: at first, and whenever that has changed."""
        service, access = self._service, self._service.access
        addresses = [*access.endpoints(service.endpoints), *self._answered]
        service.registry.announce(url=service.url, addresses=addresses, relays=access.relays)

    # -- taking over --------------------------------------------------------------------------

    async def restore(self) -> list[Restored]:
        """Take over what dead servers of the deployment have, and go on to do so. Raises StoreError."""
        restored = await self.claim() if self._service.deployment else []
        if self._service.deployment and not self._watching:
            self._watching = True
            self._service.allocations.create_task(self._watch())
        return restored

    async def claim(self, kernel_ids: Iterable[str] | None = None) -> list[Restored]:
        """Take over from dead servers; with ``kernel_ids`` these kernels, with what shares their allocations."""
        # Who asks may go away; what the store says is ours by then must be had.
        return await asyncio.shield(self._service.allocations.create_task(self._claim(kernel_ids)))

    async def _claim(self, kernel_ids: Iterable[str] | None) -> list[Restored]:
        async with self._claiming:
            claimed = await asyncio.to_thread(self._service.registry.claim, kernel_ids)
            restored = await self._restoring.restore(claimed)
            # Not before: a launcher that dials is to find itself known.
            await self._answer_for(claimed.servers)
            await self._look_for_others()
        if restored:
            jobs = sorted({one.held.allocation.jobid for one in restored}, key=int)
            self.log.info("%d kernels of earlier servers are back, in jobs %s", len(restored), ", ".join(jobs))
        return restored

    async def _answer_for(self, servers: Sequence[ServerRecord]) -> None:
        """Listen where these servers did, if that was on this host: what their launchers know is their addresses.

        A relay's are on the login node, whichever host its server was on.
        """
        relays = [relay for one in servers for relay in one.relays]
        self._service.access.adopt_relays(relays)
        there = {int(relay["port"]) for relay in relays}
        here = this_process().host
        addresses = [each for one in servers if one.process.host == here for each in one.addresses]
        by_port = {endpoint[1]: each for each in addresses if (endpoint := parse_endpoint(each)) is not None}
        for port in by_port.keys() - there:
            with contextlib.suppress(OSError):  # somebody else has it by now: other addresses are left
                await self._service.also_listen(port)
                self._answered = [by_port[port], *self._answered][:MAX_ANSWERED]
        if servers:
            self.announce()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look()
                self._complained = False
            except StoreError as error:
                if not self._complained:
                    self.log.warning("other servers cannot be looked for: %s", error)
                self._complained = True

    async def _look(self) -> None:
        if await self._look_for_others():
            await self._claim_and_tell()

    async def _claim_and_tell(self) -> None:
        restored = await self.claim()
        if not restored:
            return
        try:
            self._service.on_claimed(restored)
        except Exception:
            # The kernels are there; that nobody shows them must not end the watch for others.
            self.log.exception("kernels that were taken over could not be told")

    async def _look_for_others(self) -> bool:
        """Note where servers of the deployment are that live; return whether there are dead ones."""
        registry, deployment = self._service.registry, self._service.deployment
        if not deployment:
            return False
        servers = await asyncio.to_thread(registry.servers)
        others = [one for one in servers if one.deployment == deployment and one.server_id != registry.server_id]
        addresses = [address for one in others if not one.is_dead for address in one.addresses]
        if addresses != self._others:
            self.log.info("launchers may also dial %s", ", ".join(addresses) or "nobody else")
        self._others = addresses
        return any(one.is_dead for one in others)

    # -- launchers that dial the wrong server -----------------------------------------------------

    async def stranger(self, launcher_id: str) -> bool | Redirect:
        """Whose a launcher is that is not expected: another server's, which lives, or from now on this one's (True).

        False where it is nobody's in this deployment. Raises StoreError.
        """
        if not self._watching:
            return False
        async with self._claiming:
            found = await asyncio.to_thread(self._service.registry.find_launcher, launcher_id)
        if found is None or found[0].deployment != self._service.deployment:
            return False
        server, record = found
        if server.server_id != self._service.registry.server_id:
            if not server.is_dead:
                return Redirect(record.tokens, record.jobid, server.addresses, record.epoch)
            await self._claim_and_tell()
        return True

    # -- letting go -------------------------------------------------------------------------------

    def lose(self, lost: LostRows) -> None:
        """Another server took these: let go of them, and of what is with them in the same jobs."""
        service = self._service
        gone = [one for one in service.owners.listed() if one.record_key in lost.allocations]
        dropped = [held for held in service.kernels() if held.allocation in gone]
        for held in dropped:
            held.give_away("another server has taken it over")
        for allocation in gone:
            service.owners.of(allocation.owner).hand_over(allocation)
        if gone:
            self.log.warning(
                "this server was not heard of for too long: another one has taken over %d kernels in jobs %s",
                len(dropped),
                ", ".join(one.jobid for one in gone),
            )
        if dropped:
            service.on_dropped([held.process.kernel_id for held in dropped])
