"""Where messages end in ZMTP, so that one of ours can go between two of the kernel's on iopub.

A pure observer of ZMTP 3.x (ZeroMQ RFC 23 and 37), mechanism NULL: bytes pass it unchanged, cut anywhere,
and it keeps where it is in them, not the bytes. A connection that it does not understand it leaves alone
from there on: its bytes still pass, and nothing is put between them.

A direction of a connection is a greeting of 64 bytes, then frames. A frame is a byte of flags (MORE 1,
LONG 2, COMMAND 4, the others zero), its body's size in one byte, or in eight where it is LONG, and the
body. The first frame is the command READY; a message ends with its first frame that has no MORE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway_slurm.link.zmtp_frames import (
    COMMAND,
    DELIMITER,
    GREETING_BYTES,
    HEADER_FRAME,
    LONG,
    MORE,
    PARENT_FRAME,
    encode_frame,
)

_SIGNATURE = b"\xff", b"\x7f"  # the first and the tenth byte; between them is padding (RFC 23)
_MECHANISM = b"NULL".ljust(20, b"\0")
# A command is kept up to this size: READY holds a socket type and an identity.
_COMMAND_LIMIT = 512
# A header has six short fields; one that is larger than this is not kept.
HEADER_LIMIT = 4096
# Messages of ours that wait for the end of one of the kernel's; the oldest goes where there are more.
WAITING_LIMIT = 8

Build = Callable[[bytes], Sequence[bytes]]
"""Makes the frames of a message for a parent header, as it was on the wire; empty when there is none."""


def encode_message(frames: Sequence[bytes]) -> bytes:
    """One multipart message as it goes over a connection."""
    last = len(frames) - 1
    return b"".join(encode_frame(MORE if number < last else 0, frame) for number, frame in enumerate(frames))


class _NotUnderstoodError(Exception):
    """Not what the RFC says, or what this module knows of it."""


class Walk:
    """Walks over one direction of a connection. Subclasses say which bodies they want, and get those."""

    def __init__(self) -> None:
        self.understood = True
        # Whether the handshake is over and what was fed so far ends between two messages.
        self.between = False
        self._ready = False
        self._inside = False  # a message whose last frame has not begun
        self._head = b""  # what has arrived of the greeting, or of a frame's flags and size
        self._head_bytes = GREETING_BYTES
        self._flags = 0
        self._left = 0  # what the frame's body still lacks
        self._kept: bytearray | None = None

    def feed(self, data: bytes) -> int | None:
        """Walk over what arrived; return the place in ``data`` after the first message that ends in it."""
        if not self.understood:
            return None
        try:
            return self._walk(data)
        except _NotUnderstoodError:
            self.understood = self.between = False
            self._head, self._kept = b"", None
            return None

    def _walk(self, data: bytes) -> int | None:
        first = None
        at, end = 0, len(data)
        while at < end:
            # Until a frame ends here no message can.
            self.between = False
            at = self._body(data, at) if self._left else self._header(data, at)
            if self._left == 0 and not self._head and self._end_frame() and first is None:
                first = at
        return first

    def _body(self, data: bytes, at: int) -> int:
        step = min(self._left, len(data) - at)
        if self._kept is not None:
            self._kept += data[at : at + step]
        self._left -= step
        return at + step

    def _header(self, data: bytes, at: int) -> int:
        """Collect the greeting, or flags and size. Once these are whole, ``_head`` is empty again."""
        if not self._head and self._head_bytes == 2 and data[at] & LONG:
            self._head_bytes = 9
        taken = data[at : at + self._head_bytes - len(self._head)]
        self._head += taken
        if len(self._head) == self._head_bytes:
            head, self._head, self._head_bytes = self._head, b"", 2
            self._begin_frame(head) if len(head) < GREETING_BYTES else self._greeting(head)
        return at + len(taken)

    def _greeting(self, head: bytes) -> None:
        if (head[:1], head[9:10]) != _SIGNATURE or head[10] != 3 or head[12:32] != _MECHANISM:
            raise _NotUnderstoodError
        self._flags, self._kept = COMMAND, None

    def _begin_frame(self, head: bytes) -> None:
        flags = self._flags = head[0]
        size = self._left = int.from_bytes(head[1:], "big")
        if flags > MORE | LONG | COMMAND or flags & (COMMAND | MORE) == COMMAND | MORE or size >> 63:
            raise _NotUnderstoodError
        if flags & COMMAND:
            wanted = size <= _COMMAND_LIMIT
        elif self._ready:
            wanted = self.wants(size)
        else:
            raise _NotUnderstoodError
        self._kept = bytearray() if wanted else None

    def _end_frame(self) -> bool:
        """Whether a message ended with this frame."""
        body, self._kept = self._kept, None
        if self._flags & COMMAND:
            if body is not None:
                self._command(bytes(body))
            # A heartbeat's PING may come between the frames of a message (libzmq; RFC 37).
            self.between = self._ready and not self._inside
            return False
        self._inside = bool(self._flags & MORE)
        self.between = not self._inside
        self.frame(None if body is None else bytes(body), last=self.between)
        return self.between

    def _command(self, body: bytes) -> None:
        size = body[0] if body else 0
        name, rest = body[1 : 1 + size], body[1 + size :]
        if name == b"READY":
            self._ready = True
        self.command(name, rest)

    # -- for subclasses ---------------------------------------------------------------------

    def wants(self, size: int) -> bool:
        """Whether the body of this message frame is to be kept for ``frame``."""
        return False

    def frame(self, body: bytes | None, *, last: bool) -> None:
        """A message frame has ended; ``body`` is None where it was not wanted."""

    def command(self, name: bytes, rest: bytes) -> None:
        """A command has arrived."""


class Subscriptions(Walk):
    """What a client sends on iopub: whether it subscribed to everything.

    ZMTP 3.0 subscribes by a message, 1 (or 0 to cancel) and the topic; 3.1 by the commands SUBSCRIBE and
    CANCEL. Jupyter's clients subscribe to the empty topic; a client library sends it once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.everything = False

    def wants(self, size: int) -> bool:
        return size == 1

    def frame(self, body: bytes | None, *, last: bool) -> None:
        if last and body in (b"\0", b"\1"):
            self.everything = body == b"\1"

    def command(self, name: bytes, rest: bytes) -> None:
        if name in (b"SUBSCRIBE", b"CANCEL") and not rest:
            self.everything = name == b"SUBSCRIBE"


