"""No secret leaves its place: not into a command line, a job script, a log, or a file that others may read."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gateway_slurm.kernels.model import Phase
from gateway_slurm.link.server import ResponseSocket
from helpers.failing_starts import cut_links
from helpers.kernel_clients import async_kernel, execute, poll_async, processes_of_job, running_kernel
from helpers.private_slurm import poll, slurm

TOKEN = re.compile(rb"[0-9a-f]{64}")


@pytest.fixture
def tokens(monkeypatch) -> list[bytes]:
    """Every token of a launcher that is made while the test runs: launch tokens and their successors."""
    seen: list[bytes] = []
    expect = ResponseSocket.expect

    def expecting(self, launcher_id, tokens, *others, **named):
        seen.extend(tokens)
        return expect(self, launcher_id, tokens, *others, **named)

    monkeypatch.setattr(ResponseSocket, "expect", expecting)
    return seen


def secrets_of(manager, tokens: list[bytes]) -> dict[str, bytes]:
    """All that must stay secret while this kernel runs, by what it is."""
    info = manager.get_connection_info()
    found = {"signing key": info["key"]}
    if info.get("curve_secretkey"):
        found["Curve secret"] = str(info["curve_secretkey"]).encode()
    for number, token in enumerate(tokens):
        found[f"token {number}"] = token.hex().encode()
        found[f"token {number}, raw"] = token
    return found


def found_in(data: bytes, secrets: dict[str, bytes]) -> list[str]:
    """Which secrets stand in ``data``."""
    return [name for name, secret in secrets.items() if secret in data]


def files_under(*directories: Path) -> Iterator[Path]:
    """Every plain file."""
    for directory in directories:
        for parent, _names, files in os.walk(directory):
            yield from (Path(parent) / file for file in files if (Path(parent) / file).is_file())


def open_to_others(path: Path) -> bool:
    """Whether any other user can read the file: its own permissions, and those of all directories above."""
    mode = path.stat().st_mode
    if not mode & (stat.S_IRGRP | stat.S_IROTH):
        return False
    return all(parent.stat().st_mode & (stat.S_IXGRP | stat.S_IXOTH) for parent in path.parents)


@pytest.fixture
def places(jupyter_base: Path, service, cluster) -> list[Path]:
    """Where anything that we write may lie: Jupyter's directories with the logs, ours in /tmp, Slurm's."""
    return [jupyter_base, cluster.directory, *Path("/tmp").glob("gs-*"), *Path("/tmp").glob("gws-*")]


def test_no_secret_is_in_a_command_line(service, kernel_name, tokens):
    """No process on the machine has one in its arguments, from sbatch to the kernel."""
    seen: list[bytes] = []
    with running_kernel(kernel_name) as (manager, client):
        execute(client, "pass")
        manager.restart_kernel()
        for process in psutil.process_iter():
            try:
                seen.append(Path(f"/proc/{process.pid}/cmdline").read_bytes())
            except OSError:
                continue
        assert len(tokens) >= 2
        assert any(b"ipykernel_launcher" in line for line in seen)
        assert [line for line in seen if found_in(line, secrets_of(manager, tokens))] == []


def test_no_secret_is_in_an_argv_of_slurms_commands(service, kernel_name, tokens, monkeypatch):
    """What is given to sbatch, squeue, srun and scancel as arguments or as the script holds no secret."""
    given: list[bytes] = []
    run = service.runner.run

    async def recorded(argv, *, stdin=b"", **options):
        given.append("\0".join(argv).encode() + stdin)
        return await run(argv, stdin=stdin, **options)

    monkeypatch.setattr(service.runner, "run", recorded)
    with running_kernel(kernel_name) as (manager, _client):
        secrets = secrets_of(manager, tokens)
    assert len(given) >= 2
    assert [found_in(item, secrets) for item in given] == [[]] * len(given)


def test_no_secret_is_in_the_job_script_or_in_what_slurm_shows(service, cluster, kernel_name, tokens):
    """``scontrol write batch_script`` and ``scontrol show job`` give nothing away."""
    with running_kernel(kernel_name) as (manager, _client):
        secrets, job = secrets_of(manager, tokens), manager.provisioner.jobid
        text = slurm("scontrol", "write", "batch_script", job, "-", cluster=cluster).stdout
        assert "def main" in text
        assert found_in(text.encode(), secrets) == []
        assert not TOKEN.search(text.encode())
        shown = slurm("scontrol", "-dd", "show", "job", job, cluster=cluster).stdout
        assert found_in(shown.encode(), secrets) == []


def test_no_secret_is_in_a_log(service, kernel_name, tokens, caplog, places, jupyter_base):
    """At level DEBUG through start, restart, broken link and end: neither our log nor the node's have one."""
    caplog.set_level(logging.DEBUG)
    with running_kernel(kernel_name) as (manager, client):
        execute(client, "pass")
        manager.restart_kernel()
        client.wait_for_ready(timeout=60)
        process = manager.provisioner._handle.process
        cut_links()
        assert poll(lambda: process.phase is Phase.RUNNING, timeout=20)
        secrets = secrets_of(manager, tokens)
    assert len(caplog.records) > 3
    assert found_in(caplog.text.encode(), secrets) == []
    logs = [path for path in files_under(jupyter_base) if path.suffix == ".log"]
    assert len(logs) >= 2
    assert {path: found for path in logs if (found := found_in(path.read_bytes(), secrets))} == {}


def test_no_file_that_others_may_read_holds_a_secret(service, kernel_name, tokens, places):
    """Where a secret has to be in a file, as in a connection file, only its owner can read that."""
    with running_kernel(kernel_name) as (manager, client):
        execute(client, "pass")
        secrets = secrets_of(manager, tokens)
        directories = [*places, *Path("/tmp").glob("gs-*")]
        holding = {path for path in files_under(*directories) if found_in(path.read_bytes(), secrets)}
        assert any(path.name == "kernel.json" for path in holding), "the node's connection file was not looked at"
        assert [path for path in holding if open_to_others(path)] == []


def test_what_the_node_holds_is_its_owners_alone(service, kernel_name, jupyter_base):
    """The kernel's directory on the node is 0700, its connection file and the logs are 0600."""
    with running_kernel(kernel_name) as (manager, client):
        execute(client, "pass")
        argv = psutil.Process(manager.provisioner._handle.process.pid).cmdline()
        file = Path(next(item for item in argv if item.endswith("kernel.json")))
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        # ipykernel adds the sticky bit, against those who clean up /tmp.
        assert [stat.S_IMODE(path.stat().st_mode) & 0o777 for path in list(file.parents)[:2]] == [0o700, 0o700]
        state = jupyter_base / "home" / ".local" / "state" / "gateway_slurm"
        logs = [path for path in state.rglob("*") if path.is_file()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in logs} == {0o600}
        assert stat.S_IMODE(Path(manager.provisioner.service._directory).stat().st_mode) == 0o700
    assert not file.parent.exists()


async def test_a_kernel_does_not_get_the_launchers_token(service, tokens):
    """The launch token is in no kernel's environment, and no longer valid where it can still be read."""
    async with async_kernel("slurm") as (manager, _client):
        kernel = psutil.Process(manager.provisioner._handle.process.pid)
        assert not [value for value in kernel.environ().values() if tokens[0].hex() in value]
        expected = manager.provisioner._handle.process.launcher.expected
        assert await poll_async(lambda: tokens[0] not in expected.tokens, timeout=5)
        assert len(processes_of_job(manager.provisioner.jobid)) >= 2
