"""The path check of ``jupyter slurm doctor``: it passes by each access to Slurm, and each step fails for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_slurm.store import AllocationRecord, Registry
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import free_port
from helpers.daemons import start_daemon, stop_daemon
from helpers.doctor_cli import REQUEST, STEPS, check_path, command, failed_at
from helpers.failing_starts import all_nodes_taken, jobs_of_ours, nothing_left, spec
from helpers.kernel_clients import IPYKERNEL, READY, install_kernelspec, write_admin_settings
from helpers.login_node import make_key
from helpers.private_slurm import poll
from helpers.rest_cluster import cluster_with_rest, write_token
from helpers.slurm_accesses import BY_REST, COMMANDS, REST, SSH


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    """A cluster with slurmrestd, in place of the session's."""
    with cluster_with_rest() as private:
        yield private


@pytest.fixture(autouse=True)
def state(kernelspecs, tmp_path, monkeypatch) -> None:
    """A store and connection files of the test's own, so that leftovers of other tests are not found."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "runtime").mkdir()


# -- checks that pass --------------------------------------------------------------------------------------


# What the result of some steps names by each access; "{port}" is the port of the login node.
SAID = {
    COMMANDS: {"slurm": "batch*"},
    SSH: {"login": "127.0.0.1:{port}", "slurm": "batch*"},
    REST: {"login": "serves v0.0.", "slurm": "batch"},
}


def test_every_step_passes(access, node, cluster):
    """An account and a partition suffice: ipykernel of the launcher's Python is started, and nothing is left.

    Over SSH the launcher dials the relay on the login node. By REST, version and partitions come from slurmrestd.
    """
    access.service()
    output = check_path(*REQUEST)
    assert output.is_good, output.steps
    assert output.said("execute").startswith("2 ")
    for step, words in SAID[access.name].items():
        assert words.format(port=node.port) in output.said(step)
    if access.name != REST:
        assert "22." in output.said("slurm") or "version 2" in output.said("slurm")
    assert "partition batch" in output.said("submit")
    assert sys.executable in output.said("python")
    assert poll(lambda: nothing_left(cluster), timeout=1)


@pytest.mark.parametrize(
    ("name", "how"), [("slurm", "does not declare CurveZMQ"), ("slurm-direct", "can be dialled at")]
)
def test_the_kernel_of_a_kernelspec_is_started_with_its_own_transport(service, cluster, name, how):
    """Its request fields are used, and options override them."""
    output = check_path("--kernelspec", name, "--partition", "devel")
    assert output.is_good, output.steps
    assert how in output.said("kernel")
    assert f"kernelspec {name} with" in output.said("settings")
    assert "partition devel" in output.said("submit")


def test_without_options_the_first_kernelspec_is_taken(service, cluster):
    """A path of its directory is accepted as well as its name, since a gateway serves kernelspecs from directories."""
    assert "kernelspec slurm with" in (output := check_path()).said("settings")
    assert output.is_good
    path = os.path.join(os.environ["JUPYTER_PATH"], "kernels", "slurm")
    assert failed_at(output := check_path("--kernelspec", path, "--partition", "nosuch"), "submit", "nosuch")
    assert f"kernelspec {path} with" in output.said("settings")


def test_a_line_for_each_step_is_printed_and_findings_follow(service, cluster):
    """Rows of dead servers are found afterwards, and are not removed without ``--fix``."""
    registry = Registry.default()
    registry.open()
    registry.put(AllocationRecord(launcher_id="gs-1", jobid="99999999", identity="gs-1", kernel_ids=[]))
    registry.flush()
    registry.close(leave=True)
    done = subprocess.run(command(*REQUEST), capture_output=True, text=True, timeout=READY, check=False)
    assert len([line for line in done.stdout.splitlines() if line.startswith("ok  ")]) == len(STEPS)
    assert "job 99999999, which is over" in done.stdout
    assert done.returncode == 1
    assert len(Registry.default().all_allocations()) == 1


@pytest.mark.slow
def test_a_kernel_of_another_language_need_not_understand_the_question(service, cluster, kernelspecs):
    """Any reply of a bash kernel is an answer."""
    argv = [sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"]
    install_kernelspec(
        kernelspecs, "asked", config_overrides={"kernel_argv": argv}, spec_overrides={"language": "bash"}
    )
    output = check_path("--kernelspec", "asked")
    assert output.is_good, output.steps


# -- failures before a job is submitted -----------------------------------------------------------------


def test_wrong_settings_are_named(service):
    """An unknown setting, an invalid value, an invalid request field and an unknown kernelspec."""
    path = Path(os.environ["JUPYTER_CONFIG_DIR"], "jupyter_slurm_config.py")
    try:
        write_admin_settings(responce_port="5")
        assert failed_at(check_path(), "settings", "responce_port", str(path))
        write_admin_settings(response_port="x")
        assert failed_at(check_path(), "settings", "response_port", str(path))
        write_admin_settings(cluster="rest+http://127.0.0.1:1")
        assert failed_at(check_path(), "settings", "rest_token_file")
    finally:
        path.unlink()
    assert failed_at(check_path(*REQUEST, "--runtime", "soon"), "settings", "runtime", "soon")
    assert failed_at(check_path("--kernelspec", "nosuch"), "settings", "nosuch", "slurm-direct")


def test_missing_slurm_commands_are_reported_with_the_setting(admin_settings):
    """Where Slurm is reached by commands on this machine."""
    admin_settings(slurm_path="/nonexistent")
    assert failed_at(check_path(*REQUEST), "login", "sbatch", "SlurmService.slurm_path")


@pytest.mark.slow
def test_a_controller_that_is_down_is_reported_in_slurms_words(service, cluster):
    """Before a job is submitted."""
    stop_daemon(cluster, "slurmctld")
    try:
        assert failed_at(check_path(*REQUEST), "slurm", "slurmctld", "SlurmService.slurm_conf")
    finally:
        start_daemon(cluster, "slurmctld")


def test_ports_that_are_all_taken_are_reported_with_their_range(admin_settings, node):
    """No job is submitted, since its launcher could not connect."""
    admin_settings(response_port=str(node.port), response_interface="127.0.0.1")
    assert failed_at(check_path(*REQUEST), "server", str(node.port), "SlurmService.response_port")


def test_a_wrong_host_key_is_reported_with_its_fingerprint(node, admin_settings, tmp_path):
    """The known_hosts file with the other key is named."""
    other = Path(f"{make_key(tmp_path / 'other')}.pub").read_text()
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{node.port} {other}")
    admin_settings(**{**node.settings(), "ssh_known_hosts": [str(known)]})
    assert failed_at(check_path(*REQUEST), "login", "SHA256:", str(known), "ssh_known_hosts")
    known.write_text("")
    assert failed_at(check_path(*REQUEST), "login", "SHA256:", "not known", "ssh_known_hosts")


def test_a_refused_login_is_reported_with_the_keys_that_were_tried(node, admin_settings, tmp_path, monkeypatch):
    """Without an SSH agent."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    admin_settings(**{**node.settings(), "ssh_identity_files": [str(make_key(tmp_path / "stranger"))]})
    assert failed_at(check_path(*REQUEST), "login", "publickey", "stranger", "SlurmService.ssh_identity_files")


