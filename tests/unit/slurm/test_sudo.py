"""The helper that runs Slurm's commands as a user, the runner that uses it, and the check of users."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from gateway_slurm.environment import PERSONAL, without
from gateway_slurm.errors import NotAllowed, SlurmUnavailable
from gateway_slurm.slurm import commands
from gateway_slurm.slurm.model import JobSpec, StepSpec
from gateway_slurm.slurm.sudo import HELPER, helper
from gateway_slurm.slurm.sudo.helper import LENGTH, Refused, Settings
from gateway_slurm.slurm.sudo.runner import HelperPlaces, SudoRunner, check_user, process_user

ROOT = Path(__file__).parents[3]
GOOD = {"command": "scancel", "arguments": ["12"], "environment": {}, "timeout": 30, "detached": False}


# -- what the helper refuses ----------------------------------------------------------------------------


def run_helper(path: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a helper with an empty standard input."""
    argv = [sys.executable, "-IS", str(path), *arguments]
    return subprocess.run(argv, input="", capture_output=True, text=True, timeout=60)


def test_a_helper_that_others_could_change_runs_nothing(tmp_path):
    """The message names the directory that others can write or that does not belong to root."""
    copy = tmp_path / "as-user"
    shutil.copy(HELPER, copy)
    ran = run_helper(copy)
    assert ran.returncode == helper.REFUSED_STATUS
    assert ran.stdout == ""
    assert "others than root can change " in ran.stderr


def test_the_helper_takes_no_arguments():
    """The request comes over standard input only."""
    ran = run_helper(HELPER, "scancel")
    assert (ran.returncode, ran.stdout) == (helper.REFUSED_STATUS, "")
    assert ran.stderr == "gateway_slurm's helper: it takes no arguments\n"


@pytest.mark.parametrize(("owner", "mode"), [(1000, 0o100755), (0, 0o100775), (0, 0o100757), (0, 0o120777)])
def test_each_part_of_its_path_is_roots_alone(monkeypatch, owner, mode):
    """Another owner, write permission for others, or a symbolic link anywhere above is refused."""
    good = SimpleNamespace(st_uid=0, st_mode=0o40755)
    bad = SimpleNamespace(st_uid=owner, st_mode=mode)
    for wrong in ("/opt/x/as-user", "/opt/x", "/opt", "/"):
        monkeypatch.setattr(helper.os, "lstat", lambda path, wrong=wrong: bad if path == wrong else good)
        with pytest.raises(Refused, match=f"others than root can change {wrong}:"):
            helper.check_installation("/opt/x/as-user")
    monkeypatch.setattr(helper.os, "lstat", lambda _path: good)
    helper.check_installation("/opt/x/as-user")


@pytest.mark.parametrize("uid", [0, 1, 999, 65534])
def test_it_runs_nothing_for_root_and_system_accounts(monkeypatch, uid):
    """sudo's rules do not matter."""
    monkeypatch.setattr(helper.os, "getuid", lambda: uid)
    monkeypatch.setattr(helper.os, "geteuid", lambda: uid)
    with pytest.raises(Refused, match=f"nothing is run for user id {uid}"):
        helper.this_user(Settings())


def test_it_runs_nothing_with_two_identities(monkeypatch):
    """The real and the effective user must be equal."""
    monkeypatch.setattr(helper.os, "getuid", lambda: 1000)
    monkeypatch.setattr(helper.os, "geteuid", lambda: 0)
    with pytest.raises(Refused, match="differ"):
        helper.this_user(Settings())


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("sh", ["-c", "id"]),
        ("/usr/bin/sbatch", []),
        ("../sbatch", []),
        ("sbatch", ["/etc/shadow"]),
        ("sbatch", ["--wrap=id"]),
        ("sbatch", ["-p", "batch"]),
        ("sbatch", ["--export=ALL,LD_PRELOAD=/tmp/x.so"]),
        ("sbatch", ["--export"]),
        ("sbatch", ["--comment=a\0b"]),
        ("sbatch", [1]),
        ("scancel", []),
        ("scancel", ["12", "13"]),
        ("scancel", ["--user=bob"]),
        ("scancel", ["12; id"]),
        ("scancel", ["١٢"]),
        ("srun", ["--prolog=/tmp/x", "/bin/sh", "-s"]),
        ("srun", ["--jobid=12", "/bin/sh"]),
        ("srun", ["--jobid=12", "/bin/sh", "-c", "id"]),
        ("srun", ["/bin/sh", "-s", "--prolog=/tmp/x"]),
        ("srun", ["--", "/bin/sh", "-s"]),
        ("squeue", ["--iterate=1"]),
    ],
)
def test_commands_and_options_that_are_on_no_list_are_refused(command, arguments):
    """Other programs are refused, and options by which Slurm's commands run or read something on this machine."""
    with pytest.raises(Refused):
        helper.check_arguments(command, arguments, Settings())


