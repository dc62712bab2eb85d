"""Authentication by the gateway's own tokens: one or more for each user, in a file of hashes.

A token is 32 random bytes and cannot be guessed from its SHA-256, however fast that is. Slow hashes are for
passwords, which people choose. A short public id in each token names its record in the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_plus

from tornado.httputil import HTTPServerRequest

from gateway_slurm._util import USER_NAMES, exposure, is_user_name, locked, write_atomically
from gateway_slurm.errors import ConfigError, IdentityUnavailable, RequestError
from gateway_slurm.gateway.auth.user import GatewayUser
from gateway_slurm.gateway.specs.catalog import FileCache

LOCK_SECONDS: Final = 10.0
PREFIX: Final = "gws_"
"""What a token begins with, so that people and secret scanners recognise one."""

_TOKEN: Final = re.compile(rf"{PREFIX}([0-9a-f]{{12}})_[A-Za-z0-9_-]{{43}}", re.ASCII)
_ID: Final = re.compile(r"[0-9a-f]{12}", re.ASCII)
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NO_HASH: Final = "0" * 64
_AUTHORIZATION: Final = re.compile(r"\s*(?:token|bearer)\s+([!-~]{1,4096})\s*", re.IGNORECASE | re.ASCII)
_REPLACED: Final = "token=[secret]"

# -- The token in a request --


def request_token(request: HTTPServerRequest) -> str | None:
    """The token of ``Authorization: token …`` or ``Bearer …``; None for any other scheme or no header."""
    match = _AUTHORIZATION.fullmatch(request.headers.get("Authorization", ""))
    return match[1] if match else None


def take_url_token(request: HTTPServerRequest) -> str | None:
    """Remove ``token`` from the request's URL and arguments and return it; None if there is none."""
    parts = (request.query or "").split("&")
    found = [part for part in parts if unquote_plus(part.partition("=")[0]) == "token"]
    if not found:
        return None
    request.query = "&".join(_REPLACED if part in found else part for part in parts)
    request.uri = f"{request.path}?{request.query}"
    request.arguments.pop("token", None)
    request.query_arguments.pop("token", None)
    return unquote_plus(found[0].partition("=")[2])


# -- The file of hashes --


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """A token's entry in the file. ``created`` and ``expires`` are seconds since the epoch."""

    id: str
    user: str
    sha256: str
    service: bool = False
    admin: bool = False
    created: int = 0
    expires: int | None = None

    @property
    def is_expired(self) -> bool:
        return self.expires is not None and time.time() >= self.expires