@pytest.mark.parametrize("access", [SSH, REST], indirect=True)
def test_a_port_without_a_listener_is_reported_with_the_setting(access):
    """Where sshd or slurmrestd does not run."""
    port = free_port()
    url, words = {
        SSH: (f"ssh://127.0.0.1:{port}", (f"port {port}", "refused")),
        REST: (f"rest+http://127.0.0.1:{port}", (str(port),)),
    }[access.name]
    access.service(cluster=url)
    assert failed_at(check_path(*REQUEST), "login", *words, "SlurmService.cluster")


def test_a_login_node_without_python_or_slurm_is_reported(node, admin_settings):
    """Each with the setting to change."""
    settings = node.settings()
    admin_settings(**{**settings, "ssh_python": "nosuchpython"})
    assert failed_at(check_path(*REQUEST), "login", "nosuchpython", "ssh_python")
    admin_settings(**{**settings, "slurm_path": "/nonexistent"})
    assert failed_at(check_path(*REQUEST), "slurm", "not found", "SlurmService.slurm_path")


@BY_REST
def test_a_token_that_is_refused_is_reported_with_the_setting(access, tmp_path):
    """Either slurmrestd does not accept it, or other users can read its file."""
    file = write_token(tmp_path / "token", "eyJhbGciOiJIUzI1NiJ9.eyJzdW4iOiJyb290In0.x")
    access.service(rest_token_command=[], rest_token_file=str(file))
    assert failed_at(check_path(*REQUEST), "slurm", "token has expired or is not valid", "rest_token_command")
    file.chmod(0o644)
    assert failed_at(check_path(*REQUEST), "login", str(file), "rest_token_file")


