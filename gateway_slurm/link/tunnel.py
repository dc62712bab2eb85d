"""The server's end of the tunnel: Unix sockets that stand for the channels of a kernel.

Clients connect to ``<prefix>-<n>`` (transport ``ipc``). Each connection is a stream over the launcher's link to the
same channel on the node. The sockets are in a 0700 directory, and their paths stay the same for the kernel's life,
restarts included. A connection outlives the link: without a link it waits, and on the next one it continues where it
was.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from gateway_slurm.errors import LinkError
from gateway_slurm.link import directories, flow, wire, zmtp
from gateway_slurm.link.server import Link

_log = logging.getLogger(__name__)
_DIRECTORY = re.compile(r"gs-server(\d+)-([0-9a-f]{6})-\w+")
STRAY_SLACK = 16 * flow.WINDOW
"""Bytes for streams that do not exist, after which a launcher breaks the protocol; more where streams have ended."""
LONGEST_SOCKET = "01234567-5"
"""The name of a socket: eight digits for the kernel, and the channel's number."""


def socket_places(setting: str) -> list[str]:
    """Where the directory of a server's sockets may be: in ``setting`` alone, or else in the first that works."""
    if setting:
        return [os.path.abspath(os.path.expanduser(setting))]
    # The session's directory is gone after the user's last logout (pam_systemd(8)), and so it is the last one.
    places = (os.environ.get("TMPDIR", ""), "/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR", ""))  # noqa: S108
    return [place for place in dict.fromkeys(places) if place]


def make_socket_directory(setting: str, *, clean: bool = True) -> str:
    """A new 0700 directory for this process's sockets, in the first of ``socket_places`` that works.

    With ``clean``, directories of the user's servers that were killed are removed. Raises LinkError, with each place
    and the reason.
    """
    for stale in stale_socket_directories(setting) if clean else ():
        shutil.rmtree(stale, ignore_errors=True)
    try:
        return directories.make_private(
            socket_places(setting), f"gs-server{os.getpid()}-{this_host()}-", LONGEST_SOCKET
        )
    except directories.NoDirectory as error:
        raise LinkError(
            f"{error} (on this server); make room there, or set SlurmService.tunnel_directory to a directory with room "
            "and a short path"
        ) from error


@functools.cache
def this_host() -> str:
    """Six digits for this host since its boot, and for this PID namespace: what a process id means (proc(5)).

    They are few because the path of a Unix socket has 107 bytes at most.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    identity = f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return hashlib.sha256(identity.encode()).hexdigest()[:6]


def pid_in(name: str) -> int | None:
    """The process that made the directory of this name; None for a directory of another host, or another kind.

    Hosts may share a file system, and a process id of one of them means nothing on the others.
    """
    match = _DIRECTORY.fullmatch(name)
    return int(match[1]) if match and match[2] == this_host() else None


def stale_socket_directories(setting: str) -> list[str]:
    """The directories of this user's servers on this host that no longer run; unreadable places are left out."""
    found = []
    for place in socket_places(setting):
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            found += [
                entry.path
                for entry in entries
                if (pid := pid_in(entry.name)) is not None
                and not os.path.exists(f"/proc/{pid}")
                and entry.is_dir(follow_symlinks=False)
                and entry.stat(follow_symlinks=False).st_uid == os.getuid()
            ]
    return found


class StreamEnd(Protocol):
    """The server's end of a stream."""

    paused: bool

    def from_kernel(self, data: bytes) -> None:
        """Bytes came; the owner calls ``Streams.took`` to give credit for more."""

    def read_on(self) -> None:
        """The link takes data again."""

    def end(self) -> None:
        """The launcher closed the stream."""

    def abort(self) -> None:
        """The launcher broke the protocol."""


class Streams:
    """All tunnel streams of one launcher, over all its links. ``end()`` closes them for good."""

    def __init__(self, link: Callable[[], Link | None]) -> None:
        self._link = link
        self._numbers = itertools.count(1)
        self._clients: dict[int, StreamEnd] = {}
        self._over = False
        # By this id the launcher tells this server's stream numbers from those of an earlier server.
        self._session = secrets.token_hex(8)
        self._outbox = flow.Outbox()
        # Bytes that may still come for streams that have ended here: those that were on the way.
        self._stray_bytes = STRAY_SLACK

    @property
    def over(self) -> bool:
        """Whether the launcher is gone for good."""
        return self._over

    # -- links come and go ------------------------------------------------------------------

    def attach(self, link: Link) -> dict[str, Any]:
        """Let ``link`` carry the streams after its REPORT; return the fields of WELCOME that describe them."""
        self.hold()
        link.outbox = self._outbox
        return {"session": self._session, "streams": self._outbox.positions()}

    def resume(self, report: dict[str, Any]) -> None:
        """Continue from the positions in a REPORT, which are not trusted."""
        for number in self._outbox.resume(report.get("streams"), report.get("opened")):
            self._end(number)
        self._flush()
        self.read_on()

    def hold(self) -> None:
        """The link is gone: the streams wait. A client waits once it has sent a little more."""
        self._outbox.hold()

    def end(self) -> None:
        """The launcher and its kernels are gone for good."""
        self._over = True
        for number in list(self._clients):
            self._end(number)
        self._outbox.forget_streams()

    def _flush(self) -> None:
        link = self._link()
        if link is not None:
            link.flush()

    # -- messages of the launcher -----------------------------------------------------------

    def message(self, name: str, number: int, payload: bytes) -> None:
        """DATA, CREDIT or CLOSE from the launcher. Raises WireError for one that breaks the protocol."""
        if name == "CREDIT":
            self._outbox.credit(number, flow.credit_of(payload))
            self._flush()
        elif name == "DATA":
            self._data(number, payload)
        else:
            self._outbox.closed(number)
            self._end(number)
            self._flush()

    def _data(self, number: int, payload: bytes) -> None:
        client = self._clients.get(number)
        if client is None:
            self._stray_bytes -= len(payload) + 1
            if self._stray_bytes < 0:
                raise wire.WireError("data for streams that do not exist")
            return
        try:
            self._outbox.arrived(number, len(payload))
        except wire.WireError:
            client.abort()
            return
        client.from_kernel(payload)

    def _end(self, number: int) -> None:
        client = self._clients.pop(number, None)
        if client is not None:
            self._stray_bytes += flow.WINDOW
            client.end()

    # -- clients ---------------------------------------------------------------------------

    def open(self, client: StreamEnd, kernel_id: str, channel: str) -> int | None:
        """Open a stream for ``client``; return its number, or None if the launcher is gone for good."""
        if self._over:
            return None
        number = next(self._numbers)
        self._clients[number] = client
        self._outbox.open(number, f"{kernel_id}\0{channel}".encode())
        self._flush()
        return number

    def send(self, number: int, data: bytes) -> bool:
        """Queue data of a client; return whether the caller may read more from the client."""
        more = self._outbox.data(number, data)
        self._flush()
        return more

    def took(self, number: int, count: int) -> None:
        """The client's socket took ``count`` bytes."""
        self._outbox.took(number, count)
        self._flush()

    def close(self, number: int) -> None:
        """The client has gone."""
        if self._clients.pop(number, None) is not None:
            self._stray_bytes += flow.WINDOW
        self._outbox.close(number)
        self._flush()

    def read_on(self) -> None:
        """The link took data: resume reading from paused clients."""
        for number, client in list(self._clients.items()):
            if client.paused and self._outbox.may_read(number):
                client.read_on()


