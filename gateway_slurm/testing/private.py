"""The private Slurm: start it, inspect it, remove it."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gateway_slurm.errors import ClusterError
from gateway_slurm.testing import packages, processes, state
from gateway_slurm.testing.layout import (
    Host,
    Layout,
    account_commands,
    cgroup_conf_text,
    daemon_commands,
    gres_conf_text,
    mariadb_init_text,
    mariadb_install_command,
    slurm_conf_text,
    slurmdbd_conf_text,
)

_MAX_NODES = 64
_UP_TIMEOUT = 60.0
_STOP_TIMEOUT = 10.0
_COMMAND_TIMEOUT = 30.0
# slurmrestd asks slurmctld with its clients' tokens, and not by munge. Without root it runs as the cluster's own user,
# which needs the second variable; releases from 24.11 refuse that.
_REST_ENVIRONMENT = {
    "SLURM_JWT": "daemon",
    **({"SLURMRESTD_SECURITY": "disable_user_check"} if os.geteuid() != 0 else {}),
}


@dataclass(frozen=True, kw_only=True)
class ClusterStatus:
    """The state of a cluster's daemons and nodes."""

    daemons: Mapping[str, bool]
    """Whether each daemon runs, by its name."""
    nodes: Mapping[str, str]
    """The state of each node as sinfo shows it; empty if the controller does not answer."""

    @property
    def running(self) -> bool:
        """Whether every daemon runs."""
        return bool(self.daemons) and all(self.daemons.values())


