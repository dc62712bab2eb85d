"""Where a private cluster keeps its files, and what its daemons are told: pure, no I/O.

Sources: slurm.conf(5), gres.conf(5), slurmdbd.conf(5), munged(8).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# slurm.conf keys that may stand on many lines: such a line is told from others by its value, too.
_NAMED_KEYS = frozenset({"nodename", "partitionname", "nodeset", "downnodes"})

# batch_sched_delay is 3 s by default. What is left is slurmctld's own loop, which looks for new batch
# jobs once a second (controller.c), and the backfill scheduler, once a second at best.
_SCHEDULER_PARAMETERS = "batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1"

_DATABASE = "slurm_acct_db"


@dataclass(frozen=True)
class Host:
    """Where daemons run that are not in this process's network."""

    address: str
    """Where the others reach them."""
    prefix: tuple[str, ...] = ()
    """What enters it, put before a command, such as ``ip netns exec NAME`` (ip-netns(8)); only root may."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything that the texts below depend on.

    ``directory`` holds configuration, logs and state. ``runtime``, in /tmp, holds what needs a short path
    that every user can walk (Unix sockets: 108 bytes, and munged insists on the permissions).
    """

    directory: Path
    runtime: Path
    slurm_version: tuple[int, int]
    hostname: str
    user: str
    nodes: int
    cpus: int
    gpus_per_node: int
    memory: int
    """Megabytes per node."""
    controller_port: int
    node_ports: tuple[int, ...]
    database_port: int
    accounting: bool
    extra_conf: str
    rest_port: int = 0
    """Where slurmrestd listens; 0 for none."""
    login_address: str = "127.0.0.1"
    """Where slurmctld and slurmrestd are reached."""
    login_prefix: tuple[str, ...] = ()
    """What enters the network of all daemons but the slurmds: put before their commands."""
    node_address: str = ""
    """Where all slurmds are reached; empty for one of the loopback's for each."""
    node_prefix: tuple[str, ...] = ()
    """What enters the slurmds' network."""

    @property
    def slurm_conf(self) -> Path:
        """The file that SLURM_CONF names; Slurm looks for its other files beside it."""
        return self.directory / "etc" / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        """Where clients and daemons get their credentials."""
        return self.runtime / "munge" / "socket"

    @property
    def munge_key(self) -> Path:
        """The secret that all daemons of this cluster share.

        Not in ``directory``: munged refuses it where any parent is writable by a group, as a home may be.
        """
        return self.runtime / "secret" / "munge.key"

    @property
    def jwt_key(self) -> Path:
        """The secret by which slurmctld signs and checks tokens."""
        return self.runtime / "secret" / "jwt.key"

    @property
    def database_socket(self) -> Path:
        """MariaDB's socket; its root has no password, so the directory is 0700."""
        return self.runtime / "mariadb" / "socket"

    @property
    def database_init(self) -> Path:
        """The statements that MariaDB begins with."""
        return self.directory / "etc" / "mariadb.sql"

    @property
    def node_names(self) -> tuple[str, ...]:
        """c1, c2, …"""
        return tuple(f"c{number}" for number in range(1, self.nodes + 1))

    def prefix(self, daemon: str) -> tuple[str, ...]:
        """What is put before the daemon's command."""
        return self.node_prefix if daemon in self.node_names else self.login_prefix

    def log(self, daemon: str) -> Path:
        """The file that takes what the daemon prints."""
        return self.directory / "log" / f"{daemon}.log"

    def gpu_file(self, number: int) -> Path:
        """The stand-in for a GPU's device file, a link to a real one (Slurm wants a character device).

        Slurm reads the GPU's number from the end of the name.
        """
        return self.runtime / "gpu" / f"gpu{number}"

    def subdirectories(self) -> dict[Path, int]:
        """Each directory to make, with its permissions."""
        return {
            self.directory / "etc": 0o755,
            self.directory / "log": 0o755,
            self.directory / "controller": 0o700,
            self.directory / "mariadb": 0o700,
            self.runtime / "secret": 0o700,
            self.runtime / "munge": 0o755,
            self.runtime / "gpu": 0o755,
            self.runtime / "spool": 0o755,
            self.runtime / "mariadb": 0o700,
        }


