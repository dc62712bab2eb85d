"""The variables of Slurm for kernels in job steps, from what Slurm 22.05 and later give a step, and scontrol."""

from __future__ import annotations

import pytest

from launchers.slurm_variables import REMOVED, SET, for_job, for_share, nodes_of_job, of_batch_script

STEP = {
    "HOME": "/home/ann",
    "GATEWAY_SLURM_TOKEN": "secret",
    "SLURM_UMASK": "0077",
    "SLURM_PRIO_PROCESS": "5",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_PARTITION": "batch",
    "SLURMD_NODENAME": "c2",
    "SLURM_NODELIST": "c[1-2]",
    "SLURM_JOB_NODELIST": "c2",
    "SLURM_STEP_NODELIST": "c2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_GPUS": "1",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "1",
    "SLURM_TASKS_PER_NODE": "1",
    "SLURM_CPUS_ON_NODE": "2",
    "SLURM_JOB_CPUS_PER_NODE_PACK_GROUP_0": "6,2",
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURM_TRES_PER_TASK": "cpu=1",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SRUN_DEBUG": "3",
    "PMIX_RANK": "0",
    "SLURM_WORKING_CLUSTER": "alps:127.0.0.1:6817:9728:109",
}
JOB = """\
JobId=7 JobName=my NumNodes=9 job
   UserId=ann(1000) GroupId=ann(1000) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=phys QOS=(null)
   Partition=batch AllocNode:Sid=login1:6356
   NodeList=c[1-2]
   NumNodes=2 NumCPUs=8 NumTasks=4 CPUs/Task=2 ReqB:S:C:T=0:0:*:*
   Socks/Node=* NtasksPerN:B:S:C=0:0:*:* CoreSpec=*
   MinCPUsNode=2 MinMemoryNode=2G MinTmpDiskNode=0
   WorkDir=/home/ann/a b
"""


def test_a_step_has_the_variables_of_its_jobs_script():
    """What describes the step is taken away or replaced by what describes the job; the rest is taken."""
    found = for_job(STEP, 0, JOB)
    assert found == {
        "HOME": "/home/ann",
        "SLURM_PRIO_PROCESS": "0",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_PARTITION": "batch",
        "SLURMD_NODENAME": "c2",
        "SLURM_NODELIST": "c[1-2]",
        "SLURM_JOB_NODELIST": "c[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "4",
        "SLURM_NPROCS": "4",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_TASKS_PER_NODE": "3,1",
        "SLURM_JOB_CPUS_PER_NODE": "6,2",
        "SLURM_MEM_PER_NODE": "2048",
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_JOB_NAME": "my NumNodes=9 job",
        "SLURM_JOB_ACCOUNT": "phys",
        "SLURM_JOB_GPUS": "1",
        "SLURM_CLUSTER_NAME": "alps",
        "SLURM_SUBMIT_DIR": "/home/ann/a b",
        "SLURM_SUBMIT_HOST": "login1",
        "SLURM_WORKING_CLUSTER": "alps:127.0.0.1:6817:9728:109",
    }


@pytest.mark.parametrize(
    ("job", "ntasks", "per_node", "tasks"),
    [
        ("NumNodes=2 NumTasks=2 CPUs/Task=1\n NtasksPerN:B:S:C=0:0:*:*", None, None, "6,2"),
        ("NumNodes=2 NumTasks=2 CPUs/Task=1\n NtasksPerN:B:S:C=1:0:*:*", "2", "1", "1,1"),
        ("NumNodes=2 NumTasks=8 CPUs/Task=N/A\n NtasksPerN:B:S:C=0:0:*:*", "8", None, "6,2"),
        ("", None, None, "6,2"),
    ],
)
def test_a_number_of_tasks_is_said_only_if_the_job_asked_for_one(job, ntasks, per_node, tasks):
    """srun in a cell takes SLURM_NTASKS for its own number of tasks, which by default is one for each node."""
    found = for_job(STEP, 0, f"JobId=7 JobName=x\n   {job}\n")
    assert (found.get("SLURM_NTASKS"), found.get("SLURM_NTASKS_PER_NODE")) == (ntasks, per_node)
    assert found["SLURM_TASKS_PER_NODE"] == tasks


def test_a_job_without_a_description_still_has_its_nodes():
    """Where scontrol fails, srun in a cell is not limited to the step's node."""
    found = for_job(STEP, 0, "")
    assert found["SLURM_JOB_NODELIST"] == found["SLURM_NODELIST"] == "c[1-2]"
    assert "SLURM_NNODES" not in found
    assert "SLURM_NTASKS" not in found


def test_a_share_is_as_a_job_of_one_task():
    """The share's node, CPUs, memory and GPUs; and srun in a cell may use what the kernel's own step holds."""
    found = for_share(STEP, 0, JOB, gres="gpu:1,shard:2", memory="1g", hostfile="/tmp/hosts")
    expected = {
        "SLURM_JOB_NODELIST": "c2",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_CPUS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "2",
        "SRUN_CPUS_PER_TASK": "2",
        "SLURM_MEM_PER_NODE": "1024",
        "SLURM_OVERLAP": "1",
        "SLURM_STEP_GRES": "gres:gpu:1,gres:shard:2",
        "SLURM_HOSTFILE": "/tmp/hosts",
        "SLURM_JOB_GPUS": "1",
    }
    assert expected.items() <= found.items()
    alone = for_share(STEP, 0, JOB.replace("MinMemoryNode=2G", "MinMemoryCPU=1000M"), gres="", memory="", hostfile="")
    assert (alone["SLURM_STEP_GRES"], alone["SLURM_MEM_PER_CPU"]) == ("none", "1000")
    assert not {"SLURM_HOSTFILE", "SLURM_MEM_PER_NODE", "SLURM_TRES_PER_TASK"} & alone.keys()


def test_the_table_has_every_variable_that_is_set():
    """``SET`` is what the documentation shows: no other variable is set, and none twice."""
    share = for_share(STEP, 0, JOB, gres="gpu:1", memory="1G", hostfile="/tmp/hosts")
    for found in (for_job(STEP, 0, JOB), share):
        assert found.keys() - STEP.keys() <= SET.keys()
    assert not SET.keys() & REMOVED.keys()


def test_a_batch_script_has_its_own_variables():
    """Only what the server set for its own use is taken away."""
    found = of_batch_script({**STEP, "SLURM_SUBMIT_DIR": "/", "SHLVL": "1"}, 3)
    assert STEP.keys() - found.keys() == {"GATEWAY_SLURM_TOKEN", "SLURM_UMASK"}
    assert not {"SLURM_SUBMIT_DIR", "SHLVL"} & found.keys()
    assert found["SLURM_PRIO_PROCESS"] == "3"


@pytest.mark.parametrize(
    ("changed", "nodes"),
    [
        ({}, "c[1-2]"),
        ({"SLURM_JOB_NODELIST": "c[1-2]"}, "c[1-2]"),
        ({"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": "c[3-4]", "SLURM_NODELIST": "c3"}, "c[3-4]"),
    ],
)
def test_the_jobs_nodes_are_known_in_steps_too(changed, nodes):
    """In a step of Slurm 22.05 SLURM_JOB_NODELIST names the step's nodes."""
    assert nodes_of_job({**STEP, **changed}) == nodes
