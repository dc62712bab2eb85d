"""The walk of ``jupyter slurm doctor``: good ones by each way to Slurm, and each step failing for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_slurm.store import AllocationRecord, Registry
from helpers.doctor_cli import ASKED, STEPS, command, failed_at, walk
from helpers.failing_starts import filled, jobs_of_ours, nothing_left, spec
from helpers.kernel_clients import IPYKERNEL, READY, install_kernelspec, write_admin_settings
from helpers.login_node import LoginNode, free_port, login_node, make_key
from helpers.private_slurm import poll


@pytest.fixture(scope="module")
def node() -> Iterator[LoginNode]:
    """A login node that forwards nothing."""
    with login_node() as node:
        yield node


@pytest.fixture(autouse=True)
def state(kernelspecs, tmp_path, monkeypatch) -> None:
    """A store and connection files of the test's own: what other tests left is none of its findings."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "runtime").mkdir()


# -- good ones --------------------------------------------------------------------------------------


def test_by_commands_on_this_machine_every_step_is_good(service, cluster):
    """With nothing but an account and a partition: ipykernel of the launcher's Python; nothing is left."""
    walked = walk(*ASKED)
    assert walked.is_good, walked.steps
    assert walked.said("execute").startswith("2 ")
    assert "batch*" in walked.said("slurm")
    assert "22." in walked.said("slurm") or "version 2" in walked.said("slurm")
    assert sys.executable in walked.said("python")
    assert nothing_left(cluster)


@pytest.mark.parametrize(
    ("name", "how"), [("slurm", "does not declare CurveZMQ"), ("slurm-direct", "can be dialled at")]
)
def test_the_kernel_of_a_kernelspec_is_started_in_its_own_way(service, cluster, name, how):
    """Its request fields are taken, and options go over them."""
    walked = walk("--kernelspec", name, "--partition", "devel")
    assert walked.is_good, walked.steps
    assert how in walked.said("kernel")
    assert f"kernelspec {name} with" in walked.said("settings")
    assert "partition devel" in walked.said("submit")


def test_without_options_the_first_kernelspec_is_taken(service, cluster):
    """What the user's own kernels go by; its path does as its name, as for those that a gateway serves."""
    assert "kernelspec slurm with" in (walked := walk()).said("settings")
    assert walked.is_good
    path = os.path.join(os.environ["JUPYTER_PATH"], "kernels", "slurm")
    assert failed_at(walked := walk("--kernelspec", path, "--partition", "nosuch"), "submit", "nosuch")
    assert f"kernelspec {path} with" in walked.said("settings")


def test_by_a_login_node_every_step_is_good(node, admin_settings, cluster):
    """Launchers come by the relay there, which is told among the addresses."""
    admin_settings(**node.settings(), relay="always")
    walked = walk(*ASKED)
    assert walked.is_good, walked.steps
    assert f"127.0.0.1:{node.port}" in walked.said("login")
    assert poll(lambda: nothing_left(cluster), timeout=1)


def test_what_it_says_can_be_read_as_it_goes_and_findings_follow(service, cluster):
    """A line for each step; rows of dead servers are found after it, and not removed by it."""
    registry = Registry.default()
    registry.open()
    registry.put(AllocationRecord(launcher_id="gs-1", jobid="99999999", identity="gs-1", kernel_ids=[]))
    registry.flush()
    registry.close(leave=True)
    done = subprocess.run(command(*ASKED), capture_output=True, text=True, timeout=READY, check=False)
    assert len([line for line in done.stdout.splitlines() if line.startswith("ok  ")]) == len(STEPS)
    assert "job 99999999, which is over" in done.stdout
    assert done.returncode == 1
    assert len(Registry.default().all_records()) == 1


