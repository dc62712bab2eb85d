"""The variables of Slurm that kernels have: those that the batch script of their job would have.

A launcher that is the job's batch script has them already. In a job step, srun and slurmstepd have described the step
instead, and srun in a cell would take the step's description for its options: it would use one node of two, or wait for
the share that the kernel's own step holds. An isolated kernel has variables as if its share were a job.

Sources: sbatch(1), OUTPUT ENVIRONMENT VARIABLES; srun(1), INPUT ENVIRONMENT VARIABLES; scontrol(1); outputs seen with
Slurm 22.05.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from launchers.steps import commands_environment

# Of every launcher's environment: set by the server for Slurm's commands or for this program, and by the job script's
# shell. SLURM_UMASK would become the umask of each srun in a cell. SLURM_SUBMIT_DIR is the server's directory; Kernel
# sets that of the kernel.
NOT_FOR_KERNELS = frozenset(
    ("GATEWAY_SLURM_TOKEN", "LC_ALL", "SLURM_TIME_FORMAT", "SLURM_UMASK", "SLURM_SUBMIT_DIR", "OLDPWD", "SHLVL", "_")
)

# A job step's variables that its kernels do not get. ``*`` stands for any text.
REMOVED = {
    "SLURM_STEP*": "the launcher's job step",
    "SLURM_SRUN_*": "the srun that started the step",
    "SRUN_*": "the srun that started the step",
    "SLURM_LAUNCH_NODE_IPADDR": "the srun that started the step",
    "SLURM_TRES_PER_TASK": "an option of the step, which srun in a cell would take",
    "SLURM_DISTRIBUTION": "an option of the step, which srun in a cell would take",
    "SLURM_CPU_BIND*": "an option of the step, which srun in a cell would take",
    "SLURM_MEM_BIND*": "an option of the step, which srun in a cell would take",
    "SLURM_GPU_BIND*": "an option of the step, which srun in a cell would take",
    "SLURM_RLIMIT_*": "limits of the process that submitted the step",
    "SLURM_*_PACK_GROUP_*": "a component of a heterogeneous step",
    "SLURM_*_HET_GROUP_*": "a component of a heterogeneous step",
    "SLURM_PMI*": "MPI for the step's one task, which is the launcher",
    "PMI_*": "MPI for the step's one task, which is the launcher",
    "PMI2_*": "MPI for the step's one task, which is the launcher",
    "PMIX_*": "MPI for the step's one task, which is the launcher",
}

# A job step's variables that the launcher sets: their values for a kernel that has the whole job, and for an isolated
# kernel. A variable without a value is removed, and every other variable of the step is taken as it is.
SET = {
    "SLURM_JOB_NODELIST": ("the job's nodes", "the kernel's node"),
    "SLURM_NODELIST": ("the job's nodes", "the kernel's node"),
    "SLURM_JOB_NUM_NODES": ("the number of the job's nodes", "1"),
    "SLURM_NNODES": ("the number of the job's nodes", "1"),
    "SLURM_JOB_CPUS_PER_NODE": ("the job's CPUs", "the share's CPUs"),
    "SLURM_TASKS_PER_NODE": ("the job's tasks, or as many as its CPUs allow", "1"),
    "SLURM_NTASKS": ("the job's tasks, if it asked for a number", "1"),
    "SLURM_NPROCS": ("the job's tasks, if it asked for a number", "1"),
    "SLURM_NTASKS_PER_NODE": ("as the job asked", ""),
    "SLURM_CPUS_PER_TASK": ("as the job asked", "the share's CPUs"),
    "SLURM_MEM_PER_NODE": ("as the job has it, in MiB", "the share's memory, in MiB"),
    "SLURM_MEM_PER_CPU": ("as the job has it, in MiB", "as the job has it, in MiB, for a share without `memory`"),
    "SLURM_JOB_NAME": ("the job's name", "the job's name"),
    "SLURM_JOB_ACCOUNT": ("the job's account", "the job's account"),
    "SLURM_JOB_QOS": ("the job's QOS", "the job's QOS"),
    "SLURM_JOB_RESERVATION": ("the job's reservation", "the job's reservation"),
    "SLURM_JOB_GPUS": ("the GPUs on this node", "the share's GPUs"),
    "SLURM_CLUSTER_NAME": ("the cluster's name", "the cluster's name"),
    "SLURM_SUBMIT_DIR": ("the job's directory; in a job of ours, the kernel's", "the same"),
    "SLURM_SUBMIT_HOST": ("the host that made the job", "the host that made the job"),
    # Input variables of srun in a cell.
    "SLURM_OVERLAP": ("", "1: the step that srun makes may use the share, which the kernel's own step holds"),
    "SLURM_STEP_GRES": ("", "the share's GPUs and other generic resources, or none"),
    "SRUN_CPUS_PER_TASK": ("", "the share's CPUs"),
    "SLURM_HOSTFILE": ("", "in a job of several nodes, a file that names the kernel's node"),
}

_HOSTFILE_LINES = 1024  # srun needs a line for each task
# Seconds that the first kernel in a step waits for scontrol. srun has just reached the controller.
_SCONTROL_TIMEOUT = 5.0


class KernelEnvironment:
    """The environment that all kernels of this launcher inherit, before the server's variables.

    ``role``, ``gres`` and ``memory`` are arguments of ``launchers.main``. In a job step, scontrol runs from the start
    on; the launcher calls ``reaped`` after SIGCHLD.
    """

    def __init__(self, role: str, gres: str, memory: str, make_directory: Callable[[], str]) -> None:
        self._role, self._gres, self._memory, self._make_directory = role, gres, memory, make_directory
        self._initial, self._nice = initial_environment(), os.getpriority(os.PRIO_PROCESS, 0)
        self._known: dict[str, str] | None = None
        self._scontrol: subprocess.Popen[str] | None = None
        if role in ("step", "isolated"):
            self._scontrol = self._ask(show_job_argv(self._initial.get("SLURM_JOB_ID", "")))

    def _ask(self, argv: list[str]) -> subprocess.Popen[str] | None:
        try:
            return subprocess.Popen(
                argv,
                env=commands_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except OSError as error:
            print(f"launcher: SLURM_ variables may be missing: {argv[0]}: {error}", file=sys.stderr)
            return None

    def pids(self) -> set[int]:
        """The processes that this object collects."""
        return {self._scontrol.pid} if self._scontrol is not None else set()

    def reaped(self) -> None:
        """Collect scontrol if it has ended."""
        if self._scontrol is not None:
            self._scontrol.poll()

    def get(self) -> dict[str, str]:
        """The environment. The first call waits for scontrol, for a few seconds at most."""
        if self._known is None:
            description = self._describe()
            if self._role == "isolated":
                hostfile = self._write_hostfile() if is_on_several_nodes(self._initial, description) else ""
                share = {"gres": self._gres, "memory": self._memory, "hostfile": hostfile}
                self._known = for_share(self._initial, self._nice, description, **share)
            elif self._role == "step":
                self._known = for_job(self._initial, self._nice, description)
            else:
                self._known = of_batch_script(self._initial, self._nice)
        return self._known

    def _describe(self) -> str:
        """scontrol's description of the job; empty if there is none."""
        scontrol, self._scontrol = self._scontrol, None
        if scontrol is None:
            return ""
        try:
            output, _none = scontrol.communicate(timeout=_SCONTROL_TIMEOUT)
        except subprocess.TimeoutExpired:
            scontrol.kill()
            output, _none = scontrol.communicate()
        if scontrol.returncode != 0:
            print(f"launcher: SLURM_ variables may be missing: scontrol failed: {output.strip()}", file=sys.stderr)
        return output if scontrol.returncode == 0 else ""

    def _write_hostfile(self) -> str:
        try:
            path = os.path.join(self._make_directory(), "hosts")
            with open(path, "w") as file:
                file.write(f"{self._initial.get('SLURMD_NODENAME', '')}\n" * _HOSTFILE_LINES)
        except OSError as error:
            print(f"launcher: srun in a cell may use other nodes of the job: {error}", file=sys.stderr)
            return ""
        return path