def test_every_command_of_the_drivers_is_taken():
    """The lists allow the commands of a request that uses every field."""
    everything = {one.name: "1" for one in fields(JobSpec) if one.name not in ("gres", "extra", "env")}
    if "signal_seconds" in everything:
        everything["signal_seconds"] = 60
    job = JobSpec(**{**everything, "gres": ["gpu:1"]})
    step = StepSpec(jobid="1", name="n", script="s", node="c1", memory="1G", cpus=1, gres=["gpu:1"])
    for argv in (
        commands.submit_command(job),
        commands.step_command(step),
        commands.step_command(StepSpec(jobid="1", name="n", script="s", exact=True)),
        commands.cancel_command("12"),
        commands.jobs_command(["12", "13"], mark="m"),
        commands.own_jobs_command(mark="m"),
        commands.queue_command(["batch"], mark="m"),
        commands.steps_command("12", mark="m"),
    ):
        helper.check_arguments(argv[0], argv[1:], Settings())


def test_an_admin_may_let_more_options_pass():
    """``sbatch_options`` applies to sbatch alone."""
    settings = helper.parse_settings({"sbatch_options": ["exclusive"]}, "x.json")
    helper.check_arguments("sbatch", ["--exclusive"], settings)
    with pytest.raises(Refused):
        helper.check_arguments("srun", ["--exclusive", "/bin/sh", "-s"], settings)


@pytest.mark.parametrize("name", ["LD_PRELOAD", "SLURM_CONF", "PATH", "HOME", "BASH_ENV", "SBATCH_WRAP", ""])
def test_variables_that_are_on_no_list_are_refused(name):
    """The requester does not choose code or configuration."""
    with pytest.raises(Refused, match="is not allowed"):
        helper.check_environment({name: "x"})


@pytest.mark.parametrize(
    "change",
    [
        {"command": ["scancel"]},
        {"arguments": "12"},
        {"environment": []},
        {"timeout": 0},
        {"timeout": 1e9},
        {"timeout": float("nan")},
        {"timeout": "30"},
        {"detached": 1},
        {"detached": True},
        {"user": "root"},
        {"timeout": None},
    ],
)
def test_a_header_that_is_not_as_it_should_be_is_refused(change):
    """Each field has its type and limits, there are no others, and only srun can be detached."""
    with pytest.raises(Refused):
        helper.parse_request(json.dumps({**GOOD, **change}).encode(), b"", Settings())
    assert helper.parse_request(json.dumps(GOOD).encode(), b"", Settings()).arguments == ("12",)


@pytest.mark.parametrize("header", [b"", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"command": "scancel"}'])
def test_malformed_requests_are_refused(header):
    """A request must be a JSON object."""
    with pytest.raises(Refused):
        helper.parse_request(header, b"", Settings())


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (LENGTH.pack(helper.MAX_HEADER + 1), "at most"),
        (LENGTH.pack(2) + b"{}" + LENGTH.pack(helper.MAX_INPUT + 1), "at most"),
        (b"\0\0", "incomplete"),
        (LENGTH.pack(10) + b"{}", "incomplete"),
    ],
)
def test_a_request_is_bounded_and_whole(sent, words):
    """Sizes are checked before anything is read, and an incomplete request is refused."""
    read_end, write_end = os.pipe()
    os.write(write_end, sent)
    os.close(write_end)
    with os.fdopen(read_end), pytest.raises(Refused, match=words):
        helper.read_request(read_end)


