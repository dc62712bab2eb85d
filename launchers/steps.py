"""Job steps that the server asks for: srun's, started here because the server cannot reach Slurm's commands.

srun stays for as long as its step does. How a step ended is kept until a live link has carried it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from gateway_slurm.link import steps, wire
from launchers.reactor import Reactor

TAIL_BYTES = 8192
LISTED_LIMIT = 1024 * 1024
SQUEUE_SECONDS = 20.0
LISTINGS_LIMIT = 8
# What of the environment Slurm's commands get: the launcher's own job step's variables would make a step like it.
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TZ", "KRB5CCNAME", "SLURM_CONF")


class Command:
    """One of Slurm's commands under way, with its input and output in files without names: nobody has to read."""

    def __init__(self, argv: list[str], env: dict[str, str], script: str = "") -> None:
        self.error = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - result() closes both
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        with tempfile.TemporaryFile() as stdin:
            stdin.write(script.encode(errors="surrogateescape"))
            stdin.seek(0)
            try:
                program = shutil.which(argv[0], path=env.get("PATH"))
                if program is None:
                    raise FileNotFoundError(f"{argv[0]} is not in {env.get('PATH')} on this node")
                self.process = subprocess.Popen(
                    [program, *argv[1:]],
                    env=env,
                    cwd="/",
                    stdin=stdin,
                    stdout=self._out,
                    stderr=self._err,
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                self.error = str(error)

    @property
    def ended(self) -> bool:
        """Whether it is over, or never began."""
        return self.process is None or self.process.poll() is not None

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def result(self) -> tuple[int, str, str]:
        """Exit status, output, and the end of its errors; to be called once, when it has ended."""
        status = 127 if self.process is None else self.process.returncode
        stderr = self.error or _tail(self._err, TAIL_BYTES)
        stdout = _tail(self._out, LISTED_LIMIT)
        self._out.close()
        self._err.close()
        return status, stdout, stderr


class Steps:
    """The steps of this launcher; ``say`` sends a message and returns whether there was a link for it."""

    def __init__(self, reactor: Reactor, jobid: str, say: Callable[..., None]) -> None:
        self._reactor, self._jobid, self._say = reactor, jobid, say
        self._running: dict[str, Command] = {}
        self._ended: dict[str, dict[str, Any]] = {}
        self._listings: dict[str, Command] = {}
        self._env = {name: os.environ[name] for name in KEPT if name in os.environ}

    def start(self, fields: dict[str, Any]) -> None:
        """Start a step; STEPPED follows when it is over. One that is not as it may be ends at once."""
        try:
            fields = steps.checked(fields)
            step = fields["step"]
            if step in self._running or step in self._ended:
                return
            if len(self._running) >= steps.STEPS_LIMIT:
                raise wire.WireError(f"{len(self._running)} steps are under way, and no more are started")
            command = Command(steps.srun_argv(self._jobid, fields), {**self._env, **fields["env"]}, fields["script"])
        except wire.WireError as error:
            self._say("STEPPED", step=str(fields.get("step"))[:64], status=2, stderr=f"refused: {error}")
            return
        self._running[step] = command
        self.reaped()  # one that could not be run sends no SIGCHLD

    def end(self, fields: dict[str, Any]) -> None:
        """End a step: on SIGTERM srun has it killed at once; a SIGKILL of srun would leave it running."""
        command = self._running.get(str(fields.get("step")))
        if command is not None:
            command.signal(signal.SIGTERM)

    def listing(self, fields: dict[str, Any]) -> None:
        """Ask Slurm which steps run in the job; STEP_LIST follows."""
        asked = str(fields.get("asked"))[:64]
        if asked in self._listings or len(self._listings) >= LISTINGS_LIMIT:
            self._say("STEP_LIST", asked=asked, status=2, listed="", stderr="squeue is being asked already")
            return
        env = {**self._env, "LC_ALL": "C.UTF-8"}
        command = self._listings[asked] = Command(steps.squeue_argv(self._jobid), env)
        self._reactor.later(SQUEUE_SECONDS, lambda: command.signal(signal.SIGKILL))
        self.reaped()

    def reaped(self) -> None:
        """SIGCHLD came: see what has ended, and say so."""
        for step in [step for step, command in self._running.items() if command.ended]:
            status, _out, stderr = self._running.pop(step).result()
            # The server's next REPORT has it, if there is no link now.
            self._ended[step] = {"step": step, "status": status, "stderr": stderr}
            self._say("STEPPED", **self._ended[step])
        for asked in [asked for asked, command in self._listings.items() if command.ended]:
            status, listed, stderr = self._listings.pop(asked).result()
            self._say("STEP_LIST", asked=asked, status=status, listed=listed, stderr=stderr)

    def forget(self, fields: dict[str, Any]) -> None:
        """The server has heard how a step ended."""
        self._ended.pop(str(fields.get("step")), None)

    def report(self) -> list[dict[str, Any]]:
        """What the server needs to know of the steps, in REPORT; a status of None is one that runs."""
        running = [{"step": step, "status": None, "stderr": ""} for step in self._running]
        return running + list(self._ended.values())

    def pids(self) -> set[int]:
        """The processes that are this one's to collect."""
        commands = [*self._running.values(), *self._listings.values()]
        return {command.process.pid for command in commands if command.process is not None}


def _tail(file: Any, size: int) -> str:
    end = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, max(0, end - size)).decode(errors="replace")


# -- Whether others work in the job that this launcher holds: then its end would end what they do. --


TIMEOUT = 20.0
# The steps that every batch job has.
OWN_STEPS = ("batch", "extern")


def job_is_shared(jobid: str) -> bool | None:
    """Whether a job step runs beside the job's own; None while Slurm does not say."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        argv = steps.squeue_argv(jobid, "%i")
        done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, env=env, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        print("launcher: this node has no squeue: whether others work in the job is not known", file=sys.stderr)
        return False
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return lists_foreign_steps(jobid, done.stdout) if done.returncode == 0 else None


def lists_foreign_steps(jobid: str, listed: str) -> bool:
    """Read squeue's answer, one step a line: ``12.batch`` is the job's own, ``12.0`` somebody's."""
    found = re.findall(r"^\s*([0-9]+)\.(\S+)\s*$", listed, re.MULTILINE)
    return any(job == jobid and step not in OWN_STEPS for job, step in found)
