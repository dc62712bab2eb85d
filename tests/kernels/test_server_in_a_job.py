"""A server that runs inside a job, as Open OnDemand and batchspawner start it: no stop of a kernel ends that job."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from gateway_slurm.allocations.use import jobs_of_this_process
from gateway_slurm.slurm.driver import CommandLineDriver
from gateway_slurm.slurm.rest.driver import RestDriver
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.slurm.ssh.runner import SshRunner
from helpers.kernel_clients import READY, job_state
from helpers.private_slurm import poll, slurm, steps_of

# Two kernels one after the other in the server's own job, and then the server's end.
SERVER = """
import os, sys
from pathlib import Path
from helpers.kernel_clients import JOB, execute, forget_service, install_kernelspec, running_kernel

jobid, events = os.environ["SLURM_JOB_ID"], open(sys.argv[1], "a", buffering=1)
install_kernelspec(Path(os.environ["JUPYTER_PATH"]), "here", config_overrides={"jobid": jobid})
for _ in range(2):
    with running_kernel("here") as (_manager, client):
        print(execute(client, JOB), file=events)
forget_service()
print("alive", file=events)
"""


Start = Callable[..., AbstractContextManager[str]]


@contextmanager
def in_script(argv: list[str], cluster) -> Iterator[str]:
    """Run a server in a batch script, which goes on afterwards; give the job's id."""
    command = subprocess.list2cmdline(argv) + "; sleep 300"
    jobid = slurm("sbatch", "--parsable", "-N2", "-t5", f"--wrap={command}", cluster=cluster).stdout.strip()
    yield jobid
    slurm("scancel", jobid, cluster=cluster)


@contextmanager
def in_shell(argv: list[str], cluster) -> Iterator[str]:
    """The same with salloc, whose command runs on this machine, as a shell there does."""
    command = ["salloc", "-N2", "-t5", "-J", "shell", "--kill-command=KILL", "sh", "-c", '"$@"; sleep 300', "sh", *argv]
    salloc = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    listed = ("squeue", "--noheader", "--name=shell", "--format=%i")
    try:
        assert poll(lambda: slurm(*listed, cluster=cluster).stdout.strip() != "", timeout=READY)
        yield slurm(*listed, cluster=cluster).stdout.strip()
    finally:
        slurm("scancel", "--name=shell", cluster=cluster)  # salloc then kills its command
        salloc.wait(timeout=READY)


@pytest.mark.parametrize("start", [in_script, in_shell])
def test_the_servers_own_job_is_never_ended(kernelspecs, cluster, tmp_path, monkeypatch, start: Start):
    """Its kernels run in the job by jobid, stop, and start again; job, script and shell outlive kernels and server."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    events = tmp_path / "events"
    events.touch()
    with start([sys.executable, "-c", SERVER, str(events)], cluster) as jobid:
        assert poll(lambda: "alive" in events.read_text() or not job_state(jobid), timeout=READY)
        assert events.read_text().split() == [jobid, jobid, "alive"]
        assert poll(lambda: steps_of(cluster, jobid) == [], timeout=READY)
        assert job_state(jobid) == "RUNNING"


@pytest.mark.parametrize(
    ("variables", "cgroup", "jobs"),
    [
        ({"SLURM_JOB_ID": "12", "SLURM_JOBID": "12"}, "0::/user.slice", {"12"}),
        ({}, "0::/system.slice/slurmstepd.scope/job_13/step_batch/user/task_0", {"13"}),
        ({}, "9:memory:/slurm/uid_1000/job_14\n4:cpuset:/slurm/uid_1000/job_14/step_0", {"14"}),
        ({}, "0::/job_x/myjob_15", set()),
    ],
)
def test_a_process_knows_its_jobs(monkeypatch, variables, cgroup, jobs):
    """By Slurm's variables, and by its cgroup where a service manager or sudo has removed them.

    On a cluster behind a login node or a REST interface the same number is another job.
    """
    for name in ("SLURM_JOB_ID", "SLURM_JOBID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "read_text", lambda _path: cgroup)
    assert jobs_of_this_process(CommandLineDriver(Runner())) == jobs
    by_ssh = CommandLineDriver(SshRunner.__new__(SshRunner))
    by_rest = RestDriver.__new__(RestDriver)
    assert [jobs_of_this_process(driver) for driver in (by_ssh, by_rest)] == [set(), set()]
