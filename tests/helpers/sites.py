"""Sites of the tests: a cluster whose nodes may dial one address and port, and a server that reaches Slurm one way.

Three hosts with a firewall between them (``networks``): ``node`` has the slurmds, ``login`` slurmctld, munged, sshd
and slurmrestd, ``gateway`` the server, except where its machine needs Slurm's commands: then it is on ``login``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import job_processes
from helpers import kernel_clients, rest_cluster
from helpers.daemons import daemon_pids, slurm_token
from helpers.login_node import USER, LoginNode
from helpers.networks import Flow, Network, network
from helpers.private_slurm import jobs_of, poll

WAYS = ("local", "ssh", "ssh-no-forwarding", "rest")
MODES = ("direct", "tunnel")
HEARTBEAT = 2.0  # seconds: a link that is cut is taken for broken after three of them
KERNELS = "6000-6099"  # ports of direct kernels
_RESPONSE, _RELAY, _SRUN = "5700", "5800", "7000-7099"


@dataclass
class Site:
    """A cluster, a server's way to it, and what this server's settings are."""

    way: str
    network: Network
    cluster: PrivateCluster
    base: Path
    login: LoginNode | None = None
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def server(self) -> str:
        """The host on which the server is."""
        return "login" if self.way == "local" else "gateway"

    @property
    def by_ssh(self) -> bool:
        """Whether there is a connection to the login node, and a relay on it."""
        return self.login is not None

    @property
    def link(self) -> Flow:
        """The one way out that nodes have, but to Slurm: the relay, or the server's response socket."""
        return Flow("node", "login", _RELAY) if self.by_ssh else Flow("node", self.server, _RESPONSE)

    @property
    def kernels(self) -> Flow:
        """How a direct kernel is dialled."""
        return Flow(self.server, "node", KERNELS)

    @property
    def slurm(self) -> list[Flow]:
        """What Slurm itself needs, and how the server reaches it."""
        layout = self.cluster._require().layout
        nodes = ", ".join(map(str, layout.node_ports))
        return [
            Flow("node", "login", f"{{ {layout.controller_port}, {_SRUN} }}"),
            Flow("login", "node", f"{{ {nodes}, {_SRUN} }}"),
            *self.way_to_slurm,
        ]

    @property
    def ssh(self) -> Flow:
        """The connection to the login node."""
        assert self.login is not None
        return Flow("gateway", "login", str(self.login.port))

    @property
    def way_to_slurm(self) -> list[Flow]:
        """How the server reaches Slurm; nothing to cut where it is on the same host."""
        if self.way == "rest":
            return [Flow("gateway", "login", str(self.cluster._require().layout.rest_port))]
        return [self.ssh] if self.by_ssh else []

    def allow(self, mode: str) -> None:
        """Open the firewall for what this mode needs: only for ``direct`` may nodes be dialled."""
        self.network.allow(self.link, *self.slurm, *([self.kernels] if mode == "direct" else []))

    def install(self, name: str, mode: str, **fields: object) -> str:
        """Install a kernelspec with these request fields, for this mode; return its name."""
        # What IPython writes is not to go to a home that the node's user database names.
        overrides = {"metadata": {"supported_encryption": ["curve"]}, "env": {"IPYTHONDIR": str(self.base / "ipython")}}
        directory = self.base / "jupyter" / "path"
        kernel_clients.install_kernelspec(
            directory, name, config_overrides={"connect": mode, **fields}, spec_overrides=overrides
        )
        return name

    def left(self) -> list[str]:
        """What there is of kernels: what is on the cluster, and the server's sockets."""
        sockets = [f"socket {path}" for path in (self.base / "sockets").rglob("*") if path.is_socket()]
        return self.left_on_the_cluster() + sockets

    def left_on_the_cluster(self) -> list[str]:
        """Jobs, their processes, and whatever else runs on nodes."""
        conf = self.cluster.slurm_conf
        daemons = set(daemon_pids(self.cluster).values())
        found = [f"job {line}" for line in jobs_of(self.cluster)]
        found += [f"process {one.pid} of a job" for one in job_processes(conf)]
        return found + [f"process {_name(pid)} on the node" for pid in self.network.pids("node") - daemons]

    def left_by_servers(self) -> list[str]:
        """What runs for a server, on its own machine or on the login node, and the directories of its sockets."""
        daemons = set(daemon_pids(self.cluster).values())
        # slurmctld has a child for its scripts.
        known = daemons | {child.pid for pid in daemons for child in psutil.Process(pid).children()} | {os.getpid()}
        if self.login is not None and self.login._process is not None:
            known.add(self.login._process.pid)
        there = {pid: host for host in ("login", "gateway") for pid in self.network.pids(host) - known}
        found = [f"process {_name(pid)} on {host}" for pid, host in there.items()]
        return found + [f"directory {path}" for path in (self.base / "sockets").iterdir()]


