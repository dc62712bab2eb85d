"""The store's key, from a file that only its user can read: it encrypts secrets at rest and authenticates whole rows.

Secrets are encrypted with AES-256-GCM. Each encrypted value is bound to its store, table and row: copied to another
place, it cannot be decrypted. Nonces are random (96 bits), which is safe for 2^32 of them under one key (NIST SP
800-38D, 8.3).

Each row has a MAC (HMAC-SHA256, RFC 2104) of its columns: a user of the database without the key can make no row, and
change none. Such a user can still remove rows, put an earlier row back, and change the leases of servers.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from Crypto.Cipher import AES

from gateway_slurm._util import exposure
from gateway_slurm.errors import StoreError

KEY_NAME = "store.key"
KEY_BYTES = 32
_VERSION, _NONCE, _TAG = b"\x01", 12, 16
# A renewal of a server's lease, and a takeover, change these in SQL.
_NOT_IN_MAC: Final = frozenset({"mac", "lease_until", "leased_since", "ended"})
MAX_REPORTED: Final = 1000
"""Rows whose refusal is logged. More are not, until the store is opened again."""

_log = logging.getLogger(__name__)


class RowCipher:
    """Encrypts and decrypts the secrets in one store's rows, and authenticates its rows."""

    def __init__(self, key: bytes, store_id: str) -> None:
        self._key, self.store_id = key, store_id
        self._mac_key = self.derive_key("rows")
        self._reported: set[tuple[str, str]] = set()

    def derive_key(self, purpose: str) -> bytes:
        """A key for another purpose, from which this one cannot be computed (as in RFC 5869, 2.3)."""
        return hmac.digest(self._key, f"gateway_slurm {purpose}\0{self.store_id}".encode(), "sha256")

    def mac(self, table: str, row: Mapping[str, Any]) -> bytes:
        """The MAC of a row: of its table's name, and of the names, types and values of its columns."""
        digest = hmac.new(self._mac_key, table.encode(), hashlib.sha256)
        for name in sorted(row):
            if name not in _NOT_IN_MAC:
                value = row[name]
                if isinstance(value, bytes | memoryview):
                    kind, content = "b", bytes(value)
                else:
                    kind, content = type(value).__name__, str(value).encode(errors="surrogatepass")
                digest.update(f"\0{name}\0{kind}\0{len(content)}\0".encode())
                digest.update(content)
        return digest.digest()

    def seal(self, table: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with its MAC."""
        return {**row, "mac": self.mac(table, row)}

    def is_authentic(self, table: str, key: str, row: Mapping[str, Any]) -> bool:
        """Whether a server with the key has written this row. Otherwise the log says so, once for each row."""
        if hmac.compare_digest(bytes(row["mac"]), self.mac(table, row)):
            return True
        if (table, key) not in self._reported and len(self._reported) < MAX_REPORTED:
            self._reported.add((table, key))
            _log.error(
                "row %.100r of the store's table %s is not used: no server with the store's key has written it so; "
                "another user or program can write to the database",
                key,
                table,
            )
        return False

    def encrypt(self, table: str, row_id: str, content: Any) -> bytes:
        """Encrypt JSON content for one row."""
        nonce = secrets.token_bytes(_NONCE)
        encrypted, tag = self._cipher(nonce, table, row_id).encrypt_and_digest(json.dumps(content).encode())
        return bytes(_VERSION + nonce + tag + encrypted)

    def decrypt(self, table: str, row_id: str, blob: bytes) -> Any:
        """Return the JSON content. Raises ValueError unless it was encrypted with this key, for this store and row."""
        if blob[:1] != _VERSION:
            raise ValueError("its encryption is of a version that this gateway_slurm does not know")
        nonce, tag, encrypted = blob[1 : 1 + _NONCE], blob[1 + _NONCE : 1 + _NONCE + _TAG], blob[1 + _NONCE + _TAG :]
        return json.loads(self._cipher(nonce, table, row_id).decrypt_and_verify(encrypted, tag))

    def _cipher(self, nonce: bytes, table: str, row_id: str) -> Any:
        cipher = AES.new(self._key, AES.MODE_GCM, nonce=nonce)
        cipher.update("\0".join((self.store_id, table, row_id)).encode())
        return cipher


def read_key(path: Path) -> bytes:
    """The key in a file. Raises FileNotFoundError, and StoreError for a file that is not private or holds no key."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(1024)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"the store's key file {path} cannot be read: {error.strerror}") from error
    if why := exposure(status):
        raise StoreError(
            f"the store's key file {path} cannot be used: {why}; if another user may have read it, remove it and the "
            "store while no kernel runs"
        )
    try:
        key = bytes.fromhex(text.decode().strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise StoreError(
            f"the store's key file {path} holds no key: it must be one line of {2 * KEY_BYTES} hexadecimal digits "
            f"(openssl rand -hex {KEY_BYTES})"
        )
    return key


def make_key(path: Path) -> bytes:
    """Make the file with a new key and return the key, or the key in the file that another process has just made."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # 0600
        try:
            with open(descriptor, "w") as file:
                file.write(secrets.token_hex(KEY_BYTES) + "\n")
                file.flush()
                os.fsync(descriptor)
            # A hard link, unlike a rename, never replaces another process's key.
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
        return read_key(path)
    except OSError as error:
        raise StoreError(
            f"the store's key file {path} cannot be made: {error.strerror}; make room or the directory writable, or "
            "name another file in SlurmService.store_key_file"
        ) from error
