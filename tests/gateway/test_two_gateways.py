"""Two gateways on one PostgreSQL: a client that asks either of them has all that is theirs, whichever has it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest
from tornado.httpclient import HTTPClientError

from gateway_slurm.gateway.openapi import OPERATIONS
from gateway_slurm.service import STANDSTILL_SECONDS
from gateway_slurm.store import LEASE_SECONDS
from helpers.gateway_group import Deployment, deployment, has_itself, ids
from helpers.gateway_process import ask, start, stop, stop_all
from helpers.kernel_clients import JOB, PID, READY, jupyter_files_in, poll_async
from helpers.notebook_server import V1, Frontend, Server
from helpers.postgres import PrivatePostgres, private_postgres
from helpers.private_slurm import jobs_of

# A lease, the look for dead gateways, a launcher's dialling, and two busy CPUs.
TAKEN_OVER_WITHIN = LEASE_SECONDS + 10  # seconds
# It takes longer than the lease of its gateway.
COUNT = f"import time\nfor number in range(200):\n    print(number, flush=True)\n    time.sleep({LEASE_SECONDS / 150})"
ROUTES = [(verb.upper(), path) for path, verbs in OPERATIONS.items() for verb in verbs]


@pytest.fixture(scope="module")
def postgres() -> Iterator[PrivatePostgres]:
    """One server for all tests here, in which each deployment has a database."""
    with private_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def module_pair(cluster, jupyter_base, postgres) -> Iterator[Deployment]:
    """Two gateways, a and b, for the tests that kill none."""
    with jupyter_files_in(jupyter_base), deployment(jupyter_base / "two", postgres.new_database()) as pair:
        for name in ("a", "b"):
            pair.start(name, "--debug", "--GatewayIdentityProvider.allow_token_in_url=True")
        yield pair


@pytest.fixture
def pair(module_pair, kernelspecs) -> Deployment:
    """The two, with kernelspecs."""
    return module_pair


@pytest.fixture
def mortals(cluster, kernelspecs, postgres, tmp_path) -> Iterator[Deployment]:
    """A deployment of the test's own with gateways that may die."""
    with deployment(tmp_path, postgres.new_database()) as own:
        yield own


@contextlib.asynccontextmanager
async def kernel_of(server: Server, name: str = "slurm"):
    """A kernel that runs, by this gateway; its id."""
    kernel_id = await start(server, name)
    try:
        await ask(server, kernel_id, JOB)
        yield kernel_id
    finally:
        await stop(server, kernel_id)


# -- used through the other one -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["", V1])
async def test_a_kernel_of_one_gateway_is_used_through_the_other(pair, protocol):
    """It is there at once, computes, is interrupted and restarted, and ends, without its own gateway being named."""
    alice, through = pair.gateways["a"].of("alice"), pair.gateways["b"].of("alice")
    kernel_id = await start(alice)
    try:
        model = await through.json("GET", f"/api/kernels/{kernel_id}")  # it still waits in Slurm's queue, perhaps
        assert model["id"] == kernel_id
        frontend = await Frontend.connect(through, kernel_id, protocol)
        reply, printed = await frontend.execute("x = 41; print(x + 1)")
        assert (reply["status"], printed) == ("ok", "42")
        assert await pair.holders(kernel_id) == ["a"]
        msg_id = await frontend.begin("import time; print('begun', flush=True); time.sleep(60)", "begun")
        await through.request("POST", f"/api/kernels/{kernel_id}/interrupt")
        assert (await frontend.result(msg_id))[0]["ename"] == "KeyboardInterrupt"
        job = await ask(through, kernel_id, JOB)
        assert (await through.json("POST", f"/api/kernels/{kernel_id}/restart"))["id"] == kernel_id
        await frontend.until_ready()
        assert (await frontend.execute("print('x' in globals())"))[1] == "False"
        assert await ask(alice, kernel_id, JOB) == job
        frontend.close()
        assert await through.status("DELETE", f"/api/kernels/{kernel_id}") == 204
        for server in (alice, through):
            assert await server.status("GET", f"/api/kernels/{kernel_id}") == 404
    finally:
        await stop(alice, kernel_id)


