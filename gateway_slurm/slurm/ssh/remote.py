"""A program on the login node, at the other end of a channel of its own: frames down, frames up."""

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
from gateway_slurm.slurm.ssh.login_node import common
from gateway_slurm.slurm.ssh.login_node.common import Frames, frame, unpack

Frame = tuple[int, int, bytes]

MODULES: Final = ("common", "commands", "relay", "main")
CHANNEL_WINDOW: Final = 8 << 20  # bytes that the login node may send before it hears that we took some
MAX_PACKET: Final = 128 << 10  # bytes; each costs Python the same, however long
MAX_NOISE: Final = 256 << 10  # bytes that a login shell may print before the program begins
_WRITE_AT_ONCE: Final = 256 << 10
_PYTHON: Final = re.compile(r"[A-Za-z0-9_./+-]+", re.ASCII)

# All that is in a command line there: nothing of it depends on what is asked, and every login shell reads it alike.
_BOOTSTRAP: Final = "exec {python} -I -c 'import sys;s=sys.stdin.buffer;exec(s.read(int(s.readline())))'"
_LOADER: Final = """\
import sys, types
for name, source in SOURCES.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
"""


@cache
def program_text() -> str:
    """The modules as one text, which registers them under their own names."""
    package = "gateway_slurm.slurm.ssh.login_node"
    directory = Path(common.__file__).parent
    sources = {"gateway_slurm": "", "gateway_slurm.slurm.ssh": "", package: ""}
    sources |= {f"{package}.{name}": (directory / f"{name}.py").read_text() for name in MODULES}
    return f"SOURCES = {sources!r}\n{_LOADER}"


def bootstrap(python: str) -> str:
    """The command line that reads the program from its standard input. Raises ValueError for a strange ``python``."""
    if not _PYTHON.fullmatch(python):
        raise ValueError(f"{python!r} is no path of a Python: letters, digits and _ . / + - only")
    return _BOOTSTRAP.format(python=python)