def test_a_relay_whose_port_is_taken_is_reported(node, admin_settings):
    """Where launchers must use the relay."""
    admin_settings(**node.settings(), relay="always", relay_port=str(node.port))
    assert failed_at(check_path(*REQUEST), "server", "Address already in use", "SlurmService.relay_port")


# -- failures of the job ----------------------------------------------------------------------------


def test_an_unknown_partition_is_reported_in_slurms_words(service, cluster):
    """The step before has listed the partitions."""
    assert failed_at(
        output := check_path("--project", "demo", "--partition", "nosuch"), "submit", "nosuch", "--partition"
    )
    assert "devel" in output.said("slurm")


def test_a_job_that_waits_too_long_is_reported_with_its_reason_and_cancelled(service, cluster):
    """After the seconds that ``--wait`` gives; at once, where no wait would end."""
    never = check_path(*REQUEST, "--nodes", "99")
    assert never.failed in (["run"], ["submit"]), never.steps
    assert "nodes" in never.said(never.failed[0])
    with all_nodes_taken(cluster):
        assert failed_at(output := check_path(*REQUEST, "--wait", "1.5"), "run", "(Resources)", "1.5 s", "--wait")
        assert output.steps["end"]["ok"]
        assert jobs_of_ours(cluster) == []


def test_a_check_whose_output_is_closed_ends_its_job(service, cluster):
    """As by ``| head``: it ends as after Ctrl-C, without a complaint."""
    argv = command(*REQUEST)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert any("Slurm accepts a job" in line for line in process.stdout)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(READY) == 3
    assert nothing_left(cluster)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_check_that_is_interrupted_ends_its_job(service, cluster, signum):
    """By Ctrl-C or SIGTERM while the job waits; the findings follow nevertheless."""
    with all_nodes_taken(cluster):
        process = subprocess.Popen(command(*REQUEST), stdout=subprocess.PIPE, text=True)
        assert any("Slurm accepts a job" in line for line in process.stdout)
        process.send_signal(signum)
        printed = process.stdout.read()
        assert process.wait(READY) == 3
        assert "the job runs: interrupted" in printed
        assert printed.count("FAILED") == 1, printed
        assert "Nothing is left of dead servers" in printed
        assert jobs_of_ours(cluster) == []


def test_pythons_that_cannot_run_the_launcher_are_named(admin_settings, cluster, tmp_path):
    """A Python without pycryptodome, and a path where there is no Python."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=60)
    admin_settings(launcher_python=[str(bare / "bin" / "python")])
    output = check_path(*REQUEST)
    assert failed_at(output, "python", "pycryptodome", str(bare), "SlurmService.launcher_python")
    assert output.steps["dial"]["ok"]
    admin_settings(launcher_python=["/nosuch/python"])
    assert failed_at(check_path(*REQUEST), "python", "no Python was found on the node", "SlurmService.launcher_python")
    assert nothing_left(cluster)


@pytest.mark.slow
def test_a_kernel_that_dies_at_its_start_or_later_is_reported_with_its_output(service, cluster, kernelspecs):
    """The end of its output is shown; the steps of its launcher have passed."""
    argv = [sys.executable, "-c", "raise SystemExit('no licence')"]
    assert failed_at(
        check_path("--kernelspec", spec(kernelspecs, kernel_argv=argv)), "kernel", "no licence", "kernelspec"
    )
    line = "import os; get_ipython().events.register('pre_execute', lambda: os._exit(3))"
    dies = [*IPYKERNEL, f"--IPKernelApp.exec_lines={line}"]
    assert failed_at(check_path("--kernelspec", spec(kernelspecs, kernel_argv=dies)), "execute", "exit code 3")
    assert nothing_left(cluster)
