"""What is wrong with a request, or with the admin's settings, is said at once and in so many words."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.config import FILE_NAME
from gateway_slurm.errors import AllocationError, ConfigError, RequestError, SlurmNotInstalled, SubmitRefused
from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from helpers import kernel_clients
from helpers.daemons import start_daemon, stop_daemon
from helpers.failing_starts import SOON, all_nodes_taken, jobs_of_ours, python_script, script, spec, start_error
from helpers.kernel_clients import execute, poll_async, running_kernel
from helpers.private_slurm import jobs_of, slurm
from helpers.slurm_versions import slurm_says


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"partition": "nosuch"}, "invalid partition"),
        ({"node": "c77"}, "invalid node name"),
        ({"gpus": 3}, "node configuration is not available"),
        ({"gres": "nosuch:1"}, "invalid generic resource"),
        ({"reservation": "nosuch"}, "reservation"),
        ({"constraint": "nosuch"}, "feature"),
        ({"memory": "900G"}, "memory"),
    ],
)
def test_slurms_refusal_is_quoted(service, cluster, kernelspecs, fields, words):
    """What sbatch refuses is an error within 2 s with Slurm's own words, and there is no job."""
    error, seconds = start_error(spec(kernelspecs, **fields))
    assert isinstance(error, SubmitRefused)
    assert words in str(error).lower()
    assert seconds < SOON
    assert jobs_of(cluster) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nodes": "two"}, "'nodes': 'two'"),
        ({"nodes": 0}, "'nodes': 0"),
        ({"runtime": -3}, "'runtime': -3"),
        ({"runtime": 1.5}, "'runtime': 1.5"),
        ({"partition": "batch --uid=0"}, "'partition': 'batch --uid=0'"),
        ({"gpus": True}, "'gpus': True"),
        ({"jobid": "12_3"}, "'jobid': '12_3'"),
        ({"kernel_argv": "python"}, "'kernel_argv': 'python'"),
        ({"project": None}, "'project' is missing"),
        ({"partition": None}, "'partition' is missing"),
        ({"nodes": "None"}, "'nodes' is missing"),
        ({"runtime": ""}, "'runtime' (or 'time') is missing"),
        ({"kernel_argv": None}, "'kernel_argv' (or 'kernel_name') is missing"),
        ({"partitoin": "batch"}, "'partitoin'; did you mean 'partition'?"),
        ({"kernel_argv": None, "kernel_name": "nosuch"}, "no kernelspec 'nosuch'"),
        ({"connect": "direct"}, "connect = direct"),
    ],
)
def test_a_wrong_field_is_named(service, cluster, kernelspecs, fields, words):
    """A field that is missing, unknown or not valid is named with its value; Slurm is not asked at all."""
    error, seconds = start_error(spec(kernelspecs, **fields))
    assert isinstance(error, RequestError)
    assert words in str(error)
    assert seconds < SOON
    assert kernel_clients.commands_run(service) == 0


def test_a_job_that_can_never_start_is_an_error_at_the_first_look(service, cluster, kernelspecs):
    """What Slurm only queues though it can never run fails within 2 s, with the reason and what to change."""
    error, seconds = start_error(spec(kernelspecs, partition="devel", runtime=31))
    assert isinstance(error, AllocationError)
    assert "PartitionTimeLimit" in str(error)
    assert "runtime" in str(error)
    assert seconds < SOON


def test_more_nodes_than_there_are_is_an_error_at_once(service, cluster, kernelspecs):
    """The same, where Slurm does not refuse such a job itself."""
    error, seconds = start_error(spec(kernelspecs, nodes=5))
    if slurm_says("a job with more nodes than there are") == "refused":
        assert isinstance(error, SubmitRefused)
        assert "Requested node configuration is not available" in str(error)
    else:
        assert isinstance(error, AllocationError)
        assert "PartitionNodeLimit" in str(error)
    assert "nodes" in str(error)
    assert seconds < SOON


