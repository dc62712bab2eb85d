"""How long a launcher waits for a server: it ends its kernels, and the job where that is its own."""

from __future__ import annotations

import psutil
import pytest

from helpers.failing_starts import nothing_left, spec
from helpers.kernel_clients import READY, job_state
from helpers.private_slurm import poll, slurm
from helpers.server_processes import launcher_said, server

TIMEOUT = 1.0  # seconds


@pytest.fixture(autouse=True)
def state(service, tmp_path, monkeypatch) -> None:
    """A store of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def adopted(cluster):
    """A job that the user has made."""
    argv = ("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 300")
    jobid = slurm(*argv, cluster=cluster).stdout.strip()
    assert poll(lambda: job_state(jobid) == "RUNNING", timeout=READY)
    yield jobid
    slurm("scancel", jobid, cluster=cluster)


def test_a_job_that_was_submitted_for_it_ends_with_the_launcher(admin_settings, cluster):
    """And the kernel before it."""
    admin_settings(orphan_timeout=TIMEOUT, heartbeat=0.3)
    with server() as one:
        one.end("SIGKILL")
    assert poll(lambda: not psutil.pid_exists(one.kernel), timeout=READY)
    assert nothing_left(cluster)


def test_a_job_that_was_there_before_stays_without_its_kernel(admin_settings, kernelspecs, adopted):
    """Its launcher is a step of its own, and goes."""
    admin_settings(orphan_timeout=TIMEOUT, heartbeat=0.3)
    with server(spec(kernelspecs, jobid=adopted)) as one:
        assert one.jobid == adopted
        one.end("SIGKILL")
    assert poll(lambda: not psutil.pid_exists(one.kernel), timeout=READY)
    assert launcher_said(adopted, "exiting: no server for 1 s")
    assert job_state(adopted) == "RUNNING"


def test_a_kernel_with_a_share_of_its_own_ends_alone(admin_settings, kernelspecs, cluster):
    """The job's launcher and the step's each end what is theirs, and then the job is over."""
    admin_settings(orphan_timeout=TIMEOUT, heartbeat=0.3)
    with server(spec(kernelspecs, isolate=True, cpus="1")) as one:
        one.end("SIGKILL")
    assert poll(lambda: not psutil.pid_exists(one.kernel), timeout=READY)
    assert nothing_left(cluster)


def test_where_it_is_0_they_wait_for_ever(admin_settings, cluster):
    """Longer, at any rate, than a launcher whose timeout is a second."""
    admin_settings(orphan_timeout=0, heartbeat=0.3)
    with server() as patient:
        patient.end("SIGKILL")
    admin_settings(orphan_timeout=TIMEOUT, heartbeat=0.3)
    with server() as one:
        one.end("SIGKILL")
    assert poll(lambda: not psutil.pid_exists(one.kernel) and job_state(one.jobid) == "", timeout=READY)
    assert psutil.pid_exists(patient.kernel)
    assert job_state(patient.jobid) == "RUNNING"
    slurm("scancel", patient.jobid, cluster=cluster)
    assert nothing_left(cluster)
