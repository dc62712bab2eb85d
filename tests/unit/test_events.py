"""Events: their one table, their lines in the log, and the audit log's file."""

from __future__ import annotations

import ast
import functools
import json
import logging
import re
from pathlib import Path

import pytest
from jupyter_events import EventLogger

from gateway_slurm import errors, events
from gateway_slurm.errors import ConfigError, KernelStartError
from gateway_slurm.events import FIELDS, KINDS, OUTCOMES, Events, outcome_of, reason_of
from gateway_slurm.gateway import audit
from gateway_slurm.gateway.audit import SCHEMAS, AuditLog, schema_id

PACKAGE = Path(events.__file__).parent
LOG = logging.getLogger("test.events")


@pytest.fixture
def watched(caplog) -> Events:
    """Events that are logged for ``caplog``."""
    caplog.set_level(logging.DEBUG)
    return Events(LOG)


@functools.cache
def emitted() -> dict[str, set[str]]:
    """The kinds that the package's code emits, and the fields that the calls name."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("emit", "report")
            if called and node.args and isinstance(node.args[0], ast.Constant):
                names = {keyword.arg for keyword in node.keywords if keyword.arg}
                found.setdefault(node.args[0].value, set()).update(names)
    return found


def test_each_kind_of_the_table_is_emitted_and_no_other():
    """The schemas and the documentation are complete."""
    assert set(emitted()) == set(KINDS)
    assert set().union(*emitted().values()) <= set(FIELDS)


def test_each_topic_has_a_schema_that_admits_its_events():
    """``$id`` and version are there, and the schema has the table's kinds and fields."""
    logger = EventLogger()
    for topic in {kind.topic for kind in KINDS.values()} - {""}:
        logger.register_event_schema(SCHEMAS / f"{topic}.yaml")
        schema = logger.schemas.get(schema_id(topic))
        assert schema.version == "1"
        kinds = schema.properties["event"]["enum"]
        assert kinds == [name for name, kind in KINDS.items() if kind.topic == topic]
        assert set(schema.properties) - {"event"} <= set(FIELDS)
        for kind in kinds:
            assert emitted()[kind] <= set(schema.properties)


def test_each_error_has_one_of_the_outcomes():
    """So that the metrics' labels are few."""
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)]
    assert {outcome_of(kind("x")) for kind in [*kinds, OSError, KeyError]} <= set(OUTCOMES)
    assert outcome_of(KeyboardInterrupt()) == "cancelled"


def test_a_reason_has_neither_command_nor_output():
    """What a kernel printed stays with its user."""
    error = KernelStartError("it died (argv ['x', 'code']); it printed\nsecret", output_tail="secret", brief="it died")
    assert reason_of(error) == "it died"
    assert reason_of(OSError("first\nsecond")) == "first"


def test_text_of_users_cannot_forge_a_line_or_a_field(watched, caplog):
    """Line ends, escapes and marks of the form are quoted, and values are bounded."""
    watched.emit("kernel_started", user="ann", notebook='a\n2026 x\x1b[2J" jobid=1', reason="r" * 5000, jobid="")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith('kernel started: user=ann notebook="a\\\\n2026 x\\\\x1b[2J\\" jobid=1" reason=')
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 1200


def test_a_listener_that_fails_harms_neither_the_server_nor_other_listeners(watched, caplog):
    """The log says so."""
    came = []
    watched.listeners += [lambda _kind, _fields: 1 / 0, lambda kind, fields: came.append((kind, dict(fields)))]
    watched.emit("gateway_started", url="http://x")
    assert came == [("gateway_started", {"url": "http://x"})]
    assert "could not be passed on" in caplog.text


# -- The audit log --


def lines_of(path: Path) -> list[dict[str, object]]:
    """The events in a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_audit_log_is_lines_of_json_in_a_private_file_that_may_be_moved(watched, tmp_path):
    """After a rotation the next event is in a new file; none is lost at the end."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, watched, LOG)
    watched.emit("kernel_started", user="ann", kernel_id="k", queue_seconds=1.25, outcome="started")
    watched.emit("link_lost", jobid="7")
    log.close()
    (event,) = lines_of(path)
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[0-9:.]+Z", str(event.pop("__timestamp__")))
    assert (event.pop("__schema_version__"), event.pop("__metadata_version__")) == ("1", 1)
    expected = {"event": "kernel_started", "user": "ann", "kernel_id": "k", "queue_seconds": 1.25, "outcome": "started"}
    assert event == {"__schema__": "urn:gateway_slurm:events:kernel:v1", **expected}
    assert path.stat().st_mode & 0o777 == 0o600
    log = AuditLog(path, watched, LOG)
    path.rename(tmp_path / "audit.jsonl.1")
    watched.emit("gateway_stopped", version="1")
    log.close()
    assert [event["event"] for event in lines_of(path)] == ["gateway_stopped"]
    assert len(lines_of(tmp_path / "audit.jsonl.1")) == 1
    watched.emit("gateway_stopped", version="1")
    assert len(lines_of(path)) == 1


def test_a_full_disk_is_said_once_and_the_log_goes_on_when_there_is_room(watched, tmp_path, caplog):
    """The path leads to a full device, and then to a file whose last line is not complete."""
    path, full = tmp_path / "audit.jsonl", Path("/dev/full")
    path.symlink_to(full)
    log = AuditLog(path, watched, LOG)
    for _ in range(3):
        watched.emit("gateway_started", version="1")
    log.close()
    assert caplog.text.count("cannot be written") == 1
    caplog.clear()
    log = AuditLog(path, watched, LOG)
    watched.emit("gateway_started", version="2")
    while "cannot be written" not in caplog.text:
        log._writer.queue.join()
    room = tmp_path / "room"
    room.write_text('{"event": "gateway_st')
    path.unlink()
    path.symlink_to(room)
    watched.emit("gateway_started", version="3")
    log.close()
    assert [json.loads(line)["version"] for line in room.read_text().splitlines()[1:]] == ["3"]
    assert "is written again; 1 events are lost" in caplog.text


def test_a_disk_that_hangs_delays_nobody(watched, tmp_path, caplog, monkeypatch):
    """Events beyond a bound are dropped, which is said once; the end of the server waits for a bounded time."""
    monkeypatch.setattr(audit, "MAX_PENDING", 2)
    monkeypatch.setattr(audit, "CLOSE_SECONDS", 0.2)
    log = AuditLog(tmp_path / "audit.jsonl", watched, LOG)
    with log._file.lock:  # as a write that hangs
        for _ in range(10):
            watched.emit("gateway_started", version="1")
        assert caplog.text.count("events beyond 2 are lost") == 1
        log.close()


def test_a_file_that_cannot_be_opened_is_an_error_at_the_start(watched, tmp_path):
    """The message names the setting."""
    with pytest.raises(ConfigError, match=r"SlurmGatewayApp\.audit_log"):
        AuditLog(tmp_path / "missing" / "audit.jsonl", watched, LOG)
