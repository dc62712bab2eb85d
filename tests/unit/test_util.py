"""The small tools: who may open a file, files replaced whole, waits, complaints made once, and tasks with an owner."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path

import pytest

from gateway_slurm._util import Backoff, LogOnce, TaskSet, call_on, dial_advice, exposure, write_atomically


def test_a_file_of_secrets_is_its_users_alone(tmp_path: Path) -> None:
    """Its mode, its owner and its kind are each a reason not to use it."""
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    assert exposure(path.stat()) == ""
    path.chmod(0o640)
    assert "mode is 0640" in exposure(path.stat())
    assert exposure(tmp_path.stat()) == "it is not a plain file"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_secrets_does_not_belong_to_another_user(tmp_path: Path) -> None:
    """Its owner could change it."""
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    os.chown(path, 12345, -1)
    assert "belongs to uid 12345" in exposure(path.stat())


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_as_a_whole(tmp_path: Path, durable: bool) -> None:
    """The new one is private, and no draft is left."""
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o644)
    write_atomically(path, "new", durable=durable)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path) -> None:
    """What cannot be encoded costs nothing."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\udcff")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_waits_double_up_to_the_longest() -> None:
    """And begin again after a success."""
    backoff = Backoff(1, 5)
    assert [backoff.next() for _ in range(4)] == [1, 2, 4, 5]
    backoff.reset()
    assert backoff.next() == 1


def test_waits_vary_by_their_jitter() -> None:
    """Many clients do not come back at the same moment."""
    waits = {Backoff(10, 10, jitter=0.3).next() for _ in range(100)}
    assert len(waits) > 90
    assert all(7 <= wait <= 13 for wait in waits)


def test_a_complaint_is_logged_once_until_its_reason_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """Each has a key of its own."""
    once = LogOnce(logging.getLogger("test.util"))
    for key in ("disk", "disk", "net"):
        once.warning(key, "%s is away", key)
    assert once.clear("disk")
    assert not once.clear("disk")
    once.warning("disk", "%s is away", "disk")
    assert [record.getMessage() for record in caplog.records] == ["disk is away", "net is away", "disk is away"]


async def test_the_end_of_a_set_of_tasks_is_the_end_of_each() -> None:
    """One that is made afterwards does not begin."""
    tasks, began = TaskSet(), []

    async def work(name: str) -> None:
        began.append(name)
        await asyncio.sleep(3600)

    first = tasks.create_task(work("first"))
    await asyncio.sleep(0)
    await tasks.close()
    late = tasks.create_task(work("late"))
    await asyncio.gather(late, return_exceptions=True)
    assert (first.cancelled(), late.cancelled(), began, len(tasks)) == (True, True, ["first"], 0)


async def test_tasks_can_be_cancelled_without_waiting() -> None:
    """For owners that close in a plain function; later tasks are cancelled as well."""
    tasks = TaskSet()
    task = tasks.create_task(asyncio.sleep(3600))
    tasks.cancel()
    late = tasks.create_task(asyncio.sleep(3600))
    await asyncio.gather(task, late, return_exceptions=True)
    assert (task.cancelled(), late.cancelled()) == (True, True)


async def test_a_call_reaches_another_threads_loop_and_a_closed_one_is_no_error() -> None:
    """The service's thread calls the server's loop, which may have ended."""
    called = asyncio.Event()
    await asyncio.to_thread(call_on, asyncio.get_running_loop(), called.set)
    await asyncio.wait_for(called.wait(), 5)
    closed = asyncio.new_event_loop()
    closed.close()
    call_on(closed, called.clear)
    assert called.is_set()


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("no answer within 3 s", "no answer: .*firewall drops .*let the nodes connect to TCP port 5 of a"),
        ("timed out", "no answer"),
        ("Connection timed out", "no answer"),
        ("[Errno 111] Connection refused", "refused: no program listens"),
        ("No route to host", "not reachable"),
        ("[Errno 101] Network is unreachable", "not reachable"),
        ("Connection reset by peer", "cut"),
    ],
)
def test_a_connection_without_an_answer_is_distinguished_from_a_refused_one(reason: str, words: str) -> None:
    """The advice names the port to open; for other reasons there is none."""
    assert re.match(words, dial_advice(reason, "TCP port 5 of a", "the nodes"))
    assert dial_advice("the host name was not found", "TCP port 5 of a", "the nodes") == ""
