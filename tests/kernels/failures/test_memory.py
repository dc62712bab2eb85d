"""A kernel or a job that is killed for memory: the user reads that, what was asked, and what to do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gateway_slurm.allocations.model import Allocation
from gateway_slurm.allocations.monitor import _memory_words
from gateway_slurm.slurm.commands import parse_step_failure
from gateway_slurm.slurm.model import JobInfo
from helpers.failing_starts import nothing_left, spec
from helpers.kernel_clients import PID, READY, execute, process_of, running_kernel
from helpers.private_slurm import poll, private_cluster
from launchers.memory import oom_kills

EAT = "eaten = bytearray(600 << 20)\nfor at in range(0, len(eaten), 4096): eaten[at] = 1"
WATCHES = "JobAcctGatherType=jobacct_gather/linux\nJobAcctGatherParams=OverMemoryKill\nJobAcctGatherFrequency=task=1"
GROUPS = Path("/sys/fs/cgroup")


@pytest.mark.slow
def test_a_job_that_slurm_kills_for_memory_says_so(admin_settings, kernelspecs):
    """Slurm itself gives only FAILED (JobLaunchFailure), and its daemon's words are lost with the job."""
    with private_cluster(nodes=1, extra_conf=WATCHES) as cluster:
        admin_settings(slurm_conf=str(cluster.slurm_conf))
        with running_kernel(spec(kernelspecs, memory="300M")) as (manager, client):
            client.execute(EAT)
            said = poll(lambda: "killed for memory" in manager.provisioner.exit_reason, timeout=READY)
            reason = manager.provisioner.exit_reason
            assert said, reason
            assert "memory=300M" in reason
            assert "ask for more memory" in reason
        assert nothing_left(cluster)


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group with a limit in bytes, which becomes empty before the end. Skips where none can be made."""
    old = (GROUPS / "memory").is_dir()
    group = (GROUPS / "memory" if old else GROUPS) / f"gateway_slurm-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        file = group / ("memory.limit_in_bytes" if old else "memory.max")
        try:
            file.write_text(str(limit))
        except OSError as error:
            pytest.skip(f"control groups have no memory controller here: {error}")
        yield group
    finally:
        assert poll(lambda: not (group / "cgroup.procs").read_text(), timeout=READY)
        group.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root")
def test_a_kernel_that_linux_kills_for_memory_says_so(service, cluster, kernelspecs):
    """The launcher sees the count of its control group; a kernel that a user kills with SIGKILL is not taken for it."""
    with memory_group(400 << 20) as group, running_kernel(spec(kernelspecs, memory="1G")) as (manager, client):
        kernel = psutil.Process(int(execute(client, PID)))
        for process in (kernel.parent(), kernel):
            (group / "cgroup.procs").write_text(str(process.pid))
        client.execute(EAT)
        assert poll(lambda: not manager.is_alive(), timeout=READY)
        reason = manager.provisioner.exit_reason
        assert "SIGKILL" in reason
        assert "killed for memory" in reason
        assert "memory=1G" in reason
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=READY)
        os.kill(int(execute(client, PID)), signal.SIGKILL)
        assert poll(lambda: not manager.is_alive(), timeout=READY)
        assert "memory" not in process_of(manager).reason


@pytest.mark.parametrize(
    ("groups", "file", "text", "count"),
    [
        ("0::/slurm/job_1\n", "slurm/job_1/memory.events", "low 0\noom 4\noom_kill 3\n", 3),
        ("0::/a\n", "unified/a/memory.events", "oom_kill 2\n", 2),
        ("5:cpu:/\n4:memory:/job_1\n0::/\n", "memory/job_1/memory.oom_control", "under_oom 0\noom_kill 1\n", 1),
        ("0::/a\n", "elsewhere", "oom_kill 1\n", 0),
        ("", "elsewhere", "", 0),
    ],
)
def test_the_count_is_read_from_both_versions_of_control_groups(tmp_path, groups, file, text, count):
    """Where there is none, nothing is known and the count is 0."""
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    (tmp_path / "groups").write_text(groups)
    assert oom_kills(str(tmp_path / "groups"), str(tmp_path)) == count


@pytest.mark.parametrize(
    ("state", "reason", "exit_signal", "words"),
    [
        ("OUT_OF_MEMORY", "OutOfMemory", 125, "; killed for memory"),
        ("FAILED", "NonZeroExitCode", 125, "; killed for memory"),
        ("FAILED", "JobLaunchFailure", 9, "if no user sent it, the job was killed for memory"),
        ("FAILED", "NonZeroExitCode", None, ""),
        ("CANCELLED", "None", 15, ""),
        ("TIMEOUT", "TimeLimit", None, ""),
    ],
)
async def test_slurms_final_states_that_mean_memory(state, reason, exit_signal, words):
    """OUT_OF_MEMORY and its exit code are certain; a SIGKILL of the job's script is not."""
    allocation = Allocation.adopted(JobInfo(jobid="7", state="RUNNING"), "")
    info = JobInfo(jobid="7", state=state, reason=reason, exit_signal=exit_signal)
    found = _memory_words(allocation, info)
    assert words in found
    assert bool(words) == bool(found)


def test_a_step_that_is_killed_for_memory_says_what_to_do():
    """slurmstepd's words reach srun; the advice follows them."""
    stderr = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.1."
    assert "ask for more memory" in str(parse_step_failure(137, stderr, jobid="7"))
    assert "memory" not in str(parse_step_failure(1, "srun: error: c1: task 0: Exited with exit code 1", jobid="7"))
