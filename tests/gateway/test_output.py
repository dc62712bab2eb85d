"""Much output through ``jupyter slurm gateway``: to frontends that read, that do not read, and that are away."""

from __future__ import annotations

import asyncio
import re
import statistics
import sys
import time

import pytest

from helpers.gateway_process import running_gateway, start, stop
from helpers.kernel_clients import READY, write_admin_settings
from helpers.large_output import PIECE, Memory, SlowFrontend, drop_nothing, flood, numbers_of, relay_small_and_large
from helpers.notebook_server import V1, Frontend

pytestmark = pytest.mark.slow
MB = 1_000_000
ROUND_TRIPS = 40
SLOW = 6
PIECES = 2_000
KEPT = 256  # MiB of a kernel's output that the node keeps: more than the whole flood
# What the frontends that do not read may cost together: the output that all of them share, and what is on its way.
MAX_GROWTH = 100 * MB
TOLD = re.compile(r"gateway_slurm: (\d+) messages? ")


@pytest.fixture(scope="module")
def module_gateway(gateway_environment):
    """One gateway for the tests here; the one that measures its memory is the first."""
    # As the systemd unit in etc/ sets it.
    environment = {"MALLOC_MMAP_THRESHOLD_": "262144"}
    settings = write_admin_settings(kept_output=KEPT)
    with running_gateway(gateway_environment / "output", environment=environment) as gateway:
        settings.unlink()
        yield gateway


@pytest.fixture
def gateway(module_gateway, kernelspecs):
    """The gateway, with kernelspecs."""
    return module_gateway


async def round_trips(*frontends):
    """The median seconds of a cell that does nothing, for each frontend, in turns."""
    seconds = [[] for _ in frontends]
    for _ in range(ROUND_TRIPS):
        for frontend, found in zip(frontends, seconds, strict=True):
            began = time.perf_counter()
            assert (await frontend.execute("1"))[0]["status"] == "ok"
            found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


@pytest.mark.timeout(300)
async def test_frontends_that_do_not_read_cost_nothing_and_have_all_of_it_later(gateway):
    """Six do not read 200 MB: the gateway's memory is bounded, others go on; each gets all of it, over a restart."""
    alice, bob = gateway.of("alice"), gateway.of("bob")
    kernel_id, another = await start(alice), await start(bob)
    same, other = await Frontend.connect(alice, kernel_id, V1), await Frontend.connect(bob, another, V1)
    slow = [await asyncio.to_thread(SlowFrontend, alice, kernel_id) for _ in range(SLOW)]
    await drop_nothing(alice, kernel_id)
    idle = await round_trips(same, other)
    memory = Memory(gateway.process.pid)
    _reply, printed = await same.execute(flood(PIECES))
    assert numbers_of(printed) == list(range(PIECES))
    stalled = await round_trips(same, other)
    growth = memory.growth()
    told = f"round trips idle {idle}, beside {SLOW} that do not read {stalled}; memory + {growth / MB:.0f} MB"
    sys.stdout.write(f"{told}\n")
    assert growth < MAX_GROWTH, told
    for before, beside in zip(idle, stalled, strict=True):
        assert beside < 2 * before, told
    await alice.request("POST", f"/api/kernels/{kernel_id}/restart")
    await same.until_ready()
    last = await same.run("print('from', 'the next process')")
    await asyncio.wait_for(same.result(last), READY)
    # All at once: a frontend that answers no ping for long is disconnected.
    for printed in await asyncio.gather(*(asyncio.to_thread(one.read, last) for one in slow)):
        assert numbers_of(printed) == list(range(PIECES))
        assert printed.count("from the next process\n") == 1
        assert not TOLD.search(printed)
    for one in (*slow, same, other):
        one.close()
    await stop(alice, kernel_id)
    await stop(bob, another)


async def test_many_small_and_much_large_output_arrive_whole_and_in_order(gateway, kernel_name):
    """10 000 single prints, then 100 MB: nothing is lost, and each comes after the one before it."""
    alice = gateway.of("alice")
    kernel_id = await start(alice, kernel_name)
    frontend = await Frontend.connect(alice, kernel_id, V1)
    await relay_small_and_large(frontend)
    frontend.close()
    await stop(alice, kernel_id)


async def test_large_cells_and_large_outputs_go_through(gateway):
    """A cell of 12 MB and one of 64 MB, and outputs of the same sizes; the websocket stays."""
    alice = gateway.of("alice")
    kernel_id = await start(alice)
    frontend = await Frontend.connect(alice, kernel_id, V1)
    for size in (12 * MB, 64 * MB):
        reply, printed = await asyncio.wait_for(frontend.execute(f"text = '{'x' * size}'; print(len(text))"), READY)
        assert (reply["status"], printed) == ("ok", str(size))
        reply, printed = await asyncio.wait_for(frontend.execute("print(text)"), READY)
        assert (reply["status"], len(printed)) == ("ok", size)
    assert (await frontend.execute("print(1 + 1)"))[1] == "2"
    frontend.close()
    await stop(alice, kernel_id)


async def test_a_frontend_that_is_behind_hears_how_much_it_missed(gateway_environment, kernelspecs):
    """More was printed than is kept while it was away: on its return it hears how much, then the newest output."""
    pieces = 400  # 40 MB
    settings = write_admin_settings(kept_output=8)
    with running_gateway(gateway_environment / "behind") as gateway:
        settings.unlink()
        alice = gateway.of("alice")
        kernel_id = await start(alice)
        away = await Frontend.connect(alice, kernel_id)
        await away.execute("1")
        away.close()
        reader = await Frontend.connect(alice, kernel_id)
        await drop_nothing(alice, kernel_id)
        cell = await reader.run(flood(pieces, 0.005))  # what reads must not miss anything
        assert numbers_of((await reader.result(cell))[1]) == list(range(pieces))
        back = await Frontend.connect(alice, kernel_id, session_id=away.session_id)
        old = await Frontend.connect(alice, kernel_id, since=1)  # the journal begins later by now
        for one in (back, old):
            shown = "".join(message["content"].get("text", "") for message in await one.output(cell))
            numbers = numbers_of(shown)
            assert numbers == list(range(pieces - len(numbers), pieces))
            assert 8 << 20 <= (len(numbers) + 1) * PIECE < 20 << 20
            missed = sum(map(int, TOLD.findall(shown)))
            # ipykernel's own timer flushes, too: here and there a piece is two messages.
            assert pieces - len(numbers) <= missed < 1.1 * (pieces - len(numbers)) + 10
        for one in (reader, back, old):
            one.close()
        await stop(alice, kernel_id)
