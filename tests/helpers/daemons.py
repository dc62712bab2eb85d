"""The daemons of a private Slurm, stopped, killed and started one by one; and its tokens."""

from __future__ import annotations

import signal

from gateway_slurm.testing import PrivateCluster, processes
from gateway_slurm.testing.layout import daemon_commands
from helpers.private_slurm import slurm


def daemon_pids(cluster: PrivateCluster) -> dict[str, int]:
    """The process ids of the running daemons: munged, slurmctld, c1, c2, …"""
    cluster._reap()
    return {name: process.pid for name, process in cluster._require().processes.items() if process.alive()}


def stop_daemon(cluster: PrivateCluster, name: str) -> None:
    """Stop one daemon with SIGTERM. Jobs keep running, as with any Slurm."""
    processes.stop([cluster._require().processes[name]], timeout=10)
    cluster._reap()


def kill_daemon(cluster: PrivateCluster, name: str, number: int = signal.SIGKILL) -> None:
    """Send a signal to one daemon. After SIGKILL, return when the daemon is gone."""
    process = cluster._require().processes[name]
    process.signal(number)
    if number == signal.SIGKILL:
        processes.kill([process])
        cluster._reap()


def start_daemon(cluster: PrivateCluster, name: str) -> None:
    """Start a daemon that was stopped or killed, with the same port and state; return when it is ready."""
    state = cluster._require()
    assert not state.processes[name].alive()
    cluster._start(state, name, daemon_commands(state.layout)[name])
    cluster._await_service(state, name)


def slurm_token(cluster: PrivateCluster, user: str, *, lifespan: int = 3600) -> str:
    """A token for slurmrestd, valid for ``lifespan`` seconds."""
    output = slurm("scontrol", "token", f"username={user}", f"lifespan={lifespan}", cluster=cluster).stdout
    return output.partition("=")[2].strip()
