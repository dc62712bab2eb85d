"""Logging in to one host: the key check first, then keys of the agent and of files, questions, a password.

Everything here blocks, for a bounded time, and runs in a worker thread.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import select
import socket
import stat
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import paramiko

from gateway_slurm.errors import ConfigError, LoginRefused, SshError, SshTurnedAway
from gateway_slurm.slurm.ssh.config import Target
from gateway_slurm.slurm.ssh.host_keys import (
    SUFFIX,
    HostCertificate,
    KnownKey,
    check,
    fingerprint,
    known_keys,
    read_certificate,
)

ANSWER_SECONDS: Final = 60.0  # sshd's own patience (LoginGraceTime) is 120
_MAX_SECRETS: Final = 64 << 10  # bytes


def read_secrets(path: str, setting: str) -> list[str]:
    """The lines of a file of secrets. Raises ConfigError for one that others can read, or that is not there."""
    path = os.path.expanduser(path)
    try:
        with open(path, encoding="utf-8") as file:
            facts = os.fstat(file.fileno())
            if facts.st_uid not in (0, os.geteuid()) or stat.S_IMODE(facts.st_mode) & 0o077:
                raise ConfigError(f"{setting}: others than its owner may read or write {path}: chmod 600 it")
            return file.read(_MAX_SECRETS).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {error}") from error


class Answers:
    """Answers to what a host asks for while we log in; one for each login, and told apart by the question.

    ``from_file`` are used in their order, for what is not to be shown while it is typed. What a user has typed once,
    and is no code that is good for one time only, is ``remembered`` for later logins. ``may_ask`` says whether there
    may be a user to ask: a question in the middle of somebody's work would be answered by what they type there.
    """

    def __init__(self, from_file: Sequence[str], remembered: dict[str, str], *, may_ask: bool) -> None:
        self._from_file = list(from_file)
        self._remembered = remembered
        self._given: dict[str, str] = {}
        self.may_ask = may_ask and has_terminal()

    @property
    def can_answer(self) -> bool:
        """Whether there may be one more answer."""
        return bool(self._from_file or self._remembered) or self.may_ask

    def answer(self, who: str, question: str, *, echo: bool = False) -> str:
        """Raises LoginRefused when there is no answer."""
        if self._from_file and not echo:
            return self._from_file.pop(0)
        return self._known_or_asked(f"{who}: {question}", echo=echo, lasting="passw" in question.lower())

    def passphrase(self, path: str) -> str:
        """A key file's. Raises LoginRefused when there is no answer."""
        return self._known_or_asked(f"passphrase of {path}: ", echo=False, lasting=True)

    def _known_or_asked(self, question: str, *, echo: bool, lasting: bool) -> str:
        # Taken out: one that turns out to be wrong is asked for again.
        found = self._remembered.pop(question, None)
        if found is None:
            if not self.may_ask:
                raise LoginRefused(
                    f"{question.strip()!r} is asked, and there is no answer: log in once from a terminal, or name a "
                    "file with the answers in SlurmService.ssh_password_file, or have a key taken"
                )
            found = ask(question, echo=echo)
        if lasting and not echo:
            self._given[question] = found
        return found

    def keep(self) -> None:
        """The login was good: what was asked for is remembered."""
        self._remembered.update(self._given)


