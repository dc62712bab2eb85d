"""Servers that reach Slurm by its REST interface: they end, and so do Slurm's daemons; nobody's kernel does."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.kernels.model import Phase
from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import job_processes
from helpers import rest_cluster
from helpers.daemons import slurm_token, start_daemon, stop_daemon
from helpers.dying_servers import adopt, call, driven_server
from helpers.kernel_clients import (
    PID,
    READY,
    async_execute,
    async_kernel,
    forget_service,
    install_kernelspec,
    poll_async,
)
from helpers.kernel_clients import write_admin_settings as write
from helpers.private_slurm import jobs_of, poll, slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    """In place of the session's cluster: one with slurmrestd, which no command of this process's reaches."""
    with rest_cluster.cluster_by_rest() as private:
        yield private


@pytest.fixture
def token(cluster: PrivateCluster, tmp_path: Path) -> str:
    """The token that is in the file of the settings."""
    token = slurm_token(cluster, rest_cluster.USER)
    rest_cluster.write_token(tmp_path / "token", token)
    return token


@pytest.fixture
def by_rest(
    cluster: PrivateCluster, kernelspecs: Path, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., SlurmService]]:
    """``by_rest(heartbeat=1)`` is the service of a deployment; servers in other processes are of the same one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    written: list[Path] = []

    def make(**traits: object) -> SlurmService:
        forget_service()
        settings = {"cluster": cluster.rest_url, "rest_token_file": str(tmp_path / "token"), "deployment": "tests"}
        written.append(write(**{**settings, "log_directory": str(tmp_path / "logs"), **traits}))
        return SlurmService.instance()

    ipython = {"IPYTHONDIR": str(kernelspecs.parent / "ipython-on-node")}
    install_kernelspec(kernelspecs, "slurm", spec_overrides={"env": ipython})
    yield make
    forget_service()
    for path in written:
        path.unlink(missing_ok=True)


def states(cluster: PrivateCluster) -> dict[str, str]:
    """What squeue says of each job."""
    return {line.split()[0]: line.split()[1] for line in jobs_of(cluster)}


async def is_over(cluster: PrivateCluster) -> bool:
    """Whether no job is left, and no process of one."""
    gone = await poll_async(lambda: states(cluster) == {}, timeout=READY)
    return gone and await asyncio.to_thread(poll, lambda: job_processes(cluster.slurm_conf) == [], timeout=READY)


async def test_the_next_server_has_the_kernels_again_with_the_steps_of_its_jobs(by_rest, cluster):
    """After a kill: the job's own kernel, and one that its launcher started by srun; the job ends with the last."""
    service = by_rest()
    with driven_server() as first:
        one = await call(first, "start", name="slurm", slurm_fields={"cpus": 2, "memory": "500M"})
        isolated = {"jobid": one["jobid"], "isolate": True, "cpus": 1, "memory": "200M"}
        two = await call(first, "start", name="slurm", slurm_fields=isolated)
        assert await call(first, "execute", kernel_id=two["kernel_id"], code="x = 41") == "ok"
        first.signal(signal.SIGKILL)
    restored = {each.record.kernel_id: each for each in await service.run(service.restore())}
    assert set(restored) == {one["kernel_id"], two["kernel_id"]}
    managers = {kernel_id: adopt(each, "slurm") for kernel_id, each in restored.items()}
    for known in (one, two):
        client = managers[known["kernel_id"]].client()
        client.start_channels()
        await client.wait_for_ready(timeout=READY)
        assert await async_execute(client, PID) == str(known["pid"])
        if known is two:
            assert await async_execute(client, "print(x + 1)") == "42"
        client.stop_channels()
    # One more step, asked for by this server.
    third = await _start(service, isolated)
    assert third.provisioner.jobid == one["jobid"]
    for manager in (third, managers[two["kernel_id"]]):
        await manager.shutdown_kernel()
        assert states(cluster) == {one["jobid"]: "RUNNING"}
    await managers[one["kernel_id"]].shutdown_kernel()
    assert await is_over(cluster)


async def _start(service, fields):
    from jupyter_client import AsyncKernelManager

    manager = AsyncKernelManager(kernel_name="slurm")
    await manager.start_kernel(slurm_fields=fields)
    return manager


async def test_a_kernel_whose_job_ended_meanwhile_is_dead_with_slurms_word(by_rest, cluster):
    """No launcher comes: slurmrestd is asked, and says that the job is over."""
    service = by_rest()
    with driven_server() as first:
        known = await call(first, "start", name="slurm")
        first.signal(signal.SIGKILL)
    slurm("scancel", known["jobid"], cluster=cluster)
    assert await is_over(cluster)
    (restored,) = await service.run(service.restore())
    manager = adopt(restored, "slurm")
    assert f"job {known['jobid']}" in await manager.provisioner.until_over()
    await manager.shutdown_kernel(now=True)


async def test_a_start_that_was_under_way_is_given_up_with_its_job(by_rest, cluster):
    """Its job waits in the queue, and nobody for it: the next server cancels it."""
    service = by_rest()
    argv = ["sbatch", "--parsable", "--exclusive", "-N4", "-o/dev/null", "--wrap", "sleep 300"]
    filler = slurm(*argv, cluster=cluster).stdout.strip()
    assert await poll_async(lambda: states(cluster) == {filler: "RUNNING"}, timeout=READY)
    try:
        with driven_server() as first:
            await call(first, "begin", name="slurm")
            assert await poll_async(lambda: "PENDING" in states(cluster).values(), timeout=READY)
            first.signal(signal.SIGKILL)
        assert await service.run(service.restore()) == []
        assert await poll_async(lambda: states(cluster) == {filler: "RUNNING"}, timeout=READY)
    finally:
        slurm("scancel", filler, cluster=cluster)


@pytest.mark.slow
async def test_slurmctld_is_down_for_a_while(by_rest, cluster, caplog):
    """Kernels live and are restarted; a start is refused in words; afterwards there are starts again."""
    service = by_rest(watch_interval=0.2)
    async with async_kernel("slurm") as (manager, client):
        process = manager.provisioner._handle.process
        await asyncio.to_thread(stop_daemon, cluster, "slurmctld")
        try:
            began = time.monotonic()
            with pytest.raises(SlurmUnavailable) as refused:
                await _start(service, {})
            assert "Unable to contact slurm controller" in str(refused.value)
            # slurmrestd itself waits for ten.
            assert time.monotonic() - began < 20
            await manager.restart_kernel()
            await client.wait_for_ready(timeout=READY)
            # A link that breaks meanwhile is no reason to take the job for over.
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
    assert await is_over(cluster)


async def test_the_token_is_in_no_log_and_no_command_line(by_rest, cluster, token, tmp_path, caplog):
    """However much is logged; neither here nor in what the launcher writes; with slurmrestd and without."""
    caplog.set_level(logging.DEBUG)
    service = by_rest()
    service._ensure_thread().set_debug(True)
    async with async_kernel("slurm") as (_manager, client):
        assert await async_execute(client, "import os; print(any('JWT' in name for name in os.environ))") == "False"
        lines = [" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"])]
        assert not any(token in line for line in lines)
        await asyncio.to_thread(stop_daemon, cluster, "slurmrestd")
        try:
            with pytest.raises(SlurmUnavailable):
                await _start(service, {})
        finally:
            await asyncio.to_thread(start_daemon, cluster, "slurmrestd")
    assert "slurmrestd" in caplog.text
    assert token not in caplog.text
    written = [path.read_text(errors="replace") for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert written
    assert not any(token in text for text in written)
    state = [path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert not any(token.encode() in data for data in state)
