"""Made from the admin's settings: the access to the cluster, and the Unix user that acts for each owner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway_slurm.allocations.owners import MultiUserSlurm
from gateway_slurm.config import ServiceSettings, port_range
from gateway_slurm.environment import PERSONAL, without
from gateway_slurm.errors import ConfigError
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.access import ClusterAccess, LocalAccess
from gateway_slurm.slurm.account import Account, resolve_account
from gateway_slurm.slurm.driver import SlurmDriver, SlurmJobs
from gateway_slurm.slurm.model import ClusterInfo
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.slurm.sudo.runner import check_user, process_user
from gateway_slurm.slurm.url import ClusterUrl, parse_cluster_url
from gateway_slurm.store import Registry


def cluster_access(settings: ServiceSettings) -> ClusterAccess:
    """The access that ``SlurmService.cluster`` names; nothing is connected yet.

    Raises ConfigError for settings that contradict one another.
    """
    url = parse_cluster_url(settings.cluster)
    if url.kind == "ssh":
        return _ssh_access(settings, url)
    runner = Runner(
        search_path=settings.slurm_path or None,
        slurm_conf=settings.slurm_conf or None,
        timeout=settings.command_timeout,
    )
    if url.kind == "rest":
        return _rest_access(settings, url, runner)
    return LocalAccess(runner, as_user_command=settings.as_user_command, command_timeout=settings.command_timeout)


def _ssh_access(settings: ServiceSettings, url: ClusterUrl) -> ClusterAccess:
    # Importing Paramiko takes a sixth of a second, which other clusters need not spend.
    from gateway_slurm.slurm.ssh.access import SshAccess
    from gateway_slurm.slurm.ssh.config import resolve_destination
    from gateway_slurm.slurm.ssh.connection import SshConnection
    from gateway_slurm.slurm.ssh.login import Credentials
    from gateway_slurm.slurm.ssh.runner import SshRunner

    if settings.run_as != "self":
        raise ConfigError(
            "SlurmService.run_as: jobs as other users need a helper on this machine, and over SSH all jobs belong to "
            "the user who logs in; set it to 'self'"
        )
    destination = resolve_destination(
        url,
        config_file=settings.ssh_config,
        identity_files=tuple(settings.ssh_identity_files),
        known_hosts=tuple(settings.ssh_known_hosts),
    )
    connection = SshConnection(
        destination,
        Credentials(settings.ssh_password_file),
        python=settings.ssh_python,
        timeout=settings.ssh_timeout,
        heartbeat=settings.heartbeat,
        log=settings.log,
    )
    runner = SshRunner(connection, settings.slurm_path or None, settings.slurm_conf or None, settings.command_timeout)
    low, high = port_range(settings.relay_port) or (0, 0)
    return SshAccess(
        runner,
        relay=settings.relay,
        relay_ports=range(low, high + 1),
        relay_address=settings.relay_address,
        log=settings.log,
    )


def _rest_access(settings: ServiceSettings, url: ClusterUrl, runner: Runner) -> ClusterAccess:
    # The HTTP client is imported for REST only, too.
    from gateway_slurm.slurm.rest.access import RestAccess
    from gateway_slurm.slurm.rest.driver import Slurmrestd
    from gateway_slurm.slurm.rest.http import RestClient
    from gateway_slurm.slurm.rest.tokens import CommandTokens, FileTokens

    if bool(settings.rest_token_file) == bool(settings.rest_token_command):
        raise ConfigError(
            f"SlurmService.cluster is {url}: set one of SlurmService.rest_token_file and rest_token_command, "
            "which say where tokens for slurmrestd come from"
        )
    client = RestClient(url, ca_file=settings.rest_ca_file, timeout=settings.command_timeout, counts=runner.counts)
    by_command = CommandTokens(settings.rest_token_command, runner)
    tokens = FileTokens(settings.rest_token_file) if settings.rest_token_file else by_command
    return RestAccess(runner, Slurmrestd(client, tokens), user=settings.rest_user, log=settings.log)


class SlurmUsers:
    """The Unix user that acts for each owner of kernels, by ``run_as`` and the settings beside it.

    An owner is a user's name, or empty for the user of this process.
    """

    def __init__(self, settings: ServiceSettings, access: ClusterAccess) -> None:
        self._settings, self._access = settings, access

    def user_of(self, owner: str) -> str:
        """The Unix user who owns this owner's jobs in Slurm."""
        return owner if owner and self._settings.run_as == "user" else self._access.user

    def driver_of(self, owner: str) -> SlurmDriver:
        """The driver that acts as that user."""
        return self._access.driver(self.user_of(owner))

    async def cluster_info(self) -> ClusterInfo:
        """Ask Slurm about its cluster, as this process's own user. Raises SlurmError.

        The configuration belongs to no user, and the helper of ``run_as`` runs no command that shows it.
        """
        return await self._access.driver(self._access.user).cluster_info()

    async def log_end(self, owner: str, path: str) -> str | None:
        """The end of a log that a job of ``owner`` wrote (``ClusterAccess.log_end``).

        None where another Unix user wrote it: this process may read what that user may not, and its home is another.
        """
        return await self._access.log_end(path) if self.user_of(owner) == self._access.user else None

    def all_jobs(self, registry: Registry, owner_of: Callable[[str], str | None]) -> SlurmJobs:
        """Queries about the jobs of all owners, jobs that a dead server may have left included.

        ``owner_of`` returns the owner of a job that this process has.
        """
        process_driver = self._access.driver(self._access.user)
        if self._settings.run_as == "self":
            return process_driver

        async def driver_of(owner: str) -> SlurmDriver:
            await self.check_allowed(owner)
            return self.driver_of(owner)

        return MultiUserSlurm(process_driver, registry, owner_of=owner_of, driver_of=driver_of)

    async def check_allowed(self, owner: str) -> None:
        """Raise NotAllowed for an owner whose Unix user may not run kernels."""
        settings = self._settings
        if settings.run_as == "user":
            min_uid, allow_own = settings.min_user_uid, settings.allow_own_user
            # In a thread: only a directory service may know the user.
            await asyncio.to_thread(check_user, owner or process_user(), min_uid=min_uid, allow_own=allow_own)

    async def prepare_start(self, request: KernelRequest, owner: str) -> Account:
        """Check all that comes before a job; return the project's budget account and the environment of its jobs.

        Raises NotAllowed for the owner's Unix user, SshError where no launcher could reach this server, and
        RequestError where the project has no account.
        """
        await self.check_allowed(owner)
        await self._access.wait_ready()
        if not request.project:
            return Account("", {})
        command, variable = self._settings.account_command, self._settings.account_variable
        return await resolve_account(
            request.project, command, self._access.runner, variable=variable, user=self.user_of(owner)
        )

    def environment(self, owner: str, environment: dict[str, str]) -> dict[str, str]:
        """A kernel's environment, without this process's user's own variables where another user owns the kernel."""
        if self.user_of(owner) == self._access.user:
            return self._access.environment(environment)
        return without(PERSONAL, environment)
