"""The users' tokens for slurmrestd, from a file or from a command that the admin sets.

A token is a secret: no message and no log contains it. Source: slurm.schedmd.com/jwt.html.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from gateway_slurm._util import exposure
from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.slurm.commands import slurm_message
from gateway_slurm.slurm.runner import Runner

MAX_TOKEN: Final = 16 << 10
"""Bytes of a token; slurmrestd reads headers of a few kilobytes."""
RENEWAL_MARGIN: Final = 60.0
"""A token is replaced this many seconds before it expires, or a tenth of its lifetime before if that is less."""
MIN_RENEWAL_INTERVAL: Final = 5.0
"""The least number of seconds between two new tokens that replace refused ones."""
# Three parts of base64url (RFC 7519); other kinds of tokens have the same characters.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]{1,16384}", re.ASCII)
# A signed token, as a command's error message may contain it: its header is a JSON object (RFC 7515).
_JWT: Final = re.compile(r"eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_.-]*", re.ASCII)


class Tokens(Protocol):
    """A source of users' tokens."""

    async def token(self, user: str, *, refused: str = "") -> str:
        """Return a token of ``user``, if possible another one than ``refused``.

        Raises SlurmUnavailable with the reason if there is none.
        """


class FileTokens:
    """Tokens that another program keeps fresh in a file; the path may contain ``{user}``.

    The file is read again after each change. It must be a private file (``exposure``).
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._cache: dict[str, tuple[tuple[int, ...], str]] = {}

    async def token(self, user: str, *, refused: str = "") -> str:
        """Return the token in the file, which may still be ``refused``."""
        return await asyncio.to_thread(self._token, user)

    def _token(self, user: str) -> str:
        path = os.path.expanduser(self._path.replace("{user}", user))
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its writer.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                status = os.fstat(file.fileno())
                if reason := exposure(status):
                    raise SlurmUnavailable(f"SlurmService.rest_token_file: {path} is not used: {reason}")
                version = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
                cached = self._cache.get(user)
                if cached is not None and cached[0] == version:
                    return cached[1]
                token = parse_token(file.read(MAX_TOKEN + 100).decode(errors="replace"))
        except OSError as error:
            raise SlurmUnavailable(f"SlurmService.rest_token_file cannot be read: {error}") from error
        if not token:
            raise SlurmUnavailable(f"SlurmService.rest_token_file: {path} does not hold one token and nothing else")
        self._cache[user] = (version, token)
        return token


@dataclass(frozen=True)
class _IssuedToken:
    token: str
    renew_at: float
    """By the system's clock; infinity if the token has no expiry time."""
    issued_at: float
    """By the monotonic clock."""


class CommandTokens:
    """Tokens that a command prints, such as ``scontrol token``; ``{user}`` in its argv is replaced.

    One token per user is kept until shortly before it expires. The runner runs the command, in a scrubbed environment
    and with a time limit.
    """

    def __init__(self, argv: Sequence[str], runner: Runner) -> None:
        self._argv, self._runner = tuple(argv), runner
        self._issued: dict[str, _IssuedToken] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def token(self, user: str, *, refused: str = "") -> str:
        """Return the kept token if it is fresh; else run the command, one at a time for a user."""
        async with self._locks.setdefault(user, asyncio.Lock()):
            issued = self._issued.get(user)
            # If a new token is refused at once, the next one would be as well: the fault lies elsewhere.
            is_new = issued is not None and time.monotonic() - issued.issued_at < MIN_RENEWAL_INTERVAL
            if issued is None or time.time() >= issued.renew_at or (issued.token == refused and not is_new):
                issued = self._issued[user] = await self._issue(user)
            return issued.token

    async def _issue(self, user: str) -> _IssuedToken:
        argv = [item.replace("{user}", user) for item in self._argv]
        result = await self._runner.run(argv)
        token = parse_token(result.stdout)
        if result.exit_status or not token:
            # The output may contain a token or a part of one, so the message leaves stdout out.
            stderr = _JWT.sub("(a token)", result.stderr)
            message = slurm_message(stderr)[:1000] or "it printed no message"
            raise SlurmUnavailable(
                f"SlurmService.rest_token_command gave no token for {user} "
                f"({argv[0]} ended with status {result.exit_status}): {message}",
                argv=[argv[0]],
                exit_status=result.exit_status,
                stderr=stderr,
            )
        now = time.time()
        lifetime = expiry(token) - now
        if lifetime <= 0:
            # This host's clock is ahead of Slurm's: a new token lives for what its claims say.
            lifetime = expiry(token) - _claim(token, "iat", now)
        return _IssuedToken(token, now + lifetime - min(RENEWAL_MARGIN, lifetime / 10), time.monotonic())


def parse_token(text: str) -> str:
    """Return the token in the text of a file or a command, such as scontrol's; empty if the text is not one token."""
    match = _TOKEN.fullmatch(text.strip().removeprefix("SLURM_JWT="))
    return match[0] if match else ""


def expiry(token: str) -> float:
    """Return a token's expiry time in seconds since the epoch (RFC 7519, ``exp``); infinity if it has none.

    Slurm verifies the token; this function does not.
    """
    return _claim(token, "exp", float("inf"))


def _claim(token: str, name: str, default: float) -> float:
    parts = token.split(".")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        return float(claims[name])
    except (IndexError, KeyError, TypeError, ValueError, RecursionError, binascii.Error):
        return default
