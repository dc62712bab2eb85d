"""``run_as = "user"``: kernels of real Unix users, by a service whose own account is none of theirs.

Needs root, which makes the users; collected only then (see conftest.py). What needs no other user is in
tests/unit/slurm/test_sudo.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gateway_slurm.slurm.sudo.helper import LENGTH
from gateway_slurm.testing import PrivateCluster
from helpers import odd_server
from helpers.kernel_clients import READY, job_state
from helpers.private_slurm import poll, slurm
from helpers.unix_users import SNIPPET, GatewayError, GatewayProcess, People, change_users, people, sudoers_rule

WHOAMI = "import getpass, os, pwd; print(pwd.getpwuid(os.geteuid()).pw_name, getpass.getuser(), os.environ['HOME'])"
JOB = "import os; print(os.environ['SLURM_JOB_ID'])"


@pytest.fixture(scope="module")
def folk(cluster) -> Iterator[People]:
    """Two users, and the gateway's account."""
    with people(cluster) as found:
        yield found


@pytest.fixture(scope="module")
def gateway(folk, cluster) -> Iterator[GatewayProcess]:
    """A service in a process of the gateway's account."""
    process = GatewayProcess(folk, cluster)
    yield process
    process.close()


@pytest.fixture
def kernels(gateway) -> Iterator[list[str]]:
    """Names of kernels; those that were started are shut down after the test."""
    started: list[str] = []
    yield started
    for name in started:
        gateway.ask("shutdown", kernel=name)


def user_of(jobid, cluster) -> str:
    """Whose job it is to Slurm."""
    return slurm("squeue", "--noheader", f"--jobs={jobid}", "--format=%u", cluster=cluster).stdout.strip()


def test_each_kernel_runs_as_its_owner(folk, gateway, kernels, cluster):
    """Two owners' kernels run side by side as two Unix users, with their homes; neither reads the other's files."""
    jobs = {}
    for name in (folk.ada, folk.bob):
        jobs[name] = gateway.ask("start", kernel=name, owner=name)["jobid"]
        kernels.append(name)
        assert user_of(jobs[name], cluster) == name
        assert gateway.ask("execute", kernel=name, code=WHOAMI) == f"{name} {name} {folk.home(name)}"
    path = folk.base / "secret"
    write = f"import os; os.close(os.open('{path}', os.O_CREAT | os.O_WRONLY, 0o600)); open('{path}', 'w').write('x')"
    folk.base.chmod(0o1777)
    assert gateway.ask("execute", kernel=folk.ada, code=write) == ""
    assert gateway.ask("execute", kernel=folk.ada, code=f"print(open('{path}').read())") == "x"
    assert "PermissionError" in gateway.ask("execute", kernel=folk.bob, code=f"open('{path}')")
    assert [row["jobid"] for row in gateway.ask("rows", owner=folk.ada)] == [jobs[folk.ada]]
    assert {row["owner"] for row in gateway.ask("rows", owner=None)} == {folk.ada, folk.bob}


def test_interrupt_restart_and_shutdown_reach_another_users_kernel(folk, gateway, kernels, cluster):
    """An owner's kernel is interrupted and restarted in its job, which is gone after the shutdown."""
    jobid = gateway.ask("start", kernel="one", owner=folk.ada)["jobid"]
    kernels.append("one")
    assert gateway.ask("interrupt", kernel="one") == "KeyboardInterrupt"
    assert gateway.ask("restart", kernel="one") == jobid
    assert gateway.ask("execute", kernel="one", code=JOB) == jobid
    gateway.ask("shutdown", kernel=kernels.pop())
    assert poll(lambda: job_state(jobid) == "", timeout=READY)


