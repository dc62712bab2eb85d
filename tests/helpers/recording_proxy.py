"""A TCP proxy that records all bytes of both directions."""

from __future__ import annotations

import selectors
import socket
import threading
from contextlib import suppress

from helpers.private_slurm import poll


class RecordingProxy:
    """Listens on the loopback and forwards to ``target``. The creator calls ``close``."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.up = bytearray()
        self.down = bytearray()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def seen(self) -> bytes:
        """All bytes of both directions."""
        return bytes(self.up) + b"\0" + bytes(self.down)

    def _run(self) -> None:
        while not self._stopping:
            for key, _events in self._selector.select(0.05):
                if key.data is None:
                    self._accept()
                else:
                    self._forward(key.fileobj, *key.data)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _accept(self) -> None:
        near, _address = self._listener.accept()
        try:
            far = socket.create_connection(self.target, timeout=5)
        except OSError:
            near.close()
            return
        for end in (near, far):
            end.settimeout(10)
        self._selector.register(near, selectors.EVENT_READ, (far, self.up))
        self._selector.register(far, selectors.EVENT_READ, (near, self.down))

    def _forward(self, source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        try:
            data = source.recv(1 << 16)
            record += data
            sink.sendall(data)
        except OSError:
            data = b""
        if not data:
            for end in (source, sink):
                with suppress(KeyError, ValueError):
                    self._selector.unregister(end)
                end.close()

    def close(self) -> None:
        """End all connections and the thread."""
        self._stopping = True
        self._thread.join(timeout=10)
        assert poll(lambda: not self._thread.is_alive(), timeout=10)