@contextmanager
def site(way: str) -> Iterator[Site]:
    """A site, with this process in its server's place; nothing of it is left afterwards."""
    with ExitStack() as stack:
        base = Path(tempfile.mkdtemp(prefix="gsm-", dir="/tmp"))
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        base.chmod(0o755)  # slurmrestd reads slurm.conf as another user
        for name in ("sockets", "logs"):
            (base / name).mkdir(mode=0o700)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("SLURM_CONF", raising=False)
        net = stack.enter_context(network("node", "login", "gateway"))
        # Slurm's ports are chosen when it comes up.
        net.allow(Flow("node", "login", "1-65535"), Flow("login", "node", "1-65535"))
        cluster = PrivateCluster(
            base / "slurm",
            nodes=2,
            rest=way == "rest",
            extra_conf=f"SrunPortRange={_SRUN}",
            login=net.host("login"),
            node=net.host("node"),
        )
        stack.enter_context(cluster)
        one = Site(way, net, cluster, base)
        if way.startswith("ssh"):
            one.login = LoginNode(base / "login", forwarding=way == "ssh", host=net.host("login"))
        one.allow("direct")
        stack.enter_context(net.entered(one.server))
        if one.login is not None:
            stack.callback(one.login.down)
            one.login.up()
        stack.enter_context(kernel_clients.jupyter_files_in(base / "jupyter"))
        one.settings = _settings(one)
        _install_kernelspecs(one)
        yield one
        assert poll(lambda: one.left_by_servers() == [], timeout=20), one.left_by_servers()


def _settings(one: Site) -> dict[str, object]:
    """Traits of SlurmService for a server that reaches Slurm this way."""
    settings: dict[str, object] = {
        "heartbeat": HEARTBEAT,
        "kernel_ports": KERNELS,
        "response_port": _RESPONSE,
        "tunnel_directory": str(one.base / "sockets"),
        "log_directory": str(one.base / "logs"),
    }
    conf = str(one.cluster.slurm_conf)
    if one.login is not None:
        relay = {"relay_port": _RELAY, "relay": "auto" if one.way == "ssh" else "always"}
        return {**one.login.settings(), **relay, **settings, "slurm_conf": conf}
    if one.way == "rest":
        token = rest_cluster.write_token(one.base / "token", slurm_token(one.cluster, USER))
        return {**settings, "cluster": one.cluster.rest_url, "rest_token_file": str(token)}
    return {**settings, "slurm_conf": conf}


def _install_kernelspecs(one: Site) -> None:
    """``slurm`` and ``slurm-direct``."""
    for mode, name in kernel_clients.KERNEL_NAMES.items():
        one.install(name, mode)


def _name(pid: int) -> str:
    try:
        return f"{pid} ({' '.join(psutil.Process(pid).cmdline())[:200]})"
    except psutil.Error:
        return str(pid)


# In a kernel: how clients reach it, and the directory of its connection file.
CONNECTION = """
from ipykernel.connect import get_connection_file, get_connection_info
info = get_connection_info(unpack=True)
print(info["transport"], info["ip"] if info["transport"] == "tcp" else "", get_connection_file())
"""


def is_reached(one: Site, mode: str, printed: str) -> bool:
    """Whether a kernel that printed this is reached in this mode."""
    wanted = ["tcp", one.network.hosts["node"]] if mode == "direct" else ["ipc"]
    return printed.split()[:-1] == wanted