async def test_lists_have_what_both_have(pair):
    """Kernels, sessions and jobs of both, the same whichever is asked; and the status counts them."""
    a, b = (pair.gateways[name].of("alice") for name in "ab")
    async with kernel_of(a) as one, kernel_of(b) as other:
        session = await b.json("POST", "/api/sessions", {"path": "l.ipynb", "kernel": {"id": one}})
        jobs = {job["jobid"] for job in await a.json("GET", "/api/allocations")}
        assert len(jobs) == 2
        for server in (a, b):
            assert await ids(server, "/api/kernels") == sorted([one, other])
            assert await ids(server, "/api/sessions") == [session["id"]]
            assert {job["jobid"] for job in await server.json("GET", "/api/allocations")} == jobs
            for job in jobs:
                assert (await server.json("GET", f"/api/allocations/{job}"))["jobid"] == job
            assert (await server.json("GET", "/api/status"))["kernels"] == 2
            assert await ids(pair.gateways["a"].of("bob"), "/api/kernels") == []
            assert await ids(pair.gateways["b"].of("carol"), "/api/kernels") == sorted([one, other])


async def test_other_users_kernels_are_not_there_through_the_other_gateway_either(pair):
    """Every route and verb says 404 to bob at b, of what alice has at a, and changes nothing."""
    alice, bob = pair.gateways["a"].of("alice"), pair.gateways["b"].of("bob")
    async with kernel_of(alice) as kernel_id:
        session = await alice.json("POST", "/api/sessions", {"path": "s.ipynb", "kernel": {"id": kernel_id}})
        names = {
            "kernel_id": kernel_id,
            "session_id": session["id"],
            "jobid": await ask(alice, kernel_id, JOB),
            "msg_id": "m",
        }
        for verb, path in ROUTES:
            if "{" in path and "{kernel_name}" not in path:
                body = {} if verb in ("POST", "PATCH") else None
                assert await bob.status(verb, path.format(**names), body) == 404, (verb, path)
        with pytest.raises(HTTPClientError, match="404"):
            await Frontend.connect(bob, kernel_id)
        taken = {"path": "b.ipynb", "kernel": {"id": kernel_id}}
        assert await bob.status("POST", "/api/sessions", taken) == 404
        assert await bob.status("POST", "/api/kernels", {"kernel_id": kernel_id, "name": "slurm"}) == 409
        assert await ask(alice, kernel_id, JOB) == names["jobid"]
        # Nor does a token that is none open anything by way of the other gateway.
        assert await pair.gateways["b"].anyone.status("GET", f"/api/kernels/{kernel_id}") == 403


async def test_a_document_has_one_session_whichever_gateway_is_asked(pair):
    """Asked one after the other, and both at once; it is renamed, given another kernel, and ended by either."""
    a, b = (pair.gateways[name].of("alice") for name in "ab")
    try:
        for path in ("one.ipynb", "two.ipynb", "three.ipynb"):
            body = {"path": path, "name": path, "kernel": {"name": "slurm"}}
            made = await asyncio.gather(*(server.json("POST", "/api/sessions", body) for server in (a, b, a, b)))
            assert len({session["id"] for session in made}) == 1
            assert len({session["kernel"]["id"] for session in made}) == 1
        session = made[0]
        for server, name in ((a, "x.ipynb"), (b, "y.ipynb")):
            renamed = await server.json("PATCH", f"/api/sessions/{session['id']}", {"path": name, "name": name})
            assert (renamed["id"], renamed["path"]) == (session["id"], name)
        assert [one["path"] for one in await a.json("GET", "/api/sessions")].count("y.ipynb") == 1
        # Asked at a, about kernels of both, wherever the session is.
        new = [await start(server) for server in (a, b, a)]
        for kernel_id in new:
            change = {"kernel": {"id": kernel_id}}
            session = await a.json("PATCH", f"/api/sessions/{session['id']}", change)
            assert session["kernel"]["id"] == kernel_id
        assert await b.status("GET", f"/api/kernels/{made[0]['kernel']['id']}") == 404
        assert await b.status("DELETE", f"/api/sessions/{session['id']}") == 204
        assert await a.status("GET", f"/api/kernels/{new[-1]}") == 404
    finally:
        await stop_all(a)


async def test_limits_count_the_kernels_of_all_gateways(mortals):
    """Starting ones, too; one that ends makes room at both."""
    options = ["--SlurmMappingKernelManager.max_kernels_per_user=2", "--SlurmMappingKernelManager.max_kernels=3"]
    a, b = (mortals.start(name, *options).of("alice") for name in "ab")
    try:
        first = await start(a)
        await ask(a, first, JOB)
        second = await start(b)
        await ask(b, second, JOB)
        for server in (a, b):
            assert await server.status("POST", "/api/kernels", {"name": "slurm"}) == 429
        bob = mortals.gateways["b"].of("bob")
        third = await start(bob)
        await ask(bob, third, JOB)
        assert await mortals.gateways["a"].of("bob").status("POST", "/api/kernels", {"name": "slurm"}) == 429
        await stop(bob, third)
        await stop(b, first)
        third = await start(b)
        assert await ids(a, "/api/kernels") == sorted([second, third])
    finally:
        await stop_all(mortals.gateways["a"].of("carol"))


