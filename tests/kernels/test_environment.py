"""What a kernel finds around it: environment, working directory, its command; and what must not reach it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import sys
from pathlib import Path

import pytest

from gateway_slurm.errors import RequestError
from helpers.kernel_clients import (
    AUTO_KERNEL,
    IPYKERNEL,
    execute,
    install_auto,
    install_kernelspec,
    jobid_of,
    processes_of_job,
    running_kernel,
)
from helpers.private_slurm import poll

ENVIRONMENT = "import os, json; print(json.dumps(dict(os.environ)))"


def environment_of(client):
    """The kernel's environment."""
    return json.loads(execute(client, ENVIRONMENT))


def test_the_environment_is_the_jobs_the_callers_and_the_kernelspecs(service, kernelspecs, monkeypatch):
    """The kernel has its job's SLURM variables, the caller's env and the kernelspec's, and starts in cwd."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "64")
    monkeypatch.setenv("FROM_CALLER", "grüße, $HOME 'quoted'\nsecond line")
    install_kernelspec(kernelspecs, "env", spec_overrides={"env": {"FROM_SPEC": "a b", "FROM_BOTH": "spec"}})
    with running_kernel("env") as (manager, client):
        env = environment_of(client)
        assert env["SLURM_JOB_ID"] == jobid_of(manager)
        assert env.get("SLURM_NTASKS") != "64"
        assert env["FROM_CALLER"] == "grüße, $HOME 'quoted'\nsecond line"
        assert env["FROM_SPEC"] == "a b"
        # Else debugpy, which ipykernel imports later, writes four lines about frozen modules into each kernel's log.
        assert env["PYDEVD_DISABLE_FILE_VALIDATION"] == "1"


def test_a_given_environment_and_directory_are_the_kernels(service, kernelspecs, tmp_path):
    """start_kernel(env=…, cwd=…), as servers call it, decides what the kernel gets, over restarts, too."""
    given = {"PATH": "/usr/bin:/bin", "ONLY": "this", "HOME": str(tmp_path)}
    with running_kernel("slurm", env=given, cwd=os.path.relpath(tmp_path)) as (manager, client):
        for _ in range(2):
            env = environment_of(client)
            assert {name: env[name] for name in given} == given
            assert "JUPYTER_PATH" not in env
            assert execute(client, "import os; print(os.getcwd())") == str(tmp_path)
            manager.restart_kernel()
            client.wait_for_ready(timeout=60)


def test_the_servers_secrets_do_not_reach_the_kernel(service, monkeypatch):
    """Tokens and the server's own settings stay with the server; so do the launcher's."""
    secrets = {
        "JUPYTER_TOKEN": "secret-1",
        "JUPYTERHUB_API_TOKEN": "secret-2",
        "JPY_API_TOKEN": "secret-3",
        "CONFIGPROXY_AUTH_TOKEN": "secret-4",
        "GATEWAY_SLURM_ANYTHING": "secret-5",
        "SSH_AUTH_SOCK": "/secret-6",
        "SQUEUE_FORMAT": "secret-7",
        "SBATCH_PARTITION": "secret-8",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    with running_kernel("slurm") as (_manager, client):
        env = environment_of(client)
        assert not set(secrets) & set(env)
        assert "secret-" not in str(env)
        assert not [name for name in env if name.startswith("GATEWAY_SLURM")]


def test_the_callers_slurm_settings_do_not_reach_slurm(service, monkeypatch):
    """A stale SBATCH_PARTITION or SQUEUE_FORMAT of the caller changes neither the job nor what is read of it."""
    for name in ("SBATCH_PARTITION", "SBATCH_RESERVATION", "SLURM_JOB_ID", "SQUEUE_FORMAT", "SLURM_CLUSTERS"):
        monkeypatch.setenv(name, "nonsense")
    monkeypatch.setenv("LC_ALL", "C")
    with running_kernel("slurm") as (_manager, client):
        assert execute(client, "print(6 * 7)") == "42"
    assert service.runner.counts["sbatch"] == 1


def test_the_connection_file_is_the_users_alone(service, kernel_name):
    """The connection file, on the node, is 0600 in a 0700 directory, and no secret is in any command line."""
    code = "import sys; print(sys.argv[sys.argv.index('-f') + 1])"
    with running_kernel(kernel_name) as (manager, client):
        path = Path(execute(client, code))
        info = json.loads(path.read_text())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        secrets = [manager.session.key.decode(), *filter(None, [info.get("curve_secretkey")])]
        for process in processes_of_job(jobid_of(manager)):
            assert not [secret for secret in secrets if secret in " ".join(process.cmdline())]
        assert info["transport"] == ("tcp" if kernel_name == "slurm-direct" else "ipc")
        assert bool(info.get("curve_secretkey")) == (kernel_name == "slurm-direct")
    assert poll(lambda: not path.parent.exists(), timeout=15)


def test_a_tilde_in_kernel_argv_is_home_on_the_node(service, kernelspecs, jupyter_base):
    """Users keep a kernel.sh in their homes and name it ``~/…/kernel.sh``, with ``-f {connection_file}``."""
    script = jupyter_base / "home" / "my kernels" / "kernel.sh"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\nFROM_SCRIPT=yes exec {sys.executable} -m ipykernel_launcher "$@"\n')
    script.chmod(0o755)
    argv = ["~/my kernels/kernel.sh", "-f", "{connection_file}"]
    install_kernelspec(kernelspecs, "script", config_overrides={"kernel_argv": argv})
    with running_kernel("script") as (_manager, client):
        assert environment_of(client)["FROM_SCRIPT"] == "yes"
    shutil.rmtree(script.parent)


@pytest.mark.parametrize(
    "outer", [{}, {"argv": []}, {"argv": ["/nonexistent", "{connection_file}"]}], ids=["none", "empty", "any"]
)
def test_the_kernelspecs_own_argv_is_not_run(service, kernelspecs, outer):
    """kernel_argv is what runs, whatever the wrapper's own argv is, also when it has none."""
    install_kernelspec(kernelspecs, "outer", spec_overrides=outer)
    with running_kernel("outer") as (_manager, client):
        assert execute(client, "print(6 * 7)") == "42"


