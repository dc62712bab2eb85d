"""A gateway that ends while kernels compute, and the next one: no user's work is lost, and frontends go on."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from tornado.httpclient import HTTPClientError

from gateway_slurm.testing.processes import free_port
from helpers.gateway_process import ask, gateway_argv, made_tokens, start, stop, stop_all, until_dead
from helpers.kernel_clients import JOB, READY, poll_async
from helpers.notebook_server import Frontend, Server
from helpers.private_slurm import jobs_of, slurm
from helpers.restarting_servers import LastingFrontend, lasting_gateway, lasting_server

COUNT = "import time\nfor number in range({}):\n    print(number, flush=True)\n    time.sleep(0.02)\n"
KEEPING = "--ServerApp.kernel_manager_class=gateway_slurm.SlurmMappingKernelManager"
ENDINGS = pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])


def numbers(count):
    """What the cell prints."""
    return "".join(f"{number}\n" for number in range(count))


def without_repeats(printed, signum=signal.SIGKILL, restarts=1):
    """What was printed, without what came twice.

    Only after a kill, and only what the killed gateway had sent and not yet acknowledged: a moment's output.
    """
    lines = printed.splitlines(keepends=True)
    once = list(dict.fromkeys(lines))
    assert len(lines) - len(once) <= (5 * restarts if signum == signal.SIGKILL else 0), printed
    return "".join(once)


@pytest.fixture(scope="module")
def module_gateway(gateway_environment):
    """One gateway after the other, for the tests here."""
    with lasting_gateway(gateway_environment / "lasting") as gateway:
        yield gateway


@pytest.fixture
async def gateway(module_gateway, kernelspecs):
    """It listens, and what a test leaves is ended."""
    yield module_gateway
    if module_gateway.process.poll() is not None:
        module_gateway.begin()
        module_gateway.until_listening()
    await stop_all(module_gateway.of("carol"))


@pytest.fixture
async def frontend(gateway):
    """alice's frontend with a kernel of hers, behind the tunnel: its output is kept."""
    kernel_id = await start(gateway.of("alice"))
    made = LastingFrontend(gateway.of("alice"), kernel_id)
    made.kernel_id = kernel_id
    yield made
    await made.close()


@ENDINGS
async def test_a_cell_runs_through_the_gateways_restart_with_all_of_its_output(gateway, frontend, signum):
    """Every number comes, in order, and one reply; the next cell runs in the same kernel."""
    _reply, jobid = await frontend.execute(JOB)
    cell = await frontend.send(COUNT.format(300))
    await frontend.until(lambda one: "30\n" in one.printed(cell))
    await asyncio.to_thread(gateway.restart, signum)
    reply, printed = await frontend.result(cell)
    assert without_repeats(printed, signum) == numbers(300)
    assert reply["status"] == "ok"
    assert len(frontend.replies(cell)) == 1
    assert await frontend.execute(JOB) == ({**_reply, "execution_count": 3}, jobid)
    assert frontend.connections == 2


@ENDINGS
async def test_a_cell_that_ends_while_there_is_no_gateway_is_answered_by_the_next_one(gateway, frontend, signum):
    """With its output, count and error; the cells behind it, too."""
    await frontend.execute("1")
    good = await frontend.send(COUNT.format(50))
    bad = await frontend.send("print('before')\n1/0")
    behind = await frontend.send("print('never')")
    await frontend.until(lambda one: "5\n" in one.printed(good))
    gateway.signal(signum)
    model = None
    await asyncio.sleep(3)  # the cells' own time: 50 times 20 ms, and no server to ask whether they are over
    gateway.begin()
    reply, printed = await frontend.result(good)
    assert (reply["status"], reply["execution_count"]) == ("ok", 2)
    assert without_repeats(printed, signum) == numbers(50)
    reply, printed = await frontend.result(bad)
    assert (reply["status"], reply["ename"], printed) == ("error", "ZeroDivisionError", "before\n")
    reply, printed = await frontend.result(behind)
    assert (reply["status"], printed) == ("aborted", "")
    assert (await frontend.execute("print(number)"))[1] == "49\n"
    model = await gateway.of("alice").json("GET", f"/api/kernels/{frontend.kernel_id}")
    assert model["execution_state"] == "idle"


