"""The directory of a deployment: what its gateways have put on record in their store.

The store is asked in threads of our own, each answer within seconds: a database that hangs is no other
request's trouble.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

from gateway_slurm.errors import StoreError
from gateway_slurm.gateway.peers.peers import DirectoryUnavailable, Location, Peer, PeerRecords
from gateway_slurm.service import SlurmService
from gateway_slurm.store import KernelRecord, Registry, ServerRecord, SessionRecord

if TYPE_CHECKING:
    from gateway_slurm.store.database import Store

T = TypeVar("T")

ANSWER_SECONDS: Final = 3.0
_THREADS: Final = 2
_SILENT: Final = "the gateway that has it does not answer; if it is gone another one takes the kernel over"


class StoreDirectory:
    """Asks the store of a service's registry. ``close`` gives the threads up."""

    def __init__(self, service: SlurmService) -> None:
        self._service = service
        self._threads = ThreadPoolExecutor(_THREADS, "gateway_slurm-peers")

    @property
    def server_id(self) -> str:
        return self._registry.server_id if self._registry is not None else ""

    @property
    def _registry(self) -> Registry | None:
        return self._service.registry if self._service.is_open else None

    async def others(self) -> list[Peer]:
        """The deployment's other gateways; dead ones as long as they have something on record."""
        return await self._ask(lambda look: look.others(), [])

    async def kernel(self, kernel_id: str) -> Location | None:
        """Whose kernel that is."""
        return await self._ask(lambda look: look.kernel(kernel_id), None)

    async def session(self, session_id: str) -> Location | None:
        """Whose session that is."""
        return await self._ask(lambda look: look.session(session_id), None)

    async def session_at(self, owner: str, path: str) -> Location | None:
        """Who has this user's session of this document; None where it is this gateway, which would know."""
        found = await self._ask(lambda look: look.session_at(owner, path), None)
        return None if found is None or found.peer.server_id == self.server_id else found

    async def owners(self) -> Mapping[str, str]:
        """The kernels of all other gateways, and who owns them."""
        return await self._ask(lambda look: look.owners(), {})

    async def records_of(self, server_ids: Collection[str]) -> PeerRecords:
        """What is on record of these gateways."""
        return await self._ask(lambda look: look.records_of(server_ids), PeerRecords())

    def close(self) -> None:
        """The gateway ends; a question that hangs is left to itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _ask(self, question: Callable[[_StoreQueries], T], alone: T) -> T:
        """Raise DirectoryUnavailable; ``alone`` is the answer of a gateway that has no others."""
        registry, deployment = self._registry, self._service.deployment
        if registry is None or not deployment:
            return alone
        asked = asyncio.get_running_loop().run_in_executor(self._threads, question, _StoreQueries(registry, deployment))
        try:
            return await asyncio.wait_for(asked, ANSWER_SECONDS)
        except asyncio.TimeoutError as error:
            raise DirectoryUnavailable(f"the store has not answered for {ANSWER_SECONDS:g} s") from error
        except StoreError as error:
            raise DirectoryUnavailable(str(error)) from error


class _StoreQueries:
    """Questions to the store. Blocking; raises StoreError."""

    def __init__(self, registry: Registry, deployment: str) -> None:
        self._registry, self._deployment = registry, deployment

    def others(self) -> list[Peer]:
        return [_peer(one) for one in self._servers() if one.server_id != self._registry.server_id]

    def kernel(self, kernel_id: str) -> Location | None:
        return self._location(self._store.kernel_ownership(self._deployment, kernel_id))

    def session(self, session_id: str) -> Location | None:
        return self._location(self._store.session_ownership(self._deployment, session_id))

    def session_at(self, owner: str, path: str) -> Location | None:
        return self._location(self._store.document_ownership(self._deployment, owner, path))

    def owners(self) -> Mapping[str, str]:
        return self._store.kernel_owners(self._deployment, except_server=self._registry.server_id)

    def records_of(self, server_ids: Collection[str]) -> PeerRecords:
        kernels, sessions = [], []
        for rows in map(self._store.rows_of, server_ids):
            models = {record.kernel_id: _kernel_model(record) for record in rows.kernels}
            makers = {record.kernel_id: str(record.manager.get("maker", "")) for record in rows.kernels}
            kernels += [(one.owner, makers[one.kernel_id], models[one.kernel_id]) for one in rows.kernels]
            sessions += [
                (one.owner, makers[one.kernel_id], _session_model(one, models[one.kernel_id]))
                for one in rows.sessions
                if one.kernel_id in models
            ]
        return PeerRecords(kernels=tuple(kernels), sessions=tuple(sessions))

    @property
    def _store(self) -> Store:
        return self._registry.store

    def _location(self, ownership: tuple[str, str] | None) -> Location | None:
        if ownership is None:
            return None
        server_id, owner = ownership
        server = next((server for server in self._servers() if server.server_id == server_id), None)
        peer = Peer(server_id=server_id, url="", lives=False) if server is None else _peer(server)
        return Location(peer=peer, owner=owner)

    def _servers(self) -> list[ServerRecord]:
        return [one for one in self._registry.servers() if one.deployment == self._deployment]


def _peer(server: ServerRecord) -> Peer:
    return Peer(server_id=server.server_id, url=server.url, lives=not server.is_dead)


def _kernel_model(record: KernelRecord) -> dict[str, Any]:
    """As Jupyter's, for clients that must not take the kernel for gone; nobody knows now what it does."""
    began = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(record.started_at or 0))
    return {
        "id": record.kernel_id,
        "name": str(record.manager.get("kernel_name", "")),
        "last_activity": began,
        "execution_state": "unknown",
        "connections": 0,
        "reason": _SILENT,
        "slurm": {"jobid": None, "node": record.node},
    }


def _session_model(record: SessionRecord, kernel: dict[str, Any]) -> dict[str, Any]:
    model = {"id": record.session_id, "path": record.path, "name": record.name, "type": record.type, "kernel": kernel}
    if record.type == "notebook":
        model["notebook"] = {"path": record.path, "name": record.name}
    return model
