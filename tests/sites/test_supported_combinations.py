"""Every way to Slurm with every way back: gateway, login node and compute nodes, and a firewall between them.

docs/admins/networks.md has the table, and tests/unit/test_supported_combinations.py holds it against the tests here.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import kernel_clients, sites
from helpers.gateway_process import start, stop, stop_all
from helpers.kernel_clients import JOB, KERNEL_NAMES, PID, READY, poll_async
from helpers.notebook_server import Frontend
from helpers.restarting_servers import LastingFrontend, LastingServer, lasting_gateway
from helpers.sites import MODES, WAYS, Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CUT_SECONDS = 20.0
COUNT_TO = 220  # at ten a second: some seconds more than the cut
COUNT = "import time\nfor number in range({}):\n    print(number, flush=True)\n    time.sleep(0.1)\n"
FLOOD = "for _ in range(100): print('x' * 999_999)"


@pytest.fixture(scope="module", params=WAYS)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A cluster that is reached this way; this process is on the server's host."""
    with sites.site(request.param) as one:
        yield one


@pytest.fixture(scope="module")
def lasting(site: Site) -> Iterator[LastingServer]:
    """A gateway on its host, for the tests of one way."""
    kernel_clients.write_admin_settings(**site.settings)
    with lasting_gateway(site.base / "gateway") as gateway:
        yield gateway


@pytest.fixture
async def gateway(lasting: LastingServer, site: Site) -> Any:
    """It listens, and what a test leaves is ended."""
    yield lasting
    if lasting.process.poll() is not None:
        lasting.begin()
        lasting.until_listening()
    await stop_all(lasting.of("alice"))
    assert await poll_async(lambda: site.left() == [], timeout=READY), site.left()


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, site: Site) -> str:
    """How clients reach kernels; the firewall lets nodes be dialled only where it is direct."""
    site.allow(request.param)
    return str(request.param)


async def kernel_of(gateway: LastingServer, site: Site, mode: str) -> tuple[str, Frontend, Path]:
    """A kernel that is reached this way, a frontend, and the launcher's directory on the node."""
    site.allow(mode)
    alice = gateway.of("alice")
    kernel_id = await start(alice, KERNEL_NAMES[mode])
    frontend = await Frontend.connect(alice, kernel_id)
    _reply, printed = await frontend.execute(sites.CONNECTION)
    assert sites.is_reached(site, mode, printed), printed
    return kernel_id, frontend, Path(printed.split()[-1]).parent


async def test_a_kernels_life(gateway, site, mode):
    """Start, execute, interrupt, restart in the same job, shut down; then there is no job, process, socket or file."""
    alice = gateway.of("alice")
    kernel_id, frontend, directory = await kernel_of(gateway, site, mode)
    jobid, pid = (await frontend.execute(JOB))[1], (await frontend.execute(PID))[1]
    sleeping = await frontend.begin("import time; kept = 1; print('begun', flush=True); time.sleep(300)", "begun")
    await alice.request("POST", f"/api/kernels/{kernel_id}/interrupt")
    assert (await frontend.result(sleeping))[0]["ename"] == "KeyboardInterrupt"
    assert (await frontend.execute("print(kept)"))[1] == "1"
    await alice.request("POST", f"/api/kernels/{kernel_id}/restart")
    await frontend.until_ready()
    assert (await frontend.execute("print('kept' in globals())"))[1] == "False"
    assert (await frontend.execute(PID))[1] != pid
    assert (await frontend.execute(JOB))[1] == jobid
    assert directory.exists()
    await stop(alice, kernel_id)
    await frontend.until_closed()
    assert await poll_async(lambda: site.left() == [], timeout=20), site.left()
    assert not directory.exists()


async def test_100_mb_of_output_arrive_whole(gateway, site, mode):
    """Every byte comes, and the next cell is answered."""
    _kernel_id, frontend, _directory = await kernel_of(gateway, site, mode)
    reply, printed = await frontend.execute(FLOOD)
    assert reply["status"] == "ok"
    # What is printed is stripped of the last line's end.
    assert len(printed) == 100_000_000 - 1
    assert (await frontend.execute("print(6 * 7)"))[1] == "42"
    frontend.close()


