"""Running Slurm's commands on a login node: the runner's ways, by a program there that answers in one round trip."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gateway_slurm.errors import GatewaySlurmError, SlurmNotInstalled, SlurmUnavailable, SshError, Unanswered
from gateway_slurm.slurm.runner import (
    FIXED_VARIABLES,
    INHERITED_VARIABLES,
    MAX_OUTPUT,
    CommandResult,
    DetachedProcess,
    Runner,
)
from gateway_slurm.slurm.ssh.connection import SshConnection
from gateway_slurm.slurm.ssh.login_node.common import (
    ENDED,
    FAILED,
    KILL,
    RESULT,
    RUN,
    START,
    STARTED,
    TERM,
    WATCH,
    pack,
    unpack,
)
from gateway_slurm.slurm.ssh.remote import Frame, RemoteProgram

AT_ONCE: Final = 32
"""Commands that run at once; others wait for their turn."""
MAX_INPUT: Final = 8 << 20
"""Bytes that a command may be given to read."""
_MARGIN: Final = 5.0  # by how much the login node's own limit is longer than ours


class SshRunner(Runner):
    """Runs Slurm's commands on the login node of ``connection``, where they are looked for, too.

    ``search_path`` and ``slurm_conf`` are paths there; ``timeout`` is in seconds. The connection is its owner's to
    close. All methods are called on one loop.
    """

    def __init__(
        self, connection: SshConnection, search_path: str | None, slurm_conf: str | None, timeout: float
    ) -> None:
        super().__init__(search_path, slurm_conf, timeout)
        self.connection = connection
        self._program: RemoteProgram | None = None
        self._opening: asyncio.Task[RemoteProgram] | None = None
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self._ends: dict[int, asyncio.Future[Frame]] = {}
        self._last = 0
        self._places = asyncio.Semaphore(AT_ONCE)

    @property
    def user(self) -> str:
        """The user whom the login node knows us as."""
        return self.connection.destination.user

    def find(self, argv: Sequence[str]) -> str:
        """Return the program's name: the login node looks for it. Raises what the last attempt to reach it raised."""
        if self.connection.last_error is not None:
            raise self.connection.last_error
        return argv[0]

    async def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,  # noqa: A002 - as in Runner
        extra_env: Mapping[str, str | None] | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        """Run a command to its end on the login node; on timeout and on cancellation it is killed there.

        A connection that breaks meanwhile is SshError: the command may have been run.
        """
        limit = self._timeout if timeout is None else timeout
        async with self._places:
            program = await self._ready()
            self.counts[argv[0]] += 1
            began = time.monotonic()
            request = self._request(argv, extra_env, input or b"", timeout=limit + _MARGIN)
            number, answer = self._ask(program, RUN, request)
            try:
                _kind, _number, payload = await asyncio.wait_for(answer, limit)
            except asyncio.TimeoutError as error:
                raise _too_slow(argv, limit) from error
            finally:
                self._answers.pop(number, None)
                if answer.cancelled():
                    program.send(KILL, number)
        fields, said = _answer(payload)
        if "error" in fields:
            raise _not_run(argv, str(fields["error"]))
        if fields["fault"] == "flood":
            raise Unanswered(f"{argv[0]} printed more than {MAX_OUTPUT} bytes", argv=argv)
        if fields["fault"]:
            raise _too_slow(argv, limit)
        stdout, stderr = (each.decode(errors="replace") for each in said)
        return CommandResult(int(fields["status"]), stdout, stderr, time.monotonic() - began)

    async def start(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",  # noqa: A002 - as in Runner
        extra_env: Mapping[str, str | None] | None = None,
    ) -> DetachedProcess:
        """Start a command on the login node that outlives this call, this process and the connection."""
        program = await self._ready()
        self.counts[argv[0]] += 1
        number, answer = self._ask(program, START, self._request(argv, extra_env, input, timeout=0))
        end = self._ends[number] = asyncio.get_running_loop().create_future()
        try:
            kind, _number, payload = await asyncio.wait_for(answer, self._timeout)
            fields = _answer(payload)[0]
            if kind != STARTED:
                raise _not_run(argv, str(fields["error"]))
        except BaseException as error:
            # One that did start is told to end: nobody would know of it.
            program.send(KILL, number)
            self._ends.pop(number, None)
            if isinstance(error, asyncio.TimeoutError):
                raise SlurmUnavailable(f"{argv[0]} was not started within {self._timeout:g} s", argv=argv) from error
            raise
        finally:
            self._answers.pop(number, None)
        return RemoteProcess(self, {**fields, "boot": program.info["boot"]}, number, end)

    async def connect(self) -> str:
        """Log in and start the program there, if that is not done yet; return the host's own name. Raises SshError."""
        return str((await self._ready()).info["host"])

    # -- the program there -----------------------------------------------------------------------------------

    async def _ready(self) -> RemoteProgram:
        """The program, started if it is not there. Raises SshError."""
        if self._program is not None and not self._program.ended:
            return self._program
        if self._opening is None or self._opening.done():
            opening = self.connection.start_program("commands", on_frames=self._took, on_end=self._lost)
            self._opening = asyncio.ensure_future(opening)
            self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._program = await asyncio.shield(self._opening)
        return self._program

    def _ask(self, program: RemoteProgram, kind: int, payload: bytes) -> tuple[int, asyncio.Future[Frame]]:
        self._last = self._last % 0xFFFFFFFF + 1
        answer = self._answers[self._last] = asyncio.get_running_loop().create_future()
        self.connection.counts["request"] += 1
        program.send(kind, self._last, payload)
        return self._last, answer

    def _request(
        self, argv: Sequence[str], extra_env: Mapping[str, str | None] | None, data: bytes, *, timeout: float
    ) -> bytes:
        if len(data) > MAX_INPUT:
            raise SlurmUnavailable(f"{argv[0]} is to read {len(data)} bytes; at most {MAX_INPUT} are sent", argv=argv)
        ours = {**FIXED_VARIABLES, **({"SLURM_CONF": self._slurm_conf} if self._slurm_conf else {})}
        fields: dict[str, Any] = {
            "argv": list(argv),
            "keep": INHERITED_VARIABLES,
            "path": self._search_path or "",
            "set": {**ours, **(extra_env or {})},
            "limit": self._max_output,
            "timeout": timeout,
        }
        return pack(fields, data)

    def _took(self, frames: list[Frame]) -> None:
        for each in frames:
            kind, number, _payload = each
            waiting = self._ends.pop(number, None) if kind == ENDED else self._answers.get(number)
            if kind in (RESULT, STARTED, ENDED, FAILED) and waiting is not None and not waiting.done():
                waiting.set_result(each)

    def _lost(self, error: SshError) -> None:
        """The program is gone: nothing is known of what it was asked."""
        waiting = [*self._answers.values(), *self._ends.values()]
        self._answers.clear()
        self._ends.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be waiting for the end of a step

    # -- for processes that were started -----------------------------------------------------------------------

    async def watch(self, facts: dict[str, Any]) -> tuple[int, asyncio.Future[Frame]] | None:
        """Be told of the end of a process of an earlier connection; None where it is not to be found any more."""
        program = await self._ready()
        if program.info["boot"] != facts["boot"]:
            return None
        self._last = self._last % 0xFFFFFFFF + 1
        end = self._ends[self._last] = asyncio.get_running_loop().create_future()
        program.send(WATCH, self._last, pack(facts))
        return self._last, end

    async def send_term(self, facts: dict[str, Any]) -> None:
        """Have a process group end. Raises SshError."""
        program = await self._ready()
        if program.info["boot"] == facts["boot"]:
            program.send(TERM, 0, pack(facts))


