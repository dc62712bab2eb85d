"""Kernels and allocations of several owners through one service: none sees or touches another's."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.errors import AllocationError, RequestError, UnknownJob
from gateway_slurm.slurm.driver import CommandLineDriver
from helpers.kernel_clients import (
    JOB,
    READY,
    async_execute,
    async_kernel,
    commands_run,
    install_kernelspec,
    job_state,
    jobid_of,
    poll_async,
)
from helpers.private_slurm import slurm
from helpers.server_processes import on_record

SHARE = {"share": True}


@asynccontextmanager
async def kernel_of(owner, name="slurm", **fields):
    """A kernel of ``owner`` with these request fields over those of its kernelspec."""
    async with async_kernel(name, slurm_owner=owner, slurm_fields=fields) as (manager, client):
        yield manager, client


async def test_allocations_are_shared_by_their_owner_only(service, kernelspecs):
    """``share`` joins a job of the same owner's; another owner, and the process's user, get jobs of their own."""
    async with kernel_of("ada", **SHARE) as (first, _), kernel_of("ada", **SHARE) as (second, _):
        assert jobid_of(first) == jobid_of(second)
        async with kernel_of("bob", **SHARE) as (third, client), kernel_of("", **SHARE) as (fourth, _):
            assert len({jobid_of(manager) for manager in (first, third, fourth)}) == 3
            assert await async_execute(client, JOB) == jobid_of(third)


@pytest.mark.parametrize("other", ["bob", ""])
async def test_a_job_of_another_owner_cannot_be_named(service, kernelspecs, other):
    """``jobid`` of another owner's job is refused without a word on it, and without asking Slurm."""
    async with kernel_of("ada") as (manager, _client):
        jobid, before = jobid_of(manager), commands_run(service)
        with pytest.raises(AllocationError) as caught:
            async with kernel_of(other, jobid=jobid):
                pass
        assert str(caught.value) == f"jobid {jobid} is not a job of yours; name one of your own, or none"
        assert commands_run(service) == before
        async with kernel_of("ada", jobid=jobid) as (second, _client):
            assert jobid_of(second) == jobid


async def test_an_owner_of_a_shared_account_names_no_job_from_elsewhere(service, kernelspecs, cluster):
    """A job of the account's that this owner did not make, and one that is not there, get the same refusal."""
    jobid = slurm("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 300", cluster=cluster).stdout.strip()
    try:
        for named in (jobid, "99999999"):
            with pytest.raises(AllocationError, match=f"^jobid {named} is not a job of yours"):
                async with kernel_of("ada", jobid=named):
                    pass
        async with kernel_of("", jobid=jobid) as (_manager, client):
            assert await async_execute(client, JOB) == jobid
    finally:
        slurm("scancel", jobid, cluster=cluster, check=False)


async def test_each_owner_is_shown_their_own_allocations(service, kernelspecs):
    """The list has state, nodes, end, kernels and what was asked for; an admin's list has those of all users."""
    assert service.allocations_of("ada") == service.allocations_of(None) == []
    async with kernel_of("ada", gpus=1) as (first, _), kernel_of("bob") as (second, _):
        (row,) = service.allocations_of("ada")
        assert {name: row[name] for name in ("jobid", "owner", "state", "reason", "queue_place", "kept")} == {
            "jobid": jobid_of(first),
            "owner": "ada",
            "state": "RUNNING",
            "reason": "",
            "queue_place": None,
            "kept": False,
        }
        assert row["kernel_ids"] == [first.provisioner.kernel_id]
        assert row["nodes"] == [first.provisioner._handle.process.launcher.node]
        assert row["config"]["gpus"] == 1
        assert row["end_time"] > 0
        all_users = [row["jobid"] for row in service.allocations_of(None)]
        assert all_users == sorted([jobid_of(first), jobid_of(second)], key=int)
        assert service.allocations_of("") == service.allocations_of("eve") == []
        owners = {record.jobid: record.owner for _server, record in on_record()}
        assert owners == {jobid_of(first): "ada", jobid_of(second): "bob"}


async def test_an_owner_keeps_releases_and_cancels_their_own(service, kernelspecs):
    """Keep, release and cancel do to one's own job what they say, and to another's nothing."""
    async with kernel_of("ada") as (manager, _client):
        jobid = jobid_of(manager)
        for action in (service.keep_allocation, service.release_allocation, service.cancel_allocation):
            for owner in ("bob", ""):
                with pytest.raises(UnknownJob, match=jobid):
                    await service.run(action(owner, jobid))
        await service.run(service.keep_allocation("ada", jobid))
        await manager.shutdown_kernel()
    assert [(row["kept"], row["kernel_ids"]) for row in service.allocations_of("ada")] == [(True, [])]
    assert job_state(jobid) == "RUNNING"
    await service.run(service.release_allocation("ada", jobid))
    assert await poll_async(lambda: job_state(jobid) == "", timeout=READY)
    assert service.allocations_of(None) == []
    async with kernel_of("ada") as (manager, _client):
        await service.run(service.release_allocation("ada", jobid_of(manager)))  # a kernel is in it: it stays
        assert await manager.is_alive()
        await service.run(service.cancel_allocation(None, jobid_of(manager)))
        assert await poll_async(lambda: manager.provisioner.exit_reason != "", timeout=READY)
        assert await poll_async(lambda: service.allocations_of("ada") == [], timeout=READY)


