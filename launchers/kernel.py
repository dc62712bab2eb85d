"""One kernel on its node: command line, connection file, process, log and end."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway_slurm.link import wire
from launchers import ports, stderr
from launchers.greeting import CurveCheck, Refusal
from launchers.guard import Guard
from launchers.memory import oom_kills
from launchers.reactor import READ, Reactor, Timer
from launchers.working_directory import Directory, NoDirectory, choose, home

if TYPE_CHECKING:
    from launchers.journal import Journal

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

TAIL_BYTES = 4096
MAX_MESSAGE = 2000  # characters
MAX_LOG = 32 * 1024 * 1024
# Seconds until the launcher first checks whether the kernel listens, and at least between two checks.
FIRST_CHECK, CHECK_INTERVAL = 0.06, 0.003
PORT_ATTEMPTS = 4
# Attempts to write a line into a pipe that is full of the kernel's own output, and the seconds between them.
LINE_ATTEMPTS, LINE_RETRY_DELAY = 40, 0.25
# A kernel in another language that dies with Unix sockets is started again on loopback TCP. Kernels written in these
# languages are built on ipykernel, which can use Unix sockets.
IPC_LANGUAGES = ("python",)
# What FAILED says of a direct kernel whose ports did not pass the check, by the refusal's kind.
# What FAILED says of a kernel that may not listen on loopback TCP.
NO_LOOPBACK = (
    "the kernel cannot use Unix sockets, and on loopback TCP other users of this node could read what it publishes, so "
    "that it is not started here: use a partition whose jobs get whole nodes, or the jobid of a job of your own made "
    "with --exclusive; or ask the admin for SlurmService.loopback_kernels = 'always'"
)
REFUSED = {
    "plain": "its ports do not speak CurveZMQ",
    "no_greeting": "the kernel listened, but did not answer there, so that its encryption could not be checked",
}


class StartRefused(Exception):
    """The kernel cannot be started as requested; the message is for the user."""


class Kernel:
    """A kernel from START to EXIT. ``send`` sends a message to the server, if there is one.

    ``make_journal`` returns the journal for its output; None for a direct kernel, whose clients dial it.
    ``may_use_loopback`` is asked before a kernel that cannot use Unix sockets is started on loopback TCP.
    """

    def __init__(
        self,
        reactor: Reactor,
        guard: Guard,
        *,
        make_directory: Callable[[], str],
        spec: dict[str, Any],
        ip: str,
        base_env: dict[str, str],
        send: Callable[..., None],
        make_journal: Callable[[], Journal | None],
        may_use_loopback: Callable[[], bool],
    ) -> None:
        self._reactor, self._guard = reactor, guard
        self._make_directory, self.spec, self._send = make_directory, spec, send
        self.directory = ""  # private; made at the start
        self.kernel_id: str = spec["kernel_id"]
        self._base_env = base_env
        self.mode: str = spec["mode"]  # direct | ipc | tcp
        self._node_ip = ip
        self.ip = ip  # a start that fails before the transport is set up is reported, too
        self.ports: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.state = "starting"  # starting -> running -> exited; starting -> failed
        self.exit: dict[str, Any] = {}
        self._attempt = 0
        self._tail = b""
        self._log: Any | None = None
        self.log_path = ""
        self._pipe: int | None = None
        self._check: Timer | None = None
        self._curve: CurveCheck | None = None
        self._refusal: Refusal | None = None  # why the process, which is being killed, may not run
        self._deadline = time.monotonic() + float(spec["start_timeout"])
        self._asked_to_stop = False
        self._oom_kills = 0  # in this job's control group when the process was started
        self._working_directory = Directory("")
        self._make_journal, self._may_use_loopback = make_journal, may_use_loopback
        self._journal: Journal | None = None

    def message(self, name: str, fields: dict[str, Any]) -> None:
        """SIGNAL or STDERR_LINE from the server."""
        if name == "SIGNAL":
            self.signal(int(fields["signum"]))
        else:
            self._write_stderr_line(str(fields["line"]))

    # -- start ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process; STARTED or FAILED follows."""
        try:
            self.directory = self._make_directory()
            self._open_log()
            self._launch(self.spec.get("ports"))
            self._journal = self._make_journal()  # while the kernel starts, because its modules take 10 ms to load
        except (StartRefused, OSError) as error:
            self._fail("refused", str(error))

    def _launch(self, wanted_ports: dict[str, int] | None) -> None:
        self._attempt += 1
        self._close_curve_check()  # the check of a process that has died says nothing of the next one
        self._oom_kills = oom_kills()
        if self.mode == "ipc":
            self.ip = os.path.join(self.directory, "c")
            self.ports = {channel: number for number, channel in enumerate(wire.CHANNELS, 1)}
            for old_socket in glob.glob(glob.escape(self.ip) + "[-:]*"):
                os.unlink(old_socket)
        else:
            self.ip = "127.0.0.1" if self.mode == "tcp" else self._node_ip
            self.ports = wanted_ports or ports.choose_ports(self.ip, self.spec.get("port_range"))
        self._spawn(self._write_connection_file())
        self._check = self._reactor.later(FIRST_CHECK, self._check_channels)

    def _write_connection_file(self) -> str:
        info = {**self.spec["connection"], "ip": self.ip}
        info["transport"] = "ipc" if self.mode == "ipc" else "tcp"
        info.update({f"{channel}_port": port for channel, port in self.ports.items()})
        path = os.path.join(self.directory, "kernel.json")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            json.dump(info, file)
        return path

    def _spawn(self, connection_file: str) -> None:
        items = [item.replace("{connection_file}", connection_file) for item in self.spec["argv"]]
        argv = [os.path.expanduser(item) if item.startswith("~") else item for item in items]
        env = {**self._base_env, **self.spec["env"]}
        try:
            self._working_directory = choose(self.spec)
        except NoDirectory as error:
            raise StartRefused(str(error)) from error
        env["PWD"] = self._working_directory.path
        env["HOME"] = home(env)
        env.setdefault("SLURM_SUBMIT_DIR", env["PWD"])  # of a job that was submitted for a kernel
        read_end, write_end = os.pipe()
        try:
            self.process = subprocess.Popen(
                argv,
                env=env,
                cwd=self._working_directory.path,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
                umask=int(self.spec["umask"]),  # the launcher's own is 077, so that its files are private
                preexec_fn=die_with_launcher(os.getpid()),
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            os.close(read_end)
            raise StartRefused(cannot_run(argv, env, error)) from error
        finally:
            os.close(write_end)
        self._guard.add(self.process.pid)
        os.set_blocking(read_end, False)
        self._pipe = read_end
        self._reactor.watch(read_end, READ, lambda _events: self._read_output())

    def _check_channels(self) -> None:
        if self.state != "starting":
            return
        began = time.monotonic()
        if self._listens():
            if self.mode == "direct":
                self._curve = CurveCheck(self._reactor, self.ip, self.ports, self._on_greetings)
            else:
                self._listening()
        elif time.monotonic() > self._deadline:
            seconds = self.spec["start_timeout"]
            self._fail(
                "timeout",
                f"the kernel did not listen on its channels within {seconds:g} s; raise SlurmService.start_timeout if "
                "it first fetches a container image or reads a slow file system",
            )
        else:
            # The checks must not take the CPU time that the kernel needs to start.
            pause = max(CHECK_INTERVAL, 4 * (time.monotonic() - began))
            self._check = self._reactor.later(pause, self._check_channels)

    def _on_greetings(self, refusal: Refusal | None) -> None:
        """A direct kernel without CurveZMQ is killed, and FAILED is sent once it has ended and its ports are closed."""
        if self.state != "starting":
            return
        if refusal:
            self._refusal = refusal
            self.signal(signal.SIGKILL)
        else:
            self._listening()

    def _close_curve_check(self) -> None:
        if self._curve:
            self._curve.close()
            self._curve = None

    def _listening(self) -> None:
        self.state = "running"
        if self._journal is not None:
            self._journal.subscribe(lambda: self.connect("iopub"), lambda: self.state != "running")
        self._send("STARTED", **self.report())

    def _listens(self) -> bool:
        if self.mode == "ipc":
            return None not in self._unix_paths().values()
        found = ports.tcp_listening(self.ip, self.ports.values())
        return [listener.uid for listener in found.values()] == [os.getuid()] * len(self.ports)

    def _unix_paths(self) -> dict[str, str | None]:
        found = ports.unix_listening(self.directory)
        return {channel: ports.ipc_path(self.ip, port, found) for channel, port in self.ports.items()}

    def connect(self, channel: str) -> socket.socket:
        """A non-blocking socket that is connected to one of the kernel's channels; raises OSError.

        The listener must belong to this user: another one may take a TCP port once the kernel has closed it.
        """
        if self.state != "running" or channel not in self.ports:
            raise ConnectionRefusedError(f"kernel {self.kernel_id} does not listen on {channel}")
        if self.mode != "ipc":
            return ports.connect_to_own(self.ip, self.ports[channel])
        path = self._unix_paths()[channel]
        if path is None:
            raise ConnectionRefusedError(f"kernel {self.kernel_id} does not listen on {channel}")
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            sock.connect(path)
            # struct ucred of unix(7) is that of the process that called listen(2).
            _pid, uid, _gid = struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != os.getuid():
                raise ConnectionRefusedError(f"another user (uid {uid}) listens on {path}")
        except OSError:
            sock.close()
            raise
        return sock

    def report(self) -> dict[str, Any]:
        """The state of this kernel, for STARTED, EXIT, FAILED and REPORT."""
        facts = {name: self.spec[name] for name in ("kernel_id", "generation", "slot")}
        pid = self.process.pid if self.process else 0
        where = {"mode": self.mode, "ip": self.ip, "ports": self.ports}
        chosen = {"directory": self._working_directory.path, "directory_why": self._working_directory.why}
        return {**facts, "state": self.state, "pid": pid, **where, **chosen, **self.exit}

    # -- output -----------------------------------------------------------------------------

    def _open_log(self) -> None:
        directory = os.path.expanduser(self.spec["log_dir"])
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            # The name has the notebook's, for which this node's locale may have no characters.
            name = os.path.basename(self.spec["log_name"]).encode()
            self.log_path = os.path.join(directory, os.fsdecode(name))
            self._log = self._create_log()
        except OSError as error:
            # A full or missing home must not prevent the start. The runtime directory is private, too.
            self._send("NOTICE", kind="log", kernel_id=self.kernel_id, message=f"no log in {directory}: {error}")
            self.log_path = os.path.join(self.directory, "kernel.log")
            self._log = self._create_log()

    def _create_log(self) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        return open(os.open(self.log_path, flags, 0o600), "ab", buffering=0)

    def _read_output(self) -> None:
        while self._pipe is not None:
            try:
                data = os.read(self._pipe, 65536)
            except BlockingIOError:
                return
            if not data:
                self._close_pipe()
                return
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            self._write_log(data)

    def _write_log(self, data: bytes) -> None:
        if self._log is None:
            return
        try:
            if self._log.tell() > MAX_LOG:
                self._log.close()
                os.replace(self.log_path, self.log_path + ".1")
                self._log = self._create_log()
            self._log.write(data)
        except OSError as error:
            self._log.close()
            self._log = None
            message = f"the log {self.log_path} ends here: {error}"
            self._send("NOTICE", kind="log", kernel_id=self.kernel_id, message=message)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            self._reactor.forget(self._pipe)
            os.close(self._pipe)
            self._pipe = None

    def _write_stderr_line(self, line: str, attempts: int = LINE_ATTEMPTS) -> None:
        """Write a line to the kernel's captured standard error; if that fails, NOTICE gives the reason."""
        if self.state != "running" or self.process is None or self._pipe is None:
            return
        if self.mode == "ipc":
            inodes = set(ports.unix_listening(self.directory).values())
        else:
            inodes = {listener.inode for listener in ports.tcp_listening(self.ip, self.ports.values()).values()}
        try:
            stderr.write_line(line, self.process.pid, inodes, self._pipe)
        except BlockingIOError:
            if attempts > 1:
                self._reactor.later(LINE_RETRY_DELAY, lambda: self._write_stderr_line(line, attempts - 1))
        except (stderr.NotCapturedError, OSError) as error:
            message = f"kernel {self.kernel_id} does not show the line {line.strip()!r}: {error}"
            self._send("NOTICE", kind="stderr_line", kernel_id=self.kernel_id, message=message)

    # -- end --------------------------------------------------------------------------------

    @property
    def runs(self) -> bool:
        """Whether the kernel's process was started and has not been collected."""
        return self.process is not None and self.process.returncode is None

    def signal(self, signum: int) -> None:
        """Signal the kernel's process group; a group that has ended already is no error."""
        if self.process is not None and self.runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)

    def reaped(self) -> None:
        """Check whether this kernel has ended; called after SIGCHLD."""
        if self.process is None or not self.runs or self.process.poll() is None:
            return
        self._read_output()
        self._close_pipe()
        # The group may still hold children of the kernel, which no other process would end.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._guard.remove(self.process.pid)
        if self.state == "failed":
            return  # FAILED has been sent, and the process was killed then
        if self.state == "starting" and not self._asked_to_stop:
            self._died_at_start(self.process.returncode)
        else:
            self.state = "exited"
            if self._journal is not None:
                self._journal.drain()  # so that the server finds there what came before EXIT
                self._journal.pump()
            self.exit = {"returncode": self.process.returncode, "output_tail": self.output_tail()}
            if self._was_killed_for_memory(self.process.returncode):
                self.exit["oom"] = True
            self._send("EXIT", **self.report())

    def _was_killed_for_memory(self, returncode: int) -> bool:
        return returncode == -signal.SIGKILL and not self._asked_to_stop and oom_kills() > self._oom_kills

    def _died_at_start(self, returncode: int) -> None:
        """Start the kernel again where other ports or another transport may help."""
        killed_for_memory = self._was_killed_for_memory(returncode)
        if self._refusal and returncode == -signal.SIGKILL and not killed_for_memory:
            self._fail(self._refusal.kind, f"{REFUSED[self._refusal.kind]} ({self._refusal.why})")
            return
        self._refusal = None
        if self.mode == "ipc":
            again = self.spec.get("language") not in IPC_LANGUAGES and self._attempt == 1
            if again and not self._may_use_loopback():
                self._fail("refused", f"{NO_LOOPBACK}. It died with Unix sockets: {wire.describe_exit(returncode)}")
                return
            self.mode = "tcp" if again else "ipc"
        else:
            lost_a_port = ports.tcp_listening(self.ip, self.ports.values()) or b"ddress already in use" in self._tail
            again = bool(lost_a_port) and self._attempt < PORT_ATTEMPTS
        if not again:
            memory = ", killed for memory" if killed_for_memory else ""
            self._fail("died", f"the kernel died at start: {wire.describe_exit(returncode)}{memory}")
            return
        try:
            self._launch(None)
        except (StartRefused, OSError) as error:
            self._fail("refused", str(error))

    def _fail(self, kind: str, message: str) -> None:
        self.state = "failed"
        # The message may quote text of the user, which may be long.
        self.exit = {"kind": kind, "message": message[:MAX_MESSAGE], "output_tail": self.output_tail()}
        self.signal(signal.SIGKILL)
        self._send("FAILED", **self.report(), argv=[item[:200] for item in self.spec["argv"][:20]])

    def output_tail(self) -> str:
        """The last lines of the kernel's output, stdout and stderr together, without its secrets."""
        text = self._tail.decode(errors="replace").replace("\x00", "")
        for value in self.spec["connection"].values():
            if isinstance(value, str) and len(value) > 15:
                text = text.replace(value, "…")
        return "\n".join(text.splitlines()[-30:])

    def stop(self) -> None:
        """Kill the process group now; EXIT follows."""
        self._asked_to_stop = True
        self.signal(signal.SIGKILL)

    def close(self) -> None:
        """Close the log and the pipe; the process has ended or is ending."""
        if self._check:
            self._check.cancel()
        self._close_curve_check()
        self._close_pipe()
        if self._log is not None:
            self._log.close()
            self._log = None


def die_with_launcher(launcher: int) -> Callable[[], None]:
    """A function for a child between fork and exec: it makes the child end with the launcher (PR_SET_PDEATHSIG)."""

    def in_child() -> None:
        signal.set_wakeup_fd(-1)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:
            os._exit(125)

    return in_child


def cannot_run(argv: list[str], env: dict[str, str], error: Exception) -> str:
    """The error message for the user: why ``argv`` could not be started."""
    node = socket.gethostname()
    if isinstance(error, FileNotFoundError):
        where = "" if "/" in argv[0] else f" on PATH={env.get('PATH', '')}"
        return (
            f"kernel_argv cannot run on node {node}: there is no {argv[0]!r}{where}; "
            "install the kernel where the compute nodes see it, or correct kernel_argv"
        )
    return f"kernel_argv cannot run on node {node}: {argv[0]!r}: {error}"