def test_arguments_are_no_shell_words(service, kernelspecs):
    """Blanks, quotes, ``$`` and ``;`` in kernel_argv and extra_arguments reach the kernel as they are."""
    awkward = ["--", "a b", "$(touch /tmp/no)", "';\"", "ü\n"]
    code = "import sys; from ipykernel.kernelapp import launch_new_instance as run;"
    code += "sys.kept = sys.argv[1:]; run(['-f', sys.argv[1]])"
    argv = [sys.executable, "-c", code, "{connection_file}", *awkward]
    install_kernelspec(kernelspecs, "words", config_overrides={"kernel_argv": argv})
    with running_kernel("words", extra_arguments=["--last"]) as (_manager, client):
        arguments = json.loads(execute(client, "import sys, json; print(json.dumps(sys.kept))"))
    assert arguments[1:] == [*awkward, "--last"]


@pytest.fixture
def inner(kernelspecs):
    """An installed kernelspec that is not Slurm's, for others to wrap."""
    path = kernelspecs / "kernels" / "inner" / "kernel.json"
    path.parent.mkdir()
    spec = {
        "display_name": "Inner",
        "language": "python",
        # A kernelspec's "python" is the server's, as Jupyter has it, whatever is on PATH.
        "argv": ["python", *IPYKERNEL[1:], "--IPKernelApp.exec_lines=where='{resource_dir}'"],
        "env": {"FROM_INNER": "${FROM_CALLER} inner", "FROM_BOTH": "inner"},
        "metadata": {"supported_encryption": ["curve"]},
    }
    path.write_text(json.dumps(spec))
    return path.parent


def test_kernel_name_wraps_an_installed_kernelspec(service, kernelspecs, inner, monkeypatch, tmp_path):
    """With kernel_name the wrapped spec's argv, env and resources are used, and that it supports CurveZMQ."""
    monkeypatch.setenv("FROM_CALLER", "caller")
    (tmp_path / "python").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = {"kernel_argv": None, "kernel_name": "inner"}
    outer = {"env": {"FROM_BOTH": "outer"}}
    install_kernelspec(kernelspecs, "wrapper", config_overrides=config, spec_overrides=outer)
    with running_kernel("wrapper") as (manager, client):
        assert execute(client, "print(6 * 7)") == "42"
        assert manager.get_connection_info()["transport"] == "tcp"
        assert manager.get_connection_info()["curve_secretkey"]
        assert execute(client, "print(where)") == str(inner)
        env = environment_of(client)
        assert env["FROM_INNER"] == "caller inner"
        assert env["FROM_BOTH"] == "outer"


def test_a_kernel_name_that_is_not_there_is_named(service, kernelspecs):
    """The error for a wrong kernel_name says which ones there are."""
    config = {"kernel_argv": None, "kernel_name": "missing"}
    install_kernelspec(kernelspecs, "wrapper", config_overrides=config)
    with pytest.raises(RequestError, match=r"missing.*slurm"), running_kernel("wrapper"):
        pass


@pytest.mark.parametrize("connect", ["direct", "tunnel"])
def test_connect_is_the_requests_to_choose(service, kernelspecs, connect):
    """``connect`` in the kernelspec wins over what the kernel could do."""
    curve = {"metadata": {"supported_encryption": ["curve"]}}
    config = {"connect": connect}
    install_kernelspec(kernelspecs, "chosen", config_overrides=config, spec_overrides=curve)
    with running_kernel("chosen") as (manager, client):
        assert execute(client, "print(6 * 7)") == "42"
        transport = {"direct": "tcp", "tunnel": "ipc"}[connect]
        assert manager.get_connection_info()["transport"] == transport


def test_a_kernel_without_curve_is_never_reached_in_the_clear(service, kernelspecs):
    """``connect = direct`` for a kernel that does not declare CurveZMQ is refused, not downgraded."""
    install_kernelspec(kernelspecs, "clear", config_overrides={"connect": "direct"})
    with pytest.raises(RequestError, match="CurveZMQ"), running_kernel("clear"):
        pass


def test_the_admin_decides_on_umask_and_limits(admin_settings):
    """``umask`` is the kernels', and ``propagate`` names the limits of the server that jobs get."""
    admin_settings(umask="0027", propagate="fsize")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, hard))
    try:
        with running_kernel("slurm") as (_manager, client):
            code = "import os, resource; print(oct(os.umask(0)), resource.getrlimit(resource.RLIMIT_FSIZE)[0])"
            assert execute(client, code) == f"0o27 {1 << 40}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["slurm", AUTO_KERNEL])
def test_the_admin_decides_how_kernels_are_reached(admin_settings, kernelspecs, name):
    """``connect = tunnel`` in jupyter_slurm_config.py sends every kernel that does not say through the tunnel."""
    install_auto(kernelspecs)
    admin_settings(connect="tunnel")
    with running_kernel(name) as (manager, client):
        assert execute(client, "print(6 * 7)") == "42"
        assert manager.get_connection_info()["transport"] == "ipc"
