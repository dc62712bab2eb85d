"""Daemons as processes: start them, find them again from another process, stop them.

A daemon is identified by its process id *and* its start time, so that a reused id is not mistaken for it.
Source: proc(5).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The directories of daemons, which are not in an ordinary user's PATH.
_SYSTEM_PATHS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_POLL_INTERVAL = 0.02
_LOWEST_PORT = 10_000
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


@dataclass(frozen=True)
class Process:
    """A process, distinct from a later one with the same id."""

    pid: int
    start_time: int
    """Clock ticks after boot."""

    def alive(self) -> bool:
        """Whether it still runs. A zombie runs until its last thread has ended, and holds its locks until then."""
        stat = _read_stat(self.pid)
        if stat is None or stat.start_time != self.start_time:
            return False
        return stat.state != "Z" or _threads(self.pid) > 1

    def signal(self, number: int) -> None:
        """Send a signal, unless the process is gone."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass(frozen=True)
class _Stat:
    name: str
    state: str
    parent: int
    start_time: int


def _read_stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name is in parentheses, and can itself contain spaces and parentheses.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return _Stat(name=head.partition("(")[2], state=fields[0], parent=int(fields[1]), start_time=int(fields[19]))


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def search_path() -> str:
    """PATH, followed by the directories of system daemons."""
    return os.pathsep.join([os.environ.get("PATH", ""), *_SYSTEM_PATHS])


def find_program(name: str) -> str | None:
    """The path of a program, or None."""
    return shutil.which(name, path=search_path())


def daemon_environment(slurm_conf: Path, **more: str) -> dict[str, str]:
    """The environment of daemons, without the caller's SLURM_* variables and locale."""
    kept = {name: os.environ[name] for name in ("HOME", "USER", "LOGNAME", "TZ") if name in os.environ}
    return {**kept, "PATH": search_path(), "LC_ALL": "C.UTF-8", "SLURM_CONF": str(slurm_conf), **more}


def spawn(
    argv: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    user: str | None = None,
    prefix: Sequence[str] = (),
) -> tuple[subprocess.Popen[bytes], Process]:
    """Start a daemon in its own session, so that it outlives the caller and the caller's terminal.

    ``user`` is the user that root starts it as, with that user's own group only. ``prefix`` enters its network. The
    caller must keep the Popen, to reap the daemon. Raises FileNotFoundError.
    """
    group = None if user is None else pwd.getpwnam(user).pw_gid
    if prefix and user:
        # Only root can enter a network, so setpriv(1) changes the user inside.
        argv = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--", *argv]
        user = group = None
    argv = [*prefix, *argv]
    program = find_program(argv[0])
    if program is None:
        raise FileNotFoundError(argv[0])
    with log.open("ab") as output:
        child = subprocess.Popen(
            [program, *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            cwd=log.parent,
            start_new_session=True,
            user=user,
            group=group,
            extra_groups=None if user is None else (),
        )
    stat = _read_stat(child.pid)
    # A child has a stat until it is reaped, even if it has died.
    start_time = stat.start_time if stat is not None else 0
    return child, Process(pid=child.pid, start_time=start_time)


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Poll until the condition holds; return False after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL)
    return True


def stop(processes: Iterable[Process], *, timeout: float) -> None:
    """Send SIGTERM to all, and SIGKILL to those that still run after ``timeout`` seconds; return when all are gone."""
    remaining = list(processes)
    for process in remaining:
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGCONT)  # a stopped process would not handle SIGTERM
    if not wait_until(lambda: not any(process.alive() for process in remaining), timeout):
        kill(remaining)


def kill(processes: Iterable[Process]) -> None:
    """Send SIGKILL to all; return when all are gone."""
    remaining = list(processes)
    for process in remaining:
        process.signal(signal.SIGKILL)
    wait_until(lambda: not any(process.alive() for process in remaining), 5)


def job_processes(slurm_conf: Path) -> list[Process]:
    """The processes that this cluster's slurmds started: slurmstepd, the jobs' processes, and their descendants.

    Their environment has Slurm's variables, and the path of this cluster's slurm.conf. A client of the cluster has no
    node name in its environment and does not count.
    """
    stats = {
        int(entry.name): stat
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and (stat := _read_stat(int(entry.name))) is not None and stat.state != "Z"
    }
    found = {pid for pid, stat in stats.items() if _belongs_to_job(pid, stat.name, slurm_conf)}
    while added := {pid for pid, stat in stats.items() if stat.parent in found} - found:
        found |= added
    found.discard(os.getpid())
    return [Process(pid=pid, start_time=stats[pid].start_time) for pid in found]


def _belongs_to_job(pid: int, name: str, slurm_conf: Path) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # the process has ended, or is another user's
        return False
    if f"SLURM_CONF={slurm_conf}".encode() not in variables:
        return False
    return name == "slurmstepd" or any(variable.startswith(b"SLURMD_NODENAME=") for variable in variables)


def listening(pid: int, port: int) -> bool:
    """Whether a process listens on the TCP port, in the network of the process ``pid``."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]
            if any(fields[1].endswith(f":{port:04X}") and fields[3] == _LISTEN for fields in map(str.split, lines)):
                return True
    return False


def free_port() -> int:
    """A free TCP port below the ephemeral range. Raises OSError."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Free TCP ports below the ephemeral range. Raises OSError.

    srun, sbatch and kernels listen on ephemeral ports. They cannot take the port of a daemon that is restarted.
    """
    candidates = list(range(_LOWEST_PORT, _first_ephemeral_port()))
    # Several clusters may choose at the same time; random ports rarely collide.
    random.shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        if len(found) == count:
            return found
        if _can_bind(port):
            found.append(port)
    raise OSError(f"no {count} free TCP ports between {_LOWEST_PORT} and {_first_ephemeral_port()}")


def _first_ephemeral_port() -> int:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    except OSError:
        return 32_768
    first = int(text.split()[0])
    return first if first > _LOWEST_PORT + 1000 else 32_768


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log; empty if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
