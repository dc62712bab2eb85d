"""The tests' login node: a real sshd with its own keys, on its own port."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from gateway_slurm.errors import ClusterError
from gateway_slurm.testing.layout import Host
from gateway_slurm.testing.processes import find_program, free_port

USER = pwd.getpwuid(os.geteuid()).pw_name
_SSHD = find_program("sshd") or "sshd"
_LOOPBACK = Host("127.0.0.1")


def make_key(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> Path:
    """Make a key pair; return the path of the private key."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)]
    subprocess.run(command, check=True, timeout=30, stdin=subprocess.DEVNULL)
    return path


class LoginNode:
    """An sshd that runs as this process's user and accepts that user's logins with ``key``.

    ``up`` starts it and ``down`` ends it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        forwarding: bool = False,
        options: tuple[str, ...] = (),
        host: Host = _LOOPBACK,
    ) -> None:
        """``options`` are lines of sshd_config(5) that take precedence; ``host`` is the network of sshd."""
        self.host = host
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.home = directory / "home"
        self.home.mkdir()
        self.host_key = make_key(directory / "host_key")
        self.key = make_key(directory / "user_key")
        self.ca = make_key(directory / "ca")
        self.authorized = directory / "authorized_keys"
        self.authorized.write_text((directory / "user_key.pub").read_text())
        self.port = free_port()
        self.config = directory / "sshd_config"
        lines = [
            *options,
            f"Port {self.port}",
            f"ListenAddress {host.address}",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.authorized}",
            f"TrustedUserCAKeys {self.ca}.pub",
            f"PidFile {directory}/pid",
            "UsePAM no",
            "StrictModes no",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            f"AllowTcpForwarding {'yes' if forwarding else 'no'}",
            "AllowStreamLocalForwarding no",
            f"GatewayPorts {'clientspecified' if forwarding else 'no'}",
            f"PermitTunnel {'yes' if forwarding else 'no'}",
            "X11Forwarding no",
            "PrintMotd no",
            f"SetEnv HOME={self.home}",
            "LogLevel VERBOSE",
        ]
        self.config.write_text("\n".join([*lines, ""]))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The value for ``SlurmService.cluster``."""
        return f"ssh://{USER}@{self.host.address}:{self.port}"

    @property
    def log(self) -> str:
        """The output of sshd."""
        return (self.directory / "log").read_text(errors="replace")

    def connections(self) -> list[str]:
        """The connected clients as ``address:port`` in hexadecimal digits, from /proc/net/tcp (proc(5))."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [row[2] for row in rows if row[1].endswith(f":{self.port:04X}") and row[3] == "01"]

    def known_hosts(self, *ports: int) -> Path:
        """A known_hosts file with the node's key, also for other ports of this machine."""
        path = self.directory / f"known_hosts-{'-'.join(map(str, ports)) or 'own'}"
        key = Path(f"{self.host_key}.pub").read_text()
        path.write_text("".join(f"[{self.host.address}]:{port} {key}" for port in (self.port, *ports)))
        return path

    def settings(self, *ports: int) -> dict[str, object]:
        """Traits of SlurmService by which a server logs in here; with ``ports`` it uses the first of them."""
        return {
            "cluster": f"ssh://{USER}@{self.host.address}:{(*ports, self.port)[0]}",
            "ssh_identity_files": [str(self.key)],
            "ssh_known_hosts": [str(self.known_hosts(*ports))],
            "ssh_config": str(self.directory / "ssh_config"),
            "ssh_python": "/usr/bin/python3",
            "slurm_conf": os.environ.get("SLURM_CONF", ""),
            "log_directory": str(self.home / "log"),
        }

    def up(self) -> None:
        """Start sshd, and return when it listens. Raises ClusterError."""
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (self.directory / "log").open("ab") as log:
            command = [*self.host.prefix, _SSHD, "-D", "-e", "-f", str(self.config)]
            environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection((self.host.address, self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"sshd did not start: {self.log[-2000:]}")
            time.sleep(0.02)

    def down(self) -> None:
        """End sshd and all sessions."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(10)
            self._process = None


def sessions(node: LoginNode) -> list[psutil.Process]:
    """The processes of logged-in users on the login node."""
    assert node._process is not None
    children = psutil.Process(node._process.pid).children(recursive=True)
    return [process for process in children if process.is_running()]


@contextmanager
def login_node(**options: object) -> Iterator[LoginNode]:
    """A running login node in a temporary directory."""
    directory = Path(tempfile.mkdtemp(prefix="gsl-", dir="/tmp"))
    node = LoginNode(directory / "node", **options)  # type: ignore[arg-type]
    try:
        node.up()
        yield node
    finally:
        node.down()
        shutil.rmtree(directory, ignore_errors=True)