async def test_two_restarts_in_one_cell_lose_nothing(gateway, frontend):
    """What was delivered by the second gateway is not delivered by the third."""
    cell = await frontend.send(COUNT.format(600))
    for mark in ("50\n", "400\n"):
        await frontend.until(lambda one, mark=mark: mark in one.printed(cell))
        await asyncio.to_thread(gateway.restart, signal.SIGKILL)
    assert without_repeats((await frontend.result(cell))[1], restarts=2) == numbers(600)
    assert len(frontend.replies(cell)) == 1


async def test_a_frontend_that_comes_later_than_the_gateway_has_all_of_it(gateway, kernelspecs):
    """Its session's output is held for it by the new gateway; another session's frontend is not needed for that."""
    alice = gateway.of("alice")
    kernel_id = await start(alice)
    first = await Frontend.connect(alice, kernel_id)
    cell = await first.begin(COUNT.format(100), "5")
    await asyncio.to_thread(gateway.restart, signal.SIGKILL)
    assert await ask(alice, kernel_id, "print('other')") == "other"
    again = await Frontend.connect(alice, kernel_id, session_id=first.session_id)
    _reply, printed = await asyncio.wait_for(again.result(cell), READY)
    assert printed.endswith("98\n99")
    assert printed.split() == [str(number) for number in range(int(printed.split()[0]), 100)]
    again.close()


@ENDINGS
async def test_kernels_sessions_and_owners_are_as_they_were(gateway, kernelspecs, signum):
    """Lists are the same, the kernel is where it was, and others still have no part in it."""
    alice, bob, portal = (gateway.of(user) for user in ("alice", "bob", "portal"))
    body = {"path": "a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "physics.python"}}
    session = await alice.json("POST", "/api/sessions", body)
    kernel_id = session["kernel"]["id"]
    made = await start(portal, env={"KERNEL_USERNAME": "bob"})
    assert await ask(alice, kernel_id, "kept = 5; print(kept)") == "5"
    assert await ask(portal, made, "print(1)") == "1"
    before = [(await alice.json("GET", path)) for path in ("/api/kernels", "/api/sessions", "/api/allocations")]
    await asyncio.to_thread(gateway.restart, signum)
    kernels, sessions, allocations = [
        (await alice.json("GET", path)) for path in ("/api/kernels", "/api/sessions", "/api/allocations")
    ]
    assert [(one["id"], one["name"], one["slurm"]["jobid"]) for one in kernels] == [
        (one["id"], one["name"], one["slurm"]["jobid"]) for one in before[0]
    ]
    assert [(one["id"], one["path"], one["kernel"]["id"]) for one in sessions] == [
        (one["id"], one["path"], one["kernel"]["id"]) for one in before[1]
    ]
    assert [one["jobid"] for one in allocations] == [one["jobid"] for one in before[2]]
    again = await alice.json("POST", "/api/sessions", body)
    assert (again["id"], again["kernel"]["id"]) == (session["id"], kernel_id)
    assert await bob.status("GET", f"/api/kernels/{kernel_id}") == 404
    assert await bob.status("DELETE", f"/api/kernels/{kernel_id}") == 404
    assert await bob.status("GET", f"/api/sessions/{session['id']}") == 404
    assert [one["id"] for one in await bob.json("GET", "/api/kernels")] == [made]
    assert [one["id"] for one in await portal.json("GET", "/api/kernels")] == [made]
    assert await ask(alice, kernel_id, "print(kept)") == "5"


async def test_a_restored_kernel_is_interrupted_restarted_and_ended_as_any_other(gateway, frontend, cluster):
    """It is restarted with what it was started with; when it is deleted its job ends."""
    await stop(gateway.of("alice"), frontend.kernel_id)
    await frontend.close()
    alice = gateway.of("alice")
    kernel_id = await start(alice, env={"KERNEL_COLOUR": "green"})
    colour = "import os; print(os.environ['KERNEL_COLOUR'], os.environ['SLURM_JOB_ID'])"
    before = await ask(alice, kernel_id, colour)
    await asyncio.to_thread(gateway.restart, signal.SIGKILL)
    one = LastingFrontend(alice, kernel_id)
    sleeping = await one.send("import time\nkept = 1\nprint('on', flush=True)\ntime.sleep(300)")
    await one.until(lambda one: "on" in one.printed(sleeping))
    await alice.request("POST", f"/api/kernels/{kernel_id}/interrupt")
    assert (await one.result(sleeping))[0]["ename"] == "KeyboardInterrupt"
    await alice.request("POST", f"/api/kernels/{kernel_id}/restart")
    assert (await one.execute("print('kept' in globals())"))[1] == "False\n"
    assert (await one.execute(colour))[1].strip() == before
    await one.close()
    await stop(alice, kernel_id)
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)


