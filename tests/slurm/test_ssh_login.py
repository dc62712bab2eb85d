"""Logging in: host keys, keys, agents, certificates, passwords, questions, jump hosts; by real sshds where they can."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pexpect
import pytest

from gateway_slurm.errors import ConfigError, HostKeyRefused, LoginRefused, SshError
from gateway_slurm.slurm.ssh.host_keys import fingerprint
from helpers import HELPERS
from helpers.login_node import USER, LoginNode, login_node, make_key
from helpers.private_slurm import poll
from helpers.ssh_login import logged_in

OURS = "one two"  # what the tests' own server takes for a password


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user who runs the tests may have SSH keys."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


# -- the host's key ----------------------------------------------------------------------------------------


def host_fingerprint(node: LoginNode) -> str:
    """The host key's, by OpenSSH's own word."""
    text = subprocess.run(["ssh-keygen", "-lf", f"{node.host_key}.pub"], capture_output=True, text=True, check=True)
    return text.stdout.split()[1]


def test_an_unknown_host_is_refused_with_its_fingerprint_and_what_to_do(node: LoginNode, tmp_path: Path) -> None:
    """Nothing of ours is offered to it: no user is named, no key is tried."""
    before = len(node.log)
    with pytest.raises(HostKeyRefused) as refused:
        logged_in(node.url, identities=(node.key,), known=tmp_path / "none")
    assert host_fingerprint(node) in str(refused.value)
    assert f"ssh-keyscan -p {node.port} 127.0.0.1" in str(refused.value)
    assert str(tmp_path / "none") in str(refused.value)
    assert USER not in node.log[before:]
    assert "publickey" not in node.log[before:]


def test_a_changed_key_is_refused(node: LoginNode, tmp_path: Path) -> None:
    """The error has both fingerprints, and the line that has the other one."""
    other = Path(f"{make_key(tmp_path / 'other')}.pub").read_text()
    known = tmp_path / "known"
    known.write_text(f"# a comment\n[127.0.0.1]:{node.port} {other}")
    with pytest.raises(HostKeyRefused, match=r"CHANGED.*known:2") as refused:
        logged_in(node.url, identities=(node.key,), known=known)
    assert host_fingerprint(node) in str(refused.value)


def test_a_revoked_key_is_refused_though_it_is_known(node: LoginNode, tmp_path: Path) -> None:
    """As sshd(8) says of ``@revoked``."""
    line = node.known_hosts().read_text()
    known = tmp_path / "known"
    known.write_text(f"{line}@revoked * {line.split(' ', 1)[1]}")
    with pytest.raises(HostKeyRefused, match="revoked"):
        logged_in(node.url, identities=(node.key,), known=known)


def test_a_hashed_known_hosts_file_is_read(node: LoginNode, tmp_path: Path) -> None:
    """As ``ssh-keygen -H`` writes it."""
    known = tmp_path / "known"
    known.write_text(node.known_hosts().read_text())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    assert "127.0.0.1" not in known.read_text()
    assert logged_in(node.url, identities=(node.key,), known=known) == USER


def test_the_known_kind_of_key_is_asked_for(tmp_path: Path) -> None:
    """A host with several keys is not taken for a changed one when another kind is known."""
    rsa = make_key(tmp_path / "rsa", kind="rsa")
    with login_node(options=(f"HostKey {rsa}",)) as node:
        known = tmp_path / "known"
        known.write_text(f"[127.0.0.1]:{node.port} {Path(f'{rsa}.pub').read_text()}")
        assert logged_in(node.url, identities=(node.key,), known=known) == USER


@pytest.fixture
def certified(tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    """``certified("-n", "127.0.0.1")`` returns lines for sshd's configuration, and the authority's key."""

    def make(*options: str, kind: str = "ed25519", host: bool = True) -> tuple[str, Path]:
        authority = make_key(tmp_path / "authority", kind=kind)
        key = make_key(tmp_path / "certified", kind=kind)
        sign = ["ssh-keygen", "-q", "-s", str(authority), "-I", "login", *(["-h"] if host else []), *options]
        subprocess.run([*sign, f"{key}.pub"], check=True, capture_output=True)
        return f"HostKey {key}\nHostCertificate {key}-cert.pub", authority

    return make


def authority_line(patterns: str, authority: Path, path: Path, marker: str = "@cert-authority") -> Path:
    """A known_hosts file with nothing but it."""
    path.write_text(f"{marker} {patterns} {Path(f'{authority}.pub').read_text()}")
    return path


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_a_host_with_a_certificate_of_a_known_authority_is_known(certified, tmp_path: Path, kind: str) -> None:
    """``@cert-authority`` of the name, whatever the port; no key of the host is in the file."""
    lines, authority = certified("-n", "127.0.0.1,login", "-V", "-5m:+5m", kind=kind)
    with login_node(options=(lines,)) as node:
        known = authority_line("127.*", authority, tmp_path / "known")
        assert logged_in(node.url, identities=(node.key,), known=known) == USER
        # One line for this host's own key, too: that one is asked for all the same.
        known.write_text(known.read_text() + node.known_hosts().read_text())
        assert logged_in(node.url, identities=(node.key,), known=known) == USER


@pytest.mark.parametrize(
    ("options", "patterns", "words"),
    [
        (("-n", "login,10.*"), "127.*", "it is for login, 10"),
        ((), "127.*", "it is for no host at all"),
        (("-n", "127.0.0.1", "-V", "20200101:20200102"), "127.*", "it is valid from 2020-01-01"),
        (("-n", "127.0.0.1"), "10.*", "is not known"),
    ],
)
def test_a_certificate_that_does_not_vouch_for_the_host_is_refused(
    certified, tmp_path: Path, options: tuple[str, ...], patterns: str, words: str
) -> None:
    """Of another name, of another time, of an authority for other hosts."""
    lines, authority = certified(*options)
    with login_node(options=(lines,)) as node:
        known = authority_line(patterns, authority, tmp_path / "known")
        with pytest.raises(HostKeyRefused, match=words):
            logged_in(node.url, identities=(node.key,), known=known)


def test_a_certificate_of_another_authority_is_refused(certified, tmp_path: Path) -> None:
    """And so is one whose authority is revoked, though it is known as one, too."""
    lines, authority = certified("-n", "127.0.0.1")
    with login_node(options=(lines,)) as node:
        known = authority_line("*", make_key(tmp_path / "other"), tmp_path / "known")
        with pytest.raises(HostKeyRefused, match="none of the known authorities signed it"):
            logged_in(node.url, identities=(node.key,), known=known)
        revoked = authority_line("*", authority, tmp_path / "revoked", "@revoked").read_text()
        known = authority_line("*", authority, tmp_path / "known")
        known.write_text(known.read_text() + revoked)
        with pytest.raises(HostKeyRefused, match="revoked in"):
            logged_in(node.url, identities=(node.key,), known=known)


# -- keys --------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_refused_with_what_was_tried(node: LoginNode, tmp_path: Path) -> None:
    """The message names the key, what the host takes, and the settings."""
    wrong = make_key(tmp_path / "wrong")
    with pytest.raises(LoginRefused, match=r"ssh_identity_files") as refused:
        logged_in(node.url, identities=(wrong,), known=node.known_hosts())
    assert str(wrong) in str(refused.value)
    assert "publickey" in str(refused.value)


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_keys_of_each_kind_are_taken(node: LoginNode, tmp_path: Path, kind: str) -> None:
    """After one that the host does not know."""
    wrong, right = make_key(tmp_path / "wrong"), make_key(tmp_path / "right", kind=kind)
    with node.authorized.open("a") as file:
        file.write(Path(f"{right}.pub").read_text())
    assert logged_in(node.url, identities=(wrong, right), known=node.known_hosts()) == USER


def test_a_key_that_others_can_read_is_not_used(node: LoginNode, tmp_path: Path) -> None:
    """As ssh does; the message says so."""
    key = tmp_path / "key"
    key.write_text(node.key.read_text())
    key.chmod(0o644)
    with pytest.raises(LoginRefused, match=r"other users may read it.*chmod 600"):
        logged_in(node.url, identities=(key,), known=node.known_hosts())


def test_a_certificate_lets_in_where_its_key_would_not(node: LoginNode, tmp_path: Path) -> None:
    """``-cert.pub`` beside the key is found."""
    key = make_key(tmp_path / "key")
    sign = ["ssh-keygen", "-q", "-s", str(node.ca), "-I", "test", "-n", USER, "-V", "+5m", f"{key}.pub"]
    with pytest.raises(LoginRefused):
        logged_in(node.url, identities=(key,), known=node.known_hosts())
    subprocess.run(sign, check=True, capture_output=True)
    assert logged_in(node.url, identities=(key,), known=node.known_hosts()) == USER


def test_the_agents_keys_are_taken(node: LoginNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real ssh-agent; no key file is there."""
    path = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        assert poll(path.exists, timeout=10)
        subprocess.run(["ssh-add", "-q", str(node.key)], check=True, timeout=20)
        assert logged_in(node.url, known=node.known_hosts()) == USER
    finally:
        agent.terminate()
        agent.wait()


