"""Kernels of earlier servers: made again from records, and taken over from servers that died.

A kernel that is made again is LOST until its launcher dials this server and reports it. Slurm is asked about jobs
whose launchers do not come. A start that was under way is given up, since its client is gone: its job is cancelled,
unless kernels run in it or it is kept. Everything here runs on the service's loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from gateway_slurm._util import Backoff, LogOnce, TaskSet
from gateway_slurm.allocations.identity import COMMENT, identity_of
from gateway_slurm.allocations.recovery import INTENT_RETRY_DELAY, INTENT_TIMEOUT
from gateway_slurm.errors import GatewaySlurmError, SlurmError, StoreError
from gateway_slurm.kernels.held import KernelHandle, Kernels
from gateway_slurm.link.endpoints import parse_endpoint
from gateway_slurm.link.server import Redirect
from gateway_slurm.slurm.access import ClusterAccess
from gateway_slurm.slurm.driver import SlurmJobs
from gateway_slurm.store import AllocationRecord, LostRows, Registry, ServerRecord, this_process
from gateway_slurm.store.records import ClaimedRows, KernelRecord, LauncherRecord

# Seconds between two looks for dead servers; a lease is over after LEASE_SECONDS.
LOOK_SECONDS = 2.5
# Ports of dead servers on which this one listens: a launcher knows this server's own ports as soon as it is linked.
MAX_ADOPTED_PORTS = 8
# Seconds until a port that another process has is tried again; each pause is twice as long, up to the second value.
PORT_RETRY_DELAY, MAX_PORT_RETRY_DELAY = 1.0, 15.0


@dataclass(frozen=True)
class RestoredKernel:
    """A kernel that an earlier server had; ``SlurmProvisioner.adopt`` gives it a provisioner."""

    record: KernelRecord
    handle: KernelHandle


class Restorer:
    """Makes kernels and their allocations again from records that the store has given to this server.

    ``jobs`` asks Slurm about the jobs of all owners; ``tasks`` runs what goes on in the background.
    """

    def __init__(self, kernels: Kernels, jobs: SlurmJobs, tasks: TaskSet) -> None:
        self._kernels, self._jobs, self._tasks, self.log = kernels, jobs, tasks, kernels.log

    async def restore(self, claimed: ClaimedRows) -> list[RestoredKernel]:
        """Have all that was claimed, in whatever state it is now; the kernels' sockets open soon after."""
        launchers: dict[str, list[LauncherRecord]] = defaultdict(list)
        for launcher in claimed.launchers:
            launchers[launcher.record_key].append(launcher)
        kernels: dict[str, list[KernelRecord]] = defaultdict(list)
        for kernel in claimed.kernels:
            kernels[kernel.launcher_id].append(kernel)
        reasons = await self._kernels.transport.fallback_reasons(claimed.kernels)
        restored: list[RestoredKernel] = []
        for record in [*claimed.allocations, *_missing(claimed)]:
            if record.jobid:
                try:
                    restored += self._allocation(record, launchers[record.launcher_id], kernels, reasons)
                except Exception:
                    # A faulty record must not cost other jobs their kernels.
                    self.log.exception("job %s cannot be restored", record.jobid)
        known = {kernel.record.kernel_id for kernel in restored}
        for kernel in claimed.kernels:
            if kernel.kernel_id not in known:
                self.log.error("kernel %s cannot be restored: its launcher is not on record", kernel.kernel_id)
                self._kernels.registry.remove("kernels", kernel.kernel_id)
        intents = [record for record in claimed.allocations if not record.jobid]
        if intents:
            self._tasks.create_task(self._resolve_intents(intents, launchers))
        # A thousand kernels have five thousand sockets: their clients come later, and can wait for them.
        self._tasks.create_task(self._reopen(restored))
        return restored

    # No await in here: launchers are let in once all of their kernels are known.
    def _allocation(
        self,
        record: AllocationRecord,
        launchers: list[LauncherRecord],
        kernels: dict[str, list[KernelRecord]],
        reasons: dict[str, str],
    ) -> list[RestoredKernel]:
        allocations = self._kernels.owners.of(record.owner)
        allocation = allocations.restore(record, launchers)
        restored = []
        for kernel in itertools.chain.from_iterable(kernels[launcher.launcher_id] for launcher in launchers):
            kernel_id, launcher = kernel.kernel_id, allocation.launchers[kernel.launcher_id]
            try:
                handle = self._kernels.restore(allocation, launcher, kernel, reasons.get(kernel_id, ""))
            except (KeyError, TypeError, AttributeError) as error:
                self.log.error("kernel %s cannot be restored: its record is incomplete: %r", kernel_id, error)
                self._kernels.registry.remove("kernels", kernel_id)
            else:
                restored.append(RestoredKernel(kernel, handle))
        allocations.allow_reconnect(allocation)
        return restored

    async def _reopen(self, restored: list[RestoredKernel]) -> None:
        for kernel in restored:
            try:
                await kernel.handle.process.reopen()
            except (OSError, GatewaySlurmError) as error:
                # The kernel lives; a restart opens its sockets again.
                self.log.error("kernel %s: its sockets cannot be opened: %s", kernel.record.kernel_id, error)
            await asyncio.sleep(0)

    async def _resolve_intents(
        self, intents: list[AllocationRecord], launchers: dict[str, list[LauncherRecord]]
    ) -> None:
        """Look for jobs of sbatch commands that were under way, for a while: they are cancelled, or kept as asked."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + INTENT_TIMEOUT
        pauses = Backoff(INTENT_RETRY_DELAY, INTENT_TIMEOUT)
        waiting = {record.launcher_id: record for record in intents}
        while waiting:
            try:
                found = {identity_of(info): info for info in (await self._jobs.find(COMMENT)).values()}
            except SlurmError as error:
                self.log.warning("jobs that an earlier server may have left could not be looked for: %s", error)
                found = {}
            for key in waiting.keys() & found.keys():
                record = replace(waiting.pop(key), jobid=found[key].jobid)
                self._allocation(record, launchers[key], defaultdict(list), {})
            if loop.time() >= deadline:
                break
            await asyncio.sleep(min(pauses.next(), max(0.0, deadline - loop.time()) + 0.1))
        for key in waiting:
            self._kernels.registry.remove("allocations", key)
            for launcher in launchers[key]:
                self._kernels.registry.remove("launchers", launcher.launcher_id)


def _missing(claimed: ClaimedRows) -> list[AllocationRecord]:
    """Records of jobs that another process's recovery removed as over: their kernels still end with a reason."""
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