def test_a_job_of_another_user_is_neither_joined_nor_ended(folk, gateway, kernels, cluster):
    """``jobid`` and cancel fail for another's job, from the service and from Slurm itself; they work for one's own."""
    jobid = gateway.ask("start", kernel="one", owner=folk.ada)["jobid"]
    kernels.append("one")
    with pytest.raises(GatewayError, match=f"AllocationError: jobid {jobid} is not a job of yours"):
        gateway.ask("start", kernel="two", owner=folk.bob, fields={"jobid": jobid})
    with pytest.raises(GatewayError, match=f"UnknownJob: '{jobid}' is no allocation of yours"):
        gateway.ask("cancel", owner=folk.bob, jobid=jobid)
    assert "denied" in helper_says(folk, folk.bob, "scancel", jobid).lower()
    assert job_state(jobid) == "RUNNING"
    assert gateway.ask("start", kernel="two", owner=folk.ada, fields={"jobid": jobid})["jobid"] == jobid
    kernels.append("two")
    gateway.ask("cancel", owner=folk.ada, jobid=jobid)
    assert poll(lambda: job_state(jobid) == "", timeout=READY)


def test_a_job_from_a_terminal_is_adopted_by_its_user_only(folk, gateway, kernels, cluster):
    """A job that a user made with salloc takes their kernel, by a detached srun as that user; another's is refused."""
    made = slurm_as(folk, cluster, "salloc", "--no-shell", "-N1", "-t5")
    jobid = made.stderr.decode().split("Granted job allocation ")[1].split()[0]
    assert poll(lambda: job_state(jobid) == "RUNNING", timeout=READY), made
    with pytest.raises(GatewayError, match="not a job of yours"):
        gateway.ask("start", kernel="two", owner=folk.bob, fields={"jobid": jobid})
    gateway.ask("start", kernel="one", owner=folk.ada, fields={"jobid": jobid})
    kernels.append("one")
    assert gateway.ask("execute", kernel="one", code=JOB) == jobid
    assert gateway.ask("restart", kernel="one") == jobid
    gateway.ask("shutdown", kernel=kernels.pop())
    assert poll(lambda: job_state(jobid) == "", timeout=READY)


def test_nothing_of_the_gateways_process_reaches_a_users_kernel(folk, cluster):
    """In a job of their own and in one of salloc, a user's kernel has the settings of the user's plain srun."""
    area = folk.base / "probes"
    area.mkdir()
    area.chmod(0o777)
    probe = str(odd_server.install_probe(area))
    made = slurm_as(folk, cluster, "salloc", "--no-shell", "-N1", "-t5")
    jobid = made.stderr.decode().split("Granted job allocation ")[1].split()[0]
    plain = ("srun", f"--jobid={jobid}", "--overlap", "--propagate=NONE", probe, str(area / "plain"))
    assert slurm_as(folk, cluster, *plain).returncode == 0
    gateway = GatewayProcess(folk, cluster, odd=True)
    try:
        for name, fields in (("own", {}), ("adopted", {"jobid": jobid})):
            argv = [probe, str(area / name), *gateway.kernel_argv(folk)]
            gateway.ask("start", kernel=name, owner=folk.ada, fields={"kernel_argv": argv, **fields})
            gateway.ask("shutdown", kernel=name)
    finally:
        gateway.close()
        slurm("scancel", jobid, cluster=cluster, check=False)
    expected = odd_server.probed(area / "plain")
    for name in ("own", "adopted"):
        found = odd_server.probed(area / name)
        assert "SLURM_UMASK" not in found["environment"]
        for key in expected.keys() - {"cwd", "environment"}:
            assert found[key] == expected[key], (name, key)


@pytest.mark.parametrize("owner", ["root", "daemon", "nobody", "no-such-user", "-x", "#0", "ada bob", "", "gateway"])
def test_owners_who_may_not_are_refused(folk, gateway, owner):
    """Root, system accounts, unknown and impossible names, and the gateway's own account get no kernel."""
    name = folk.gateway if owner == "gateway" else owner
    with pytest.raises(GatewayError, match="NotAllowed: not allowed to run kernels: "):
        gateway.ask("start", kernel="one", owner=name)


def test_a_user_outside_the_group_is_refused_by_sudo(folk, gateway):
    """Whom no sudoers rule names gets the error with sudo's words, and no job."""
    change_users("gpasswd", "-d", folk.bob, sudo_group(folk))
    try:
        with pytest.raises(GatewayError, match=rf"SlurmUnavailable: .*as user {re.escape(folk.bob)}: sudo: "):
            gateway.ask("start", kernel="one", owner=folk.bob)
    finally:
        change_users("gpasswd", "-a", folk.bob, sudo_group(folk))


