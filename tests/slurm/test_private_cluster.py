"""The private cluster, for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gateway_slurm.errors import ClusterError
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.layout import Layout, cgroup_conf_text, daemon_commands, slurm_conf_text
from gateway_slurm.testing.packages import parse_version
from gateway_slurm.testing.processes import free_ports, job_processes
from helpers.daemons import daemon_pids, kill_daemon, start_daemon, stop_daemon
from helpers.private_slurm import jobs_of, poll, slurm


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory that is empty again at the end."""
    path = Path(tempfile.mkdtemp(prefix="gst-", dir="/tmp"))
    yield path
    assert list(path.iterdir()) == []
    path.rmdir()


def mentioning(text: str) -> list[list[str]]:
    """The command lines of all processes that name ``text``."""
    lines = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if any(text in argument for argument in line)]


def make_layout(extra_conf: str = "", slurm_version: tuple[int, int] = (22, 5)) -> Layout:
    """A layout of two nodes, for the texts made from it."""
    return Layout(
        directory=Path("/d"),
        runtime=Path("/r"),
        slurm_version=slurm_version,
        hostname="host",
        user="me",
        nodes=2,
        cpus=8,
        gpus_per_node=2,
        memory=8000,
        controller_port=10001,
        node_ports=(10002, 10003),
        database_port=10004,
        accounting=False,
        extra_conf=extra_conf,
    )


def test_extra_conf_replaces_the_default_of_the_same_key() -> None:
    """A line of extra_conf takes the place of the default with its key, however it is spelt."""
    text = slurm_conf_text(make_layout("slurmdtimeout=7\nDebugFlags=Steps"))
    assert "SlurmdTimeout=300" not in text
    assert "slurmdtimeout=7" in text.splitlines()
    assert "DebugFlags=Steps" in text.splitlines()


def test_extra_conf_replaces_only_the_named_partition() -> None:
    """A PartitionName line replaces the partition of that name and leaves the other."""
    text = slurm_conf_text(make_layout("PartitionName=devel Nodes=c1"))
    assert text.count("PartitionName=devel") == 1
    assert text.count("PartitionName=batch") == 1


@pytest.mark.parametrize(
    ("words", "plugin"),
    [("slurm-wlm 22.05.8\n", "cgroup/v1"), ("slurm 24.11.5\n", "disabled"), ("slurm 23.02.7", "cgroup/v1")],
)
def test_no_cgroups_are_needed(words: str, plugin: str) -> None:
    """slurmd gets the cgroup plugin that needs nothing of the machine, by its version."""
    layout = make_layout(slurm_version=parse_version(words))
    assert cgroup_conf_text(layout) == f"CgroupPlugin={plugin}\n"


@pytest.mark.parametrize(
    ("version", "plugin"),
    [((22, 5), "openapi/v0.0.38"), ((23, 2), "openapi/v0.0.39"), ((24, 11), "openapi/slurmctld")],
)
def test_slurmrestd_is_there_when_asked_for(version: tuple[int, int], plugin: str) -> None:
    """With the release's newest plugin, and a key for tokens that slurmctld knows; else there is neither."""
    layout = make_layout(slurm_version=version)
    assert "slurmrestd" not in daemon_commands(layout)
    assert "auth/jwt" not in slurm_conf_text(layout)
    layout = replace(layout, rest_port=10005)
    command = daemon_commands(layout)["slurmrestd"]
    assert plugin in command
    assert command[-1] == "127.0.0.1:10005"
    assert "AuthAltTypes=auth/jwt" in slurm_conf_text(layout).splitlines()


def test_free_ports_are_distinct_and_below_the_ephemeral_range() -> None:
    """No kernel and no srun can take the port of a daemon that is stopped for a while."""
    ports = free_ports(20)
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == 20
    assert all(1024 < port < first for port in ports)


def test_every_node_is_idle_when_up_returns(cluster: PrivateCluster) -> None:
    """status() shows all daemons running and all nodes idle."""
    status = cluster.status()
    assert status.running
    assert set(status.daemons) == {"munged", "slurmctld", "c1", "c2", "c3", "c4"}
    assert status.nodes == dict.fromkeys(("c1", "c2", "c3", "c4"), "idle")


def test_srun_runs_on_each_node(cluster: PrivateCluster) -> None:
    """Srun over four nodes prints the four nodes' names."""
    output = slurm("srun", "-N4", "printenv", "SLURMD_NODENAME", cluster=cluster).stdout
    assert sorted(output.split()) == ["c1", "c2", "c3", "c4"]


