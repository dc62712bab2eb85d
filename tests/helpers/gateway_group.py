"""Several gateways on one store, as processes, and the store's records of them."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import sqlalchemy as sa

from gateway_slurm.gateway.peers.client import FORWARDED_BY
from helpers.gateway_process import Gateway, running_gateway
from helpers.kernel_clients import READY, poll_async, write_admin_settings
from helpers.notebook_server import Server
from helpers.private_slurm import poll


@dataclass
class Deployment:
    """Gateways on one store, by name; ``start`` adds one."""

    base: Path
    store: sa.Engine
    _stack: ExitStack
    gateways: dict[str, Gateway] = field(default_factory=dict)

    def start(self, name: str, *options: str) -> Gateway:
        gateway = self._stack.enter_context(running_gateway(self.base / name, *options))
        if any("certfile" in option for option in options):
            gateway = replace(gateway, url=gateway.url.replace("http:", "https:"))
        self.gateways[name] = gateway
        assert poll(lambda: is_ready(gateway), timeout=READY), gateway.log.read_text()
        return gateway

    def owner_of(self, kernel_id: str) -> str:
        """The id of the server that owns the kernel on record; empty for none."""
        question = sa.text("SELECT server_id FROM kernels WHERE kernel_id = :kernel_id")
        with self.store.connect() as connection:
            owners = list(connection.execute(question, {"kernel_id": kernel_id}).scalars())
        assert len(owners) < 2
        return owners[0] if owners else ""

    def server_of(self, gateway: Gateway) -> str:
        """The server id of a gateway on record."""
        question = sa.text("SELECT server_id FROM servers WHERE pid = :pid")
        with self.store.connect() as connection:
            return str(connection.execute(question, {"pid": gateway.process.pid}).scalar_one())

    async def know_each_other(self) -> None:
        """Wait until each gateway has given its launchers the addresses of another gateway."""
        for gateway in self.gateways.values():
            told = await poll_async(
                lambda log=gateway.log: "other servers that launchers may dial" in log.read_text(), timeout=READY
            )
            assert told, gateway.log.read_text()

    async def holders(self, kernel_id: str, user: str = "alice") -> list[str]:
        """The names of the gateways that own the kernel by their own word."""
        found = []
        for name, gateway in self.gateways.items():
            if gateway.process.poll() is None and await has_itself(gateway.of(user), kernel_id):
                found.append(name)
        return found


def is_ready(gateway: Gateway) -> bool:
    """Whether a load balancer would send requests to the gateway."""
    scheme, _slashes, host = gateway.url.partition("://")
    tls = ssl._create_unverified_context()  # noqa: S323 - whether it is up is all that is asked
    connection = (
        http.client.HTTPSConnection(host, timeout=READY, context=tls)
        if scheme == "https"
        else http.client.HTTPConnection(host, timeout=READY)
    )
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


async def has_itself(server: Server, kernel_id: str) -> bool:
    """Whether the gateway itself owns the kernel, asked as another gateway asks."""
    path = f"/api/kernels/{kernel_id}"
    return (await server.request("GET", path, headers={FORWARDED_BY: "test"}, raise_error=False)).code == 200


@contextmanager
def deployment(base: Path, url: str) -> Iterator[Deployment]:
    """A store and the settings for gateways on it."""
    with ExitStack() as stack:
        settings = write_admin_settings(store_url=url, orphan_timeout=120)
        engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        try:
            yield Deployment(base, engine, stack)
        finally:
            stack.close()
            engine.dispose()
            settings.unlink(missing_ok=True)


async def ids(server: Server, path: str) -> list[str]:
    """The ids in a list of the REST API, sorted."""
    return sorted(item["id"] for item in await server.json("GET", path))