def has_terminal() -> bool:
    """Whether this process has a terminal, and is in its foreground."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def ask(question: str, *, echo: bool) -> str:
    """Ask on the terminal. Raises LoginRefused when nobody answers within ANSWER_SECONDS."""
    terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        before = termios.tcgetattr(terminal)
        during = termios.tcgetattr(terminal)
        if not echo:
            during[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, during)
            os.write(terminal, _printable(question).encode())
            return _line(terminal)
        finally:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
            if not echo:
                os.write(terminal, b"\n")
    finally:
        os.close(terminal)


def _line(terminal: int) -> str:
    deadline = time.monotonic() + ANSWER_SECONDS
    data = b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([terminal], [], [], left)[0]:
            raise LoginRefused(f"nobody answered within {ANSWER_SECONDS:g} s")
        part = os.read(terminal, 4096)
        if not part:
            raise LoginRefused("the terminal has closed")
        data += part
    return data.decode(errors="replace").rstrip("\r\n")


def _printable(text: str) -> str:
    """What a host says, without control characters that would write over what the user sees."""
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in text[:2000])


# -- Logging in to one host: the key check first, then keys of the agent and of files, questions, a password. --


PASSWORD_FILE_SETTING: Final = "SlurmService.ssh_password_file"  # noqa: S105 - a setting's name
# AES-GCM costs a third of AES-CTR with an HMAC, in Python. What OpenSSH no longer offers by default is not taken.
CIPHERS: Final = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")
MACS: Final = (
    "hmac-sha2-256-etm@openssh.com",
    "hmac-sha2-512-etm@openssh.com",
    "hmac-sha2-256",
    "hmac-sha2-512",
)
# Paramiko writes each error that it raises, with its whole traceback; we say what happened in one line.
_LOG: Final = "gateway_slurm.slurm.ssh.paramiko"
logging.getLogger(_LOG).setLevel(logging.CRITICAL)
_MAX_STEPS: Final = 4  # that one login may consist of
_MAX_KEYS: Final = 5  # sshd's MaxAuthTries is 6
_KEY_CLASSES: Final = (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey)


@dataclass
class Credentials:
    """What the admin has set to log in with; ``remembered`` is what a user has typed, in memory only."""

    password_file: str = ""
    remembered: dict[str, str] = field(default_factory=dict, repr=False)

    def answers(self, *, may_ask: bool) -> Answers:
        """For one login. Raises ConfigError for a file of secrets that others can read."""
        lines = read_secrets(self.password_file, PASSWORD_FILE_SETTING) if self.password_file else []
        return Answers(lines, self.remembered, may_ask=may_ask)


def log_in(sock: Any, target: Target, answers: Answers, *, timeout: float) -> paramiko.Transport:
    """Speak SSH over ``sock``, check the host's key, log in. Raises SshError; the transport is the caller's then.

    ``timeout``, in seconds, is for each of the steps that wait for the host alone.
    """
    known = known_keys(target.known_as, target.known_hosts)
    transport = _Transport(sock, known)
    transport.set_log_channel(_LOG)
    try:
        transport.banner_timeout = transport.handshake_timeout = timeout
        transport.auth_timeout = timeout + (ANSWER_SECONDS if answers.may_ask else 0)
        options = transport.get_security_options()
        options.ciphers = [each for each in CIPHERS if each in options.ciphers]
        options.digests = [each for each in MACS if each in options.digests]
        _begin(transport, target, timeout)
        key = transport.get_remote_server_key()
        check(target.known_as, key, known, target.known_hosts, _certificate(key))
        _Login(transport, target, answers).run()
        answers.keep()
    except BaseException:
        transport.close()
        raise
    return transport


def _begin(transport: paramiko.Transport, target: Target, timeout: float) -> None:
    """Agree on keys. Raises SshTurnedAway, SSHException, OSError or EOFError."""
    try:
        transport.start_client(timeout=timeout)
    except paramiko.SSHException as error:
        if not transport.remote_version:
            raise SshTurnedAway(
                f"{target} ended the connection before it said who it is ({error}): too many may be logging in there "
                "at once (sshd's MaxStartups), or it bars this machine"
            ) from error
        raise


# (paramiko says nothing of its types.)
class _Transport(paramiko.Transport):  # type: ignore[misc]
    """Asks the host for a key that we can check: one whose kind is known, a certificate where authorities are."""

    def __init__(self, sock: Any, known: list[KnownKey]) -> None:
        super().__init__(sock)
        self._kinds = {each.kind for each in known if not each.authority}
        if "ssh-rsa" in self._kinds:  # it signs in two ways that have names of their own
            self._kinds |= {"rsa-sha2-512", "rsa-sha2-256"}
        self._certified = any(each.authority for each in known)

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """What the host is asked for, the most wanted first."""
        plain = sorted(self._preferred_keys, key=lambda kind: kind not in self._kinds)
        return (*(f"{kind}{SUFFIX}" for kind in plain), *plain) if self._certified else tuple(plain)


def _certificate(key: paramiko.PKey) -> HostCertificate | None:
    """The certificate that came in place of a bare key. Raises SshError for one that cannot be read."""
    if key.public_blob is None:
        return None
    try:
        return read_certificate(key.public_blob.key_blob)
    except ValueError as error:
        raise SshError(str(error)) from error


class _Login:
    """Tries what there is, in ssh's own order, until the host says yes; it may want several of them."""

    def __init__(self, transport: paramiko.Transport, target: Target, answers: Answers) -> None:
        self._transport, self._target, self._answers = transport, target, answers
        self._tried: list[str] = []
        self._notes: list[str] = []
        self._allowed: list[str] = []

    def run(self) -> None:
        """Raises LoginRefused when nothing was taken."""
        try:
            self._transport.auth_none(self._target.user)
            return
        except paramiko.BadAuthenticationType as error:
            self._allowed = list(error.allowed_types)
        for _step in range(_MAX_STEPS):
            before = list(self._allowed)
            if self._by_keys() or self._by_answers():
                return
            if self._allowed == before:  # no further step was taken
                break
        raise self._refused()

    def _by_keys(self) -> bool:
        if "publickey" not in self._allowed:
            return False
        for key, name in self._keys():
            if self._attempt("publickey", name, partial(self._transport.auth_publickey, self._target.user, key)):
                return True
            if "publickey" not in self._allowed:  # it was taken, and the host wants something else now
                break
        return False

    def _by_answers(self) -> bool:
        ways = (("keyboard-interactive", "answers", self._by_questions), ("password", "", self._by_password))
        return any(self._answers.can_answer and self._attempt(*way) for way in ways)

    def _attempt(self, method: str, what: str, act: Any) -> bool:
        """Whether we are in; what the host wants besides is the caller's to go on with."""
        if method not in self._allowed or not self._transport.is_active():
            return False
        self._tried.append(f"{method} ({what})" if what else method)
        try:
            left = act()
        except paramiko.BadAuthenticationType as error:
            self._allowed = list(error.allowed_types)
            return False
        except paramiko.AuthenticationException:
            return False
        if self._transport.is_authenticated():
            return True
        self._allowed = list(left)
        return False

    def _by_password(self) -> list[str]:
        password = self._answers.answer(str(self._target), "password: ")
        return list(self._transport.auth_password(self._target.user, password, fallback=False))

    def _by_questions(self) -> list[str]:
        refusals: list[LoginRefused] = []

        def answer(_title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
            said = f"{instructions.strip()}\n" if instructions.strip() else ""
            try:
                return [self._answers.answer(str(self._target), said + text, echo=echo) for text, echo in prompts]
            except LoginRefused as refusal:
                # Paramiko's own thread asks: it would die of the error, and nobody would know why.
                refusals.append(refusal)
                return ["" for _prompt in prompts]

        try:
            return list(self._transport.auth_interactive(self._target.user, answer))
        except paramiko.AuthenticationException:
            if refusals:
                raise refusals[0] from None
            raise

    # -- keys ----------------------------------------------------------------------------------------------

    def _keys(self) -> Iterator[tuple[paramiko.PKey, str]]:
        """Those of the agent first, as ssh does; no more than a host bears."""
        count = 0
        seen: set[bytes] = set()
        for key, name in chain(self._agent_keys(), self._file_keys()):
            blob = key.public_blob.key_blob if key.public_blob else key.asbytes()
            if blob in seen:
                continue
            seen.add(blob)
            count += 1
            if count > _MAX_KEYS:
                self._notes.append(f"no more than {_MAX_KEYS} keys are tried; name the right one in IdentityFile")
                return
            yield key, name

    def _agent_keys(self) -> list[tuple[paramiko.PKey, str]]:
        if not os.environ.get("SSH_AUTH_SOCK"):
            return []
        try:
            keys = list(paramiko.Agent().get_keys())
        except (paramiko.SSHException, OSError) as error:
            self._notes.append(f"the agent did not answer: {error}")
            return []
        if self._target.identities_only:
            wanted = {blob for path in self._target.identities for blob in _public_blob(path)}
            keys = [key for key in keys if key.asbytes() in wanted]
        return [(key, f"agent's {key.get_name()} {fingerprint(key.asbytes())}") for key in keys]

    def _file_keys(self) -> Iterator[tuple[paramiko.PKey, str]]:
        for path in self._target.identities:
            if not os.path.exists(path):
                continue
            key = self._load(path)
            if key is None:
                continue
            for certificate in (f"{path}-cert.pub", *self._target.certificates):
                certified = _with_certificate(key, path, certificate)
                if certified is not None:
                    yield certified, certificate
            key.public_blob = None
            yield key, path

    def _load(self, path: str) -> paramiko.PKey | None:
        if Path(path).stat().st_mode & 0o077:
            self._notes.append(f"{path} may be read by others and is not used: chmod 600 it")
            return None
        try:
            return _read_key(path, None)
        except paramiko.PasswordRequiredException:
            pass
        except (paramiko.SSHException, OSError, ValueError) as error:
            self._notes.append(f"{path}: {error}")
            return None
        try:
            return _read_key(path, self._answers.passphrase(path))
        except (LoginRefused, paramiko.SSHException, OSError, ValueError) as error:
            self._notes.append(f"{path} has a passphrase: {error or 'not the right one was given'}; use an agent")
            return None

    def _refused(self) -> SshError:
        if not self._transport.is_active() and not self._tried:
            return SshError(f"{self._target} broke off while we logged in")
        tried = "; ".join(self._tried) or "nothing, since there was nothing to try"
        notes = "".join(f"; {note}" for note in self._notes)
        return LoginRefused(
            f"{self._target} does not let us in. Tried: {tried}{notes}. The host takes: {', '.join(self._allowed)}. "
            "Name a key in ~/.ssh/config (IdentityFile) or SlurmService.ssh_identity_files, add it to the agent, or "
            "see to SlurmService.ssh_password_file"
        )


def _read_key(path: str, passphrase: str | None) -> paramiko.PKey:
    """Raises PasswordRequiredException, SSHException, OSError or ValueError."""
    trouble: Exception = paramiko.SSHException("it is no key of a kind that is known")
    for kind in _KEY_CLASSES:
        try:
            return kind.from_private_key_file(path, passphrase)
        except paramiko.PasswordRequiredException:
            raise
        except (paramiko.SSHException, ValueError, IndexError) as error:
            trouble = error
    raise paramiko.SSHException(str(trouble)) from trouble


def _with_certificate(key: paramiko.PKey, path: str, certificate: str) -> paramiko.PKey | None:
    """The key with the certificate, if there is one and it is the key's."""
    if not os.path.exists(certificate):
        return None
    try:
        key.load_certificate(certificate)
    except (paramiko.SSHException, OSError, ValueError):
        return None
    return key


def _public_blob(path: str) -> list[bytes]:
    """The public half of an identity file, from the file beside it."""
    try:
        words = Path(f"{path.removesuffix('.pub')}.pub").read_text().split()
        return [base64.b64decode(words[1])]
    except (OSError, ValueError, IndexError):
        return []


def dial(host: str, port: int, timeout: float, *, first: str = "") -> socket.socket:
    """A TCP connection to ``host``, to its address ``first`` if it still has that one. Raises SshError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SshError(f"the login node {host} has no address: {error}") from error
    trouble: OSError = OSError("it has no address")
    for family, kind, protocol, _name, where in sorted(found, key=lambda entry: entry[4][0] != first):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(timeout)
            sock.connect(where)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            trouble = error
    raise SshError(f"the login node {host} cannot be reached at port {port}: {trouble}") from trouble
