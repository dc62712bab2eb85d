"""Runs commands on the login node, for the server at the other end of the channel.

``RESULT`` answers ``RUN``, and ``KILL`` ends the command early. ``STARTED`` answers ``START``, and ``ENDED`` follows at
the command's end. ``TERM`` and ``WATCH`` are for started commands of this channel or of an earlier one. When the
channel ends, commands from ``RUN`` are killed with their process groups; those from ``START`` keep running.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from gateway_slurm.slurm.ssh.login_node import protocol
from gateway_slurm.slurm.ssh.login_node.stderr_file import TRIM_INTERVAL, StderrFile

MAX_RUNNING = 64  # commands at a time


def signal_group(pid: int, number: int) -> None:
    """Send a signal to a process group, if it exists."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


class Commands:
    """Runs the requested commands, each in a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._children: dict[int, subprocess.Popen[bytes] | None] = {}  # those that end with this program
        self._started: dict[int, subprocess.Popen[bytes]] = {}

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Write one complete frame."""
        data = memoryview(protocol.frame(kind, number, payload))
        with self._writing:
            while data:
                data = data[os.write(1, data) :]

    def handle(self, kind: int, number: int, payload: bytes) -> None:
        if kind == protocol.PING:
            self.send(protocol.PONG, number)
        elif kind == protocol.KILL:
            with self._lock:
                child, started = self._children.get(number), self._started.get(number)
            if child is not None:
                signal_group(child.pid, signal.SIGKILL)
            if started is not None:
                signal_group(started.pid, signal.SIGTERM)  # srun then ends its step
        elif kind == protocol.TERM:
            fields = protocol.unpack(payload)[0]
            if protocol.start_ticks(fields["pid"]) == fields["ticks"]:
                signal_group(fields["pid"], signal.SIGTERM)
        else:
            work = {protocol.RUN: self._run, protocol.START: self._start, protocol.WATCH: self._watch}[kind]
            threading.Thread(target=self._guarded, args=(work, number, *protocol.unpack(payload)), daemon=True).start()

    def end(self) -> None:
        """Kill the commands from ``RUN``."""
        with self._lock:
            children = list(self._children.values())
        for child in children:
            if child is not None:
                signal_group(child.pid, signal.SIGKILL)

    def _guarded(self, work: Callable[..., None], number: int, fields: dict[str, Any], data: list[bytes]) -> None:
        try:
            with self._lock:
                if len(self._children) >= MAX_RUNNING:
                    raise OSError(f"{MAX_RUNNING} commands run already")
                self._children[number] = None
            work(number, fields, data[0] if data else b"")
        except OSError as error:
            self.send(protocol.RESULT, number, protocol.pack({"error": str(error)}, b"", b""))
        finally:
            with self._lock:
                self._children.pop(number, None)
                self._started.pop(number, None)

    def _spawn(self, fields: dict[str, Any], data: bytes, **pipes: Any) -> subprocess.Popen[bytes]:
        """Start a command. Raises FileNotFoundError with the path that was searched."""
        env = environment(fields)
        # A PATH among the job's variables must not choose which sbatch runs.
        path = fields["path"] or os.environ.get("PATH", os.defpath)
        program = shutil.which(fields["argv"][0], path=path)
        if program is None:
            raise FileNotFoundError(f"not found: it is not in {path}")
        # A file, since a pipe would need a writer while this thread waits for the command.
        stdin = os.memfd_create("input")
        try:
            with open(stdin, "wb", closefd=False) as file:
                file.write(data)
            os.lseek(stdin, 0, os.SEEK_SET)
            # As UTF-8: the locale of the login node may have no character for a job's name.
            arguments = [item.encode("utf-8", "surrogateescape") for item in fields["argv"][1:]]
            return subprocess.Popen(
                [program, *arguments], stdin=stdin, env=env, cwd="/", start_new_session=True, **pipes
            )
        finally:
            os.close(stdin)

    def _run(self, number: int, fields: dict[str, Any], data: bytes) -> None:
        child = self._spawn(fields, data, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with self._lock:
            self._children[number] = child
        assert child.stdout is not None
        assert child.stderr is not None
        deadline = time.monotonic() + fields["timeout"]
        with child.stdout, child.stderr:
            fault, outputs = collect([child.stdout.fileno(), child.stderr.fileno()], fields["limit"], fields["timeout"])
            # Some commands close their output a moment before they end; killing them then would change their status.
            if not fault and not ends_in_time(child.pid, deadline):
                fault, outputs = "timeout", [b"", b""]
            # Children of a command that has ended may hold the pipes.
            signal_group(child.pid, signal.SIGKILL)
            status = child.wait()
        self.send(protocol.RESULT, number, protocol.pack({"status": status, "fault": fault}, *outputs))

    def _start(self, number: int, fields: dict[str, Any], data: bytes) -> None:
        with contextlib.closing(StderrFile()) as stderr:
            child = self._spawn(fields, data, stdout=subprocess.DEVNULL, stderr=stderr.file)
            with self._lock:
                self._started[number] = child
            self.send(
                protocol.STARTED, number, protocol.pack({"pid": child.pid, "ticks": protocol.start_ticks(child.pid)})
            )
            while not ends_in_time(child.pid, time.monotonic() + TRIM_INTERVAL):
                stderr.trim()
            status = child.wait()
        self.send(protocol.ENDED, number, protocol.pack({"status": status}, stderr.tail()))

    def _watch(self, number: int, fields: dict[str, Any], _data: bytes) -> None:
        """Wait for a command that was started over another channel; its exit status is not known."""
        while protocol.start_ticks(fields["pid"]) == fields["ticks"]:
            time.sleep(0.5)
        self.send(protocol.ENDED, number, protocol.pack({"status": None}, b""))


def environment(fields: dict[str, Any]) -> dict[str, str]:
    """Return the variables of this process that ``keep`` names, with those of ``set``; null removes a variable."""
    env = {name: os.environ[name] for name in fields["keep"] if name in os.environ}
    if fields["path"]:
        env["PATH"] = fields["path"]
    return {name: value for name, value in {**env, **fields["set"]}.items() if value is not None}


def collect(descriptors: list[int], limit: int, timeout: float) -> tuple[str, list[bytes]]:
    """Read the descriptors to their ends; return the fault (``timeout``, ``flood`` or empty) and the output of each."""
    outputs = {descriptor: bytearray() for descriptor in descriptors}
    deadline = time.monotonic() + timeout
    fault = ""
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and not fault:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                fault = "timeout"
            for key, _events in ready:
                data = os.read(key.fd, 64 << 10)
                outputs[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
                elif len(outputs[key.fd]) > limit:
                    fault = "flood"
    return fault, [b"" if fault else bytes(output) for output in outputs.values()]


def ends_in_time(pid: int, deadline: float) -> bool:
    """Whether the child ends before the deadline; it is not reaped, so that its group's id is not reused."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def serve_commands(silence: float) -> None:
    """Serve until the channel ends, or until no frame has come for ``silence`` seconds."""
    commands = Commands()
    frames = protocol.Frames()
    try:
        while select.select([0], [], [], silence)[0]:
            data = os.read(0, protocol.READ_SIZE)
            if not data:
                break
            for received in frames.feed(data):
                commands.handle(*received)
    finally:
        commands.end()
