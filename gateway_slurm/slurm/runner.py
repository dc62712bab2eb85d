"""Running Slurm's commands: asynchronously, in a scrubbed environment, bounded in time and output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

from gateway_slurm.errors import SlurmNotInstalled, SlurmUnavailable, Unanswered

MAX_OUTPUT: Final = 16 << 20
"""Bytes that are kept of one command's output and of its errors; what prints more is broken, and is
killed."""
_REAP_SECONDS: Final = 5.0
TAIL: Final = 64 << 10
"""Bytes that are kept of what a detached command said last."""

# Everything else of the process's own environment stays here: a stale SLURM_JOB_ID, SLURM_NTASKS or
# SLURM_MEM_PER_NODE breaks or multiplies steps, and SQUEUE_FORMAT changes what our parsers read.
KEPT: Final = ("PATH", "HOME", "USER", "LOGNAME", "TZ", "KRB5CCNAME", "SLURM_CONF")
# Times as seconds since the epoch: no time zone can come between the controller and us.
OURS: Final = {"LC_ALL": "C.UTF-8", "SLURM_TIME_FORMAT": "%s"}
_DEFAULT_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Result:
    """What one command gave back; ``seconds`` is how long it ran."""

    exit_status: int
    stdout: str
    stderr: str
    seconds: float


class Runner:
    """Runs commands for the Slurm driver; holds no resource between calls, so there is nothing to close.

    ``search_path`` is where Slurm's commands are looked for (default: PATH, when a command is run);
    ``slurm_conf`` overrides SLURM_CONF; ``timeout`` is in seconds. ``counts`` says how often each command
    ran.
    """

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

    def environment(self, extra_env: Mapping[str, str | None] | None = None) -> dict[str, str]:
        """Return the environment of a command; in ``extra_env`` None takes a variable away."""
        env = {name: os.environ[name] for name in KEPT if name in os.environ}
        env["PATH"] = self._search_path or env.get("PATH", _DEFAULT_PATH)
        if self._slurm_conf:
            env["SLURM_CONF"] = self._slurm_conf
        env.update(OURS)
        for name, value in (extra_env or {}).items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        return env

    def find(self, argv: Sequence[str]) -> str:
        """Return the path of a command's program; raises SlurmNotInstalled."""
        # By our own path: a PATH in extra_env is the job's, and must not choose which sbatch runs.
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
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,  # noqa: A002 - subprocess's word for it
        extra_env: Mapping[str, str | None] | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Run a command to its end and return what it said, whatever its exit status.

        On timeout and on cancellation its whole process group is killed and reaped. Raises SlurmNotInstalled,
        and Unanswered for a command that does not end in time or prints without end.
        """
        limit = self._timeout if timeout is None else timeout
        began = time.monotonic()
        process = await self._spawn(
            argv,
            extra_env,
            stdin=asyncio.subprocess.DEVNULL if input is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            stdout, stderr = await asyncio.wait_for(self._talk(process, input, argv), limit)
        except asyncio.TimeoutError as error:
            raise Unanswered(
                f"{argv[0]} did not end within {limit:g} s; nothing is known about the jobs", argv=argv
            ) from error
        finally:
            await _end(process)
        return Result(process.returncode or 0, stdout, stderr, time.monotonic() - began)

    async def start(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",  # noqa: A002 - as in run
        extra_env: Mapping[str, str | None] | None = None,
    ) -> DetachedProcess:
        """Start a command that outlives this call, and this process: own session, no pipes to us."""
        stdin, stderr = await asyncio.to_thread(_files, input)
        try:
            process = await self._spawn(argv, extra_env, stdin=stdin, stdout=asyncio.subprocess.DEVNULL, stderr=stderr)
        except BaseException:
            stderr.close()
            raise
        finally:
            stdin.close()
        return DetachedProcess(process, stderr)

    async def _spawn(
        self,
        argv: Sequence[str],
        extra_env: Mapping[str, str | None] | None,
        *,
        stdin: int | IO[bytes],
        stdout: int,
        stderr: int | IO[bytes],
    ) -> asyncio.subprocess.Process:
        env = self.environment(extra_env)
        program = self.find(argv)
        self.counts[argv[0]] += 1
        return await self._execute([program, *argv[1:]], env, stdin=stdin, stdout=stdout, stderr=stderr)

    @staticmethod
    async def _execute(
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        stdin: int | IO[bytes],
        stdout: int,
        stderr: int | IO[bytes],
    ) -> asyncio.subprocess.Process:
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd="/", start_new_session=True
            )
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # It may run already. Left to itself asyncio would kill it alone, and wait for ever for what it started
            # to let go of our pipes.
            with contextlib.suppress(OSError):
                await _end(await starting)
            raise
        except OSError as error:
            raise SlurmUnavailable(f"{argv[0]} could not be run: {error}", argv=argv) from error

    async def _talk(
        self, process: asyncio.subprocess.Process, data: bytes | None, argv: Sequence[str], *, hold: bool = False
    ) -> tuple[str, str]:
        """Write ``data`` and return what came back; with ``hold`` its standard input stays open until then."""
        assert process.stdout is not None
        assert process.stderr is not None
        readers = [
            asyncio.ensure_future(self._read(process.stdout, argv)),
            asyncio.ensure_future(self._read(process.stderr, argv)),
        ]
        try:
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it said no without reading
                    process.stdin.write(data or b"")
                    await process.stdin.drain()
                if not hold:
                    process.stdin.close()
            stdout, stderr = await asyncio.gather(*readers)
            if hold and process.stdin is not None:
                process.stdin.close()
            await process.wait()
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        return stdout, stderr

    async def _read(self, stream: asyncio.StreamReader, argv: Sequence[str]) -> str:
        chunks: list[bytes] = []
        size = 0
        while chunk := await stream.read(1 << 16):
            size += len(chunk)
            if size > self._max_output:
                raise Unanswered(f"{argv[0]} printed more than {self._max_output} bytes", argv=argv)
            chunks.append(chunk)
        return b"".join(chunks).decode(errors="replace")


class DetachedProcess:
    """A command that was started and left running. Whoever started it calls ``wait``; nobody has to
    ``kill`` it.
    """

    def __init__(self, process: asyncio.subprocess.Process, stderr: IO[bytes]) -> None:
        self._process = process
        self._stderr = stderr
        self._tail = ""

    @property
    def pid(self) -> int:
        """Its process id, which is its process group's, too."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait until it ends, and return its exit status; a caller that is cancelled leaves it running."""
        status = await self._process.wait()
        self.stderr_tail()
        self._stderr.close()
        return status

    def stderr_tail(self) -> str:
        """Return the last that it said, TAIL bytes at most."""
        if not self._stderr.closed:
            size = os.fstat(self._stderr.fileno()).st_size
            data = os.pread(self._stderr.fileno(), TAIL, max(0, size - TAIL))
            self._tail = data.decode(errors="replace")
        return self._tail

    def terminate(self) -> None:
        """Send its process group SIGTERM; does nothing to one that has ended."""
        if self._process.returncode is None:
            _signal_group(self._process.pid, signal.SIGTERM)


