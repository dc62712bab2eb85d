"""Log in to one host: first the check of its key, then keys of the agent and of files, prompts, a password.

All functions block, for a limited time, and run in a worker thread.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import select
import socket
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import paramiko

from gateway_slurm._util import dial_advice, exposure
from gateway_slurm.errors import ConfigError, LoginRefused, SshError, SshTurnedAway
from gateway_slurm.slurm.ssh import host_keys
from gateway_slurm.slurm.ssh.config import Destination

PROMPT_TIMEOUT: Final = 60.0  # seconds; sshd's own limit for a login (LoginGraceTime) is 120
# In Python, AES-GCM costs a third of AES-CTR with an HMAC. Algorithms that OpenSSH no longer offers are left out.
CIPHERS: Final = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")
MACS: Final = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512")
_MAX_SECRETS: Final = 64 << 10  # bytes
_MAX_STEPS: Final = 4  # authentication steps of one login
_MAX_KEYS: Final = 5  # sshd's MaxAuthTries is 6
_KEY_CLASSES: Final = (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey)
# Paramiko logs each error that it raises, with the traceback; this package logs the error itself, in one line.
_PARAMIKO_LOG: Final = "gateway_slurm.slurm.ssh.paramiko"
logging.getLogger(_PARAMIKO_LOG).setLevel(logging.CRITICAL)


# -- Answers to the host's prompts --


@dataclass
class Credentials:
    """The admin's settings for logins. ``remembered`` holds what a user has typed, in memory only."""

    password_file: str = ""
    remembered: dict[str, str] = field(default_factory=dict, repr=False)

    def answers(self, *, may_prompt: bool) -> LoginAnswers:
        """Return the answers for one login. Raises ConfigError if the file is not private or cannot be read."""
        lines = self._lines_of_file() if self.password_file else []
        return LoginAnswers(lines, self.remembered, may_prompt=may_prompt)

    def _lines_of_file(self) -> list[str]:
        path = os.path.expanduser(self.password_file)
        try:
            with open(path, encoding="utf-8") as file:
                if reason := exposure(os.fstat(file.fileno())):
                    raise ConfigError(f"SlurmService.ssh_password_file: {path} is not used: {reason}")
                return file.read(_MAX_SECRETS).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"SlurmService.ssh_password_file: {path} cannot be read: {error}") from error


class LoginAnswers:
    """Answers to a host's prompts during one login.

    The lines ``from_file`` answer hidden prompts, in their order. Passwords and passphrases that a user has typed are
    ``remembered`` by their prompt for later logins; codes for one login are not. ``may_prompt`` says whether a user
    may be asked: later logins must not read what a user types into another program.
    """

    def __init__(self, from_file: Sequence[str], remembered: dict[str, str], *, may_prompt: bool) -> None:
        self._from_file = list(from_file)
        self._remembered = remembered
        self._typed: dict[str, str] = {}
        self.may_prompt = may_prompt and has_terminal()

    @property
    def can_answer(self) -> bool:
        return bool(self._from_file or self._remembered) or self.may_prompt

    def answer(self, login: str, prompt: str, *, echo: bool = False) -> str:
        """Return the answer to a prompt of the host; ``login`` is the destination. Raises LoginRefused."""
        if self._from_file and not echo:
            return self._from_file.pop(0)
        return self._remembered_or_typed(f"{login}: {prompt}", echo=echo, lasting="passw" in prompt.lower())

    def passphrase(self, path: str) -> str:
        """Return the passphrase of a key file. Raises LoginRefused."""
        return self._remembered_or_typed(f"passphrase of {path}: ", echo=False, lasting=True)

    def _remembered_or_typed(self, prompt: str, *, echo: bool, lasting: bool) -> str:
        # An answer that turns out to be wrong must not be used again, so it is removed and only ``keep`` restores it.
        answer = self._remembered.pop(prompt, None)
        if answer is None:
            if not self.may_prompt:
                raise LoginRefused(
                    f"the host asks {prompt.strip()!r}, and there is no answer: log in once from a terminal, or name a "
                    "file with the answers in SlurmService.ssh_password_file, or log in with a key"
                )
            answer = ask_on_terminal(prompt, echo=echo)
        if lasting and not echo:
            self._typed[prompt] = answer
        return answer

    def keep(self) -> None:
        """Remember the answers of a login that succeeded."""
        self._remembered.update(self._typed)


# -- The terminal --


def has_terminal() -> bool:
    """Whether this process has a terminal and is in its foreground."""
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


def ask_on_terminal(prompt: str, *, echo: bool) -> str:
    """Return what the user types at a prompt. Raises LoginRefused without an answer within PROMPT_TIMEOUT."""
    terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        before = termios.tcgetattr(terminal)
        during = termios.tcgetattr(terminal)
        if not echo:
            during[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, during)
            # A host's control characters could overwrite the user's screen.
            shown = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in prompt[:2000])
            os.write(terminal, shown.encode())
            return _read_line(terminal)
        finally:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
            if not echo:
                os.write(terminal, b"\n")
    finally:
        os.close(terminal)