def test_a_key_with_a_passphrase_is_refused_without_a_user_to_ask(node: LoginNode, tmp_path: Path) -> None:
    """The error says that it has one; nothing waits for an answer."""
    key = make_key(tmp_path / "key", passphrase=OURS)
    with pytest.raises(LoginRefused, match="passphrase"):
        logged_in(node.url, identities=(key,), known=node.known_hosts())


LOG_IN = """
import sys
sys.path.insert(0, {tests!r})
from helpers.ssh_login import logged_in
print("in as", logged_in({url!r}, identities=({key!r},), known={known!r}))
"""


def test_a_user_with_a_terminal_is_asked(node: LoginNode, tmp_path: Path) -> None:
    """For the passphrase here; what is typed is not shown."""
    key = make_key(tmp_path / "key", passphrase=OURS)
    with node.authorized.open("a") as file:
        file.write(Path(f"{key}.pub").read_text())
    here = str(HELPERS.parent)
    code = LOG_IN.format(tests=here, url=node.url, key=str(key), known=str(node.known_hosts()))
    child = pexpect.spawn(sys.executable, ["-c", code], timeout=40, encoding="utf-8", echo=True)
    child.expect("passphrase of .*key: ")
    child.sendline(OURS)
    child.expect(f"in as {USER}")
    assert OURS not in child.before
    child.close()


