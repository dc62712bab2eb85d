"""The paths, configuration files and commands of a private cluster, as pure functions.

Sources: slurm.conf(5), gres.conf(5), slurmdbd.conf(5), munged(8), sacctmgr(1).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Keys that can occur on several lines of slurm.conf; the value is part of the identity of such a line.
_NAMED_KEYS = frozenset({"nodename", "partitionname", "nodeset", "downnodes"})

# Jobs start as soon as possible. batch_sched_delay is 3 s by default. slurmctld's own loop still looks for new batch
# jobs only once a second (controller.c), and so does the backfill scheduler.
_SCHEDULER_PARAMETERS = "batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1"

_DATABASE = "slurm_acct_db"
_DEMO_ACCOUNT = "demo"


@dataclass(frozen=True)
class Host:
    """Another network in which daemons run."""

    address: str
    """The address at which other daemons reach them."""
    prefix: tuple[str, ...] = ()
    """A command prefix that enters the network, such as ``ip netns exec NAME`` (ip-netns(8)). It needs root."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parameters of a cluster.

    ``directory`` holds configuration, logs and state. ``runtime`` is in /tmp and holds what needs a short path that
    every user can enter: a Unix socket's path has at most 108 bytes, and munged checks the permissions.
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
    """The port of slurmrestd; 0 for no slurmrestd."""
    login_address: str = "127.0.0.1"
    """The address of slurmctld and slurmrestd."""
    login_prefix: tuple[str, ...] = ()
    """The command prefix that enters the network of all daemons except the slurmds."""
    node_address: str = ""
    """The address of all slurmds; if empty, each has a loopback address of its own."""
    node_prefix: tuple[str, ...] = ()
    """The command prefix that enters the slurmds' network."""

    @property
    def slurm_conf(self) -> Path:
        """The file for SLURM_CONF. Slurm looks for its other files in the same directory."""
        return self.directory / "etc" / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        """The socket where clients and daemons get their credentials."""
        return self.runtime / "munge" / "socket"

    @property
    def munge_key(self) -> Path:
        """The secret that all daemons of this cluster share.

        It is not in ``directory``: munged refuses a key if a group can write to a parent, as in some home directories.
        """
        return self.runtime / "secret" / "munge.key"

    @property
    def jwt_key(self) -> Path:
        """The secret with which slurmctld signs and checks tokens."""
        return self.runtime / "secret" / "jwt.key"

    @property
    def database_socket(self) -> Path:
        """MariaDB's socket. Its root user has no password, so the directory has mode 0700."""
        return self.runtime / "mariadb" / "socket"

    @property
    def database_init(self) -> Path:
        """The file with the first statements for MariaDB."""
        return self.directory / "etc" / "mariadb.sql"

    @property
    def node_names(self) -> tuple[str, ...]:
        """c1, c2, …"""
        return tuple(f"c{number}" for number in range(1, self.nodes + 1))

    def prefix(self, daemon: str) -> tuple[str, ...]:
        """The prefix of the daemon's command."""
        return self.node_prefix if daemon in self.node_names else self.login_prefix

    def log(self, daemon: str) -> Path:
        """The file with the daemon's output."""
        return self.directory / "log" / f"{daemon}.log"

    def gpu_file(self, number: int) -> Path:
        """The file that stands for a GPU's device file.

        It links to a character device, which Slurm demands. Slurm reads the GPU's number from the end of the name.
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
    """slurm.conf. A line of ``extra_conf`` replaces the default line with the same key."""
    defaults = [*_daemon_lines(layout), *_job_lines(layout), *_node_lines(layout)]
    if layout.accounting:
        defaults += _accounting_lines(layout)
    if layout.rest_port:
        defaults += ["AuthAltTypes=auth/jwt", f"AuthAltParameters=jwt_key={layout.jwt_key}"]
    extra = [line.strip() for line in layout.extra_conf.splitlines() if line.strip()]
    replaced = {_line_key(line) for line in extra}
    return "\n".join([*(line for line in defaults if _line_key(line) not in replaced), *extra, ""])


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
        # Slurm takes the nodes' CPUs from this file, since the machine has fewer.
        "SlurmdParameters=config_overrides",
    ]


def _job_lines(layout: Layout) -> list[str]:
    return [
        # These need neither cgroups nor root.
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
        # Without a default, a job takes all memory of a node, and no second job fits on it.
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
        # Not a password: for this connection Slurm takes the munge socket from here, and not from AuthInfo.
        f"AccountingStoragePass={layout.munge_socket}",
        "AccountingStorageEnforce=associations,limits",
    ]


def _line_key(line: str) -> str:
    key, _, value = line.partition("=")
    key = key.strip().lower()
    return f"{key}={value.split()[0]}" if key in _NAMED_KEYS and value.split() else key


def gres_conf_text(layout: Layout) -> str:
    """gres.conf: the simulated GPUs, which are the same on each node."""
    return "".join(f"Name=gpu File={layout.gpu_file(number)}\n" for number in range(layout.gpus_per_node))


def cgroup_conf_text(layout: Layout) -> str:
    """cgroup.conf. slurmd always loads a cgroup plugin, and ends if that fails, as by default in some containers.

    From 23.11 the plugin can be disabled. Before that, cgroup/v1 needs no cgroups until it is used.
    """
    plugin = "disabled" if layout.slurm_version >= (23, 11) else "cgroup/v1"
    return f"CgroupPlugin={plugin}\n"


def slurmdbd_conf_text(layout: Layout) -> str:
    """slurmdbd.conf. There is no key for MariaDB's socket: its client library reads an environment variable."""
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
    """MariaDB's first statement, which creates the database.

    slurmdbd would create it, but fails with MariaDB 11.8 ("exceeds maximum allowed number of columns (=0)"): it
    connects again with the handle of the failed connection, for which the client library has lost that number.
    """
    return f"CREATE DATABASE IF NOT EXISTS {_DATABASE};\n"


