"""The directory of a deployment: the records of its gateways in their common store.

The store is queried in threads of the directory's own, with a time limit: a database that hangs delays no other
request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from gateway_slurm.errors import GatewaySlurmError, StoreError
from gateway_slurm.gateway.sessions import session_model
from gateway_slurm.service import SlurmService
from gateway_slurm.store import KernelRecord, Registry, ServerRecord

if TYPE_CHECKING:
    from gateway_slurm.store.database import Store

T = TypeVar("T")

KERNELS: Final = "kernels"
SESSIONS: Final = "sessions"
ALLOCATIONS: Final = "allocations"

ANSWER_SECONDS: Final = 3.0
_THREADS: Final = 2
_SILENT: Final = (
    "the gateway that has this kernel does not answer; if it is gone, another gateway takes the kernel over"
)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A gateway of this deployment; ``lives`` is False once its lease is over, or it has ended."""

    server_id: str
    url: str
    lives: bool = True

    @property
    def can_be_asked(self) -> bool:
        """Whether requests can be forwarded to it: it lives, and its peers know its URL."""
        return self.lives and bool(self.url)


@dataclass(frozen=True, kw_only=True)
class Location:
    """The gateway that has a kernel, session or allocation, and the user who owns it ("" if not known)."""

    peer: Peer
    owner: str = ""


@dataclass(frozen=True, kw_only=True)
class PeerRecords:
    """The records of other gateways: models of kernels and sessions, each after its owner and the user who made it."""

    kernels: tuple[tuple[str, str, dict[str, Any]], ...] = ()
    sessions: tuple[tuple[str, str, dict[str, Any]], ...] = ()


class DirectoryUnavailable(GatewaySlurmError):
    """The store does not answer: no gateway can tell now which one has a kernel."""


class StoreDirectory:
    """The records of which gateway has what, in the store of a service's registry. Its owner calls ``close``.

    Every coroutine may raise DirectoryUnavailable; none blocks the loop.
    """

    def __init__(self, service: SlurmService) -> None:
        self._service = service
        self._threads = ThreadPoolExecutor(_THREADS, "gateway_slurm-peers")

    @property
    def server_id(self) -> str:
        """The id of this gateway; "" before it has one."""
        return self._registry.server_id if self._registry is not None else ""

    @property
    def peer_key(self) -> bytes:
        """The key with which gateways prove themselves to each other; empty before the store is open."""
        return self._registry.peer_key if self._registry is not None else b""

    @property
    def _registry(self) -> Registry | None:
        return self._service.registry if self._service.is_open else None

    async def others(self) -> list[Peer]:
        """The deployment's other gateways, and the dead ones whose kernels no gateway has taken over yet."""
        return await self._ask(
            lambda registry, deployment: [
                _peer(server)
                for server in registry.store.servers()
                if server.deployment == deployment and server.server_id != registry.server_id
            ],
            [],
        )

    async def kernel(self, kernel_id: str) -> Location | None:
        """The gateway that has the kernel, which may be this one; None if the kernel is not on record."""
        return await self._locate(lambda store, deployment: store.kernel_ownership(deployment, kernel_id))

    async def session(self, session_id: str) -> Location | None:
        """The gateway that has the session."""
        return await self._locate(lambda store, deployment: store.session_ownership(deployment, session_id))

    async def session_at(self, owner: str, path: str) -> Location | None:
        """The other gateway that has this user's session of this document."""
        found = await self._locate(lambda store, deployment: store.document_ownership(deployment, owner, path))
        return None if found is None or found.peer.server_id == self.server_id else found

    async def owners(self) -> Mapping[str, str]:
        """The owners of all other gateways' kernels, by kernel id; starting kernels are included."""
        return await self._ask(
            lambda registry, deployment: registry.store.kernel_owners(deployment, except_server=registry.server_id), {}
        )

    async def records_of(self, server_ids: Collection[str]) -> PeerRecords:
        """The records of these gateways."""
        return await self._ask(lambda registry, _deployment: _records_of(registry.store, server_ids), PeerRecords())

    def close(self) -> None:
        """End the threads, without waiting for a query that hangs."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _locate(self, find: Callable[[Store, str], tuple[str, str] | None]) -> Location | None:
        """The gateway, and the owner, that ``find`` returns from the store."""

        def query(registry: Registry, deployment: str) -> Location | None:
            ownership = find(registry.store, deployment)
            if ownership is None:
                return None
            server_id, owner = ownership
            servers = [server for server in registry.store.servers() if server.deployment == deployment]
            server = next((server for server in servers if server.server_id == server_id), None)
            peer = Peer(server_id=server_id, url="", lives=False) if server is None else _peer(server)
            return Location(peer=peer, owner=owner)

        return await self._ask(query, None)

    async def _ask(self, query: Callable[[Registry, str], T], alone: T) -> T:
        """Run a query of the registry and the deployment in a thread. It may block, and raise StoreError.

        ``alone`` is the answer without other gateways. Raises DirectoryUnavailable.
        """
        registry, deployment = self._registry, self._service.deployment
        if registry is None or not deployment:
            return alone
        asked = asyncio.get_running_loop().run_in_executor(self._threads, query, registry, deployment)
        try:
            return await asyncio.wait_for(asked, ANSWER_SECONDS)
        except asyncio.TimeoutError as error:
            raise DirectoryUnavailable(f"the store has not answered for {ANSWER_SECONDS:g} s") from error
        except StoreError as error:
            raise DirectoryUnavailable(str(error)) from error


def _records_of(store: Store, server_ids: Collection[str]) -> PeerRecords:
    kernels, sessions = [], []
    for rows in map(store.rows_of, server_ids):
        models = {record.kernel_id: _kernel_model(record) for record in rows.kernels}
        makers = {record.kernel_id: str(record.manager.get("maker", "")) for record in rows.kernels}
        kernels += [(record.owner, makers[record.kernel_id], models[record.kernel_id]) for record in rows.kernels]
        sessions += [
            (session.owner, makers[session.kernel_id], session_model(session, models[session.kernel_id]))
            for session in rows.sessions
            if session.kernel_id in models
        ]
    return PeerRecords(kernels=tuple(kernels), sessions=tuple(sessions))


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
