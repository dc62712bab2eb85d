"""A kernel of 20 MB for tests that need many: it speaks Jupyter's protocol and runs Python cells one after the other.

Run as ``python stub_kernel.py -f CONNECTION_FILE``. It publishes each printed line at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import queue
import sys
import threading
import time
import traceback
import uuid
from typing import Any

import zmq

DELIMITER = b"<IDS|MSG>"
ENDED = "inproc://ended"  # by which the cells' thread says that a cell has ended


class StubKernel:
    """The main thread uses all sockets. Only iopub has a lock, since cells print from another thread."""

    def __init__(self, connection: dict[str, Any]) -> None:
        self._key, self._session = connection["key"].encode(), uuid.uuid4().hex
        self._context = zmq.Context()
        self._sockets = {
            name: self._bind(connection, name, kind)
            for name, kind in (
                ("shell", zmq.ROUTER),
                ("control", zmq.ROUTER),
                ("stdin", zmq.ROUTER),
                ("hb", zmq.REP),
                ("iopub", zmq.PUB),
            )
        }
        self._publishing = threading.Lock()
        self._cells: queue.Queue[tuple[list[bytes], dict[str, Any], str]] = queue.Queue()
        self._done: queue.Queue[tuple[list[bytes], dict[str, Any], dict[str, Any]]] = queue.Queue()
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._count = 0

    def _bind(self, connection: dict[str, Any], name: str, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 1000
        between = "-" if connection["transport"] == "ipc" else ":"
        port = connection[f"{name}_port"]
        socket.bind(f"{connection['transport']}://{connection['ip']}{between}{port}")
        return socket

    def run(self) -> None:
        """Serve until shutdown_request."""
        threading.Thread(target=self._run_cells, daemon=True).start()
        poller = zmq.Poller()
        woken = self._context.socket(zmq.PULL)
        woken.bind(ENDED)
        for socket in (*(self._sockets[name] for name in ("shell", "control", "hb")), woken):
            poller.register(socket, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if woken in ready:
                woken.recv()
            if self._sockets["hb"] in ready:
                self._sockets["hb"].send(self._sockets["hb"].recv())
            for name in ("control", "shell"):
                if self._sockets[name] in ready and not self._handle(name):
                    return
            while not self._done.empty():
                identities, parent, content = self._done.get()
                self._send("shell", "execute_reply", content, parent, identities)
                self._status("idle", parent)

    def _handle(self, channel: str) -> bool:
        frames = self._sockets[channel].recv_multipart()
        split = frames.index(DELIMITER)
        identities, parent = frames[:split], json.loads(frames[split + 2])
        content = json.loads(frames[split + 5])
        kind = parent["msg_type"]
        self._status("busy", parent)
        if kind == "execute_request":
            self._cells.put((identities, parent, content["code"]))
            return True  # the kernel becomes idle after the cell
        answers = {"kernel_info_request": _INFO, "shutdown_request": {"status": "ok", "restart": False}}
        content = answers.get(kind, {"status": "ok"})
        self._send(channel, kind.replace("_request", "_reply"), content, parent, identities)
        self._status("idle", parent)
        return kind != "shutdown_request"

    def _run_cells(self) -> None:
        wake = self._context.socket(zmq.PUSH)
        wake.connect(ENDED)
        while True:
            identities, parent, code = self._cells.get()
            self._count += 1
            reply: dict[str, Any] = {"status": "ok", "execution_count": self._count, "user_expressions": {}}
            self._publish("execute_input", {"code": code, "execution_count": self._count}, parent)
            self._names["print"] = lambda *what, parent=parent, **_how: self._print(what, parent)
            try:
                exec(code, self._names)  # noqa: S102 - a kernel runs code
            except BaseException as error:  # noqa: BLE001 - and reports every error
                words = {"ename": type(error).__name__, "evalue": str(error), "traceback": traceback.format_exc()}
                reply = {"status": "error", "execution_count": self._count, **words}
                self._publish("error", words, parent)
            self._done.put((identities, parent, reply))
            wake.send(b"")

    def _print(self, what: tuple[object, ...], parent: dict[str, Any]) -> None:
        self._publish("stream", {"name": "stdout", "text": " ".join(map(str, what)) + "\n"}, parent)

    def _status(self, state: str, parent: dict[str, Any]) -> None:
        self._publish("status", {"execution_state": state}, parent)

    def _publish(self, kind: str, content: dict[str, Any], parent: dict[str, Any]) -> None:
        with self._publishing:
            self._send("iopub", kind, content, parent, [kind.encode()])

    def _send(
        self, channel: str, kind: str, content: dict[str, Any], parent: dict[str, Any], identities: list[bytes]
    ) -> None:
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": kind,
            "session": self._session,
            "username": "stub",
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": "5.3",
        }
        parts = [json.dumps(part).encode() for part in (header, parent, {}, content)]
        signature = hmac.new(self._key, b"".join(parts), hashlib.sha256).hexdigest().encode()
        self._sockets[channel].send_multipart([*identities, DELIMITER, signature, *parts])

    def close(self) -> None:
        """Close the sockets after their messages are sent."""
        self._context.destroy(linger=500)


_INFO = {
    "status": "ok",
    "protocol_version": "5.3",
    "implementation": "stub",
    "implementation_version": "1",
    "language_info": {"name": "python", "version": sys.version.split()[0], "file_extension": ".py"},
    "banner": "",
}


def main() -> None:
    """Run the kernel until shutdown_request."""
    with open(sys.argv[sys.argv.index("-f") + 1]) as file:
        kernel = StubKernel(json.load(file))
    with contextlib.suppress(KeyboardInterrupt):
        kernel.run()
    kernel.close()
    os._exit(0)  # without waiting for a running cell


if __name__ == "__main__":
    main()
