"""Whether a host's key is the one that known_hosts files have for it.

Source: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT": plain, hashed and wildcard names, negated ones, ``@revoked``,
``@cert-authority``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Protocol

import paramiko

from gateway_slurm.errors import HostKeyRefused

SUFFIX: Final = "-cert-v01@openssh.com"
_HOST: Final = 2  # SSH2_CERT_TYPE_HOST
_FOREVER: Final = 2**64 - 1
# How many strings the key itself has in a certificate of each kind.
_PARTS: Final = {
    "ssh-ed25519": 1,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "ssh-rsa": 2,
}
_AUTHORITIES: Final = (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey)


@dataclass(frozen=True)
class HostCertificate:
    """A certificate, as it says of itself; nothing of it is true before ``fault`` is empty."""

    type: int
    name: str
    hosts: tuple[str, ...]
    valid_after: int
    """Seconds since the epoch; so is ``valid_before``."""
    valid_before: int
    options: bytes
    authority: bytes
    """The key that has signed it."""
    signed: bytes
    signature: bytes

    def fault(self, host: str, authorities: Collection[bytes]) -> str:
        """What keeps it from vouching for ``host``; empty for nothing."""
        if self.authority not in authorities:
            return "it is signed by none of the known authorities"
        if not self._is_signed():
            return "its signature is wrong"
        if self.type != _HOST:
            return "it is not a host's"
        if self.options:
            return "it has critical options, which hosts' have not"
        if not self.valid_after <= time.time() < self.valid_before:
            return f"it is valid from {_date(self.valid_after)} to {_date(self.valid_before)} only"
        if not any(fnmatchcase(host, pattern.lower().replace("[", "[[]")) for pattern in self.hosts):
            return f"it is for {', '.join(self.hosts) or 'no host at all'}"
        return ""

    def _is_signed(self) -> bool:
        try:
            kind = _Reader(self.authority).string().decode()
            key_class = next((each for each in _AUTHORITIES if kind in each.identifiers()), None)
            # Paramiko passes over what is missing, or too much, in a signature.
            if key_class is None or kind.endswith(SUFFIX) or len(_Reader(self.signature).strings()) != 2:
                return False
            return bool(key_class(data=self.authority).verify_ssh_sig(self.signed, paramiko.Message(self.signature)))
        except (paramiko.SSHException, ValueError, KeyError, IndexError):
            return False


class _Reader:
    """Takes fields from the beginning of data (RFC 4251, section 5). Raises ValueError at their end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self._data):
            raise ValueError("a host certificate that is cut off")
        return self._data[start : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def string(self) -> bytes:
        return self.take(self.number(4))

    def strings(self) -> list[bytes]:
        """To the end."""
        found = []
        while self.at < len(self._data):
            found.append(self.string())
        return found


def read_certificate(blob: bytes) -> HostCertificate:
    """Raises ValueError for what is no certificate of a kind that is known."""
    reader = _Reader(blob)
    kind = reader.string().decode(errors="replace")
    if kind.removesuffix(SUFFIX) not in _PARTS or not kind.endswith(SUFFIX):
        raise ValueError(f"{kind[:100]!r} is no kind of host certificate that is known")
    for _nonce_and_key in range(1 + _PARTS[kind.removesuffix(SUFFIX)]):
        reader.string()
    reader.take(8)  # the serial number
    owner, name, hosts = reader.number(4), reader.string(), _Reader(reader.string()).strings()
    valid_after, valid_before = reader.number(8), reader.number(8)
    options, _extensions, _reserved, authority = (reader.string() for _field in range(4))
    signed, signature = blob[: reader.at], reader.string()
    if reader.at != len(blob):
        raise ValueError("a host certificate with something after it")
    return HostCertificate(
        type=owner,
        name=name.decode(errors="replace"),
        hosts=tuple(each.decode(errors="replace") for each in hosts),
        valid_after=valid_after,
        valid_before=valid_before,
        options=options,
        authority=authority,
        signed=signed,
        signature=signature,
    )


def _date(seconds: int) -> str:
    if seconds == 0 or seconds >= _FOREVER:
        return "ever"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(seconds, 2**40)))


# -- Whether a host's key is the one that known_hosts files have for it. --


_MAX_FILE: Final = 16 << 20  # bytes
_MARKERS: Final = ("", "@revoked", "@cert-authority")


class PublicKey(Protocol):
    """What is needed of a key."""

    def get_name(self) -> str: ...
    def asbytes(self) -> bytes: ...