async def test_a_kernel_whose_job_ended_meanwhile_is_shown_with_its_reason(gateway, kernelspecs, cluster):
    """Its user learns why; it is not simply gone, and not started again."""
    alice = gateway.of("alice")
    kernel_id = await start(alice)
    jobid = await ask(alice, kernel_id, JOB)
    gateway.signal(signal.SIGKILL)
    slurm("scancel", jobid, cluster=cluster)
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)
    gateway.begin()
    gateway.until_listening()
    model = await until_dead(alice, kernel_id)
    assert jobid in model["reason"]


async def test_what_is_left_running_is_said(gateway, kernelspecs):
    """On SIGTERM one line has how many kernels, in which jobs, and for how long; the exit status is 0."""
    alice = gateway.of("alice")
    kernel_id = await start(alice)
    jobid = await ask(alice, kernel_id, JOB)
    assert gateway.signal(signal.SIGTERM) == 0
    log = gateway.log.read_text()
    line = next(line for line in reversed(log.splitlines()) if "left running" in line)
    assert "1 kernel left running" in line
    assert jobid in line
    assert "900 s" in line
    assert "Traceback" not in log


async def test_kernels_end_with_a_gateway_that_is_told_so(gateway_environment, kernelspecs, cluster):
    """--kill-kernels: SIGTERM ends kernels and jobs, waiting ones too."""
    with lasting_gateway(gateway_environment / "killing", "--kill-kernels") as gateway:
        alice = gateway.of("alice")
        kernel_id = await start(alice)
        await ask(alice, kernel_id, "1")
        await start(gateway.of("bob"))
        assert gateway.signal(signal.SIGTERM) == 0
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)


async def test_a_start_that_still_waits_is_given_up_with_the_gateway(gateway, kernelspecs, cluster):
    """No client could learn of its kernel: its job ends."""
    await start(gateway.of("alice"), env={"KERNEL_SLURM_NODES": "4", "KERNEL_SLURM_CPUS": "8"})
    await start(gateway.of("bob"), env={"KERNEL_SLURM_NODES": "4", "KERNEL_SLURM_CPUS": "8"})
    assert await poll_async(lambda: any("PENDING" in line for line in jobs_of(cluster)), timeout=READY)
    assert gateway.signal(signal.SIGTERM) == 0
    assert not any("PENDING" in line for line in jobs_of(cluster))


# -- others in front, and a Jupyter server that has the kernels itself ------------------------------------


async def test_a_jupyter_server_in_front_goes_on_after_the_gateways_restart(gateway, gateway_environment, kernelspecs):
    """Its user's cell runs through it; the server finds its kernels and sessions again."""
    environment = {"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.of("alice").token}
    directory = gateway_environment / "front"
    with lasting_server(directory, f"--gateway-url={gateway.url}", environment=environment) as front:
        me = front.of("me")
        body = {"path": "b.ipynb", "name": "b.ipynb", "type": "notebook", "kernel": {"name": "slurm"}}
        session = await me.json("POST", "/api/sessions", body)
        one = LastingFrontend(me, session["kernel"]["id"])
        cell = await one.send(COUNT.format(300))
        await one.until(lambda one: "30\n" in one.printed(cell))
        await asyncio.to_thread(gateway.restart, signal.SIGKILL)
        reply, printed = await one.result(cell)
        assert (reply["status"], without_repeats(printed)) == ("ok", numbers(300))
        assert (await one.execute("print(number)"))[1] == "299\n"
        assert [found["id"] for found in await me.json("GET", "/api/sessions")] == [session["id"]]
        await one.close()
        await me.request("DELETE", f"/api/sessions/{session['id']}")


@ENDINGS
async def test_a_jupyter_server_has_its_kernels_and_notebooks_again(gateway_environment, kernelspecs, cluster, signum):
    """With the kernel manager class, and nothing else set: a notebook's cell runs through the restart."""
    option = "--ServerApp.kernel_manager_class=gateway_slurm.SlurmMappingKernelManager"
    with lasting_server(gateway_environment / "login", option) as server:
        me = server.of("me")
        body = {"path": "c.ipynb", "name": "c.ipynb", "type": "notebook", "kernel": {"name": "slurm"}}
        session = await me.json("POST", "/api/sessions", body)
        one = LastingFrontend(me, session["kernel"]["id"])
        cell = await one.send(COUNT.format(300))
        await one.until(lambda one: "30\n" in one.printed(cell))
        await asyncio.to_thread(server.restart, signum)
        reply, printed = await one.result(cell)
        assert (reply["status"], without_repeats(printed, signum)) == ("ok", numbers(300))
        assert [found["id"] for found in await me.json("GET", "/api/sessions")] == [session["id"]]
        assert (await me.json("POST", "/api/sessions", body))["id"] == session["id"]
        assert (await one.execute("print(number)"))[1] == "299\n"
        await one.close()
        await me.request("DELETE", f"/api/sessions/{session['id']}")
        assert await me.json("GET", "/api/kernels") == []
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)