class PrivateCluster:
    """A real Slurm of this user in ``directory``. Once its packages are installed, it needs no root.

    ``up`` starts it; ``down`` ends it with its jobs and removes its files. Different processes may call them, since the
    state is in the directory, but not at the same time. As a context manager the cluster is up inside the block.

    All daemons run on this machine: munged, slurmctld, and one slurmd per node (named c1, c2, …). With ``accounting``
    there are mariadbd and slurmdbd, and an account ``demo`` with this user; Slurm refuses other accounts. With ``rest``
    there is slurmrestd, which accepts tokens of ``scontrol token``. The nodes are configured with ``cpus`` cores,
    ``memory`` megabytes and ``gpus_per_node`` GPUs, whatever the machine has. Each line of ``extra_conf`` replaces the
    line of slurm.conf with the same key. ``node`` is the network of the slurmds, ``login`` that of all other daemons.

    Every method raises ClusterError, which names the daemon and quotes the end of its log.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        nodes: int = 4,
        gpus_per_node: int = 2,
        cpus: int = 8,
        accounting: bool = False,
        extra_conf: str = "",
        *,
        memory: int = 8000,
        rest: bool = False,
        login: Host | None = None,
        node: Host | None = None,
    ) -> None:
        if not 1 <= nodes <= _MAX_NODES:
            raise ClusterError(f"a private cluster has 1 to {_MAX_NODES} nodes, not {nodes}")
        if cpus < 1 or gpus_per_node < 0 or memory < 1:
            given = f"cpus={cpus}, memory={memory}, gpus_per_node={gpus_per_node}"
            raise ClusterError(f"a node needs at least one CPU, one megabyte and zero GPUs, not {given}")
        self.directory = Path(directory).absolute()
        self._nodes = nodes
        self._accounting = accounting
        self._rest = rest
        login, node = login or Host("127.0.0.1"), node or Host("")
        self._make_layout = partial(
            Layout,
            directory=self.directory,
            nodes=nodes,
            cpus=cpus,
            gpus_per_node=gpus_per_node,
            memory=memory,
            accounting=accounting,
            extra_conf=extra_conf,
            login_address=login.address,
            login_prefix=login.prefix,
            node_address=node.address,
            node_prefix=node.prefix,
        )
        # The daemons that this process started and must reap.
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> PrivateCluster:
        self.up()
        return self

    def __exit__(self, *_error: object) -> None:
        self.down()

    @property
    def slurm_conf(self) -> Path:
        """The value for SLURM_CONF."""
        return self.directory / "etc" / "slurm.conf"

    @property
    def prefix(self) -> tuple[str, ...]:
        """The prefix by which a Slurm command runs in the controller's network."""
        return self._require().layout.login_prefix

    def environment(self) -> dict[str, str]:
        """The environment variables by which Slurm's commands use this cluster."""
        return {"SLURM_CONF": str(self.slurm_conf)}

    def up(self) -> None:
        """Start all daemons; return when every node is idle (2 to 3 s; 5 s more with accounting).

        After a failure no daemon runs and all files are removed.
        """
        packages.check(accounting=self._accounting, rest=self._rest)
        if self.status().running:
            raise ClusterError(f"the private cluster in {self.directory} is up already")
        if state.load(self.directory) is not None:
            self.down()  # the remains of a cluster that was killed
        cluster = self._prepare()
        try:
            self._start_all(cluster)
        except BaseException:
            self.down()
            raise

    def down(self) -> bool:
        """Stop all daemons, kill all jobs and remove the files; return False if there was no cluster."""
        cluster = state.load(self.directory)
        if cluster is None:
            return False
        # The slurmds end first, so that no new job starts.
        slurmds = [process for name, process in cluster.processes.items() if name in cluster.layout.node_names]
        processes.kill(slurmds)
        processes.kill(processes.job_processes(cluster.layout.slurm_conf))
        processes.stop(cluster.processes.values(), timeout=_STOP_TIMEOUT)
        self._reap()
        self._remove(cluster)
        return True

    def status(self) -> ClusterStatus:
        """The states of the daemons, and of the nodes as the controller sees them."""
        cluster = state.load(self.directory)
        if cluster is None:
            return ClusterStatus(daemons={}, nodes={})
        self._reap()
        daemons = {name: process.alive() for name, process in cluster.processes.items()}
        nodes = self._node_states(cluster) if daemons.get("slurmctld") and daemons.get("munged") else {}
        return ClusterStatus(daemons=daemons, nodes=nodes)

    @property
    def rest_url(self) -> str:
        """The value for SlurmService.cluster. Raises ClusterError for a cluster without slurmrestd."""
        port = self._require().layout.rest_port
        if not port:
            raise ClusterError(f"the private cluster in {self.directory} has no slurmrestd; make it with rest=True")
        return f"rest+http://{self._require().layout.login_address}:{port}"

    def _prepare(self) -> state.State:
        """Make the directories and files."""
        created = not self.directory.exists()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # In /tmp and not in TMPDIR, since a Unix socket's path has at most 108 bytes.
            runtime = Path(tempfile.mkdtemp(prefix="gws-", dir="/tmp"))
            runtime.chmod(0o755)
            cluster = state.State(layout=self._layout(runtime), created_directory=created)
            cluster.save()
            _write_files(cluster.layout)
        except OSError as error:
            if (partial := state.load(self.directory)) is not None:
                self._remove(partial)
            raise ClusterError(f"cannot prepare a private cluster in {self.directory}: {error}") from error
        return cluster

    def _layout(self, runtime: Path) -> Layout:
        controller, database, rest, *nodes = processes.free_ports(3 + self._nodes)
        return self._make_layout(
            runtime=runtime,
            slurm_version=packages.slurm_version(),
            # Slurm compares it with the short host name.
            hostname=socket.gethostname().partition(".")[0],
            user=_user_name(),
            controller_port=controller,
            node_ports=tuple(nodes),
            database_port=database,
            rest_port=rest if self._rest else 0,
        )

    def _start_all(self, cluster: state.State) -> None:
        for name, command in daemon_commands(cluster.layout).items():
            if name == "mariadbd":
                self._run(cluster, mariadb_install_command(cluster.layout), blame=name)
            self._start(cluster, name, command)
            if name not in cluster.layout.node_names:
                self._await_service(cluster, name)
            if name == "slurmdbd":
                for argv in account_commands(cluster.layout.user):
                    self._run(cluster, argv, blame=name)

        def all_idle() -> bool:
            return set(self._node_states(cluster).values()) == {"idle"}

        self._await(cluster, all_idle, "slurmctld", "not every node became idle")

    def _start(self, cluster: state.State, name: str, command: Sequence[str]) -> None:
        environment = processes.daemon_environment(
            cluster.layout.slurm_conf,
            # For MariaDB's client library in slurmdbd; slurmdbd.conf has no key for it.
            MYSQL_UNIX_PORT=str(cluster.layout.database_socket),
            **(_REST_ENVIRONMENT if name == "slurmrestd" else {}),
        )
        # slurmrestd refuses to run as root or as slurmctld's user.
        user = "nobody" if name == "slurmrestd" and os.geteuid() == 0 else None
        log, prefix = cluster.layout.log(name), cluster.layout.prefix(name)
        try:
            child, process = processes.spawn(command, log=log, environment=environment, user=user, prefix=prefix)
        except OSError as error:
            raise ClusterError(f"{name} cannot be started: {error}") from error
        self._children[name] = child
        cluster.processes[name] = process
        cluster.save()

    def _run(self, cluster: state.State, argv: Sequence[str], *, blame: str) -> str:
        """Run a command that prepares or asks a daemon; return its standard output."""
        environment = processes.daemon_environment(cluster.layout.slurm_conf)
        argv = [*self.prefix, *argv]
        program = processes.find_program(argv[0]) or argv[0]
        try:
            result = subprocess.run(
                [program, *argv[1:]],
                check=True,
                capture_output=True,
                env=environment,
                stdin=subprocess.DEVNULL,
                timeout=_COMMAND_TIMEOUT,
            )
            return result.stdout.decode(errors="replace")
        except subprocess.CalledProcessError as error:
            output = (error.stderr + error.stdout).decode(errors="replace").strip()
            raise self._failure(cluster, blame, f"{' '.join(argv)} said: {output}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise self._failure(cluster, blame, str(error)) from error

    def _await_service(self, cluster: state.State, name: str) -> None:
        """Wait until the daemon listens."""
        layout = cluster.layout
        sockets = {"munged": layout.munge_socket, "mariadbd": layout.database_socket}
        if name in sockets:
            self._await(cluster, lambda: _accepts(sockets[name]), name, "its socket does not answer")
            return
        ports = {
            "slurmdbd": layout.database_port,
            "slurmctld": layout.controller_port,
            "slurmrestd": layout.rest_port,
            **dict(zip(layout.node_names, layout.node_ports, strict=True)),
        }
        pid, port = cluster.processes[name].pid, ports[name]
        self._await(cluster, lambda: processes.listening(pid, port), name, f"nothing listens on port {port}")

    def _await(self, cluster: state.State, ready: Callable[[], bool], blame: str, complaint: str) -> None:
        """Wait for ``ready``. Raises ClusterError if a daemon ends."""
        dead: list[str] = []

        def settled() -> bool:
            self._reap()
            dead[:] = [name for name, process in cluster.processes.items() if not process.alive()]
            return bool(dead) or ready()

        if not processes.wait_until(settled, _UP_TIMEOUT):
            raise self._failure(cluster, blame, f"{complaint} within {_UP_TIMEOUT:.0f} s")
        if dead:
            raise self._failure(cluster, dead[0], "it ended")

    def _failure(self, cluster: state.State, daemon: str, complaint: str) -> ClusterError:
        log = processes.tail(cluster.layout.log(daemon)) or "(empty)"
        return ClusterError(f"{daemon} of the private cluster failed: {complaint}. The end of its log:\n{log}")

    def _node_states(self, cluster: state.State) -> dict[str, str]:
        argv = ["sinfo", "--Node", "--noheader", "--all", "--format=%N %T"]
        try:
            output = self._run(cluster, argv, blame="slurmctld")
        except ClusterError:
            return {}
        # sinfo prints a node once for each of its partitions.
        return dict(line.split(maxsplit=1) for line in output.splitlines() if " " in line)

    def _require(self) -> state.State:
        cluster = state.load(self.directory)
        if cluster is None:
            raise ClusterError(f"there is no private cluster in {self.directory}")
        return cluster

    def _reap(self) -> None:
        self._children = {name: child for name, child in self._children.items() if child.poll() is None}

    def _remove(self, cluster: state.State) -> None:
        shutil.rmtree(cluster.layout.runtime, ignore_errors=True)
        for path in cluster.layout.subdirectories():
            if path.is_relative_to(self.directory):
                shutil.rmtree(path, ignore_errors=True)
        state.remove(self.directory)
        if cluster.created_directory:
            # The directory stays if a user has put other files into it.
            with contextlib.suppress(OSError):
                self.directory.rmdir()


def _write_files(layout: Layout) -> None:
    """Make all directories and files that the daemons need. Raises OSError."""
    for path, mode in layout.subdirectories().items():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)
    for number in range(layout.gpus_per_node):
        layout.gpu_file(number).symlink_to("/dev/null")
    etc = layout.slurm_conf.parent
    _write_file(layout.slurm_conf, slurm_conf_text(layout).encode(), 0o644)
    _write_file(etc / "gres.conf", gres_conf_text(layout).encode(), 0o644)
    _write_file(etc / "cgroup.conf", cgroup_conf_text(layout).encode(), 0o644)
    _write_file(layout.munge_key, secrets.token_bytes(128), 0o600)
    if layout.rest_port:
        _write_file(layout.jwt_key, secrets.token_bytes(32), 0o600)
    if layout.accounting:
        _write_file(layout.database_init, mariadb_init_text().encode(), 0o644)
        # slurmdbd refuses a file that other users can read.
        _write_file(etc / "slurmdbd.conf", slurmdbd_conf_text(layout).encode(), 0o600)


def _write_file(path: Path, content: bytes, mode: int) -> None:
    path.touch(mode=mode)
    path.chmod(mode)  # independent of the umask
    path.write_bytes(content)


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError as error:
        uid = os.geteuid()
        raise ClusterError(f"user id {uid} has no name on this machine, and Slurm needs one") from error


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
