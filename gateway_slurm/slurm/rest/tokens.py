"""The users' tokens for slurmrestd: read from a file, or minted by a command of the admin's.

A token is a secret: it stands in no message and no log. Source: slurm.schedmd.com/jwt.html.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import re
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.slurm.commands import slurm_message
from gateway_slurm.slurm.runner import Runner

LONGEST: Final = 16 << 10
"""Bytes of a token; slurmrestd reads headers of a few kilobytes."""
MARGIN: Final = 60.0
"""Seconds before its end, or a tenth of its life where that is shorter, at which a token is replaced."""
MINT_AGAIN: Final = 5.0
"""Seconds that must lie between two tokens that are minted since the one before was refused."""
# Three parts of base64url (RFC 7519); others that a site's authentication takes have no other letters.
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]{1,16384}", re.ASCII)
# A signed one, as it may stand in what a command says of its trouble: its header is a JSON object (RFC 7515).
_JWT: Final = re.compile(r"eyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_.-]*", re.ASCII)


class Tokens(Protocol):
    """Where users' tokens come from."""

    async def token(self, user: str, *, refused: str = "") -> str:
        """Return a token of ``user``: another one than ``refused``, where there is another.

        Raises SlurmUnavailable when there is none; the message says why.
        """


class FileTokens:
    """Tokens that somebody else keeps fresh: in a file, whose path may hold ``{user}``.

    The file is read again when it has changed. It must be a plain one, of this process's user or root, that nobody
    else can read or write.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._read: dict[str, tuple[tuple[int, ...], str]] = {}

    async def token(self, user: str, *, refused: str = "") -> str:
        """Return what the file holds now; ``refused`` where nobody has replaced it."""
        return await asyncio.to_thread(self._token, user)

    def _token(self, user: str) -> str:
        path = os.path.expanduser(self._path.replace("{user}", user))
        try:
            # Not to wait for ever for whoever writes a FIFO.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                facts = os.fstat(file.fileno())
                self._check(path, facts)
                version = (facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size)
                known = self._read.get(user)
                if known is not None and known[0] == version:
                    return known[1]
                token = parse_token(file.read(LONGEST + 100).decode(errors="replace"))
        except OSError as error:
            raise SlurmUnavailable(f"SlurmService.rest_token_file cannot be read: {error}") from error
        if not token:
            raise SlurmUnavailable(f"SlurmService.rest_token_file: {path} does not hold one token and nothing else")
        self._read[user] = (version, token)
        return token

    @staticmethod
    def _check(path: str, facts: os.stat_result) -> None:
        name = "SlurmService.rest_token_file"
        if not stat.S_ISREG(facts.st_mode):
            raise SlurmUnavailable(f"{name}: {path} is not a plain file")
        if facts.st_uid not in (0, os.geteuid()):
            raise SlurmUnavailable(f"{name}: {path} belongs neither to this process's user nor to root")
        if stat.S_IMODE(facts.st_mode) & 0o077:
            mode = stat.S_IMODE(facts.st_mode)
            raise SlurmUnavailable(f"{name}: others may use {path} (its mode is {mode:04o}); run: chmod 600 {path}")


@dataclass(frozen=True)
class _Minted:
    token: str
    replaced_at: float
    """By the system's clock; infinity where the token does not tell when it ends."""
    minted_at: float
    """By the monotonic clock."""


class CommandTokens:
    """Tokens that a command prints: an argv in which ``{user}`` is replaced, such as scontrol's.

    One is kept for each user until shortly before it expires. The command runs in the runner's scrubbed
    environment and within its time.
    """

    def __init__(self, argv: Sequence[str], runner: Runner) -> None:
        self._argv, self._runner = tuple(argv), runner
        self._minted: dict[str, _Minted] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def token(self, user: str, *, refused: str = "") -> str:
        """Return the one that is kept, if it is fresh; else have one minted, one command at a time for a user."""
        async with self._locks.setdefault(user, asyncio.Lock()):
            known = self._minted.get(user)
            if known is not None and self._is_fresh(known, refused):
                return known.token
            minted = await self._mint(user)
            self._minted[user] = minted
            return minted.token

    @staticmethod
    def _is_fresh(known: _Minted, refused: str) -> bool:
        if time.time() >= known.replaced_at:
            return False
        # Where a new one is refused at once, so would be the next: the fault lies elsewhere.
        return known.token != refused or time.monotonic() - known.minted_at < MINT_AGAIN

    async def _mint(self, user: str) -> _Minted:
        argv = [item.replace("{user}", user) for item in self._argv]
        result = await self._runner.run(argv)
        token = parse_token(result.stdout)
        if result.exit_status or not token:
            # What it printed may be a token, or a part of one.
            stderr = _JWT.sub("(a token)", result.stderr)
            words = slurm_message(stderr)[:1000] or "it said nothing"
            raise SlurmUnavailable(
                f"SlurmService.rest_token_command gave no token for {user} "
                f"({argv[0]} ended with status {result.exit_status}): {words}",
                argv=[argv[0]],
                exit_status=result.exit_status,
                stderr=stderr,
            )
        now = time.time()
        expires = expiry(token)
        left = expires - now
        return _Minted(token, expires - min(MARGIN, left / 10), time.monotonic())


def parse_token(text: str) -> str:
    """Return the token in what a file or a command gives, also as scontrol prints it; empty if it is not one token."""
    match = _TOKEN.fullmatch(text.strip().removeprefix("SLURM_JWT="))
    return match[0] if match else ""


def expiry(token: str) -> float:
    """When a token expires, in seconds since the epoch (RFC 7519, ``exp``); infinity where it does not tell.

    It is not verified: that is Slurm's to do.
    """
    parts = token.split(".")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError, RecursionError, binascii.Error):
        return float("inf")
