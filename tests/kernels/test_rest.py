"""Kernels where Slurm is reached by its REST interface alone: a real slurmrestd, and no command of Slurm's."""

from __future__ import annotations

import asyncio
import json
import logging
import pwd
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.errors import AllocationError, ConfigError, SlurmUnavailable
from gateway_slurm.kernels.model import Phase
from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import job_processes
from helpers import rest_cluster
from helpers.daemons import slurm_token, start_daemon, stop_daemon
from helpers.kernel_clients import (
    JOB,
    KERNEL_NAMES,
    READY,
    async_execute,
    async_kernel,
    forget_service,
    install_kernelspec,
    jobid_of,
    poll_async,
    write_admin_settings,
)
from helpers.private_slurm import jobs_of, poll, slurm, state_of, steps_of
from helpers.slurm_versions import slurm_says

NODE = "import os; print(os.environ['SLURMD_NODENAME'])"
GPUS = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'none'))"
LOGIN = "import os; print(os.environ['HOME'], os.environ['USER'], os.environ['PATH'].count('/usr/bin'))"

Settings = Callable[..., SlurmService]


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    """In place of the session's cluster: one with slurmrestd, which no command of this process's reaches."""
    with rest_cluster.cluster_by_rest() as private:
        yield private


@pytest.fixture
def minted(tmp_path: Path) -> Path:
    """A line for each token that was minted."""
    path = tmp_path / "minted"
    path.touch()
    return path


def spec(kernelspecs: Path, name: str, **config: object) -> None:
    """Install a kernelspec; what IPython writes is not to go to the home that the node's user database names."""
    metadata = {"supported_encryption": ["curve"]} if name == "slurm-direct" else {}
    overrides = {"metadata": metadata, "env": {"IPYTHONDIR": str(kernelspecs.parent / "ipython-on-node")}}
    install_kernelspec(kernelspecs, name, config_overrides=config, spec_overrides=overrides)


@pytest.fixture
def by_rest(cluster: PrivateCluster, kernelspecs: Path, minted: Path, tmp_path: Path) -> Iterator[Settings]:
    """Write the admin's settings for slurmrestd with a command for tokens, changed as asked; return the service."""
    written: list[Path] = []

    def write(**changed: object) -> SlurmService:
        forget_service()
        command = rest_cluster.mint_command(cluster, minted)
        settings = {"cluster": cluster.rest_url, "rest_token_command": command, "log_directory": str(tmp_path / "logs")}
        written.append(write_admin_settings(**{**settings, **changed}))
        return SlurmService.instance()

    forget_service()
    for name in KERNEL_NAMES.values():
        spec(kernelspecs, name)
    yield write
    forget_service()
    for path in written:
        path.unlink(missing_ok=True)


@pytest.fixture
def service(by_rest: Settings) -> SlurmService:
    """The process's service, by REST."""
    return by_rest()


def requests(service: SlurmService) -> int:
    """How often slurmrestd was asked."""
    return sum(count for name, count in service.runner.counts.items() if name.startswith("slurmrestd"))


async def until_dead(manager: Any) -> None:
    """Wait until the manager knows that its kernel is no more."""
    deadline = time.monotonic() + READY
    while await manager.is_alive():
        assert time.monotonic() < deadline, "the kernel still counts as alive"
        await asyncio.sleep(0.05)


async def start_error(name: str) -> BaseException:
    """The error of a start that fails."""
    try:
        async with async_kernel(name):
            raise AssertionError("the kernel started")
    except Exception as error:  # noqa: BLE001 - the test checks its class
        return error


async def test_the_job_has_a_login_environment(service):
    """slurmrestd gives a job no HOME and no PATH; the kernel has both, as the node's user database says."""
    async with async_kernel("slurm") as (_manager, client):
        home, user, paths = (await async_execute(client, LOGIN)).split()
    assert user == rest_cluster.USER
    assert home == pwd.getpwnam(rest_cluster.USER).pw_dir
    assert int(paths) >= 1


async def test_a_share_that_is_not_free_is_refused(service, kernelspecs):
    """An isolated kernel that asks for more than the job has is refused in srun's words, and nothing else ends."""
    spec(kernelspecs, "small", gpus="1", runtime="5")
    async with async_kernel("small") as (manager, client):
        wanted = {"jobid": jobid_of(manager), "isolate": True, "gpus": "2", "cpus": 1, "memory": "200M"}
        spec(kernelspecs, "large", **wanted)
        error = await start_error("large")
        assert isinstance(error, AllocationError)
        assert slurm_says("a step with more GPUs than its job") in str(error)
        assert await async_execute(client, "print(1)") == "1"


