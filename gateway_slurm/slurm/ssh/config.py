"""Where and as whom to log in: the URL first, then ``~/.ssh/config``, then ssh's own defaults.

Source: ssh_config(5). What is honoured: Host, Match, Include, HostName, User, Port, IdentityFile, IdentitiesOnly,
CertificateFile, ProxyJump, UserKnownHostsFile, GlobalKnownHostsFile and HostKeyAlias. Host keys are checked strictly,
whatever StrictHostKeyChecking says.
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
from gateway_slurm.slurm.url import ClusterUrl, parse_cluster_url

MAX_JUMPS: Final = 8
_INCLUDE: Final = re.compile(r"\s*include(?:\s+|\s*=\s*)(.+)", re.IGNORECASE)
_INCLUDE_DEPTH: Final = 8
_MAX_CONFIG: Final = 1 << 20  # bytes
_DEFAULT_IDENTITIES: Final = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
_USER_KNOWN_HOSTS: Final = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
_GLOBAL_KNOWN_HOSTS: Final = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"


@dataclass(frozen=True)
class Target:
    """One host to log in to. ``jumps`` are the hosts on the way, the first to be dialled first; they have none."""

    host: str
    port: int
    user: str
    known_as: str
    """The name under which known_hosts files have it: with its port, where that is not 22 (sshd(8))."""
    identities: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    identities_only: bool = False
    """Whether the agent is asked for the keys of ``identities`` only."""
    known_hosts: tuple[str, ...] = ()
    jumps: tuple[Target, ...] = ()

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}:{self.port}"


def resolve(
    url: ClusterUrl,
    *,
    config_file: str = "~/.ssh/config",
    identity_files: tuple[str, ...] = (),
    known_hosts: tuple[str, ...] = (),
) -> Target:
    """Return the target that an ``ssh://`` URL means; reads files, and so may take a moment.

    ``identity_files`` and ``known_hosts``, where given, are taken instead of the configuration's for the login node,
    and ``known_hosts`` for the jump hosts, too. Raises ConfigError for a configuration that cannot be followed.
    """
    config = _load(Path(config_file).expanduser())
    target = _target(config, url, identity_files, known_hosts)
    jumps = _jumps(config, url.host, known_hosts, frozenset())
    return Target(**{**vars(target), "jumps": jumps})


def _target(config: Any, url: ClusterUrl, identities: tuple[str, ...], known_hosts: tuple[str, ...]) -> Target:
    options = _lookup(config, url.host)
    if options.get("proxycommand"):
        raise ConfigError(
            f"{url.host}: ProxyCommand in the SSH configuration is not followed; name the host on the way in ProxyJump"
        )
    port = url.port or int(options.get("port", 22))
    host = options["hostname"]
    files = _paths(options.get("userknownhostsfile", _USER_KNOWN_HOSTS))
    files += _paths(options.get("globalknownhostsfile", _GLOBAL_KNOWN_HOSTS))
    return Target(
        host=host,
        port=port,
        user=url.user or options.get("user") or getpass.getuser(),
        known_as=options.get("hostkeyalias", host if port == 22 else f"[{host}]:{port}").lower(),
        identities=_expanded(identities or tuple(options.get("identityfile", ())) or _DEFAULT_IDENTITIES),
        certificates=_expanded(tuple(_words(options.get("certificatefile", "")))),
        identities_only=options.get("identitiesonly", "no").lower() == "yes",
        known_hosts=_expanded(known_hosts) or files,
    )


def _jumps(config: Any, host: str, known_hosts: tuple[str, ...], seen: frozenset[str]) -> tuple[Target, ...]:
    """The hosts of ProxyJump, ``[user@]host[:port]`` or URLs, with commas between them.

    A host that is on its own way (``Host *``) is dialled itself.
    """
    value = _lookup(config, host).get("proxyjump") or "none"
    seen |= {host}
    if value.lower() == "none":
        return ()
    jumps: list[Target] = []
    for text in value.split(","):
        hop = text.strip()
        try:
            url = parse_cluster_url(hop if hop.startswith("ssh://") else f"ssh://{hop}")
        except ValueError as error:
            raise ConfigError(f"ProxyJump in the SSH configuration: {error}") from error
        if url.host in seen:
            continue
        if not jumps:
            # As ssh does: the first one may have hosts on its own way.
            jumps += _jumps(config, url.host, known_hosts, seen)
        jumps.append(_target(config, url, (), known_hosts))
        if len(jumps) > MAX_JUMPS:
            raise ConfigError(f"ProxyJump in the SSH configuration leads over more than {MAX_JUMPS} hosts")
    return tuple(jumps)


# -- the file ---------------------------------------------------------------------------------------------


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
        raise ConfigError(f"the SSH configuration cannot be followed for {host}: {error}") from error


def _lines(path: Path, depth: int) -> list[str]:
    """The file's lines, with those of the files that it includes in their places."""
    if depth > _INCLUDE_DEPTH:
        raise ConfigError(f"{path}: more than {_INCLUDE_DEPTH} files include one another")
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            facts = os.fstat(file.fileno())
            # As ssh does: whoever writes it chooses where passwords go.
            if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigError(
                    f"{path} may be written by others: chmod 600 it, and have it belong to you or to root"
                )
            if facts.st_size > _MAX_CONFIG:
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
        for pattern in _words(include[1]):
            # Relative ones are in ~/.ssh for a user's configuration.
            for name in sorted(glob.glob(str(Path("~/.ssh").expanduser() / Path(pattern).expanduser()))):
                found += _lines(Path(name), depth + 1)
    return found


def _words(text: str) -> list[str]:
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', text)]


def _paths(text: str) -> tuple[str, ...]:
    return () if text.lower() == "none" else _expanded(tuple(_words(text)))


def _expanded(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(os.path.expanduser(path) for path in paths)
