"""Run Slurm's commands as another user, through sudo and the helper; and the check of such a user."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import IO, Any, Final

from gateway_slurm._util import Backoff, is_user_name
from gateway_slurm.errors import NotAllowed, SlurmUnavailable
from gateway_slurm.slurm.runner import CommandResult, DetachedProcess, ExtraEnv, Runner, reap, timed_out
from gateway_slurm.slurm.ssh.login_node.stderr_file import StderrFile
from gateway_slurm.slurm.sudo.helper import LENGTH, MAX_TIMEOUT, NOBODY_UID, READY, VARIABLES

# Seconds by which the helper's timeout is longer than this process's. The helper's matters only if this process dies.
_TIMEOUT_MARGIN: Final = 5.0
MAX_COMMANDS: Final = 16
"""Commands of one user at a time; further ones wait."""
MAX_DETACHED: Final = 256
"""Job steps of one user that were started and left running; further ones are refused."""


class HelperPlaces:
    """How many helpers each user may have under way.

    A helper belongs to its user, who can stop it (SIGSTOP), and sudo stops with it. This process can signal neither, so
    they count until they have ended.
    """

    def __init__(self, commands: int = MAX_COMMANDS, detached: int = MAX_DETACHED) -> None:
        self._limits = {False: commands, True: detached}
        self._running: dict[tuple[str, bool], list[asyncio.subprocess.Process]] = {}
        self._starting: Counter[tuple[str, bool]] = Counter()

    @contextlib.asynccontextmanager
    async def take(
        self, user: str, seconds: float, *, detached: bool = False
    ) -> AsyncIterator[list[asyncio.subprocess.Process]]:
        """Wait for a place, at most ``seconds``; the caller appends the process that it starts.

        Raises SlurmUnavailable if there is no place.
        """
        key, deadline, backoff = (user, detached), time.monotonic() + seconds, Backoff(0.01, 0.2)
        while self._count(key) >= self._limits[detached]:
            if detached or time.monotonic() >= deadline:
                raise SlurmUnavailable(
                    f"{self._count(key)} commands of the user {user} are still under way, as many as may be at a time. "
                    f"If they are stopped or hang, {user} or an administrator must end them (ps -u {user})"
                )
            await backoff.sleep()
        self._starting[key] += 1
        started: list[asyncio.subprocess.Process] = []
        try:
            yield started
        finally:
            self._starting[key] -= 1
            if started:
                self._running.setdefault(key, []).extend(started)
            self._count(key)

    def _count(self, key: tuple[str, bool]) -> int:
        running = [process for process in self._running.pop(key, ()) if process.returncode is None]
        if running:
            self._running[key] = running
        if not self._starting[key]:
            del self._starting[key]
        return len(running) + self._starting.get(key, 0)


class SudoRunner(Runner):
    """Runs Slurm's commands as ``user``; ``command`` is the argv that starts the helper, with ``{user}`` in it.

    The helper's own settings hold the directories of Slurm's commands and SLURM_CONF. ``timeout`` is in seconds;
    ``counts`` is shared with the process's own runner, ``places`` with the runners of all users.
    """

    def __init__(
        self, user: str, command: Sequence[str], *, timeout: float, counts: Counter[str], places: HelperPlaces
    ) -> None:
        super().__init__(timeout=timeout)
        self.counts, self._places = counts, places
        self.user = user
        self._command = [item.replace("{user}", user) for item in command]

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", extra_env: ExtraEnv = None, timeout: float | None = None
    ) -> CommandResult:
        """Run a command to its end as the user; on timeout and on cancellation the helper kills it."""
        limit = self._timeout if timeout is None else timeout
        request = self._request(argv, extra_env, stdin, limit + _TIMEOUT_MARGIN)
        self.counts[argv[0]] += 1
        async with self._places.take(self.user, limit) as started:
            process = await self._start_helper(stderr=asyncio.subprocess.PIPE)
            started.append(process)
        try:
            communication = self._communicate(process, request, argv, keep_stdin_open=True)
            stdout, stderr = await asyncio.wait_for(communication, limit)
        except asyncio.TimeoutError as error:
            raise timed_out(argv, limit) from error
        finally:
            # This ends the helper's standard input, so the helper kills a command that is not detached.
            await asyncio.shield(reap(process))
        ready, stdout = stdout[: len(READY)], stdout[len(READY) :]
        if ready.encode() != READY:
            raise self._not_run(argv, process, stderr)
        return CommandResult(process.returncode or 0, stdout, stderr)

    async def start(self, argv: Sequence[str], *, stdin: bytes = b"", extra_env: ExtraEnv = None) -> DetachedProcess:
        """Start a command as the user that outlives this call and this process."""
        request = self._request(argv, extra_env, stdin, self._timeout, detached=True)
        self.counts[argv[0]] += 1
        stderr = await asyncio.to_thread(StderrFile)
        try:
            async with self._places.take(self.user, 0, detached=True) as helpers:
                process = await self._start_helper(stderr=stderr.file)
                helpers.append(process)
        except BaseException:
            stderr.close()
            raise
        started = DetachedHelper(process, stderr)
        try:
            ready = await asyncio.wait_for(_until_ready(process, request), self._timeout)
            if not ready:
                await asyncio.wait_for(process.wait(), self._timeout)
                raise self._not_run(argv, process, started.stderr_tail())
        except BaseException as error:
            started.terminate()
            await asyncio.shield(reap(process))
            stderr.close()
            if isinstance(error, asyncio.TimeoutError):
                raise SlurmUnavailable(f"{argv[0]} was not started within {self._timeout:g} s", argv=argv) from error
            raise
        return started

    def _request(
        self, argv: Sequence[str], extra_env: ExtraEnv, data: bytes, timeout: float, *, detached: bool = False
    ) -> bytes:
        """Return the request that the helper reads, without variables that the helper does not allow."""
        fields: dict[str, Any] = {
            "command": argv[0],
            "arguments": list(argv[1:]),
            "environment": {name: text for name, text in self.environment(extra_env).items() if name in VARIABLES},
            "timeout": min(timeout, MAX_TIMEOUT),
            "detached": detached,
        }
        header = json.dumps(fields).encode()
        return LENGTH.pack(len(header)) + header + LENGTH.pack(len(data)) + data

    async def _start_helper(self, *, stderr: int | IO[bytes]) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await self._execute(self._command, self.environment(), stdin=pipe, stdout=pipe, stderr=stderr)

    def _not_run(self, argv: Sequence[str], process: asyncio.subprocess.Process, stderr: str) -> SlurmUnavailable:
        message = "; ".join(stderr.strip().splitlines())[:2000] or f"no message (status {process.returncode})"
        return SlurmUnavailable(
            f"{argv[0]} could not be run as user {self.user}: {message}. An administrator must check "
            "SlurmService.as_user_command, its sudoers rule and its helper",
            argv=argv,
            exit_status=process.returncode,
            stderr=stderr,
        )


class DetachedHelper(DetachedProcess):
    """The helper of a command that was started and left running."""

    def terminate(self) -> None:
        """Let the helper send SIGTERM to its command; does nothing after the command has ended."""
        stdin = self._process.stdin
        if self._process.returncode is None and stdin is not None and not stdin.is_closing():
            stdin.write(b"T")


async def _until_ready(process: asyncio.subprocess.Process, request: bytes) -> bool:
    """Send the request; return whether the helper has accepted it and runs the command."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the helper or sudo refused without reading
        await process.stdin.drain()
    try:
        return await process.stdout.readexactly(len(READY)) == READY
    except asyncio.IncompleteReadError:
        return False


