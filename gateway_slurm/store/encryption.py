"""Encryption of secrets at rest: AES-256-GCM under a key from a file that only its user can read.

Each encrypted value is bound to its store, table and row: copied to another place, it cannot be decrypted. Nonces
are random (96 bits), which is safe for 2^32 of them under one key (NIST SP 800-38D, 8.3).
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from Crypto.Cipher import AES

from gateway_slurm._util import exposure
from gateway_slurm.errors import StoreError

KEY_NAME = "store.key"
KEY_BYTES = 32
_VERSION, _NONCE, _TAG = b"\x01", 12, 16


class RowCipher:
    """Encrypts and decrypts the secrets in one store's rows."""

    def __init__(self, key: bytes, store_id: str) -> None:
        self._key, self.store_id = key, store_id

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
