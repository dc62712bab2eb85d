"""A kernel's process settings are those of its user's jobs on the node: nothing of the server's process reaches it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gateway_slurm.environment import kernel_environment
from gateway_slurm.testing import PrivateCluster
from helpers import odd_server
from helpers.kernel_clients import READY
from helpers.private_slurm import poll, slurm
from helpers.rest_cluster import cluster_with_rest
from helpers.slurm_accesses import COMMANDS, REST

# What a kernel has otherwise than a plain job. It also ends with its launcher (PR_SET_PDEATHSIG), which /proc does not
# show, and leads its own process group and session.
DIFFERS = {
    "cwd": "the notebook's directory, or the home directory (docs/users/kernelspec.md)",
    "environment": "the server's variables as well (docs/users/kernelspec.md); compared below",
    "Umask": "by Slurm's commands on the same host, that of the server, which is the user's own; compared below",
    "modes": "of new files, by the umask",
}
# Slurm's variables that a step's kernel has otherwise than the script of its job.
OF_THE_STEP = {
    "SLURM_TASK_PID": "of the process",
    "SLURMD_NODENAME": "of the node",
    "SLURM_TOPOLOGY_ADDR": "of the node",
    "SLURM_SUBMIT_HOST": "scontrol may have another name of the host",
    "SLURM_NODE_ALIASES": "a variable of old versions, for nodes in a cloud",
}
# REST gives a batch script fewer variables than sbatch does.
NOT_BY_REST = {"SLURM_CPUS_PER_TASK", "SLURM_NTASKS_PER_NODE", "SLURM_PRIO_PROCESS"}
# Variables that neither the server has nor Slurm names: of the shell, slurmstepd, Jupyter, and for the debugger.
ADDED = {
    *("PWD", "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "HOSTNAME", "ENVIRONMENT", "IPYTHONDIR"),
    *("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"),
    *("JPY_PARENT_PID", "JPY_SESSION_NAME", "PYTHONPATH", "PYDEVD_DISABLE_FILE_VALIDATION"),
}
# A user's own batch job, whose two nodes have different numbers of CPUs.
OPTIONS = ["-N2", "-n3", "-c2", "--mem=300M", "--gres=gpu:1", "-t5", "-Juser's job"]
NODE = "import os; print(os.environ['SLURMD_NODENAME'])"


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    """A cluster with slurmrestd, in place of the session's."""
    with cluster_with_rest() as private:
        yield private


@pytest.fixture
def batch_job(cluster, tmp_path) -> Iterator[str]:
    """A batch job of the user's, whose script has probed itself in ``batch``."""
    probe = odd_server.install_probe(tmp_path)
    command = f"exec {probe} {tmp_path}/batch sleep 300"
    jobid = slurm("sbatch", "--parsable", *OPTIONS, "--wrap", command, cluster=cluster).stdout.strip()
    assert poll(lambda: (tmp_path / "batch" / "new directory").exists(), timeout=READY)
    yield jobid
    slurm("scancel", jobid, cluster=cluster, check=False)


def srun(*options: str) -> str:
    """Code for a cell: srun, and the nodes on which its tasks ran. An srun that waits fails."""
    argv = ["srun", *options, "printenv", "SLURMD_NODENAME"]
    run = f"subprocess.run({argv}, capture_output=True, text=True, timeout=20, check=True)"
    return f"import subprocess; print(*sorted({run}.stdout.split()))"


def of_slurm(settings: dict[str, Any], *without: str) -> dict[str, str]:
    """Slurm's variables of a process."""
    environment = settings["environment"].items()
    return {name: value for name, value in environment if name.startswith("SLURM") and name not in without}