def sudo_group(folk) -> str:
    """The group whose members may have kernels."""
    return folk.gateway.replace("-gateway", "-users")


@pytest.mark.parametrize(
    "argv",
    [
        ["-u", "root", "--", "HELPER"],
        ["-u", "daemon", "--", "HELPER"],
        ["-u", "GATEWAY", "--", "HELPER"],
        ["-u", "ADA", "--", "HELPER", "x"],
        ["-u", "ADA", "--", "HELPER", ""],
        ["-u", "ADA", "--", "/bin/sh"],
        ["-u", "ADA", "-i"],
        ["-u", "ADA", "PATH=/tmp", "HELPER"],
        ["-u", "ADA", "-E", "HELPER"],
        ["-u", "ADA", "-g", "root", "--", "HELPER"],
    ],
)
def test_sudo_lets_the_gateway_do_nothing_else(folk, argv):
    """No other user, program, argument, group or environment than the rule's."""
    names = {"HELPER": folk.helper, "GATEWAY": folk.gateway, "ADA": folk.ada}
    tried = folk.run(folk.gateway, "sudo", "-n", *(names.get(item, item) for item in argv))
    assert (tried.returncode, tried.stdout) == (1, b"")
    assert tried.stderr.startswith((b"sudo: ", b"Sorry, user "))


def test_sudo_lets_the_gateway_run_the_helper(folk):
    """The rule's own way works: what refuses an empty request is the helper."""
    tried = folk.run(folk.gateway, "sudo", "-n", "-u", folk.ada, "--", folk.helper)
    assert tried.stderr == b"gateway_slurm's helper: the request is incomplete\n"


def test_the_sudoers_snippet_is_valid(tmp_path):
    """Visudo has nothing to say against the snippet, as it is and with other names."""
    for text in (SNIPPET.read_text(), sudoers_rule(gateway="gw", group="people", helper="/opt/as-user")):
        path = tmp_path / "snippet"
        path.write_text(text)
        checked = subprocess.run(["visudo", "-cf", str(path)], capture_output=True, text=True, timeout=60)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_no_launch_token_is_in_any_command_line(folk, gateway, kernels):
    """While a kernel starts in a job of its own and another in an adopted node, no argv shows a launch token."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for process in psutil.process_iter():
                try:
                    seen.add("\0".join(process.cmdline()))
                except psutil.Error:  # it has just ended
                    continue

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        jobid = gateway.ask("start", kernel="one", owner=folk.ada, fields={"nodes": 2})["jobid"]
        kernels.append("one")
        gateway.ask("start", kernel="two", owner=folk.ada, fields={"jobid": jobid})
        kernels.append("two")
    finally:
        over.set()
        watcher.join()
    tokens = gateway.ask("tokens")
    assert len(tokens) >= 2
    assert any(line.endswith(folk.helper) for line in seen)
    assert any("srun\0" in line for line in seen)
    assert [line for line in seen if any(token in line for token in tokens)] == []


def test_a_crash_of_the_gateway_leaves_a_step_that_was_started(folk, cluster):
    """A detached srun, its helper, and the kernel in its step outlive a killed gateway, and end with the job."""
    made = slurm_as(folk, cluster, "sbatch", "--parsable", "-N2", "-o/dev/null", "--wrap=sleep 300")
    jobid = made.stdout.decode().strip()
    assert poll(lambda: job_state(jobid) == "RUNNING", timeout=READY), made
    gateway = GatewayProcess(folk, cluster)
    try:
        gateway.ask("start", kernel="one", owner=folk.ada, fields={"jobid": jobid})
        ticks = folk.home(folk.ada) / "ticks"
        assert gateway.ask("execute", kernel="one", code=TICK.format(path=ticks)) == ""
        helpers = [process for process in psutil.process_iter() if is_helper(process, folk)]
        assert helpers
        gateway.kill()
        before = ticks.stat().st_size
        assert poll(lambda: ticks.stat().st_size > before + 30, timeout=READY)
        assert all(process.is_running() for process in helpers)
        slurm("scancel", jobid, cluster=cluster)
        assert poll(lambda: not any(is_helper(process, folk) for process in psutil.process_iter()), timeout=READY)
    finally:
        gateway.close()
        slurm("scancel", jobid, cluster=cluster, check=False)


TICK = """
import threading, time
def tick():
    while True:
        with open('{path}', "a") as file:
            file.write(".")
        time.sleep(0.05)
