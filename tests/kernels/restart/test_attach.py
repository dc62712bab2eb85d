"""``jupyter slurm attach``: the kernels of a process that was killed are not lost to their user."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest
from jupyter_client import BlockingKernelClient

from helpers.dying_servers import driven_server
from helpers.kernel_clients import PID, READY, execute, job_state
from helpers.private_slurm import poll

CTRL_D = "\x04"


@pytest.fixture
def abandoned(service, kernel_name, tmp_path, monkeypatch):
    """A kernel whose plain process was killed."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with driven_server() as first:
        known = first.call("start", name=kernel_name)
        assert first.call("execute", kernel_id=known["kernel_id"], code="x = 41") == "ok"
        first.signal(signal.SIGKILL)
    return known


def attach_command(*arguments: str) -> list[str]:
    """Its argv."""
    return [sys.executable, "-m", "gateway_slurm.cli.app", "attach", *arguments]


def attach(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run(attach_command(*arguments), capture_output=True, text=True, timeout=READY, check=False)


def connection_file(kernel_id: str) -> Path:
    """Where clients find it."""
    return Path(os.environ["JUPYTER_RUNTIME_DIR"]) / f"kernel-{kernel_id}.json"


@contextmanager
def attached(kernel_id: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in the foreground of a user's terminal, ready, and what it said."""
    process = subprocess.Popen(attach_command(kernel_id), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C here leaves it running" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        yield process, said
    finally:
        process.kill()
        process.wait(READY)
        process.stdout.close()


def test_a_killed_processs_kernel_is_listed_attached_left_and_stopped(abandoned):
    """A console connects by the file that it writes, Ctrl-C leaves the kernel as it was, ``--stop`` ends it."""
    kernel_id, jobid = abandoned["kernel_id"], abandoned["jobid"]
    header, row = attach().stdout.splitlines()
    assert header.split() == ["KERNEL", "NAME", "NODE", "STARTED", "SERVER"]
    assert row.startswith(kernel_id)
    assert abandoned["node"] in row
    for _again in range(2):
        with attached(kernel_id[:8]) as (process, _said):
            path = connection_file(kernel_id)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert json.loads(path.read_text())["kernel_name"] != ""
            client = BlockingKernelClient(connection_file=str(path))
            client.load_connection_file()
            client.start_channels()
            client.wait_for_ready(timeout=READY)
            assert execute(client, "print(x)") == "41"
            assert execute(client, PID) == str(abandoned["pid"])
            client.stop_channels()
            assert attach().stdout == "There are no kernels without a server.\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(READY) == 0
        assert not path.exists()
        assert job_state(jobid) == "RUNNING"
    stopped = attach("--stop", kernel_id)
    assert stopped.stdout == f"kernel {kernel_id} has ended\n"
    assert poll(lambda: job_state(jobid) == "", timeout=READY)
    assert attach().stdout == "There are no kernels without a server.\n"


def leave_console(name: str, *words: str) -> str:
    """Run ``jupyter console --existing`` in a terminal, type ``words``, and return what it says about the kernel."""
    console = pexpect.spawn(
        sys.executable, ["-m", "jupyter_console", "--existing", name], encoding="utf-8", timeout=READY, echo=False
    )
    try:
        console.expect(r"In \[")
        for word in words:
            console.send(word)
            if word == CTRL_D:
                console.expect("exit")  # it asks whether
        console.expect("keeping kernel alive|Shutting down kernel")
        return str(console.match.group())
    finally:
        console.close(force=True)


@pytest.mark.slow
def test_the_console_is_left_as_attach_says(abandoned):
    """Ctrl-D and exit(keep_kernel=True) keep the kernel, exit alone ends it; no console is named for CurveZMQ."""
    with attached(abandoned["kernel_id"]) as (process, said):
        path = connection_file(abandoned["kernel_id"])
        name = path.name
        if "curve_publickey" in path.read_text():
            assert "--existing" not in said
            assert f'BlockingKernelClient(connection_file="{path}")' in said
            os.kill(abandoned["pid"], signal.SIGKILL)
            assert process.wait(READY) == 0
            return
        assert leave_console(name, CTRL_D, "y\r") == "keeping kernel alive"
        assert leave_console(name, "print(x)\r", "exit(keep_kernel=True)\r") == "keeping kernel alive"
        assert process.poll() is None
        os.kill(abandoned["pid"], 0)
        assert leave_console(name, "exit\r") == "Shutting down kernel"
        assert process.wait(READY) == 0


def test_a_kernel_that_ended_while_it_is_attached_is_told(abandoned):
    """The command ends with the kernel, and the kernel's job with both."""
    with attached(abandoned["kernel_id"]) as (process, _said):
        os.kill(abandoned["pid"], signal.SIGKILL)
        assert process.stdout is not None
        assert "ended: signal 9 (SIGKILL)" in process.stdout.read()
        assert process.wait(READY) == 0
    assert poll(lambda: job_state(abandoned["jobid"]) == "", timeout=READY)


def test_only_kernels_without_a_server_can_be_attached(service, kernelspecs, tmp_path, monkeypatch):
    """No other process can attach to a kernel whose server lives, or to a kernel that does not exist."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with driven_server() as first:
        known = first.call("start", name="slurm")
        refused = attach(known["kernel_id"])
        assert refused.returncode == 1
        assert "no kernel without a server has an id that begins with" in refused.stderr
        assert first.call("execute", kernel_id=known["kernel_id"], code="1") == "ok"
        first.call("shutdown", kernel_id=known["kernel_id"])
    nameless = attach("--stop")
    assert nameless.returncode == 1
    assert "--stop needs a kernel's id" in nameless.stderr