def test_sbatch_runs_a_script(cluster: PrivateCluster, tmp_path: Path) -> None:
    """A batch job runs and writes its output to the file that was asked for."""
    output = tmp_path / "out"
    slurm("sbatch", "--wait", f"--output={output}", "--wrap=echo $SLURM_JOB_PARTITION", cluster=cluster)
    assert output.read_text() == "batch\n"


def test_gpus_are_pretended(cluster: PrivateCluster) -> None:
    """A job sees the GPUs it asked for, numbered from 0; one that asked for none sees none."""
    one = slurm("srun", "--gres=gpu:1", "printenv", "CUDA_VISIBLE_DEVICES", cluster=cluster)
    both = slurm("srun", "--gres=gpu:2", "printenv", "CUDA_VISIBLE_DEVICES", cluster=cluster)
    none = slurm("srun", "printenv", "CUDA_VISIBLE_DEVICES", cluster=cluster, check=False)
    assert (one.stdout, both.stdout, none.stdout) == ("0\n", "0,1\n", "")


def test_exact_steps_share_out_the_gpus(cluster: PrivateCluster) -> None:
    """Two steps at the same time, one GPU each, get different ones."""
    step = "srun --exact -n1 --gres=gpu:1 --mem=100 sh -c 'echo $CUDA_VISIBLE_DEVICES; sleep 0.5'"
    inner = f"{step} & {step} & wait"
    output = slurm("salloc", "--quiet", "-n2", "--gres=gpu:2", "bash", "-c", inner, cluster=cluster).stdout
    assert sorted(output.split()) == ["0", "1"]


def test_a_second_step_overlaps(cluster: PrivateCluster) -> None:
    """Srun --overlap runs in an allocation whose CPUs another step has."""
    inner = "srun sleep 30 & srun --overlap echo overlapped; kill %1; wait"
    assert "overlapped" in slurm("salloc", "--quiet", "bash", "-mc", inner, cluster=cluster).stdout


def test_partition_limits_are_enforced(cluster: PrivateCluster) -> None:
    """The partition devel exists and takes no job longer than its 30 minutes."""
    result = slurm("srun", "-pdevel", "-t60", "--immediate=1", "true", cluster=cluster, check=False)
    assert result.returncode != 0


def test_two_clusters_side_by_side(cluster: PrivateCluster, short_tmp: Path) -> None:
    """A second cluster has its own nodes and its own queue, and goes without the first's noticing."""
    with PrivateCluster(short_tmp / "b", nodes=1, gpus_per_node=0) as second:
        slurm("sbatch", "--output=/dev/null", "--wrap=sleep 100", cluster=second)
        assert set(second.status().nodes) == {"c1"}
        assert len(jobs_of(second)) == 1
        assert jobs_of(cluster) == []
    assert cluster.status().running


def test_down_leaves_nothing(short_tmp: Path) -> None:
    """After down no daemon, no job's process, and no file of the cluster is there."""
    private = PrivateCluster(short_tmp / "c", nodes=2)
    private.up()
    # nohup and setsid: what a job can do to be forgotten.
    slurm("srun", "sh", "-c", "setsid nohup sleep 4321 >/dev/null 2>&1 &", cluster=private)
    slurm("sbatch", "--output=/dev/null", "--wrap=sleep 4321", cluster=private)
    assert poll(lambda: "RUNNING" in "".join(jobs_of(private)), timeout=10)
    munged = psutil.Process(daemon_pids(private)["munged"]).cmdline()
    socket = next(argument for argument in munged if argument.startswith("--socket="))
    runtime = Path(socket.removeprefix("--socket=")).parent.parent
    pids = [*daemon_pids(private).values(), *(process.pid for process in job_processes(private.slurm_conf))]
    assert len(pids) > len(daemon_pids(private))

    assert private.down()

    assert not private.directory.exists()
    assert not runtime.exists()
    assert mentioning(str(private.directory)) == []
    assert [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"] == []
    assert private.down() is False


def test_another_process_takes_it_down(short_tmp: Path) -> None:
    """The directory is all that a later process needs to see the cluster and to end it."""
    directory = short_tmp / "d"
    code = "import sys; from gateway_slurm.testing import PrivateCluster; PrivateCluster(sys.argv[1], 1).up()"
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True, timeout=60)
    later = PrivateCluster(directory)
    assert later.status().nodes == {"c1": "idle"}
    assert later.down()
    assert not directory.exists()


