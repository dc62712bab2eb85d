"""``jupyter slurm gateway`` itself with ``run_as = "user"``: as an account of its own, for real Unix users.

Needs root, which makes the users; collected only then (see conftest.py). What only the service does is in
tests/kernels/test_run_as_user.py.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess

import pytest

from gateway_slurm.config import FILE_NAME
from gateway_slurm.testing.processes import search_path
from helpers.gateway_process import ask, start, stop, write_project
from helpers.kernel_clients import JOB, READY, install_kernelspec, jupyter_environment, poll_async
from helpers.private_slurm import jobs_of, slurm
from helpers.restarting_servers import LastingServer
from helpers.unix_users import people

WHOAMI = "import os, pwd; print(pwd.getpwuid(os.geteuid()).pw_name, os.environ['HOME'])"
WRITE = "import os; open(os.open({!r}, os.O_CREAT | os.O_WRONLY, 0o600), 'w').write('secret'); print('written')"
READ = "try: print(open({!r}).read())\nexcept OSError as error: print(type(error).__name__)"


class Account:
    """The gateway's account: its environment, its files, and its tokens by user."""

    def __init__(self, folk, cluster):
        self.folk, self.home = folk, folk.home(folk.gateway)
        base = self.home / "jupyter"
        self.environment = {
            **jupyter_environment(base),
            **cluster.environment(),
            "HOME": str(self.home),
            "PATH": search_path(),
            "PYTHONPATH": folk.path,
            "USER": folk.gateway,
        }
        argv = [folk.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        install_kernelspec(base / "path", "slurm", config_overrides={"kernel_argv": argv})
        write_project(self.home / "projects", "hers", members={"groups": [folk.ada]})
        command = ["sudo", "-n", "-u", "{user}", "--", folk.helper]
        lines = ["c = get_config()  # noqa", "c.SlurmService.run_as = 'user'"]
        lines.append(f"c.SlurmService.as_user_command = {command!r}")
        (base / "config" / FILE_NAME).write_text("\n".join([*lines, ""]))
        for path in [base, *base.rglob("*"), self.home / "projects"]:
            shutil.chown(path, folk.gateway, folk.gateway)
        self.tokens_file = self.home / "tokens.json"
        self.tokens = {user: self.make_token(user) for user in (folk.ada, folk.bob)}

    def as_account(self, *argv):
        """A command of this package as the account runs it: no other group, no variable of the tests' own."""
        folk = self.folk
        plain = ["setpriv", f"--reuid={folk.gateway}", f"--regid={folk.gateway}", "--clear-groups"]
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return [*plain, "env", "-i", *variables, folk.python, "-m", "gateway_slurm.cli.app", *argv]

    def make_token(self, user):
        """``jupyter slurm token add``, by the account."""
        argv = self.as_account("token", "add", user, f"--tokens={self.tokens_file}")
        made = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=READY, cwd=self.home)
        return made.stdout.strip()

    def gateway(self):
        """The gateway, which may be restarted."""
        options = [
            "--ip=127.0.0.1",
            "--port={port}",
            f"--tokens={self.tokens_file}",
            "--SlurmGatewayApp.port_retries=0",
        ]
        argv = self.as_account("gateway", *options, f"--kernelspecs={self.home / 'projects'}")
        argv[argv.index("env") : argv.index("env") + 1] = ["env", f"--chdir={self.home}"]
        return LastingServer(argv, self.folk.base / "gateway.log", {}, self.tokens)


@pytest.fixture
def folk(cluster):
    """Two users, and the gateway's account."""
    with people(cluster) as found:
        yield found


@pytest.fixture
def gateway(folk, cluster):
    """It listens."""
    server = Account(folk, cluster).gateway()
    try:
        server.until_listening()
        yield server
    finally:
        server.end()


def owners_of(cluster):
    """Whose each job is to Slurm."""
    lines = slurm("squeue", "--noheader", "--format=%i %u", cluster=cluster).stdout.splitlines()
    return dict(line.split() for line in lines)


@pytest.mark.slow
async def test_two_unix_users_share_a_gateway_that_is_killed_and_comes_back(folk, gateway, cluster):
    """Jobs and files are each one's own, also after the gateway's restart; nothing is left at the end."""
    kernels = {user: await start(gateway.of(user)) for user in (folk.ada, folk.bob)}
    jobs = {}
    for user, other in ((folk.ada, folk.bob), (folk.bob, folk.ada)):
        mine = gateway.of(user)
        jobs[user] = await ask(mine, kernels[user], JOB)
        assert await ask(mine, kernels[user], WHOAMI) == f"{user} {folk.home(user)}"
        assert await mine.status("GET", f"/api/kernels/{kernels[other]}") == 404
        assert [kernel["id"] for kernel in await mine.json("GET", "/api/kernels")] == [kernels[user]]
    assert owners_of(cluster) == {jobs[user]: user for user in kernels}
    specs = {user: await gateway.of(user).json("GET", "/api/kernelspecs") for user in kernels}
    assert {user: sorted(found["kernelspecs"]) for user, found in specs.items()} == {
        folk.ada: ["hers.python", "slurm"],
        folk.bob: ["slurm"],
    }
    folk.base.chmod(0o1777)
    path = str(folk.base / "secret")
    assert await ask(gateway.of(folk.ada), kernels[folk.ada], f"kept = 5; {WRITE.format(path)}") == "written"
    assert await ask(gateway.of(folk.ada), kernels[folk.ada], READ.format(path)) == "secret"
    assert await ask(gateway.of(folk.bob), kernels[folk.bob], READ.format(path)) == "PermissionError"

    await asyncio.to_thread(gateway.restart, signal.SIGKILL)
    for user in kernels:
        mine = gateway.of(user)

        async def is_back(mine=mine):
            return [kernel["id"] for kernel in await mine.json("GET", "/api/kernels")]

        for _ in range(200):
            if await is_back():
                break
            await asyncio.sleep(0.1)
        assert await is_back() == [kernels[user]]
        assert await ask(mine, kernels[user], JOB) == jobs[user]
    assert await ask(gateway.of(folk.ada), kernels[folk.ada], "print(kept)") == "5"
    for user in kernels:
        await stop(gateway.of(user), kernels[user])
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)
