"""Whether a host's key is the one that known_hosts files have for it.

Source: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT": plain, hashed and wildcard names, negated ones, ``@revoked``,
``@cert-authority``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Protocol

from gateway_slurm.errors import HostKeyRefused
from gateway_slurm.ssh.hostcerts import HostCertificate

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
