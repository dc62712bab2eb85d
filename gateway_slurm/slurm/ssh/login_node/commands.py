"""Runs commands on the login node, for the server at the other end of the channel.

``RUN`` is answered by ``RESULT``, and ``KILL`` cuts it short; ``START`` by ``STARTED`` and, at its end, ``ENDED``;
``TERM`` and ``WATCH`` are for what was started, over this channel or an earlier one. What was not started to stay is
killed with its process group when the channel ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from gateway_slurm.slurm.ssh.login_node.common import (
    ENDED,
    KILL,
    MAX_TAIL,
    PING,
    PONG,
    READ_SIZE,
    RESULT,
    RUN,
    START,
    STARTED,
    TERM,
    WATCH,
    Frames,
    frame,
    pack,
    start_ticks,
    unpack,
)

MAX_RUNNING = 64  # commands at once


def signal_group(pid: int, number: int) -> None:
    """Send a signal to a process group, if it is there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


class Commands:
    """Runs what it is told, each command in a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._children: dict[int, subprocess.Popen[bytes] | None] = {}  # those that end with us
        self._started: dict[int, subprocess.Popen[bytes]] = {}

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Write one frame, whole."""
        data = memoryview(frame(kind, number, payload))
        with self._writing:
            while data:
                data = data[os.write(1, data) :]

    def take(self, kind: int, number: int, payload: bytes) -> None:
        """Do what one frame says."""
        if kind == PING:
            self.send(PONG, number)
        elif kind == KILL:
            with self._lock:
                child, started = self._children.get(number), self._started.get(number)
            if child is not None:
                signal_group(child.pid, signal.SIGKILL)
            if started is not None:
                signal_group(started.pid, signal.SIGTERM)  # srun then ends its step
        elif kind == TERM:
            fields = unpack(payload)[0]
            if start_ticks(fields["pid"]) == fields["ticks"]:
                signal_group(fields["pid"], signal.SIGTERM)
        else:
            work = {RUN: self._run, START: self._start, WATCH: self._watch}[kind]
            threading.Thread(target=self._guarded, args=(work, number, *unpack(payload)), daemon=True).start()

    def end(self) -> None:
        """Kill what was not started to stay."""
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
            self.send(RESULT, number, pack({"error": str(error)}, b"", b""))
        finally:
            with self._lock:
                self._children.pop(number, None)
                self._started.pop(number, None)

    def _spawn(self, fields: dict[str, Any], data: bytes, **pipes: Any) -> subprocess.Popen[bytes]:
        """Raises FileNotFoundError, saying where it was looked for."""
        env = environment(fields)
        # By our own path: a PATH among the job's variables must not choose which sbatch runs.
        path = fields["path"] or os.environ.get("PATH", os.defpath)
        program = shutil.which(fields["argv"][0], path=path)
        if program is None:
            raise FileNotFoundError(f"not found: it is not in {path}")
        # A file and not a pipe: nobody has to write it while we look after the command.
        stdin = os.memfd_create("input")
        try:
            with open(stdin, "wb", closefd=False) as file:
                file.write(data)
            os.lseek(stdin, 0, os.SEEK_SET)
            return subprocess.Popen(
                [program, *fields["argv"][1:]], stdin=stdin, env=env, cwd="/", start_new_session=True, **pipes
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
            fault, said = collect([child.stdout.fileno(), child.stderr.fileno()], fields["limit"], fields["timeout"])
            # Many a command closes its output a moment before its end: that must not make its status ours.
            if not fault and not is_over(child.pid, deadline):
                fault, said = "timeout", [b"", b""]
            # Also when the command itself has ended: what it left behind may hold the pipes.
            signal_group(child.pid, signal.SIGKILL)
            status = child.wait()
        self.send(RESULT, number, pack({"status": status, "fault": fault}, *said))

    def _start(self, number: int, fields: dict[str, Any], data: bytes) -> None:
        with tempfile.TemporaryFile() as stderr:
            child = self._spawn(fields, data, stdout=subprocess.DEVNULL, stderr=stderr)
            with self._lock:
                self._started[number] = child
            facts = {"pid": child.pid, "ticks": start_ticks(child.pid)}
            self.send(STARTED, number, pack(facts))
            status = child.wait()
            size = os.fstat(stderr.fileno()).st_size
            tail = os.pread(stderr.fileno(), MAX_TAIL, max(0, size - MAX_TAIL))
        self.send(ENDED, number, pack({"status": status}, tail))

    def _watch(self, number: int, fields: dict[str, Any], _data: bytes) -> None:
        """For one that was started over another channel: its exit status is nobody's to know any more."""
        while start_ticks(fields["pid"]) == fields["ticks"]:
            time.sleep(0.5)
        self.send(ENDED, number, pack({"status": None}, b""))


def environment(fields: dict[str, Any]) -> dict[str, str]:
    """Of our own environment what is named in ``keep``, then ``set``, where null takes a variable away."""
    env = {name: os.environ[name] for name in fields["keep"] if name in os.environ}
    if fields["path"]:
        env["PATH"] = fields["path"]
    for name, value in fields["set"].items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    return env


def collect(descriptors: list[int], limit: int, timeout: float) -> tuple[str, list[bytes]]:
    """What comes out of both until their ends, and the fault, ``timeout`` or ``flood``, that cut it short."""
    said = {descriptor: bytearray() for descriptor in descriptors}
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
                said[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
                elif len(said[key.fd]) > limit:
                    fault = "flood"
    return fault, [b"" if fault else bytes(each) for each in said.values()]


def is_over(pid: int, deadline: float) -> bool:
    """Whether the child has ended by then; it is not collected, so that its group's number stays its own."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def serve_commands(silence: float) -> None:
    """Until the channel ends, or nothing has come for ``silence`` seconds."""
    commands = Commands()
    frames = Frames()
    try:
        while select.select([0], [], [], silence)[0]:
            data = os.read(0, READ_SIZE)
            if not data:
                break
            for each in frames.feed(data):
                commands.take(*each)
    finally:
        commands.end()