@pytest.mark.slow
def test_a_kernel_of_another_language_need_not_understand_the_question(service, cluster, kernelspecs):
    """Any reply of bash's is one."""
    argv = [sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"]
    install_kernelspec(
        kernelspecs, "asked", config_overrides={"kernel_argv": argv}, spec_overrides={"language": "bash"}
    )
    walked = walk("--kernelspec", "asked")
    assert walked.is_good, walked.steps


# -- what fails before a job is there -----------------------------------------------------------------


def test_settings_that_are_wrong_are_named(service):
    """A setting that is none, a value that is none, a request field that is none, no such kernelspec."""
    path = Path(os.environ["JUPYTER_CONFIG_DIR"], "jupyter_slurm_config.py")
    try:
        write_admin_settings(responce_port="5")
        assert failed_at(walk(), "settings", "responce_port", str(path))
        write_admin_settings(response_port="x")
        assert failed_at(walk(), "settings", "response_port", str(path))
        write_admin_settings(cluster="rest+http://127.0.0.1:1")
        assert failed_at(walk(), "settings", "rest_token_file")
    finally:
        path.unlink()
    assert failed_at(walk(*ASKED, "--runtime", "soon"), "settings", "runtime", "soon")
    assert failed_at(walk("--kernelspec", "nosuch"), "settings", "nosuch", "slurm-direct")


def test_slurm_commands_that_are_not_there_are_told_with_the_setting(admin_settings):
    """On this machine."""
    admin_settings(slurm_path="/nonexistent")
    assert failed_at(walk(*ASKED), "login", "sbatch", "SlurmService.slurm_path")


@pytest.mark.slow
def test_a_controller_that_is_down_is_told_in_slurms_words(service, cluster):
    """Before anything is submitted."""
    cluster.stop_daemon("slurmctld")
    try:
        assert failed_at(walk(*ASKED), "slurm", "slurmctld", "SlurmService.slurm_conf")
    finally:
        cluster.start_daemon("slurmctld")


def test_ports_that_are_all_taken_are_told_with_their_range(admin_settings, node):
    """No job is submitted whose launcher could not come."""
    admin_settings(response_port=str(node.port), response_interface="127.0.0.1")
    assert failed_at(walk(*ASKED), "server", str(node.port), "SlurmService.response_port")


def test_a_host_key_that_is_another_one_is_told_with_its_fingerprint(node, admin_settings, tmp_path):
    """The file that has the other one is named."""
    other = Path(f"{make_key(tmp_path / 'other')}.pub").read_text()
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{node.port} {other}")
    admin_settings(**{**node.settings(), "ssh_known_hosts": [str(known)]})
    assert failed_at(walk(*ASKED), "login", "SHA256:", str(known), "ssh_known_hosts")
    known.write_text("")
    assert failed_at(walk(*ASKED), "login", "SHA256:", "not known", "ssh_known_hosts")


def test_a_key_that_is_not_let_in_is_told_with_what_was_tried(node, admin_settings, tmp_path, monkeypatch):
    """No agent helps."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    admin_settings(**{**node.settings(), "ssh_identity_files": [str(make_key(tmp_path / "stranger"))]})
    assert failed_at(walk(*ASKED), "login", "publickey", "stranger", "SlurmService.ssh_identity_files")


def test_a_login_node_without_sshd_python_or_slurm_is_told(node, admin_settings):
    """Each with the setting."""
    settings = node.settings()
    admin_settings(**{**settings, "cluster": f"ssh://127.0.0.1:{(port := free_port())}"})
    assert failed_at(walk(*ASKED), "login", f"port {port}", "refused", "SlurmService.cluster")
    admin_settings(**{**settings, "ssh_python": "nosuchpython"})
    assert failed_at(walk(*ASKED), "login", "nosuchpython", "ssh_python")
    admin_settings(**{**settings, "slurm_path": "/nonexistent"})
    assert failed_at(walk(*ASKED), "slurm", "not found", "SlurmService.slurm_path")


def test_a_relay_whose_port_is_taken_is_told(node, admin_settings):
    """Where launchers must come by it."""
    admin_settings(**node.settings(), relay="always", relay_port=str(node.port))
    assert failed_at(walk(*ASKED), "server", "Address already in use", "SlurmService.relay_port")


# -- what fails with the job ----------------------------------------------------------------------------


def test_a_partition_that_is_not_there_is_told_in_slurms_words(service, cluster):
    """The line above it has the partitions that there are."""
    assert failed_at(walked := walk("--project", "demo", "--partition", "nosuch"), "submit", "nosuch", "--partition")
    assert "devel" in walked.said("slurm")


def test_a_job_that_waits_is_told_with_its_reason_and_cancelled(service, cluster):
    """After as long as is allowed."""
    with filled(cluster):
        assert failed_at(walked := walk(*ASKED, "--wait", "1.5"), "run", "(Resources)", "1.5 s", "--wait")
        assert walked.steps["end"]["ok"]
        assert jobs_of_ours(cluster) == []


def test_a_walk_whose_reader_has_enough_takes_its_job_with_it(service, cluster):
    """As ``| head`` has: it ends as by Ctrl-C, and complains of nothing."""
    argv = command(*ASKED)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any("a job is accepted" in line for line in process.stdout)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(READY) == 3
    assert nothing_left(cluster)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_walk_that_is_interrupted_takes_its_job_with_it(service, cluster, signum):
    """Ctrl-C while the job waits; findings come all the same."""
    with filled(cluster):
        process = subprocess.Popen(command(*ASKED), stdout=subprocess.PIPE, text=True)
        assert any("a job is accepted" in line for line in process.stdout)
        process.send_signal(signum)
        said = process.stdout.read()
        assert process.wait(READY) == 3
        assert "it runs: interrupted" in said
        assert said.count("FAILED") == 1, said
        assert "Nothing is left of dead servers" in said
        assert jobs_of_ours(cluster) == []


def test_pythons_that_do_not_do_for_the_launcher_are_named(admin_settings, cluster, tmp_path):
    """One without pycryptodome, and none at all."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=60)
    admin_settings(launcher_python=[str(bare / "bin" / "python")])
    walked = walk(*ASKED)
    assert failed_at(walked, "python", "pycryptodome", str(bare), "SlurmService.launcher_python")
    assert walked.steps["dial"]["ok"]
    admin_settings(launcher_python=["/nosuch/python"])
    assert failed_at(walk(*ASKED), "python", "no Python was found on the node", "SlurmService.launcher_python")
    assert nothing_left(cluster)


@pytest.mark.slow
def test_a_kernel_that_dies_at_its_start_or_later_is_told_with_its_output(service, cluster, kernelspecs):
    """Its last words are there; its launcher had been good."""
    argv = [sys.executable, "-c", "raise SystemExit('no licence')"]
    assert failed_at(walk("--kernelspec", spec(kernelspecs, kernel_argv=argv)), "kernel", "no licence", "kernelspec")
    line = "import os; get_ipython().events.register('pre_execute', lambda: os._exit(3))"
    dies = [*IPYKERNEL, f"--IPKernelApp.exec_lines={line}"]
    assert failed_at(walk("--kernelspec", spec(kernelspecs, kernel_argv=dies)), "execute", "exit code 3")
    assert nothing_left(cluster)