def _read_line(terminal: int) -> str:
    deadline = time.monotonic() + PROMPT_TIMEOUT
    data = b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([terminal], [], [], left)[0]:
            raise LoginRefused(f"the user did not answer within {PROMPT_TIMEOUT:g} s")
        part = os.read(terminal, 4096)
        if not part:
            raise LoginRefused("the terminal was closed")
        data += part
    return data.decode(errors="replace").rstrip("\r\n")


# -- The login --


def dial(host: str, port: int, timeout: float, *, preferred: str = "") -> socket.socket:
    """Return a TCP connection to ``host``, to its address ``preferred`` if the host still has it. Raises SshError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SshError(f"the login node {host} has no address: {error}") from error
    last_error: OSError = OSError("it has no address")
    for family, kind, protocol, _name, address in sorted(found, key=lambda entry: entry[4][0] != preferred):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(timeout)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            last_error = error
    advice = dial_advice(str(last_error), f"TCP port {port} of {host}", "this machine")
    text = f"no connection to the login node {host}, port {port}: {last_error}"
    raise SshError(f"{text} ({advice})" if advice else text) from last_error


def log_in(sock: Any, destination: Destination, answers: LoginAnswers, *, timeout: float) -> paramiko.Transport:
    """Start SSH over ``sock``, check the host's key and log in. The caller closes the transport. Raises SshError.

    ``timeout`` (seconds) limits each step that waits for the host alone.
    """
    known = host_keys.known_keys(destination.known_hosts_name, destination.known_hosts)
    transport = _Transport(sock, known)
    transport.set_log_channel(_PARAMIKO_LOG)
    try:
        transport.banner_timeout = transport.handshake_timeout = timeout
        transport.auth_timeout = timeout + (PROMPT_TIMEOUT if answers.may_prompt else 0)
        options = transport.get_security_options()
        options.ciphers = [cipher for cipher in CIPHERS if cipher in options.ciphers]
        options.digests = [mac for mac in MACS if mac in options.digests]
        _start_client(transport, destination, timeout)
        key = transport.get_remote_server_key()
        host_keys.check_host_key(destination.known_hosts_name, key, known, destination.known_hosts, _certificate(key))
        _Login(transport, destination, answers).run()
        answers.keep()
    except BaseException:
        transport.close()
        raise
    return transport


def _start_client(transport: paramiko.Transport, destination: Destination, timeout: float) -> None:
    """Exchange versions and keys. Raises SshTurnedAway, SSHException, OSError or EOFError."""
    try:
        transport.start_client(timeout=timeout)
    except paramiko.SSHException as error:
        if not transport.remote_version:
            raise SshTurnedAway(
                f"{destination} ended the connection before SSH began ({error}): too many logins may be under way at "
                "once (sshd's MaxStartups), or the host blocks this machine"
            ) from error
        raise


# (paramiko has no types.)
class _Transport(paramiko.Transport):  # type: ignore[misc]
    """Requests a host key that can be checked: of a known kind, or a certificate if authorities are known."""

    def __init__(self, sock: Any, known: list[host_keys.KnownKey]) -> None:
        super().__init__(sock)
        self._kinds = {line.kind for line in known if not line.authority}
        if "ssh-rsa" in self._kinds:  # an RSA key has two signature algorithms with names of their own
            self._kinds |= {"rsa-sha2-512", "rsa-sha2-256"}
        self._certified = any(line.authority for line in known)

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """The kinds of host keys to request, the preferred one first."""
        plain = sorted(self._preferred_keys, key=lambda kind: kind not in self._kinds)
        return (
            (*(f"{kind}{host_keys.CERTIFICATE_SUFFIX}" for kind in plain), *plain) if self._certified else tuple(plain)
        )


def _certificate(key: paramiko.PKey) -> host_keys.HostCertificate | None:
    """Return the certificate of a host key, if it came with one. Raises SshError if it cannot be read."""
    if key.public_blob is None:
        return None
    try:
        return host_keys.read_certificate(key.public_blob.key_blob)
    except ValueError as error:
        raise SshError(str(error)) from error


class _Login:
    """Tries the authentication methods in ssh's order until the host accepts; a host may require several."""

    def __init__(self, transport: paramiko.Transport, destination: Destination, answers: LoginAnswers) -> None:
        self._transport, self._destination, self._answers = transport, destination, answers
        self._tried: list[str] = []
        self._notes: list[str] = []
        self._allowed: list[str] = []

    def run(self) -> None:
        """Log in. Raises LoginRefused if the host accepts nothing, and SshError if it ends the connection."""
        try:
            self._transport.auth_none(self._destination.user)
            return
        except paramiko.BadAuthenticationType as error:
            self._allowed = list(error.allowed_types)
        for _step in range(_MAX_STEPS):
            before = list(self._allowed)
            if self._with_keys() or self._with_answers():
                return
            if self._allowed == before:  # the host accepted no method
                break
        raise self._refused()

    def _with_keys(self) -> bool:
        if "publickey" not in self._allowed:
            return False
        for key, name in self._keys():
            if self._attempt("publickey", name, partial(self._transport.auth_publickey, self._destination.user, key)):
                return True
            if "publickey" not in self._allowed:  # the host accepted the key and requires another method
                break
        return False

    def _with_answers(self) -> bool:
        methods = (("keyboard-interactive", "answers", self._with_prompts), ("password", "", self._with_password))
        return any(self._answers.can_answer and self._attempt(*method) for method in methods)

    def _attempt(self, method: str, detail: str, authenticate: Any) -> bool:
        """Try one method; return whether the login is complete. ``_allowed`` becomes what the host requires next."""
        if method not in self._allowed or not self._transport.is_active():
            return False
        self._tried.append(f"{method} ({detail})" if detail else method)
        try:
            remaining = authenticate()
        except paramiko.BadAuthenticationType as error:
            self._allowed = list(error.allowed_types)
            return False
        except paramiko.AuthenticationException:
            return False
        if self._transport.is_authenticated():
            return True
        self._allowed = list(remaining)
        return False

    def _with_password(self) -> list[str]:
        password = self._answers.answer(str(self._destination), "password: ")
        return list(self._transport.auth_password(self._destination.user, password, fallback=False))

    def _with_prompts(self) -> list[str]:
        refusals: list[LoginRefused] = []

        def answer(_title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
            heading = f"{instructions.strip()}\n" if instructions.strip() else ""
            login = str(self._destination)
            try:
                return [self._answers.answer(login, heading + text, echo=echo) for text, echo in prompts]
            except LoginRefused as refusal:
                # This runs in Paramiko's thread, where the error would be lost.
                refusals.append(refusal)
                return ["" for _prompt in prompts]

        try:
            return list(self._transport.auth_interactive(self._destination.user, answer))
        except paramiko.AuthenticationException:
            if refusals:
                raise refusals[0] from None
            raise

    # -- Keys --

    def _keys(self) -> Iterator[tuple[paramiko.PKey, str]]:
        """Yield keys and their names: the agent's first, as in ssh, and at most as many as a host allows."""
        seen: set[bytes] = set()
        for key, name in chain(self._agent_keys(), self._file_keys()):
            blob = key.public_blob.key_blob if key.public_blob else key.asbytes()
            if blob in seen:
                continue
            seen.add(blob)
            if len(seen) > _MAX_KEYS:
                self._notes.append(f"only the first {_MAX_KEYS} keys were tried; name the right one in IdentityFile")
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
        if self._destination.identities_only:
            wanted = {blob for path in self._destination.identities for blob in _public_blob(path)}
            keys = [key for key in keys if key.asbytes() in wanted]
        return [(key, f"agent's {key.get_name()} {host_keys.fingerprint(key.asbytes())}") for key in keys]

    def _file_keys(self) -> Iterator[tuple[paramiko.PKey, str]]:
        for path in self._destination.identities:
            if not os.path.exists(path):
                continue
            key = self._load(path)
            if key is None:
                continue
            for certificate in filter(os.path.exists, (f"{path}-cert.pub", *self._destination.certificates)):
                try:
                    key.load_certificate(certificate)
                except (paramiko.SSHException, OSError, ValueError):  # it belongs to another key
                    continue
                yield key, certificate
            key.public_blob = None
            yield key, path

    def _load(self, path: str) -> paramiko.PKey | None:
        if Path(path).stat().st_mode & 0o077:
            self._notes.append(f"{path} is not used because other users may read it: run chmod 600 on it")
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
            self._notes.append(f"{path} has a passphrase: {error or 'the given one is wrong'}; use an agent")
            return None

    def _refused(self) -> SshError:
        if not self._transport.is_active() and not self._tried:
            return SshError(f"{self._destination} ended the connection during the login")
        tried = "; ".join(self._tried) or "nothing, since no key or password was available"
        notes = "".join(f"; {note}" for note in self._notes)
        return LoginRefused(
            f"{self._destination} refused the login. Tried: {tried}{notes}. The host allows: "
            f"{', '.join(self._allowed)}. Name a key in ~/.ssh/config (IdentityFile) or "
            "SlurmService.ssh_identity_files, add it to the agent, or check SlurmService.ssh_password_file"
        )


def _read_key(path: str, passphrase: str | None) -> paramiko.PKey:
    """Read a private key. Raises PasswordRequiredException, SSHException, OSError or ValueError."""
    last_error: Exception = paramiko.SSHException("it is not a known kind of key")
    for key_class in _KEY_CLASSES:
        try:
            return key_class.from_private_key_file(path, passphrase)
        except paramiko.PasswordRequiredException:
            raise
        except (paramiko.SSHException, ValueError, IndexError) as error:
            last_error = error
    raise paramiko.SSHException(str(last_error)) from last_error


def _public_blob(path: str) -> list[bytes]:
    """Return the public key of an identity file, from the ``.pub`` file beside it; empty if there is none."""
    try:
        fields = Path(f"{path.removesuffix('.pub')}.pub").read_text().split()
        return [base64.b64decode(fields[1])]
    except (OSError, ValueError, IndexError):
        return []
