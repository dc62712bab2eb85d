"""Unix users for tests that need several: two who have kernels, and one whose account plays the gateway."""

from __future__ import annotations

import json
import os
import pwd
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gateway_slurm.config import FILE_NAME
from gateway_slurm.slurm.sudo import HELPER
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import find_program, search_path
from helpers.kernel_clients import install_kernelspec, jupyter_environment
from helpers.private_slurm import poll

ROOT = Path(__file__).parents[2]
SNIPPET = ROOT / "etc" / "sudoers.d" / "gateway_slurm"
IN_SNIPPET = {
    "gateway": "jupyter-gateway",
    "group": "jupyter-users",
    "helper": "/usr/local/libexec/gateway_slurm/as-user",
}


@dataclass(frozen=True)
class People:
    """The users, their group, and what is installed for them."""

    gateway: str
    ada: str
    bob: str
    base: Path
    helper: str
    python: str
    """A Python with all of the tests' packages that every user can run."""
    path: str
    """PYTHONPATH for it."""
    others: tuple[str, ...] = ()
    """More users of the same kind as Ada."""

    @property
    def users(self) -> tuple[str, ...]:
        """All who have kernels."""
        return self.ada, self.bob, *self.others

    def run(self, user: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Run a command as one of them, as ``su`` would; its input is empty."""
        options = {"input": b"", "capture_output": True, "timeout": 60, "cwd": "/", **options}
        environment = {"PATH": search_path(), "HOME": pwd.getpwnam(user).pw_dir, "USER": user, "LC_ALL": "C.UTF-8"}
        return subprocess.run(argv, user=user, group=user, extra_groups=[], env=environment, **options)

    def home(self, user: str) -> Path:
        return Path(pwd.getpwnam(user).pw_dir)


def _root(*argv: str) -> None:
    program = find_program(argv[0]) or argv[0]
    subprocess.run([program, *argv[1:]], check=True, capture_output=True, timeout=60)


def change_users(*argv: str) -> None:
    """Run useradd(8) or one of its kind; another that runs has the lock on /etc/passwd for a moment."""
    said: list[str] = []

    def done() -> bool:
        program = find_program(argv[0]) or argv[0]
        ran = subprocess.run([program, *argv[1:]], capture_output=True, text=True, timeout=60)
        said[:] = [ran.stderr]
        return ran.returncode == 0 or "lock" not in ran.stderr

    assert poll(done, timeout=30, interval=0.5), said
    assert "cannot" not in said[0], said


@contextmanager
def people(cluster: PrivateCluster, others: int = 0) -> Iterator[People]:
    """Make the users, the helper's installation and its sudoers rule; take all of it away. Needs root."""
    mark = f"gwst{secrets.token_hex(3)}"
    # A directory's names: a mail address of 32 characters (all that useradd(8) makes), and a domain and a number.
    ada, bob = f"{mark}.ada@corp.example".ljust(32, "x"), f"{mark.upper()}\\1bob$"
    group, names = f"{mark}-users", {"gateway": f"{mark}-gateway", "ada": ada, "bob": bob}
    more = {f"other{number}": f"{mark}-other{number}" for number in range(others)}
    base = Path(tempfile.mkdtemp(prefix=f"{mark}-", dir="/tmp"))
    base.chmod(0o755)
    # Not in /tmp, which all can write: the helper looks at every directory above it.
    installed = Path(tempfile.mkdtemp(prefix=f"{mark}-", dir="/opt"))
    installed.chmod(0o755)
    rule = Path("/etc/sudoers.d") / mark
    try:
        change_users("groupadd", group)
        for role, name in (names | more).items():
            home = base / role
            groups = [] if role == "gateway" else ["--groups", group]
            change_users(
                "useradd", "--badname", "--no-create-home", "--home-dir", str(home), "--shell", "/bin/sh", *groups, name
            )
            home.mkdir(mode=0o700)
            shutil.chown(home, name, name)
        helper = _install_helper(installed, cluster)
        python, path = _python_for_all(installed, names["ada"])
        _write_rule(rule, gateway=names["gateway"], group=group, helper=helper)
        yield People(**names, base=base, helper=helper, python=python, path=path, others=tuple(more.values()))
    finally:
        rule.unlink(missing_ok=True)
        left = [process for name in (names | more).values() for process in _processes_of(name)]
        what = [" ".join(process.cmdline()) for process in left if process.is_running()]
        for process in left:
            process.kill()
        for name in (names | more).values():
            poll(lambda: not _processes_of(name), timeout=10)  # noqa: B023 - it is called at once
            change_users("userdel", name)
        change_users("groupdel", group)
        shutil.rmtree(installed, ignore_errors=True)
        shutil.rmtree(base, ignore_errors=True)
    assert left == [], what


def _processes_of(name: str) -> list[psutil.Process]:
    """What runs as this user, zombies left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.username() == name and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def _install_helper(directory: Path, cluster: PrivateCluster) -> str:
    """Install the helper as docs/admins/security.md says, with settings that name the private Slurm."""
    helper = directory / "as-user"
    text = Path(HELPER).read_text()
    if not os.access("/usr/bin/python3", os.X_OK):
        text = text.replace("#!/usr/bin/python3", f"#!{os.path.realpath(sys.executable)}", 1)
    helper.write_text(text)
    helper.chmod(0o755)
    commands = Path(find_program("sbatch") or "/usr/bin/sbatch").parent
    settings = {"path": f"{commands}:/usr/bin:/bin", "slurm_conf": str(cluster.slurm_conf)}
    (directory / "as-user.json").write_text(json.dumps(settings))
    return str(helper)


def _python_for_all(directory: Path, user: str) -> tuple[str, str]:
    """The tests' own Python where all users can run it, as they can not under root's home; else a copy."""
    argv = [sys.executable, "-c", "import gateway_slurm.link.program as p, ipykernel; p.launcher_program()"]
    tried = subprocess.run(argv, user=user, group=user, extra_groups=[], env={}, cwd="/", capture_output=True)
    if tried.returncode == 0:
        return sys.executable, str(ROOT / "tests")
    shutil.copytree(sys.prefix, directory / "venv", symlinks=True)
    for name in ("gateway_slurm", "launchers", "tests"):
        shutil.copytree(ROOT / name, directory / name)
    return str(directory / "venv" / "bin" / "python"), f"{directory}:{directory / 'tests'}"


def sudoers_rule(**instead: str) -> str:
    """The snippet with other names: ``gateway``, ``group`` and ``helper``."""
    text = SNIPPET.read_text()
    for what, name in IN_SNIPPET.items():
        assert name in text
        text = text.replace(name, instead.get(what, name))
    # An alias of a rule that is installed here already must not clash with ours.
    alias = "T" + re.sub(r"[^A-Z0-9]", "", instead.get("group", "").upper())
    return text.replace("GATEWAY_SLURM_HELPER", alias)


def _write_rule(path: Path, **names: str) -> None:
    # Readable by root alone before it has content, and complete when it gets its name.
    draft = path.with_name(f"{path.name}.draft")  # sudo leaves out names with a dot
    draft.touch(mode=0o440)
    draft.write_text(sudoers_rule(**names))
    draft.replace(path)


ODD = """
import runpy
from helpers.odd_server import be_odd
be_odd(with_sudo=True)
runpy.run_module("helpers.gateway_account", run_name="__main__")
"""


class GatewayProcess:
    """A process of the gateway's account with a service; ``close`` ends it.

    An ``odd`` one has process settings that no kernel must have (``odd_server``).
    """

    def __init__(
        self,
        people: People,
        cluster: PrivateCluster,
        /,
        odd: bool = False,
        **settings: object,
    ) -> None:
        base = people.home(people.gateway) / "jupyter"
        environment = {**jupyter_environment(base), "HOME": str(people.home(people.gateway))}
        install_kernelspec(base / "path", "slurm", config_overrides={"kernel_argv": self.kernel_argv(people)})
        command = ["sudo", "-n", "-u", "{user}", "--", people.helper]
        settings = {"run_as": "user", "as_user_command": command, **settings}
        lines = [f"c.SlurmService.{name} = {value!r}" for name, value in settings.items()]
        (base / "config" / FILE_NAME).write_text("\n".join(["c = get_config()  # noqa", *lines, ""]))
        _root("chown", "-R", f"{people.gateway}:{people.gateway}", str(base))
        self._asked = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._log = (people.base / "gateway.log").open("wb")
        self._process = subprocess.Popen(
            [people.python, *(["-c", ODD] if odd else ["-m", "helpers.gateway_account"])],
            user=people.gateway,
            group=people.gateway,
            extra_groups=[],
            cwd="/",
            env={
                **environment,
                **cluster.environment(),
                "PATH": search_path(),
                "PYTHONPATH": people.path,
                "USER": people.gateway,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    @staticmethod
    def kernel_argv(people: People) -> list[str]:
        """The command of an ipykernel that all users can run."""
        return [people.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, do: str, **what: Any) -> int:
        """Ask without waiting for the answer; return the number by which to wait for it."""
        assert self._process.stdin is not None
        self._asked += 1
        self._process.stdin.write(json.dumps({"do": do, "number": self._asked, **what}).encode() + b"\n")
        self._process.stdin.flush()
        return self._asked

    def answer(self, number: int) -> Any:
        """Wait for the answer; raises GatewayError with the error's class and message."""
        assert self._process.stdout is not None
        while number not in self._answers:
            line = self._process.stdout.readline()
            if not line:
                raise AssertionError(f"the gateway ended: {Path(self._log.name).read_text()[-2000:]}")
            told = json.loads(line)
            self._answers[told["number"]] = told
        told = self._answers.pop(number)
        if "error" in told:
            raise GatewayError(f"{told['error']}: {told['message']}")
        return told["answer"]

    def ask(self, do: str, **what: Any) -> Any:
        """Ask, and wait for the answer."""
        return self.answer(self.tell(do, **what))

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait(timeout=30)

    def close(self) -> None:
        """Let it end in good order."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        finally:
            self._process.kill()
            self._process.wait(timeout=30)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._log.close()


class GatewayError(Exception):
    """What the gateway's process raised."""
