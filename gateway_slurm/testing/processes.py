"""Daemons as processes: start them, know them again from another process, stop them.

A daemon is known by its process id *and* its start time, so that a reused id is never taken for it.
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

# Daemons live here; an ordinary user's PATH does not have them.
_SYSTEM_PATHS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_POLL_INTERVAL = 0.02
_LOWEST_PORT = 10_000
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


@dataclass(frozen=True)
class Process:
    """A process that can be told from a later one with the same id."""

    pid: int
    start_time: int
    """Clock ticks after boot."""

    def alive(self) -> bool:
        """Whether it still runs. A zombie does not, once its last thread has ended: until then it holds its locks."""
        stat = _read_stat(self.pid)
        if stat is None or stat.start_time != self.start_time:
            return False
        return stat.state != "Z" or _threads(self.pid) > 1

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when the process is gone."""
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
    # The name is in parentheses and may hold anything, also spaces and parentheses.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return _Stat(name=head.partition("(")[2], state=fields[0], parent=int(fields[1]), start_time=int(fields[19]))


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def search_path() -> str:
    """PATH with the directories of system daemons behind it."""
    return os.pathsep.join([os.environ.get("PATH", ""), *_SYSTEM_PATHS])


def find_program(name: str) -> str | None:
    """The program's path, or None."""
    return shutil.which(name, path=search_path())


def daemon_environment(slurm_conf: Path, **more: str) -> dict[str, str]:
    """What daemons see: nothing of the caller's SLURM_* or locale."""
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
    """Start a daemon in a session of its own: it outlives the caller and the caller's terminal.

    ``user`` is whom root starts it as, with this user's own group alone, and ``prefix`` what enters its network.

    The caller keeps the Popen for as long as it lives, to reap the daemon. Raises FileNotFoundError.
    """
    group = None if user is None else pwd.getpwnam(user).pw_gid
    if prefix and user:
        # Only root enters a network: the user is changed inside (setpriv(1)).
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
    # A child of ours has a stat until we reap it, even when it has died already.
    start_time = stat.start_time if stat is not None else 0
    return child, Process(pid=child.pid, start_time=start_time)


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Poll until the condition holds; False when it did not within ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL)
    return True


def stop(processes: Iterable[Process], *, timeout: float) -> None:
    """SIGTERM to all, SIGKILL to those still there after ``timeout`` seconds; returns when all are gone."""
    remaining = list(processes)
    for process in remaining:
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGCONT)  # one that a test has stopped would never see SIGTERM
    if not wait_until(lambda: not any(process.alive() for process in remaining), timeout):
        kill(remaining)


def kill(processes: Iterable[Process]) -> None:
    """SIGKILL to all; returns when all are gone."""
    remaining = list(processes)
    for process in remaining:
        process.signal(signal.SIGKILL)
    wait_until(lambda: not any(process.alive() for process in remaining), 5)


def job_processes(slurm_conf: Path) -> list[Process]:
    """Every process that this cluster's slurmds started: slurmstepd, what it runs, and their descendants.

    They are known by their environment: Slurm's variables, and the path of this cluster's slurm.conf.
    A caller's own process that merely talks to the cluster has no node name and is not meant.
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
    except OSError:  # gone meanwhile, or another user's
        return False
    if f"SLURM_CONF={slurm_conf}".encode() not in variables:
        return False
    return name == "slurmstepd" or any(variable.startswith(b"SLURMD_NODENAME=") for variable in variables)


def listening(pid: int, port: int) -> bool:
    """Whether something listens on the TCP port, in the network that the process is in."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]
            if any(fields[1].endswith(f":{port:04X}") and fields[3] == _LISTEN for fields in map(str.split, lines)):
                return True
    return False


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the kernel's ephemeral range.

    srun, sbatch and kernels listen on ephemeral ports. A daemon that is stopped and started again finds
    its port free only if none of them can have taken it.
    """
    candidates = list(range(_LOWEST_PORT, _first_ephemeral_port()))
    # Several clusters may be choosing at the same time: at random they hardly meet.
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
    """The last lines of a log, or the empty string."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
