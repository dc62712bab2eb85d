"""Kernels and launchers that do not come up on their node: what the user reads, and that nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway_slurm.errors import KernelStartError, LauncherFailed, StartTimeout
from helpers.failing_starts import nothing_left, python_script, script, spec, start_error
from helpers.kernel_clients import IPYKERNEL, execute, install_kernelspec, running_kernel
from helpers.private_slurm import jobs_of

AT_ONCE = 10.0  # seconds: a job's start, a Python's on a busy machine, and Slurm's word that it failed


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with nothing but its standard library."""
    directory = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True, timeout=60)
    return str(directory / "bin" / "python")


def direct(kernelspecs: Path, **fields: object) -> str:
    """Install a kernelspec whose kernel clients reach by TCP; return its name."""
    curve = {"metadata": {"supported_encryption": ["curve"]}}
    install_kernelspec(kernelspecs, "asked", config_overrides=fields, spec_overrides=curve)
    return "asked"


# -- the kernel -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["/no/such/kernel", "-f", "{connection_file}"], ["kernel_argv", "'/no/such/kernel'", "install"]),
        (["nosuchkernel"], ["kernel_argv", "'nosuchkernel'", "PATH="]),
        (["/etc/passwd"], ["kernel_argv", "'/etc/passwd'", "Permission denied"]),
        (["~/nosuch.sh"], ["kernel_argv", "/home/nosuch.sh'"]),
    ],
)
def test_a_command_that_is_not_there_is_named(service, cluster, kernelspecs, argv, words):
    """Where kernel_argv cannot be run, the error names it, the node and what to do."""
    error, seconds = start_error(spec(kernelspecs, kernel_argv=argv))
    assert isinstance(error, KernelStartError)
    assert [word for word in [*words, socket.gethostname()] if word not in str(error)] == []
    assert seconds < AT_ONCE
    assert nothing_left(cluster)


@pytest.mark.parametrize("directory", ["/no/such/directory", "/etc/passwd"])
def test_a_directory_that_is_not_there_is_named(service, cluster, kernelspecs, directory):
    """Slurm would silently take another: here the kernelspec's directory is checked on the node."""
    error, seconds = start_error(spec(kernelspecs, directory=directory))
    assert isinstance(error, KernelStartError)
    assert directory in str(error)
    assert seconds < AT_ONCE
    assert nothing_left(cluster)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import no_such_module", ["ModuleNotFoundError", "no_such_module", "exit code 1"]),
        ("import os; os.abort()", ["SIGABRT"]),
        ("print('out'); raise SystemExit(0)", ["exit code 0", "out"]),
        ("import sys; sys.stderr.buffer.write(b'\\xff\\x00' * 9000 + b'end'); sys.exit(3)", ["exit code 3", "end"]),
    ],
)
def test_a_kernel_that_dies_at_start_is_quoted(service, cluster, kernelspecs, code, words):
    """How it ended, and the last lines that it printed, are in the error; it comes at once."""
    error, seconds = start_error(spec(kernelspecs, kernel_argv=[sys.executable, "-c", code]))
    assert isinstance(error, KernelStartError)
    assert [word for word in words if word not in str(error)] == []
    assert len(str(error)) < 10_000
    assert seconds < AT_ONCE
    assert nothing_left(cluster)


def test_a_kernel_that_never_listens_is_given_up(admin_settings, cluster, kernelspecs):
    """After start_timeout the start fails with what the kernel printed, and the kernel is gone."""
    admin_settings(start_timeout=1)
    code = "import time; print('thinking', flush=True); time.sleep(600)"
    error, seconds = start_error(spec(kernelspecs, kernel_argv=[sys.executable, "-c", code]))
    assert isinstance(error, StartTimeout)
    assert "1 s" in str(error)
    assert "thinking" in str(error)
    assert seconds < AT_ONCE
    assert nothing_left(cluster)


# -- the launcher ---------------------------------------------------------------------------------


def test_a_node_without_pycryptodome_is_told_at_once(admin_settings, cluster, bare_python):
    """The launcher itself says what it lacks, and where; the start does not wait for link_timeout."""
    admin_settings(launcher_python=[bare_python])
    error, seconds = start_error("slurm")
    assert isinstance(error, LauncherFailed)
    assert [w for w in ("pycryptodome", bare_python, "SlurmService.launcher_python") if w not in str(error)] == []
    assert seconds < AT_ONCE
    assert nothing_left(cluster)


