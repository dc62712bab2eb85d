"""The check of a host's key, or of its certificate, against known_hosts files.

Sources: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT": plain, hashed, wildcard and negated names, ``@revoked`` and
``@cert-authority``; PROTOCOL.certkeys of OpenSSH for certificates.
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
from typing import Final

import paramiko

from gateway_slurm.errors import HostKeyRefused

CERTIFICATE_SUFFIX: Final = "-cert-v01@openssh.com"
_HOST_CERTIFICATE: Final = 2  # SSH2_CERT_TYPE_HOST
_NO_EXPIRY: Final = 2**64 - 1
# The number of strings of the key itself in a certificate of each kind.
_KEY_FIELDS: Final = {
    "ssh-ed25519": 1,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "ssh-rsa": 2,
}
_AUTHORITY_KEY_CLASSES: Final = (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey)
_MAX_FILE: Final = 16 << 20  # bytes
_MARKERS: Final = ("", "@revoked", "@cert-authority")


# -- Host certificates --


@dataclass(frozen=True)
class HostCertificate:
    """A certificate's own statements, which count only if ``fault`` is empty."""

    type: int
    name: str
    hosts: tuple[str, ...]
    valid_after: int
    """Seconds since the epoch; so is ``valid_before``."""
    valid_before: int
    options: bytes
    authority: bytes
    """The key of the authority that signed the certificate."""
    signed: bytes
    signature: bytes

    def fault(self, host: str, authorities: Collection[bytes]) -> str:
        """Return the reason why the certificate is not valid for ``host``; empty if it is valid."""
        if self.authority not in authorities:
            return "none of the known authorities signed it"
        if not self._is_signed():
            return "its signature is wrong"
        if self.type != _HOST_CERTIFICATE:
            return "it is not a host certificate"
        if self.options:
            return "it has critical options, which host certificates do not have"
        if not self.valid_after <= time.time() < self.valid_before:
            return f"it is valid from {_date(self.valid_after)} to {_date(self.valid_before)} only"
        if not any(fnmatchcase(host, pattern.lower().replace("[", "[[]")) for pattern in self.hosts):
            return f"it is for {', '.join(self.hosts) or 'no host at all'}"
        return ""

    def _is_signed(self) -> bool:
        try:
            kind = _FieldReader(self.authority).string().decode()
            key_class = next((known for known in _AUTHORITY_KEY_CLASSES if kind in known.identifiers()), None)
            # Paramiko does not notice a missing or an additional field in a signature.
            fields = _FieldReader(self.signature).strings()
            if key_class is None or kind.endswith(CERTIFICATE_SUFFIX) or len(fields) != 2:
                return False
            return bool(key_class(data=self.authority).verify_ssh_sig(self.signed, paramiko.Message(self.signature)))
        except (paramiko.SSHException, ValueError, KeyError, IndexError):
            return False


class _FieldReader:
    """Reads the fields of SSH's binary encoding in order (RFC 4251, section 5). Raises ValueError after the last."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        if self.position > len(self._data):
            raise ValueError("the host certificate is incomplete")
        return self._data[start : self.position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def string(self) -> bytes:
        return self.take(self.number(4))

    def strings(self) -> list[bytes]:
        """Read strings to the end of the data."""
        found = []
        while self.position < len(self._data):
            found.append(self.string())
        return found


def read_certificate(blob: bytes) -> HostCertificate:
    """Read a host certificate. Raises ValueError for other data and for an unknown kind of certificate."""
    reader = _FieldReader(blob)
    kind = reader.string().decode(errors="replace")
    if kind.removesuffix(CERTIFICATE_SUFFIX) not in _KEY_FIELDS or not kind.endswith(CERTIFICATE_SUFFIX):
        raise ValueError(f"{kind[:100]!r} is not a known kind of host certificate")
    for _nonce_and_key in range(1 + _KEY_FIELDS[kind.removesuffix(CERTIFICATE_SUFFIX)]):
        reader.string()
    reader.take(8)  # the serial number
    certificate_type, name, hosts = reader.number(4), reader.string(), _FieldReader(reader.string()).strings()
    valid_after, valid_before = reader.number(8), reader.number(8)
    options, _extensions, _reserved, authority = (reader.string() for _field in range(4))
    signed, signature = blob[: reader.position], reader.string()
    if reader.position != len(blob):
        raise ValueError("there is data after the host certificate")
    return HostCertificate(
        type=certificate_type,
        name=name.decode(errors="replace"),
        hosts=tuple(host.decode(errors="replace") for host in hosts),
        valid_after=valid_after,
        valid_before=valid_before,
        options=options,
        authority=authority,
        signed=signed,
        signature=signature,
    )


def _date(seconds: int) -> str:
    if seconds == 0 or seconds >= _NO_EXPIRY:
        return "ever"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(seconds, 2**40)))


# -- known_hosts files --


@dataclass(frozen=True)
class KnownKey:
    """The key of one line."""

    kind: str
    blob: bytes
    revoked: bool
    location: str
    """``path:line``."""
    authority: bool = False
    """Whether the key belongs to an authority that signs host certificates, not to a host."""


def fingerprint(blob: bytes) -> str:
    """Return a key's fingerprint as ssh and ssh-keygen print it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def known_keys(name: str, files: Iterable[str]) -> list[KnownKey]:
    """Return the keys in ``files`` for a host by its known_hosts name; a missing file has none."""
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
        # As in ssh, an authority for the host name applies to all ports.
        if _matches(patterns, name) or (authority and _matches(patterns, host_of(name))):
            yield KnownKey(kind, blob, marker == "@revoked", f"{path}:{number}", authority)


