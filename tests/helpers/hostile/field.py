"""A gateway on one processor with real Unix users, hostile ones among them, and what Bob feels meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import free_port, search_path
from helpers import HELPERS
from helpers.gateway_process import ask, start, stop
from helpers.hostile.raw import ADA_ADDRESS, Page
from helpers.kernel_clients import JOB, READY, install_kernelspec
from helpers.notebook_server import HTTPClientError, Server
from helpers.private_slurm import jobs_of, poll, slurm
from helpers.restarting_servers import LastingServer
from helpers.unix_users import People
from helpers.user_gateway import Account

MEBIBYTE = 1 << 20
# The gateway's limit of descriptors: what one stranger can use up should be few enough for a test.
DESCRIPTORS = 1024
MAX_KEPT = 100 * MEBIBYTE
LAUNCHER = HELPERS / "hostile" / "launcher.py"
PROCESSORS = sorted(os.sched_getaffinity(0))


class AttackWorksError(Exception):
    """A hostile user reached what he wanted; the message says what."""


def holds(condition: object, otherwise: str) -> None:
    """Raise AttackWorksError where the condition is false."""
    if not condition:
        raise AttackWorksError(otherwise)


@dataclass
class Felt:
    """Seconds of Bob's requests, cells and starts."""

    rest: list[float] = field(default_factory=list)
    cell: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def of(self, kind: str) -> float:
        """The 95th percentile of requests and cells, the median of starts; 0 where there is none."""
        seconds: list[float] = sorted(getattr(self, kind))
        if not seconds:
            return 0.0
        if kind == "start":
            return statistics.median(seconds)
        return seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]


