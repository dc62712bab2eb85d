"""The launcher's end of the tunnel: one local socket, or one reader of a kernel's journal, for each stream.

Streams belong to one server process, not to one link: without a link they wait, and continue on the next one.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway_slurm.link import flow, wire
from launchers.kernel import Kernel
from launchers.reactor import READ, WRITE, Reactor
from launchers.uplink import Uplink

if TYPE_CHECKING:
    from launchers.journal import Journal
    from launchers.readers import Reader


class Stream:
    """Bytes in both directions between one client's connection and one channel of a kernel."""

    def __init__(self, number: int, sock: socket.socket, kernel: Kernel) -> None:
        self.number = number
        self.sock = sock
        self.kernel = kernel  # the process at the other end
        self.ended = False  # that process has ended
        self.to_kernel: deque[bytes] = deque()
        self.closing = False
        self.wanted = 0


class Tunnel:
    """All tunnel streams of this launcher. The iopub of a kernel that has a journal is read from there."""

    def __init__(
        self,
        reactor: Reactor,
        uplink: Uplink,
        find_kernel: Callable[[str], Kernel | None],
        find_journal: Callable[[str], Journal | None],
    ) -> None:
        self._reactor, self._uplink = reactor, uplink
        self._find_kernel, self._find_journal = find_kernel, find_journal
        self._streams: dict[int, Stream] = {}
        self._readers: dict[int, Reader] = {}
        self._session = ""  # of the server process that opened the streams
        self._opened = 0  # the last stream number that it opened

    def is_same_server(self, welcome: dict[str, Any]) -> bool:
        """Whether this is the server process of the last link."""
        return bool(welcome["session"] == self._session)

    def link_up(self, welcome: dict[str, Any]) -> dict[str, Any]:
        """Continue the streams of this server; return the fields of REPORT that describe them.

        Another server process knows none of the streams, so they are dropped. A stream whose client has gone is closed;
        for a stream that is closed here already the server gets a CLOSE.
        """
        if not self.is_same_server(welcome):
            self._session, self._opened = welcome["session"], 0
            for stream in list(self._streams.values()):
                self._drop(stream)
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()
            self._uplink.outbox.forget_streams()
        report = {"streams": self._uplink.outbox.positions(), "opened": self._opened}
        for number in self._uplink.outbox.resume(welcome["streams"]):
            self._finish(number)
        return report

    def open(self, number: int, payload: bytes) -> None:
        """A client connected at the server: connect to the kernel's channel here."""
        self._opened = number
        kernel_id, _nul, channel = (part.decode(errors="replace") for part in payload.partition(b"\0"))
        kernel, journal = self._find_kernel(kernel_id), self._find_journal(kernel_id)
        self._uplink.outbox.open(number)
        try:
            if channel.startswith(wire.JOURNAL) or (channel == "iopub" and journal is not None):
                self._open_reader(number, journal, channel)
                return
            if kernel is None or channel not in wire.CHANNELS:
                raise ConnectionRefusedError("no such channel")
            stream = Stream(number, kernel.connect(channel), kernel)
            self._streams[number] = stream
            self._update(stream)
        except (OSError, ValueError):
            # The server closes the client's connection, and the client tries again, as after any refused connection.
            self._uplink.outbox.close(number)
            self._uplink.flush()

    def _open_reader(self, number: int, journal: Journal | None, channel: str) -> None:
        # Loaded while the kernel starts (``Kernel.start``), because it takes 10 ms.
        from launchers.journal import MAX_READERS
        from launchers.readers import ClientReader, ServerReader

        if journal is None or len(journal.readers) >= MAX_READERS:
            raise ConnectionRefusedError("no journal, or no room for another reader")
        where = journal, self._uplink.outbox, self._uplink.flush, number
        reader: Reader = ClientReader(*where) if channel == "iopub" else ServerReader(*where, channel)
        self._readers[number] = reader
        reader.pump()

    def data(self, number: int, payload: bytes) -> None:
        stream = self._streams.get(number)
        if stream is None:
            if number in self._readers:
                self._readers[number].data(payload)
            return
        try:
            self._uplink.outbox.arrived(number, len(payload))
        except wire.WireError:
            self._end(stream)
            return
        stream.to_kernel.append(payload)
        if stream.ended:
            self._discard(stream)
        else:
            self._write(stream)

    def credit(self, number: int, payload: bytes) -> None:
        self._uplink.outbox.credit(number, flow.credit_of(payload))

    def close(self, number: int, _payload: bytes = b"") -> None:
        """The client has gone: its data still goes to the kernel, then the socket closes."""
        self._uplink.outbox.closed(number)
        self._finish(number)

    def _finish(self, number: int) -> None:
        reader = self._readers.pop(number, None)
        if reader is not None:
            reader.close()
        stream = self._streams.get(number)
        if stream is not None:
            stream.closing = True
            self._write(stream)

    def close_ended(self) -> None:
        """Close the streams whose kernel's process has ended, after what it had still sent.

        The socket's other end may be held by a process that the kernel left behind: nothing is sent there any more.
        """
        for stream in list(self._streams.values()):
            if not stream.ended and not stream.kernel.runs:
                stream.ended = True
                self._discard(stream)
                if stream.closing:
                    self._drop(stream)
                else:
                    self._reactor.forget(stream.sock)
                    self._read_rest(stream)

    def _read_rest(self, stream: Stream) -> None:
        """Read what a process sent before its end, as far as the server has room for it, and then close the stream."""
        while stream.number in self._streams and self._uplink.outbox.may_read(stream.number):
            try:
                data = stream.sock.recv(flow.CHUNK)
            except OSError:  # also: nothing is left
                data = b""
            self._pass_on(stream, data)

    def _pass_on(self, stream: Stream, data: bytes) -> None:
        """Send the server what the kernel has sent; nothing is the end of the stream."""
        if not data:
            self._end(stream)
            return
        self._uplink.outbox.data(stream.number, data)
        self._uplink.flush()

    def _discard(self, stream: Stream) -> None:
        for chunk in stream.to_kernel:
            self._uplink.outbox.took(stream.number, len(chunk))
        stream.to_kernel.clear()

    def read_on(self) -> None:
        """The link took data, or it broke and more data may wait: resume reading from paused sockets."""
        for stream in list(self._streams.values()):
            if stream.ended:
                self._read_rest(stream)
            elif not stream.wanted & READ:
                self._update(stream)
        for reader in list(self._readers.values()):
            reader.pump()

    def _on_ready(self, stream: Stream, events: int) -> None:
        if events & WRITE:
            self._write(stream)
        if events & READ and stream.number in self._streams:
            self._read(stream)

    def _read(self, stream: Stream) -> None:
        try:
            data = stream.sock.recv(flow.CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._pass_on(stream, data)
        if stream.number in self._streams:
            self._update(stream)

    def _write(self, stream: Stream) -> None:
        try:
            while stream.to_kernel:
                chunk = stream.to_kernel[0]
                sent = stream.sock.send(chunk)
                self._uplink.outbox.took(stream.number, sent)
                if sent < len(chunk):
                    stream.to_kernel[0] = chunk[sent:]
                else:
                    stream.to_kernel.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._end(stream)
            return
        if stream.closing and not stream.to_kernel:
            self._drop(stream)
        else:
            self._update(stream)

    def _update(self, stream: Stream) -> None:
        wanted = WRITE if stream.to_kernel else 0
        if not stream.closing and self._uplink.outbox.may_read(stream.number):
            wanted |= READ
        if wanted != stream.wanted:
            stream.wanted = wanted
            self._reactor.watch(stream.sock, wanted, lambda events: self._on_ready(stream, events))

    def _end(self, stream: Stream) -> None:
        """The kernel closed the connection: CLOSE follows the data that is queued."""
        self._drop(stream)
        self._uplink.outbox.close(stream.number)
        self._uplink.flush()

    def _drop(self, stream: Stream) -> None:
        self._streams.pop(stream.number, None)
        self._reactor.forget(stream.sock)
        stream.sock.close()