async def test_the_end_of_a_steps_launcher_is_the_end_of_its_kernels(cluster, service, kernelspecs):
    """A launcher that is killed on another node takes its kernel with it, and neither the job nor the others."""
    spec(kernelspecs, "two", nodes="2", runtime="5")
    async with async_kernel("two") as (manager, client):
        jobid, node = jobid_of(manager), await async_execute(client, NODE)
        other = next(name for name in service.allocations_of("")[0]["nodes"] if name != node)
        spec(kernelspecs, "other", jobid=jobid, node=other)
        async with async_kernel("other") as (second, there):
            pid = int(await async_execute(there, "import os; print(os.getppid())"))
            psutil.Process(pid).kill()
            await until_dead(second)
            assert await async_execute(client, JOB) == jobid


async def test_a_job_with_another_step_is_kept(cluster, service):
    """The last kernel's stop leaves a job in which another step of the user's runs; it ends with that one."""
    async with async_kernel("slurm") as (manager, _client):
        jobid = jobid_of(manager)
        argv = ["srun", f"--jobid={jobid}", "--overlap", "sleep", "600"]
        other = await asyncio.create_subprocess_exec(*argv, env={"PATH": "/usr/bin", **cluster.environment()})
        assert await poll_async(lambda: len(steps_of(cluster, jobid)) == 1, timeout=READY)
    try:
        assert state_of(cluster, jobid) == "RUNNING"
    finally:
        other.terminate()
        await other.wait()
    assert await poll_async(lambda: state_of(cluster, jobid) == "", timeout=READY)


async def test_a_job_of_another_program_is_refused(cluster, service, kernelspecs):
    """Nothing can be started in a job from outside: one without our launcher is refused, and stays as it is."""
    argv = ["sbatch", "--parsable", "-t5", "-o", "/dev/null", "--wrap", "sleep 300"]
    jobid = slurm(*argv, cluster=cluster).stdout.strip()
    try:
        assert await poll_async(lambda: state_of(cluster, jobid) == "RUNNING", timeout=READY)
        spec(kernelspecs, "foreign", jobid=jobid)
        error = await start_error("foreign")
        assert isinstance(error, AllocationError)
        assert "Slurm's REST interface" in str(error)
        assert jobid in str(error)
        assert state_of(cluster, jobid) == "RUNNING"
    finally:
        slurm("scancel", jobid, cluster=cluster)


async def test_a_start_takes_the_requests_that_it_needs(by_rest):
    """The first one learns which version is spoken, and submits; a later one submits, and that is all."""
    service = by_rest(watch_interval=60.0)
    async with async_kernel("slurm"):
        assert requests(service) == 2
        async with async_kernel("slurm"):
            assert requests(service) == 3


async def test_a_token_that_expires_is_replaced_before(cluster, by_rest, minted):
    """A token that the command mints serves until shortly before its end; then there is another."""
    by_rest(rest_token_command=rest_cluster.mint_command(cluster, minted, lifespan=4))
    async with async_kernel("slurm") as (_manager, _client):
        # Nothing asks Slurm while a kernel runs: the first token is as old as the start.
        began, tokens = time.time(), len(minted.read_text().splitlines())
        assert await poll_async(lambda: time.time() > began + 5, timeout=10)
        async with async_kernel("slurm") as (_second, client):
            assert await async_execute(client, "print(1)") == "1"
        assert len(minted.read_text().splitlines()) > tokens


async def test_one_token_serves_many_requests(service, minted):
    """Two kernels, and one token."""
    async with async_kernel("slurm"), async_kernel("slurm"):
        assert minted.read_text().splitlines() == [rest_cluster.USER]


async def test_a_token_file_is_read_again(cluster, by_rest, tmp_path):
    """A token in the file that is no longer valid is an error that says so; the next one is taken without a restart."""
    path = rest_cluster.write_token(tmp_path / "token", slurm_token(cluster, rest_cluster.USER, lifespan=1))
    by_rest(rest_token_command=[], rest_token_file=str(path))
    began = time.time()
    assert await poll_async(lambda: time.time() > began + 2.5, timeout=10)
    error = await start_error("slurm")
    assert isinstance(error, SlurmUnavailable)
    assert slurm_says("a token that has expired") in str(error)
    rest_cluster.write_token(path, slurm_token(cluster, rest_cluster.USER))
    async with async_kernel("slurm") as (_manager, client):
        assert await async_execute(client, "print(1)") == "1"


@pytest.mark.parametrize(("mode", "words"), [(0o644, "chmod 600"), (0o600, "does not hold one token")])
async def test_a_token_file_that_is_no_good_is_refused(cluster, by_rest, tmp_path, mode, words):
    """One that others may read, and one that holds no token, are errors that say what to do."""
    path = tmp_path / "token"
    path.write_text("two words\n")
    path.chmod(mode)
    by_rest(rest_token_command=[], rest_token_file=str(path))
    error = await start_error("slurm")
    assert isinstance(error, SlurmUnavailable)
    assert words in str(error)


async def test_another_users_token_is_refused(cluster, by_rest, tmp_path):
    """A token is good for its own user only."""
    path = rest_cluster.write_token(tmp_path / "token", slurm_token(cluster, "nobody"))
    by_rest(rest_token_command=[], rest_token_file=str(path))
    error = await start_error("slurm")
    assert isinstance(error, SlurmUnavailable)
    assert "token" in str(error)
    assert jobs_of(cluster) == []


