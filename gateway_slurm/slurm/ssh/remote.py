"""A program on the login node, which exchanges frames with the server over an SSH channel of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import re
import secrets
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import paramiko

from gateway_slurm.errors import SshError, SshLost
from gateway_slurm.slurm.ssh.login_node import protocol

Frame = tuple[int, int, bytes]

MODULES: Final = ("protocol", "stderr_file", "commands", "relay", "main")
CHANNEL_WINDOW: Final = 8 << 20  # bytes that the login node may send before this process acknowledges some
MAX_PACKET: Final = 128 << 10  # bytes; the cost of a packet in Python does not depend on its length
MAX_SHELL_OUTPUT: Final = 256 << 10  # bytes that a login shell may print before the program begins
_MAX_WRITE: Final = 256 << 10  # bytes
_PYTHON: Final = re.compile(r"[A-Za-z0-9_./+-]+", re.ASCII)

_LOADER: Final = """\
import sys, types
for name, source in SOURCES.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
"""


@cache
def program_text() -> str:
    """Return the modules as one text, which registers them under their own names."""
    package = "gateway_slurm.slurm.ssh.login_node"
    directory = Path(protocol.__file__).parent
    sources = {package: "", **{f"{package}.{name}": (directory / f"{name}.py").read_text() for name in MODULES}}
    return f"SOURCES = {sources!r}\n{_LOADER}"


def bootstrap(python: str) -> str:
    """Return the command line that reads the program from stdin. Raises ValueError for special characters.

    It is the whole command line on the login node. It does not depend on any request, and all login shells read it
    alike.
    """
    if not _PYTHON.fullmatch(python):
        raise ValueError(f"{python!r} is not the path of a Python: it may hold letters, digits and _ . / + - only")
    return f"exec {python} -I -c 'import sys;s=sys.stdin.buffer;exec(s.read(int(s.readline())))'"


class RemoteProgram:
    """One program on the login node. Its owner calls ``close``; the program also ends when its channel does.

    ``on_frames`` and ``on_end`` are called on the loop of the constructor; ``info`` is the program's description of
    itself. If nothing arrives from the program for three heartbeats, the program and its connection are closed.
    """

    def __init__(
        self,
        transport: paramiko.Transport,
        *,
        heartbeat: float,
        on_frames: Callable[[list[Frame]], None],
        on_end: Callable[[SshError], None],
        log: logging.Logger,
    ) -> None:
        self._transport, self._on_frames, self._on_end, self._log = transport, on_frames, on_end, log
        self._heartbeat = heartbeat
        self._loop = asyncio.get_running_loop()
        self._frames = protocol.Frames()
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._early: list[Frame] = []  # frames that arrived before ``start``
        self.ended = False
        """Whether the program or its channel has ended."""
        self._last_received = self._loop.time()
        self._heartbeat_timer: asyncio.TimerHandle | None = None
        self.channel: paramiko.Channel | None = None
        self.info: dict[str, Any] = {}

    # -- In worker threads --

    def open(self, mode: str, *, python: str, timeout: float) -> None:
        """Start the program and return once it runs. Raises SshError with the login node's own words."""
        marker = f"gateway_slurm-{secrets.token_hex(16)}"
        entry = "sys.modules['gateway_slurm.slurm.ssh.login_node.main'].main"
        text = f"{program_text()}\n{entry}{(marker, mode, 3 * self._heartbeat)!r}\n"
        data = text.encode()
        try:
            self.channel = self._transport.open_session(
                window_size=CHANNEL_WINDOW, max_packet_size=MAX_PACKET, timeout=timeout
            )
            self.channel.settimeout(timeout)
            self.channel.exec_command(bootstrap(python))
            self._send_program(f"{len(data)}\n".encode() + data)
            self._await_marker(f"\n{marker}\n".encode(), python)
            self.channel.settimeout(None)
        except paramiko.ChannelException as error:
            raise SshError(
                f"the login node refuses a further session on this connection ({error}); its sshd must allow two "
                "(MaxSessions)"
            ) from error
        except (paramiko.SSHException, OSError, EOFError, ValueError) as error:
            self._close_channel()
            raise SshError(f"no program could be started on the login node: {error or 'it did not answer'}") from error

    def _send_program(self, data: bytes) -> None:
        assert self.channel is not None
        try:
            self.channel.sendall(data)
        except OSError:
            # A shell that found no Python may have ended already; its message is still in the channel and tells more.
            if not (self.channel.closed and self._transport.is_active()):
                raise

    def _await_marker(self, marker: bytes, python: str) -> None:
        assert self.channel is not None
        output = b""
        while marker not in output:
            data = self.channel.recv(64 << 10)
            output += data
            if not data or len(output) > MAX_SHELL_OUTPUT:
                message = (self._read_stderr() + output.decode(errors="replace")).strip()[-2000:]
                raise paramiko.SSHException(
                    f"{python} could not be run there (Python >= 3.9 is needed; SlurmService.ssh_python): "
                    + (message or "it printed no message")
                )
        self._early = list(self._frames.feed(output.partition(marker)[2]))
        while not self._early:
            data = self.channel.recv(64 << 10)
            if not data:
                raise EOFError("it ended at once")
            self._early = list(self._frames.feed(data))
        self.info = protocol.unpack(self._early.pop(0)[2])[0]

    def _read_stderr(self) -> str:
        assert self.channel is not None
        self.channel.settimeout(1)
        output = b""
        with contextlib.suppress(OSError):
            while len(output) < 64 << 10 and (data := self.channel.recv_stderr(64 << 10)):
                output += data
        return output.decode(errors="replace") + "\n"

    def _read(self) -> None:
        """Read frames until the channel ends. Runs in a thread of its own."""
        assert self.channel is not None
        reason = "it ended"
        try:
            while data := self.channel.recv(1 << 20):
                if frames := list(self._frames.feed(data)):
                    self._loop.call_soon_threadsafe(self._received, frames)
        except (OSError, EOFError, ValueError, paramiko.SSHException) as error:
            reason = str(error)
        self._outgoing.put(None)
        try:
            self._loop.call_soon_threadsafe(self._end, reason)
        except RuntimeError:
            self._log.debug("a channel to the login node ended after the service")

    def _write(self) -> None:
        """Write the queue until None. Runs in a thread of its own."""
        assert self.channel is not None
        last = False
        try:
            while not last:
                parts, size = [self._outgoing.get()], 0
                while parts[-1] is not None and size < _MAX_WRITE and not self._outgoing.empty():
                    size += len(parts[-1])
                    parts.append(self._outgoing.get())
                last = parts[-1] is None
                data = b"".join(part for part in parts if part is not None)
                if data:
                    self.channel.sendall(data)
            self.channel.shutdown_write()
        except (OSError, EOFError, paramiko.SSHException) as error:
            self._log.debug("a channel to the login node accepts no more data: %s", error)

    # -- On the loop --

    def start(self) -> None:
        """Begin to receive frames and to send signs of life; frames that arrived earlier are delivered at once."""
        for work, name in ((self._read, "read"), (self._write, "write")):
            threading.Thread(target=work, name=f"gateway_slurm-ssh-{name}", daemon=True).start()
        self._last_received = self._loop.time()
        self._heartbeat_timer = self._loop.call_later(self._heartbeat, self._on_heartbeat)
        if self._early:
            self._received(self._early)

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Queue one frame; the caller limits the queue."""
        self._outgoing.put(protocol.frame(kind, number, payload))

    def close(self) -> None:
        """Send the queued frames; then the program ends and ``on_end`` is called."""
        self._outgoing.put(None)

    def _received(self, frames: list[Frame]) -> None:
        self._last_received = self._loop.time()
        rest = [received for received in frames if received[0] != protocol.PONG]
        if rest and not self.ended:
            self._on_frames(rest)

    def _on_heartbeat(self) -> None:
        if self.ended:
            return
        silence = self._loop.time() - self._last_received
        if silence > 3 * self._heartbeat:
            self._end(f"nothing was received for {silence:.0f} s")
            # The whole connection is dead, not only this channel. Closing it waits for paramiko's thread.
            threading.Thread(target=self._transport.close, daemon=True).start()
            return
        self.send(protocol.PING, 0)
        self._heartbeat_timer = self._loop.call_later(self._heartbeat, self._on_heartbeat)

    def _end(self, reason: str) -> None:
        if self.ended:
            return
        self.ended = True
        if self._heartbeat_timer is not None:
            self._heartbeat_timer.cancel()
        self._outgoing.put(None)
        threading.Thread(target=self._close_channel, daemon=True).start()
        self._on_end(SshLost(f"the connection to the login node was lost: {reason}"))

    def _close_channel(self) -> None:
        if self.channel is not None:
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                self.channel.close()