def test_a_request_that_does_not_come_is_given_up(monkeypatch):
    """A silent client does not keep a process."""
    monkeypatch.setattr(helper, "REQUEST_TIMEOUT", 0.1)
    read_end, write_end = os.pipe()
    with os.fdopen(read_end), os.fdopen(write_end), pytest.raises(Refused, match="did not come"):
        helper.read_request(read_end)


@pytest.mark.parametrize("found", [[], {"Path": "/bin"}, {"path": 1}, {"min_uid": 0}, {"sbatch_options": "wrap"}])
def test_wrong_settings_of_the_helper_are_refused(found):
    """With wrong settings nothing is run."""
    with pytest.raises(Refused, match=r"x\.json"):
        helper.parse_settings(found, "x.json")


# -- what it runs, asked by the runner -------------------------------------------------------------------

UNCHECKED = """\
import os, pwd, sys
sys.path.insert(0, {root!r})
from gateway_slurm.slurm.sudo import helper
helper.check_installation = lambda path: None
helper.this_user = lambda settings: pwd.getpwuid(os.getuid())
helper.load_settings = lambda path: helper.Settings(path={path!r}, slurm_conf="/etc/roots.conf")
sys.exit(helper.main())
"""

Runners = Callable[..., SudoRunner]


@pytest.fixture
def runner(tmp_path) -> Runners:
    """A runner whose helper is a copy that runs as this user, with scripts in place of Slurm's commands."""
    script = tmp_path / "unchecked.py"
    script.write_text(UNCHECKED.format(root=str(ROOT), path=f"{tmp_path}:/usr/bin:/bin"))

    places = HelperPlaces(commands=2, detached=2)

    def make(timeout: float = 30, **scripts: str) -> SudoRunner:
        for name, text in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        argv = [sys.executable, "-I", str(script)]
        return SudoRunner("ada", argv, timeout=timeout, counts=Counter(), places=places)

    return make


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until(condition: Callable[[], bool], within: float = 20) -> None:
    """Return as soon as the condition holds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        await asyncio.sleep(0.01)


def pid_in(path: Path) -> int:
    """The number in the file, 0 while there is no file."""
    return int(path.read_text() or 0) if path.exists() else 0


async def test_status_output_and_errors_come_back(runner):
    """The command reads its input and is counted with the process's own commands."""
    run = runner(sbatch="cat; echo oops >&2; exit 3").run
    result = await run(["sbatch", "--parsable"], stdin="é".encode() * 100_000)
    assert (result.exit_status, result.stdout, result.stderr) == (3, "é" * 100_000, "oops\n")
    asked = runner(scancel='kill -9 $$; echo "$@"')
    assert (await asked.run(["scancel", "12"])).exit_status == 128 + 9
    assert asked.counts == {"scancel": 1}


async def test_the_command_has_the_users_environment_and_home(runner, monkeypatch):
    """HOME, USER, LOGNAME and the directory come from the password database; the rest is root's or on the list."""
    for name in ("LD_LIBRARY_PATH", "SLURM_CONF", "HOME", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "/ours")
    extra = {"GATEWAY_SLURM_TOKEN": "0af9", "BUDGET_ACCOUNTS": "x", "LC_ALL": None}
    result = await runner(sbatch="pwd; env").run(["sbatch"], extra_env=extra)
    directory, *lines = result.stdout.splitlines()
    told = dict(line.partition("=")[::2] for line in lines)
    user = pwd.getpwuid(os.getuid())
    assert directory == user.pw_dir
    assert [told[name] for name in ("HOME", "USER", "LOGNAME")] == [user.pw_dir, user.pw_name, user.pw_name]
    assert (told["SLURM_CONF"], told["GATEWAY_SLURM_TOKEN"]) == ("/etc/roots.conf", "0af9")
    known = {"PATH", "SHELL", "HOME", "USER", "LOGNAME", "SLURM_CONF", "SLURM_TIME_FORMAT", "GATEWAY_SLURM_TOKEN"}
    assert told.keys() - known - {"PWD", "OLDPWD", "SHLVL", "_"} == set()