# -- ~/.ssh/config and jump hosts ----------------------------------------------------------------------------


def test_the_ssh_configuration_is_followed(node: LoginNode, tmp_path: Path) -> None:
    """Host name, port, user, identity and known_hosts file of an alias."""
    config = tmp_path / "config"
    config.write_text(
        f"Host cluster\n HostName 127.0.0.1\n Port {node.port}\n User {USER}\n IdentityFile {node.key}\n"
        f" UserKnownHostsFile {node.known_hosts()}\n"
    )
    assert logged_in("ssh://cluster", identities=(), known="", config=config) == USER


def test_a_host_behind_another_is_reached_by_it(node: LoginNode, tmp_path: Path) -> None:
    """ProxyJump; both keys are checked, and the second sshd sees a connection of the first's."""
    with login_node(forwarding=True) as jump:
        known = tmp_path / "known"
        known.write_text(node.known_hosts().read_text() + jump.known_hosts().read_text())
        config = tmp_path / "config"
        config.write_text(
            f"Host cluster\n HostName 127.0.0.1\n Port {node.port}\n IdentityFile {node.key}\n ProxyJump jump\n"
            f"Host jump\n HostName 127.0.0.1\n Port {jump.port}\n IdentityFile {jump.key}\n"
            f"Host *\n User {USER}\n UserKnownHostsFile {known}\n"
        )
        assert logged_in("ssh://cluster", identities=(), known="", config=config) == USER
        assert "Accepted publickey" in jump.log
        known.write_text(node.known_hosts().read_text())
        with pytest.raises(HostKeyRefused, match=str(jump.port)):
            logged_in("ssh://cluster", identities=(), known="", config=config)


def test_a_jump_host_that_forwards_nothing_is_an_error(node: LoginNode, tmp_path: Path) -> None:
    """In the host's own words."""
    config = tmp_path / "config"
    config.write_text(f"Host *\n ProxyJump {USER}@127.0.0.1:{node.port}\n IdentityFile {node.key}\n")
    # (The jump host is on its own way by this; it is dialled itself.)
    with pytest.raises(SshError, match="prohibited"):
        logged_in("ssh://login", identities=(), known=node.known_hosts(), config=config)


# -- passwords and questions -----------------------------------------------------------------------------------


class Host(paramiko.ServerInterface):
    """A host that asks; a real sshd needs PAM and another user for that. ``steps`` are what it wants, one by one."""

    def __init__(self, steps: list[str]) -> None:
        self.steps = list(steps)
        self.asked: list[str] = []

    def get_allowed_auths(self, username: str) -> str:
        return self.steps[0]

    def _done(self, right: bool) -> int:
        if not right:
            return paramiko.AUTH_FAILED
        self.steps.pop(0)
        return paramiko.AUTH_PARTIALLY_SUCCESSFUL if self.steps else paramiko.AUTH_SUCCESSFUL

    def check_auth_password(self, username: str, password: str) -> int:
        return self._done(self.steps[0] == "password" and password == OURS)

    def check_auth_interactive(self, username: str, submethods: str) -> paramiko.InteractiveQuery | int:
        if self.steps[0] != "keyboard-interactive":
            return paramiko.AUTH_FAILED
        return paramiko.InteractiveQuery("", "The cluster", ("Password: ", False), ("Code: ", False))

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        return self._done(list(responses) == [OURS, "123456"])

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=run_there, args=(channel, command.decode()), daemon=True).start()
        return True