async def test_one_squeue_asks_about_the_waiting_jobs_of_all_owners(admin_settings, kernelspecs, cluster, monkeypatch):
    """Waiting starts are shown to their own owners, and Slurm is asked about all in one call, never in two at once."""
    service = admin_settings(watch_interval=0.1)
    argv = ("sbatch", "--parsable", "--exclusive", "-N4", "-o/dev/null", "--wrap", "sleep 300")
    filler = slurm(*argv, cluster=cluster).stdout.strip()
    assert await poll_async(lambda: job_state(filler) == "RUNNING", timeout=READY)
    asked, under_way = spy_on_jobs(monkeypatch)
    managers = {owner: AsyncKernelManager(kernel_name="slurm", kernel_id=f"of-{owner}") for owner in ("ada", "bob")}
    starts = [asyncio.ensure_future(manager.start_kernel(slurm_owner=owner)) for owner, manager in managers.items()]
    assert await poll_async(lambda: any(len(jobids) == 2 for jobids in asked), timeout=READY)
    for owner, other in (("ada", "bob"), ("bob", "ada")):
        assert await poll_async(lambda: service.waiting(f"of-{owner}", owner) is not None, timeout=READY)  # noqa: B023
        assert service.waiting(f"of-{owner}", other) is None
        (row,) = service.allocations_of(owner)
        assert (row["state"], row["kernel_ids"], row["nodes"]) == ("PENDING", [f"of-{owner}"], [])
    slurm("scancel", filler, cluster=cluster)
    await asyncio.gather(*starts)
    assert max(under_way) == 1
    for manager in managers.values():
        await manager.shutdown_kernel()


def spy_on_jobs(monkeypatch) -> tuple[list[list[str]], list[int]]:
    """Note which jobs Slurm is asked about together, and how many such questions are under way at each."""
    asked: list[list[str]] = []
    under_way: list[int] = []
    jobs = CommandLineDriver.jobs
    running: set[object] = set()

    async def noted(driver, jobids):
        question = object()
        running.add(question)
        asked.append(sorted(jobids))
        under_way.append(len(running))
        try:
            return await jobs(driver, jobids)
        finally:
            running.discard(question)

    monkeypatch.setattr(CommandLineDriver, "jobs", noted)
    return asked, under_way


# -- what a kernel manager hands through ------------------------------------------------------------------


async def test_fields_and_owner_stay_over_a_restart_and_go_nowhere_else(service, kernelspecs):
    """What the manager gave at the start holds for the restart, whatever that says; a kernel does not see it."""
    async with kernel_of("ada", gpus=1) as (manager, client):
        jobid = jobid_of(manager)
        await manager.restart_kernel(slurm_owner="bob", slurm_fields={"gpus": 0})
        await client.wait_for_ready(timeout=READY)
        assert jobid_of(manager) == jobid
        assert [row["jobid"] for row in service.allocations_of("ada")] == [jobid]
        assert manager.provisioner._request.gpus == 1
        assert await async_execute(client, "import os; print([v for v in os.environ.values() if 'ada' in v])") == "[]"


async def test_given_fields_are_checked_like_those_of_a_kernelspec(service, kernelspecs):
    """An invalid or unknown field is refused with its name, and an unset one takes the kernelspec's away."""
    install_kernelspec(kernelspecs, "gpu", config_overrides={"gpus": 2})
    for fields in ({"gpus": "many"}, {"gpu": 1}):
        with pytest.raises(RequestError, match="gpu"):
            await AsyncKernelManager(kernel_name="gpu").start_kernel(slurm_owner="ada", slurm_fields=fields)
    async with kernel_of("ada", "gpu", gpus=None) as (manager, _client):
        assert manager.provisioner._request.gpus == 0


@pytest.mark.parametrize("field", ["slurm_owner", "slurm_maker", "slurm_fields", "owner"])
async def test_a_kernelspec_names_no_owner(service, kernelspecs, field):
    """Whose a kernel is stands in no kernelspec: there it is an unknown field."""
    install_kernelspec(kernelspecs, "sly", config_overrides={field: {"gpus": 1} if field == "slurm_fields" else "bob"})
    with pytest.raises(RequestError, match=f"unknown request field '{field}'"):
        await AsyncKernelManager(kernel_name="sly").start_kernel(slurm_owner="ada")
    assert commands_run(service) == 0
