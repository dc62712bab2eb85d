"""Job steps around the launcher: those that it starts for its server, and those of other users of the job.

A server that cannot run srun asks its launcher to start steps inside the job. srun runs for as long as its step. The
launcher keeps the result of a step until the server has acknowledged it (STEP_ACK).

A launcher without a server does not end a job in which other steps run; ``job_is_shared`` asks Slurm for them.
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
from launchers import node
from launchers.reactor import Reactor

MAX_STDERR = 8192  # bytes that are reported, of the end
MAX_STDOUT = 1024 * 1024
MAX_LISTINGS = 8  # squeue processes at a time
SQUEUE_SECONDS = 20.0
# What Slurm's commands get of the environment. The variables of the launcher's own job step would change the new step.
INHERITED_VARIABLES = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TZ", "KRB5CCNAME", "SLURM_CONF")
# The steps that every batch job has.
BATCH_STEPS = ("batch", "extern")
# The title of a step's slurmstepd: "slurmstepd: [12.batch]".
_STEPD = r"slurmstepd: \[([0-9]+)\.([A-Za-z0-9]+)"


def commands_environment() -> dict[str, str]:
    """The environment of Slurm's commands."""
    return {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}


class Command:
    """A running Slurm command. Its input and output are unnamed files, so that it never waits for a reader."""

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
        """Whether the command has ended, or could not be started."""
        return self.process is None or self.process.poll() is not None

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def result(self) -> tuple[int, str, str]:
        """Exit status, stdout and the end of stderr; the caller calls it once, after the end."""
        status = 127 if self.process is None else self.process.returncode
        stderr = self.error or _tail(self._err, MAX_STDERR)
        stdout = _tail(self._out, MAX_STDOUT)
        self._out.close()
        self._err.close()
        return status, stdout, stderr


def _tail(file: Any, size: int) -> str:
    end = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, max(0, end - size)).decode(errors="replace")


class Steps:
    """The steps that this launcher runs; ``send`` sends a message, and does nothing while there is no link."""

    def __init__(self, reactor: Reactor, jobid: str, send: Callable[..., None]) -> None:
        self._reactor, self._jobid, self._send = reactor, jobid, send
        self._running: dict[str, Command] = {}
        self._ended: dict[str, dict[str, Any]] = {}
        self._listings: dict[str, Command] = {}
        self._env = commands_environment()

    def start(self, fields: dict[str, Any]) -> None:
        """Start a step; STEPPED follows at its end, or at once if the request is not allowed."""
        try:
            fields = steps.checked(fields)
            step = fields["step"]
            if step in self._running or step in self._ended:
                return
            if len(self._running) >= steps.MAX_STEPS:
                raise wire.WireError(f"this launcher runs {len(self._running)} steps already, and starts no more")
            command = Command(steps.srun_argv(self._jobid, fields), {**self._env, **fields["env"]}, fields["script"])
        except wire.WireError as error:
            self._send("STEPPED", step=str(fields.get("step"))[:64], status=2, stderr=f"refused: {error}")
            return
        self._running[step] = command
        self.reaped()  # a command that could not be started causes no SIGCHLD

    def end(self, fields: dict[str, Any]) -> None:
        """End a step. On SIGTERM srun kills it at once; after a SIGKILL of srun the step would run on."""
        command = self._running.get(str(fields.get("step")))
        if command is not None:
            command.signal(signal.SIGTERM)

    def list_steps(self, fields: dict[str, Any]) -> None:
        """Ask Slurm for the job's running steps; STEP_LIST follows."""
        asked = str(fields.get("asked"))[:64]
        if asked in self._listings or len(self._listings) >= MAX_LISTINGS:
            self._send("STEP_LIST", asked=asked, status=2, listed="", stderr="squeue is running already")
            return
        env = {**self._env, "LC_ALL": "C.UTF-8"}
        command = self._listings[asked] = Command(steps.squeue_argv(self._jobid), env)
        self._reactor.later(SQUEUE_SECONDS, lambda: command.signal(signal.SIGKILL))
        self.reaped()

    def reaped(self) -> None:
        """Report the commands that have ended; called after SIGCHLD."""
        for step in [step for step, command in self._running.items() if command.ended]:
            status, _out, stderr = self._running.pop(step).result()
            # Without a link the message is dropped; the next REPORT holds the result.
            self._ended[step] = {"step": step, "status": status, "stderr": stderr}
            self._send("STEPPED", **self._ended[step])
        for asked in [asked for asked, command in self._listings.items() if command.ended]:
            status, listed, stderr = self._listings.pop(asked).result()
            self._send("STEP_LIST", asked=asked, status=status, listed=listed, stderr=stderr)

    def acknowledged(self, fields: dict[str, Any]) -> None:
        """The server knows how the step ended."""
        self._ended.pop(str(fields.get("step")), None)

    def report(self) -> list[dict[str, Any]]:
        """The steps as REPORT lists them; a running step has the status None."""
        running = [{"step": step, "status": None, "stderr": ""} for step in self._running]
        return running + list(self._ended.values())

    def pids(self) -> set[int]:
        """The processes that this object collects."""
        commands = [*self._running.values(), *self._listings.values()]
        return {command.process.pid for command in commands if command.process is not None}


def job_is_shared(jobid: str) -> bool | None:
    """Whether a job step runs beside the job's own ones; None if Slurm gives no answer."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        argv = steps.squeue_argv(jobid, "%i")
        done = subprocess.run(
            argv, capture_output=True, stdin=subprocess.DEVNULL, env=env, text=True, timeout=SQUEUE_SECONDS
        )
    except FileNotFoundError:
        return _has_foreign_daemon(jobid)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return lists_foreign_steps(jobid, done.stdout) if done.returncode == 0 else None


def has_own_nodes(jobid: str) -> bool:
    """Whether no job of another user can run on the job's nodes; False also if Slurm gives no answer.

    ``NO`` is a job that shares its nodes with no other one, ``USER`` one that shares them with jobs of its own user
    (squeue(1), OverSubscribe).
    """
    argv = ["squeue", "--noheader", f"--jobs={jobid}", "--format=%h"]
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env=commands_environment(),
            text=True,
            timeout=SQUEUE_SECONDS,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.strip() in ("NO", "USER")


def _has_foreign_daemon(jobid: str) -> bool | None:
    """The same on a node without squeue, by the daemons of the job's steps on this node.

    Each step has a slurmstepd, whose title names it. None if not even the launcher's own is visible (proc(5),
    hidepid), and for a job of several nodes, whose other nodes are not visible from here.
    """
    found = [match for pid in node.pids() if (match := re.match(_STEPD, node.command_line(pid)))]
    steps_here = {match[2] for match in found if match[1] == jobid}
    if steps_here - set(BATCH_STEPS):
        return True
    if not steps_here or os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
        print("launcher: without squeue, other steps of the job cannot be seen from this node", file=sys.stderr)
        return None
    return False


def lists_foreign_steps(jobid: str, listed: str) -> bool:
    """Read squeue's output, one step a line: ``12.batch`` is the job's own step, ``12.0`` is another one."""
    found = re.findall(r"^\s*([0-9]+)\.(\S+)\s*$", listed, re.MULTILINE)
    return any(job == jobid and step not in BATCH_STEPS for job, step in found)
