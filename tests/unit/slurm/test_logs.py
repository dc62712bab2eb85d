"""Logs of jobs that this process reads: its own plain files only, and within a time."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from gateway_slurm.access import SlurmUsers
from gateway_slurm.config import ServiceSettings
from gateway_slurm.slurm import access
from gateway_slurm.slurm.access import LocalAccess
from gateway_slurm.slurm.runner import Runner


@pytest.fixture
def local() -> LocalAccess:
    """Slurm's commands on this machine; none is run."""
    return LocalAccess(Runner(), as_user_command=["helper", "{user}"], command_timeout=30)


async def test_only_a_plain_file_of_this_user_is_read(
    local: LocalAccess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All users may write to a shared directory: no link of either kind is read there, and no pipe is waited for."""
    (log := tmp_path / "launcher-1.log").write_text("x" * access.MAX_LOG_END + "its end")
    (tmp_path / "launcher-2.log").symlink_to(log)
    os.mkfifo(tmp_path / "launcher-3.log")
    (secret := tmp_path / "secret").write_text("token")
    os.link(secret, tmp_path / "launcher-5.log")
    found = await local.log_end(str(log))
    assert found is not None
    assert (len(found), found.endswith("its end")) == (access.MAX_LOG_END, True)
    assert await local.read_log(str(log), 0) == access.LogPart(0, log.read_bytes())
    monkeypatch.setattr(access, "LOOK_TIMEOUT", 60.0)
    started = time.monotonic()
    others = [str(tmp_path / f"launcher-{number}.log") for number in (2, 3, 4, 5)]
    assert [await local.log_end(path) for path in others] == [None] * 4
    assert [(await local.read_log(path, -1)).content for path in others] == [b""] * 4
    monkeypatch.setattr(os, "geteuid", lambda: log.stat().st_uid + 1)
    assert await local.log_end(str(log)) is None
    assert (await local.read_log(str(log), 0)).content == b""
    assert time.monotonic() - started < 30


async def test_a_file_system_that_hangs_holds_no_start_and_few_threads(
    local: LocalAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look ends by its time, those that hang are few, and the loop's own threads are free."""
    hangs, entered = threading.Event(), []

    def end_of(path: str) -> str:
        entered.append(path)
        hangs.wait(60)
        return "late"

    monkeypatch.setattr(access, "LOOK_TIMEOUT", 0.3)
    monkeypatch.setattr(access, "_end_of", end_of)
    try:
        assert await asyncio.gather(*(local.log_end("/log") for _look in range(40))) == [None] * 40
        assert len(entered) == access.MAX_LOOKS
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 10) == "free"
    finally:
        hangs.set()
    monkeypatch.setattr(access, "LOOK_TIMEOUT", 30.0)
    assert await local.log_end("/log") == "late"


async def test_logs_of_other_unix_users_are_not_read(local: LocalAccess, tmp_path: Path) -> None:
    """Where each owner has a Unix user of their own, this process neither looks in its own home nor reads for them."""
    (log := tmp_path / "launcher-1.log").write_text("text")
    for run_as, found in (("user", None), ("self", "text")):
        users = SlurmUsers(ServiceSettings(run_as=run_as), local)
        assert await users.log_end("ada", str(log)) == found
        assert await users.log_end("", str(log)) == "text"
