"""Which kernels are this server's: those of dead ones of its deployment become so, those that another took go.

A server owns its records for as long as its lease lasts, which a thread of the registry renews. One that did not
renew it in time, as when it was stopped, finds that another has them: it lets go of the kernels and ends none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gateway_slurm.errors import StoreError
from gateway_slurm.link import wire
from gateway_slurm.link.lookups import Redirect
from gateway_slurm.restoring import Restored, Restoring
from gateway_slurm.store import Lost, ServerRecord, this_process

if TYPE_CHECKING:
    from gateway_slurm.service import SlurmService

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
        own = self._service.reach.endpoints(self._service.endpoints)
        return [*own, *(address for address in self._others if address not in own)]

    def announce(self) -> None:
        """Put on record where launchers reach this server: at first, and whenever that has changed."""
        service, reach = self._service, self._service.reach
        addresses = [*reach.endpoints(service.endpoints), *self._answered]
        service.registry.announce(url=service.url, addresses=addresses, relays=reach.relays)

    # -- taking over --------------------------------------------------------------------------

    async def restore(self) -> list[Restored]:
        """Take over what dead servers of the deployment have, and go on to do so. Raises StoreError."""
        restored = await self.claim() if self._service.deployment else []
        if self._service.deployment and not self._watching:
            self._watching = True
            self._service.allocations.own(self._watch())
        return restored

    async def claim(self, kernel_ids: Iterable[str] | None = None) -> list[Restored]:
        """Take over from dead servers; with ``kernel_ids`` these kernels, with what shares their allocations."""
        # Who asks may go away; what the store says is ours by then must be had.
        return await asyncio.shield(self._service.allocations.own(self._claim(kernel_ids)))

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
        self._service.reach.inherit(relays)
        there = {int(relay["port"]) for relay in relays}
        here = this_process().host
        addresses = [each for one in servers if one.process.host == here for each in one.addresses]
        by_port = {endpoint[1]: each for each in addresses if (endpoint := wire.parse_endpoint(each)) is not None}
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

    def lose(self, lost: Lost) -> None:
        """Another server took these: let go of them, and of what is with them in the same jobs."""
        service = self._service
        gone = [one for one in service.owners.listed() if one.record_key in lost.allocations]
        dropped = [held for held in service.kernels() if held.allocation in gone]
        for held in dropped:
            held.give_away("another server has taken it over")
        for allocation in gone:
            service.owners.of(allocation.owner).give_away(allocation)
        if gone:
            self.log.warning(
                "this server was not heard of for too long: another one has taken over %d kernels in jobs %s",
                len(dropped),
                ", ".join(one.jobid for one in gone),
            )
        if dropped:
            service.on_dropped([held.process.kernel_id for held in dropped])
