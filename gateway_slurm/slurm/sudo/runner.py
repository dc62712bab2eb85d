"""Running Slurm's commands as another user: the runner's ways, through sudo and the helper."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final

from gateway_slurm.errors import NotAllowed, SlurmUnavailable, Unanswered
from gateway_slurm.slurm.runner import CommandResult, DetachedProcess, Runner, reap
from gateway_slurm.slurm.sudo.helper import LENGTH, MAX_TIMEOUT, NOBODY, READY, VARIABLES

# By how much the helper's limit is longer than ours: it counts only where we cannot say any more that it is over.
_MARGIN: Final = 5.0


class SudoRunner(Runner):
    """Runs Slurm's commands as ``user``; ``command`` is the argv that starts the helper, with ``{user}`` in it.

    Where Slurm's commands and its configuration are is the helper's own to know. ``timeout`` is in seconds;
    ``counts`` are shared with the process's own runner.
    """

    def __init__(self, user: str, command: Sequence[str], *, timeout: float, counts: Counter[str]) -> None:
        super().__init__(timeout=timeout)
        self.counts = counts
        self.user = user
        self._command = [item.replace("{user}", user) for item in command]

    async def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,  # noqa: A002 - as in Runner
        extra_env: Mapping[str, str | None] | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        """Run a command to its end as the user; on timeout and on cancellation the helper kills it."""
        limit = self._timeout if timeout is None else timeout
        request = self._request(argv, extra_env, input or b"", limit + _MARGIN)
        began = time.monotonic()
        self.counts[argv[0]] += 1
        process = await self._helper(argv, stderr=asyncio.subprocess.PIPE)
        try:
            talk = self._communicate(process, request, argv, keep_stdin_open=True)
            stdout, stderr = await asyncio.wait_for(talk, limit)
        except asyncio.TimeoutError as error:
            raise Unanswered(
                f"{argv[0]} did not end within {limit:g} s; nothing is known about the jobs", argv=argv
            ) from error
        finally:
            await asyncio.shield(_hang_up(process))
        ready, stdout = stdout[: len(READY)], stdout[len(READY) :]
        if ready.encode() != READY:
            raise self._not_run(argv, process, stderr)
        return CommandResult(process.returncode or 0, stdout, stderr, time.monotonic() - began)

    async def start(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",  # noqa: A002 - as in Runner
        extra_env: Mapping[str, str | None] | None = None,
    ) -> DetachedProcess:
        """Start a command as the user that outlives this call, and this process."""
        request = self._request(argv, extra_env, input, self._timeout, detached=True)
        self.counts[argv[0]] += 1
        stderr = await asyncio.to_thread(tempfile.TemporaryFile)
        try:
            process = await self._helper(argv, stderr=stderr)
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
            await asyncio.shield(_hang_up(process))
            stderr.close()
            if isinstance(error, asyncio.TimeoutError):
                raise SlurmUnavailable(f"{argv[0]} was not started within {self._timeout:g} s", argv=argv) from error
            raise
        return started

    def _request(
        self,
        argv: Sequence[str],
        extra_env: Mapping[str, str | None] | None,
        data: bytes,
        timeout: float,
        *,
        detached: bool = False,
    ) -> bytes:
        """What the helper reads; the variables that it does not take are left out."""
        environment = {name: value for name, value in self.environment(extra_env).items() if name in VARIABLES}
        fields: dict[str, Any] = {
            "command": argv[0],
            "arguments": list(argv[1:]),
            "environment": environment,
            "timeout": min(timeout, MAX_TIMEOUT),
            "detached": detached,
        }
        header = json.dumps(fields).encode()
        return LENGTH.pack(len(header)) + header + LENGTH.pack(len(data)) + data

    async def _helper(self, argv: Sequence[str], *, stderr: int | IO[bytes]) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await self._execute(self._command, self.environment(), stdin=pipe, stdout=pipe, stderr=stderr)

    def _not_run(self, argv: Sequence[str], process: asyncio.subprocess.Process, stderr: str) -> SlurmUnavailable:
        words = "; ".join(stderr.strip().splitlines())[:2000] or f"it said nothing (status {process.returncode})"
        return SlurmUnavailable(
            f"{argv[0]} could not be run as user {self.user}: {words}. Let an administrator see to "
            "SlurmService.as_user_command, its sudoers rule and its helper",
            argv=argv,
            exit_status=process.returncode,
            stderr=stderr,
        )


class DetachedHelper(DetachedProcess):
    """The helper of a command that was started and left running."""

    def terminate(self) -> None:
        """Have the helper send its command SIGTERM; does nothing to one that has ended."""
        stdin = self._process.stdin
        if self._process.returncode is None and stdin is not None and not stdin.is_closing():
            stdin.write(b"T")


async def _until_ready(process: asyncio.subprocess.Process, request: bytes) -> bool:
    """Hand the request over; return whether the helper has taken it and runs the command."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it said no without reading
        await process.stdin.drain()
    try:
        return await process.stdout.readexactly(len(READY)) == READY
    except asyncio.IncompleteReadError:
        return False


async def _hang_up(process: asyncio.subprocess.Process) -> None:
    """Let the helper know that nobody listens any more, and reap it; it kills a command that is not detached."""
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode is None:
        await reap(process)


# -- Which Unix users kernels are run for. --


# What useradd(8) takes, and capitals: nothing that sudo could read as an option or as a number (``#0``).
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}", re.ASCII)


def process_user() -> str:
    """The name of the Unix user that this process runs as."""
    return pwd.getpwuid(os.geteuid()).pw_name


def check_user(name: str, *, min_uid: int, allow_own: bool) -> None:
    """Return if kernels may be run as this Unix user; may ask a directory service, and wait for it.

    Raises NotAllowed: the reason is the same for one who is not there and one who may not, but for the
    process's own account, which is a matter of settings.
    """
    if not _NAME.fullmatch(name):
        raise NotAllowed(f"not allowed to run kernels: {name[:40]!r} is not the name of a user")
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise NotAllowed(f"not allowed to run kernels: there is no user {name!r} on this machine") from None
    # A directory service may find Root for root.
    if found.pw_name != name or found.pw_uid == 0 or found.pw_uid == NOBODY or found.pw_uid < min_uid:
        raise NotAllowed(
            f"not allowed to run kernels: {name!r} is a system account (SlurmService.min_user_uid is {min_uid})"
        )
    if found.pw_uid == os.geteuid() and not allow_own:
        raise NotAllowed(
            f"not allowed to run kernels: {name!r} is this server's own account (SlurmService.allow_own_user)"
        )