class TokenFile:
    """The file of hashes at ``path``. It is read when it has changed, and never kept open.

    All methods block shortly, may be called by any thread, and raise ConfigError for a file that cannot be used. A
    file that does not exist has no tokens.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: FileCache[dict[str, TokenRecord]] = FileCache(_parse)

    def find(self, token: str) -> TokenRecord | None:
        """The record of a valid token; None for any other. An unknown id takes as long as a known one."""
        record = self._find(token)
        return record if record is not None and not record.is_expired else None

    def expired_since(self, token: str) -> int | None:
        """When the token expired, in seconds since the epoch; None for a valid or an unknown token."""
        record = self._find(token)
        return record.expires if record is not None and record.is_expired else None

    def _find(self, token: str) -> TokenRecord | None:
        match = _TOKEN.fullmatch(token)
        records = self._by_id()
        record = records.get(match[1]) if match else None
        same = secrets.compare_digest(record.sha256 if record else _NO_HASH, _hash(token))
        return record if record is not None and same else None

    def records(self) -> list[TokenRecord]:
        """All records, in the order in which they were added."""
        return list(self._by_id().values())

    def add(self, user: str, *, service: bool = False, admin: bool = False, days: float | None = None) -> str:
        """Make a token and return it; the file has only its hash. Raises RequestError if ``user`` is no valid name."""
        if not is_user_name(user):
            raise RequestError(f"{user[:200]!r} is not a user's name; allowed are {USER_NAMES}", field="user")
        now = int(time.time())
        expires = None if days is None else now + int(days * 86400)
        with self._edited() as records:
            used = {record.id for record in records}
            token_id = next(new for new in iter(lambda: secrets.token_hex(6), "") if new not in used)
            token = f"{PREFIX}{token_id}_{secrets.token_urlsafe(32)}"
            kind = {"service": service, "admin": admin}
            records.append(
                TokenRecord(id=token_id, user=user, sha256=_hash(token), created=now, expires=expires, **kind)
            )
        return token

    def remove(self, unwanted: Callable[[TokenRecord], bool]) -> list[TokenRecord]:
        """Revoke every token that is ``unwanted``; returns their records."""
        with self._edited() as records:
            removed = [record for record in records if unwanted(record)]
            records[:] = [record for record in records if record not in removed]
        return removed

    def _by_id(self) -> dict[str, TokenRecord]:
        try:
            return self._cache.get(self.path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"the tokens in {self.path} cannot be used: {error}") from error

    @contextlib.contextmanager
    def _edited(self) -> Iterator[list[TokenRecord]]:
        """The records, under a lock. The caller changes the list; it is written when the block ends well."""
        # A symbolic link stays: its target is replaced.
        path = Path(os.path.realpath(self.path))
        try:
            with locked(path.with_name(path.name + ".lock"), LOCK_SECONDS):
                records = self.records()
                before = list(records)
                yield records
                if records != before:
                    text = json.dumps({"tokens": [asdict(record) for record in records]}, indent=1)
                    # Durable: a revoked token must not come back after a power failure.
                    write_atomically(path, text, durable=True)
        except OSError as error:
            raise ConfigError(f"the tokens in {self.path} cannot be changed: {error}") from error


class UserTokens:
    """Authenticates users by the tokens of a file. ``log`` has each reason once why the file cannot be used.

    The file is read in ``executor``, or else in the loop's own.
    """

    def __init__(self, file: TokenFile, log: logging.Logger, executor: Executor | None = None) -> None:
        self._file, self._log, self._logged, self._executor = file, log, "", executor

    async def authenticate(self, request: HTTPServerRequest) -> GatewayUser | None:
        """The token's user. Raises IdentityUnavailable when the file cannot be used: no token is to blame."""
        token = request_token(request)
        if token is None or not _TOKEN.fullmatch(token):
            return None
        try:
            # In a thread: the file may be on a file system that hangs.
            record = await asyncio.get_running_loop().run_in_executor(self._executor, self._file.find, token)
        except ConfigError as error:
            if str(error) != self._logged:
                self._log.error("%s", error)
                self._logged = str(error)
            raise IdentityUnavailable("tokens cannot be checked: the gateway's log says why") from error
        self._logged = ""
        return GatewayUser(record.user, admin=record.admin, service=record.service) if record else None


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _parse(_path: Path, content: bytes, status: os.stat_result) -> dict[str, TokenRecord]:
    """The records by id. Raises ValueError for a file that is not private, or that holds anything else."""
    if why := exposure(status):
        raise ValueError(why)
    try:
        entries = json.loads(content)["tokens"]
        records = [_record(entry) for entry in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"`jupyter slurm token` did not write it ({type(error).__name__}: {error})") from error
    return {record.id: record for record in records}


def _record(entry: dict[str, Any]) -> TokenRecord:
    record = TokenRecord(**entry)
    if not (_ID.fullmatch(record.id) and _HASH.fullmatch(record.sha256) and is_user_name(record.user)):
        raise ValueError(f"a record with id {str(record.id)[:20]!r} is not valid")
    if not (isinstance(record.service, bool) and isinstance(record.admin, bool)):
        raise ValueError(f"service and admin of {record.id} are not both true or false")
    if not isinstance(record.created, int) or not isinstance(record.expires, int | None):
        raise ValueError(f"the times of {record.id} are not numbers")
    return record