@pytest.mark.parametrize("ended_by", ["timeout", "cancellation"])
async def test_an_abandoned_command_is_killed(runner, tmp_path, ended_by):
    """sudo's child cannot be signalled: the helper kills the command and its children when its input ends."""
    pid_file = tmp_path / "pid"
    slow = runner(timeout=2 if ended_by == "timeout" else 60, scancel=f"sleep 1000 & echo $! >{pid_file}; wait")
    task = asyncio.ensure_future(slow.run(["scancel", "12"]))
    await until(lambda: pid_in(pid_file) > 0)
    if ended_by == "timeout":
        with pytest.raises(SlurmUnavailable, match="within 2 s"):
            await task
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await until(lambda: not alive(pid_in(pid_file)))


def test_the_helper_has_a_limit_of_its_own(runner, tmp_path):
    """The helper kills a command at its timeout even if the requester hangs."""
    asked = runner(scancel="sleep 1000")
    request = asked._request(["scancel", "12"], None, b"", 0.2)
    with subprocess.Popen(asked._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(request)
        process.stdin.flush()
        assert process.wait(timeout=30) == 128 + 9


async def test_output_without_end_is_cut_off(runner):
    """The command is killed, and nothing is known about the jobs."""
    asked = runner(squeue="exec yes")
    asked._max_output = 1 << 20
    with pytest.raises(SlurmUnavailable, match="printed more than"):
        await asked.run(["squeue", "--me"])


async def test_helpers_that_their_user_has_stopped_are_few_and_hold_no_pipes(runner, tmp_path, monkeypatch):
    """Further commands of this user wait for a place, and are refused in time; other users do not notice."""
    monkeypatch.setattr("gateway_slurm.slurm.runner._REAP_TIMEOUT", 0.2)
    pids = tmp_path / "pids"
    stopped = runner(timeout=1, squeue=f"echo $PPID >>{pids}; kill -STOP $PPID; sleep 60")
    before = len(os.listdir("/proc/self/fd"))
    results = await asyncio.gather(*(stopped.run(["squeue", "--me"]) for _ in range(5)), return_exceptions=True)
    helpers = [int(pid) for pid in pids.read_text().split()]
    try:
        messages = sorted(str(result) for result in results)
        assert [message[:35] for message in messages[:3]] == ["2 commands of the user ada are still"[:35]] * 3
        assert all("did not end within 1 s" in message for message in messages[3:])
        assert len(helpers) == 2
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # asyncio may watch each process by a descriptor
        other = SudoRunner("bob", stopped._command, timeout=30, counts=Counter(), places=stopped._places)
        runner(squeue="echo hello")
        assert (await other.run(["squeue", "--me"])).stdout == "hello\n"
    finally:
        for pid in helpers:
            os.kill(pid, signal.SIGCONT)
    await until(lambda: not any(map(alive, helpers)))
    assert (await runner().run(["squeue", "--me"])).stdout == "hello\n"


async def test_a_detached_command_outlives_its_requester(runner, tmp_path):
    """After the requester's end of the pipes is closed, srun goes on, and so does the helper until srun ends."""
    go, done = tmp_path / "go", tmp_path / "done"
    script = f"cat >{tmp_path}/script; while [ ! -e {go} ]; do sleep 0.05; done; echo late; echo x >{done}"
    step = await runner(srun=script).start(["srun", "--jobid=12", "/bin/sh", "-s"], stdin=b"echo hello")
    step._process.stdin.close()
    step._process._transport.get_pipe_transport(1).close()
    await until(lambda: (tmp_path / "script").exists() and (tmp_path / "script").read_text() == "echo hello")
    assert step._process.returncode is None
    go.touch()
    await until(done.exists)
    await until(lambda: not alive(step._process.pid))


async def test_terminate_ends_a_detached_command(runner, tmp_path):
    """``terminate`` sends it SIGTERM; its status and the end of its stderr come back."""
    ready = tmp_path / "ready"
    script = f"trap 'echo told >&2; exit 9' TERM; echo x >{ready}; while :; do sleep 0.05; done"
    step = await runner(srun=script).start(["srun", "--jobid=12", "/bin/sh", "-s"])
    await until(ready.exists)
    step.terminate()
    assert await asyncio.wait_for(step.wait(), 30) == 9
    assert step.stderr_tail().endswith("told\n")


async def test_a_refusal_has_the_words_of_sudo_or_the_helper(runner):
    """The error has sudo's or the helper's words and the remedy; it is not Slurm's answer."""
    asked = runner()
    for call in (asked.run(["sbatch", "--wrap=id"]), asked.start(["srun", "--wrap=id"])):
        with pytest.raises(
            SlurmUnavailable, match=r"as user ada: gateway_slurm's helper: .*--wrap=id.*as_user_command"
        ):
            await call
    asked._command = ["sh", "-c", "echo sudo: a password is required >&2; exit 1"]
    for call in (asked.run(["sbatch"]), asked.start(["srun"])):
        with pytest.raises(SlurmUnavailable, match=r"as user ada: sudo: a password is required\. "):
            await call
    asked._command = ["/no/such/sudo"]
    with pytest.raises(SlurmUnavailable, match="/no/such/sudo"):
        await asked.run(["sbatch"])


# -- users ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "-x", "#0", "0", "1000", "a b", "a/b", "a\n", "ä", "x" * 33, "%wheel", "no-such-one"]
)
def test_impossible_and_unknown_names_are_refused(name):
    """sudo never gets a name that it could read as something else."""
    with pytest.raises(NotAllowed, match=r"^not allowed to run kernels: "):
        check_user(name, min_uid=1000, allow_own=True)