def slurm_conf_text(layout: Layout) -> str:
    """slurm.conf; a line of ``extra_conf`` replaces the default of the same key."""
    defaults = [*_daemon_lines(layout), *_job_lines(layout), *_node_lines(layout)]
    if layout.accounting:
        defaults += _accounting_lines(layout)
    if layout.rest_port:
        defaults += ["AuthAltTypes=auth/jwt", f"AuthAltParameters=jwt_key={layout.jwt_key}"]
    return "\n".join(_override(defaults, layout.extra_conf.splitlines())) + "\n"


def _daemon_lines(layout: Layout) -> list[str]:
    return [
        "ClusterName=private",
        f"SlurmctldHost={layout.hostname}({layout.login_address})",
        f"SlurmctldPort={layout.controller_port}",
        f"SlurmUser={layout.user}",
        f"SlurmdUser={layout.user}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={layout.munge_socket}",
        f"StateSaveLocation={layout.directory / 'controller'}",
        f"SlurmdSpoolDir={layout.runtime / 'spool' / '%n'}",
        f"SlurmctldPidFile={layout.runtime / 'slurmctld.pid'}",
        f"SlurmdPidFile={layout.runtime / '%n.pid'}",
        "SlurmdTimeout=300",
        "SlurmctldTimeout=120",
        "ReturnToService=2",
        # Nodes are what the file says: the machine has not that many CPUs.
        "SlurmdParameters=config_overrides",
    ]


def _job_lines(layout: Layout) -> list[str]:
    return [
        # Neither cgroups nor root are needed for these.
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "SchedulerType=sched/backfill",
        f"SchedulerParameters={_SCHEDULER_PARAMETERS}",
        "GresTypes=gpu",
        "KillWait=5",
        "MinJobAge=300",
        "InactiveLimit=0",
        # Without a default a job takes a node's whole memory, and no second job fits beside it.
        f"DefMemPerCPU={max(1, layout.memory // layout.cpus)}",
    ]


def _node_lines(layout: Layout) -> list[str]:
    gres = f" Gres=gpu:{layout.gpus_per_node}" if layout.gpus_per_node else ""
    lines = [
        f"NodeName={name} NodeHostname={layout.hostname} NodeAddr={layout.node_address or f'127.0.0.{10 + number}'}"
        f" Port={port}"
        f" SocketsPerBoard=1 CoresPerSocket={layout.cpus} ThreadsPerCore=1"
        f" RealMemory={layout.memory}{gres}"
        for number, (name, port) in enumerate(zip(layout.node_names, layout.node_ports, strict=True), 1)
    ]
    return [
        *lines,
        "PartitionName=batch Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=01:00:00",
        "PartitionName=devel Nodes=ALL MaxTime=00:30:00 DefaultTime=00:10:00",
    ]


def _accounting_lines(layout: Layout) -> list[str]:
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={layout.database_port}",
        # No password: for this one connection the munge socket is taken from here, not from AuthInfo.
        f"AccountingStoragePass={layout.munge_socket}",
        "AccountingStorageEnforce=associations,limits",
    ]


def _override(defaults: Iterable[str], extra: Iterable[str]) -> list[str]:
    added = [line.strip() for line in extra if line.strip()]
    replaced = {_line_key(line) for line in added}
    return [line for line in defaults if _line_key(line) not in replaced] + added


def _line_key(line: str) -> str:
    key, _, value = line.partition("=")
    key = key.strip().lower()
    return f"{key}={value.split()[0]}" if key in _NAMED_KEYS and value.split() else key


def gres_conf_text(layout: Layout) -> str:
    """gres.conf: the pretended GPUs, the same on each node."""
    return "".join(f"Name=gpu File={layout.gpu_file(number)}\n" for number in range(layout.gpus_per_node))


def cgroup_conf_text(layout: Layout) -> str:
    """cgroup.conf: slurmd loads a cgroup plugin whether one is used or not, and ends if that fails.

    Left to find out itself it fails in containers without cgroups. None can be asked for since 23.11;
    before, cgroup/v1 is the plugin that asks for nothing until it is used.
    """
    plugin = "disabled" if layout.slurm_version >= (23, 11) else "cgroup/v1"
    return f"CgroupPlugin={plugin}\n"


