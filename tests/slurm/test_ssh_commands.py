"""Slurm's commands on a login node, by a real sshd."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import paramiko
import psutil
import pytest

from gateway_slurm.errors import SlurmNotInstalled, SlurmUnavailable, SshError
from helpers.kernel_clients import poll_async
from helpers.login_node import LoginNode, login_node
from helpers.private_slurm import poll
from helpers.ssh_login import runner_for
from helpers.tcp_proxy import tcp_proxy_to


def running(word: str) -> list[psutil.Process]:
    """Processes with this word in their command line."""
    return [one for one in psutil.process_iter(["cmdline"]) if word in " ".join(one.info["cmdline"] or [])]


async def test_a_command_gets_its_arguments_and_input_word_for_word(node: LoginNode) -> None:
    """No shell on the way reads anything into them."""
    words = ["a b", "$HOME", "`id`", "'", '"', "\\", "*", "x\ny", ";", "é", "!"]
    async with runner_for(node) as runner:
        told = await runner.run(["printf", "%s|", *words])
        echoed = await runner.run(["cat"], stdin=b"one\ntwo 'three' \x00\xff")
    assert told.stdout == "".join(f"{word}|" for word in words)
    assert echoed.stdout == b"one\ntwo 'three' \x00\xff".decode(errors="replace")


async def test_a_status_and_both_outputs_come_back(node: LoginNode) -> None:
    """As the local runner gives them."""
    async with runner_for(node) as runner:
        result = await runner.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
        killed = await runner.run(["sh", "-c", "kill -9 $$"])
    assert (result.exit_status, result.stdout, result.stderr) == (7, "out\n", "err\n")
    assert killed.exit_status == -9


async def test_a_command_that_closes_its_output_before_its_end_keeps_its_status(node: LoginNode) -> None:
    """As many do, if only for a moment; one that then does not end is too slow."""
    async with runner_for(node) as runner:
        result = await runner.run(["sh", "-c", "echo out; exec >&- 2>&-; sleep 0.3; exit 3"])
        assert (result.exit_status, result.stdout) == (3, "out\n")
        with pytest.raises(SlurmUnavailable, match="did not end within 1 s"):
            await runner.run(["sh", "-c", "exec >&- 2>&-; sleep 6543.21"], timeout=1)
        assert await poll_async(lambda: running("6543.21") == [], timeout=10)


async def test_the_environment_is_the_login_nodes_scrubbed(node: LoginNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the server's goes there; locale and time format are ours; what is given is added or taken away."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("ONLY_HERE", "1")
    async with runner_for(node) as runner:
        result = await runner.run(["env", "-0"], extra_env={"GIVEN": "a b", "SLURM_TIME_FORMAT": None})
    env = dict(line.split("=", 1) for line in result.stdout.split("\0") if line)
    assert env["HOME"] == str(node.home)
    assert env["LC_ALL"] == "C.UTF-8"
    assert env["GIVEN"] == "a b"
    assert not {"SLURM_JOB_ID", "ONLY_HERE", "SLURM_TIME_FORMAT", "SSH_CONNECTION"} & set(env)


async def test_a_secret_is_in_no_command_line_there(node: LoginNode) -> None:
    """Environment and input travel inside the channel."""
    async with runner_for(node) as runner:
        task = asyncio.ensure_future(runner.run(["sleep", "31.4159"], stdin=b"s3cr3t", extra_env={"T": "s3cr3t"}))
        assert await poll_async(lambda: running("31.4159"), timeout=10)
        assert not running("s3cr3t")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await poll_async(lambda: not running("31.4159"), timeout=10), "cancelled, and still running there"


async def test_a_command_that_takes_too_long_is_killed_there_with_its_children(node: LoginNode) -> None:
    """Nothing is known about the jobs then, and the runner is of use after that."""
    async with runner_for(node) as runner:
        with pytest.raises(SlurmUnavailable, match="did not end within"):
            await runner.run(["sh", "-c", "sleep 27.1828 & sleep 27.1828"], timeout=0.3)
        assert await poll_async(lambda: not running("27.1828"), timeout=10)
        assert (await runner.run(["echo", "1"])).stdout == "1\n"


async def test_a_command_that_prints_without_end_is_killed(node: LoginNode) -> None:
    """What is kept of its output is bounded."""
    async with runner_for(node) as runner:
        with pytest.raises(SlurmUnavailable, match="printed more than"):
            await runner.run(["yes"])


async def test_a_command_that_is_not_there_is_an_error_with_the_place(node: LoginNode) -> None:
    """The message names the setting."""
    async with runner_for(node) as runner:
        with pytest.raises(SlurmNotInstalled, match="slurm_path"):
            await runner.run(["sbatch-that-is-not-there"])


async def test_many_commands_share_one_connection_and_one_channel(node: LoginNode) -> None:
    """Each is one request, and waits for no other's answer."""
    async with runner_for(node) as runner:
        await runner.run(["true"])
        before = runner.connection.counts["channel"]
        results = await asyncio.gather(*(runner.run(["sh", "-c", f"sleep 0.2; echo {each}"]) for each in range(20)))
        assert [result.stdout for result in results] == [f"{each}\n" for each in range(20)]
        assert runner.connection.counts["connect"] == 1
        assert runner.connection.counts["channel"] == before == 1