@pytest.mark.parametrize("name", ["root", "daemon", "nobody"])
def test_system_accounts_are_refused(name):
    """With any settings root and ``nobody`` are refused, and so is every uid below the lowest one."""
    with pytest.raises(NotAllowed, match="system account"):
        check_user(name, min_uid=0 if name != "daemon" else 1000, allow_own=True)


@pytest.mark.parametrize("name", ["ann@corp.example", "1234567a", "CORP\\ann", "pc7$", "a" * 40])
def test_names_of_a_directory_are_accepted_and_another_spelling_is_refused(monkeypatch, name):
    """What getpwnam knows under this very name may run kernels; the message gives the right spelling."""
    known = pwd.struct_passwd((name, "x", 4242, 4242, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwnam", lambda _name: known)
    check_user(name, min_uid=1000, allow_own=True)
    with pytest.raises(NotAllowed, match="another spelling of the user"):
        check_user(name.swapcase(), min_uid=1000, allow_own=True)


def test_the_servers_own_account_is_a_matter_of_settings(monkeypatch):
    """By default it is refused, since it could change all users' jobs."""
    own = pwd.struct_passwd(("server", "x", 4242, 4242, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwnam", lambda _name: own)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    check_user("server", min_uid=1000, allow_own=True)
    with pytest.raises(NotAllowed, match="own account"):
        check_user("server", min_uid=1000, allow_own=False)
    with pytest.raises(NotAllowed):  # a directory that does not tell capitals apart
        check_user("Server", min_uid=1000, allow_own=True)


def test_the_process_user_has_a_name():
    """It is the name of the effective user id."""
    assert pwd.getpwnam(process_user()).pw_uid == os.geteuid()


def test_another_users_kernel_gets_none_of_our_own_variables(monkeypatch):
    """HOME and similar variables stay with the server, unless the kernel was given a value."""
    ours = {"HOME": "/srv/gateway", "USER": "gateway", "LANG": "C"}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    assert without(PERSONAL, ours) == {"LANG": "C"}
    assert without(PERSONAL, {"HOME": "/home/ada"}) == {"HOME": "/home/ada"}