def show_job_argv(jobid: str) -> list[str]:
    """Return scontrol's argv for the description of a job, which ``for_job`` and ``for_share`` read."""
    return ["scontrol", "show", "job", jobid]


def initial_environment() -> dict[str, str]:
    """The environment that this process was started with: Python may have added a locale to its own (PEP 538)."""
    try:
        with open("/proc/self/environ", "rb") as file:
            pairs = [item.partition(b"=") for item in file.read().split(b"\0")]
    except OSError:
        return dict(os.environ)
    return {os.fsdecode(name): os.fsdecode(value) for name, _sign, value in pairs if name}


def of_batch_script(environment: Mapping[str, str], nice: int) -> dict[str, str]:
    """The environment of kernels whose launcher is the job's batch script; ``nice`` is the launcher's niceness."""
    kept = {name: value for name, value in environment.items() if name not in NOT_FOR_KERNELS}
    if "SLURM_PRIO_PROCESS" in kept:
        kept["SLURM_PRIO_PROCESS"] = str(nice)  # else the niceness of the server
    return kept


def for_job(environment: Mapping[str, str], nice: int, description: str) -> dict[str, str]:
    """The environment of kernels in a step that overlaps the whole job.

    ``description`` is scontrol's; if it is empty, what only scontrol tells is left out.
    """
    nodes = _field("NodeList", description) or environment.get("SLURM_NODELIST", "")
    count, tasks = _number("NumNodes", description), _number("NumTasks", description)
    cpus_per_task = _number("CPUs/Task", description)
    per_node = (_field("NtasksPerN:B:S:C", description) or "0").partition(":")[0]
    asked_tasks = str(tasks) if tasks and (tasks != count or per_node != "0") else ""
    cpus = _cpus_per_node(environment)
    values = {
        **_common(environment, description),
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_NODELIST": nodes,
        "SLURM_JOB_NUM_NODES": str(count or ""),
        "SLURM_NNODES": str(count or ""),
        "SLURM_JOB_CPUS_PER_NODE": cpus,
        "SLURM_TASKS_PER_NODE": _tasks_per_node(cpus, int(per_node) if per_node.isdigit() else 0, cpus_per_task or 1),
        "SLURM_NTASKS": asked_tasks,
        "SLURM_NPROCS": asked_tasks,
        "SLURM_NTASKS_PER_NODE": per_node if per_node.isdigit() and per_node != "0" else "",
        "SLURM_CPUS_PER_TASK": str(cpus_per_task) if cpus_per_task and cpus_per_task > 1 else "",
        "SLURM_MEM_PER_NODE": _mebibytes(_field("MinMemoryNode", description)),
        "SLURM_MEM_PER_CPU": _mebibytes(_field("MinMemoryCPU", description)),
    }
    return _merged(environment, nice, values)