async def test_a_job_that_one_of_its_partitions_cannot_run_waits_for_another(service, cluster, kernelspecs):
    """Slurm may give the reason of the partition that cannot run the job; the job starts in the other one."""
    manager = AsyncKernelManager(kernel_name=spec(kernelspecs, partition="batch,devel", runtime=31))
    with all_nodes_taken(cluster):
        # Slurm looks at batch no more once an earlier job waits there, so that devel's reason stays.
        slurm("sbatch", "--nodes=4", "--exclusive", "--wrap=sleep 600", cluster=cluster)
        start = asyncio.ensure_future(manager.start_kernel())
        assert await poll_async(lambda: "PartitionTimeLimit" in reasons(service), timeout=20), reasons(service)
        slurm("scancel", "--name=wrap", cluster=cluster)
        await asyncio.wait_for(start, 60)
    await manager.shutdown_kernel(now=True)


async def test_a_held_job_waits_and_the_log_says_how_to_release_it(service, cluster, kernelspecs, caplog):
    """The start goes on once the user has released the job."""
    caplog.set_level("INFO")
    manager = AsyncKernelManager(kernel_name="slurm")
    with all_nodes_taken(cluster) as blocker:
        start = asyncio.ensure_future(manager.start_kernel())
        assert await poll_async(lambda: jobs_of_ours(cluster) != [], timeout=15)
        (job,) = jobs_of_ours(cluster)
        slurm("scontrol", "hold", job, cluster=cluster)
        slurm("scancel", blocker, cluster=cluster)
        # root's hold is an administrator's
        assert await poll_async(
            lambda: " holds the job" in caplog.text or "scontrol release" in caplog.text, timeout=20
        )
        assert reasons(service)[0] in ("JobHeldUser", "JobHeldAdmin")
        slurm("scontrol", "release", job, cluster=cluster)
        await asyncio.wait_for(start, 60)
    await manager.shutdown_kernel(now=True)


def test_a_job_that_the_user_names_and_that_can_never_start_is_refused_and_stays(service, cluster, kernelspecs):
    """A start in it would wait without a limit; the job is the user's, and is not cancelled."""
    submitted = slurm("sbatch", "--parsable", "--partition=devel", "--time=31", "--wrap=true", cluster=cluster)
    job = submitted.stdout.strip()
    try:
        error, _seconds = start_error(spec(kernelspecs, jobid=job))
        assert isinstance(error, AllocationError)
        # Slurm's reason changes with its scheduler's next look at the job.
        assert re.search(r"PartitionTimeLimit|PartitionConfig", str(error))
        assert "cancelled" not in str(error)
        assert [line.split()[0] for line in jobs_of(cluster)] == [job]
    finally:
        slurm("scancel", job, cluster=cluster)


def reasons(service: SlurmService) -> list[str]:
    """Slurm's reasons for the jobs of this process."""
    return [row["reason"] for row in service.allocations_of("")]


# Job 1 may be anybody's: of an earlier test, and of a Unix user that this one made.
@pytest.mark.parametrize(("jobid", "words"), [("999999", "does not know job 999999"), ("1", r"job(id)? 1\b")])
def test_a_jobid_that_is_no_job_is_refused(service, cluster, kernelspecs, jobid, words):
    """A jobid that Slurm does not know, or that is over, is an error that names it."""
    error, seconds = start_error(spec(kernelspecs, jobid=jobid))
    assert re.search(words, str(error))
    assert seconds < SOON


def test_without_slurms_commands_the_error_says_what_to_install(admin_settings, cluster, tmp_path):
    """Where there is no sbatch the error names the command, the place, and what to do."""
    admin_settings(slurm_path=str(tmp_path))
    error, seconds = start_error("slurm")
    assert isinstance(error, SlurmNotInstalled)
    assert "'sbatch'" in str(error)
    assert str(tmp_path) in str(error)
    assert "install" in str(error)
    assert seconds < SOON


@pytest.mark.timeout(180)
def test_without_a_controller_the_error_says_so(service, cluster):
    """While slurmctld is down a start fails with Slurm's words, and works again when it is back."""
    stop_daemon(cluster, "slurmctld")
    try:
        error, _seconds = start_error("slurm")
    finally:
        start_daemon(cluster, "slurmctld")
    assert "slurmctld" in str(error)
    assert "controller" in str(error).lower()
    with running_kernel("slurm") as (_manager, client):
        assert execute(client, "print(1)") == "1"


