"""The destination of a login, by URL and configuration; and the lines of known_hosts files that apply to a host."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from gateway_slurm.errors import ConfigError, HostKeyRefused
from gateway_slurm.slurm.ssh.config import Destination, resolve_destination
from gateway_slurm.slurm.ssh.host_keys import KnownKey, check_host_key, known_keys
from gateway_slurm.slurm.ssh.remote import bootstrap
from gateway_slurm.slurm.url import parse_cluster_url

CONFIG = """
Include more/*.conf
Host cluster
  HostName login01.example.org
  Port 2222
  User "ann"
  IdentityFile ~/.ssh/cluster key
  IdentitiesOnly yes
  UserKnownHostsFile ~/known "~/known two"
  GlobalKnownHostsFile none
  StrictHostKeyChecking no
Host alias
  HostName login02.example.org
  HostKeyAlias Cluster-Key
Host behind
  ProxyJump bob@first:2200,second
Host first
  ProxyJump zeroth
Host loop
  ProxyJump loop
Host command
  ProxyCommand nc %h %p
Host *
  User anyone
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the configuration."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh" / "more").mkdir(parents=True)
    (tmp_path / ".ssh" / "config").write_text(CONFIG)
    (tmp_path / ".ssh" / "config").chmod(0o600)
    return tmp_path


def destination(text: str) -> Destination:
    """Resolve a URL."""
    return resolve_destination(parse_cluster_url(text))


def test_an_alias_is_followed(home: Path) -> None:
    """Host, port, user, key and known_hosts files."""
    found = destination("ssh://cluster")
    assert (found.host, found.port, found.user) == ("login01.example.org", 2222, "ann")
    assert found.known_hosts_name == "[login01.example.org]:2222"
    assert found.identities == (f"{home}/.ssh/cluster key",)
    assert found.identities_only
    assert found.known_hosts == (f"{home}/known", f"{home}/known two")


def test_the_url_comes_before_the_configuration(home: Path) -> None:
    """The URL decides user and port."""
    found = destination("ssh://bob@cluster:22")
    assert (found.user, found.port, found.known_hosts_name) == ("bob", 22, "login01.example.org")


def test_what_the_configuration_does_not_say_is_as_ssh_has_it(home: Path) -> None:
    """Port 22, the usual keys, the usual known_hosts files."""
    found = destination("ssh://elsewhere.example.org")
    assert (found.host, found.port, found.user) == ("elsewhere.example.org", 22, "anyone")
    assert found.identities[0] == f"{home}/.ssh/id_ed25519"
    assert f"{home}/.ssh/known_hosts" in found.known_hosts
    assert "/etc/ssh/ssh_known_hosts" in found.known_hosts


def test_a_key_alias_is_what_known_hosts_files_have(home: Path) -> None:
    """In lower case."""
    assert destination("ssh://alias:2222").known_hosts_name == "cluster-key"


def test_included_files_are_read(home: Path) -> None:
    """The first value counts, and the included one comes first."""
    (home / ".ssh" / "more" / "a.conf").write_text("Host cluster\n  Port 2223\n")
    assert destination("ssh://cluster").port == 2223


def test_files_that_include_one_another_are_an_error(home: Path) -> None:
    """They are no endless loop."""
    (home / ".ssh" / "more" / "a.conf").write_text("Include more/a.conf\n")
    with pytest.raises(ConfigError, match="nested more than"):
        destination("ssh://cluster")


def test_a_configuration_that_others_can_write_is_refused(home: Path) -> None:
    """Other users could choose the host that gets the passwords."""
    (home / ".ssh" / "config").chmod(0o666)
    with pytest.raises(ConfigError, match="chmod 600"):
        destination("ssh://cluster")


def test_jump_hosts_come_in_the_order_in_which_they_are_dialled(home: Path) -> None:
    """The first one's own jump hosts come before it, each with its own user and port."""
    hops = [(hop.user, hop.host, hop.port) for hop in destination("ssh://behind").jumps]
    assert hops == [("anyone", "zeroth", 22), ("bob", "first", 2200), ("anyone", "second", 22)]


def test_a_host_on_its_own_way_is_dialled_itself(home: Path) -> None:
    """``Host *`` has this effect."""
    assert destination("ssh://loop").jumps == ()


def test_a_proxy_command_is_refused_and_not_passed_over(home: Path) -> None:
    """Without it the host would be dialled directly, and the failure would not name the cause."""
    with pytest.raises(ConfigError, match="ProxyJump"):
        destination("ssh://command")


def test_without_a_configuration_the_url_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file has to exist."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(destination("ssh://ann@[2001:db8::1]:2222")) == "ann@[2001:db8::1]:2222"


@pytest.mark.parametrize("python", ["python3; id", "$(id)", "a b", "'", "", "~/python"])
def test_a_python_that_a_shell_would_read_otherwise_is_refused(python: str) -> None:
    """The path stands in the command line that a login shell reads."""
    with pytest.raises(ValueError, match="path"):
        bootstrap(python)


# -- known_hosts -------------------------------------------------------------------------------------------


class Key:
    """A host's key."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def get_name(self) -> str:
        return "ssh-ed25519"

    def asbytes(self) -> bytes:
        return self._blob


@pytest.mark.parametrize(
    ("patterns", "name", "fits"),
    [
        ("login", "login", True),
        ("Login", "login", True),
        ("login", "login2", False),
        ("other,login", "login", True),
        ("*.example.org", "a.example.org", True),
        ("*.example.org,!a.example.org", "a.example.org", False),
        ("login?", "login1", True),
        ("[login]:2222", "[login]:2222", True),
        ("[login]:2222", "login", False),
        ("login", "[login]:2222", False),
        ("[*.example.org]:2222", "[a.example.org]:2222", True),
        ("[log]", "l", False),
        ("|1|c2FsdA==|bm8=", "login", False),
        ("|2|x", "login", False),
    ],
)
def test_a_line_is_about_the_hosts_that_its_patterns_fit(tmp_path: Path, patterns: str, name: str, fits: bool) -> None:
    """The rules are those of sshd(8); brackets are not a set of letters."""
    path = tmp_path / "known"
    path.write_text(
        f"\n# comment\nrubbish\nlogin ssh-ed25519 !!!\n{patterns} ssh-ed25519 {base64.b64encode(b'k').decode()} c\n"
    )
    assert bool(known_keys(name, [str(path), str(tmp_path / "none")])) is fits


def test_a_key_of_another_host_is_of_no_use() -> None:
    """Only the keys of this host count."""
    with pytest.raises(HostKeyRefused, match="CHANGED"):
        check_host_key("login", Key(b"one"), [KnownKey("ssh-ed25519", b"two", revoked=False, location="f:1")], ["f"])
    check_host_key("login", Key(b"two"), [KnownKey("ssh-ed25519", b"two", revoked=False, location="f:1")], ["f"])


def test_a_host_of_which_only_revoked_keys_are_known_is_unknown() -> None:
    """Another key of it is refused like any unknown key."""
    with pytest.raises(HostKeyRefused, match="not known"):
        check_host_key("login", Key(b"one"), [KnownKey("ssh-ed25519", b"two", revoked=True, location="f:1")], ["f"])