def _files(data: bytes) -> tuple[IO[bytes], IO[bytes]]:
    """Return a file to read ``data`` from and one for errors, both without a name.

    Files and not pipes: the command must neither stall nor die of SIGPIPE when this process goes away.
    """
    stdin = tempfile.TemporaryFile()  # noqa: SIM115 - its owner closes it
    stdin.write(data)
    stdin.seek(0)
    return stdin, tempfile.TemporaryFile()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of the command's process group, and reap the command."""
    # Also when the command itself has ended: what it left behind may hold our pipes. A process group's
    # number is not given to another process while the group has a member, and is free for long afterwards.
    _signal_group(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode is None:
        await asyncio.shield(reap(process))


async def reap(process: asyncio.subprocess.Process) -> None:
    """Wait for a killed command.

    asyncio calls a process ended when its pipes are, too, and reads no end from a pipe whose buffer was
    full when nobody wanted more: what is left in them is read and thrown away. A child that left the
    process group may hold them open; nobody waits for that one.
    """
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.gather(*map(_drain, (process.stdout, process.stderr))), _REAP_SECONDS)
        await asyncio.wait_for(process.wait(), _REAP_SECONDS)


async def _drain(stream: asyncio.StreamReader | None) -> None:
    while stream is not None and await stream.read(1 << 16):
        pass


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
