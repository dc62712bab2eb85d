"""Cluster access over SSH: a login node runs Slurm's commands and relays launchers' connections."""

from __future__ import annotations

import base64
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

from gateway_slurm.environment import MACHINE, PERSONAL, without
from gateway_slurm.errors import ConfigError, GatewaySlurmError, SlurmError, SshError
from gateway_slurm.slurm.access import (
    MAX_LOG_END,
    MAX_LOG_READ,
    MAX_LOGS,
    AcceptLauncher,
    ClusterAccess,
    LogFile,
    LogPart,
)
from gateway_slurm.slurm.driver import CommandLineDriver, SlurmDriver
from gateway_slurm.slurm.ssh.relay import SshRelay
from gateway_slurm.slurm.ssh.runner import SshRunner


class SshAccess(ClusterAccess):
    """Slurm's commands on a login node, and a relay on it for launchers that cannot dial this server.

    ``relay`` says whether launchers use the relay: ``auto``, ``always`` or ``never``. The relay listens on the first
    free port of ``relay_ports`` (0: any). Launchers first dial the login node's address ``relay_address``, unless it
    is empty. Raises ConfigError for an address with a port.
    """

    def __init__(
        self, runner: SshRunner, *, relay: str, relay_ports: range, relay_address: str, log: logging.Logger
    ) -> None:
        if relay_address.startswith("[") or not {"/", "@", " "}.isdisjoint(relay_address):
            raise ConfigError(f"SlurmService.relay_address must be a host name or an IP address, not {relay_address!r}")
        super().__init__(runner)
        self.runner: SshRunner = runner
        self._connection = runner.connection
        self._use_relay, self._ports, self._address = relay, relay_ports, relay_address
        self.log = log
        self.relay: SshRelay | None = None

    @property
    def user(self) -> str:
        return self._connection.destination.user

    def driver(self, user: str) -> SlurmDriver:
        """The driver that acts as the user who logs in; over SSH there are no other users (``run_as`` is ``self``)."""
        return CommandLineDriver(self.runner)

    async def connect(self) -> str:
        host = await self.runner.connect()
        return f"logged in to {self._connection.destination}, which is {host}"

    async def log_end(self, path: str) -> str | None:
        """The end of the file on the login node, which usually shares its home directories with the nodes."""
        program = 'case $1 in "~/"*) set -- "$HOME/${1#"~/"}" "$2";; esac; exec tail -c "$2" -- "$1"'
        try:
            result = await self.runner.run(["sh", "-c", program, "sh", path, str(MAX_LOG_END)])
        except GatewaySlurmError:
            return None
        return result.stdout if result.exit_status == 0 else None

    async def logs(self, directory: str) -> list[LogFile]:
        """List the files on the login node, by GNU find."""
        program = (
            'case $1 in "~/"*) set -- "$HOME/${1#"~/"}";; esac; [ -d "$1" ] || exit 0; '
            'exec find -H "$1" -mindepth 1 -maxdepth 1 -type f -uid "$(id -u)" -printf "%s %T@ %f\\0"'
        )
        result = await self.runner.run(["sh", "-c", program, "sh", directory])
        if result.exit_status != 0:
            raise SlurmError(f"the logs in {directory} on the login node cannot be listed: {result.stderr[:500]}")
        found = []
        for line in result.stdout.split("\0")[:MAX_LOGS]:
            with contextlib.suppress(ValueError):
                size, changed, name = line.split(" ", 2)
                found.append(LogFile(name, int(size), float(changed)))
        return found

    async def read_log(self, path: str, start: int) -> LogPart:
        """Read the file on the login node."""
        program = (
            'case $1 in "~/"*) set -- "$HOME/${1#"~/"}" "$2" "$3";; esac; size=$(wc -c <"$1") || exit 1; first=$2; '
            'if [ "$first" -lt 0 ]; then first=$((size > $3 ? size - $3 : 0)); '
            'elif [ "$first" -gt "$size" ]; then first=0; fi; '
            'echo "$first"; tail -c "+$((first + 1))" -- "$1" | head -c "$3" | base64'
        )
        result = await self.runner.run(["sh", "-c", program, "sh", path, str(start), str(MAX_LOG_READ)])
        first, _, content = result.stdout.partition("\n")
        if result.exit_status != 0 or not first.isdecimal():
            return LogPart(max(0, start), b"")
        return LogPart(int(first), base64.b64decode(content))

    def environment(self, environment: dict[str, str]) -> dict[str, str]:
        """Return the environment without variables of this machine and its user; jobs have the login node's."""
        return without(MACHINE | PERSONAL, environment)

    async def open(self, accept: AcceptLauncher, changed: Callable[[], None]) -> None:
        """Begin to set up the relay; ``wait_ready`` returns when it listens."""
        if self._use_relay != "never":
            self.relay = SshRelay(
                self._connection, accept, ports=self._ports, address=self._address, changed=changed, log=self.log
            )

    @property
    def relays(self) -> list[dict[str, Any]]:
        return self.relay.records if self.relay is not None else []

    def adopt_relays(self, relays: Iterable[dict[str, Any]]) -> None:
        if self.relay is not None:
            self.relay.adopt(relays)

    async def wait_ready(self) -> None:
        """Wait for the relay. Raises SshError if it fails and launchers must use it (``always``)."""
        try:
            if self.relay is not None:
                await self.relay.wait_ready()
        except SshError:
            if self._use_relay == "always":
                raise

    def endpoints(self, direct: list[str]) -> list[str]:
        """Return the relay's addresses last, until a launcher has used one: then the direct ones do not work."""
        if self.relay is None:
            return direct
        if self._use_relay == "always":
            return self.relay.endpoints
        return [*self.relay.endpoints, *direct] if self.relay.was_used else [*direct, *self.relay.endpoints]

    async def close(self) -> None:
        if self.relay is not None:
            await self.relay.close()
        await self._connection.close()