def for_share(
    environment: Mapping[str, str], nice: int, description: str, *, gres: str, memory: str, hostfile: str
) -> dict[str, str]:
    """The environment of an isolated kernel: as if the exact share of its step were a job of one task.

    ``gres`` are the share's generic resources (``gpu:1``), ``memory`` is its memory as requested. ``hostfile`` is the
    path of a file that names the kernel's node once for each task, by which srun in a cell uses no other node; empty
    in a job of one node.
    """
    node = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURMD_NODENAME", "")
    cpus = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE", "")
    values = {
        **_common(environment, description),
        "SLURM_JOB_NODELIST": node,
        "SLURM_NODELIST": node,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_JOB_CPUS_PER_NODE": environment.get("SLURM_CPUS_ON_NODE", cpus),
        "SLURM_TASKS_PER_NODE": "1",
        "SLURM_NTASKS": "1",
        "SLURM_NPROCS": "1",
        "SLURM_CPUS_PER_TASK": cpus,
        "SLURM_MEM_PER_NODE": _mebibytes(memory),
        "SLURM_MEM_PER_CPU": "" if memory else _mebibytes(_field("MinMemoryCPU", description)),
        "SLURM_OVERLAP": "1",
        "SLURM_STEP_GRES": ",".join(f"gres:{item}" for item in gres.split(",")) if gres else "none",
        "SRUN_CPUS_PER_TASK": cpus,
        "SLURM_HOSTFILE": hostfile,
    }
    return _merged(environment, nice, values)


