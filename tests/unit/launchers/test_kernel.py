"""One kernel on its node, at its start."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from launchers import greeting
from launchers.guard import Guard
from launchers.kernel import Kernel
from launchers.reactor import Reactor


@pytest.mark.parametrize("mode", ["direct", "tcp", "ipc"])
def test_a_start_without_a_directory_is_reported_with_its_reason(tmp_path: Path, mode: str) -> None:
    """As on a node with a full disk: the server need not wait for the start's time-out."""
    (tmp_path / "file").touch()
    sent: list[tuple[str, dict[str, Any]]] = []
    spec = {"generation": 1, "slot": 0, "mode": mode, "start_timeout": 60, "umask": 0o022}
    spec |= {"log_dir": str(tmp_path), "log_name": "k.log"}
    guard = Guard()
    kernel = Kernel(
        Reactor(),
        guard,
        make_directory=lambda: str((tmp_path / "file" / "0").mkdir()),
        spec={"kernel_id": "k", "argv": ["true"], "connection": {}, **spec},
        ip="127.0.0.1",
        base_env={},
        send=lambda name, **fields: sent.append((name, fields)),
        make_journal=lambda: None,
        may_use_loopback=lambda: False,
    )
    try:
        kernel.start()
    finally:
        guard.close()
    ((name, fields),) = sent
    assert (name, fields["kernel_id"], fields["state"]) == ("FAILED", "k", "failed")
    assert "Not a directory" in fields["message"]


# The first kernel leaves a child that holds its ports in silence, and dies; the second one does not listen.
DIES_ONCE = """
import json, os, select, signal, socket, sys
child = sys.argv[2]
if os.path.exists(child):
    signal.pause()
info = json.load(open(sys.argv[1]))
listeners = [socket.create_server((info["ip"], port)) for name, port in info.items() if name.endswith("_port")]
pid = os.fork()
if pid == 0:
    os.setsid()
    signal.alarm(60)
    signal.pause()
open(child, "w").write(str(pid))
select.select(listeners, [], [])
"""


def test_the_check_of_a_process_that_died_does_not_end_the_next_one(tmp_path: Path, monkeypatch) -> None:
    """The launcher starts a kernel again that lost its ports; the first one's check may still wait for a greeting."""
    monkeypatch.setattr(greeting, "ANSWER_SECONDS", 0.5)
    sent: list[tuple[str, dict[str, Any]]] = []
    child = tmp_path / "child"
    spec = {"generation": 1, "slot": 0, "mode": "direct", "start_timeout": 60, "umask": 0o022, "env": {}}
    spec |= {"log_dir": str(tmp_path), "log_name": "k.log", "cwd": str(tmp_path), "connection": {}}
    reactor, guard = Reactor(), Guard()
    kernel = Kernel(
        reactor,
        guard,
        make_directory=lambda: str(tmp_path),
        spec={"kernel_id": "k", "argv": [sys.executable, "-c", DIES_ONCE, "{connection_file}", str(child)], **spec},
        ip="127.0.0.1",
        base_env=dict(os.environ),
        send=lambda name, **fields: sent.append((name, fields)),
        make_journal=lambda: None,
        may_use_loopback=lambda: False,
    )
    over: list[bool] = []

    def watch(first: Any = None) -> None:
        """Once there is a second process, wait for longer than the check of the first one had left."""
        kernel.reaped()
        if first is not None and kernel.process is not first:
            reactor.later(2 * greeting.ANSWER_SECONDS, lambda: over.append(True))
        else:
            reactor.later(0.01, lambda: watch(first or kernel.process))

    try:
        kernel.start()
        watch()
        while not over and not sent:
            reactor.run_once()
        assert (sent, kernel._refusal, kernel._attempt) == ([], None, 2)
        kernel.stop()
        while kernel.runs:
            kernel.reaped()
    finally:
        kernel.stop()
        kernel.close()
        guard.close()
        signal.set_wakeup_fd(-1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child.read_text()), signal.SIGKILL)
