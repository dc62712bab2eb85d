"""The directory of a deployment: the records of its gateways in their common store.

The store is queried in threads of the directory's own, with a time limit: a database that hangs delays no other
request.
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
_SILENT: Final = (
    "the gateway that has this kernel does not answer; if it is gone, another gateway takes the kernel over"
)


class StoreDirectory:
    """Queries the store of a service's registry. Its owner calls ``close``."""

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
        """The deployment's other gateways, and the dead ones that still have records."""
        return await self._ask(lambda queries: queries.others(), [])

    async def kernel(self, kernel_id: str) -> Location | None:
        """The gateway that has the kernel."""
        return await self._ask(lambda queries: queries.kernel(kernel_id), None)

    async def session(self, session_id: str) -> Location | None:
        """The gateway that has the session."""
        return await self._ask(lambda queries: queries.session(session_id), None)

    async def session_at(self, owner: str, path: str) -> Location | None:
        """The other gateway that has this user's session of this document."""
        found = await self._ask(lambda queries: queries.session_at(owner, path), None)
        return None if found is None or found.peer.server_id == self.server_id else found

    async def owners(self) -> Mapping[str, str]:
        """The owners of all other gateways' kernels, by kernel id."""
        return await self._ask(lambda queries: queries.owners(), {})

    async def records_of(self, server_ids: Collection[str]) -> PeerRecords:
        """The records of these gateways."""
        return await self._ask(lambda queries: queries.records_of(server_ids), PeerRecords())

    def close(self) -> None:
        """End the threads, without waiting for a query that hangs."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _ask(self, query: Callable[[_StoreQueries], T], alone: T) -> T:
        """Run a query in a thread. ``alone`` is the answer without other gateways. Raises DirectoryUnavailable."""
        registry, deployment = self._registry, self._service.deployment
        if registry is None or not deployment:
            return alone
        asked = asyncio.get_running_loop().run_in_executor(self._threads, query, _StoreQueries(registry, deployment))
        try:
            return await asyncio.wait_for(asked, ANSWER_SECONDS)
        except asyncio.TimeoutError as error:
            raise DirectoryUnavailable(f"the store has not answered for {ANSWER_SECONDS:g} s") from error
        except StoreError as error:
            raise DirectoryUnavailable(str(error)) from error


class _StoreQueries:
    """Queries of the store. All methods block and raise StoreError."""

    def __init__(self, registry: Registry, deployment: str) -> None:
        self._registry, self._deployment = registry, deployment

    def others(self) -> list[Peer]:
        return [_peer(server) for server in self._servers() if server.server_id != self._registry.server_id]

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
            kernels += [(record.owner, makers[record.kernel_id], models[record.kernel_id]) for record in rows.kernels]
            sessions += [
                (session.owner, makers[session.kernel_id], _session_model(session, models[session.kernel_id]))
                for session in rows.sessions
                if session.kernel_id in models
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
        return [server for server in self._registry.store.servers() if server.deployment == self._deployment]


def _peer(server: ServerRecord) -> Peer:
    return Peer(server_id=server.server_id, url=server.url, lives=not server.is_dead)


def _kernel_model(record: KernelRecord) -> dict[str, Any]:
    """A model as Jupyter's, so that clients do not take the kernel for gone. Its execution state is not known."""
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
