"""As which Unix user an owner's jobs are submitted and asked about, and for whom there may be any."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from gateway_slurm.allocations.owners import EverybodysSlurm
from gateway_slurm.config import ServiceSettings
from gateway_slurm.environment import without_personal
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.access import Reach
from gateway_slurm.slurm.account import Account, resolve_account
from gateway_slurm.slurm.driver import SlurmDriver, SlurmJobs
from gateway_slurm.slurm.sudo.runner import check_user, process_user
from gateway_slurm.store import Registry


class SlurmUsers:
    """By the admin's settings (``run_as`` and its kin); ``reach`` is the process's own user's way to Slurm."""

    def __init__(self, settings: ServiceSettings, reach: Reach) -> None:
        self._settings, self._reach, self._runner = settings, reach, reach.runner

    def user_of(self, owner: str) -> str:
        """The Unix user whose jobs the owner's are to Slurm."""
        return owner if owner and self._settings.run_as == "user" else self._reach.user

    def driver_of(self, owner: str) -> SlurmDriver:
        """The way to Slurm as that user."""
        return self._reach.driver(self.user_of(owner))

    def driver_for_all(self, registry: Registry, owner_of: Callable[[str], str | None]) -> SlurmJobs:
        """The way to the jobs of all owners, also of those that a dead server may have left."""
        own = self._reach.driver(self._reach.user)
        if self._settings.run_as == "self":
            return own

        async def driver_of(owner: str) -> SlurmDriver:
            await self.admit(owner)
            return self.driver_of(owner)

        return EverybodysSlurm(own, registry, owner_of=owner_of, driver_of=driver_of)

    async def log_end(self, path: str) -> str:
        """The end of a launcher's log, where this process's user can read it; else empty."""
        return await self._reach.log_end(path)

    async def admit(self, owner: str) -> None:
        """Raise NotAllowed for an owner as whose Unix user no kernels are run."""
        settings = self._settings
        if settings.run_as == "user":
            min_uid, allow_own = settings.min_user_uid, settings.allow_own_user
            # In a thread: the user may be known to a directory service only.
            await asyncio.to_thread(check_user, owner or process_user(), min_uid=min_uid, allow_own=allow_own)

    async def account(self, request: KernelRequest, owner: str) -> Account:
        """The budget account of the request's project, and the environment of its jobs."""
        if not request.project:
            return Account("", {})
        settings = self._settings
        return await resolve_account(
            request.project,
            settings.account_command,
            self._runner,
            variable=settings.account_variable,
            user=self.user_of(owner),
        )

    def environment(self, owner: str, environment: dict[str, str]) -> dict[str, str]:
        """A kernel's environment, without what is this process's user's where the kernel is another's."""
        if self.user_of(owner) == self._reach.user:
            return self._reach.environment(environment)
        return without_personal(environment, os.environ)
