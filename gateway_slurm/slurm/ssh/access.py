"""Slurm by a login node, and launchers by a relay there, as the admin's settings have it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from gateway_slurm.config import ServiceSettings, port_range
from gateway_slurm.environment import without_machine, without_personal
from gateway_slurm.errors import ConfigError, GatewaySlurmError, SshError
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.slurm.access import LOG_END, Reach
from gateway_slurm.slurm.ssh.config import resolve
from gateway_slurm.slurm.ssh.connection import SshConnection
from gateway_slurm.slurm.ssh.login import Credentials
from gateway_slurm.slurm.ssh.relay import Relay, check_address
from gateway_slurm.slurm.ssh.runner import SshRunner
from gateway_slurm.slurm.url import ClusterUrl


def ssh_reach(settings: ServiceSettings, url: ClusterUrl) -> SshReach:
    """Nothing is connected yet. Raises ConfigError."""
    if settings.run_as != "self":
        raise ConfigError(
            "SlurmService.run_as: users are changed by a helper on this machine, and over SSH all jobs are those of "
            "the one who logs in; set it to 'self'"
        )
    target = resolve(
        url,
        config_file=settings.ssh_config,
        identity_files=tuple(settings.ssh_identity_files),
        known_hosts=tuple(settings.ssh_known_hosts),
    )
    connection = SshConnection(
        target,
        Credentials(settings.ssh_password_file),
        python=settings.ssh_python,
        timeout=settings.ssh_timeout,
        heartbeat=settings.heartbeat,
        log=settings.log,
    )
    timeout = settings.command_timeout
    return SshReach(settings, SshRunner(connection, settings.slurm_path or None, settings.slurm_conf or None, timeout))


class SshReach(Reach):
    """By Slurm's commands on a login node, and a relay there for launchers that reach nothing else."""

    def __init__(self, settings: ServiceSettings, runner: SshRunner) -> None:
        super().__init__(settings, runner)
        self.runner: SshRunner = runner
        self._connection = runner.connection
        self._address = check_address(settings.relay_address)
        self.relay: Relay | None = None

    @property
    def user(self) -> str:
        """The one who logs in."""
        return self._connection.target.user

    async def arrive(self) -> str:
        """Log in, and start the program that runs commands."""
        host = await self.runner.arrive()
        return f"logged in to {self._connection.target}, which is {host}"

    async def log_end(self, path: str) -> str:
        """As it is on the login node, whose home is the nodes' as a rule."""
        program = 'case $1 in "~/"*) set -- "$HOME/${1#"~/"}" "$2";; esac; exec tail -c "$2" -- "$1"'
        try:
            result = await self.runner.run(["sh", "-c", program, "sh", path, str(LOG_END)])
        except GatewaySlurmError:
            return ""
        return result.stdout if result.exit_status == 0 else ""

    def environment(self, environment: dict[str, str]) -> dict[str, str]:
        """Without what is of this machine and of this process's user: the job has the login node's."""
        return without_machine(without_personal(environment, os.environ), os.environ)

    async def open(self, socket: ResponseSocket, changed: Callable[[], None]) -> None:
        """Begin to set the relay up."""
        if self._settings.relay != "never":
            low, high = port_range(self._settings.relay_port) or (0, 0)
            self.relay = Relay(
                self._connection,
                socket,
                ports=range(low, high + 1),
                address=self._address,
                changed=changed,
                log=self._settings.log,
            )

    @property
    def relays(self) -> list[dict[str, Any]]:
        """The relay's ports, and who has them."""
        return self.relay.facts if self.relay is not None else []

    def inherit(self, relays: Iterable[dict[str, Any]]) -> None:
        """The relay listens on the ports of these, too, if they were on the same login node."""
        if self.relay is not None:
            self.relay.inherit(relays)

    async def prepare(self) -> None:
        """Wait for the relay; without it launchers may still reach us directly, unless they must not."""
        if self.relay is None:
            return
        try:
            await self.relay.ready()
        except SshError:
            if self._settings.relay == "always":
                raise

    def endpoints(self, own: list[str]) -> list[str]:
        """The relay's last, until a launcher has come by it: then the others do not work."""
        if self.relay is None:
            return own
        if self._settings.relay == "always":
            return self.relay.endpoints
        both = [self.relay.endpoints, own] if self.relay.worked else [own, self.relay.endpoints]
        return [*both[0], *both[1]]

    async def close(self) -> None:
        """End the relay, then the connection."""
        if self.relay is not None:
            await self.relay.close()
        await self._connection.close()
