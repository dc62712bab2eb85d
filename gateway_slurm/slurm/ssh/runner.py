"""Run Slurm's commands on a login node, through a program there that answers each request in one round trip."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Final

from gateway_slurm._util import Backoff
from gateway_slurm.errors import GatewaySlurmError, SlurmNotInstalled, SlurmUnavailable, SshError, Unanswered
from gateway_slurm.slurm.runner import (
    FIXED_VARIABLES,
    INHERITED_VARIABLES,
    MAX_OUTPUT,
    CommandResult,
    DetachedProcess,
    ExtraEnv,
    Runner,
    timed_out,
)
from gateway_slurm.slurm.ssh.connection import SshConnection
from gateway_slurm.slurm.ssh.login_node import protocol
from gateway_slurm.slurm.ssh.remote import Frame, RemoteProgram

MAX_CONCURRENT: Final = 32
"""Commands that run at a time; further ones wait."""
MAX_INPUT: Final = 8 << 20
"""Bytes of a command's standard input."""
_ANSWERS: Final = (protocol.RESULT, protocol.STARTED, protocol.ENDED, protocol.FAILED)
_TIMEOUT_MARGIN: Final = 5.0  # seconds by which the login node's own timeout is longer than this process's
_RETRY_DELAY, _MAX_RETRY_DELAY = 1.0, 15.0  # seconds
_TERMINATE_DELAYS: Final = (1.0, 5.0, 15.0, 30.0)  # seconds


class SshRunner(Runner):
    """Runs Slurm's commands on the login node of ``connection``.

    ``search_path`` and ``slurm_conf`` are paths on the login node; ``timeout`` is in seconds. The runner does not
    close the connection. All methods are called on one loop.
    """

    is_local = False

    def __init__(
        self, connection: SshConnection, search_path: str | None, slurm_conf: str | None, timeout: float
    ) -> None:
        super().__init__(search_path, slurm_conf, timeout)
        self.connection = connection
        self._program: RemoteProgram | None = None
        self._starting: asyncio.Task[RemoteProgram] | None = None
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._ends: dict[int, asyncio.Future[Frame]] = {}
        self._last_number = 0
        self._slots = asyncio.Semaphore(MAX_CONCURRENT)

    def find(self, argv: Sequence[str]) -> str:
        """Return the program's name; the login node finds its path. Raises the error of the last failed login."""
        if self.connection.last_error is not None:
            raise self.connection.last_error
        return argv[0]

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", extra_env: ExtraEnv = None, timeout: float | None = None
    ) -> CommandResult:
        """Run a command to its end on the login node; on timeout and on cancellation it is killed there.

        Raises SshError if the connection breaks meanwhile; the command may have run nevertheless.
        """
        limit = self._timeout if timeout is None else timeout
        async with self._slots:
            program = await self._running_program()
            self.counts[argv[0]] += 1
            request = self._request(argv, extra_env, stdin, timeout=limit + _TIMEOUT_MARGIN)
            number, answer = self._send(program, protocol.RUN, request)
            try:
                _kind, _number, payload = await asyncio.wait_for(answer, limit)
            except asyncio.TimeoutError as error:
                raise timed_out(argv, limit) from error
            finally:
                self._answers.pop(number, None)
                if answer.cancelled():
                    program.send(protocol.KILL, number)
        fields, outputs = _unpack_answer(payload)
        if "error" in fields:
            raise _not_run(argv, str(fields["error"]))
        if fields["fault"] == "flood":
            raise Unanswered(f"{argv[0]} printed more than {MAX_OUTPUT} bytes", argv=argv)
        if fields["fault"]:
            raise timed_out(argv, limit)
        stdout, stderr = (output.decode(errors="replace") for output in outputs)
        return CommandResult(int(fields["status"]), stdout, stderr)

    async def start(self, argv: Sequence[str], *, stdin: bytes = b"", extra_env: ExtraEnv = None) -> DetachedProcess:
        """Start a command on the login node that outlives this call, this process and the connection."""
        program = await self._running_program()
        self.counts[argv[0]] += 1
        number, answer = self._send(program, protocol.START, self._request(argv, extra_env, stdin, timeout=0))
        end = self._ends[number] = asyncio.get_running_loop().create_future()
        try:
            kind, _number, payload = await asyncio.wait_for(answer, self._timeout)
            fields = _unpack_answer(payload)[0]
            if kind != protocol.STARTED:
                raise _not_run(argv, str(fields["error"]))
        except BaseException as error:
            # The command may have started, and the caller gets no handle to end it.
            program.send(protocol.KILL, number)
            self._ends.pop(number, None)
            if isinstance(error, asyncio.TimeoutError):
                raise SlurmUnavailable(f"{argv[0]} was not started within {self._timeout:g} s", argv=argv) from error
            raise
        finally:
            self._answers.pop(number, None)
        return RemoteProcess(self, {**fields, "boot": program.info["boot"]}, end)

    async def connect(self) -> str:
        """Log in and start the program on the login node, if necessary; return the host's name. Raises SshError."""
        return str((await self._running_program()).info["host"])

    # -- The program on the login node --

    async def _running_program(self) -> RemoteProgram:
        """Return the program, and start it if necessary. Raises SshError."""
        if self._program is not None and not self._program.ended:
            return self._program
        if self._starting is None or self._starting.done():
            starting = self.connection.start_program("commands", on_frames=self._received, on_end=self._lost)
            self._starting = asyncio.ensure_future(starting)
            self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._program = await asyncio.shield(self._starting)
        return self._program

    def _next_number(self) -> int:
        self._last_number = self._last_number % 0xFFFFFFFF + 1
        return self._last_number

    def _send(self, program: RemoteProgram, kind: int, payload: bytes) -> tuple[int, asyncio.Future[Frame]]:
        """Send a request; return its number and a future for the answer."""
        number = self._next_number()
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self.connection.counts["request"] += 1
        program.send(kind, number, payload)
        return number, answer

    def _request(self, argv: Sequence[str], extra_env: ExtraEnv, data: bytes, *, timeout: float) -> bytes:
        if len(data) > MAX_INPUT:
            raise SlurmUnavailable(
                f"the input of {argv[0]} has {len(data)} bytes; at most {MAX_INPUT} are sent", argv=argv
            )
        fixed = {**FIXED_VARIABLES, **({"SLURM_CONF": self._slurm_conf} if self._slurm_conf else {})}
        fields: dict[str, Any] = {
            "argv": list(argv),
            "keep": INHERITED_VARIABLES,
            "path": self._search_path or "",
            "set": {**fixed, **(extra_env or {})},
            "limit": self._max_output,
            "timeout": timeout,
        }
        return protocol.pack(fields, data)

    def _received(self, frames: list[Frame]) -> None:
        for received in frames:
            kind, number, _payload = received
            waiting = self._ends.pop(number, None) if kind == protocol.ENDED else self._answers.get(number)
            if kind in _ANSWERS and waiting is not None and not waiting.done():
                waiting.set_result(received)

    def _lost(self, error: SshError) -> None:
        """Fail all pending requests because the program has ended; their results are unknown."""
        waiting = [*self._answers.values(), *self._ends.values()]
        self._answers.clear()
        self._ends.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # a step's end may have no waiter

    # -- Started processes --

    async def watch(self, process: dict[str, Any]) -> asyncio.Future[Frame] | None:
        """Return a future for the end of a process of an earlier connection; None after a reboot. Raises SshError."""
        program = await self._running_program()
        if program.info["boot"] != process["boot"]:
            return None
        number = self._next_number()
        end = self._ends[number] = asyncio.get_running_loop().create_future()
        program.send(protocol.WATCH, number, protocol.pack(process))
        return end

    async def send_term(self, process: dict[str, Any]) -> None:
        """Send SIGTERM to a process group. Raises SshError."""
        program = await self._running_program()
        if program.info["boot"] == process["boot"]:
            program.send(protocol.TERM, 0, protocol.pack(process))