async def test_a_gateway_that_is_killed_leaves_its_kernels_to_the_next_one(gateway, site, mode):
    """After kill -9 the next gateway has the kernel, by the same way, and the frontend goes on."""
    alice = gateway.of("alice")
    kernel_id = await start(alice, KERNEL_NAMES[mode])
    frontend = LastingFrontend(alice, kernel_id)
    pid = (await frontend.execute(PID))[1]
    await asyncio.to_thread(gateway.restart, signal.SIGKILL)
    assert (await frontend.execute(PID))[1] == pid
    await frontend.close()
    await stop(alice, kernel_id)
    assert await poll_async(lambda: site.left() == [], timeout=20), site.left()


@pytest.mark.parametrize("mode", ["direct"], indirect=True)
async def test_a_direct_kernel_is_reached_by_the_next_gateway_that_cannot_dial_its_node(gateway, site, mode):
    """Through the tunnel, state and all; once the node can be dialled again a restart makes it direct again."""
    alice = gateway.of("alice")
    kernel_id, frontend, _directory = await kernel_of(gateway, site, mode)
    assert (await frontend.execute("kept = 12; print(kept)"))[1] == "12"
    site.allow("tunnel")
    await asyncio.to_thread(gateway.restart, signal.SIGKILL)
    frontend = await Frontend.connect(alice, kernel_id)
    assert (await frontend.execute("print(kept)"))[1] == "12"
    connect = (await alice.json("GET", f"/api/kernels/{kernel_id}"))["slurm"]["connect"]
    assert (connect["mode"], "when this server took it over" in connect["why"]) == ("tunnel", True)
    site.allow("direct")
    await alice.request("POST", f"/api/kernels/{kernel_id}/restart")
    await frontend.until_ready()
    assert (await frontend.execute("print('kept' in globals())"))[1] == "False"
    assert (await alice.json("GET", f"/api/kernels/{kernel_id}"))["slurm"]["connect"]["mode"] == "direct"
    await stop(alice, kernel_id)
    assert await poll_async(lambda: site.left() == [], timeout=20), site.left()


async def count_while(gateway: LastingServer, site: Site, cut: list[Any]) -> None:
    """One kernel of each mode counts while these flows are cut; every number is to come once, in order."""
    counting, told = {}, len(gateway.log.read_text())
    for mode in reversed(MODES):  # the firewall stays open for direct
        _kernel_id, frontend, _directory = await kernel_of(gateway, site, mode)
        pid = (await frontend.execute(PID))[1]
        counting[mode] = frontend, await frontend.begin(COUNT.format(COUNT_TO), "20"), pid
    with site.network.cut(*cut):
        await asyncio.sleep(CUT_SECONDS)  # the thing tested
        assert site.network.dropped() > 0
    assert gateway.log.read_text()[told:].count("the link is down") >= len(MODES)
    for frontend, cell, pid in counting.values():
        reply, printed = await asyncio.wait_for(frontend.result(cell), READY)
        assert reply["status"] == "ok"
        numbers = printed.split()
        assert int(numbers[0]) < 50
        assert numbers == [str(number) for number in range(int(numbers[0]), COUNT_TO)]
        assert (await frontend.execute(PID))[1] == pid
        frontend.close()


async def test_cells_go_on_while_the_link_is_cut_for_20_s(gateway, site):
    """No packet between node and server, or relay: nothing of a cell is lost, by either mode."""
    await count_while(gateway, site, [site.link, site.kernels])


@pytest.mark.parametrize("site", [way for way in WAYS if way.startswith("ssh")], indirect=True, scope="module")
async def test_cells_go_on_while_ssh_is_cut_for_20_s(gateway, site):
    """No packet between server and login node: it logs in again, and launchers come by the same port."""
    await count_while(gateway, site, [site.ssh])
