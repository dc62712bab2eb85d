"""Run Slurm's commands asynchronously, in a scrubbed environment, with limits on time and output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, ClassVar, Final

from gateway_slurm.errors import SlurmNotInstalled, SlurmUnavailable, Unanswered
from gateway_slurm.slurm.ssh.login_node.stderr_file import TRIM_INTERVAL, StderrFile

MAX_OUTPUT: Final = 16 << 20
"""Bytes of one command's stdout, and of its stderr. A command that prints more is killed."""
_REAP_TIMEOUT: Final = 5.0  # seconds

# A command gets no other variables of this process: a stale SLURM_JOB_ID, SLURM_NTASKS or SLURM_MEM_PER_NODE breaks or
# multiplies steps, and SQUEUE_FORMAT changes the output that the parsers read.
INHERITED_VARIABLES: Final = ("PATH", "HOME", "USER", "LOGNAME", "TZ", "KRB5CCNAME", "SLURM_CONF")
# Times are seconds since the epoch, which do not depend on a time zone.
FIXED_VARIABLES: Final = {"LC_ALL": "C.UTF-8", "SLURM_TIME_FORMAT": "%s"}
_DEFAULT_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


ExtraEnv = Mapping[str, str | None] | None
"""Additions to a command's environment, if any; the value None removes a variable."""


@dataclass(frozen=True)
class CommandResult:
    """The result of one command."""

    exit_status: int
    stdout: str
    stderr: str


def utf8(argv: Sequence[str]) -> list[bytes]:
    """Return an argv as bytes: Python's own encoding of it may have no character for a job's name."""
    return [item.encode("utf-8", "surrogateescape") for item in argv]


class Runner:
    """Runs commands for the Slurm driver. It holds no resource between calls, so it has no ``close``.

    ``search_path`` holds the directories of Slurm's commands (default: PATH at the time of each call); ``slurm_conf``
    overrides SLURM_CONF; ``timeout`` is in seconds. ``counts`` is how often each command ran.
    """

    is_local: ClassVar[bool] = True
    """Whether the commands run on this machine."""

    def __init__(
        self,
        search_path: str | None = None,
        slurm_conf: str | None = None,
        timeout: float = 30,  # Slurm's own client gives up after 10 to 20 s
        *,
        max_output: int = MAX_OUTPUT,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._search_path = search_path
        self._slurm_conf = slurm_conf
        self._timeout = timeout
        self._max_output = max_output

    def environment(self, extra_env: ExtraEnv = None) -> dict[str, str]:
        env = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
        env["PATH"] = self._search_path or env.get("PATH", _DEFAULT_PATH)
        if self._slurm_conf:
            env["SLURM_CONF"] = self._slurm_conf
        variables = {**env, **FIXED_VARIABLES, **(extra_env or {})}
        return {name: value for name, value in variables.items() if value is not None}

    def find(self, argv: Sequence[str]) -> str:
        """Return the path of a command's program. Raises SlurmNotInstalled."""
        # A PATH in extra_env is the job's and must not choose which sbatch runs.
        path = self._search_path or os.environ.get("PATH", _DEFAULT_PATH)
        program = shutil.which(argv[0], path=path)
        if program is None:
            raise SlurmNotInstalled(
                f"the command {argv[0]!r} is not in {path}; install Slurm's client commands, "
                "or name their directory in the service's search path",
                argv=argv,
            )
        return program

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", extra_env: ExtraEnv = None, timeout: float | None = None
    ) -> CommandResult:
        """Run a command to its end and return its result, for any exit status.

        On timeout and on cancellation the command's whole process group is killed and reaped. Raises
        SlurmNotInstalled, and Unanswered for a command that does not end in time or prints too much.
        """
        limit = self._timeout if timeout is None else timeout
        pipe = asyncio.subprocess.PIPE
        source = pipe if stdin else asyncio.subprocess.DEVNULL
        process = await self._spawn(argv, extra_env, stdin=source, stdout=pipe, stderr=pipe)
        try:
            stdout, stderr = await asyncio.wait_for(self._communicate(process, stdin, argv), limit)
        except asyncio.TimeoutError as error:
            raise timed_out(argv, limit) from error
        finally:
            await _end(process)
        return CommandResult(process.returncode or 0, stdout, stderr)

    async def start(self, argv: Sequence[str], *, stdin: bytes = b"", extra_env: ExtraEnv = None) -> DetachedProcess:
        """Start a command that outlives this call and this process: it has its own session and no pipes to us."""
        source, stderr = await asyncio.to_thread(_files, stdin)
        try:
            process = await self._spawn(
                argv, extra_env, stdin=source, stdout=asyncio.subprocess.DEVNULL, stderr=stderr.file
            )
        except BaseException:
            stderr.close()
            raise
        finally:
            source.close()
        return DetachedProcess(process, stderr)

    async def _spawn(
        self, argv: Sequence[str], extra_env: ExtraEnv, **pipes: int | IO[bytes]
    ) -> asyncio.subprocess.Process:
        program = self.find(argv)
        self.counts[argv[0]] += 1
        return await self._execute([program, *argv[1:]], self.environment(extra_env), **pipes)

    @staticmethod
    async def _execute(argv: Sequence[str], env: Mapping[str, str], **pipes: Any) -> asyncio.subprocess.Process:
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(*utf8(argv), env=env, cwd="/", start_new_session=True, **pipes)
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The command may run already. asyncio would kill only the command itself, and then wait without a limit
            # for the command's children to close our pipes.
            with contextlib.suppress(OSError):
                await _end(await starting)
            raise
        except OSError as error:
            raise SlurmUnavailable(f"{argv[0]} could not be run: {error}", argv=argv) from error

    async def _communicate(
        self, process: asyncio.subprocess.Process, data: bytes, argv: Sequence[str], *, keep_stdin_open: bool = False
    ) -> tuple[str, str]:
        """Write ``data`` and return stdout and stderr; ``keep_stdin_open`` closes stdin only after both have ended."""
        readers = [asyncio.ensure_future(self._read(stream, argv)) for stream in (process.stdout, process.stderr)]
        try:
            if process.stdin is not None:
                # A command may fail without reading its input.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    process.stdin.write(data)
                    await process.stdin.drain()
                if not keep_stdin_open:
                    process.stdin.close()
            stdout, stderr = await asyncio.gather(*readers)
            if keep_stdin_open and process.stdin is not None:
                process.stdin.close()
            await process.wait()
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        return stdout, stderr

    async def _read(self, stream: asyncio.StreamReader | None, argv: Sequence[str]) -> str:
        assert stream is not None
        data = bytearray()
        while chunk := await stream.read(1 << 16):
            data += chunk
            if len(data) > self._max_output:
                raise Unanswered(f"{argv[0]} printed more than {self._max_output} bytes", argv=argv)
        return data.decode(errors="replace")