async def test_a_command_costs_one_round_trip(node: LoginNode) -> None:
    """Counted on the wire: of the connection that is there, what is asked and what is answered."""
    with tcp_proxy_to(node.port) as line:
        async with runner_for(node, port=line.port, heartbeat=60) as runner:
            await runner.run(["true"])
            before = line.round_trips
            for _ in range(5):
                await runner.run(["true"])
            # Windows of the channel may be adjusted now and then.
            assert 5 <= line.round_trips - before <= 6


async def test_what_a_login_shell_prints_is_no_harm(tmp_path: Path) -> None:
    """Login nodes greet, in files that their shells read for every command."""
    with login_node() as node:
        noisy = "echo welcome; echo quota exceeded >&2"
        (node.home / ".bashrc").write_text(noisy)
        (node.home / ".zshenv").write_text(noisy)
        async with runner_for(node) as runner:
            assert (await runner.run(["echo", "1"])).stdout == "1\n"


async def test_a_login_node_without_python_is_a_clear_error(node: LoginNode) -> None:
    """With what its shell said, and the setting."""
    async with runner_for(node, python="python-that-is-not-there") as runner:
        with pytest.raises(SshError, match=r"ssh_python.*not found"):
            await runner.run(["true"])


async def test_a_login_shell_that_is_gone_before_it_is_written_to_is_told_by_its_own_words(
    node: LoginNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast it was; not that the channel is closed."""
    sendall = paramiko.Channel.sendall

    def send_late(channel: paramiko.Channel, data: bytes) -> None:
        assert poll(lambda: channel.closed, timeout=10)
        sendall(channel, data)

    monkeypatch.setattr(paramiko.Channel, "sendall", send_late)
    async with runner_for(node, python="python-that-is-not-there") as runner:
        with pytest.raises(SshError, match=r"ssh_python.*not found"):
            await runner.run(["true"])


async def test_a_connection_that_breaks_is_made_again(node: LoginNode) -> None:
    """What was under way is unknown, and killed there; what is asked next is answered."""
    with tcp_proxy_to(node.port) as line:
        async with runner_for(node, port=line.port) as runner:
            hanging = asyncio.ensure_future(runner.run(["sleep", "16.1803"]))
            assert await poll_async(lambda: running("16.1803"), timeout=10)
            line.cut()
            with pytest.raises(SshError, match="lost"):
                await hanging
            with pytest.raises(SshError, match=r"127\.0\.0\.1"):
                await runner.run(["true"])
            with pytest.raises(SshError):
                runner.find(["sbatch"])
            line.mend()
            assert (await runner.run(["echo", "1"])).stdout == "1\n"
            assert await poll_async(lambda: not running("16.1803"), timeout=10)


async def test_attempts_while_the_login_node_is_away_are_few(node: LoginNode) -> None:
    """However many ask: they share an attempt, and the pauses grow."""
    with tcp_proxy_to(node.port) as line:
        line.cut()
        async with runner_for(node, port=line.port) as runner:
            for _ in range(3):
                refused = await asyncio.gather(*(runner.run(["true"]) for _ in range(50)), return_exceptions=True)
                assert all(isinstance(each, SshError) for each in refused)
            # Of 50, 32 run at once.
            assert runner.connection.counts["connect"] <= 6


async def test_a_process_that_was_started_outlives_the_connection(node: LoginNode) -> None:
    """Its end is heard of over the next one, and so is the word to end it."""
    with tcp_proxy_to(node.port) as line:
        async with runner_for(node, port=line.port) as runner:
            started = await runner.start(["sh", "-c", "sleep 14.1421; true"])
            process = psutil.Process(started._remote["pid"])
            waiting = asyncio.ensure_future(started.wait())
            line.cut()
            assert await poll_async(lambda: runner._program is not None and runner._program.ended, timeout=10)
            assert process.is_running()
            line.mend()
            started.terminate()
            assert await asyncio.wait_for(waiting, 20) == -1
            assert not running("14.1421")


async def test_the_status_of_a_process_that_was_started_and_its_last_words_come_back(node: LoginNode) -> None:
    """Over the connection that it was started by."""
    async with runner_for(node) as runner:
        started = await runner.start(["sh", "-c", "cat >&2; exit 3"], stdin=b"last words")
        assert await started.wait() == 3
        assert started.stderr_tail() == "last words"


async def test_nothing_is_left_on_the_login_node(node: LoginNode) -> None:
    """Neither a process nor a file."""
    async with runner_for(node) as runner:
        await runner.run(["true"])
        assert runner._program is not None
        pid = runner._program.info["pid"]
        assert psutil.pid_exists(pid)
    assert await poll_async(lambda: not psutil.pid_exists(pid), timeout=10)
    assert [path for path in node.home.rglob("*") if path.is_file()] == []


async def test_a_silent_connection_is_given_up(node: LoginNode) -> None:
    """The program there stands still: three beats without a sign of life, and a new one is made."""
    async with runner_for(node, heartbeat=0.3) as runner:
        await runner.run(["true"])
        assert runner._program is not None
        first = psutil.Process(runner._program.info["pid"])
        first.suspend()
        try:
            assert await poll_async(lambda: runner._program.ended, timeout=10)  # type: ignore[union-attr]
            assert (await runner.run(["echo", "1"])).stdout == "1\n"
            assert runner.connection.counts["connect"] == 2
        finally:
            os.kill(first.pid, 18)
        assert await poll_async(lambda: not first.is_running(), timeout=10)