class RemoteProgram:
    """One program on the login node. Its owner calls ``close``; it ends by itself when its channel does.

    ``on_frames`` and ``on_end`` are called on the loop that ``start`` was called on; ``info`` is what the program
    says of itself. A program from which nothing is heard for three beats is given up, and its connection with it.
    """

    def __init__(
        self,
        transport: paramiko.Transport,
        *,
        on_frames: Callable[[list[Frame]], None],
        on_end: Callable[[SshError], None],
        log: logging.Logger,
    ) -> None:
        self._transport, self._on_frames, self._on_end, self._log = transport, on_frames, on_end, log
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._early: list[Frame] = []
        self._ended = False
        self._heard = self._loop.time()
        self._beat: asyncio.TimerHandle | None = None
        self.channel: paramiko.Channel | None = None
        self.info: dict[str, Any] = {}

    # -- in a worker thread --------------------------------------------------------------------------------

    def open(self, mode: str, *, python: str, heartbeat: float, timeout: float) -> None:
        """Start it, and return once it is there. Raises SshError, which holds what the login node said instead."""
        marker = f"gateway_slurm-{secrets.token_hex(16)}"
        entry = "sys.modules['gateway_slurm.slurm.ssh.login_node.main'].main"
        text = f"{program_text()}\n{entry}{(marker, mode, 3 * heartbeat)!r}\n"
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
                f"the login node opens no further session on this connection ({error}); its sshd must allow two "
                "(MaxSessions)"
            ) from error
        except (paramiko.SSHException, OSError, EOFError, ValueError) as error:
            self._close_channel()
            raise SshError(f"no program could be started on the login node: {error or 'it did not answer'}") from error

    def _send_program(self, data: bytes) -> None:
        """A shell that found no Python may be gone by now: what it said is still to be read, and tells more."""
        assert self.channel is not None
        try:
            self.channel.sendall(data)
        except OSError:
            if not (self.channel.closed and self._transport.is_active()):
                raise

    def _await_marker(self, marker: bytes, python: str) -> None:
        assert self.channel is not None
        seen = b""
        while marker not in seen:
            data = self.channel.recv(64 << 10)
            seen += data
            if not data or len(seen) > MAX_NOISE:
                said = (self._said_on_stderr() + seen.decode(errors="replace")).strip()[-2000:]
                raise paramiko.SSHException(
                    f"{python} could not be run there (Python >= 3.9 is needed; SlurmService.ssh_python): "
                    + (said or "it said nothing")
                )
        self._early = list(self._frames.feed(seen.partition(marker)[2]))
        while not self._early:
            data = self.channel.recv(64 << 10)
            if not data:
                raise EOFError("it ended at once")
            self._early = list(self._frames.feed(data))
        self.info = unpack(self._early.pop(0)[2])[0]

    def _said_on_stderr(self) -> str:
        assert self.channel is not None
        self.channel.settimeout(1)
        said = b""
        try:
            while len(said) < 64 << 10 and (data := self.channel.recv_stderr(64 << 10)):
                said += data
        except OSError:
            pass
        return said.decode(errors="replace") + "\n"

    def _read(self) -> None:
        """Reads until the end; runs in a thread of its own."""
        assert self.channel is not None
        trouble = "it ended"
        try:
            while data := self.channel.recv(1 << 20):
                if found := list(self._frames.feed(data)):
                    self._loop.call_soon_threadsafe(self._take, found)
        except (OSError, EOFError, ValueError, paramiko.SSHException) as error:
            trouble = str(error)
        self._outgoing.put(None)
        self._tell(lambda: self._end(trouble))

    def _write(self) -> None:
        """Writes what is queued, until None comes; runs in a thread of its own."""
        assert self.channel is not None
        last = False
        try:
            while not last:
                parts, size = [self._outgoing.get()], 0
                while parts[-1] is not None and size < _WRITE_AT_ONCE and not self._outgoing.empty():
                    size += len(parts[-1])
                    parts.append(self._outgoing.get())
                last = parts[-1] is None
                data = b"".join(part for part in parts if part is not None)
                if data:
                    self.channel.sendall(data)
            self.channel.shutdown_write()
        except (OSError, EOFError, paramiko.SSHException) as error:
            self._log.debug("a channel to the login node takes nothing more: %s", error)

    def _tell(self, act: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(act)
        except RuntimeError:
            self._log.debug("a channel to the login node ended after the service")

    # -- on the loop ---------------------------------------------------------------------------------------

    def start(self, heartbeat: float) -> None:
        """Let frames come in, and signs of life go out; what came before is told at once."""
        for act, name in ((self._read, "read"), (self._write, "write")):
            threading.Thread(target=act, name=f"gateway_slurm-ssh-{name}", daemon=True).start()
        self._heard = self._loop.time()
        self._schedule(heartbeat)
        if self._early:
            self._take(self._early)

    @property
    def ended(self) -> bool:
        """Whether nothing comes of it any more."""
        return self._ended

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Queue one frame; how much is queued is the caller's to bound."""
        self._outgoing.put(frame(kind, number, payload))

    def close(self) -> None:
        """What was sent still goes out; then the program ends, and ``on_end`` is called."""
        self._outgoing.put(None)

    def _take(self, found: list[Frame]) -> None:
        self._heard = self._loop.time()
        rest = [each for each in found if each[0] != common.PONG]
        if rest and not self._ended:
            self._on_frames(rest)

    def _schedule(self, heartbeat: float) -> None:
        self._beat = self._loop.call_later(heartbeat, self._beat_once, heartbeat)

    def _beat_once(self, heartbeat: float) -> None:
        if self._ended:
            return
        silent = self._loop.time() - self._heard
        if silent > 3 * heartbeat:
            self._end(f"nothing heard for {silent:.0f} s")
            # The others on this connection hear nothing either. Closing waits for paramiko's thread.
            threading.Thread(target=self._transport.close, daemon=True).start()
            return
        self.send(common.PING, 0)
        self._schedule(heartbeat)

    def _end(self, trouble: str) -> None:
        if self._ended:
            return
        self._ended = True
        if self._beat is not None:
            self._beat.cancel()
        self._outgoing.put(None)
        threading.Thread(target=self._close_channel, daemon=True).start()
        self._on_end(SshLost(f"the connection to the login node was lost: {trouble}"))

    def _close_channel(self) -> None:
        if self.channel is not None:
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                self.channel.close()