# -- a response port that another process has ---------------------------------------------------------


@contextmanager
def taken(port):
    """Another process's listener on the port; yields what ends it."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", port))
        other.listen()
        yield other.close


async def answer_to(server, method, path):
    """Status and message of a request."""
    try:
        response = await server.request(method, path)
    except HTTPClientError as error:
        said = json.loads(error.response.body)
        return error.code, said.get("message") or said.get("reason")
    return response.code, ""


SERVERS = {"gateway": (lasting_gateway, "alice", ()), "server": (lasting_server, "me", (KEEPING,))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SERVERS)
async def test_kernels_are_restored_once_their_response_port_is_free_again(
    gateway_environment, kernelspecs, admin_settings, cluster, kind
):
    """Until then each request for them is 503 with the reason, never 404; no work is lost."""
    port = free_port()
    # In a deployment of its own: the other gateway would take the kernel over, and its port.
    admin_settings(response_port=str(port), deployment=f"taken-{kind}")
    lasting, user, options = SERVERS[kind]
    with lasting(gateway_environment / f"taken-{kind}", *options) as server:
        kernel_id = await start(server.of(user))
        path = f"/api/kernels/{kernel_id}"
        try:
            assert await ask(server.of(user), kernel_id, "kept = 6; print(kept)") == "6"
            server.signal(signal.SIGKILL)
            with taken(port) as leave:
                server.begin()
                await asyncio.to_thread(server.until_listening)
                assert (await answer_to(server.of(user), "GET", path))[0] == 503
                assert await poll_async(lambda: "not restored yet" in server.log.read_text(), timeout=READY)
                for method, verb in (("GET", ""), ("POST", "/interrupt"), ("DELETE", "")):
                    status, message = await answer_to(server.of(user), method, path + verb)
                    assert (status, str(port) in message) == (503, True), (method, verb, message)
                if kind == "gateway":
                    assert (await answer_to(server.of(user), "POST", f"{path}/restart"))[0] == 503
                    assert (await answer_to(server.of(user), "GET", "/api/kernels"))[0] == 503
                    assert (await answer_to(server.of(user), "GET", "/health/ready"))[0] == 503
                leave()
            for _attempt in range(900):
                if (await answer_to(server.of(user), "GET", path))[0] != 503:
                    break
                await asyncio.sleep(0.1)
            assert await ask(server.of(user), kernel_id, "print(kept)") == "6"
        finally:
            await stop(server.of(user), kernel_id)
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)


async def test_an_earlier_gateways_port_is_taken_over_once_it_is_free(gateway, frontend):
    """Without a configured port launchers know the earlier gateway's alone: their kernels are there, and come back."""
    assert (await frontend.execute("kept = 7; print(kept)"))[1] == "7\n"
    announced = re.findall(r"listening, announced as \S+:([0-9]+)", gateway.log.read_text())
    gateway.signal(signal.SIGKILL)
    with taken(int(announced[-1])) as leave:
        gateway.begin()
        await asyncio.to_thread(gateway.until_listening)
        assert (await answer_to(gateway.of("alice"), "GET", f"/api/kernels/{frontend.kernel_id}"))[0] == 200
        assert await poll_async(
            lambda: f"another process has port {announced[-1]}" in gateway.log.read_text(), timeout=READY
        )
        leave()
    assert (await frontend.execute("print(kept)"))[1] == "7\n"


# -- sockets of a service manager -----------------------------------------------------------------------

# As systemd starts a service with sockets (sd_listen_fds(3)): they are the descriptors from 3 on.
ACTIVATE = """
import fcntl, os, sys
copies = [fcntl.fcntl(int(text), fcntl.F_DUPFD, 20) for text in sys.argv[1:3]]
for number, copy in enumerate(copies, 3):
    os.dup2(copy, number)
    os.close(copy)
os.environ |= {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "http:response", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[3], sys.argv[3:])
"""


