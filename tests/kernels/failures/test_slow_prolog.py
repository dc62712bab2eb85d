"""Prologs that take long: the launcher's clock begins with its script, and the error names what is known."""

from __future__ import annotations

import asyncio
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway_slurm.errors import OutOfReach, PrologTimeout
from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from helpers.failing_starts import nothing_left, script, start_error
from helpers.kernel_clients import READY, async_execute, async_kernel, poll_async
from helpers.private_slurm import poll, private_cluster, slurm

HELD = "#!/bin/sh\nwhile [ -e {hold} ]; do sleep 0.05; done\n"


class Prolog:
    """A program that Slurm runs before a job's script, and that waits while ``hold`` exists."""

    def __init__(self, directory: Path, name: str) -> None:
        self.hold = directory / f"hold-{name}"
        self.path = script(directory / name, HELD.format(hold=shlex.quote(str(self.hold))))

    @contextmanager
    def held(self) -> Iterator[None]:
        self.hold.touch()
        try:
            yield
        finally:
            self.hold.unlink(missing_ok=True)


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that slurmd and slurmctld can read."""
    with tempfile.TemporaryDirectory(prefix="gst-", dir="/tmp") as base:
        Path(base).chmod(0o755)
        yield Path(base)


def seconds_of(private: PrivateCluster, state: str) -> int:
    """For how long the one job has been in this state, by Slurm; 0 in another state."""
    fields = slurm("squeue", "--noheader", "--Format=State,TimeUsed", cluster=private).stdout.split()
    return int(fields[1].rpartition(":")[2]) if fields[:1] == [state] else 0


async def start_held(private: PrivateCluster, prolog: Prolog, state: str) -> str:
    """Start a kernel, let its prolog end after 3 s of ``state``, and return what a cell prints."""

    async def release() -> None:
        assert await poll_async(lambda: seconds_of(private, state) >= 3, timeout=READY, interval=0.2)
        prolog.hold.unlink()

    releasing = asyncio.create_task(release())
    async with async_kernel("slurm") as (_manager, client):
        await releasing
        return await async_execute(client, "print(6 * 7)")


@pytest.mark.slow
def test_a_prolog_has_its_own_clock(admin_settings, directory):
    """A start outlives a prolog longer than link_timeout; after prolog_timeout the error has the causes in order."""
    prolog = Prolog(directory, "prolog")
    with private_cluster(extra_conf=f"Prolog={prolog.path}\n", nodes=1) as private:
        settings = {"slurm_conf": str(private.slurm_conf), "link_timeout": 1, "log_directory": str(directory / "logs")}
        admin_settings(**settings)
        with prolog.held():
            assert asyncio.run(start_held(private, prolog, "RUNNING")) == "42"
        assert nothing_left(private)
        admin_settings(**settings, prolog_timeout=2)
        with prolog.held():
            error, seconds = start_error("slurm")
        assert isinstance(error, OutOfReach)
        text = str(error)
        order = ["not known whether its script has begun", prolog.path, "prolog_timeout", "response_address"]
        assert [text.find(words) for words in order] == sorted(text.find(words) for words in order)
        assert text.find(order[0]) > 0
        assert 3 <= seconds < 20
        assert nothing_left(private)
        SlurmService.instance().close()


@pytest.mark.slow
def test_slurms_word_that_a_prolog_runs_is_believed(admin_settings, directory, cluster):
    """With PrologFlags=Alloc Slurm says that it runs; PrologSlurmctld counts neither as waiting nor as running."""
    prolog, controllers = Prolog(directory, "prolog"), Prolog(directory, "controllers")
    conf = f"Prolog={prolog.path}\nPrologFlags=Alloc\nPrologSlurmctld={controllers.path}\n"
    with private_cluster(extra_conf=conf, nodes=1) as private:
        settings = {"slurm_conf": str(private.slurm_conf), "link_timeout": 1, "log_directory": str(directory / "logs")}
        admin_settings(**settings, queue_timeout=2)
        with controllers.held():
            assert asyncio.run(start_held(private, controllers, "CONFIGURING")) == "42"
        assert nothing_left(private)
        with prolog.held():
            assert asyncio.run(start_held(private, prolog, "RUNNING")) == "42"
        assert nothing_left(private)
        admin_settings(**settings, prolog_timeout=1)
        with prolog.held():
            error, _seconds = start_error("slurm")
        assert isinstance(error, PrologTimeout)
        words = ("prolog", "has not begun", "SlurmService.prolog_timeout")
        assert [word for word in words if word not in str(error)] == []
        assert poll(lambda: nothing_left(private), timeout=READY)
        SlurmService.instance().close()
