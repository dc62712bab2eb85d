"""The runner, with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway_slurm.errors import SlurmNotInstalled, SlurmUnavailable
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.slurm.ssh.login_node.stderr_file import MAX_SIZE, MAX_TAIL, StderrFile


async def until(condition: Callable[[], bool], within: float = 10) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def read_pid(path: Path) -> int:
    """The number in the file, 0 while there is no file."""
    return int(path.read_text() or 0) if path.exists() else 0


async def test_result() -> None:
    """The result has status, output and errors, and the command is counted."""
    runner = Runner()
    result = await runner.run(["sh", "-c", "cat; echo oops >&2; exit 3"], stdin="é".encode() * 100_000)
    assert (result.exit_status, result.stdout, result.stderr) == (3, "é" * 100_000, "oops\n")
    assert runner.counts == {"sh": 1}


async def test_death_by_signal() -> None:
    """A command that a signal ended has a negative status."""
    assert (await Runner().run(["sh", "-c", "kill -9 $$"])).exit_status == -9


async def test_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller's Slurm variables, locale and format never reach a command; the given ones do."""
    for name in ("SLURM_JOB_ID", "SQUEUE_FORMAT", "SLURM_MEM_PER_NODE", "LANG", "PYTHONPATH"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/site.conf")
    result = await Runner().run(["env"], extra_env={"FOO": "a b\nc", "SLURM_TIME_FORMAT": None})
    names = {line.partition("=")[0] for line in result.stdout.splitlines()}
    assert names <= {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "TZ",
        "KRB5CCNAME",
        "SLURM_CONF",
        "LC_ALL",
        "FOO",
        "c",
    }
    assert "SLURM_CONF=/etc/site.conf" in result.stdout
    assert "SLURM_CONF=/mine" in (await Runner(slurm_conf="/mine").run(["env"])).stdout
    assert "SLURM_TIME_FORMAT=%s" in (await Runner().run(["env"])).stdout


async def test_working_directory() -> None:
    """Commands run in /, which no job can remove."""
    assert (await Runner().run(["pwd"])).stdout == "/\n"


async def test_not_installed(tmp_path: Path) -> None:
    """The error names the missing command and the remedy."""
    with pytest.raises(SlurmNotInstalled, match="sbatch"):
        await Runner(search_path=str(tmp_path)).run(["sbatch"])


async def test_path_of_the_job_is_not_ours(tmp_path: Path) -> None:
    """A PATH for the job does not choose which command runs."""
    fake = tmp_path / "echo"
    fake.write_text("#!/bin/sh\necho fake\n")
    fake.chmod(0o755)
    assert (await Runner().run(["echo", "real"], extra_env={"PATH": str(tmp_path)})).stdout == "real\n"


async def test_timeout_kills_the_group(tmp_path: Path) -> None:
    """A command that takes too long is killed with its children and raises SlurmUnavailable."""
    pid_file = tmp_path / "pid"
    with pytest.raises(SlurmUnavailable, match=r"within 0.5 s"):
        await Runner(timeout=0.5).run(["sh", "-c", f"sleep 1000 & echo $! >{pid_file}; wait"])
    await until(lambda: not alive(read_pid(pid_file)))


async def test_timeout_of_what_a_command_left(tmp_path: Path) -> None:
    """A child that keeps the pipes open after its command has ended counts as a timeout and is killed."""
    pid_file = tmp_path / "pid"
    with pytest.raises(SlurmUnavailable):
        await Runner(timeout=0.5).run(["sh", "-c", f"sleep 1000 & echo $! >{pid_file}"])
    await until(lambda: not alive(read_pid(pid_file)))


async def test_cancellation_kills_the_group(tmp_path: Path) -> None:
    """Cancelling the call ends the command and its children."""
    pid_file = tmp_path / "pid"
    task = asyncio.ensure_future(Runner().run(["sh", "-c", f"sleep 1000 & echo $! >{pid_file}; wait"]))
    await until(lambda: read_pid(pid_file) > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not alive(read_pid(pid_file)))


@pytest.mark.parametrize("turns", range(6))
async def test_cancellation_while_it_is_started(tmp_path: Path, turns: int) -> None:
    """A command that runs before its starter knows it is killed with its children."""
    pid_file = tmp_path / "pid"
    task = asyncio.ensure_future(Runner().run(["sh", "-c", f"sleep 1000 & echo $! >{pid_file}; wait"]))
    for _ in range(turns):
        await asyncio.sleep(0)
    # The loop stands still: the command comes up meanwhile, if it was started in one of these turns.
    deadline = time.monotonic() + 0.3
    while not read_pid(pid_file) and time.monotonic() < deadline:
        time.sleep(0.01)  # noqa: ASYNC251 - that is the point
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    await until(lambda: not read_pid(pid_file) or not alive(read_pid(pid_file)))


@pytest.mark.parametrize("redirect", ["", ">&2"])
async def test_output_is_bounded(redirect: str) -> None:
    """A command that prints too much is killed."""
    with pytest.raises(SlurmUnavailable, match="more than 100000 bytes"):
        await Runner(max_output=100_000).run(["sh", "-c", f"exec yes {redirect}"])


async def test_input_that_the_command_does_not_read() -> None:
    """A command that ends without reading its input gives its normal result."""
    result = await Runner().run(["sh", "-c", "exec <&-; echo no; exit 1"], stdin=b"x" * 10_000_000)
    assert (result.exit_status, result.stdout) == (1, "no\n")


async def test_loop_is_never_blocked() -> None:
    """The loop runs on while a command does."""
    ticks = 0
    task = asyncio.ensure_future(Runner().run(["sleep", "0.5"]))
    while not task.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 10


async def test_detached(tmp_path: Path) -> None:
    """A started command has its own session, gets all of its input, and the end of its stderr is kept."""
    program = "import sys; n = len(sys.stdin.read()); sys.stderr.write('x' * 100000 + str(n)); sys.exit(5)"
    process = await Runner().start([sys.executable, "-c", program], stdin=b"y" * 1_000_000)
    assert await process.wait() == 5
    assert process.stderr_tail().endswith("x1000000")
    assert len(process.stderr_tail()) == MAX_TAIL


async def test_the_file_of_a_detached_commands_stderr_does_not_grow(tmp_path: Path) -> None:
    """A job step that prints without end fills no disk; its last words are kept."""
    go = tmp_path / "go"
    prints = f"for n in 1 2 3; do head -c {2 * MAX_SIZE} /dev/zero; echo $n; done >&2"
    script = f"{prints}; while [ ! -e {go} ]; do sleep 0.05; done"
    process = await Runner().start(["sh", "-c", f"{script}; echo end >&2"])
    waiting = asyncio.ensure_future(process.wait())
    deadline = time.monotonic() + 30
    descriptor = process._stderr.file.fileno()
    while not process.stderr_tail().endswith("3\n") or os.fstat(descriptor).st_size > 0:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    go.touch()
    assert await waiting == 0
    tail = process.stderr_tail()
    assert (len(tail), tail[-6:]) == (MAX_TAIL, "3\nend\n")


def test_the_end_of_a_trimmed_file_is_whole() -> None:
    """What was kept before, and what came since, and the same after the file is closed."""
    stderr = StderrFile()
    os.write(stderr.file.fileno(), b"x" * MAX_SIZE + b"first")
    stderr.trim()
    os.write(stderr.file.fileno(), b" second")
    assert os.fstat(stderr.file.fileno()).st_size == 7
    stderr.close()
    assert (len(stderr.tail()), stderr.tail()[-13:]) == (MAX_TAIL, b"xfirst second")


async def test_detached_session() -> None:
    """A started command is not in this process's session, so it does not end with the terminal."""
    process = await Runner().start(["sleep", "1000"])
    assert os.getsid(process._process.pid) == process._process.pid
    assert process._process.returncode is None
    process.terminate()
    assert await process.wait() == -signal.SIGTERM
    process.terminate()  # nothing is there to end


async def test_cancelled_wait_leaves_it_running() -> None:
    """Cancelling the wait does not end a started command."""
    process = await Runner().start(["sleep", "1000"])
    waiter = asyncio.ensure_future(process.wait())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert alive(process._process.pid)
    process.terminate()
    await process.wait()