# -- Failover between the servers of a deployment -----------------------------------------------


class LauncherAddresses:
    """Where launchers may dial: this server, and the other living servers of its deployment.

    ``direct`` are this server's own addresses; ``listen`` makes it listen on one more port of this host, and raises
    OSError where the port is not free. ``tasks`` runs what goes on in the background. ``url`` is where the other
    servers reach this server's API.
    """

    def __init__(
        self,
        access: ClusterAccess,
        registry: Registry,
        tasks: TaskSet,
        *,
        listen: Callable[[int], Awaitable[object]],
        url: str,
        log: logging.Logger,
    ) -> None:
        self._access, self._registry, self._tasks, self.log = access, registry, tasks, log
        self._listen, self._url = listen, url
        self.direct: list[str] = []
        self.others: list[str] = []
        """Those of the other living servers of the deployment."""
        # Addresses of dead servers on which this one listens. The next server must do so, too, if this one dies soon.
        self._adopted: list[str] = []
        self._awaited: set[int] = set()  # ports that are tried again

    def of_this_server(self) -> list[str]:
        """The addresses of this server, in the order in which launchers dial them."""
        return self._access.endpoints(self.direct)

    def of_all_servers(self) -> list[str]:
        """The same, then the other servers'; reads memory only."""
        own = self.of_this_server()
        return [*own, *(address for address in self.others if address not in own)]

    def announce(self) -> None:
        """Record where launchers reach this server: at first, and whenever that has changed."""
        addresses = [*self.of_this_server(), *self._adopted]
        self._registry.announce(url=self._url, addresses=addresses, relays=self._access.relays)

    async def adopt(self, servers: Sequence[ServerRecord]) -> None:
        """Listen where these dead servers of this host listened, since their launchers know no other addresses.

        A relay's ports are on the login node, on whichever host its server was.
        """
        relays = [relay for server in servers for relay in server.relays]
        self._access.adopt_relays(relays)
        relay_ports = {int(relay["port"]) for relay in relays}
        host = this_process().host
        addresses = [address for server in servers if server.process.host == host for address in server.addresses]
        by_port = {endpoint[1]: text for text in addresses if (endpoint := parse_endpoint(text)) is not None}
        own = {endpoint[1] for text in [*self.direct, *self._adopted] if (endpoint := parse_endpoint(text)) is not None}
        had = relay_ports | own | self._awaited
        wanted = {port: text for port, text in by_port.items() if port not in had}
        taken = [port for port in wanted if not await self._adopt(port, wanted[port])]
        if servers:
            self.announce()
        for port in taken[:MAX_ADOPTED_PORTS]:
            self._awaited.add(port)
            self._tasks.create_task(self._adopt_later(port, wanted[port]))

    async def _adopt(self, port: int, address: str) -> bool:
        """Listen on one more port; return whether it was free."""
        try:
            await self._listen(port)
        except OSError:
            return False
        self._adopted = [address, *self._adopted][:MAX_ADOPTED_PORTS]
        return True

    async def _adopt_later(self, port: int, address: str) -> None:
        """Try again until another process has left the port: launchers may know no other address."""
        self.log.warning("another process has port %d, where an earlier server's launchers dial; tried again", port)
        pauses = Backoff(PORT_RETRY_DELAY, MAX_PORT_RETRY_DELAY)
        while True:
            await pauses.sleep()
            if await self._adopt(port, address):
                break
        self._awaited.discard(port)
        self.log.warning("port %d is free now: an earlier server's launchers reach this server", port)
        self.announce()


