"""Slurm by slurmrestd, with tokens as the admin's settings have them."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable

from gateway_slurm.config import ServiceSettings
from gateway_slurm.environment import without_personal
from gateway_slurm.errors import ConfigError
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.slurm.access import Reach
from gateway_slurm.slurm.rest.driver import Rest, RestSlurm
from gateway_slurm.slurm.rest.http import RestClient
from gateway_slurm.slurm.rest.tokens import CommandTokens, FileTokens
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.slurm.sudo.runner import process_user
from gateway_slurm.slurm.url import ClusterUrl


def rest_reach(settings: ServiceSettings, url: ClusterUrl, runner: Runner) -> RestReach:
    """Nothing is asked yet. Raises ConfigError when it is not said, once, where tokens come from."""
    if bool(settings.rest_token_file) == bool(settings.rest_token_command):
        raise ConfigError(
            f"SlurmService.cluster is {url}: for that, one of SlurmService.rest_token_file and rest_token_command "
            "must be set, which say where tokens for slurmrestd come from"
        )
    client = RestClient(url, ca_file=settings.rest_ca_file, timeout=settings.command_timeout, counts=runner.counts)
    by_command = CommandTokens(settings.rest_token_command, runner)
    return RestReach(
        settings, runner, Rest(client, FileTokens(settings.rest_token_file) if settings.rest_token_file else by_command)
    )


class RestReach(Reach):
    """By requests to slurmrestd, each user's with a token of theirs.

    ``runner`` runs the admin's own commands (``account_command``, ``rest_token_command``) on this machine.
    """

    def __init__(self, settings: ServiceSettings, runner: Runner, rest: Rest) -> None:
        super().__init__(settings, runner)
        self._rest = rest

    @property
    def user(self) -> str:
        """The name by which Slurm knows this process's own user."""
        return self._settings.rest_user or process_user()

    def driver(self, user: str) -> RestSlurm:
        """The way to Slurm as ``user``; ValueError for a name that is none."""
        # Drivers may be made before ``inside`` is set.
        return RestSlurm(self._rest, user, inside=lambda jobid: self.inside(jobid))

    def check(self) -> None:
        """Nothing of Slurm's is needed on this machine."""

    async def arrive(self) -> str:
        """Ask slurmrestd which versions it speaks, with this user's token."""
        version = await self._rest.version(self.user)
        return f"{self._rest.client} takes {self.user}'s token and speaks {version.name}"

    def environment(self, environment: dict[str, str]) -> dict[str, str]:
        """Without what is of this process's user: nobody says that the nodes have the same home directories."""
        return without_personal(environment, os.environ)

    async def open(self, socket: ResponseSocket, changed: Callable[[], None]) -> None:
        """Launchers come directly; say so if tokens go unencrypted."""
        url = self._rest.client.url
        if not url.tls and not _is_this_machine(url):
            self._settings.log.warning(
                "SlurmService.cluster: tokens go to %s unencrypted, for anybody on the way to read: use rest+https",
                url.base,
            )

    async def close(self) -> None:
        """End the requests that are under way."""
        self._rest.close()


def _is_this_machine(url: ClusterUrl) -> bool:
    try:
        return ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return url.host == "localhost"