async def test_a_token_in_a_websockets_url_goes_on_in_a_header_only(pair):
    """It gets its user to the other gateway's kernel, and into no log of either."""
    alice, through = pair.gateways["a"].of("alice"), pair.gateways["b"].of("alice")
    async with kernel_of(alice) as kernel_id:
        frontend = await Frontend.connect(through, kernel_id, token_in_url=True)
        assert (await frontend.execute("print(1)"))[1] == "1"
        frontend.close()
    for server in (alice, through):
        assert server.token not in server.log.read_text()


# -- one of them goes -----------------------------------------------------------------------------------------


class Reconnecting:
    """A frontend that connects again when its websocket closes, as JupyterLab does."""

    def __init__(self, servers: list[Server], kernel_id: str) -> None:
        self._servers, self._kernel_id, self._session_id = servers, kernel_id, ""
        self.frontend: Frontend | None = None

    async def connect(self) -> Frontend:
        """By whichever gateway takes it, for as long as the client's own patience."""
        deadline = time.monotonic() + 31
        while True:
            for server in self._servers:
                with contextlib.suppress(OSError, HTTPClientError):
                    frontend = await Frontend.connect(server, self._kernel_id, V1, session_id=self._session_id)
                    self.frontend, self._session_id = frontend, frontend.session_id
                    return frontend
            assert time.monotonic() < deadline, "no gateway takes the websocket"
            await asyncio.sleep(0.5)


async def taken_over(own: Deployment, kernel_id: str, by: list[str]) -> str:
    """Who has the kernel on record once it is one of these gateways; never a moment with two that serve it."""
    servers = {own.server_of(own.gateways[name]): name for name in by}
    deadline = time.monotonic() + TAKEN_OVER_WITHIN
    while (owner := own.owner_of(kernel_id)) not in servers:
        assert time.monotonic() < deadline, f"{owner} still has it"
        await asyncio.sleep(0.1)
    return servers[owner]


@pytest.mark.slow
async def test_a_killed_gateways_kernels_go_on_through_the_other(mortals):
    """kill -9: its kernels are the other's, with all that is in their memory, and clients' websockets go on there."""
    alice = mortals.start("a").of("alice")
    other = mortals.start("b").of("alice")
    await mortals.know_each_other()
    session = await alice.json("POST", "/api/sessions", {"path": "k.ipynb", "kernel": {"id": await start(alice)}})
    kernel_id = session["kernel"]["id"]
    try:
        client, through = Reconnecting([other], kernel_id), await Frontend.connect(other, kernel_id)
        frontend = await client.connect()
        pid = (await frontend.execute("x = 'kept'; import os; print(os.getpid())"))[1]
        running = await frontend.run(COUNT)
        path = f"/api/kernels/{kernel_id}/executions"
        (_running, done), through_b = await alice.json("GET", path), await other.json("GET", path)
        assert [one["msg_id"] for one in through_b] == [running, done["msg_id"]]
        before = await alice.json("GET", f"{path}/{done['msg_id']}")
        assert await poll_async(lambda: mortals.owner_of(kernel_id) != "", timeout=READY)
        owner = "a" if mortals.owner_of(kernel_id) == mortals.server_of(mortals.gateways["a"]) else "b"
        assert await mortals.holders(kernel_id) == [owner] == ["a"]
        mortals.gateways["a"].process.kill()
        await asyncio.wait_for(frontend.until_closed(), READY)
        await asyncio.wait_for(through.until_closed(), READY)
        assert through.close_code == 1012
        # Meanwhile no client hears that it is gone.
        statuses = set()
        while await has_itself(other, kernel_id) is False:
            statuses.add(await other.status("GET", f"/api/kernels/{kernel_id}"))
            assert kernel_id in await ids(other, "/api/kernels")
        assert statuses <= {200, 503}
        assert await taken_over(mortals, kernel_id, ["b"]) == "b"
        frontend = await client.connect()
        # The cell has run on, and its outputs are what they were.
        reply, _printed = await asyncio.wait_for(frontend.result(running), READY)
        assert reply["status"] == "ok"
        model = await other.json("GET", f"{path}/{running}")
        assert (model["status"], model["dropped"]) == ("ok", 0)
        assert "".join(one["text"] for one in model["outputs"]).split() == [str(number) for number in range(200)]
        assert (await other.json("GET", f"{path}/{done['msg_id']}"))["outputs"] == before["outputs"]
        assert (await frontend.execute("print(x, os.getpid())"))[1] == f"kept {pid}"
        assert await mortals.holders(kernel_id) == ["b"]
        again = await other.json("POST", "/api/sessions", {"path": "k.ipynb", "kernel": {"name": "slurm"}})
        assert (again["id"], again["kernel"]["id"]) == (session["id"], kernel_id)
        frontend.close()
    finally:
        await stop_all(other)


