"""Frontends of one kernel in their own process, which read as fast as they can and parse next to nothing.

``python -m bench.frontends URL TOKEN KERNEL_ID COUNT`` opens the websockets and prints a line. Then each line of its
input is a JSON object: the first frontend runs ``code``, and when all of them have received its end, the answer is a
line with the ``seconds`` from the request on, the bytes and printed lines that each frontend has received, and the last
text that was printed. With ``announce`` it prints a line before that, when the first frontend has received so many
bytes.
"""

from __future__ import annotations

import json
import selectors
import struct
import sys
import time
import uuid
from typing import Any

from websocket import WebSocket, create_connection

V1 = "v1.kernel.websocket.jupyter.org"
READ = 1 << 20  # bytes that one read may give
LARGE = 1 << 18  # bytes of a message that is counted and not looked at
SMALL = 1 << 14  # bytes up to which a message may be a status or a reply
TIMEOUT = 300.0  # seconds without a byte for any frontend
CLOSE, PING = 8, 9  # RFC 6455, section 5.2


class Frontend:
    """One websocket of its own session. It speaks jupyter_server's binary protocol, as JupyterLab does."""

    def __init__(self, url: str, token: str, kernel_id: str) -> None:
        self.session = uuid.uuid4().hex
        address = f"{url.replace('http', 'ws')}/api/kernels/{kernel_id}/channels?session_id={self.session}"
        headers = {"Authorization": f"token {token}"}
        self._websocket: WebSocket = create_connection(address, header=headers, subprotocols=[V1], timeout=TIMEOUT)
        self.socket = self._websocket.sock
        self._buffer = bytearray()
        self._to_skip = 0
        self.begin(b"")

    def begin(self, msg_id: bytes) -> None:
        """Count from now on, until this request's cell has ended."""
        self._msg_id = msg_id
        self.size = self.lines = 0
        self._printed = b""
        self.is_idle = self.is_answered = False

    def send(self, msg_type: str, content: dict[str, Any]) -> bytes:
        """Send a request on the shell channel; return its id."""
        msg_id = uuid.uuid4().hex
        header = {"msg_id": msg_id, "msg_type": msg_type, "session": self.session, "username": "", "version": "5.3"}
        parts = [b"shell", json.dumps({**header, "date": ""}).encode(), b"{}", b"{}", json.dumps(content).encode()]
        offsets = [8 * (len(parts) + 2)]
        for part in parts:
            offsets.append(offsets[-1] + len(part))
        self._websocket.send_binary(struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(parts))
        return msg_id.encode()

    def read(self) -> None:
        """Read once from the websocket, and count what has come."""
        data = self.socket.recv(READ)
        if not data:
            raise EOFError("the server closed a websocket")
        skipped = min(self._to_skip, len(data))
        self._to_skip -= skipped
        self._buffer += memoryview(data)[skipped:]
        start = 0
        while (end := self._frame(start)) is not None:
            start = end
        del self._buffer[:start]

    def last_printed(self) -> str:
        """The text of the last small message with output; empty for none."""
        if not self._printed:
            return ""
        # Count and offsets; then channel, header, parent, metadata and content.
        (low, high) = struct.unpack_from("<2Q", self._printed, 8 * 5)
        return str(json.loads(self._printed[low:high])["text"])

    def _frame(self, start: int) -> int | None:
        """Take the frame at ``start``; return where the next one begins. None: it is not complete."""
        buffer = self._buffer
        if len(buffer) < start + 2:
            return None
        length = buffer[start + 1] & 127
        extended = {126: 2, 127: 8}.get(length, 0)
        body = start + 2 + extended
        if len(buffer) < body:
            return None
        if extended:
            length = int.from_bytes(buffer[start + 2 : body], "big")
        if length > LARGE:
            self.size += length
            end = min(len(buffer), body + length)
            self._to_skip = body + length - end
            return end
        if len(buffer) < body + length:
            return None
        self._take(buffer[start] & 15, bytes(buffer[body : body + length]))
        return body + length

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == CLOSE:
            raise EOFError(f"the server closed a websocket: {payload!r}")
        if opcode == PING:
            self._websocket.pong(payload)
            return
        self.size += len(payload)
        if b'"stream"' in payload:
            self.lines += payload.count(b"\\n")
            self._printed = payload if len(payload) < SMALL else b""
        elif len(payload) < SMALL and self._msg_id in payload:
            self.is_idle = self.is_idle or b'"idle"' in payload
            self.is_answered = self.is_answered or b"_reply" in payload


class Frontends:
    """Several frontends of one kernel, read by one thread."""

    def __init__(self, url: str, token: str, kernel_id: str, count: int) -> None:
        self._frontends = [Frontend(url, token, kernel_id) for _ in range(count)]
        self._selector = selectors.DefaultSelector()
        for frontend in self._frontends:
            self._selector.register(frontend.socket, selectors.EVENT_READ, frontend)
        for frontend in self._frontends:
            # A subscription is made once the frontend's own request is answered on iopub, too.
            self._until_over(frontend, "kernel_info_request", {}, [frontend])

    def run(self, code: str, announce: int = 0) -> dict[str, Any]:
        """Run code in the first frontend, until all frontends have received all of it."""
        began = time.perf_counter()
        content = {"code": code, "silent": False, "store_history": False}
        self._until_over(self._frontends[0], "execute_request", content, self._frontends, announce)
        seconds = time.perf_counter() - began
        sizes, lines = [item.size for item in self._frontends], [item.lines for item in self._frontends]
        return {"seconds": seconds, "sizes": sizes, "lines": lines, "printed": self._frontends[0].last_printed()}

    def _until_over(
        self, sender: Frontend, msg_type: str, content: dict[str, Any], readers: list[Frontend], announce: int = 0
    ) -> None:
        msg_id = sender.send(msg_type, content)
        for reader in self._frontends:
            reader.begin(msg_id)
        while not (sender.is_answered and all(reader.is_idle for reader in readers)):
            ready = self._selector.select(TIMEOUT)
            if not ready:
                raise TimeoutError(f"no frontend received anything for {TIMEOUT} s")
            for key, _events in ready:
                key.data.read()
            if announce and sender.size > announce:
                announce = 0
                print(json.dumps("announced"), flush=True)


def main() -> None:
    """Open the websockets, and run what the input says."""
    url, token, kernel_id, count = sys.argv[1:]
    frontends = Frontends(url, token, kernel_id, int(count))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(frontends.run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
