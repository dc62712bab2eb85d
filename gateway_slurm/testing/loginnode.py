"""A login node for development and tests: a real sshd of our own, with keys of our own, on a port of our own."""

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

from gateway_slurm.errors import ClusterError
from gateway_slurm.testing.layout import Host

USER = pwd.getpwuid(os.geteuid()).pw_name
_SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or "sshd"


_HERE = Host("127.0.0.1")


def make_key(path: Path, *, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new key pair; return the private one's path."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)]
    subprocess.run(command, check=True, timeout=30, stdin=subprocess.DEVNULL)
    return path


class LoginNode:
    """Runs as whoever runs the tests, and lets that user in by ``key``; ``up`` starts it, ``down`` ends it."""

    def __init__(
        self,
        directory: Path,
        *,
        forwarding: bool = False,
        options: tuple[str, ...] = (),
        host: Host = _HERE,
    ) -> None:
        """``options`` are lines of sshd_config(5) that come first, and so count; ``host`` is where sshd runs."""
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
        """For ``SlurmService.cluster``."""
        return f"ssh://{USER}@{self.host.address}:{self.port}"

    @property
    def log(self) -> str:
        """What sshd has said."""
        return (self.directory / "log").read_text(errors="replace")

    def connections(self) -> list[str]:
        """Who is connected, by this machine's list of TCP connections: ``address:port`` in hexadecimal digits."""
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [each[2] for each in lines if each[1].endswith(f":{self.port:04X}") and each[3] == "01"]

    def known_hosts(self, *ports: int) -> Path:
        """A known_hosts file with its key, also under other ports of this machine."""
        path = self.directory / f"known_hosts-{'-'.join(map(str, ports)) or 'own'}"
        key = Path(f"{self.host_key}.pub").read_text()
        path.write_text("".join(f"[{self.host.address}]:{port} {key}" for port in (self.port, *ports)))
        return path

    def settings(self, *ports: int) -> dict[str, object]:
        """Traits of SlurmService with which a server logs in here; through ``ports``, if any, the first of them."""
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
        """Start it, and return when it listens."""
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
                raise ClusterError(f"sshd did not come up: {self.log[-2000:]}")
            time.sleep(0.02)

    def down(self) -> None:
        """End it, with all its sessions."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(10)
            self._process = None


@contextmanager
def login_node(**options: object) -> Iterator[LoginNode]:
    """A login node in a directory of its own, up."""
    directory = Path(tempfile.mkdtemp(prefix="gsl-", dir="/tmp"))
    node = LoginNode(directory / "node", **options)  # type: ignore[arg-type]
    try:
        node.up()
        yield node
    finally:
        node.down()
        shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    """A TCP port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