class Activator:
    """Has two sockets, on which it starts one gateway after the other."""

    def __init__(self, directory):
        self.sockets = [socket.create_server(("127.0.0.1", 0)), socket.create_server(("", 0))]
        self.ports = [listening.getsockname()[1] for listening in self.sockets]
        self.argv, self.log = [*gateway_argv(directory), "--port=1"], directory / "gateway.log"
        self.url = f"http://127.0.0.1:{self.ports[0]}"
        self.begin()

    def begin(self):
        descriptors = [listening.fileno() for listening in self.sockets]
        argv = [sys.executable, "-c", ACTIVATE, *map(str, descriptors), *self.argv]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, pass_fds=descriptors, start_new_session=True)

    def of(self, user):
        return Server(self.process, self.url, made_tokens()[1][user], self.log)

    def end(self):
        self.process.kill()
        self.process.wait()
        for listening in self.sockets:
            listening.close()


@pytest.mark.slow
async def test_a_gateway_serves_on_the_sockets_of_its_service_manager(
    gateway_environment, kernelspecs, admin_settings, cluster
):
    """They stay open while it is restarted: requests wait, no other process takes a port, and kernels are back."""
    admin_settings(deployment="activated")
    activator = Activator(gateway_environment / "activated")
    try:
        kernel_id = await start(activator.of("alice"))
        assert await ask(activator.of("alice"), kernel_id, "kept = 8; print(kept)") == "8"
        assert f":{activator.ports[1]}" in activator.log.read_text().partition("announced as")[2]
        activator.process.kill()
        activator.process.wait()
        waiting = asyncio.ensure_future(activator.of("alice").json("GET", f"/api/kernels/{kernel_id}"))
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("", activator.ports[1])).close()
        activator.begin()
        assert (await waiting)["id"] == kernel_id
        assert await ask(activator.of("alice"), kernel_id, "print(kept)") == "8"
        await stop(activator.of("alice"), kernel_id)
    finally:
        activator.end()
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)


# -- a start that cannot be ---------------------------------------------------------------------------------


async def test_a_store_that_cannot_be_used_is_told_in_words(gateway_environment, kernelspecs, monkeypatch, tmp_path):
    """The gateway ends with an exit status, and without a traceback."""
    state = tmp_path / "state"
    state.write_text("this is no directory")
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    with lasting_gateway(gateway_environment / "storeless") as gateway:
        assert await asyncio.to_thread(gateway.process.wait, READY) == 1
        log = gateway.log.read_text()
    assert "the gateway cannot be started" in log
    assert "Traceback" not in log


def import_seconds():
    """How long this machine takes at the moment for what a gateway imports; 1.0 s where it has nothing else to do."""
    begun = time.monotonic()
    code = "import sys; sys.modules['rfc3987_syntax'] = None; import gateway_slurm.gateway.app"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=READY)
    return time.monotonic() - begun


@pytest.mark.slow
async def test_the_first_cell_runs_five_seconds_after_the_gateway_was_killed(gateway, kernelspecs):
    """With twenty kernels that count, from kill -9 to the reply; what each printed has no hole.

    Where other work has the machine's cores, as many times as long.
    """
    alice = gateway.of("alice")
    ids = await asyncio.gather(*(start(alice) for _ in range(20)))
    ones = [LastingFrontend(alice, kernel_id) for kernel_id in ids]
    await asyncio.gather(*(one.execute("1") for one in ones))
    slowly = COUNT.replace("0.02", "0.2")
    cells = await asyncio.gather(*(one.send(slowly.format(100)) for one in ones[1:]))
    await ones[1].until(lambda one: "5\n" in one.printed(cells[0]))
    load = max(1.0, await asyncio.to_thread(import_seconds))
    begun = time.monotonic()
    await asyncio.to_thread(gateway.restart, signal.SIGKILL)
    assert (await ones[0].execute("print(6 * 7)"))[1] == "42\n"
    took = time.monotonic() - begun
    for one, cell in zip(ones[1:], cells, strict=True):
        assert without_repeats((await one.result(cell))[1]) == numbers(100)
    for one in ones:
        await one.close()
    assert took < 5 * load, f"{took:.2f} s, where the imports take {load:.2f} s"
