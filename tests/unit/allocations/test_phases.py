"""The phases of an allocation: the table of transitions, and that only the allocation itself sets its fields."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from gateway_slurm.allocations.model import PHASE_TEXTS, TRANSITIONS, Allocation, AllocationPhase, Place
from gateway_slurm.errors import AllocationEnded
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.store import AllocationRecord

PACKAGE = Path(__file__).parents[3] / "gateway_slurm"
OVER = AllocationEnded("job 12 ended: TIMEOUT", jobid="12", state="TIMEOUT")
# Each phase that a transition leads to, and the method that makes the transition.
METHODS = {
    AllocationPhase.ACTIVE: lambda allocation: allocation.accept("13"),
    AllocationPhase.UNCONFIRMED: lambda allocation: allocation.lose_answer(),
    AllocationPhase.RELEASED: lambda allocation: allocation.release(),
    AllocationPhase.DETACHED: lambda allocation: allocation.detach(),
    AllocationPhase.ENDED: lambda allocation: allocation.end(OVER),
}


def allocation_in(phase: AllocationPhase) -> Allocation:
    """A kept allocation in this phase."""
    allocation = Allocation(ours=True, request=KernelRequest(), identity="gs-1", used=True)
    if phase in (AllocationPhase.RELEASED, AllocationPhase.DETACHED, AllocationPhase.ENDED):
        allocation.accept("12")
    if phase is not AllocationPhase.NEW:
        METHODS[phase](allocation)
    allocation.set_keep(True)
    return allocation


def state_of(allocation: Allocation) -> dict[str, object]:
    """All of its fields, and whether its end is known."""
    state = {field.name: getattr(allocation, field.name) for field in fields(allocation)}
    return {**state, "ended": allocation.ended.done()}


# In one order: each process of a run collects the same tests.
LEGAL = [
    (phase, following)
    for phase, allowed in TRANSITIONS.items()
    for following in AllocationPhase
    if following in allowed
]
ILLEGAL = [(phase, target) for phase in TRANSITIONS for target in METHODS if target not in TRANSITIONS[phase]]


@pytest.mark.parametrize(("phase", "following"), LEGAL, ids=lambda phase: phase.value)
async def test_a_transition_of_the_table_is_made(phase, following):
    """The method enters the phase that it is named for."""
    allocation = allocation_in(phase)
    METHODS[following](allocation)
    assert allocation.phase is following
    assert allocation.ended.done() == (following is AllocationPhase.ENDED)


@pytest.mark.parametrize(("phase", "target"), ILLEGAL, ids=lambda phase: phase.value)
async def test_any_other_transition_raises_and_changes_nothing(phase, target):
    """Whichever field the method would have set."""
    allocation = allocation_in(phase)
    before = state_of(allocation)
    with pytest.raises(AssertionError, match=f"{phase.value} cannot become {target.value}"):
        METHODS[target](allocation)
    assert state_of(allocation) == before


def test_every_phase_is_in_the_tables():
    """One row a phase, with its meaning."""
    assert set(TRANSITIONS) == set(PHASE_TEXTS) == set(AllocationPhase)


@pytest.mark.parametrize("phase", AllocationPhase, ids=lambda phase: phase.value)
async def test_an_allocation_is_over_once_this_server_has_no_part_in_it(phase):
    """While its sbatch has no answer it is not: its record is still needed."""
    over = {AllocationPhase.RELEASED, AllocationPhase.DETACHED, AllocationPhase.ENDED}
    assert allocation_in(phase).is_over == (phase in over)


async def test_a_job_without_an_answer_is_not_kept():
    """No start waits for it."""
    allocation = Allocation(ours=True, request=KernelRequest(), keep=True)
    allocation.lose_answer()
    assert not allocation.keep


async def test_an_adopted_job_is_active_and_told_by_its_comment_or_its_submission():
    """Jobs of other servers have their launcher's id in the comment."""
    info = JobInfo(jobid="12", state="RUNNING", comment="gateway_slurm:gs-1")
    allocation = Allocation.adopted(info, "ada")
    assert (allocation.phase, allocation.jobid, allocation.owner) == (AllocationPhase.ACTIVE, "12", "ada")
    assert (allocation.ours, allocation.identity, allocation.is_running) == (False, "gs-1", True)


async def test_a_restored_job_is_active_with_what_was_last_known_of_it():
    """Until Slurm or a launcher says more."""
    record = AllocationRecord(
        launcher_id="gs-1", jobid="12", ours=True, identity="gs-1", state="RUNNING", nodelist=["c1"], end_time=9.0
    )
    allocation = Allocation.from_record(record)
    assert (allocation.phase, allocation.restored, allocation.used) == (AllocationPhase.ACTIVE, True, True)
    assert (allocation.state, allocation.nodes, allocation.end_time) == ("RUNNING", ["c1"], 9.0)
    assert (allocation.record_key, allocation.assign_record_key()) == ("gs-1", "gs-1")


async def test_a_place_that_is_given_back_twice_is_gone_once():
    """A kernel may be released by its manager and by its end."""
    allocation, place = allocation_in(AllocationPhase.ACTIVE), Place("k")
    allocation.add_place(place)
    assert allocation.kernel_ids == ["k"]
    allocation.remove_place(place)
    allocation.remove_place(place)
    assert allocation.kernel_ids == []


# -- Only the allocation sets its fields --

FIELDS = {field.name for field in fields(Allocation)}
CHANGES = {"add", "append", "clear", "discard", "pop", "popitem", "remove", "set_exception", "set_result", "update"}


def is_allocation(node: ast.expr) -> bool:
    """Whether an expression is an allocation by its name: ``allocation``, ``held.allocation``, ``self._allocation``."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.lstrip("_") == "allocation"


def is_field(node: ast.expr) -> bool:
    """Whether an expression is a field of an allocation, or an item of one."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return isinstance(node, ast.Attribute) and node.attr in FIELDS and is_allocation(node.value)


def changes(tree: ast.AST) -> Iterator[int]:
    """The lines that set or change a field of an allocation."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            targets = [node.func.value]
        flat = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        if any(map(is_field, flat)):
            yield node.lineno


@pytest.mark.parametrize(
    "line",
    [
        "allocation.keep = True",
        "launcher.jobid = allocation.jobid = jobid",
        "held.allocation.used, other = True, 1",
        "allocation.past_steps |= {'1'}",
        "allocation.launchers['a'] = launcher",
        "del self._allocation.launchers['a']",
        "allocation.places.add(place)",
        "allocation.ended.set_result(error)",
    ],
)
def test_a_field_that_is_set_from_outside_is_found(line):
    """The search itself."""
    assert list(changes(ast.parse(line))) == [1]


def test_only_the_allocation_sets_its_fields():
    """Other files of the package read them, and call its methods."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "allocations" / "model.py"
        for line in changes(ast.parse(path.read_text()))
    ]
    assert wrong == []


def test_a_launcher_knows_its_kernels_by_six_methods():
    """A protocol beside it: the room of allocations does not import that of kernels."""
    module = ast.parse((PACKAGE / "allocations" / "launcher.py").read_text())
    (protocol,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "LauncherKernel")
    methods = {node.name for node in protocol.body if isinstance(node, ast.FunctionDef)}
    assert methods == {"message", "reported", "unreported", "lost", "job_ends", "ended_with_job", "warn"}