def host_of(name: str) -> str:
    """Return the host in a known_hosts name, without the port."""
    return name.removeprefix("[").partition("]:")[0]


def _matches(patterns: str, name: str) -> bool:
    """Whether a line's patterns match the host; a matching negated pattern excludes it."""
    if patterns.startswith("|"):
        return _is_hash_of(patterns, name)
    matching = [
        pattern
        for pattern in patterns.lower().split(",")
        # In fnmatch brackets mean sets; here they belong to "[host]:port".
        if fnmatchcase(name, pattern.removeprefix("!").replace("[", "[[]"))
    ]
    return bool(matching) and not any(pattern.startswith("!") for pattern in matching)


def _is_hash_of(text: str, name: str) -> bool:
    try:
        _empty, version, salt, digest = text.split("|")
        expected = hmac.digest(base64.b64decode(salt), name.encode(), "sha1")  # as the format prescribes
        return version == "1" and hmac.compare_digest(expected, base64.b64decode(digest))
    except ValueError:
        return False


# -- The check --


def check_host_key(
    name: str,
    key: paramiko.PKey,
    known: list[KnownKey],
    files: Iterable[str],
    certificate: HostCertificate | None = None,
) -> None:
    """Return if ``key`` is a known or certified key of the host.

    Raises HostKeyRefused, whose text says what to do. If other kinds of keys are known for the host, a key of an
    unknown kind counts as a changed key: the client requests the known kinds first.
    """
    blob, kind = key.asbytes(), key.get_name()
    key_print = fingerprint(blob)
    blobs = {blob, certificate.authority} if certificate is not None else {blob}
    same = [line for line in known if line.blob in blobs and not line.authority]
    if revoked := next((line for line in same if line.revoked), None):
        raise HostKeyRefused(f"the key of {name} ({kind} {key_print}) is revoked in {revoked.location}: do not log in")
    if any(line.blob == blob for line in same):
        return
    authorities = [line.blob for line in known if line.authority]
    fault = certificate.fault(host_of(name), authorities) if certificate is not None and authorities else ""
    if certificate is not None and authorities and not fault:
        return
    if others := [line for line in known if not line.revoked and not line.authority]:
        lines = ", ".join(f"{line.location} ({line.kind} {fingerprint(line.blob)})" for line in others)
        raise HostKeyRefused(
            f"the key of {name} has CHANGED: it is {kind} {key_print}, and the known keys are {lines}. Another host "
            "may be intercepting the connection. Ask the host's administrators; if the new key is right, replace these "
            "lines"
        )
    if fault:
        raise HostKeyRefused(
            f"the certificate of {name} ({kind} {key_print}) is not valid: {fault}. Ask the host's administrators"
        )
    host, _, port = name.removeprefix("[").partition("]:")
    scan = f"ssh-keyscan -p {port} {host}" if port else f"ssh-keyscan {host}"
    raise HostKeyRefused(
        f"the key of {name} ({kind} {key_print}) is not known. Compare the fingerprint with the one that the host's "
        f"administrators publish; if they are equal, add the key ({scan}) to "
        f"{next(iter(files), 'a known_hosts file')}"
    )
