"""Whether a kernel's ports speak CurveZMQ: the mechanism in the greeting of ZMTP 3 (rfc.zeromq.org/spec/23).

The check sends a signature and a version, as a peer does first, and gets a greeting that names the mechanism. It sends
nothing else and resets the connection, which never becomes a peer of the kernel's socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from launchers.reactor import READ, WRITE, Reactor

# The signature and the major version, as a ZMTP peer sends them first.
OPENING = b"\xff" + bytes(8) + b"\x7f\x03"
SIGNATURE_END, VERSION_BYTE, MECHANISM = 9, 10, slice(12, 32)
# libzmq answers from its own thread, however busy the kernel is.
ANSWER_SECONDS = 5.0


def mechanism(greeting: bytes) -> str | None:
    """The mechanism in a greeting; None while it is incomplete. Raises ValueError where it is no greeting of ZMTP 3."""
    if greeting[:1] not in (b"", b"\xff") or not all(byte & 1 for byte in greeting[SIGNATURE_END:VERSION_BYTE]):
        raise ValueError("it does not speak ZMTP")
    if any(version < 3 for version in greeting[VERSION_BYTE : VERSION_BYTE + 1]):
        raise ValueError("it speaks a version of ZMTP without encryption")
    if len(greeting) < MECHANISM.stop:
        return None
    return greeting[MECHANISM].rstrip(b"\x00").decode("ascii", "replace")


class Refusal(NamedTuple):
    """Why a port did not pass. The ``kind`` is FAILED's: ``plain`` where it showed that it speaks something else than
    CurveZMQ, ``no_greeting`` where it did not answer, which a stopped or swapping node does not do either.
    """

    kind: str
    why: str


class CurveCheck:
    """Reads the greeting of each port. ``done`` gets the first refusal, or None if all of them speak CurveZMQ; once."""

    def __init__(
        self, reactor: Reactor, ip: str, ports: Mapping[str, int], done: Callable[[Refusal | None], None]
    ) -> None:
        self._reactor, self._done = reactor, done
        self._received: dict[socket.socket, bytes] = {}
        late = Refusal("no_greeting", f"no greeting within {ANSWER_SECONDS:g} s")
        self._timer = reactor.later(ANSWER_SECONDS, lambda: self._end(late))
        for channel, port in ports.items():
            sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
            self._received[sock] = b""
            sock.setblocking(False)
            sock.connect_ex((ip, port))  # an error shows when the socket is ready
            reactor.watch(sock, WRITE, partial(self._opened, channel, sock))

    def _opened(self, channel: str, sock: socket.socket, _events: int) -> None:
        try:
            sock.send(OPENING)  # a few bytes into an empty buffer
        except OSError as error:
            self._end(Refusal("no_greeting", f"{channel}: {os.strerror(error.errno or 0)}"))
            return
        self._reactor.watch(sock, READ, partial(self._read, channel, sock))

    def _read(self, channel: str, sock: socket.socket, _events: int) -> None:
        try:
            data = sock.recv(64)
            received = self._received[sock] = self._received[sock] + data
            found = mechanism(received)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(Refusal("no_greeting", f"{channel}: {error}"))
            return
        except ValueError as error:
            self._end(Refusal("plain", f"{channel}: {error}"))
            return
        if found == "CURVE":
            self._close(sock)
            if not self._received:
                self._end(None)
        elif found is not None:
            self._end(Refusal("plain", f"{channel} speaks ZMTP with the mechanism {found!r}"))
        elif not data:
            self._end(Refusal("no_greeting", f"{channel} closed the connection"))

    def _close(self, sock: socket.socket) -> None:
        del self._received[sock]
        self._reactor.forget(sock)
        with contextlib.suppress(OSError):
            # A reset leaves no TIME_WAIT at the port of a kernel that is started again (socket(7), SO_LINGER).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    def _end(self, refusal: Refusal | None) -> None:
        is_first = not self._timer.cancelled
        self.close()
        if is_first:
            self._done(refusal)

    def close(self) -> None:
        """Close the connections; ``done`` is not called any more."""
        self._timer.cancel()
        for sock in list(self._received):
            self._close(sock)