def run_there(channel: paramiko.Channel, command: str) -> None:
    """As sshd does: by the shell, with the channel for its input and output."""
    child = subprocess.Popen(command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S602

    def feed() -> None:
        assert child.stdin is not None
        while data := channel.recv(1 << 16):
            child.stdin.write(data)
            child.stdin.flush()
        child.stdin.close()

    threading.Thread(target=feed, daemon=True).start()
    assert child.stdout is not None
    while data := os.read(child.stdout.fileno(), 1 << 16):
        channel.sendall(data)
    channel.send_exit_status(child.wait())
    channel.close()


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Callable[..., tuple[str, Path]]]:
    """``asking("password")`` returns the URL of a host that wants one, and a known_hosts file that knows it."""
    listeners: list[socket.socket] = []
    transports: list[paramiko.Transport] = []
    key = paramiko.ECDSAKey.generate()

    def serve(listener: socket.socket, steps: list[str]) -> None:
        while True:
            try:
                sock, _peer = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(sock)
            transports.append(transport)
            transport.add_server_key(key)
            transport.start_server(event=threading.Event(), server=Host(steps))

    def make(*steps: str) -> tuple[str, Path]:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        port = listener.getsockname()[1]
        threading.Thread(target=serve, args=(listener, list(steps)), daemon=True).start()
        known = tmp_path / "known"
        known.write_text(f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")
        return f"ssh://ann@127.0.0.1:{port}", known

    yield make
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for transport in transports:
        transport.close()


def secrets_file(path: Path, *lines: str, mode: int = 0o600) -> Path:
    """A file with answers."""
    path.write_text("\n".join([*lines, ""]))
    path.chmod(mode)
    return path


def test_a_password_from_a_file_is_taken(asking: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    """Its first line."""
    url, known = asking("password")
    assert logged_in(url, known=known, password_file=secrets_file(tmp_path / "pw", OURS)) == USER


def test_a_wrong_password_is_refused_and_not_repeated(asking: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    """In the message neither."""
    url, known = asking("password")
    with pytest.raises(LoginRefused, match="password") as refused:
        logged_in(url, known=known, password_file=secrets_file(tmp_path / "pw", "hunter2"))
    assert "hunter2" not in str(refused.value)


def test_questions_are_answered_line_by_line(asking: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    """Keyboard-interactive, two questions at once."""
    url, known = asking("keyboard-interactive")
    assert logged_in(url, known=known, password_file=secrets_file(tmp_path / "pw", OURS, "123456")) == USER


def test_a_host_may_want_several_things_one_after_another(
    asking: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    """A password, then questions."""
    url, known = asking("password", "keyboard-interactive")
    lines = (OURS, OURS, "123456")
    assert logged_in(url, known=known, password_file=secrets_file(tmp_path / "pw", *lines)) == USER


def test_a_question_that_no_user_can_answer_is_an_error(
    asking: Callable[..., tuple[str, Path]], tmp_path: Path
) -> None:
    """With the host's own words, and the setting."""
    url, known = asking("keyboard-interactive")
    with pytest.raises(LoginRefused, match=r"Code.*ssh_password_file"):
        logged_in(url, known=known, password_file=secrets_file(tmp_path / "pw", OURS))


def test_a_password_file_that_others_can_read_is_refused(node: LoginNode, tmp_path: Path) -> None:
    """Nothing is dialled then; the message says what to do."""
    path = secrets_file(tmp_path / "pw", OURS, mode=0o640)
    with pytest.raises(ConfigError, match=r"ssh_password_file.*chmod 600"):
        logged_in("ssh://127.0.0.1:9", identities=(node.key,), known=node.known_hosts(), password_file=path)


def test_a_fingerprint_is_written_as_ssh_keygen_writes_it(node: LoginNode) -> None:
    """So that users can compare it."""
    key = paramiko.Ed25519Key.from_private_key_file(str(node.host_key))
    assert fingerprint(key.asbytes()) == host_fingerprint(node)