@pytest.mark.slow
async def test_a_gateway_that_hangs_loses_its_kernels_and_lets_go_of_them(mortals):
    """SIGSTOP past its lease: the other serves the kernel; once it runs again it does not."""
    alice = mortals.start("a").of("alice")
    other = mortals.start("b").of("alice")
    await mortals.know_each_other()
    kernel_id = await start(alice)
    try:
        pid = await ask(alice, kernel_id, PID)
        frontend = await Frontend.connect(other, kernel_id)
        os.kill(mortals.gateways["a"].process.pid, signal.SIGSTOP)
        try:
            await asyncio.wait_for(frontend.until_closed(), READY)
            assert await taken_over(mortals, kernel_id, ["b"]) == "b"
            assert await ask(other, kernel_id, PID) == pid
        finally:
            os.kill(mortals.gateways["a"].process.pid, signal.SIGCONT)
        deadline = time.monotonic() + READY
        while await mortals.holders(kernel_id) != ["b"]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert await ask(alice, kernel_id, PID) == pid  # by way of the other one
        assert await ids(alice, "/api/kernels") == [kernel_id]
    finally:
        await stop_all(other)


# A gateway's configuration is code: on SIGUSR2 one of its loops stands still while the file exists.
STANDS_STILL = """
import os, signal, time
from gateway_slurm import SlurmService

def stand_still():
    while os.path.exists({file!r}):
        time.sleep(0.1)

on_service = {loop!r} == "service"
signal.signal(
    signal.SIGUSR2,
    lambda *_: SlurmService.instance().submit(stand()) if on_service else stand_still(),
)

async def stand():
    stand_still()
"""


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["main", "service"])
async def test_a_gateway_of_which_one_loop_stands_still_loses_its_kernels(mortals, tmp_path, loop):
    """Its other threads run on, and its lease ends all the same: the other gateway serves its kernels."""
    file, config = tmp_path / "stands", tmp_path / "stands.py"
    config.write_text(STANDS_STILL.format(file=str(file), loop=loop))
    hanging = mortals.start("a", f"--config={config}")
    other = mortals.start("b").of("alice")
    await mortals.know_each_other()
    kernel_id = await start(hanging.of("alice"))
    try:
        pid = await ask(hanging.of("alice"), kernel_id, PID)
        file.touch()
        os.kill(hanging.process.pid, signal.SIGUSR2)
        try:
            deadline = time.monotonic() + STANDSTILL_SECONDS + TAKEN_OVER_WITHIN
            while mortals.owner_of(kernel_id) != mortals.server_of(mortals.gateways["b"]):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)
            assert await ask(other, kernel_id, PID) == pid
        finally:
            file.unlink()
        deadline = time.monotonic() + READY
        while await mortals.holders(kernel_id) != ["b"]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert await ask(hanging.of("alice"), kernel_id, PID) == pid  # by way of the other one
    finally:
        await stop_all(other)


@pytest.mark.slow
async def test_a_rolling_upgrade_loses_nothing(mortals, cluster):
    """A third gateway starts, the first is stopped, then the second: kernels, sessions and jobs are those they were."""
    a, b = mortals.start("a").of("alice"), mortals.start("b").of("alice")
    kernels = [await start(server) for server in (a, a, b)]
    try:
        pids = {kernel_id: await ask(b, kernel_id, PID) for kernel_id in kernels}
        jobs = jobs_of(cluster)
        c = mortals.start("c").of("alice")
        for leaving, staying in (("a", [b, c]), ("b", [c])):
            gateway = mortals.gateways.pop(leaving)
            client = Reconnecting(staying, kernels[0])
            before = await Frontend.connect(c, kernels[0])
            gateway.process.terminate()
            assert await asyncio.to_thread(gateway.process.wait, READY) == 0
            for kernel_id in kernels:
                await taken_over(mortals, kernel_id, list(mortals.gateways))
                for server in staying:
                    assert await ask(server, kernel_id, PID) == pids[kernel_id]
                assert len(await mortals.holders(kernel_id)) == 1
            for server in staying:
                assert await ids(server, "/api/kernels") == sorted(kernels)
            frontend = await client.connect()
            assert (await frontend.execute(PID))[1] == pids[kernels[0]]
            frontend.close()
            before.close()
        assert jobs_of(cluster) == jobs
    finally:
        await stop_all(c)