@dataclass(frozen=True)
class KnownKey:
    """One line's key for a host."""

    kind: str
    blob: bytes
    revoked: bool
    where: str
    authority: bool = False
    """Whether it is no host's, but signs the certificates of hosts."""


def fingerprint(blob: bytes) -> str:
    """A key's fingerprint as ssh and ssh-keygen print it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def known_keys(name: str, files: Iterable[str]) -> list[KnownKey]:
    """What ``files`` say of a host by its known_hosts name; a file that is not there says nothing."""
    found: list[KnownKey] = []
    for path in files:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = file.read(_MAX_FILE).splitlines()
        except OSError:
            continue
        found += _in_lines(name, lines, path)
    return found


def _in_lines(name: str, lines: list[str], path: str) -> Iterator[KnownKey]:
    for number, line in enumerate(lines, 1):
        fields = line.split()
        marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
        if len(fields) < 3 or fields[0].startswith("#") or marker not in _MARKERS:
            continue
        patterns, kind, text = fields[:3]
        try:
            blob = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            continue
        authority = marker == "@cert-authority"
        # Of authorities ssh also takes those of the host, whatever its port.
        if _matches(patterns, name) or (authority and _matches(patterns, host_of(name))):
            yield KnownKey(kind, blob, marker == "@revoked", f"{path}:{number}", authority)


def host_of(name: str) -> str:
    """The host in a name of known_hosts files, without its port."""
    return name.removeprefix("[").partition("]:")[0]


def _matches(patterns: str, name: str) -> bool:
    """Whether a line is about the host; a negated pattern that fits takes it out, whatever else fits."""
    if patterns.startswith("|"):
        return _is_hash_of(patterns, name)
    fits = False
    for pattern in patterns.lower().split(","):
        negated = pattern.startswith("!")
        # fnmatch's brackets mean sets; here they are part of "[host]:port".
        if fnmatchcase(name, pattern.removeprefix("!").replace("[", "[[]")):
            if negated:
                return False
            fits = True
    return fits


def _is_hash_of(text: str, name: str) -> bool:
    try:
        _empty, one, salt, digest = text.split("|")
        expected = hmac.digest(base64.b64decode(salt), name.encode(), "sha1")  # the format's own
        return one == "1" and hmac.compare_digest(expected, base64.b64decode(digest))
    except ValueError:
        return False


def check(
    name: str,
    key: PublicKey,
    known: list[KnownKey],
    files: Iterable[str],
    certificate: HostCertificate | None = None,
) -> None:
    """Return if ``key`` is a known one of the host's, or certified; else raise HostKeyRefused, which says what to do.

    A key of a kind that is not known, where others are, is refused as a changed one: hosts are asked for the kinds
    that are known first.
    """
    blob, kind = key.asbytes(), key.get_name()
    print_ = fingerprint(blob)
    blobs = {blob, certificate.authority} if certificate is not None else {blob}
    same = [each for each in known if each.blob in blobs and not each.authority]
    if revoked := next((each for each in same if each.revoked), None):
        raise HostKeyRefused(f"the key of {name} ({kind} {print_}) is revoked by {revoked.where}: do not log in there")
    if any(each.blob == blob for each in same):
        return
    authorities = [each.blob for each in known if each.authority]
    fault = certificate.fault(host_of(name), authorities) if certificate is not None and authorities else ""
    if certificate is not None and authorities and not fault:
        return
    if others := [each for each in known if not each.revoked and not each.authority]:
        lines = ", ".join(f"{each.where} ({each.kind} {fingerprint(each.blob)})" for each in others)
        raise HostKeyRefused(
            f"the key of {name} has CHANGED: it is {kind} {print_}, and known is {lines}. Somebody may be in "
            "between. Ask who runs the host; if the new key is right, replace these lines"
        )
    if fault:
        raise HostKeyRefused(
            f"the certificate of {name} ({kind} {print_}) does not count: {fault}. Ask who runs the host"
        )
    host, _, port = name.removeprefix("[").partition("]:")
    scan = f"ssh-keyscan -p {port} {host}" if port else f"ssh-keyscan {host}"
    raise HostKeyRefused(
        f"the key of {name} ({kind} {print_}) is not known. Compare the fingerprint with the one that who runs the "
        f"host publishes; if it is the same, add the key ({scan}) to {next(iter(files), 'a known_hosts file')}"
    )