class DetachedProcess:
    """A command that was started and left running. Its owner calls ``wait``; it need not be terminated."""

    def __init__(self, process: asyncio.subprocess.Process, stderr: StderrFile) -> None:
        self._process = process
        self._stderr = stderr

    async def wait(self) -> int:
        """Wait until the command ends and return its exit status; cancellation leaves the command running."""
        ended = asyncio.ensure_future(self._process.wait())
        try:
            while not (await asyncio.wait({ended}, timeout=TRIM_INTERVAL))[0]:
                self._stderr.trim()
        finally:
            ended.cancel()
        self._stderr.close()
        return ended.result()

    def stderr_tail(self) -> str:
        """Return the end of the command's stderr, at most MAX_TAIL bytes."""
        return self._stderr.tail().decode(errors="replace")

    def terminate(self) -> None:
        """Send SIGTERM to the command's process group; does nothing after the command has ended."""
        if self._process.returncode is None:
            _signal_group(self._process.pid, signal.SIGTERM)


def timed_out(argv: Sequence[str], limit: float) -> Unanswered:
    """Return the error for a command that was killed after ``limit`` seconds."""
    return Unanswered(f"{argv[0]} did not end within {limit:g} s; nothing is known about the jobs", argv=argv)


def _files(data: bytes) -> tuple[IO[bytes], StderrFile]:
    """Return two files without names: stdin with ``data``, and an empty one for stderr.

    With files instead of pipes the command neither stalls nor dies of SIGPIPE when this process ends.
    """
    stdin = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    stdin.write(data)
    stdin.seek(0)
    return stdin, StderrFile()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the rest of the command's process group, and reap the command."""
    # Children of a command that has ended may hold our pipes. The kernel does not reuse a process group's id while the
    # group has a member, and not soon afterwards.
    _signal_group(process.pid, signal.SIGKILL)
    await asyncio.shield(reap(process))


async def reap(process: asyncio.subprocess.Process) -> None:
    """Close the command's stdin and wait for the end of a killed command, for a few seconds at most.

    For asyncio a process has ended only when its pipes have, and asyncio stops reading a pipe whose buffer is full.
    So the rest of both pipes is read and discarded. A child that left the process group may keep a pipe open longer.
    A command that does not end, because its user has stopped it, keeps no pipe of this process.
    """
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode is not None:
        return
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.gather(*map(_drain, (process.stdout, process.stderr))), _REAP_TIMEOUT)
        await asyncio.wait_for(process.wait(), _REAP_TIMEOUT)
    if process.returncode is None:
        transport = process._transport  # type: ignore[attr-defined]  # asyncio closes pipes only with a kill
        for pipe in (transport.get_pipe_transport(number) for number in (0, 1, 2)):
            if pipe is not None:
                pipe.close()


async def _drain(stream: asyncio.StreamReader | None) -> None:
    while stream is not None and await stream.read(1 << 16):
        pass


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
