"""The destination of an SSH login: from the URL, then from ``~/.ssh/config``, then from ssh's defaults.

Source: ssh_config(5). Supported: Host, Match, Include, HostName, User, Port, IdentityFile, IdentitiesOnly,
CertificateFile, ProxyJump, UserKnownHostsFile, GlobalKnownHostsFile and HostKeyAlias. Host keys are always checked
strictly; StrictHostKeyChecking is ignored.
"""

from __future__ import annotations

import getpass
import glob
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway_slurm.errors import ConfigError
from gateway_slurm.slurm.url import ClusterUrl, host_and_port, parse_cluster_url

MAX_JUMPS: Final = 8
_INCLUDE: Final = re.compile(r"\s*include(?:\s+|\s*=\s*)(.+)", re.IGNORECASE)
_MAX_INCLUDE_DEPTH: Final = 8
_MAX_CONFIG: Final = 1 << 20  # bytes
_DEFAULT_IDENTITIES: Final = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
_USER_KNOWN_HOSTS: Final = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
_GLOBAL_KNOWN_HOSTS: Final = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"


@dataclass(frozen=True)
class Destination:
    """One host to log in to. ``jumps`` are its jump hosts in the order of connection; they have no jumps themselves."""

    host: str
    port: int
    user: str
    known_hosts_name: str
    """The host's name in known_hosts files, which includes the port if it is not 22 (sshd(8))."""
    identities: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    identities_only: bool = False
    """Whether only those keys of the agent are used that are among ``identities``."""
    known_hosts: tuple[str, ...] = ()
    jumps: tuple[Destination, ...] = ()

    def __str__(self) -> str:
        return f"{self.user}@{host_and_port(self.host, self.port)}"


def resolve_destination(
    url: ClusterUrl,
    *,
    config_file: str = "~/.ssh/config",
    identity_files: tuple[str, ...] = (),
    known_hosts: tuple[str, ...] = (),
) -> Destination:
    """Return the destination of an ``ssh://`` URL. Reads files, which may block for a moment.

    For the login node ``identity_files`` and ``known_hosts``, if given, replace those of the configuration;
    ``known_hosts`` does so for the jump hosts as well. Raises ConfigError for a configuration that is not supported.
    """
    config = _load(Path(config_file).expanduser())
    destination = _destination(config, url, identity_files, known_hosts)
    jumps = _jumps(config, url.host, known_hosts, frozenset())
    return Destination(**{**vars(destination), "jumps": jumps})


def _destination(
    config: Any, url: ClusterUrl, identities: tuple[str, ...], known_hosts: tuple[str, ...]
) -> Destination:
    options = _lookup(config, url.host)
    if options.get("proxycommand"):
        raise ConfigError(
            f"{url.host}: ProxyCommand in the SSH configuration is not supported; name the jump host in ProxyJump"
        )
    port = url.port or int(options.get("port", 22))
    host = options["hostname"]
    files = _paths(options.get("userknownhostsfile", _USER_KNOWN_HOSTS))
    files += _paths(options.get("globalknownhostsfile", _GLOBAL_KNOWN_HOSTS))
    return Destination(
        host=host,
        port=port,
        user=url.user or options.get("user") or getpass.getuser(),
        known_hosts_name=options.get("hostkeyalias", host if port == 22 else f"[{host}]:{port}").lower(),
        identities=_expanded(identities or tuple(options.get("identityfile", ())) or _DEFAULT_IDENTITIES),
        certificates=_expanded(tuple(_split(options.get("certificatefile", "")))),
        identities_only=options.get("identitiesonly", "no").lower() == "yes",
        known_hosts=_expanded(known_hosts) or files,
    )


def _jumps(config: Any, host: str, known_hosts: tuple[str, ...], seen: frozenset[str]) -> tuple[Destination, ...]:
    """Return the hosts of ProxyJump, which are ``[user@]host[:port]`` or URLs with commas between them.

    A host that is its own jump host (``Host *``) is connected to directly.
    """
    value = _lookup(config, host).get("proxyjump") or "none"
    seen |= {host}
    if value.lower() == "none":
        return ()
    jumps: list[Destination] = []
    for text in value.split(","):
        hop = text.strip()
        try:
            url = parse_cluster_url(hop if hop.startswith("ssh://") else f"ssh://{hop}")
        except ValueError as error:
            raise ConfigError(f"ProxyJump in the SSH configuration: {error}") from error
        if url.host in seen:
            continue
        if not jumps:
            # As in ssh, only the first jump host may have jump hosts of its own.
            jumps += _jumps(config, url.host, known_hosts, seen)
        jumps.append(_destination(config, url, (), known_hosts))
        if len(jumps) > MAX_JUMPS:
            raise ConfigError(f"ProxyJump in the SSH configuration has more than {MAX_JUMPS} hosts")
    return tuple(jumps)


# -- Reading the configuration file --


def _load(path: Path) -> Any:
    import paramiko

    try:
        return paramiko.SSHConfig.from_text("\n".join(_lines(path, 0)) if path.exists() else "")
    except paramiko.SSHException as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _lookup(config: Any, host: str) -> Any:
    import paramiko

    try:
        return config.lookup(host)
    except (paramiko.SSHException, ValueError, ImportError, OSError) as error:  # ImportError: "Match exec"
        raise ConfigError(f"the SSH configuration cannot be used for {host}: {error}") from error


def _lines(path: Path, depth: int) -> list[str]:
    """Return the file's lines, with the lines of included files in place of Include."""
    if depth > _MAX_INCLUDE_DEPTH:
        raise ConfigError(f"{path}: includes are nested more than {_MAX_INCLUDE_DEPTH} deep")
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            status = os.fstat(file.fileno())
            # As in ssh: a user who can write this file chooses the host that gets the passwords. Reading is harmless.
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigError(
                    f"other users may write {path}: run chmod 600 on it; it must belong to this process's user or root"
                )
            if status.st_size > _MAX_CONFIG:
                raise ConfigError(f"{path} has more than {_MAX_CONFIG} bytes")
            lines = file.read().splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    found: list[str] = []
    for line in lines:
        include = _INCLUDE.fullmatch(line)
        if include is None:
            found.append(line)
            continue
        for pattern in _split(include[1]):
            # In a user's configuration, relative paths are relative to ~/.ssh.
            for name in sorted(glob.glob(str(Path("~/.ssh").expanduser() / Path(pattern).expanduser()))):
                found += _lines(Path(name), depth + 1)
    return found


def _split(text: str) -> list[str]:
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', text)]


def _paths(text: str) -> tuple[str, ...]:
    return () if text.lower() == "none" else _expanded(tuple(_split(text)))


def _expanded(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(os.path.expanduser(path) for path in paths)