# -- with accounting ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict_cluster() -> Iterator[PrivateCluster]:
    """A cluster that knows accounts, and refuses jobs that can never start when they are submitted."""
    with tempfile.TemporaryDirectory(prefix="gst-", dir="/tmp") as base:
        extra = "EnforcePartLimits=ALL\nAccountingStorageEnforce=associations,limits,qos"
        with PrivateCluster(Path(base) / "s", nodes=1, accounting=True, extra_conf=extra) as private:
            yield private


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"project": "wrong"}, "invalid account"),
        ({"qos": "nosuch"}, "invalid qos"),
        ({"nodes": 2}, "node count specification invalid"),
        ({"partition": "devel", "runtime": 31}, "time limit"),
    ],
)
def test_accounts_and_limits_are_refused_in_slurms_words(strict_cluster, admin_settings, kernelspecs, fields, words):
    """An account that the user is not in, and a limit that Slurm enforces at once, are quoted."""
    admin_settings(slurm_conf=str(strict_cluster.slurm_conf))
    error, seconds = start_error(spec(kernelspecs, **fields))
    assert isinstance(error, SubmitRefused)
    assert words in str(error).lower()
    assert seconds < SOON
    assert jobs_of(strict_cluster) == []


# -- the account hook -----------------------------------------------------------------------------


def test_the_account_hook_gives_account_and_environment(strict_cluster, admin_settings, kernelspecs, tmp_path):
    """What the hook exports reaches the kernel, and its account is the job's; nothing of it is run."""
    marker = tmp_path / "run"
    lines = f"export BUDGET_ACCOUNTS=demo;\nexport PROJECT=/p/$1;\nexport ODD='$(touch {marker})';\n"
    hook = script(tmp_path / "hook", f"#!/bin/sh\ncat <<EOF\n{lines.replace('$(', chr(92) + '$(')}EOF\n")
    admin_settings(slurm_conf=str(strict_cluster.slurm_conf), account_command=[hook, "{project}"])
    with running_kernel(spec(kernelspecs, project="climate")) as (_manager, client):
        read = "import os; print(*[os.environ[n] for n in ('SLURM_JOB_ACCOUNT', 'PROJECT', 'ODD')])"
        assert execute(client, read) == f"demo /p/climate $(touch {marker})"
    assert not marker.exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo 'jutil: no such project: climate' >&2; exit 3", "no such project: climate"),
        ("echo 'export OTHER=1;'", "BUDGET_ACCOUNTS"),
    ],
)
def test_a_failing_account_hook_is_quoted(admin_settings, cluster, kernelspecs, tmp_path, body, words):
    """What the hook said, and the project, are in the error; there is no job."""
    admin_settings(account_command=[script(tmp_path / "hook", f"#!/bin/sh\n{body}\n"), "{project}"])
    error, seconds = start_error(spec(kernelspecs, project="climate"))
    assert isinstance(error, RequestError)
    assert words in str(error)
    assert "climate" in str(error)
    assert seconds < SOON


def test_an_account_hook_that_hangs_is_bounded(admin_settings, cluster, kernelspecs, tmp_path):
    """The hook has command_timeout to answer."""
    hook = python_script(tmp_path / "hook", "import time; time.sleep(600)\n")
    admin_settings(account_command=[hook], command_timeout=0.5)
    error, seconds = start_error("slurm")
    assert "did not end within 0.5 s" in str(error)
    assert seconds < SOON + 0.5


# -- the admin's settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("c.SlurmService.respons_address = 'x'", "SlurmService.respons_address"),
        ("c.SlurmService.link_timeout = 'soon'", "link_timeout"),
        ("c.SlurmService.response_port = '9-1'", "SlurmService.response_port"),
        ("c.SlurmService.connect = 'plain'", "connect"),
        ("c.SlurmService.heartbeat = ", "SyntaxError"),
        ("c.SlurmService.heartbeat = undefined", "NameError"),
        ("raise SystemExit(4)", "SystemExit"),
    ],
)
def test_a_mistake_in_the_admins_file_is_named(admin_settings, cluster, line, words):
    """A start says which file and which setting are wrong."""
    admin_settings()
    kernel_clients.forget_service()
    path = Path(kernel_clients.write_admin_settings())
    path.write_text(f"c = get_config()\n{line}\n")
    error, seconds = start_error("slurm")
    assert isinstance(error, ConfigError)
    assert str(path) in str(error)
    assert path.name == FILE_NAME
    assert words in str(error)
    assert seconds < SOON
    path.unlink()
    kernel_clients.forget_service()