class Failover:
    """Takes over the kernels of dead servers of the deployment, and drops those that another server took over.

    ``on_claimed`` is called with kernels of a server that died while this one runs, ``on_dropped`` with the ids of
    kernels that another server has now. Without a ``deployment`` no other server's kernels are watched.
    """

    def __init__(
        self,
        kernels: Kernels,
        restorer: Restorer,
        addresses: LauncherAddresses,
        tasks: TaskSet,
        *,
        deployment: str,
        on_claimed: Callable[[list[RestoredKernel]], None],
        on_dropped: Callable[[list[str]], None],
        log: logging.Logger,
    ) -> None:
        self._kernels, self._restorer, self._addresses, self._tasks = kernels, restorer, addresses, tasks
        self._registry, self._deployment, self.log = kernels.registry, deployment, log
        self._on_claimed, self._on_dropped = on_claimed, on_dropped
        # A launcher that dials while its records are being claimed waits for the claim.
        self._claiming = asyncio.Lock()
        self._watching = False
        self._complaints = LogOnce(log)

    # -- Taking over ----------------------------------------------------------------------------

    async def restore(self) -> list[RestoredKernel]:
        """Take over from dead servers of the deployment, now and from now on. Raises StoreError."""
        if not self._deployment:
            return []
        restored = await self.claim()
        if not self._watching:
            self._watching = True
            self._tasks.create_task(self._watch())
        return restored

    async def claim(self, kernel_ids: Iterable[str] | None = None) -> list[RestoredKernel]:
        """Take over from dead servers: all, or these kernels and the kernels that share their jobs.

        Raises StoreError.
        """
        # The caller may be cancelled; kernels that the store has given to this server must be had all the same.
        return await asyncio.shield(self._tasks.create_task(self._claim(kernel_ids)))

    async def _claim(self, kernel_ids: Iterable[str] | None) -> list[RestoredKernel]:
        async with self._claiming:
            claimed = await asyncio.to_thread(self._registry.claim, kernel_ids)
            restored = await self._restorer.restore(claimed)
            # Not earlier: this server must know a launcher that dials.
            await self._addresses.adopt(claimed.servers)
            await self._find_dead_servers()
        for kernel in restored:
            self._kernels.events.emit("kernel_taken_over", **kernel.handle.facts())
        if restored:
            jobs = sorted({kernel.handle.allocation.jobid for kernel in restored}, key=int)
            self.log.info("%d kernels of earlier servers are back, in jobs %s", len(restored), ", ".join(jobs))
        return restored

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if await self._find_dead_servers():
                    await self._claim_and_notify()
                self._complaints.clear("store")
            except StoreError as error:
                self._complaints.warning("store", "the other servers of the deployment are not known now: %s", error)

    async def _claim_and_notify(self) -> None:
        restored = await self.claim()
        if not restored:
            return
        try:
            self._on_claimed(restored)
        except Exception:
            # The kernels are restored; a failing callback must not end the watch.
            self.log.exception("kernels were taken over, and the server could not be notified of them")

    async def _find_dead_servers(self) -> bool:
        """Note the addresses of the deployment's living servers; return whether there are dead ones."""
        if not self._deployment:
            return False
        servers = await asyncio.to_thread(lambda: self._registry.store.servers())
        others = [
            server
            for server in servers
            if server.deployment == self._deployment and server.server_id != self._registry.server_id
        ]
        addresses = [address for server in others if not server.is_dead for address in server.addresses]
        if addresses != self._addresses.others:
            self._addresses.others = addresses
            self.log.info("other servers that launchers may dial: %s", ", ".join(addresses) or "none")
        return any(server.is_dead for server in others)

    async def resolve_unknown_launcher(self, launcher_id: str) -> bool | Redirect:
        """Find the server of a launcher that dialled this one unexpectedly.

        True: it is this server's from now on, since its own server is dead. A Redirect: another living server has it.
        False: no server of this deployment has it. Raises StoreError.
        """
        if not self._watching:
            return False
        async with self._claiming:
            found = await asyncio.to_thread(lambda: self._registry.store.find_launcher(launcher_id))
        if found is None or found[0].deployment != self._deployment:
            return False
        server, record = found
        if server.server_id != self._registry.server_id:
            if not server.is_dead:
                return Redirect(record.tokens, record.jobid, server.addresses, record.epoch)
            await self._claim_and_notify()
        return True

    # -- Handing over ---------------------------------------------------------------------------

    def hand_over(self, lost: LostRows) -> None:
        """Another server took these records: drop their kernels, and the kernels that share their jobs."""
        owners = self._kernels.owners
        allocations = [listed for listed in owners.listed() if listed.record_key in lost.allocations]
        handles = [handle for handle in self._kernels.handles() if handle.allocation in allocations]
        for handle in handles:
            handle.hand_over("another server has taken it over")
        for allocation in allocations:
            owners.of(allocation.owner).hand_over(allocation)
        if allocations:
            self.log.warning(
                "this server did not renew its lease in time: another one has taken over %d kernels in jobs %s",
                len(handles),
                ", ".join(allocation.jobid for allocation in allocations),
            )
        if handles:
            self._on_dropped([handle.process.kernel_id for handle in handles])