class Client(asyncio.Protocol):
    """One client's connection to one channel's Unix socket."""

    def __init__(self, tunnel: KernelTunnel, channel: str) -> None:
        self._tunnel = tunnel
        self._channel = channel
        self._number: int | None = None
        self._writable = True
        self._untaken = 0
        self._sizes = zmtp.MessageSizes()
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=flow.CREDIT_STEP)
        self._tunnel.clients.add(self)
        self._number = self._tunnel.streams.open(self, self._tunnel.kernel_id, self._channel)
        if self._number is None:
            transport.close()

    def data_received(self, data: bytes) -> None:
        if self._number is not None and not self._tunnel.streams.send(self._number, data):
            self.paused = True
            self._transport.pause_reading()

    def read_on(self) -> None:
        self.paused = False
        self._transport.resume_reading()

    def from_kernel(self, data: bytes) -> None:
        """Bytes for the client; credit goes back once its socket has taken them.

        A message that is too large is not passed on: the connection ends, and the client, which makes a new one, has
        its bytes no more.
        """
        if trouble := self._sizes.feed(data):
            _log.warning("kernel %s: a connection of %s is closed: %s", self._tunnel.kernel_id, self._channel, trouble)
            self._close_stream()
            self._transport.abort()
            return
        self._transport.write(data)
        self._untaken += len(data)
        if self._writable:
            self._took()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._took()

    def _took(self) -> None:
        if self._number is not None:
            self._tunnel.streams.took(self._number, self._untaken)
        self._untaken = 0

    def end(self) -> None:
        """The kernel closed the connection; its earlier data still reaches the client."""
        self._number = None
        self._transport.close()

    def abort(self) -> None:
        """The launcher broke the protocol."""
        self._transport.abort()

    def close(self) -> None:
        """The server closes the connection; earlier data still reaches the client and the kernel."""
        self._close_stream()
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._tunnel.clients.discard(self)
        self._close_stream()

    def _close_stream(self) -> None:
        number, self._number = self._number, None
        if number is not None:
            self._tunnel.streams.close(number)


class KernelTunnel:
    """The five Unix sockets of one kernel. ``close()`` ends them and their connections."""

    def __init__(self, streams: Streams, kernel_id: str, prefix: str) -> None:
        self.streams = streams
        self.kernel_id = kernel_id
        self.prefix = prefix
        self.clients: set[Client] = set()
        self._servers: list[asyncio.AbstractServer] = []

    @property
    def ports(self) -> dict[str, int]:
        """The numbers that Jupyter joins to the prefix with a hyphen (transport ``ipc``)."""
        return {channel: number for number, channel in enumerate(wire.CHANNELS, 1)}

    async def listen(self) -> None:
        """Listen on all five paths. After a restart call it again: the kernel manager has unlinked them.

        Raises LinkError.
        """
        self._close_servers()
        loop = asyncio.get_running_loop()
        try:
            for channel, number in self.ports.items():
                path = f"{self.prefix}-{number}"
                self._servers.append(await loop.create_unix_server(partial(Client, self, channel), path))
        except OSError as error:
            self._close_servers()
            directory = os.path.dirname(self.prefix)
            reason = directories.why(directory, error)
            raise LinkError(
                f"the tunnel's sockets cannot be made in {directories.shown(directory)} on this server: {reason}; make "
                "room there, or set SlurmService.tunnel_directory and restart this server"
            ) from error

    def close(self) -> None:
        self._close_servers()
        for client in list(self.clients):
            client.close()

    def _close_servers(self) -> None:
        """Stop listening, and remove the sockets that the kernel manager has not removed already."""
        while self._servers:
            self._servers.pop().close()
        for number in self.ports.values():
            with contextlib.suppress(OSError):
                os.unlink(f"{self.prefix}-{number}")
