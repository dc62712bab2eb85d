"""Host certificates of ssh-keygen, and malformed ones."""

from __future__ import annotations

import base64
import contextlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from gateway_slurm.slurm.ssh.host_keys import HostCertificate, read_certificate
from helpers.login_node import make_key


def blob_of(path: Path | str) -> bytes:
    """The blob of a public key or certificate, from its file."""
    return base64.b64decode(Path(path).read_text().split()[1])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The keys of an authority and of a host."""
    base = tmp_path_factory.mktemp("keys")
    return make_key(base / "authority"), make_key(base / "host")


def certified(keys: tuple[Path, Path], *options: str) -> tuple[bytes, bytes]:
    """A certificate with these options, and its authority."""
    authority, host = keys
    sign = ["ssh-keygen", "-q", "-s", str(authority), "-I", "name", *options, f"{host}.pub"]
    subprocess.run(sign, check=True, capture_output=True)
    return blob_of(f"{host}-cert.pub"), blob_of(f"{authority}.pub")


def test_what_it_says_is_read(keys: tuple[Path, Path]) -> None:
    """The authority, the hosts and the times."""
    blob, authority = certified(keys, "-h", "-n", "login,*.example.org", "-V", "20260101Z:20270101Z")
    found = read_certificate(blob)
    assert (found.name, found.hosts, found.authority) == ("name", ("login", "*.example.org"), authority)
    assert found.valid_before - found.valid_after == 365 * 86400


@pytest.mark.parametrize(("host", "fits"), [("login", True), ("a.example.org", True), ("example.org", False)])
def test_it_is_valid_for_its_hosts(keys: tuple[Path, Path], host: str, fits: bool) -> None:
    """Names and patterns."""
    blob, authority = certified(keys, "-h", "-n", "LOGIN,*.example.org")
    assert (read_certificate(blob).fault(host, [authority]) == "") is fits


def test_a_user_certificate_is_not_a_host_certificate(keys: tuple[Path, Path]) -> None:
    """The same authority may sign both kinds."""
    blob, authority = certified(keys, "-n", "login")
    assert "not a host" in read_certificate(blob).fault("login", [authority])


def test_no_byte_of_it_can_be_changed(keys: tuple[Path, Path]) -> None:
    """A changed byte makes it unreadable, changes its authority, or breaks its signature."""
    blob, authority = certified(keys, "-h", "-n", "login")
    taken = []
    for at in range(len(blob)):
        changed = bytearray(blob)
        changed[at] ^= 1
        with contextlib.suppress(ValueError):
            if not read_certificate(bytes(changed)).fault("login", [authority]):
                taken.append(at)
    assert taken == []


@pytest.mark.parametrize("length", [0, 3, 40, 200, -1])
def test_an_incomplete_certificate_is_refused(keys: tuple[Path, Path], length: int) -> None:
    """Nor is a certificate with additional data."""
    blob, _authority = certified(keys, "-h", "-n", "login")
    for wrong in (blob[:length], blob + b"x"):
        with pytest.raises(ValueError, match="certificate"):
            read_certificate(wrong)


def string(data: bytes) -> bytes:
    """A string in RFC 4251's encoding."""
    return len(data).to_bytes(4, "big") + data


KINDS = some.sampled_from(
    [b"ssh-ed25519-cert-v01@openssh.com", b"ssh-rsa-cert-v01@openssh.com", b"ssh-ed25519", b"\xff"]
)
FIELD = some.binary(max_size=20).map(string) | some.binary(max_size=12)


@given(
    some.binary(max_size=80) | some.builds(lambda kind, rest: string(kind) + b"".join(rest), KINDS, some.lists(FIELD))
)
def test_any_bytes_are_a_certificate_or_refused(blob: bytes) -> None:
    """The only error is ValueError; an unsigned certificate is never valid."""
    try:
        found = read_certificate(blob)
    except ValueError:
        return
    assert found.fault("login", [found.authority]) == "its signature is wrong"


NUMBER = some.integers(0, 2**64 - 1).map(lambda number: number.to_bytes(8, "big"))
PART = some.binary(max_size=20)


@given(
    some.lists(PART, min_size=2, max_size=2), NUMBER, PART.map(string), some.lists(NUMBER, min_size=2, max_size=2), PART
)
def test_one_of_the_right_shape_is_read_whatever_its_fields_are(
    key: list[bytes], serial: bytes, hosts: bytes, valid: list[bytes], rest: bytes
) -> None:
    """Names may be no text and times any number; the signature then refuses it."""
    fields = [
        string(b"ssh-ed25519-cert-v01@openssh.com"),
        *map(string, key),
        serial,
        bytes(4),
        string(rest),
        string(hosts),
    ]
    found = read_certificate(b"".join([*fields, *valid, *[string(rest)] * 5]))
    assert (found.authority, found.signature) == (rest, rest)
    assert found.fault("login", [rest]) == "its signature is wrong"


def test_an_authority_of_an_unknown_kind_signs_nothing(keys: tuple[Path, Path]) -> None:
    """Nor does another key, even if it is a known authority."""
    blob, _authority = certified(keys, "-h", "-n", "login")
    found: HostCertificate = read_certificate(blob)
    for other in (b"", b"\0\0\0\x07ssh-dss", blob_of(f"{keys[1]}.pub"), blob):
        assert replace(found, authority=other).fault("login", [other]) == "its signature is wrong"
