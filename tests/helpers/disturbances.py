"""What breaks under a running gateway, each as one function that returns once it is mended: ``KINDS`` is the table."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from gateway_slurm.testing import PrivateCluster
from helpers.chaos import KILL, TERM, RestartedGateway
from helpers.daemons import kill_daemon, start_daemon, stop_daemon
from helpers.postgres import PrivatePostgres

# pidfd_getfd(2), Linux 5.6; the C library has no name for it that all have.
SYS_PIDFD_GETFD = 438


@dataclass
class World:
    """What there is to break."""

    gateway: RestartedGateway
    cluster: PrivateCluster
    state: Path
    """The gateway's state directory: a small file system of its own, where we may mount one."""
    rng: random.Random
    stopped: float = 20.0
    """Seconds that a gateway is stopped by SIGSTOP: longer than its lease."""
    full: float = 3.0
    """Seconds that the store's disk is full, or its database away."""
    postgres: PrivatePostgres | None = None
    """The store's database, where it is no file."""


async def kill_gateway(world: World) -> None:
    """``kill -9``, and the next one."""
    assert await asyncio.to_thread(world.gateway.end, signal.SIGKILL) == -signal.SIGKILL
    await asyncio.to_thread(world.gateway.start)


async def end_gateway(world: World) -> None:
    """SIGTERM, as an update does it, and the next one."""
    await asyncio.to_thread(world.gateway.end)
    await asyncio.to_thread(world.gateway.start)


async def stop_gateway(world: World) -> None:
    """It sleeps through its lease, as on a machine that is suspended."""
    world.gateway.process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(world.stopped)
    finally:
        world.gateway.process.send_signal(signal.SIGCONT)


async def cut_links(world: World) -> None:
    """Every connection between the gateway and launchers breaks."""
    assert await asyncio.to_thread(_shut_down_links, world.gateway.process.pid) > 0


async def restart_slurmctld(world: World) -> None:
    """Slurm's controller, as systemd restarts it; one that is killed forgets the jobs of its last seconds."""
    await asyncio.to_thread(stop_daemon, world.cluster, "slurmctld")
    await asyncio.to_thread(start_daemon, world.cluster, "slurmctld")


async def restart_munged(world: World) -> None:
    """For a moment no process can authenticate to Slurm."""
    await _restart_daemon(world, "munged")


async def restart_slurmd(world: World) -> None:
    """A node's slurmd is killed and started; what runs there is not its business."""
    await _restart_daemon(world, world.rng.choice(["c1", "c2", "c3", "c4"]))


async def fill_disk(world: World) -> None:
    """For a while nothing can be written to the store's disk; meanwhile the gateway has something to write."""
    with disk_full(world.state, world.gateway.process.pid):
        await _use_sessions(world)


async def restart_postgres(world: World) -> None:
    """The database crashes and is away for a while; meanwhile the gateway has something to write."""
    assert world.postgres is not None
    await asyncio.to_thread(world.postgres.down, signal.SIGQUIT)
    try:
        await _use_sessions(world)
    finally:
        await asyncio.to_thread(world.postgres.up)


async def _use_sessions(world: World) -> None:
    """Open a document, for as long as the store takes nothing; the gateway answers as ever."""
    alice = world.gateway.of("alice")
    kernel = (await alice.json("GET", "/api/kernels"))[0]
    body = {"name": "", "path": f"{world.rng.random()}.ipynb", "type": "notebook", "kernel": {"id": kernel["id"]}}
    session = await alice.json("POST", "/api/sessions", body)
    await asyncio.sleep(world.full)
    assert await alice.status("GET", f"/api/sessions/{session['id']}") == 200


KINDS: dict[str, Callable[[World], Awaitable[None]]] = {
    KILL: kill_gateway,
    TERM: end_gateway,
    "SIGSTOP of the gateway": stop_gateway,
    "link cut": cut_links,
    "slurmctld restart": restart_slurmctld,
    "munged restart": restart_munged,
    "slurmd restart": restart_slurmd,
    "disk full for the store": fill_disk,
    "PostgreSQL restart": restart_postgres,
}
# What is done to the store is not the same for all.
STORES = {"sqlite": "disk full for the store", "postgresql": "PostgreSQL restart"}
# These end the process that has the kernels.
RESTARTS = (KILL, TERM)


async def _restart_daemon(world: World, name: str) -> None:
    await asyncio.to_thread(kill_daemon, world.cluster, name)
    await asyncio.to_thread(start_daemon, world.cluster, name)


# -- links ---------------------------------------------------------------------------------------------


def _shut_down_links(pid: int) -> int:
    """Shut down what launchers have connected to this process; how many there were.

    Done to copies of the process's own sockets (pidfd_getfd(2)), which needs no rights over a child of ours.
    """
    server = psutil.Process(pid)
    connections = server.net_connections("tcp")
    # The web port is the clients': they have no part in this.
    response_ports = {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN} - {_web_port(server)}
    links = [one.fd for one in connections if one.status == "ESTABLISHED" and one.laddr.port in response_ports]
    pidfd = os.pidfd_open(pid)
    try:
        return sum(_shut_down(pidfd, number) for number in links)
    finally:
        os.close(pidfd)


def _web_port(server: psutil.Process) -> int:
    (option,) = [item for item in server.cmdline() if item.startswith("--port=")]
    return int(option.partition("=")[2])


def _shut_down(pidfd: int, number: int) -> bool:
    descriptor = ctypes.CDLL(None, use_errno=True).syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
    if descriptor < 0:
        return False  # closed meanwhile
    with contextlib.suppress(OSError), socket.socket(fileno=descriptor) as copy:
        copy.shutdown(socket.SHUT_RDWR)
    return True


# -- disks ---------------------------------------------------------------------------------------------


@contextmanager
def small_disk(directory: Path, size: str = "16M") -> Iterator[bool]:
    """A file system of its own for ``directory``, where we may mount one; whether it is one."""
    directory.mkdir(mode=0o700, parents=True)
    options = ["-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(directory)]
    mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=True, capture_output=True)


@contextmanager
def disk_full(directory: Path, pid: int) -> Iterator[None]:
    """No byte more for files in ``directory``; where that is no disk of its own, none for ``pid`` anywhere."""
    if os.path.ismount(directory):
        filler = directory / "filler"
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:  # until there is no space left
                    file.write(bytes(4096))
            yield
        finally:
            filler.unlink(missing_ok=True)
        return
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def gone(pid: int, *, timeout: float) -> bool:
    """Whether the process soon is no more."""
    deadline = time.monotonic() + timeout
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
