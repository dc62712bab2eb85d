"""The last kernel of a job stops while something is broken: others in the job go on, and it is not lost sight of."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gateway_slurm.allocations import release
from gateway_slurm.kernels.model import Phase
from helpers.failing_starts import cut_links, nothing_left, spec, wrapped_command
from helpers.kernel_clients import READY, async_kernel, forget_service, job_state, jobid_of, poll_async
from helpers.private_slurm import poll, slurm
from helpers.server_processes import on_record

DOWN = "Unable to contact slurm controller (connect failure)"


@pytest.fixture(autouse=True)
def state(service, tmp_path, monkeypatch) -> None:
    """A store of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


class Failing:
    """One of Slurm's commands, which finds no controller while the test says so."""

    def __init__(self, directory: Path, command: str) -> None:
        self.down, self.asked = directory / f"{command}-is-down", directory / f"{command}-was-asked"
        lines = f"test -e {self.down} && {{ echo x >>{self.asked}; echo '{command}: error: {DOWN}' >&2; exit 1; }}"
        self.path = wrapped_command(directory / "bin", command, lines)

    def times(self) -> int:
        """How often it was asked in vain."""
        return self.asked.read_text().count("x") if self.asked.exists() else 0


@contextmanager
def users_step(jobid: str, cluster) -> Iterator[psutil.Process]:
    """What the user runs in the job from a terminal; gives its srun."""
    srun = psutil.Popen(["srun", f"--jobid={jobid}", "--overlap", "sleep", "300"])
    try:
        listed = ("squeue", "--steps", "-h", "-j", jobid, "--format=%j")
        assert poll(lambda: "sleep" in slurm(*listed, cluster=cluster).stdout.split(), timeout=READY)
        yield srun
    finally:
        srun.terminate()
        srun.wait(timeout=READY)


def launcher_of(manager) -> psutil.Process:
    """The launcher of a kernel on this machine, which is every node."""
    return psutil.Process(manager.provisioner._handle.process.pid).parent()


async def stop_without_link(manager) -> psutil.Process:
    """The kernel is over while its launcher cannot be reached; return the launcher, which stands still."""
    process, launcher = manager.provisioner._handle.process, launcher_of(manager)
    launcher.suspend()
    assert await asyncio.to_thread(cut_links) == 1
    assert await poll_async(lambda: process.phase is Phase.LOST, timeout=READY)
    await manager.provisioner.cleanup()
    return launcher


@pytest.fixture
def adopted(cluster) -> Iterator[str]:
    """A job that the user has made."""
    said = slurm("salloc", "--no-shell", "-t5", cluster=cluster).stderr
    jobid = said.split("Granted job allocation ")[1].split()[0]
    yield jobid
    slurm("scancel", jobid, cluster=cluster)


def recorded_jobs() -> list[str | None]:
    """The ids of the jobs on record."""
    return [record.jobid for _server, record in on_record()]


async def test_who_works_in_a_job_goes_on_when_its_last_kernel_stops_without_a_link(service, cluster):
    """That the link is broken just then does not mean that the job never ran."""
    async with async_kernel("slurm") as (manager, _client):
        jobid = jobid_of(manager)
        with users_step(jobid, cluster) as srun:
            asked = service.runner.counts["squeue"]
            launcher = await stop_without_link(manager)
            assert service.runner.counts["squeue"] > asked
            assert service.runner.counts["scancel"] == 0
            assert job_state(jobid) == "RUNNING"
            assert srun.is_running()
            launcher.resume()
    assert await asyncio.to_thread(nothing_left, cluster, timeout=READY)


async def test_who_works_in_a_job_goes_on_while_slurm_does_not_say_so(admin_settings, cluster, tmp_path, monkeypatch):
    """The server asks it again, and ends the job when it reports that no other step runs there."""
    monkeypatch.setattr(release, "IN_USE_RETRY_DELAY", 0.2)
    squeue = Failing(tmp_path, "squeue")
    admin_settings(slurm_path=squeue.path)
    async with async_kernel("slurm") as (manager, _client):
        jobid = jobid_of(manager)
        with users_step(jobid, cluster) as srun:
            squeue.down.touch()
            await manager.shutdown_kernel()
            assert await poll_async(lambda: squeue.times() > 1, timeout=READY)
            squeue.down.unlink()
            assert job_state(jobid) == "RUNNING"
            assert srun.is_running()
    assert await asyncio.to_thread(nothing_left, cluster, timeout=READY)


async def test_a_job_of_ours_is_not_kept_on_a_guess_for_ever(admin_settings, cluster, tmp_path, monkeypatch, caplog):
    """If Slurm still does not answer, the server sends the launcher away."""
    monkeypatch.setattr(release, "IN_USE_RETRY_DELAY", 0.2)
    monkeypatch.setattr(release, "MAX_STEPS_UNKNOWN", 0.5)
    squeue = Failing(tmp_path, "squeue")
    admin_settings(slurm_path=squeue.path)
    async with async_kernel("slurm") as (manager, _client):
        jobid = jobid_of(manager)
        squeue.down.touch()
        await manager.shutdown_kernel()
        assert await asyncio.to_thread(nothing_left, cluster, timeout=READY)
    assert "it is not known whether others use it" in caplog.text
    assert f"job {jobid} is released" in caplog.text
    assert await poll_async(lambda: not recorded_jobs(), timeout=READY)


async def test_a_job_stays_on_record_until_slurm_has_ended_it(
    admin_settings, kernelspecs, adopted, tmp_path, monkeypatch
):
    """However often scancel has to be run for that."""
    monkeypatch.setattr(release, "MAX_CANCEL_RETRY_DELAY", 0.5)
    scancel = Failing(tmp_path, "scancel")
    admin_settings(slurm_path=scancel.path)
    async with async_kernel(spec(kernelspecs, jobid=adopted)) as (manager, _client):
        scancel.down.touch()
        stopping = asyncio.ensure_future(manager.shutdown_kernel())
        # More often than it was tried before it was given up.
        assert await poll_async(lambda: scancel.times() > 4, timeout=READY)
        assert recorded_jobs() == [adopted]
        assert job_state(adopted) == "RUNNING"
        scancel.down.unlink()
        await stopping
    assert await poll_async(lambda: job_state(adopted) == "" and not recorded_jobs(), timeout=READY)


async def test_a_server_that_ends_meanwhile_leaves_it_on_record(admin_settings, cluster, tmp_path, monkeypatch):
    """For the next one, which its launcher may come back to, or which sees when the job is over."""
    monkeypatch.setattr(release, "END_TIMEOUT", 2.0)
    scancel = Failing(tmp_path, "scancel")
    admin_settings(slurm_path=scancel.path, orphan_timeout=1.0, heartbeat=0.3)
    async with async_kernel("slurm") as (manager, _client):
        jobid = jobid_of(manager)
        scancel.down.touch()
        launcher = await stop_without_link(manager)
        assert scancel.times()
        await asyncio.to_thread(forget_service)
        assert recorded_jobs() == [jobid]
        launcher.resume()
    assert await asyncio.to_thread(nothing_left, cluster, timeout=READY)