def test_a_node_without_python_is_told_at_once(admin_settings, cluster):
    """Where none of launcher_python is on the node, the error says so, and where to name one."""
    admin_settings(launcher_python=["/no/such/python", "nosuchpython3"])
    error, seconds = start_error("slurm")
    assert isinstance(error, LauncherFailed)
    assert [w for w in ("no Python", "/no/such/python", "SlurmService.launcher_python") if w not in str(error)] == []
    assert seconds < AT_ONCE
    assert nothing_left(cluster)


def test_a_launcher_that_crashes_is_told_with_its_log(admin_settings, cluster, tmp_path):
    """What the launcher's Python said last is in the error, where the home directory is shared."""
    broken = script(tmp_path / "python", "#!/bin/sh\necho 'GLIBC_9.99 not found' >&2\nexit 5\n")
    admin_settings(launcher_python=[broken])
    error, seconds = start_error("slurm")
    assert isinstance(error, LauncherFailed)
    assert "exit code 5" in str(error)
    assert "GLIBC_9.99 not found" in str(error)
    assert seconds < AT_ONCE
    assert nothing_left(cluster)


def test_a_node_that_cannot_dial_back_is_told_with_the_addresses(admin_settings, cluster, monkeypatch):
    """After link_timeout the error names the addresses that were tried and the setting for a better one."""
    monkeypatch.setattr("gateway_slurm.service.endpoints", lambda *_arguments: ["127.0.0.1:9", "[::1]:9"])
    admin_settings(link_timeout=1)
    error, seconds = start_error("slurm")
    assert isinstance(error, LauncherFailed)
    words = ("127.0.0.1:9, [::1]:9", "SlurmService.response_address", "within 1 s", "launcher-")
    assert [word for word in words if word not in str(error)] == []
    assert seconds < AT_ONCE
    assert nothing_left(cluster)


def test_a_wrong_address_among_good_ones_only_costs_a_moment(admin_settings, cluster):
    """A response_address without a listener is tried first, and the next one works."""
    admin_settings(response_address="127.0.0.1:9")
    with running_kernel("slurm") as (_manager, client):
        assert execute(client, "print(1)") == "1"


def test_an_interface_that_is_not_there_is_named(admin_settings, cluster):
    """A response_interface that this machine does not have is the admin's mistake, and is named."""
    admin_settings(response_interface="nosuch0")
    error, _seconds = start_error("slurm")
    assert "SlurmService.response_interface" in str(error)
    assert "'nosuch0'" in str(error)
    assert jobs_of(cluster) == []


def test_a_response_port_that_is_taken_is_named(admin_settings, cluster):
    """Where no port of response_port is free, the error names the setting."""
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        port = taken.getsockname()[1]
        admin_settings(response_port=str(port))
        error, _seconds = start_error("slurm")
    assert str(port) in str(error)
    assert "SlurmService.response_port" in str(error)
    assert jobs_of(cluster) == []


# -- the kernel's ports ---------------------------------------------------------------------------

PORTS = "import json, sys; c = json.load(open(sys.argv[sys.argv.index('-f') + 1])); "
# Runs before the kernel: the first time it takes a port of the kernel's away, for as long as it lives.
RACE = """
import json, os, socket, subprocess, sys
connection = json.load(open(sys.argv[2]))
with open(sys.argv[1], "a") as tries:
    print(connection["shell_port"], file=tries)
if len(open(sys.argv[1]).readlines()) <= int(sys.argv[3]):
    thief = socket.create_server((connection["ip"], connection["shell_port"]))
    sys.exit(subprocess.call([sys.executable, "-m", "ipykernel_launcher", "-f", sys.argv[2]]))
os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", "-f", sys.argv[2]])
"""


@contextmanager
def free_range(count: int) -> Iterator[tuple[int, int]]:
    """``count`` ports in a row that were free a moment ago."""
    for low in range(20_000, 30_000, 50):
        try:
            for port in range(low, low + count):
                socket.create_server(("", port)).close()
        except OSError:
            continue
        yield low, low + count - 1
        return


