"""The files in ``etc/`` at work: a gateway on a Unix socket, and real reverse proxies before it."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from gateway_slurm.testing.processes import free_port
from helpers.gateway_process import JUPYTER_SLURM, USERS, Gateway, make_token, write_project
from helpers.kernel_clients import READY
from helpers.notebook_server import Server

ETC = Path(__file__).parents[2] / "etc"
SOCKET = "/run/gateway_slurm/http.sock"
PASSWORD = "correct horse"  # noqa: S105 - only these tests use it


def adapted(path: Path, changes: Mapping[str, str], *, unmark: str = "") -> str:
    """A file of ``etc/`` with what is a site's own replaced; each text must be there. Marked lines lose the mark."""
    text = path.read_text()
    for old, new in changes.items():
        assert old in text, f"{path} has no {old!r}"
        text = text.replace(old, new)
    return text.replace(f"#{unmark}# ", "") if unmark else text


# -- the gateway on a Unix socket ---------------------------------------------------------------------


@contextmanager
def gateway_on_socket(directory: Path, *options: str) -> Iterator[Gateway]:
    """A gateway as etc/systemd starts it; SIGTERM at the end. Its URL is the socket's path, for proxies."""
    write_project(directory / "projects")
    tokens = directory / "tokens.json"
    made = {user: make_token(tokens, user, *kind) for user, kind in USERS.items()}
    path, log = directory / "http.sock", directory / "gateway.log"
    argv = [*JUPYTER_SLURM, "gateway", f"--SlurmGatewayApp.sock={path}", "--SlurmGatewayApp.sock_mode=0660"]
    argv += [f"--tokens={tokens}", f"--kernelspecs={directory / 'projects'}", "--allow-root", *options]
    with running(argv, log, lambda: connects(socket.AF_UNIX, str(path))) as process:
        yield Gateway(process, str(path), log, made)


@contextmanager
def running(
    argv: list[str],
    log: Path,
    is_up: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
    *,
    directory: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon, once ``is_up`` says so; SIGTERM at the end, which it has to obey."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
            cwd=directory,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + READY
        while not is_up():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()


def connects(family: int, address: object) -> bool:
    """Whether a process listens there."""
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


# -- proxies --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """Self-signed, for localhost and 127.0.0.1."""

    file: Path
    key: Path

    @classmethod
    def make(cls, directory: Path) -> Certificate:
        """By openssl, as an admin would."""
        made = cls(directory / "cert.pem", directory / "key.pem")
        argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        argv += ["-keyout", str(made.key), "-out", str(made.file), "-days", "2", "-subj", "/CN=localhost"]
        argv += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run(argv, check=True, capture_output=True, timeout=READY)
        return made


@dataclass(frozen=True)
class Proxy:
    """A reverse proxy that runs, and the gateway behind it."""

    gateway: Gateway
    port: int
    certificate: Certificate
    access_log: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def of(self, user: str) -> Server:
        """The gateway as this user reaches it through the proxy."""
        return replace(self.gateway.of(user), url=self.url, ca=str(self.certificate.file))

    def ask(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "GET",
        body: bytes | None = None,
        source: str = "127.0.0.1",
    ) -> tuple[int, str]:
        """Status and body of a request from the address ``source`` of this machine."""
        context = ssl.create_default_context(cafile=str(self.certificate.file))
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, context=context, timeout=READY, source_address=(source, 0)
        )
        try:
            connection.request(method, path, body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        finally:
            connection.close()


@contextmanager
def nginx(
    directory: Path,
    gateway: Gateway,
    certificate: Certificate,
    *,
    knows_users: bool,
    mistakes: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Proxy]:
    """nginx with etc/nginx/gateway_slurm.conf, as a process of this user's; with ``mistakes``, texts and others."""
    port, access_log, passwords = free_port(), directory / "access.log", directory / "passwords"
    passwords.write_text("".join(f"{user}:{{PLAIN}}{PASSWORD}\n" for user in USERS))
    changes = {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen [::]:443 ssl;": "",
        "/etc/ssl/certs/gateway.example.org.pem": str(certificate.file),
        "/etc/ssl/private/gateway.example.org.key": str(certificate.key),
        "/var/log/nginx/gateway_slurm.log": str(access_log),
        "/etc/nginx/gateway_slurm.htpasswd": str(passwords),
        SOCKET: gateway.url,
        **mistakes,
    }
    text = adapted(ETC / "nginx/gateway_slurm.conf", changes, unmark="users" if knows_users else "")
    with running_nginx(directory, text, port):
        yield Proxy(gateway, port, certificate, access_log)


@contextmanager
def running_nginx(directory: Path, text: str, port: int) -> Iterator[None]:
    """nginx with this text for a site, as a process of this user's."""
    site = directory / "site.conf"
    site.write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    lines = ["daemon off;", "worker_processes 1;", f"pid {directory}/pid;", f"error_log {directory}/error.log;"]
    lines += ["user root;"] if os.geteuid() == 0 else []
    lines += ["events {}", "http {", *(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)]
    (directory / "nginx.conf").write_text("\n".join([*lines, f"include {site};", "}", ""]))
    argv = ["/usr/sbin/nginx", "-p", str(directory), "-c", str(directory / "nginx.conf")]
    argv += ["-e", str(directory / "error.log")]
    with running(argv, directory / "nginx.log", lambda: connects(socket.AF_INET, ("127.0.0.1", port))):
        yield


@contextmanager
def caddy(directory: Path, gateway: Gateway, certificate: Certificate, *, knows_users: bool) -> Iterator[Proxy]:
    """Caddy with etc/caddy/Caddyfile, as a process of this user's."""
    port, log = free_port(), directory / "caddy.log"
    argv = ["caddy", "hash-password", "--plaintext", PASSWORD]
    password = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=READY).stdout.strip()
    changes = {
        "gateway.example.org {": f"https://localhost:{port}, https://127.0.0.1:{port} {{",
        "#cert# ": "",
        "/etc/ssl/certs/gateway.example.org.pem": str(certificate.file),
        "/etc/ssl/private/gateway.example.org.key": str(certificate.key),
        "ada $2a$14$HASH-THAT-CADDY-HASH-PASSWORD-PRINTS": f"alice {password}",
        SOCKET: gateway.url,
    }
    site = adapted(ETC / "caddy/Caddyfile", changes, unmark="users" if knows_users else "")
    with running_caddy(directory, site, port):
        yield Proxy(gateway, port, certificate, log)


@contextmanager
def running_caddy(directory: Path, site: str, port: int) -> Iterator[None]:
    """Caddy with this text for a site, as a process of this user's."""
    log = directory / "caddy.log"
    (directory / "Caddyfile").write_text("{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + site)
    argv = ["caddy", "run", "--adapter", "caddyfile", "--config", str(directory / "Caddyfile")]
    places = {name: str(directory) for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    with running(argv, log, lambda: connects(socket.AF_INET, ("127.0.0.1", port)), places):
        yield


PROXIES = {"nginx": nginx, "caddy": caddy}
