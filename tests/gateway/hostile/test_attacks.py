"""Hostile users at a gateway with real Unix users: each attack of the table fails, and Bob works on meanwhile.

``make hostile`` runs all with their full size, and prints the table: what Bob felt, and the gateway's memory. The
bounds for Bob's times are wide here, since many tests share the machine. Needs
root, which makes the users (see conftest.py).
"""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from helpers.hostile.attacks import ATTACKS, SLOW, Attack
from helpers.hostile.field import MEBIBYTE, AttackWorksError, running_field
from helpers.private_slurm import private_cluster
from helpers.unix_users import people

FULL = os.environ.get("HOSTILE") == "full"
ONLY = os.environ.get("HOSTILE_ONLY", "")
# "small" has all attacks, too, in the tests' size.
EVERY = "HOSTILE" in os.environ
CHOSEN = [one for one in (*ATTACKS, *(SLOW if FULL else ())) if ONLY in one.name and (EVERY or one.is_mended)]
# Seconds over idle that Bob may wait, and how many times as long as idle his start may take: the real ones on two
# processors, of which the gateway has one, and on a machine with other tests.
TARGETS = {"rest": 0.05, "cell": 0.1}
SHARED = {"rest": 3.0, "cell": 4.0, "start": 5.0}
START_TARGET = 1.5
ROWS: list[tuple[str, ...]] = []


@pytest.fixture(scope="module")
def field():
    """One gateway for all attacks, with a Slurm of its own."""
    with (
        private_cluster() as cluster,
        people(cluster, others=4) as folk,
        running_field(folk, cluster, full=FULL) as made,
    ):
        asyncio.run(made.begin())
        idle = made.idle
        ROWS.append(("", "idle", "", *(f"{idle.of(kind) * 1e3:.0f}" for kind in ("rest", "cell", "start")), ""))
        yield made
        sys.stdout.write(table())  # shown with -s


def table():
    """The rows in Markdown."""
    head = ("subject", "attack", "fails", "REST p95 (ms)", "cell p95 (ms)", "start, median (ms)", "memory (MiB)")
    lines = [head, ("---",) * len(head), *ROWS]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("attack", CHOSEN, ids=[one.name for one in CHOSEN])
async def test_an_attack_fails_and_the_other_user_works_on(field, attack: Attack):
    """It gains nothing, Bob's requests, cells and starts are answered in time, and memory is bounded."""
    await field.felt()
    field.forget_peak()
    before, works = field.memory(), ""
    try:
        await attack.run(field)
    except AttackWorksError as error:
        works = str(error)
    felt, grown = await field.felt(), (field.peak() - before) / MEBIBYTE
    await field.clear()
    found = [works] if works else []
    if grown > attack.memory:
        found.append(f"memory grew by {grown:.0f} MiB, and {attack.memory} are allowed")
    if attack.delays:
        found += [f"Bob failed: {felt.failures[0]}"] if felt.failures else []
        for kind, over in (TARGETS if FULL else SHARED).items():
            seconds = felt.of(kind)
            if seconds > field.idle.of(kind) + over:
                found.append(f"Bob's {kind} took {seconds:.2f} s, and {field.idle.of(kind):.2f} s before")
        if FULL and felt.of("start") > START_TARGET * field.idle.of("start"):
            found.append(f"Bob's start took {felt.of('start'):.2f} s, and {field.idle.of('start'):.2f} s before")
    times = [f"{felt.of(kind) * 1e3:.0f}" if attack.delays else "" for kind in ("rest", "cell", "start")]
    ROWS.append((attack.subject, attack.name, "no" if found else "yes", *times, f"{grown:.0f}"))
    if EVERY:
        sys.stdout.write(f"{' | '.join(ROWS[-1])}: {'; '.join(found)}\n")
    assert not found, "; ".join(found)
