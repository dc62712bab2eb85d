"""``jupyter slurm gateway`` with ``run_as = "user"``, run by an account of its own for real Unix users."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from gateway_slurm.config import FILE_NAME
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import search_path
from helpers.gateway_process import write_project
from helpers.kernel_clients import READY, install_kernelspec, jupyter_environment
from helpers.restarting_servers import LastingServer
from helpers.unix_users import People


class Account:
    """The gateway's account: its environment, its files, and its tokens by user.

    ``settings`` are further traits of SlurmService. ``kernels`` are further kernelspecs' commands, by their names.
    """

    def __init__(
        self,
        folk: People,
        cluster: PrivateCluster,
        *,
        kernels: Mapping[str, list[str]] | None = None,
        **settings: object,
    ) -> None:
        self.folk, self.home = folk, folk.home(folk.gateway)
        self.base = base = self.home / "jupyter"
        self.environment = {
            **jupyter_environment(base),
            **cluster.environment(),
            "HOME": str(self.home),
            "PATH": search_path(),
            "PYTHONPATH": folk.path,
            "USER": folk.gateway,
        }
        ipykernel = [folk.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        for name, argv in {"slurm": ipykernel, **(kernels or {})}.items():
            install_kernelspec(base / "path", name, config_overrides={"kernel_argv": argv})
        write_project(self.home / "projects", "hers", members={"groups": [folk.ada]})
        command = ["sudo", "-n", "-u", "{user}", "--", folk.helper]
        self.settings = traits = {"run_as": "user", "as_user_command": command, **settings}
        lines = [f"c.SlurmService.{name} = {value!r}" for name, value in traits.items()]
        (base / "config" / FILE_NAME).write_text("\n".join(["c = get_config()  # noqa", *lines, ""]))
        for path in [base, *base.rglob("*"), self.home / "projects"]:
            shutil.chown(path, folk.gateway, folk.gateway)
        self.tokens_file = self.home / "tokens.json"
        self.tokens = {user: self.make_token(user) for user in folk.users}

    def as_account(self, *argv: str) -> list[str]:
        """A command of this package as the account runs it: no other group, no variable of the tests' own."""
        folk = self.folk
        plain = ["setpriv", f"--reuid={folk.gateway}", f"--regid={folk.gateway}", "--clear-groups"]
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return [
            *plain,
            "env",
            f"--chdir={self.home}",
            "-i",
            *variables,
            folk.python,
            "-m",
            "gateway_slurm.cli.app",
            *argv,
        ]

    def token_command(self, *argv: str) -> str:
        """What ``jupyter slurm token``, run by the account, says."""
        argv = tuple(self.as_account("token", *argv, f"--tokens={self.tokens_file}"))
        ran = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=READY, cwd="/")
        return ran.stdout.strip()

    def make_token(self, user: str) -> str:
        return self.token_command("add", user)

    def gateway(self, *more: str, prefix: Sequence[str] = ()) -> LastingServer:
        """The gateway, which may be restarted; ``prefix`` comes before its command."""
        options = [
            "--ip=127.0.0.1",
            "--port={port}",
            f"--tokens={self.tokens_file}",
            "--SlurmGatewayApp.port_retries=0",
        ]
        argv = self.as_account("gateway", *options, f"--kernelspecs={self.home / 'projects'}", *more)
        return LastingServer([*prefix, *argv], self.log, {}, self.tokens)

    @property
    def log(self) -> Path:
        """What the gateway has said."""
        return self.folk.base / "gateway.log"