@pytest.mark.slow
def test_nothing_of_the_servers_process_reaches_a_kernel(access, cluster, kernelspecs, batch_job, tmp_path):
    """A kernel has the settings of a plain srun and its job's variables: in its own job, on a second node, in a share,
    and in the user's own job.
    """
    access.service()
    probe = str(tmp_path / "probe")
    outer = {"env": {"IPYTHONDIR": str(kernelspecs.parent / "ipython-on-node")}}

    def kernel(name: str, codes: dict[str, str], **fields: Any) -> dict[str, Any]:
        argv = [probe, str(tmp_path / name), sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return {"name": name, "spec": {"kernel_argv": argv, **fields}, "outer": outer, "codes": codes}

    share = {"isolate": True, "cpus": 2, "memory": "300M", "gpus": "1"}
    in_share = {"node": NODE, "srun": srun(), "two tasks": srun("-n2")}
    plan = [
        kernel("own", {"srun": srun()}, nodes="2", cpus=4, memory="300M", gpus="2"),
        kernel("second", {"srun": srun()}, jobid="JOB", node="OTHER"),
        kernel("share", in_share, jobid="JOB", node="OTHER", **share),
    ]
    if access.name != REST:  # which cannot adopt a job
        plan.append(kernel("adopted", {"srun -N2": srun("-N2", "-n2"), "srun": srun()}, jobid=batch_job))
    odd = {"LC_ALL": "C", "SLURM_UMASK": "0070", "SLURM_NTASKS": "64", "SBATCH_EXPORT": "NONE", "SLURM_OVERLAP": "0"}
    servers = {name: value for name, value in os.environ.items() if not name.startswith("LC_")} | odd

    plain = ["srun", f"--jobid={batch_job}", "--overlap", "--propagate=NONE", "-N1", "-n1"]
    slurm(*plain, probe, str(tmp_path / "plain"), cluster=cluster)
    printed = odd_server.run_plan(plan, servers, timeout=120)

    expected = odd_server.probed(tmp_path / "plain")
    found = {one["name"]: odd_server.probed(tmp_path / one["name"]) for one in plan}
    inherited = {**kernel_environment(servers), "LC_ALL": "C"}
    for name, settings in found.items():
        for key in expected.keys() - DIFFERS.keys():
            assert settings[key] == expected[key], (name, key)
        umask = "0077" if access.name == COMMANDS else "0022"
        modes = {"0077": ["0o600", "0o700"], "0022": ["0o644", "0o755"]}[umask]
        assert (settings["Umask"], settings["modes"]) == (umask, modes), name
        variables = settings["environment"]
        assert {key for key in variables if not key.startswith(("SLURM", "SRUN"))} <= inherited.keys() | ADDED, name
        assert {key for key in variables if key.startswith("SRUN")} <= (
            {"SRUN_CPUS_PER_TASK"} if name == "share" else set()
        )

    own = of_slurm(found["own"])
    assert own["SLURM_NTASKS"] == own["SLURM_NNODES"] == "2"
    assert own.get("SLURM_PRIO_PROCESS", "0") == "0"
    assert own["SLURM_SUBMIT_DIR"] == found["own"]["cwd"]
    ignored = {*OF_THE_STEP, *(NOT_BY_REST if access.name == REST else ())}
    assert of_slurm(found["second"], *ignored) == of_slurm(found["own"], *ignored)
    nodes = printed["own"]["srun"].split()
    assert nodes == sorted({own["SLURMD_NODENAME"], found["second"]["environment"]["SLURMD_NODENAME"]})
    assert printed["second"]["srun"].split() == nodes

    in_share = of_slurm(found["share"])
    assert in_share["SLURM_JOB_NODELIST"] == in_share["SLURM_NODELIST"] == printed["share"]["node"] == nodes[-1]
    assert [in_share[f"SLURM_{name}"] for name in ("NNODES", "NTASKS", "CPUS_PER_TASK", "MEM_PER_NODE")] == [
        *("1", "1", "2", "300"),
    ]
    assert printed["share"]["srun"] == nodes[-1]
    assert printed["share"]["two tasks"] == f"{nodes[-1]} {nodes[-1]}"

    if access.name != REST:
        batch = odd_server.probed(tmp_path / "batch")
        assert of_slurm(found["adopted"], *OF_THE_STEP) == of_slurm(batch, *OF_THE_STEP)
        assert len(set(printed["adopted"]["srun -N2"].split())) == 2
        assert len(printed["adopted"]["srun"].split()) == 3
