"""Everything under a gateway breaks, again and again, while kernels count: no client loses a number.

The last test takes CHAOS_ROUNDS with CHAOS_KERNELS for each kind of store, in the order that CHAOS_SEED gives; ``make
chaos`` has a hundred rounds with twenty kernels. CHAOS_KINDS names some kinds, with commas, where not all are wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from gateway_slurm.testing.processes import free_port, job_processes
from helpers import HELPERS
from helpers.chaos import Report, RestartedGateway, User, clock, plan, until_live, watching
from helpers.disturbances import KINDS, RESTARTS, STORES, World, small_disk
from helpers.failing_starts import nothing_left
from helpers.gateway_process import ask, start, stop_all
from helpers.kernel_clients import IPYKERNEL, READY, install_kernelspec, jupyter_environment, write_admin_settings
from helpers.postgres import private_postgres
from helpers.private_slurm import poll

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "9"))
KERNELS = int(os.environ.get("CHAOS_KERNELS", "6"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
ONLY = [kind for kind in os.environ.get("CHAOS_KINDS", "").split(",") if kind]
FEW = 4  # kernels, for a short run
STUB = [sys.executable, str(HELPERS / "stub_kernel.py"), "-f", "{connection_file}"]
# What a gateway may have grown by at the end: modules that are loaded when they are first needed, caches.
GROWN_BYTES, GROWN_DESCRIPTORS = 64 << 20, 8


@pytest.fixture(params=["sqlite"])
def world(request, cluster, jupyter_base, kernelspecs, tmp_path):
    """A gateway whose store is on a disk of its own, or in a PostgreSQL of its own; kernelspecs for cheap kernels."""
    install_kernelspec(kernelspecs, "stub", config_overrides={"kernel_argv": STUB})
    install_kernelspec(kernelspecs, "shared", config_overrides={"kernel_argv": STUB, "share": True})
    curve = {"metadata": {"supported_encryption": ["curve"]}}
    install_kernelspec(kernelspecs, "ipykernel", config_overrides={"kernel_argv": IPYKERNEL}, spec_overrides=curve)
    base = jupyter_base / f"chaos-{uuid.uuid4().hex[:6]}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(small_disk(base / "state"))
        database = stack.enter_context(private_postgres()) if request.param == "postgresql" else None
        if database is not None:
            settings = write_admin_settings(store_url=database.new_database())
            stack.callback(settings.unlink)
        environment = {**os.environ, **jupyter_environment(jupyter_base), "XDG_STATE_HOME": str(base / "state")}
        gateway = RestartedGateway(base / "gateway", free_port(), environment=environment)
        gateway.start()
        stack.callback(gateway.end)
        yield World(gateway, cluster, base / "state", random.Random(SEED), postgres=database)  # noqa: S311 - an order


def kernel_names(count: int) -> list[str]:
    """Of four kernels one is a direct ipykernel, one has a job of its own, and two share one."""
    return [("ipykernel", "stub", "shared", "shared")[number % 4] for number in range(count)]


async def start_users(world: World, count: int, stop_file: Path) -> list[User]:
    """Kernels, and who has them."""
    alice = world.gateway.of("alice")
    kernels = [(await start(alice, name), name) for name in kernel_names(count)]
    return [User(alice, kernel_id, uuid.uuid4().hex, str(stop_file), name) for kernel_id, name in kernels]


async def disturb(world: World, users: list[User], kinds: list[str]) -> Report:
    """One round for each; all users are back before the next."""
    report = Report()
    for number, kind in enumerate(kinds, 1):
        began = time.time()
        await KINDS[kind](world)
        seconds = await until_live(users, time.time())
        report.round(kind, began, seconds)
        sys.stdout.write(f"round {number}, {clock(began)}: {kind}, all clients were back after {seconds:.1f} s\n")
        sys.stdout.flush()
    return report


async def run(world: World, kinds: list[str], count: int, stop_file: Path) -> Report:
    """Count through all of these; every cell ends, and is answered."""
    users = await start_users(world, count, stop_file)
    async with watching(users) as tasks:
        await until_live(users, 0.0, timeout=2 * READY)
        report = await disturb(world, users, kinds)
        assert kernel_processes(world) == count, "a kernel is there twice, or not at all"
        await asyncio.to_thread(stop_file.touch)
        await asyncio.wait_for(asyncio.gather(*tasks), READY)
    report.users(users)
    assert [user.reply["status"] for user in users] == ["ok"] * count
    sys.stdout.write("\n".join(["", *report.lines(), ""]))
    return report


def kernel_processes(world: World) -> int:
    """How many of the kernels' processes there are."""
    argvs = [psutil.Process(process.pid).cmdline() for process in job_processes(world.cluster.slurm_conf)]
    return sum("-f" in argv and any(name in " ".join(argv) for name in ("stub_kernel", "ipykernel")) for argv in argvs)


def check(report: Report) -> None:
    """No number is lost without a word, none comes in the wrong order, and none twice but around a gateway's end."""
    assert report.missing <= report.dropped, report.lines()
    assert (report.out_of_order, report.surprises) == (0, []), report.lines()


async def until_small(world: World, before: tuple[int, int]) -> None:
    """The gateway has soon no more descriptors than it had, and hardly more memory."""
    now = before

    def is_small() -> bool:
        nonlocal now
        now = world.gateway.size()
        return now[0] <= before[0] + GROWN_BYTES and now[1] <= before[1] + GROWN_DESCRIPTORS

    assert await asyncio.to_thread(poll, is_small, timeout=15), f"{before} before, {now} after"


async def chaos(world: World, kinds: list[str], count: int, stop_file: Path) -> None:
    """A run, and the look at what is left of it."""
    alice = world.gateway.of("alice")
    assert await ask(alice, await start(alice, "stub"), "print(6 * 7)") == "42"
    await stop_all(alice)
    before = world.gateway.size()
    check(await run(world, kinds, count, stop_file))
    await stop_all(world.gateway.of("alice"))
    assert await asyncio.to_thread(nothing_left, world.cluster, timeout=30)
    await until_small(world, before)


def kinds_for(store: str, *, restarts: bool) -> list[str]:
    """What is done to a gateway with this store."""
    others = [name for kind, name in STORES.items() if kind != store]
    return [kind for kind in KINDS if kind not in others and (restarts or kind not in RESTARTS)]


@pytest.mark.timeout(240)
async def test_nothing_is_lost_while_the_gateway_lives(world, tmp_path):
    """Links are cut, Slurm's daemons restart, the disk is full, the gateway sleeps: all cells go on."""
    world.stopped = 3.0
    kinds = kinds_for("sqlite", restarts=False)
    await chaos(world, plan(kinds, len(kinds), SEED), FEW, tmp_path / "stop")


@pytest.mark.timeout(240)
async def test_nothing_is_lost_while_gateways_come_and_go(world, tmp_path):
    """It is killed, ended, and killed after its links were cut: the next one goes on where it was."""
    await chaos(world, [*RESTARTS, "link cut", RESTARTS[0]], FEW, tmp_path / "stop")


@pytest.mark.slow
@pytest.mark.timeout(120 + 40 * ROUNDS)
@pytest.mark.parametrize("world", list(STORES), indirect=True)
async def test_nothing_is_lost_whatever_breaks(world, tmp_path):
    """Everything at random, with the store in a file, and in PostgreSQL."""
    kinds = ONLY or kinds_for("postgresql" if world.postgres else "sqlite", restarts=True)
    await chaos(world, plan(kinds, ROUNDS, SEED), KERNELS, tmp_path / "stop")