def test_kernels_stay_in_the_admins_range_of_ports(admin_settings, cluster, kernelspecs):
    """With kernel_ports all five ports of a direct kernel are in that range, also after a restart."""
    with free_range(12) as (low, high):
        admin_settings(kernel_ports=f"{low}-{high}")
        with running_kernel(direct(kernelspecs)) as (manager, client):
            manager.restart_kernel()
            client.wait_for_ready(timeout=60)
            info = manager.get_connection_info()
            ports = {value for name, value in info.items() if name.endswith("_port")}
    assert len(ports) == 5
    assert all(low <= port <= high for port in ports)


def test_too_few_ports_are_a_clear_error(admin_settings, cluster, kernelspecs):
    """A range that holds no five free ports is named in the error, which comes at once."""
    with free_range(4) as (low, high):
        admin_settings(kernel_ports=f"{low}-{high}")
        error, seconds = start_error(direct(kernelspecs, connect="direct"))
    assert f"from {low} to {high}" in str(error)
    assert seconds < AT_ONCE
    assert nothing_left(cluster)


def test_too_few_ports_are_no_trouble_to_the_tunnel(admin_settings, cluster, kernelspecs):
    """Where the kernel need not be direct it is not, and the range is named in the reason."""
    with free_range(4) as (low, high):
        admin_settings(kernel_ports=f"{low}-{high}")
        with running_kernel(direct(kernelspecs)) as (manager, client):
            assert execute(client, "print(2)") == "2"
            connect = manager.provisioner.connect
    assert (connect["mode"], f"from {low} to {high}" in connect["why"]) == ("tunnel", True)


def test_a_kernel_that_loses_a_race_for_a_port_gets_others(service, cluster, kernelspecs, tmp_path):
    """A kernel that dies since another process took its port is started again, with other ports."""
    tries = tmp_path / "tries"
    argv = [python_script(tmp_path / "race", RACE), str(tries), "{connection_file}", "1"]
    with running_kernel(direct(kernelspecs, kernel_argv=argv)) as (manager, client):
        assert execute(client, "print(2)") == "2"
        port = manager.get_connection_info()["shell_port"]
    used = tries.read_text().split()
    assert len(set(used)) == 2
    assert used[-1] == str(port)


def test_losing_every_race_is_a_start_error(admin_settings, cluster, kernelspecs, tmp_path):
    """A kernel whose ports are taken again and again fails with what it said, and does not hang."""
    tries = tmp_path / "tries"
    argv = [python_script(tmp_path / "race", RACE), str(tries), "{connection_file}", "99"]
    admin_settings(start_timeout=60)
    error, _seconds = start_error(direct(kernelspecs, kernel_argv=argv))
    assert isinstance(error, KernelStartError)
    assert "ddress already in use" in str(error)
    assert 1 < len(tries.read_text().split()) < 10
    assert nothing_left(cluster)


def test_the_second_try_may_find_no_port(admin_settings, cluster, kernelspecs, tmp_path):
    """A lost race in a range that has no other port free is a start error at once, not a timeout."""
    argv = [python_script(tmp_path / "race", RACE), str(tmp_path / "tries"), "{connection_file}", "99"]
    # What holds the port outlives the kernel that lost it.
    code = (tmp_path / "race").read_text()
    keep = f"Path({str(tmp_path / 'thief')!r}).write_text(str(subprocess.Popen(['sleep', '600'], "
    keep += "pass_fds=[thief.fileno()], start_new_session=True).pid)); sys.exit("
    (tmp_path / "race").write_text(
        code.replace("import json,", "from pathlib import Path; import json,").replace("sys.exit(", keep)
    )
    with free_range(5) as (low, high):
        admin_settings(kernel_ports=f"{low}-{high}")
        error, seconds = start_error(direct(kernelspecs, kernel_argv=argv))
    os.kill(int((tmp_path / "thief").read_text()), signal.SIGKILL)
    assert isinstance(error, KernelStartError)
    assert "no free port on" in str(error)
    assert f"from {low} to {high}" in str(error)
    assert seconds < 2 * AT_ONCE
    assert nothing_left(cluster)


def test_the_kernel_that_works_is_the_plain_one(service, cluster, kernelspecs):
    """The kernelspec that these tests change works as it is."""
    with running_kernel(spec(kernelspecs, kernel_argv=IPYKERNEL)) as (_manager, client):
        assert execute(client, "print(3)") == "3"