def _unpack_answer(payload: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return the fields and the data of an answer. Raises SshError if it cannot be read."""
    try:
        return protocol.unpack(payload)
    except ValueError as error:
        raise SshError(f"the login node's answer cannot be read: {error}") from error


class RemoteProcess(DetachedProcess):
    """A command that was started on the login node and left running.

    ``process`` identifies it: ``pid``, ``ticks`` (its start time) and ``boot`` (the boot id of the login node).
    """

    def __init__(self, runner: SshRunner, process: dict[str, Any], end: asyncio.Future[Frame]) -> None:
        self._runner, self._remote, self._end = runner, process, end
        self._tail = ""
        self._status: int | None = None
        self._terminating: asyncio.Task[None] | None = None

    async def wait(self) -> int:
        """Wait until the command ends, across any number of connections, and return its exit status.

        The status is -1 if the command ended while the connection was down.
        """
        while self._status is None:
            try:
                _kind, _number, payload = await asyncio.shield(self._end)
            except SshError:
                await self._watch_again()
                continue
            fields, outputs = _unpack_answer(payload)
            self._tail = b"".join(outputs).decode(errors="replace")
            if fields["status"] is None:
                self._end_unknown()
            else:
                self._status = int(fields["status"])
        return self._status

    async def _watch_again(self) -> None:
        backoff = Backoff(_RETRY_DELAY, _MAX_RETRY_DELAY)
        while True:
            try:
                end = await self._runner.watch(self._remote)
                break
            except GatewaySlurmError:
                await backoff.sleep()
        if end is None:
            self._end_unknown()
        else:
            self._end = end

    def _end_unknown(self) -> None:
        self._status = -1
        self._tail = "srun on the login node ended while the connection was down; its exit status is not known"

    def stderr_tail(self) -> str:
        """Return the end of the command's stderr; empty while it runs."""
        return self._tail

    def terminate(self) -> None:
        """Send SIGTERM to the command's process group as soon as there is a connection."""
        if self._status is None and self._terminating is None:
            self._terminating = asyncio.ensure_future(self._terminate())

    async def _terminate(self) -> None:
        for delay in _TERMINATE_DELAYS:
            with contextlib.suppress(GatewaySlurmError):
                await self._runner.send_term(self._remote)
                return
            await asyncio.sleep(delay)


def _not_run(argv: Sequence[str], reason: str) -> SlurmUnavailable | SlurmNotInstalled:
    if reason.startswith("not found"):
        return SlurmNotInstalled(
            f"the command {argv[0]!r} was not found on the login node{reason.removeprefix('not found')}; name the "
            "directory of Slurm's commands there in SlurmService.slurm_path",
            argv=argv,
        )
    return SlurmUnavailable(f"{argv[0]} could not be run on the login node: {reason}", argv=argv)