threading.Thread(target=tick, daemon=True).start()
"""


def test_the_next_gateway_cancels_what_a_killed_one_left_in_the_queue(folk, cluster):
    """A job in the queue whose start was given up is found and ended as its user."""
    argv = ("sbatch", "--parsable", "--exclusive", "-N4", "-o/dev/null", "--wrap", "sleep 300")
    filler = slurm(*argv, cluster=cluster).stdout.strip()
    assert poll(lambda: job_state(filler) == "RUNNING", timeout=READY)

    def waiting() -> list[str]:
        listed = slurm("squeue", "--noheader", f"--user={folk.ada}", "--format=%i", cluster=cluster)
        return listed.stdout.split()

    first = GatewayProcess(folk, cluster)
    try:
        first.tell("start", kernel="one", owner=folk.ada)
        assert poll(lambda: len(waiting()) == 1, timeout=READY)
        first.kill()
        second = GatewayProcess(folk, cluster)
        try:
            with pytest.raises(GatewayError, match="UnknownJob"):
                second.ask("cancel", owner=folk.ada, jobid="99999999")
            assert poll(lambda: waiting() == [], timeout=READY)
        finally:
            second.close()
    finally:
        first.close()
        slurm("scancel", filler, *waiting(), cluster=cluster, check=False)


@pytest.mark.slow  # it has a Slurm of its own
def test_jobs_that_slurm_shows_to_their_users_only_are_waited_for():
    """With PrivateData=jobs, and no privilege in Slurm, the gateway asks an owner for a job that it is not shown."""
    directory = Path(tempfile.mkdtemp(prefix="gst-", dir="/tmp"))
    directory.chmod(0o755)
    with (
        PrivateCluster(directory / "slurm", nodes=1, extra_conf="PrivateData=jobs") as private,
        people(private) as folk,
    ):
        argv = ("sbatch", "--parsable", "--exclusive", "-o/dev/null", "--wrap", "sleep 300")
        filler = slurm(*argv, cluster=private).stdout.strip()
        assert folk.run(folk.gateway, "env", f"SLURM_CONF={private.slurm_conf}", "squeue", "-h").stdout == b""
        gateway = GatewayProcess(folk, private, watch_interval=0.2)
        try:
            start = gateway.tell("start", kernel="one", owner=folk.ada)
            # Several looks, of which two that found nothing would be the job's end.
            assert poll(lambda: gateway.ask("commands").get("squeue", 0) > 8, timeout=READY)
            slurm("scancel", filler, cluster=private)
            jobid = gateway.answer(start)["jobid"]
            assert gateway.ask("execute", kernel="one", code=JOB) == jobid
        finally:
            gateway.close()
    directory.rmdir()


def slurm_as(folk, cluster, *argv):
    """Run one of Slurm's commands as ada."""
    return folk.run(folk.ada, "env", f"SLURM_CONF={cluster.slurm_conf}", *argv)


def is_helper(process, folk) -> bool:
    """Whether a process is the helper, not the sudo before it."""
    try:
        argv = process.cmdline()
    except psutil.Error:  # it has just ended
        return False
    return bool(argv) and argv[-1] == folk.helper and "python" in argv[0]


def helper_says(folk, user: str, command: str, *arguments: str) -> str:
    """What a command that the helper runs, as this user and without sudo, prints to standard error."""
    header = {"command": command, "arguments": arguments, "environment": {}, "timeout": 30, "detached": False}
    text = json.dumps(header).encode()
    pipe = subprocess.PIPE
    # Its standard input stays open until the command has ended.
    with subprocess.Popen(
        [folk.helper], user=user, group=user, extra_groups=[], env={}, stdin=pipe, stdout=pipe, stderr=pipe
    ) as helper:
        assert helper.stdin is not None
        assert helper.stderr is not None
        helper.stdin.write(LENGTH.pack(len(text)) + text + LENGTH.pack(0))
        helper.stdin.flush()
        return helper.stderr.read().decode()
