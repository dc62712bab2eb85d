"""One kernel on its node, where the start fails before there is a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
        linked=lambda: True,
        kept_output=0,
    )
    try:
        kernel.start()
    finally:
        guard.close()
    ((name, fields),) = sent
    assert (name, fields["kernel_id"], fields["state"]) == ("FAILED", "k", "failed")
    assert "Not a directory" in fields["message"]