async def test_without_a_word_on_tokens_nothing_starts(by_rest):
    """Where tokens come from has to be said, once: there is no service before."""
    with pytest.raises(ConfigError, match="rest_token_file"):
        by_rest(rest_token_command=[])
    error = await start_error("slurm")
    assert isinstance(error, ConfigError)
    assert "rest_token_file" in str(error)


async def test_slurmrestd_is_restarted(cluster, service):
    """Without slurmrestd kernels live, restart, and new ones are refused at once; with it, they start again."""
    async with async_kernel("slurm") as (manager, client):
        await asyncio.to_thread(stop_daemon, cluster, "slurmrestd")
        try:
            error = await start_error("slurm")
            assert isinstance(error, SlurmUnavailable)
            assert "slurmrestd at http://127.0.0.1" in str(error)
            await manager.restart_kernel()
            await client.wait_for_ready(timeout=READY)
            assert await async_execute(client, "print(1)") == "1"
        finally:
            await asyncio.to_thread(start_daemon, cluster, "slurmrestd")
        async with async_kernel("slurm") as (_second, other):
            assert await async_execute(other, "print(2)") == "2"


async def test_the_command_line_lists_and_cancels(cluster, service, capfd):
    """``jupyter slurm allocations`` asks slurmrestd, too."""
    from gateway_slurm.cli.app import main

    async with async_kernel("slurm") as (manager, _client):
        jobid = jobid_of(manager)
        assert await asyncio.to_thread(main, ["allocations", "list", "--json"]) == 0
        rows = {row["jobid"]: row for row in json.loads(capfd.readouterr().out)}
        assert rows[jobid]["state"] == "RUNNING"
        assert await asyncio.to_thread(main, ["allocations", "cancel", jobid]) == 0
        assert await poll_async(lambda: state_of(cluster, jobid) in ("", "COMPLETING"), timeout=READY)
    assert poll(lambda: state_of(cluster, jobid) == "", timeout=READY)


@pytest.mark.slow
async def test_slurmctld_is_down_for_a_while(by_rest, cluster, caplog):
    """Kernels live and restart; a start is refused in Slurm's words; later starts succeed again."""
    by_rest(watch_interval=0.2)
    async with async_kernel("slurm") as (manager, client):
        process = manager.provisioner._handle.process
        await asyncio.to_thread(stop_daemon, cluster, "slurmctld")
        try:
            began = time.monotonic()
            with pytest.raises(SlurmUnavailable) as refused:
                await AsyncKernelManager(kernel_name="slurm").start_kernel()
            assert "Unable to contact slurm controller" in str(refused.value)
            # slurmrestd itself waits for ten.
            assert time.monotonic() - began < 20
            await manager.restart_kernel()
            await client.wait_for_ready(timeout=READY)
            # A link that breaks meanwhile does not mean that the job is over.
            launcher = psutil.Process(int(await async_execute(client, "import os; print(os.getppid())")))
            launcher.suspend()
            process.launcher.link.close("broken by the test")
            assert process.phase is Phase.LOST
            assert await poll_async(lambda: "Slurm did not report the jobs" in caplog.text, timeout=READY)
            assert process.phase is Phase.LOST
            launcher.resume()
            assert await poll_async(lambda: process.phase is Phase.RUNNING, timeout=READY)
            assert await async_execute(client, "print(1)") == "1"
        finally:
            await asyncio.to_thread(start_daemon, cluster, "slurmctld")
        async with async_kernel("slurm") as (_second, other):
            assert await async_execute(other, "print(2)") == "2"
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)
    assert poll(lambda: job_processes(cluster.slurm_conf) == [], timeout=READY)


async def test_the_token_is_in_no_log_and_no_command_line(by_rest, cluster, tmp_path, monkeypatch, caplog):
    """Neither this process nor the launcher logs it at any level, with slurmrestd and without it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    caplog.set_level(logging.DEBUG)
    token = slurm_token(cluster, rest_cluster.USER)
    path = rest_cluster.write_token(tmp_path / "token", token)
    service = by_rest(rest_token_command=[], rest_token_file=str(path), deployment="tests")
    service._ensure_thread().set_debug(True)
    async with async_kernel("slurm") as (_manager, client):
        assert await async_execute(client, "import os; print(any('JWT' in name for name in os.environ))") == "False"
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        assert not any(token in line for line in lines)
        await asyncio.to_thread(stop_daemon, cluster, "slurmrestd")
        try:
            with pytest.raises(SlurmUnavailable):
                await AsyncKernelManager(kernel_name="slurm").start_kernel()
        finally:
            await asyncio.to_thread(start_daemon, cluster, "slurmrestd")
    assert "slurmrestd" in caplog.text
    assert token not in caplog.text
    written = [path.read_text(errors="replace") for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert written
    assert not any(token in text for text in written)
    state = [path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert not any(token.encode() in data for data in state)