def daemon_commands(layout: Layout) -> dict[str, list[str]]:
    """The command of each daemon in the foreground, in the order in which they start."""
    commands = {"munged": _munged_command(layout)}
    if layout.accounting:
        commands["mariadbd"] = _mariadbd_command(layout)
        commands["slurmdbd"] = ["slurmdbd", "-D"]  # finds its configuration in the directory of SLURM_CONF
    # After a restart slurmctld recovers its jobs.
    commands["slurmctld"] = ["slurmctld", "-D", "-f", str(layout.slurm_conf)]
    if layout.rest_port:
        commands["slurmrestd"] = _slurmrestd_command(layout)
    slurmds = {node: ["slurmd", "-D", "-N", node, "-f", str(layout.slurm_conf)] for node in layout.node_names}
    return {**commands, **slurmds}


def _munged_command(layout: Layout) -> list[str]:
    """munged(8), with paths of this cluster only."""
    return [
        "munged",
        "--foreground",
        f"--socket={layout.munge_socket}",
        f"--key-file={layout.munge_key}",
        f"--pid-file={layout.runtime / 'munge' / 'pid'}",
        f"--seed-file={layout.runtime / 'secret' / 'munge.seed'}",
    ]


def _slurmrestd_command(layout: Layout) -> list[str]:
    """slurmrestd(8), with tokens as the only authentication and the newest plugin of the Slurm release."""
    plugin = "slurmctld" if layout.slurm_version >= (23, 11) else "v0.0.39" if layout.slurm_version >= (23, 2) else ""
    listen = f"{layout.login_address}:{layout.rest_port}"
    return ["slurmrestd", "-a", "rest_auth/jwt", "-s", f"openapi/{plugin or 'v0.0.38'}", listen]


def mariadb_install_command(layout: Layout) -> list[str]:
    """mariadb-install-db(1) for the cluster's data directory."""
    return [
        "mariadb-install-db",
        "--no-defaults",
        f"--datadir={layout.directory / 'mariadb'}",
        f"--user={layout.user}",
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
    ]


def _mariadbd_command(layout: Layout) -> list[str]:
    """mariadbd(8) on a Unix socket only, with the least memory that slurmdbd accepts."""
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


def account_commands(user: str) -> list[list[str]]:
    """sacctmgr(1) commands that add the cluster, the account ``demo``, and ``user`` in it.

    They run before slurmctld starts, which asks slurmdbd for them.
    """
    add = ["sacctmgr", "--immediate", "--quiet", "add"]
    return [
        [*add, "cluster", "private"],
        [*add, "account", _DEMO_ACCOUNT, "Description=demonstration", "Organization=private"],
        [*add, "user", user, f"Account={_DEMO_ACCOUNT}", f"DefaultAccount={_DEMO_ACCOUNT}"],
    ]