class BobsWork:
    """Bob's process, which has a processor before all hostile clients have it."""

    def __init__(self, folk: People, server: Server, kernel_id: str, jobid: str) -> None:
        environment = {"PATH": search_path(), "PYTHONPATH": str(HELPERS.parent), "BOB_TOKEN": server.token}
        self._log = (folk.base / "bob.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.hostile.bob", server.url, kernel_id, jobid],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )

    def felt(self) -> Felt:
        """What he has felt since the last call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, Path(self._log.name).read_text()
        return Felt(**json.loads(line))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            pipe.close()


class Field:
    """The gateway, its users' servers, and the measuring."""

    def __init__(self, folk: People, cluster: PrivateCluster, account: Account, gateway: LastingServer, full: bool):
        self.folk, self.cluster, self.account, self.gateway, self.full = folk, cluster, account, gateway, full
        self.bobs_kernel = self.bobs_job = ""
        self.idle = Felt()
        self.small_memory = 0
        self.response_port = int(account.settings["response_port"])
        self.wants_restart = False
        self._jobs: dict[str, str] = {}
        self._holders: dict[str, str] = {}
        self._bob: BobsWork | None = None

    def many(self, few: int, many: int) -> int:
        """How many: few in a test, many for the table."""
        return many if self.full else few

    # -- users ----------------------------------------------------------------------------

    def of(self, user: str) -> Server:
        return self.gateway.of(user)

    @property
    def ada(self) -> Server:
        """The hostile user's."""
        return self.of(self.folk.ada)

    @property
    def bob(self) -> Server:
        """The other user's."""
        return self.of(self.folk.bob)

    async def begin(self) -> None:
        """Start Bob's kernel, and measure him alone."""
        self.small_memory = self.memory()
        self.bobs_kernel = await start(self.bob)
        self.bobs_job = await ask(self.bob, self.bobs_kernel, JOB)
        self._bob = BobsWork(self.folk, self.bob, self.bobs_kernel, self.bobs_job)
        await self.job_of(self.folk.ada)
        await self.felt()
        await asyncio.sleep(10 if self.full else 5)  # what is measured is time itself
        self.idle = await self.felt()
        assert self.idle.rest, self.idle
        assert self.idle.cell, self.idle
        assert self.idle.start, self.idle

    async def felt(self) -> Felt:
        """What Bob has felt since the last call."""
        assert self._bob is not None
        return await asyncio.to_thread(self._bob.felt)

    async def job_of(self, user: str) -> str:
        """A running job of this user's."""
        if user not in self._jobs:
            kernel_id = self._holders[user] = await start(self.of(user), "hostile")
            self._jobs[user] = await ask(self.of(user), kernel_id, JOB)
        return self._jobs[user]

    @asynccontextmanager
    async def kernel(self, user: str = "", name: str = "hostile", **env: str) -> AsyncIterator[str]:
        """A kernel of a user's (Ada's) in a running job."""
        user = user or self.folk.ada
        server, jobid = self.of(user), await self.job_of(user)
        kernel_id = await start(server, name, env={"KERNEL_SLURM_JOBID": jobid, **env})
        try:
            yield kernel_id
        finally:
            with contextlib.suppress(HTTPClientError):
                await stop(server, kernel_id)

    @asynccontextmanager
    async def waiting_kernel(self) -> AsyncIterator[str]:
        """A kernel of Ada's whose job waits, because its partition is down."""
        slurm("scontrol", "update", "PartitionName=devel", "State=DOWN", cluster=self.cluster)
        try:
            kernel_id = await start(self.ada, "waits")
            try:
                yield kernel_id
            finally:
                await stop(self.ada, kernel_id)
        finally:
            slurm("scontrol", "update", "PartitionName=devel", "State=UP", cluster=self.cluster)

    async def clear(self) -> None:
        """End the hostile users' kernels and jobs, except for one job of Ada's."""
        (self.folk.home(self.folk.ada) / "orders.json").unlink(missing_ok=True)
        for user in (self.folk.ada, *self.folk.others):
            server = self.of(user)
            kernels = [one["id"] for one in await server.json("GET", "/api/kernels")]
            keep = self._holders.get(user, "") if user == self.folk.ada else ""
            keep = keep if keep in kernels and await self._answers(server, keep) else ""
            await stop(server, *[one for one in kernels if one != keep])
            if not keep:
                self._jobs.pop(user, None)
        await self.job_of(self.folk.ada)
        if self.wants_restart or self.memory() > self.small_memory + MAX_KEPT:
            self.wants_restart = False
            # What an attack has left would hide what the next one takes.
            await self.restart(signal.SIGTERM)
        await asyncio.to_thread(_until_jobs, self.cluster, {self._jobs[self.folk.ada], self.bobs_job})

    @staticmethod
    async def _answers(server: Server, kernel_id: str) -> bool:
        """Whether the kernel runs a cell: its user may have ruined its launcher."""
        try:
            return await asyncio.wait_for(ask(server, kernel_id, "print(1)"), 10) == "1"
        except (asyncio.TimeoutError, AssertionError, HTTPClientError, OSError):
            return False

    async def page(self, kernel_id: str, user: str = "", **options: Any) -> Page:
        """A websocket of a user's (Ada's)."""
        return await Page.open(self.of(user or self.folk.ada), kernel_id, source=ADA_ADDRESS, **options)

    def order(self, do: str, seconds: float, user: str = "") -> None:
        """What the user's (Ada's) launchers do now."""
        name = user or self.folk.ada
        path = self.folk.home(name) / "orders.json"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps({"do": do, "seconds": seconds}))
        shutil.chown(draft, name, name)
        draft.replace(path)

    # -- the gateway's process ------------------------------------------------------------

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.gateway.process.pid)

    def descriptors(self) -> int:
        return self.process.num_fds()

    def memory(self) -> int:
        """Bytes that are resident now."""
        return int(self.process.memory_info().rss)

    def forget_peak(self) -> None:
        """The peak of memory is counted from now on (proc(5), clear_refs)."""
        Path(f"/proc/{self.gateway.process.pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes that were resident at most."""
        for line in Path(f"/proc/{self.gateway.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")

    def helpers(self) -> list[psutil.Process]:
        """Processes of sudo and the helper that the gateway has started."""
        return [one for one in self.process.children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]

    def run(self, user: str, code: str) -> subprocess.Popen[bytes]:
        """A Python of this user's with this program; the caller ends it."""
        argv = [self.folk.python, "-c", code]
        return subprocess.Popen(argv, user=user, group=user, extra_groups=[], cwd="/", start_new_session=True)

    def database(self) -> Path:
        """The file of the gateway's store."""
        return next(path for path in self.account.home.rglob("*.sqlite*") if path.suffix in (".sqlite", ".sqlite3"))

    async def until_linked(self, server: Server) -> None:
        """Wait until this user's kernels answer."""
        for one in await server.json("GET", "/api/kernels"):
            if one["execution_state"] in ("idle", "busy"):
                await asyncio.wait_for(ask(server, one["id"], "print(1)"), READY)
                return

    def logged(self, since: int = 0) -> str:
        """What the gateway's log has, from a place on."""
        with self.account.log.open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace")

    def log_size(self) -> int:
        return self.account.log.stat().st_size

    async def restart(self, signum: int) -> None:
        """End the gateway by a signal, and start the next one; returns when Bob's kernel is back."""
        await asyncio.to_thread(self.gateway.restart, signum)
        await self.until_back(self.bob, self.bobs_kernel)

    async def until_back(self, server: Server, kernel_id: str, timeout: float = READY) -> None:
        """Wait until this user has the kernel again."""
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(HTTPClientError, OSError):
                if kernel_id in [one["id"] for one in await server.json("GET", "/api/kernels")]:
                    return
            assert time.monotonic() < deadline, "the kernel did not come back"
            await asyncio.sleep(0.1)

    def close(self) -> None:
        if self._bob is not None:
            self._bob.close()


@contextmanager
def running_field(folk: People, cluster: PrivateCluster, *, full: bool) -> Iterator[Field]:
    """Start the gateway; its users' kernels and jobs are ended at the end."""
    node_python = folk.base / "node-python"
    node_python.write_text(f'#!/bin/sh\nexec {folk.python} -I {_carried(folk, LAUNCHER)} "$@"\n')
    node_python.chmod(0o755)
    with_path = ["env", f"PYTHONPATH={folk.path}", "nice", folk.python, "-m"]
    kernels = {
        "stub": [*with_path[:2], folk.python, "-m", "helpers.stub_kernel", "-f", "{connection_file}"],
        "hostile": [*with_path, "helpers.hostile.kernel", "-f", "{connection_file}"],
        "broken": ["false"],
    }
    account = Account(
        folk, cluster, kernels=kernels, launcher_python=[str(node_python)], response_port=str(free_port())
    )
    _install_waiting(account, {"partition": "devel", "kernel_argv": kernels["stub"]})
    prefix = ["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}"]
    if len(PROCESSORS) > 1:
        prefix = ["taskset", "--cpu-list", str(PROCESSORS[0]), *prefix]
    gateway = account.gateway(prefix=prefix)
    made = Field(folk, cluster, account, gateway, full)
    try:
        gateway.until_listening()
        yield made
    finally:
        made.close()
        asyncio.run(_end_all(made))
        gateway.end()


def _install_waiting(account: Account, fields: dict[str, object]) -> None:
    """A kernelspec whose jobs wait while the partition ``devel`` is down."""
    path = install_kernelspec(account.base / "path", "waits", config_overrides=fields)
    for one in (path, path.parent):
        shutil.chown(one, account.folk.gateway, account.folk.gateway)


def _carried(folk: People, path: Path) -> Path:
    """Where every user can read it."""
    target = folk.base / path.name
    shutil.copy(path, target)
    target.chmod(0o644)
    return target


def _until_jobs(cluster: PrivateCluster, jobs: set[str]) -> None:
    """Wait until there are no other jobs than these; cancel what stays."""

    def others() -> list[str]:
        return [line.split()[0] for line in jobs_of(cluster) if line.split()[0] not in jobs]

    if not poll(lambda: others() == [], timeout=8, interval=0.2):
        slurm("scancel", *others(), cluster=cluster, check=False)
        poll(lambda: others() == [], timeout=20, interval=0.2)


async def _end_all(field: Field) -> None:
    for user in field.folk.users:
        server = field.of(user)
        with contextlib.suppress(HTTPClientError, OSError):
            await stop(server, *[one["id"] for one in await server.json("GET", "/api/kernels")])
    await asyncio.to_thread(_cancel_all, field)


def _cancel_all(field: Field) -> None:
    users = ",".join(field.folk.users)
    slurm("scancel", f"--user={users}", cluster=field.cluster, check=False)

    def gone() -> bool:
        return not slurm("squeue", "--noheader", f"--user={users}", cluster=field.cluster).stdout.strip()

    poll(gone, timeout=30)
