"""How the parts that see to one owner's allocations are put together."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from gateway_slurm.allocation import Owner
from gateway_slurm.allocations import Allocations
from gateway_slurm.books import Books
from gateway_slurm.keeping import Keeping
from gateway_slurm.launching import LauncherSettings, Launching
from gateway_slurm.leaving import Leaving
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.owners import Owners
from gateway_slurm.settings import ServiceSettings
from gateway_slurm.slurm.watcher import JobWatcher
from gateway_slurm.slurmusers import SlurmUsers
from gateway_slurm.store import RENEW_SECONDS, Registry
from gateway_slurm.timelimits import TimeLimits


def assemble(
    owner: str,
    *,
    settings: ServiceSettings,
    users: SlurmUsers,
    owners: Owners,
    socket: ResponseSocket,
    watcher: JobWatcher,
    keeping: Keeping,
    registry: Registry,
    endpoints: Callable[[], list[str]],
    addresses: Callable[[], list[str]],
) -> Allocations:
    """A new owner's; all owners share the response socket, the watcher and the records."""
    driver, log = users.driver_of(owner), settings.log
    launching = Launching(
        driver,
        socket,
        _launcher_settings(settings),
        registry=registry,
        endpoints=endpoints,
        addresses=addresses,
        log_end=users.log_end,
        new_token=lambda: secrets.token_bytes(32),
        log=log,
        on_up=lambda allocation: allocations.linked(allocation),
        on_lost=lambda allocation: allocations.link_lost(allocation),
        on_walltime=lambda allocation, launcher, end, due: limits.look(allocation, launcher, end, due=due),
    )
    books = Books(registry)
    keeping.add(books)
    limits = TimeLimits(driver, books, warnings=settings.walltime_warnings, log=log)
    leaving = Leaving(driver, socket, watcher, keeping, books, idle_timeout=settings.idle_timeout, log=log)
    told_apart = settings.run_as == "user"
    allocations = Allocations(
        driver,
        watcher,
        launching,
        leaving,
        keeping,
        books,
        owner=Owner(
            name=owner,
            user=users.user_of(owner),
            may_adopt=lambda jobid: owners.may_adopt(owner, jobid, told_apart=told_apart),
        ),
        min_time_left=settings.min_time_left,
        log=log,
    )
    return allocations


def _heartbeat(settings: ServiceSettings) -> float:
    """Seconds. Where others take over, a launcher misses a server that hangs as soon as the lease is over."""
    takes_over = settings.deployment and settings.store_url
    return min(settings.heartbeat, RENEW_SECONDS) if takes_over else settings.heartbeat


def _launcher_settings(settings: ServiceSettings) -> LauncherSettings:
    return LauncherSettings(
        pythons=tuple(settings.launcher_python),
        log_dir=settings.log_directory,
        heartbeat=_heartbeat(settings),
        orphan_timeout=settings.orphan_timeout,
        link_timeout=settings.link_timeout,
        queue_timeout=settings.queue_timeout,
        walltime_warnings=tuple(settings.walltime_warnings),
        kept_output=settings.kept_output * 2**20,
    )
