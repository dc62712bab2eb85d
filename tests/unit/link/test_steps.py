"""Steps that a launcher starts on the server's word: both ends, over messages as they go on the link.

srun and squeue are programs of the test's here; tests/kernels/test_rest.py has the real ones.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from gateway_slurm.allocations.launcher import LauncherSteps, step_fields
from gateway_slurm.errors import AllocationError, LauncherFailed, SlurmUnavailable
from gateway_slurm.link import steps, wire
from gateway_slurm.slurm import commands
from gateway_slurm.slurm.model import StepInfo, StepSpec
from launchers.steps import Steps

TOKEN = "ab" * 32
SPEC = StepSpec(
    jobid="12",
    name="gateway_slurm-launcher",
    script="true\n",
    node="c2",
    memory="2G",
    exact=True,
    cpus=2,
    gres=["gpu:1", "shard:2"],
    env={"GATEWAY_SLURM_TOKEN": TOKEN},
)


class Ends:
    """A server's end and a launcher's, with a link between them that may be cut."""

    def __init__(self, programs: Path) -> None:
        self.linked = True
        self.timers: list[Callable[[], None]] = []
        reactor: Any = SimpleNamespace(later=lambda _seconds, callback: self.timers.append(callback))
        self.inside = LauncherSteps(self.down)
        self.launcher = Steps(reactor, "12", self.up)
        self.launcher._env["PATH"] = f"{programs}:/usr/bin:/bin"

    def down(self, name: str, **fields: Any) -> bool:
        """What the server says."""
        if self.linked:
            name, payload = wire.decode(wire.encode(name, **fields), wire.DOWN)
            launcher = self.launcher
            actions = {
                "STEP": launcher.start,
                "STEP_END": launcher.end,
                "STEP_ACK": launcher.acknowledged,
                "LIST_STEPS": launcher.list_steps,
            }
            actions[name](payload)
        return self.linked

    def up(self, name: str, **fields: Any) -> None:
        """What the launcher says; lost where there is no link, as on the real one."""
        if self.linked:
            self.inside.message(*wire.decode(wire.encode(name, **fields), wire.UP))

    def link_again(self) -> None:
        """A new link, and its REPORT."""
        self.linked = True
        self.inside.linked()
        self.inside.reported(self.launcher.report())

    async def until(self, awaitable: Any) -> Any:
        """Wait for it while the launcher collects its children."""
        task = asyncio.ensure_future(awaitable)
        deadline = asyncio.get_running_loop().time() + 20
        while not task.done():
            assert asyncio.get_running_loop().time() < deadline
            self.launcher.reaped()
            await asyncio.sleep(0.01)
        return await task

    async def collected(self) -> None:
        """Wait until the launcher has seen all its children's ends."""
        while self.launcher.pids():
            self.launcher.reaped()
            await asyncio.sleep(0.01)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory for the programs that stand for Slurm's."""
    directory = tmp_path / "bin"
    directory.mkdir()
    return directory


@pytest.fixture
def ends(programs: Path) -> Ends:
    """Both ends, with nothing under way."""
    return Ends(programs)


def install(programs: Path, name: str, text: str) -> None:
    """A shell script in place of one of Slurm's commands."""
    (programs / name).write_text(f"#!/bin/sh\n{text}\n")
    (programs / name).chmod(0o755)


# -- what may be asked for ----------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_the_step_is_the_one_that_srun_from_outside_makes(exact: bool) -> None:
    """From inside as from outside: the same options with the same values."""
    spec = StepSpec(**{**vars(SPEC), "exact": exact, "gres": () if exact else SPEC.gres})
    argv = steps.srun_argv("12", steps.checked(step_fields("s1", spec)))
    assert sorted(argv) == sorted(commands.step_command(spec))
    assert argv[0] == "srun"
    assert argv[-2:] == ["/bin/sh", "-s"]