def slurmdbd_conf_text(layout: Layout) -> str:
    """slurmdbd.conf; that MariaDB listens on a socket of its own is in the environment, there is no key."""
    return "\n".join(
        [
            "AuthType=auth/munge",
            f"AuthInfo=socket={layout.munge_socket}",
            f"DbdHost={layout.hostname}",
            "DbdAddr=127.0.0.1",
            f"DbdPort={layout.database_port}",
            f"SlurmUser={layout.user}",
            f"PidFile={layout.runtime / 'slurmdbd.pid'}",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=root",
            f"StorageLoc={_DATABASE}",
            "",
        ]
    )


def mariadb_init_text() -> str:
    """What MariaDB does first. slurmdbd would make its database itself, and ends with MariaDB 11.8.

    It connects again by the handle whose connection to a missing database failed, and the client library has forgotten
    by then how many columns an answer may have ("exceeds maximum allowed number of columns (=0)").
    """
    return f"CREATE DATABASE IF NOT EXISTS {_DATABASE};\n"


def daemon_commands(layout: Layout) -> dict[str, list[str]]:
    """Each daemon's command, in the order of their start."""
    commands = {"munged": munged_command(layout)}
    if layout.accounting:
        commands["mariadbd"] = mariadbd_command(layout)
        commands["slurmdbd"] = slurmdbd_command()
    commands["slurmctld"] = slurmctld_command(layout)
    if layout.rest_port:
        commands["slurmrestd"] = slurmrestd_command(layout)
    return {**commands, **{node: slurmd_command(layout, node) for node in layout.node_names}}


def munged_command(layout: Layout) -> list[str]:
    """munged(8), in the foreground, with every path its own."""
    return [
        "munged",
        "--foreground",
        f"--socket={layout.munge_socket}",
        f"--key-file={layout.munge_key}",
        f"--pid-file={layout.runtime / 'munge' / 'pid'}",
        f"--seed-file={layout.runtime / 'secret' / 'munge.seed'}",
    ]


def slurmctld_command(layout: Layout) -> list[str]:
    """slurmctld(8), in the foreground; it recovers its jobs when it is started again."""
    return ["slurmctld", "-D", "-f", str(layout.slurm_conf)]


def slurmd_command(layout: Layout, node: str) -> list[str]:
    """slurmd(8), in the foreground, as the node ``node``."""
    return ["slurmd", "-D", "-N", node, "-f", str(layout.slurm_conf)]


def slurmrestd_command(layout: Layout) -> list[str]:
    """slurmrestd(8), for tokens only; the newest plugin that the release has."""
    plugin = "slurmctld" if layout.slurm_version >= (23, 11) else "v0.0.39" if layout.slurm_version >= (23, 2) else ""
    listen = f"{layout.login_address}:{layout.rest_port}"
    return ["slurmrestd", "-a", "rest_auth/jwt", "-s", f"openapi/{plugin or 'v0.0.38'}", listen]


def slurmdbd_command() -> list[str]:
    """slurmdbd(8), in the foreground; it finds its file beside SLURM_CONF."""
    return ["slurmdbd", "-D"]


def mariadb_install_command(layout: Layout) -> list[str]:
    """mariadb-install-db(1) for a data directory of ours."""
    return [
        "mariadb-install-db",
        "--no-defaults",
        f"--datadir={layout.directory / 'mariadb'}",
        f"--user={layout.user}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
    ]


def mariadbd_command(layout: Layout) -> list[str]:
    """mariadbd(8) on a Unix socket only, with as little memory as slurmdbd is content with."""
    return [
        "mariadbd",
        "--no-defaults",
        f"--datadir={layout.directory / 'mariadb'}",
        f"--user={layout.user}",
        f"--socket={layout.database_socket}",
        f"--pid-file={layout.runtime / 'mariadb' / 'pid'}",
        f"--init-file={layout.database_init}",
        "--skip-networking",
        "--innodb-buffer-pool-size=64M",
        "--innodb-log-file-size=16M",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-lock-wait-timeout=900",
    ]
