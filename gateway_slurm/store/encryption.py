"""Secrets at rest: AES-256-GCM under the key in a file that only its user can read.

What is sealed is bound to its store, table and row: a blob that is copied elsewhere does not open. Nonces are
random (96 bits), which is safe for 2^32 of them under one key (NIST SP 800-38D, 8.3).
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

from Crypto.Cipher import AES

from gateway_slurm.errors import StoreError

KEY_NAME = "store.key"
KEY_BYTES = 32
_VERSION, _NONCE, _TAG = b"\x01", 12, 16


class Seal:
    """Seals and opens the secrets of one store."""

    def __init__(self, key: bytes, store_id: str) -> None:
        self._key, self.store_id = key, store_id

    def close(self, table: str, row_id: str, content: Any) -> bytes:
        """Seal JSON content for one row."""
        nonce = secrets.token_bytes(_NONCE)
        sealed, tag = self._cipher(nonce, table, row_id).encrypt_and_digest(json.dumps(content).encode())
        return bytes(_VERSION + nonce + tag + sealed)

    def open(self, table: str, row_id: str, blob: bytes) -> Any:
        """Return what was sealed. Raises ValueError for what was not, or not with this key, here and for this row."""
        if blob[:1] != _VERSION:
            raise ValueError("it is sealed in no way that this version knows")
        nonce, tag, sealed = blob[1 : 1 + _NONCE], blob[1 + _NONCE : 1 + _NONCE + _TAG], blob[1 + _NONCE + _TAG :]
        return json.loads(self._cipher(nonce, table, row_id).decrypt_and_verify(sealed, tag))

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
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_uid not in (0, os.geteuid()):
        raise StoreError(
            f"the store's key file {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}, owner "
            f"{status.st_uid}): give it to its user alone (chmod 600); where somebody may have read it, remove it and "
            "the store while no kernel runs"
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
    """Make the file with a new key, or read the one that another process has made meanwhile."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # 0600
        try:
            with open(descriptor, "w") as file:
                file.write(secrets.token_hex(KEY_BYTES) + "\n")
                file.flush()
                os.fsync(descriptor)
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
