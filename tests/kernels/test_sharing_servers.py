"""Jobs that several servers of one user share: joined, left, and never ended while another one uses them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from subprocess import PIPE

import psutil
import pytest
from jupyter_client import KernelManager

from gateway_slurm.store import Registry
from helpers.dead_server import leave_behind
from helpers.failing_starts import all_nodes_taken, jobs_of_ours, nothing_left, spec
from helpers.kernel_clients import JOB, READY, execute, job_state, jobid_of, running_kernel
from helpers.private_slurm import jobs_of, poll, slurm
from helpers.server_processes import allocations, launcher_said, on_record, server


@pytest.fixture(autouse=True)
def quick(admin_settings, tmp_path, monkeypatch):
    """Launchers that miss their server after a second, and records of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return admin_settings(orphan_timeout=1.0, heartbeat=0.3)


@pytest.fixture
def sharer(kernelspecs) -> str:
    """The kernelspec of kernels that may share."""
    return spec(kernelspecs, share=True)


@contextlib.contextmanager
def joined(sharer: str, jobid: str):
    """A kernel of this process that joined another server's job; its client."""
    with running_kernel(sharer) as (manager, client):
        assert jobid_of(manager) == jobid == execute(client, JOB)
        assert manager.provisioner.service.runner.counts["sbatch"] == 0
        yield client


def test_the_owner_goes_first(cluster, sharer):
    """The job stays for the kernel of the other server, also when the one that made it is gone, and ends with it."""
    with server() as owner, joined(sharer, owner.jobid) as client:
        owner.stop_kernel()
        assert job_state(owner.jobid) == "RUNNING"
        owner.end("in good order")
        assert launcher_said(owner.jobid, "other steps run in the job")
        assert execute(client, "print('still here')") == "still here"
    assert nothing_left(cluster)


def test_the_owner_is_killed(cluster, sharer):
    """Its own kernel ends after the orphan timeout; the other server's does not, and the job ends with that."""
    with server() as owner, joined(sharer, owner.jobid) as client:
        owner.end("SIGKILL")
        assert poll(lambda: not psutil.pid_exists(owner.kernel), timeout=READY)
        assert launcher_said(owner.jobid, "other steps run in the job")
        assert execute(client, "print('still here')") == "still here"
    assert nothing_left(cluster)


def test_the_guest_goes_first(cluster, sharer):
    """The owner's kernel lives on, and the job ends with it."""
    with server() as owner:
        with joined(sharer, owner.jobid):
            pass
        assert job_state(owner.jobid) == "RUNNING"
        assert psutil.pid_exists(owner.kernel)
        owner.stop_kernel()
        assert poll(lambda: not jobs_of(cluster), timeout=READY)


def test_both_are_killed(cluster, sharer):
    """Only the launchers are left to end the job, and they do."""
    with server() as owner, server(sharer) as guest:
        assert guest.jobid == owner.jobid
        guest.end("SIGKILL")
        owner.end("SIGKILL")
    assert nothing_left(cluster, timeout=READY)


def test_a_kept_job_without_a_server_is_joined(cluster, kernelspecs, sharer):
    """It waits for the next kernel that may share; one that is not kept is about to end, and is not joined."""
    with server() as owner:
        allocations("keep", owner.jobid)
        owner.end("in good order")
    with joined(sharer, owner.jobid):
        pass
    assert job_state(owner.jobid) == "RUNNING"
    allocations("release", owner.jobid)
    with server() as owner:
        owner.end("SIGKILL")
        with running_kernel(sharer) as (manager, _client):
            assert jobid_of(manager) != owner.jobid
    assert nothing_left(cluster, timeout=READY)


GIVEN_UP = """
    import sys, threading
    from jupyter_client import KernelManager
    threading.Thread(target=KernelManager(kernel_name="slurm").start_kernel, daemon=True).start()
    sys.stdin.readline()
"""


def test_a_waiting_job_is_joined_and_left_to_who_still_waits(admin_settings, cluster, sharer):
    """The start that made it may be given up: the other server's goes on when the job runs."""
    admin_settings(orphan_timeout=60.0)
    guest = KernelManager(kernel_name=sharer)
    start = threading.Thread(target=guest.start_kernel)
    with (
        all_nodes_taken(cluster),
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(GIVEN_UP)], stdin=PIPE) as owner,
    ):
        assert poll(lambda: jobs_of_ours(cluster), timeout=READY)
        (jobid,) = jobs_of_ours(cluster)
        assert poll(lambda: len(users_of(jobid)) == 1, timeout=READY)
        start.start()
        assert poll(lambda: len(users_of(jobid)) == 2, timeout=READY)
        owner.communicate(b"\n", timeout=READY)
        assert jobs_of_ours(cluster) == [jobid]
    start.join(READY)
    assert jobid_of(guest) == jobid
    guest.shutdown_kernel()
    assert nothing_left(cluster)


def users_of(jobid: str) -> list[str]:
    """The servers that have a kernel in the job on record."""
    return [server.server_id for server, one in on_record() if one.jobid == jobid and one.kernel_ids]


def test_what_slurm_does_not_confirm_is_not_joined(cluster, sharer, tmp_path, caplog):
    """A record of a job that is over, or that another job has the id of, makes no offer, and the log says why."""
    caplog.set_level("INFO")
    with server() as owner:
        record = next(one for _server, one in on_record() if one.jobid == owner.jobid)
        other = slurm("sbatch", "--parsable", "-o/dev/null", "--wrap=sleep 300", cluster=cluster).stdout.strip()
        registry = Registry.default()
        leave_behind(
            registry.directory,
            replace(record, jobid="99999999", launcher_id="gs-1", identity="gs-1"),
            replace(record, jobid=other, launcher_id="gs-2", identity="gs-2"),
            replace(record, jobid=owner.jobid, launcher_id="gs-3", identity="gs-3", config={}),
        )
        for jobid, identity in (("99999999", "gs-1"), (other, "gs-2"), (owner.jobid, "gs-3")):
            registry.keep_flags.set(jobid, identity)
        with joined(sharer, owner.jobid):
            pass
        slurm("scancel", other, cluster=cluster)
        owner.stop_kernel()
    for words in ("job 99999999 of another server is not joined: Slurm does not know it", f"job {other} of another"):
        assert words in caplog.text