@pytest.mark.parametrize(
    "changed",
    [
        {"options": {"prolog": "/x"}},
        {"options": {"nodelist": "--wrap=x"}},
        {"options": {"nodelist": "c1 c2"}},
        {"options": {"gres": "gpu:1 --x"}},
        {"options": {"mem": "lots"}},
        {"options": {"cpus-per-task": 2}},
        {"options": []},
        {"env": {"LD_PRELOAD": "/x.so"}},
        {"env": {"GATEWAY_SLURM_TOKEN": "x y"}},
        {"env": None},
        {"script": "a\0b"},
        {"script": "x" * (steps.SCRIPT_LIMIT + 1)},
        {"script": None},
        {"exact": "yes"},
        {"step": "../x"},
        {"step": None},
    ],
)
def test_what_is_on_no_list_is_refused_by_the_launcher(ends: Ends, changed: dict[str, Any]) -> None:
    """An option, a variable, a value that is not as it may be: nothing runs, and the server hears why."""
    said: list[dict[str, Any]] = []
    ends.launcher._send = lambda _name, **fields: said.append(fields)
    ends.launcher.start({**step_fields("s1", SPEC), **changed})
    assert said[0]["status"] == 2
    assert said[0]["stderr"].startswith("refused: ")
    assert ends.launcher.pids() == set()


async def test_what_is_on_no_list_is_not_sent(ends: Ends) -> None:
    """The server looks first."""
    with pytest.raises(AllocationError, match="this srun option is not permitted"):
        await ends.inside.start(StepSpec(jobid="12", name="n", script="", node="c1;x"))
    with pytest.raises(AllocationError, match="this variable is not permitted"):
        await ends.inside.start(StepSpec(jobid="12", name="n", script="", env={"PATH": "/x"}))


@given(some.dictionaries(some.sampled_from(["step", "exact", "options", "env", "script"]), some.none() | some.text()))
def test_any_message_is_a_step_or_refused(fields: dict[str, Any]) -> None:
    """Whatever comes: what may be, or WireError."""
    with pytest.raises(wire.WireError):
        steps.checked(fields)


def test_steps_as_squeue_lists_them() -> None:
    """Ids compared whole; names hold spaces."""
    listed = " 12.0 ann c1 a name\n12.batch ann c1 batch\n123.0 ann c1 x\n12.1 ann c2\nwords\n\n"
    assert steps.parse_steps("12", listed) == [
        ("12.0", "ann", "c1", "a name"),
        ("12.batch", "ann", "c1", "batch"),
        ("12.1", "ann", "c2", ""),
    ]
    with pytest.raises(wire.WireError):
        steps.squeue_argv("12 -x")


# -- a step's life ------------------------------------------------------------------------------


async def test_a_step_runs_and_ends(ends: Ends, programs: Path, tmp_path: Path, monkeypatch) -> None:
    """Its script comes by standard input, its token by the environment, and nothing of the launcher's own step."""
    monkeypatch.setenv("SLURM_NTASKS", "7")
    install(programs, "srun", f'cat >{tmp_path}/script; env >{tmp_path}/env; echo "$@" >{tmp_path}/argv')
    step = await ends.inside.start(SPEC)
    await ends.until(step.wait())
    assert (tmp_path / "script").read_text() == "true\n"
    assert (tmp_path / "argv").read_text().startswith("--exact --immediate=1 --jobid=12 --nodes=1")
    env = (tmp_path / "env").read_text().splitlines()
    assert f"GATEWAY_SLURM_TOKEN={TOKEN}" in env
    assert not [line for line in env if line.startswith("SLURM_NTASKS")]
    assert ends.launcher.report() == []


async def test_how_a_step_failed_is_told_in_sruns_words(ends: Ends, programs: Path) -> None:
    """As with an srun from outside: the same words make the same error."""
    install(programs, "srun", "echo 'srun: error: Requested nodes are busy' >&2; exit 1")
    step = await ends.inside.start(SPEC)
    with pytest.raises(AllocationError, match="Requested nodes are busy"):
        await ends.until(step.wait())
    install(programs, "srun", "echo 'srun: error: c2: task 0: Exited with exit code 127' >&2; exit 127")
    step = await ends.inside.start(SPEC)
    with pytest.raises(LauncherFailed, match="exit code 127"):
        await ends.until(step.wait())


async def test_a_node_without_srun(ends: Ends) -> None:
    """It is reported, and is no reason to wait."""
    ends.launcher._env["PATH"] = "/nonexistent"
    step = await ends.inside.start(SPEC)
    with pytest.raises(AllocationError, match="srun is not in /nonexistent"):
        await ends.until(step.wait())


