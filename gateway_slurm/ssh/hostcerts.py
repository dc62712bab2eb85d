"""Host certificates: a key that a certificate authority of a known_hosts file has signed for a host.

Source: OpenSSH's PROTOCOL.certkeys; sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT", ``@cert-authority``.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import paramiko

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