def _answer(payload: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """What the login node says, in its parts. Raises SshError for what is no answer."""
    try:
        return unpack(payload)
    except ValueError as error:
        raise SshError(f"what the login node answered cannot be read: {error}") from error


class RemoteProcess(DetachedProcess):
    """A command on the login node that was started and left running."""

    def __init__(self, runner: SshRunner, facts: dict[str, Any], number: int, end: asyncio.Future[Frame]) -> None:
        self._runner, self._facts, self._number, self._end = runner, facts, number, end
        self._tail = ""
        self._status: int | None = None
        self._terminating: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Its process id on the login node, which is its process group's, too."""
        return int(self._facts["pid"])

    @property
    def exit_status(self) -> int | None:
        """None while it runs; -1 where it ended while the connection was away."""
        return self._status

    async def wait(self) -> int:
        """Wait until it ends, over as many connections as that takes."""
        while self._status is None:
            try:
                _kind, _number, payload = await asyncio.shield(self._end)
            except SshError:
                await self._find_again()
                continue
            fields, said = _answer(payload)
            self._tail = b"".join(said).decode(errors="replace")
            if fields["status"] is None:
                self._gone()
            else:
                self._status = int(fields["status"])
        return self._status

    async def _find_again(self) -> None:
        pause = 1.0
        while True:
            try:
                found = await self._runner.watch(self._facts)
            except GatewaySlurmError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 15.0)
                continue
            if found is None:
                self._gone()
            else:
                self._number, self._end = found
            return

    def _gone(self) -> None:
        self._status = -1
        self._tail = "srun on the login node ended while the connection was away; how is not known"

    def stderr_tail(self) -> str:
        """Return the last that it said; empty while it runs."""
        return self._tail

    def terminate(self) -> None:
        """Send its process group SIGTERM, as soon as the login node can be reached."""
        if self._status is None and self._terminating is None:
            self._terminating = asyncio.ensure_future(self._terminate())

    async def _terminate(self) -> None:
        for pause in (1.0, 5.0, 15.0, 30.0):
            with contextlib.suppress(GatewaySlurmError):
                await self._runner.send_term(self._facts)
                return
            await asyncio.sleep(pause)


def _too_slow(argv: Sequence[str], limit: float) -> Unanswered:
    return Unanswered(f"{argv[0]} did not end within {limit:g} s; nothing is known about the jobs", argv=argv)


def _not_run(argv: Sequence[str], words: str) -> SlurmUnavailable | SlurmNotInstalled:
    if words.startswith("not found"):
        return SlurmNotInstalled(
            f"the command {argv[0]!r} was not found on the login node{words.removeprefix('not found')}; name the "
            "directory of Slurm's commands there in SlurmService.slurm_path",
            argv=argv,
        )
    return SlurmUnavailable(f"{argv[0]} could not be run on the login node: {words}", argv=argv)
