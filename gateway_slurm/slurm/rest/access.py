"""Cluster access by slurmrestd."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable

from gateway_slurm.environment import PERSONAL, without
from gateway_slurm.slurm.access import AcceptLauncher, ClusterAccess
from gateway_slurm.slurm.rest.driver import RestDriver, Slurmrestd
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.slurm.sudo.runner import process_user
from gateway_slurm.slurm.url import ClusterUrl


class RestAccess(ClusterAccess):
    """Requests to slurmrestd, each with the token of the user whose driver sends it.

    ``runner`` runs the admin's own commands (``account_command``, ``rest_token_command``) on this machine.
    ``user`` is Slurm's name of this process's user; empty if it is the Unix name.
    """

    def __init__(self, runner: Runner, rest: Slurmrestd, *, user: str, log: logging.Logger) -> None:
        super().__init__(runner)
        self._rest, self._user, self.log = rest, user, log

    @property
    def user(self) -> str:
        return self._user or process_user()

    def driver(self, user: str) -> RestDriver:
        """The driver that acts as ``user``. Raises ValueError for a name that no user can have."""
        # A driver may be made before the service sets ``find_launcher``.
        return RestDriver(self._rest, user, find_launcher=lambda jobid: self.find_launcher(jobid))

    def check(self) -> None:
        """Return: slurmrestd needs no command on this machine."""

    async def connect(self) -> str:
        version = await self._rest.version(self.user)
        return f"{self._rest.client} accepts {self.user}'s token and serves {version.name}"

    def environment(self, environment: dict[str, str]) -> dict[str, str]:
        """Return the environment without this process's user's variables: the nodes may have other home directories."""
        return without(PERSONAL, environment)

    async def open(self, accept: AcceptLauncher, changed: Callable[[], None]) -> None:
        """Warn if tokens are sent unencrypted. Nothing is opened: launchers dial this server directly."""
        url = self._rest.client.url
        if not url.tls and not _is_this_machine(url):
            self.log.warning(
                "SlurmService.cluster: tokens are sent to %s unencrypted, and can be read on the network: "
                "use rest+https",
                url.base,
            )

    async def close(self) -> None:
        self._rest.client.close()


def _is_this_machine(url: ClusterUrl) -> bool:
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return url.host == "localhost"
