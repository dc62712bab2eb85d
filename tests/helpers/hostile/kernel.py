"""A kernel that its user has changed: cells reach its sockets as ``kernel``, or it never speaks on shell.

Run as ``python -m helpers.hostile.kernel -f CONNECTION_FILE``. With KERNEL_ANNOUNCE in its environment, each peer
that connects to its shell gets one ZMTP frame that announces so many bytes (RFC 23),
and zeros for as long as they are taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import zmq

from helpers.stub_kernel import DELIMITER, StubKernel

# Signature, version 3.0, mechanism NULL, as a server or not, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER"
LONG = 2


class HostileKernel(StubKernel):
    """Has its own ways to publish."""

    def __init__(self, connection: dict[str, Any]) -> None:
        self._announced = int(os.environ.get("KERNEL_ANNOUNCE", "0"))
        super().__init__(connection)
        self._names["kernel"] = self

    def _bind(self, connection: dict[str, Any], name: str, kind: int) -> zmq.Socket[bytes]:
        if name != "shell" or not self._announced:
            return super()._bind(connection, name, kind)
        path = f"{connection['ip']}-{connection['shell_port']}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(64)
        threading.Thread(target=self._announce_to_all, args=(listener,), daemon=True).start()
        other = self._context.socket(kind)  # the loop polls it, and no process sends to it
        other.bind(f"inproc://{uuid.uuid4().hex}")
        return other

    def _announce_to_all(self, listener: socket.socket) -> None:
        while True:
            client, _address = listener.accept()
            threading.Thread(target=self._announce, args=(client,), daemon=True).start()

    def _announce(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.sendall(GREETING + b"\x04" + bytes([len(READY)]) + READY)
            time.sleep(0.2)  # the other's greeting and READY come, and are not read
            # An empty delimiter-less message of one long frame.
            client.sendall(bytes([LONG]) + struct.pack(">Q", self._announced))
            piece = bytes(1 << 20)
            for _ in range(self._announced >> 20):
                client.sendall(piece)

    def forge(self, text: str, signature: str = "") -> None:
        """Publish a stream message with this signature."""
        header = {"msg_id": uuid.uuid4().hex, "msg_type": "stream", "session": "x", "username": "x", "version": "5.3"}
        header["date"] = "2026-01-01T00:00:00Z"
        parts = [json.dumps(part).encode() for part in (header, {}, {}, {"name": "stdout", "text": text})]
        with self._publishing:
            self._sockets["iopub"].send_multipart([b"stream", DELIMITER, signature.encode(), *parts])

    def flood(self, seconds: float, size: int) -> None:
        """Publish raw lines as fast as they go."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._publish("stream", {"name": "stdout", "text": "x" * size + "\n"}, {})


def main() -> None:
    """Run the kernel until shutdown_request."""
    kernel = HostileKernel(json.loads(Path(sys.argv[sys.argv.index("-f") + 1]).read_text()))
    with contextlib.suppress(KeyboardInterrupt):
        kernel.run()
    kernel.close()
    os._exit(0)


if __name__ == "__main__":
    main()
