"""The audit log of a gateway: its events as lines of JSON, by jupyter_events, in a file that logrotate may move.

``event_schemas`` has a JSON schema for each topic. A thread writes the file, so a slow disk delays no request. What
cannot be written is lost, and the gateway's log says so once.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import queue
import sys
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Final

from jupyter_events import EventLogger

from gateway_slurm._util import LogOnce
from gateway_slurm.errors import ConfigError
from gateway_slurm.events import KINDS, Events, Value

SCHEMAS: Final = Path(__file__).parent / "event_schemas"
MAX_PENDING: Final = 10_000
"""Events that wait for a slow disk; further ones are lost."""
CLOSE_SECONDS: Final = 5.0


def schema_id(topic: str) -> str:
    """The ``$id`` of a topic's schema."""
    return f"urn:gateway_slurm:events:{topic}:v1"


class AuditLog:
    """Writes the events of a server to ``path`` until ``close``. Raises ConfigError for a file that it cannot open."""

    def __init__(self, path: Path, events: Events, log: logging.Logger) -> None:
        try:
            file = AuditFile(path, log)
        except OSError as error:
            message = f"the audit log {path} cannot be opened: {error}; see SlurmGatewayApp.audit_log"
            raise ConfigError(message) from error
        self._logger = EventLogger()
        for topic in sorted({kind.topic for kind in KINDS.values() if kind.topic}):
            self._logger.register_event_schema(SCHEMAS / f"{topic}.yaml")
        pending: queue.Queue[logging.LogRecord] = queue.Queue(MAX_PENDING)
        self._logger.register_handler(PendingEvents(pending, log))
        self._writer, self._file, self._events = Writer(pending, file), file, events
        self._writer.start()
        events.listeners.append(self._write)

    def _write(self, kind: str, fields: Mapping[str, Value]) -> None:
        topic = KINDS[kind].topic
        if topic:
            # Naive: jupyter_events appends a Z to whatever the offset is.
            now = datetime.now(timezone.utc).replace(tzinfo=None)
            data = {"event": kind, **fields}
            self._logger.emit(schema_id=schema_id(topic), data=data, timestamp_override=now)

    def close(self) -> None:
        """Write what is pending, for at most CLOSE_SECONDS, and close the file."""
        self._events.listeners.remove(self._write)
        # A file system that hangs must not keep the process.
        ending = threading.Thread(target=self._end, daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS)

    def _end(self) -> None:
        self._writer.stop()
        self._file.close()


class AuditFile(logging.handlers.WatchedFileHandler):
    """A file of complete lines, mode 0600. It is opened again when another file has its name, as after logrotate."""

    def __init__(self, path: Path, log: logging.Logger) -> None:
        self._complaints, self._failed, self._lost = LogOnce(log), False, 0
        self._log = log
        super().__init__(path, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        file = open(descriptor, "a", encoding="utf-8")  # noqa: SIM115 - the handler closes it
        with contextlib.suppress(OSError):
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.write(descriptor, b"\n")  # the disk was full in the middle of a line
        return file

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        try:
            super().emit(record)
        except OSError as error:
            self._lose(error)
        if not self._failed and self._complaints.clear(""):
            self._log.warning("the audit log %s is written again; %d events are lost", self.baseFilename, self._lost)
            self._lost = 0

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Count a lost event, within the exception's handler; logging's own method would print a traceback."""
        self._lose(sys.exc_info()[1])

    def _lose(self, error: BaseException | None) -> None:
        """An event could not be written."""
        self._failed, self._lost = True, self._lost + 1
        text = "the audit log %s cannot be written, and events are lost until it can: %s"
        self._complaints.warning("", text, self.baseFilename, error)
        stream, self.stream = self.stream, None  # emit opens the file again
        # What the stream still holds must not appear within a later line.
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()


class PendingEvents(logging.handlers.QueueHandler):
    """Passes events to the writer's thread; it returns at once, and drops what is too much."""

    def __init__(self, pending: queue.Queue[logging.LogRecord], log: logging.Logger) -> None:
        super().__init__(pending)
        self._complaints, self._dropped = LogOnce(log), 0
        self._log = log

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1
            self._complaints.warning("", "the audit log is too slow: events beyond %d are lost", MAX_PENDING)
            return
        # Not as soon as there is one place, or the two lines of the log would alternate.
        if self.queue.qsize() <= MAX_PENDING // 2 and self._complaints.clear(""):  # type: ignore[attr-defined]
            self._log.warning("the audit log takes events again; %d are lost", self._dropped)
            self._dropped = 0


class Writer(logging.handlers.QueueListener):
    """The thread that writes the file."""

    def __init__(self, pending: queue.Queue[Any], file: AuditFile) -> None:
        super().__init__(pending, file)
        self._pending = pending

    def enqueue_sentinel(self) -> None:
        self._pending.put(self._sentinel)  # type: ignore[attr-defined] # waits for a place