async def test_a_step_is_ended(ends: Ends, programs: Path) -> None:
    """srun gets SIGTERM, on which it ends the step."""
    install(programs, "srun", "exec sleep 600")
    step = await ends.inside.start(SPEC)
    step.kill()
    with pytest.raises(AllocationError):
        await ends.until(step.wait())


async def test_an_end_without_a_link_is_told_with_the_next(ends: Ends, programs: Path) -> None:
    """Nothing is lost while the link is down, and nothing is kept once it was reported."""
    install(programs, "srun", "exec sleep 600")
    step = await ends.inside.start(SPEC)
    ends.linked = False
    (pid,) = ends.launcher.pids()
    os.kill(pid, signal.SIGTERM)
    await ends.collected()
    assert not step.over.done()
    ends.link_again()
    with pytest.raises(AllocationError):
        await ends.until(step.wait())
    assert ends.launcher.report() == []


async def test_a_step_that_lives_is_waited_for_over_a_new_link(ends: Ends, programs: Path) -> None:
    """A link that breaks says nothing about steps."""
    install(programs, "srun", "exec sleep 600")
    step = await ends.inside.start(SPEC)
    ends.linked = False
    ends.link_again()
    assert not step.over.done()
    step.kill()
    with pytest.raises(AllocationError):
        await ends.until(step.wait())


async def test_a_step_that_was_lost_on_the_way_is_over(ends: Ends) -> None:
    """What a new link's REPORT does not know was never started; one that is asked for meanwhile is not meant."""
    ends.launcher.start = lambda _fields: None  # type: ignore[method-assign]
    lost = await ends.inside.start(SPEC)
    ends.inside.linked()
    asked_for_meanwhile = await ends.inside.start(SPEC)
    ends.inside.reported([])
    with pytest.raises(AllocationError, match="knows nothing of it"):
        await ends.until(lost.wait())
    assert not asked_for_meanwhile.over.done()


async def test_without_a_link_no_step_is_started(ends: Ends) -> None:
    """It could not be said, and would be waited for in vain."""
    ends.linked = False
    with pytest.raises(AllocationError, match="the link to its launcher is down"):
        await ends.inside.start(SPEC)
    with pytest.raises(SlurmUnavailable, match="the link to its launcher is down"):
        await ends.inside.list_steps("12")


async def test_a_launcher_that_is_gone_takes_its_steps_with_it(ends: Ends, programs: Path) -> None:
    """A caller that waits gets the error."""
    install(programs, "srun", "exec sleep 600")
    step = await ends.inside.start(SPEC)
    ends.inside.gone()
    with pytest.raises(AllocationError, match="is gone"):
        await ends.until(step.wait())
    step.kill()
    await ends.collected()


async def test_steps_are_bounded(ends: Ends, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher has only so many under way."""
    monkeypatch.setattr(steps, "MAX_STEPS", 1)
    install(programs, "srun", "exec sleep 600")
    first = await ends.inside.start(SPEC)
    second = await ends.inside.start(SPEC)
    with pytest.raises(AllocationError, match="starts no more"):
        await ends.until(second.wait())
    first.kill()
    await ends.collected()


# -- lists --------------------------------------------------------------------------------------


async def test_steps_are_listed(ends: Ends, programs: Path) -> None:
    """By squeue on the node, asked about this job only."""
    install(programs, "squeue", 'echo "$@" | grep -q -- --jobs=12 && echo "12.3 ann c1 sleep"')
    assert await ends.until(ends.inside.list_steps("12")) == [
        StepInfo(stepid="12.3", user="ann", nodes="c1", name="sleep")
    ]


async def test_a_squeue_that_fails_says_nothing(ends: Ends, programs: Path) -> None:
    """In Slurm's words; and one that hangs is ended."""
    install(programs, "squeue", "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SlurmUnavailable, match="Unable to contact slurm controller"):
        await ends.until(ends.inside.list_steps("12"))
    install(programs, "squeue", "exec sleep 600")
    listing = asyncio.ensure_future(ends.inside.list_steps("12"))
    await asyncio.sleep(0)
    ends.timers[-1]()
    with pytest.raises(SlurmUnavailable, match="could not list its steps"):
        await ends.until(listing)
