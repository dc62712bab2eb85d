"""Passwords and answers: from files that only their owner can read, or from the terminal, where there is one."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import termios
import time
from collections.abc import Sequence
from typing import Final

from gateway_slurm.errors import ConfigError, LoginRefused

ANSWER_SECONDS: Final = 60.0  # sshd's own patience (LoginGraceTime) is 120
_MAX_SECRETS: Final = 64 << 10  # bytes


def read_secrets(path: str, setting: str) -> list[str]:
    """The lines of a file of secrets. Raises ConfigError for one that others can read, or that is not there."""
    path = os.path.expanduser(path)
    try:
        with open(path, encoding="utf-8") as file:
            facts = os.fstat(file.fileno())
            if facts.st_uid not in (0, os.geteuid()) or stat.S_IMODE(facts.st_mode) & 0o077:
                raise ConfigError(f"{setting}: others than its owner may read or write {path}: chmod 600 it")
            return file.read(_MAX_SECRETS).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {error}") from error


class Answers:
    """Answers to what a host asks for while we log in; one for each login, and told apart by the question.

    ``from_file`` are used in their order, for what is not to be shown while it is typed. What a user has typed once,
    and is no code that is good for one time only, is ``remembered`` for later logins. ``may_ask`` says whether there
    may be a user to ask: a question in the middle of somebody's work would be answered by what they type there.
    """

    def __init__(self, from_file: Sequence[str], remembered: dict[str, str], *, may_ask: bool) -> None:
        self._from_file = list(from_file)
        self._remembered = remembered
        self._given: dict[str, str] = {}
        self.may_ask = may_ask and has_terminal()

    @property
    def can_answer(self) -> bool:
        """Whether there may be one more answer."""
        return bool(self._from_file or self._remembered) or self.may_ask

    def answer(self, who: str, question: str, *, echo: bool = False) -> str:
        """Raises LoginRefused when there is no answer."""
        if self._from_file and not echo:
            return self._from_file.pop(0)
        return self._known_or_asked(f"{who}: {question}", echo=echo, lasting="passw" in question.lower())

    def passphrase(self, path: str) -> str:
        """A key file's. Raises LoginRefused when there is no answer."""
        return self._known_or_asked(f"passphrase of {path}: ", echo=False, lasting=True)

    def _known_or_asked(self, question: str, *, echo: bool, lasting: bool) -> str:
        # Taken out: one that turns out to be wrong is asked for again.
        found = self._remembered.pop(question, None)
        if found is None:
            if not self.may_ask:
                raise LoginRefused(
                    f"{question.strip()!r} is asked, and there is no answer: log in once from a terminal, or name a "
                    "file with the answers in SlurmService.ssh_password_file, or have a key taken"
                )
            found = ask(question, echo=echo)
        if lasting and not echo:
            self._given[question] = found
        return found

    def keep(self) -> None:
        """The login was good: what was asked for is remembered."""
        self._remembered.update(self._given)


def has_terminal() -> bool:
    """Whether this process has a terminal, and is in its foreground."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def ask(question: str, *, echo: bool) -> str:
    """Ask on the terminal. Raises LoginRefused when nobody answers within ANSWER_SECONDS."""
    terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        before = termios.tcgetattr(terminal)
        during = termios.tcgetattr(terminal)
        if not echo:
            during[3] &= ~termios.ECHO
        try:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, during)
            os.write(terminal, _printable(question).encode())
            return _line(terminal)
        finally:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
            if not echo:
                os.write(terminal, b"\n")
    finally:
        os.close(terminal)


def _line(terminal: int) -> str:
    deadline = time.monotonic() + ANSWER_SECONDS
    data = b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([terminal], [], [], left)[0]:
            raise LoginRefused(f"nobody answered within {ANSWER_SECONDS:g} s")
        part = os.read(terminal, 4096)
        if not part:
            raise LoginRefused("the terminal has closed")
        data += part
    return data.decode(errors="replace").rstrip("\r\n")


def _printable(text: str) -> str:
    """What a host says, without control characters that would write over what the user sees."""
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in text[:2000])
