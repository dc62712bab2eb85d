"""One kernel on its node: connection file, process, log, and what became of it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway_slurm.link import wire
from launchers import ports as listening
from launchers import stderr
from launchers.guard import Guard
from launchers.reactor import READ, Reactor, Timer

if TYPE_CHECKING:
    from launchers.output import OutputBuffer


PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def on_node(item: str, connection_file: str) -> str:
    """An argv item as this node needs it: its connection file, and ``~`` as the shell would have it."""
    item = item.replace("{connection_file}", connection_file)
    return os.path.expanduser(item) if item.startswith("~") else item


def die_with_launcher(launcher: int) -> Callable[[], None]:
    """For a child between fork and exec: it ends when the launcher does (prctl(2), PR_SET_PDEATHSIG)."""

    def in_child() -> None:
        signal.set_wakeup_fd(-1)
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:
            os._exit(125)

    return in_child


def cannot_run(argv: list[str], env: dict[str, str], error: Exception) -> str:
    """Why ``argv`` could not be started, for the user."""
    node = socket.gethostname()
    if isinstance(error, FileNotFoundError):
        where = "" if "/" in argv[0] else f" on PATH={env.get('PATH', '')}"
        return (
            f"kernel_argv cannot run on node {node}: there is no {argv[0]!r}{where}; "
            "install the kernel where the compute nodes see it, or correct kernel_argv"
        )
    return f"kernel_argv cannot run on node {node}: {argv[0]!r}: {error}"


# -- One kernel on its node: connection file, process, log, and what became of it. --


TAIL_BYTES = 4096
MESSAGE_LIMIT = 2000
LOG_LIMIT = 32 * 1024 * 1024
FIRST_LOOK, LOOK_AGAIN = 0.06, 0.003
PORT_ATTEMPTS = 4
# A pipe that is full of the kernel's own output is tried this often, with this many seconds between.
TELL_ATTEMPTS, TELL_AGAIN = 40, 0.25
# Loopback TCP behind the tunnel is the second try of a kernel whose language is not one of these:
# what is written in them is built on ipykernel and can use Unix sockets.
IPC_LANGUAGES = ("python",)


class StartRefused(Exception):
    """The kernel cannot be started as asked; the message is for the user."""


class Kernel:
    """A kernel from START to EXIT. ``say`` sends a message to the server, if ``linked``.

    Of its output ``kept_output`` bytes are kept, beyond EXIT, until ``close``.
    """

    def __init__(
        self,
        reactor: Reactor,
        guard: Guard,
        *,
        directory: str,
        spec: dict[str, Any],
        ip: str,
        base_env: dict[str, str],
        say: Callable[..., None],
        linked: Callable[[], bool],
        kept_output: int,
    ) -> None:
        self._reactor, self._guard = reactor, guard
        self.directory, self.spec, self._say = directory, spec, say
        self.kernel_id: str = spec["kernel_id"]
        self._base_env = base_env
        self.mode: str = spec["mode"]  # direct | ipc | tcp
        self._node_ip = ip
        self.ports: dict[str, int] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.state = "starting"  # starting -> running -> exited; starting -> failed
        self.exit: dict[str, Any] = {}
        self._attempt = 0
        self._tail = b""
        self._log: Any | None = None
        self.log_path = ""
        self._pipe: int | None = None
        self._look: Timer | None = None
        self._deadline = time.monotonic() + float(spec["start_timeout"])
        self._asked_to_stop = False
        self._linked, self._kept_output = linked, kept_output
        self._output: OutputBuffer | None = None

    # -- start ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process; STARTED or FAILED follows."""
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            self._open_log()
            self._launch(self.spec.get("ports"))
            _ = self.output  # made while the kernel comes up: its modules take 10 ms to load
        except (StartRefused, OSError) as error:
            self._fail("refused", str(error))

    def _launch(self, ports: dict[str, int] | None) -> None:
        self._attempt += 1
        self.ip = self._choose_address()
        if self.mode == "ipc":
            self.ports = {channel: number for number, channel in enumerate(wire.CHANNELS, 1)}
            self._remove_sockets()
        else:
            self.ports = ports or listening.choose_ports(self.ip, self.spec.get("port_range"))
        self._spawn(self._write_connection_file())
        self._look = self._reactor.later(FIRST_LOOK, self._look_for_channels)

    def _choose_address(self) -> str:
        if self.mode == "ipc":
            prefix = os.path.join(self.directory, "c")
            if not listening.reachable_path_length(prefix + "-1"):
                raise StartRefused(f"{self.directory} is too long for Unix sockets: shorten TMPDIR on the node")
            return prefix
        return "127.0.0.1" if self.mode == "tcp" else self._node_ip

    def _remove_sockets(self) -> None:
        for name in os.listdir(self.directory):
            if name.startswith(("c-", "c:")):
                os.unlink(os.path.join(self.directory, name))

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
        argv = [on_node(item, connection_file) for item in self.spec["argv"]]
        env = {**self._base_env, **self.spec["env"]}
        cwd = os.path.expanduser(self.spec.get("cwd") or "~")
        if not os.path.isdir(cwd):
            raise StartRefused(
                f"the working directory {cwd} does not exist on node {socket.gethostname()}: "
                "start the kernel in a directory that the compute nodes share"
            )
        env["PWD"] = cwd
        read_end, write_end = os.pipe()
        try:
            self.process = subprocess.Popen(
                argv,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
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

    def _look_for_channels(self) -> None:
        if self.state != "starting":
            return
        began = time.monotonic()
        if self._listens():
            self.state = "running"
            self._say("STARTED", **self.report())
            self.output.begin()
        elif time.monotonic() > self._deadline:
            seconds = self.spec["start_timeout"]
            self._fail("timeout", f"the kernel did not listen on its channels within {seconds:g} s")
        else:
            # Looking must not take the time that the kernel needs to come up.
            pause = max(LOOK_AGAIN, 4 * (time.monotonic() - began))
            self._look = self._reactor.later(pause, self._look_for_channels)

    def _listens(self) -> bool:
        if self.mode == "ipc":
            return None not in self._unix_paths().values()
        return list(listening.tcp_listening(self.ports.values()).values()) == [os.getuid()] * len(self.ports)

    def _unix_paths(self) -> dict[str, str | None]:
        found = listening.unix_listening(self.directory)
        return {channel: listening.ipc_path(self.ip, port, found) for channel, port in self.ports.items()}

    def _socket_inodes(self) -> set[int]:
        """The inodes of the sockets on which the kernel listens."""
        if self.mode == "ipc":
            return set(listening.unix_listening(self.directory).values())
        return listening.tcp_inodes(self.ports.values())

    def connect(self, channel: str) -> socket.socket:
        """A non-blocking socket on its way to one of the kernel's channels; raises OSError."""
        if self.mode == "ipc":
            path = self._unix_paths().get(channel)
            if self.state != "running" or path is None:
                raise ConnectionRefusedError(f"kernel {self.kernel_id} does not listen on {channel}")
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            sock.connect(path)
        else:
            sock = socket.socket(socket.AF_INET)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect_ex((self.ip, self.ports[channel]))
        return sock

    @property
    def output(self) -> OutputBuffer:
        """What it publishes and nobody has acknowledged."""
        if self._output is None:
            from launchers.output import OutputBuffer

            self._output = OutputBuffer(
                self._reactor,
                connect=lambda: self.connect("iopub"),
                linked=self._linked,
                is_over=lambda: self.state != "running",
                limit=self._kept_output,
                trouble="its clients dial it directly" if self.mode == "direct" else "",
            )
        return self._output

    def report(self) -> dict[str, Any]:
        """What a server needs to know of this kernel, at STARTED and in REPORT."""
        pid = self.process.pid if self.process else 0
        facts = {"kernel_id": self.kernel_id, "generation": self.spec["generation"], "state": self.state}
        facts["slot"] = self.spec["slot"]
        return {**facts, "pid": pid, "mode": self.mode, "ip": self.ip, "ports": self.ports, **self.exit}

    # -- output -----------------------------------------------------------------------------

    def _open_log(self) -> None:
        directory = os.path.expanduser(self.spec["log_dir"])
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            self.log_path = os.path.join(directory, f"kernel-{self.kernel_id}.log")
            self._log = self._create_log()
        except OSError as error:
            # A full or missing home must not keep a kernel from starting; the directory is private, too.
            self._say("NOTICE", kind="log", kernel_id=self.kernel_id, message=f"no log in {directory}: {error}")
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
            if self._log.tell() > LOG_LIMIT:
                self._log.close()
                os.replace(self.log_path, self.log_path + ".1")
                self._log = self._create_log()
            self._log.write(data)
        except OSError as error:
            self._log.close()
            self._log = None
            message = f"the log {self.log_path} ends here: {error}"
            self._say("NOTICE", kind="log", kernel_id=self.kernel_id, message=message)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            self._reactor.forget(self._pipe)
            os.close(self._pipe)
            self._pipe = None

    def tell(self, line: str, attempts: int = TELL_ATTEMPTS) -> None:
        """Write a line where the kernel captures its standard error; NOTICE says why if it cannot be."""
        if self.state != "running" or self.process is None or self._pipe is None:
            return
        try:
            stderr.write_line(line, self.process.pid, self._socket_inodes(), self._pipe)
        except BlockingIOError:
            if attempts > 1:
                self._reactor.later(TELL_AGAIN, lambda: self.tell(line, attempts - 1))
        except (stderr.NotCapturedError, OSError) as error:
            message = f"kernel {self.kernel_id} was not told {line.strip()!r}: {error}"
            self._say("NOTICE", kind="untold", kernel_id=self.kernel_id, message=message)

    # -- end --------------------------------------------------------------------------------

    def signal(self, signum: int) -> None:
        """Signal the kernel's process group; one that is gone already is no error."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)

    def reaped(self) -> None:
        """SIGCHLD came: see whether it was this kernel."""
        if self.process is None or self.state in ("exited", "failed") or self.process.poll() is None:
            return
        self._read_output()
        self._close_pipe()
        self._end_group()
        if self.state == "starting" and not self._asked_to_stop:
            self._died_at_start()
        else:
            self._exited()

    def _end_group(self) -> None:
        # The group may still hold children of the kernel; with the kernel gone nobody would end them.
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._guard.remove(self.process.pid)

    def _exited(self) -> None:
        assert self.process is not None
        self.state = "exited"
        self.exit = {"returncode": self.process.returncode, "output_tail": self.output_tail()}
        self._say("EXIT", **self.report())

    def _died_at_start(self) -> None:
        assert self.process is not None
        if self._lost_a_port() and self._attempt < PORT_ATTEMPTS:
            self._launch_again()
        elif self.mode == "ipc" and self.spec.get("language") not in IPC_LANGUAGES and self._attempt == 1:
            self.mode = "tcp"
            self._launch_again()
        else:
            self._fail("died", f"the kernel died at start: {wire.describe_exit(self.process.returncode)}")

    def _launch_again(self) -> None:
        try:
            self._launch(None)
        except (StartRefused, OSError) as error:
            self._fail("refused", str(error))

    def _lost_a_port(self) -> bool:
        if self.mode == "ipc":
            return False
        taken = listening.tcp_listening(self.ports.values())
        return bool(taken) or b"ddress already in use" in self._tail

    def _fail(self, kind: str, message: str) -> None:
        self.state = "failed"
        # It may quote what the user gave, which may be long.
        self.exit = {"kind": kind, "message": message[:MESSAGE_LIMIT], "output_tail": self.output_tail()}
        self.signal(signal.SIGKILL)
        self._say("FAILED", **self.report(), argv=[item[:200] for item in self.spec["argv"][:20]])

    def output_tail(self) -> str:
        """The last lines of what the kernel printed, stdout and stderr together."""
        text = self._tail.decode(errors="replace").replace("\x00", "")
        secrets = [value for value in self.spec["connection"].values() if isinstance(value, str) and len(value) > 15]
        for secret in secrets:
            text = text.replace(secret, "…")
        return "\n".join(text.splitlines()[-30:])

    def stop(self) -> None:
        """Kill the process group now; EXIT follows."""
        self._asked_to_stop = True
        self.signal(signal.SIGKILL)

    def close(self) -> None:
        """Let go of log, pipe, files and output; the process is gone or going."""
        self.output.close()
        if self._look:
            self._look.cancel()
        self._close_pipe()
        if self._log is not None:
            self._log.close()
            self._log = None