# -- Unix users --


def process_user() -> str:
    """Return the name of this process's Unix user."""
    return pwd.getpwuid(os.geteuid()).pw_name


def check_user(name: str, *, min_uid: int, allow_own: bool) -> None:
    """Return if kernels may run as this Unix user. The lookup may block while it waits for a directory service.

    Raises NotAllowed. Each message begins with the same words, for unknown users as for those who are not allowed.
    """
    if not is_user_name(name):
        raise NotAllowed(f"not allowed to run kernels: {name[:40]!r} is not the name of a user")
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise NotAllowed(f"not allowed to run kernels: there is no user {name!r} on this machine") from None
    if found.pw_uid in (0, NOBODY_UID) or found.pw_uid < min_uid:
        raise NotAllowed(
            f"not allowed to run kernels: {name!r} is a system account (SlurmService.min_user_uid is {min_uid})"
        )
    # A directory service may ignore case, or a name's domain. One user must not be two owners.
    if found.pw_name != name:
        raise NotAllowed(
            f"not allowed to run kernels: {name!r} is another spelling of the user {found.pw_name!r} of this machine; "
            "the gateway must know the user by that name"
        )
    if found.pw_uid == os.geteuid() and not allow_own:
        raise NotAllowed(
            f"not allowed to run kernels: {name!r} is this server's own account (SlurmService.allow_own_user)"
        )
