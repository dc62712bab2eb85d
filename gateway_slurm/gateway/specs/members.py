"""Membership in a project: by user name, Unix group, or Slurm account."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import pwd
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

from gateway_slurm.errors import GatewaySlurmError, SlurmUnavailable
from gateway_slurm.gateway.specs.projects import Members
from gateway_slurm.slurm.runner import Runner

UNANSWERED_SECONDS: Final = 30.0
"""How long Slurm is not asked again after it did not answer: each attempt costs the caller the whole time limit."""
RECENT_SECONDS: Final = 25.0
"""How old an answer may be for the end of a right."""
_ASK_SECONDS: Final = 15.0
_MAX_USERS: Final = 4096

Accounts = Mapping[str, frozenset[str]]
"""Each user's Slurm accounts."""

_log = logging.getLogger(__name__)


class Membership:
    """Tells whether a user is a member; answers are used for ``max_age`` seconds. Any thread may ask, and may wait.

    ``ask_accounts`` asks Slurm for all users' accounts at once and raises GatewaySlurmError. It is called only for
    projects that name accounts. While Slurm does not answer, no user is a member by account.
    """

    def __init__(
        self,
        ask_accounts: Callable[[], Accounts],
        *,
        max_age: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask_accounts, self._max_age, self._clock = ask_accounts, max_age, clock
        self._lock = threading.Lock()
        self._accounts: Accounts = {}
        self._is_unanswered = False
        self._accounts_until = float("-inf")
        self._groups: dict[str, tuple[float, frozenset[str]]] = {}

    def is_member(self, user: str, members: Members | None) -> bool:
        """Whether ``user`` is a member by name, group or account; without ``members`` every user is."""
        if members is None or user in members.users:
            return True
        if members.groups and members.groups & self._groups_of(user):
            return True
        return bool(members.accounts and members.accounts & self._accounts_of(user))

    def has_left(self, user: str, members: Members | None) -> bool:
        """Whether the user is no member, by answers of at most RECENT_SECONDS. False while Slurm does not answer."""
        if members is None or user in members.users:
            return False
        if members.groups:
            groups = self._groups_of(user, min(RECENT_SECONDS, self._max_age))
            # Each known user has a group. Without any, the host's databases (nsswitch.conf(5)) do not answer now.
            if not groups or members.groups & groups:
                return False
        if not members.accounts:
            return True
        accounts = self._accounts_of(user, min(RECENT_SECONDS, self._max_age))
        return not self._is_unanswered and not members.accounts & accounts

    def _groups_of(self, user: str, age: float | None = None) -> frozenset[str]:
        until, groups = self._groups.get(user, (float("-inf"), frozenset()))
        if self._clock() >= self._end(until, age):
            groups = unix_groups(user)
            if len(self._groups) >= _MAX_USERS:
                self._groups.clear()
            self._groups[user] = self._clock() + self._max_age, groups
        return groups

    def _end(self, until: float, age: float | None) -> float:
        """When an answer that is used until ``until`` gets older than ``age``."""
        return until if age is None else until - self._max_age + age

    def _accounts_of(self, user: str, age: float | None = None) -> frozenset[str]:
        # One thread asks Slurm; the others wait for the same answer.
        with self._lock:
            until = self._accounts_until if self._is_unanswered else self._end(self._accounts_until, age)
            if self._clock() >= until:
                try:
                    self._accounts = self._ask_accounts()
                    self._is_unanswered = False
                    self._accounts_until = self._clock() + self._max_age
                except GatewaySlurmError as error:
                    _log.error("for now no user is a member of a project by a Slurm account: %s", error)
                    self._accounts, self._is_unanswered = {}, True
                    self._accounts_until = self._clock() + UNANSWERED_SECONDS
            return self._accounts.get(user, frozenset())


def unix_groups(user: str) -> frozenset[str]:
    """The names of a user's groups in this host's databases; empty for an unknown user."""
    try:
        entry = pwd.getpwnam(user)
        numbers = os.getgrouplist(user, entry.pw_gid)
    except (KeyError, OSError, ValueError):
        return frozenset()
    names = set()
    for number in numbers:
        with contextlib.suppress(KeyError):
            names.add(grp.getgrgid(number).gr_name)
    return frozenset(names)


# -- Slurm's accounts --


def accounts_command() -> list[str]:
    """sacctmgr's argv for every user's accounts: sacctmgr(1), ``show associations``."""
    return ["sacctmgr", "-nP", "show", "assoc", "format=User,Account"]


def parse_accounts(exit_status: int, stdout: str, stderr: str) -> Accounts:
    """Each user's accounts, from lines ``user|account``. Lines of accounts have no user. Raises SlurmUnavailable."""
    if exit_status != 0:
        message = " ".join(stderr.split())[:1000] or f"exit status {exit_status}"
        raise SlurmUnavailable(f"sacctmgr did not list the users' accounts: {message}", exit_status=exit_status)
    found: dict[str, set[str]] = {}
    for line in stdout.splitlines():
        user, _bar, account = line.partition("|")
        if user and account and "|" not in account:
            found.setdefault(user, set()).add(account.lower())
    return {user: frozenset(accounts) for user, accounts in found.items()}


def ask_accounts(runner: Runner) -> Accounts:
    """Ask slurmdbd, and wait for its answer. Not for a thread with a running event loop. Raises SlurmError."""
    result = asyncio.run(runner.run(accounts_command(), timeout=_ASK_SECONDS))
    return parse_accounts(result.exit_status, result.stdout, result.stderr)