def test_a_failed_up_names_the_daemon_and_its_log(short_tmp: Path) -> None:
    """A broken line in slurm.conf fails up with slurmctld's own words, and nothing stays."""
    private = PrivateCluster(short_tmp / "e", extra_conf="NoSuchParameter=1")
    with pytest.raises(ClusterError, match=r"(?s)slurmctld.*NoSuchParameter"):
        private.up()
    assert not private.directory.exists()
    assert mentioning(str(private.directory)) == []


def test_missing_packages_are_named_with_the_command(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where slurmctld is not installed, the error is the apt-get line that brings it."""
    monkeypatch.setattr("gateway_slurm.testing.packages.find_program", lambda _name: None)
    with pytest.raises(ClusterError, match=r"apt-get install .*munge .*slurmctld"):
        PrivateCluster(short_tmp / "f").up()


def test_a_cluster_that_is_up_is_not_started_again(cluster: PrivateCluster) -> None:
    """Up refuses while its daemons run."""
    with pytest.raises(ClusterError, match="up already"):
        PrivateCluster(cluster.directory).up()


def test_up_clears_the_remains_of_a_killed_cluster(short_tmp: Path) -> None:
    """Where daemons were killed, up begins afresh."""
    private = PrivateCluster(short_tmp / "g", nodes=1)
    private.up()
    for name in daemon_pids(private):
        kill_daemon(private, name)
    assert not private.status().running
    private.up()
    assert private.status().nodes == {"c1": "idle"}
    private.down()


def test_a_job_outlives_its_daemons(cluster: PrivateCluster) -> None:
    """A job goes on while slurmctld and its slurmd are stopped, and is known when they are back."""
    slurm("sbatch", "--output=/dev/null", "--nodelist=c2", "--wrap=sleep 300", cluster=cluster)
    assert poll(lambda: "RUNNING" in "".join(jobs_of(cluster)), timeout=10)
    before = jobs_of(cluster)
    for name in ("slurmctld", "c2"):
        stop_daemon(cluster, name)
        assert name not in daemon_pids(cluster)
        start_daemon(cluster, name)
        assert name in daemon_pids(cluster)
    assert poll(lambda: cluster.status().nodes.get("c2") == "mixed", timeout=20)
    assert jobs_of(cluster) == before
    slurm("scancel", before[0].split()[0], cluster=cluster)


def test_a_daemon_can_be_killed(cluster: PrivateCluster) -> None:
    """kill_daemon ends a daemon at once with no farewell; start_daemon brings it back."""
    pid = daemon_pids(cluster)["c4"]
    kill_daemon(cluster, "c4", signal.SIGKILL)
    assert "c4" not in daemon_pids(cluster)
    start_daemon(cluster, "c4")
    assert daemon_pids(cluster)["c4"] != pid
    assert poll(lambda: cluster.status().nodes.get("c4") == "idle", timeout=20)


def test_the_command_line_prints_one_line_for_the_shell(short_tmp: Path) -> None:
    """Up prints only the export line on stdout, also when the cluster is up already, and names the right ``down``.

    Down fails where there is nothing to stop.
    """
    directory = short_tmp / "h"
    command = [sys.executable, "-m", "gateway_slurm.cli.app", "cluster"]

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *argv], check=False, capture_output=True, text=True, timeout=60, env=os.environ
        )

    first = run("up", str(directory), "--nodes", "1", "--gpus", "0")
    assert f"jupyter slurm cluster down {directory}\n" in first.stderr
    assert first.stdout == f"export SLURM_CONF={directory}/etc/slurm.conf\n", first.stderr
    again = run("up", str(directory))
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert "already" in again.stderr
    status = run("status", str(directory))
    assert (status.returncode, status.stdout.splitlines()[-1]) == (0, "c1: running, node idle")
    assert "is down" in run("down", str(directory)).stderr
    nothing = run("down", str(directory))
    assert (nothing.returncode, "no private cluster" in nothing.stderr) == (1, True)
    assert run("status", str(directory)).returncode == 1


def test_with_accounting_a_wrong_account_is_refused(short_tmp: Path) -> None:
    """The account demo may submit; another account is refused in Slurm's words."""
    with PrivateCluster(short_tmp / "i", nodes=1, accounting=True) as private:
        slurm("srun", "--account=demo", "true", cluster=private)
        refused = slurm("sbatch", "--account=wrong", "--wrap=true", cluster=private, check=False)
    assert refused.returncode != 0
    assert "Invalid account" in refused.stderr