def is_on_several_nodes(environment: Mapping[str, str], description: str) -> bool:
    """Whether a step's job has other nodes than the step's."""
    count = _number("NumNodes", description)
    if count is not None:
        return count > 1
    return environment.get("SLURM_NODELIST", "") != environment.get("SLURM_STEP_NODELIST", "")


def nodes_of_job(environment: Mapping[str, str]) -> str:
    """The job's host list: in a step, SLURM_JOB_NODELIST may name the step's nodes only."""
    in_step = environment.get("SLURM_STEP_NODELIST") and environment.get("SLURM_NODELIST")
    return in_step or environment.get("SLURM_JOB_NODELIST", "")


def _common(environment: Mapping[str, str], description: str) -> dict[str, str]:
    directory = _line("WorkDir", description)
    return {
        "SLURM_JOB_NAME": _line(r"JobId=\S+ JobName", description),
        "SLURM_JOB_ACCOUNT": _field("Account", description) or "",
        "SLURM_JOB_QOS": _field("QOS", description) or "",
        "SLURM_JOB_RESERVATION": _field("Reservation", description) or "",
        "SLURM_JOB_GPUS": environment.get("SLURM_STEP_GPUS", ""),
        "SLURM_CLUSTER_NAME": environment.get("SLURM_CLUSTER_NAME")
        or environment.get("SLURM_WORKING_CLUSTER", "").partition(":")[0],
        "SLURM_SUBMIT_DIR": directory if directory != "/" else "",  # our own jobs have none
        "SLURM_SUBMIT_HOST": (_field("AllocNode:Sid", description) or "").partition(":")[0],
    }


def _merged(environment: Mapping[str, str], nice: int, values: Mapping[str, str]) -> dict[str, str]:
    taken = {
        name: value
        for name, value in of_batch_script(environment, nice).items()
        if name not in SET and not any(fnmatchcase(name, pattern) for pattern in REMOVED)
    }
    return {**taken, **{name: value for name, value in values.items() if value}}


def _cpus_per_node(environment: Mapping[str, str]) -> str:
    """``6,2`` or ``4(x2)``; in a step, Slurm names the variable as for a heterogeneous job."""
    names = ("SLURM_JOB_CPUS_PER_NODE", "SLURM_JOB_CPUS_PER_NODE_PACK_GROUP_0", "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_0")
    return next((environment[name] for name in names if name in environment), "")


def _tasks_per_node(cpus: str, asked: int, cpus_per_task: int) -> str:
    """The same list with the number of tasks on each node."""

    def tasks(match: re.Match[str]) -> str:
        return str(asked or max(1, int(match[0]) // cpus_per_task))

    return re.sub(r"(?<![0-9x])[0-9]+", tasks, cpus) if re.fullmatch(r"[0-9(x),]*", cpus) else ""


def _line(pattern: str, description: str) -> str:
    """The rest of the line that begins with this pattern and ``=``: a field that is free text ends its line."""
    found = re.search(rf"^\s*{pattern}=(.*)$", description, re.MULTILINE)
    return found[1].strip() if found and found[1].strip() != "(null)" else ""


def _field(name: str, description: str) -> str | None:
    """The value of a field that is one word; the first line, with the job's name, is free text."""
    found = re.search(rf"\s{re.escape(name)}=(\S+)", description.partition("\n")[2])
    return found[1] if found and found[1] != "(null)" else None


def _number(name: str, description: str) -> int | None:
    found = re.match("[0-9]+", _field(name, description) or "")
    return int(found[0]) if found else None


def _mebibytes(text: str | None) -> str:
    """Slurm's ``300M`` or ``2G`` as a number, MiB if there is no unit; empty for none and for 0."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGTP]?)B?", (text or "").upper())
    if not found:
        return ""
    size = float(found[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}[found[2]]
    return str(round(size)) if size else ""
