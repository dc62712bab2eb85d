"""How this process reaches Slurm, and launchers this process: what is made of ``SlurmService.cluster``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from gateway_slurm.allocations.launcher import StepsInside
from gateway_slurm.config import ServiceSettings
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.slurm.driver import CommandLineSlurm, SlurmDriver
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.slurm.sudo.runner import UserRunner, process_user
from gateway_slurm.slurm.url import parse_cluster_url

LOG_END: Final = 8000
"""Bytes of a log that are read."""


class Reach:
    """By Slurm's commands on this machine. Its owner calls ``open`` and ``close`` on the service's loop.

    ``inside`` finds our launcher that holds a job, if it is linked to this process; a service sets it before drivers
    are used.
    """

    def __init__(self, settings: ServiceSettings, runner: Runner) -> None:
        self.runner = runner
        self.inside: Callable[[str], StepsInside | None] = lambda _jobid: None
        self._settings = settings

    @property
    def user(self) -> str:
        """The Unix user whose jobs ours are to Slurm."""
        return process_user()

    def driver(self, user: str) -> SlurmDriver:
        """The way to Slurm as ``user``."""
        if user == self.user:
            return CommandLineSlurm(self.runner)
        command, timeout = self._settings.as_user_command, self._settings.command_timeout
        return CommandLineSlurm(UserRunner(user, command, timeout=timeout, counts=self.runner.counts))

    def check(self) -> None:
        """Raise SlurmError where Slurm cannot be reached, as far as this machine knows; Slurm is not asked."""
        self.runner.find(["sbatch"])

    async def arrive(self) -> str:
        """Go as far as Slurm is not needed, and say where that is. Raises SlurmError."""
        return f"sbatch is {self.runner.find(['sbatch'])}"

    async def log_end(self, path: str) -> str:
        """The end of a file that a job of this process's user has written, as a launcher's log; empty where there is
        none. ``~/`` is the user's home. Where home is not shared with the nodes it is not here.
        """
        return await asyncio.to_thread(_end_of, path)

    def environment(self, environment: dict[str, str]) -> dict[str, str]:
        """A kernel's environment, without what is of no use on the cluster."""
        return environment

    async def open(self, socket: ResponseSocket, changed: Callable[[], None]) -> None:
        """Have launchers come to ``socket`` by further ways; ``changed`` is called when ``endpoints`` are others."""

    @property
    def relays(self) -> list[dict[str, Any]]:
        """What a later server needs to be found by launchers that come by a relay of ours (``ServerRecord.relays``)."""
        return []

    def inherit(self, relays: Iterable[dict[str, Any]]) -> None:
        """Be where these relays of dead servers were, if that is possible."""

    async def prepare(self) -> None:
        """Return when ``endpoints`` is whole. Raises SshError where no launcher could come."""

    def endpoints(self, own: list[str]) -> list[str]:
        """What launchers dial, in this order, where ``own`` are this server's addresses."""
        return own

    async def close(self) -> None:
        """End what was opened; what was written to the links goes out first."""


def make_reach(settings: ServiceSettings) -> Reach:
    """By the admin's settings. Raises ConfigError for settings that do not go together."""
    url = parse_cluster_url(settings.cluster)
    if url.kind == "ssh":
        # Paramiko takes a sixth of a second to import, for those who need it only.
        from gateway_slurm.slurm.ssh.access import ssh_reach

        return ssh_reach(settings, url)
    runner = Runner(
        search_path=settings.slurm_path or None,
        slurm_conf=settings.slurm_conf or None,
        timeout=settings.command_timeout,
    )
    if url.kind == "rest":
        # An HTTP client, likewise.
        from gateway_slurm.slurm.rest.access import rest_reach

        return rest_reach(settings, url, runner)
    return Reach(settings, runner)


def _end_of(path: str) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_END))
            return file.read(LOG_END).decode(errors="replace")
    except (OSError, RuntimeError):  # there is no such file, or no such home
        return ""