class LastCell:
    """The cell of a kernel that began last, as some connection to it saw it: its request's header."""

    def __init__(self) -> None:
        self.header = b""


class Publications(Walk):
    """What a kernel publishes: notes the header of the last cell's request.

    Frontends show a stream under the cell whose ``execute_request`` is its parent; a kernel publishes
    ``execute_input`` at the start of each, but not for requests that are silent, which have no cell.
    """

    def __init__(self, last_cell: LastCell) -> None:
        super().__init__()
        self._last_cell = last_cell
        self._here = b""
        self._place: int | None = None  # frames since the delimiter
        self._cell_begins = False

    @property
    def parent(self) -> bytes:
        """The header of the last cell that began in this stream.

        Where the client came after that, of the last that others saw begin. A client that reads slowly is
        at an older cell than others are, and at that place in its stream what belongs to it is shown there.
        """
        return self._here or self._last_cell.header

    def wants(self, size: int) -> bool:
        if self._place is None:
            return size == len(DELIMITER)
        place = self._place + 1
        return size <= HEADER_LIMIT and (place == HEADER_FRAME or (place == PARENT_FRAME and self._cell_begins))

    def frame(self, body: bytes | None, *, last: bool) -> None:
        if self._place is not None:
            self._place += 1
            if body is not None:
                self._of_message(body)
        elif body == DELIMITER:
            self._place = 0
        if last:
            self._place, self._cell_begins = None, False

    def _of_message(self, body: bytes) -> None:
        if self._place == HEADER_FRAME:
            self._cell_begins = b'"execute_input"' in body
        else:
            self._here = self._last_cell.header = body


class Iopub:
    """One client's iopub connection, into which messages can be put between the kernel's own."""

    def __init__(self, last_cell: LastCell) -> None:
        self._to_client = Publications(last_cell)
        self._to_kernel = Subscriptions()
        self._waiting: list[Build] = []

    def from_client(self, data: bytes) -> None:
        """See what goes to the kernel."""
        self._to_kernel.feed(data)

    def from_kernel(self, data: bytes) -> bytes:
        """What goes to the client for ``data``: the same, and what waited where the first message ends."""
        place = self._to_client.feed(data)
        if place is None or not self._waiting:
            return data
        return data[:place] + self._waited() + data[place:]

    def insert(self, build: Build) -> bytes | None:
        """Put a message into the stream: what is to be written now, which is nothing inside a message.

        None when the client takes none: it did not subscribe to everything, or is not understood.
        """
        if not (self._to_client.understood and self._to_kernel.everything):
            return None
        self._waiting = [*self._waiting, build][-WAITING_LIMIT:]
        return self._waited() if self._to_client.between else b""

    def _waited(self) -> bytes:
        builds, self._waiting = self._waiting, []
        return b"".join(encode_message(build(self._to_client.parent)) for build in builds)
