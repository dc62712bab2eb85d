"""A Jupyter server whose kernels may wait in Slurm's queue, by one line of its configuration."""

from __future__ import annotations

import asyncio
import json
import os
import time

import pytest

from helpers.failing_starts import all_nodes_taken
from helpers.gateway_process import running_gateway, until_dead
from helpers.kernel_clients import JOB, install_kernelspec, jupyter_files_in, poll_async
from helpers.large_output import relay_small_and_large
from helpers.notebook_server import V1, Frontend, HTTPClientError, running_server
from helpers.private_slurm import jobs_of, slurm

MANAGER = "gateway_slurm.SlurmMappingKernelManager"


@pytest.fixture(scope="module")
def module_server(cluster, jupyter_base):
    """One server for the tests here."""
    with jupyter_files_in(jupyter_base):
        directory = jupyter_base / "waiting"
        directory.mkdir()
        with running_server(directory, f"--ServerApp.kernel_manager_class={MANAGER}") as server:
            yield server


@pytest.fixture
def server(module_server, kernelspecs):
    """The server, with kernelspecs."""
    return module_server


@pytest.fixture
def gateway(cluster, jupyter_base, kernelspecs, tmp_path):
    """The shared gateway, whose kernel manager is the same."""
    with running_gateway(tmp_path / "gateway") as gateway:
        yield gateway


async def start(server, name, **body):
    """POST /api/kernels; the kernel's model."""
    return await server.json("POST", "/api/kernels", {"name": name, **body})


async def model(server, kernel_id):
    """GET the kernel's model; None when there is none."""
    try:
        return await server.json("GET", f"/api/kernels/{kernel_id}")
    except HTTPClientError as error:
        if error.code != 404:
            raise
        return None


async def delete(server, kernel_id):
    """DELETE the kernel; return the seconds that it took."""
    began = time.monotonic()
    await server.request("DELETE", f"/api/kernels/{kernel_id}")
    return time.monotonic() - began


async def until_waiting(server, kernel_id):
    """The kernel's model once Slurm has said why its job waits."""
    for _ in range(200):
        found = await model(server, kernel_id)
        if found.get("slurm", {}).get("reason") not in (None, "", "None"):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"Slurm's reason never came: {found}")


@pytest.mark.parametrize("protocol", ["", V1], ids=["json", "v1"])
async def test_a_cell_that_is_run_while_its_kernel_waits_runs_once_it_is_there(server, cluster, protocol):
    """POST and the websocket answer at once; the model tells where the job waits; the early cell has its output."""
    with all_nodes_taken(cluster):
        kernel = await start(server, "slurm")
        assert kernel["execution_state"] == "starting"
        frontend = await Frontend.connect(server, kernel["id"], protocol)
        waiting = await until_waiting(server, kernel["id"])
        assert waiting["slurm"]["state"] == "PENDING"
        assert waiting["slurm"]["place"] == 1
        job = f"job {waiting['slurm']['jobid']} in partition batch ({waiting['slurm']['reason']})"
        assert waiting["slurm"]["waiting"].startswith(f"Waiting for {job}: number 1 in the queue")
        assert "reason" not in waiting
        early = await frontend.send("shell", "execute_request", {"code": JOB, "silent": False})
    _reply, printed = await frontend.result(early)
    assert printed == waiting["slurm"]["jobid"]
    running = await model(server, kernel["id"])
    directory = {"path": os.environ["HOME"], "why": ""}
    connect = {"mode": "tunnel", "why": "the kernel does not declare CurveZMQ (supported_encryption)"}
    assert running["slurm"].pop("node") in ("c1", "c2")
    assert running["slurm"] == {"jobid": printed, "connect": connect, "directory": directory}
    assert "reason" not in running
    frontend.close()
    await delete(server, kernel["id"])
    assert await model(server, kernel["id"]) is None


async def test_a_waiting_kernel_is_deleted_within_a_second_and_its_job_goes_with_it(server, cluster):
    """DELETE of a pending start answers within the time of a scancel, and closes the websocket."""
    with all_nodes_taken(cluster) as blocker:
        seconds = [await seconds_of_delete(server, cluster, blocker) for _ in range(3)]
        assert min(seconds) < 1, seconds


async def test_a_waiting_kernel_is_deleted_within_a_second_at_the_gateway_too(gateway, cluster):
    """The same for a user of the shared gateway."""
    with all_nodes_taken(cluster) as blocker:
        seconds = [await seconds_of_delete(gateway.of("alice"), cluster, blocker) for _ in range(3)]
        assert min(seconds) < 1, seconds


async def seconds_of_delete(server, cluster, blocker):
    """Delete a kernel that waits, which leaves neither a job nor a websocket; what it took.

    The best of several is the server's own time: another job of this machine may hold up one.
    """
    kernel = await start(server, "slurm")
    frontend = await Frontend.connect(server, kernel["id"])
    await until_waiting(server, kernel["id"])
    seconds = await delete(server, kernel["id"])
    assert await model(server, kernel["id"]) is None
    assert await poll_async(lambda: [line.split()[0] for line in jobs_of(cluster)] == [blocker], timeout=10)
    await frontend.until_closed()
    return seconds


@pytest.mark.parametrize("kind", ["server", "gateway"])
async def test_the_wait_is_under_the_first_cell_and_an_interrupt_gives_it_up(request, cluster, kind):
    """The text appears once in each session, and goes before the answer; a restart answers at once, and goes on."""
    found = request.getfixturevalue(kind)
    server = found if kind == "server" else found.of("alice")
    with all_nodes_taken(cluster):
        kernel = await start(server, "slurm")
        path = f"/api/kernels/{kernel['id']}"
        first, second = [await Frontend.connect(server, kernel["id"]) for _ in range(2)]
        cells = [await first.run("print(1)"), await first.run("print(2)")]
        other = await second.run("print(3)")
        for frontend, cell in ((first, cells[0]), (second, other)):
            text = await shown_under(frontend, cell)
            assert text.startswith(f"Waiting for job {kernel['slurm']['jobid']} in partition batch")
            assert text.endswith("Interrupt the kernel to give it up.")

        began = time.monotonic()
        assert (await server.json("POST", f"{path}/restart"))["slurm"]["waiting"].startswith("Waiting for job ")
        assert time.monotonic() - began < 2
        for frontend, cell in ((first, cells[0]), (first, cells[1]), (second, other)):
            assert "run this cell again" in await refused(frontend, cell)

        again = await first.run("print(4)")
        await shown_under(first, again)
        began = time.monotonic()
        await server.request("POST", f"{path}/interrupt")
        assert time.monotonic() - began < 5
        reason = await refused(first, again)
        assert f"given up by an interrupt while it waited for job {kernel['slurm']['jobid']}" in reason
        dead = await model(server, kernel["id"])
        assert (dead["execution_state"], dead["reason"]) == ("dead", reason)
        assert await poll_async(lambda: len(jobs_of(cluster)) == 1, timeout=10)
        await delete(server, kernel["id"])


async def shown_under(frontend, cell):
    """The first text that is shown under the cell."""
    while (message := await frontend.receive())["msg_type"] != "display_data":
        pass
    assert message["parent_header"]["msg_id"] == cell
    assert message["content"]["transient"]["display_id"]
    return message["content"]["data"]["text/plain"]


async def refused(frontend, cell):
    """The reason that ends the cell, under which nothing else is left."""
    shown, reply, idle = [], None, False
    while reply is None or not idle:
        message = await frontend.receive()
        if message["parent_header"].get("msg_id") != cell:
            continue
        if message["msg_type"] == "clear_output":
            assert message["content"] == {"wait": False}
            shown = []
        elif message["msg_type"] in ("error", "stream", "display_data"):
            shown.append(message["content"].get("traceback"))
        elif message["channel"] == "shell":
            reply = message["content"]
        idle = idle or message["content"].get("execution_state") == "idle"
    assert (reply["status"], shown) == ("error", [[reply["evalue"]]])
    return reply["evalue"]


@pytest.mark.parametrize("kind", ["server", "gateway"])
async def test_the_model_of_a_waiting_kernel_says_when_slurm_expects_it_to_start(request, cluster, kind):
    """It is the time that ``squeue --start`` has, which the backfill scheduler reckons from others' time limits."""
    found = request.getfixturevalue(kind)
    server = found if kind == "server" else found.of("alice")
    with all_nodes_taken(cluster, "--time=5"):
        kernel = await start(server, "slurm")
        waiting, at = await until_expected(server, kernel["id"], cluster)
        slurm_model = waiting["slurm"]
        assert time.time() < slurm_model["expected_start"] < time.time() + 400
        assert time.strftime("%H:%M", at) in slurm_model["waiting"]
        await delete(server, kernel["id"])


async def until_expected(server, kernel_id, cluster):
    """The kernel's model, once it has the expected start that squeue has, and that as local time."""
    for _ in range(300):
        waiting = await model(server, kernel_id)
        if (expected := waiting["slurm"].get("expected_start")) is not None:
            argv = ["squeue", "--start", "--noheader", "--format=%S", f"--jobs={waiting['slurm']['jobid']}"]
            told = slurm(*argv, cluster=cluster).stdout.strip()
            at = time.localtime(expected)
            # Slurm computes them each second: they are equal once both are from the same computation.
            if told == time.strftime("%Y-%m-%dT%H:%M:%S", at):
                return waiting, at
        await asyncio.sleep(0.1)
    raise AssertionError(f"Slurm's expected start never came: {waiting}; squeue: {told if expected else ''}")


async def test_the_server_stays_usable_while_kernels_wait(server, cluster):
    """Ten starts wait; each POST and each listing is answered at once."""
    with all_nodes_taken(cluster):
        began = time.monotonic()
        kernels = await asyncio.gather(*(start(server, "slurm") for _ in range(10)))
        listed = await server.json("GET", "/api/kernels")
        assert time.monotonic() - began < 5
        assert {one["id"] for one in listed} >= {one["id"] for one in kernels}
        await asyncio.gather(*(delete(server, one["id"]) for one in kernels))
        assert await server.json("GET", "/api/kernels") == []


async def test_a_start_that_slurm_refuses_is_refused_with_slurms_words(server, kernelspecs):
    """Kernels and sessions alike; a new kernel of a session, too; none is left, and no session."""
    install_kernelspec(kernelspecs, "wrong", config_overrides={"partition": "nowhere"})
    words = "Slurm refused the job (partition nowhere"
    status, body = await server.refusal("POST", "/api/kernels", {"name": "wrong"})
    assert (status, json.loads(body)["message"].startswith(words)) == (400, True)
    session = {"path": "a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "wrong"}}
    _status, body = await server.refusal("POST", "/api/sessions", session)
    assert json.loads(body)["message"].startswith(words)
    assert await server.json("GET", "/api/kernels") == await server.json("GET", "/api/sessions") == []


async def test_a_kernel_that_exits_at_once_shows_why_wherever_it_is_looked_at(server, kernelspecs):
    """The waiting cell has the reason, and so has a later one; a websocket of JupyterLab's is closed, and refused."""
    argv = ["sh", "-c", "sleep 2; echo no module >&2; exit 3"]
    install_kernelspec(kernelspecs, "exits", config_overrides={"kernel_argv": argv})
    kernel = await start(server, "exits")
    frontend, lab = [await Frontend.connect(server, kernel["id"], protocol) for protocol in ("", V1)]
    cells = [await one.run("print(1)") for one in (frontend, lab)]
    for one, cell in zip((frontend, lab), cells, strict=True):
        assert "no module" in await refused(one, cell)
    await lab.until_closed()
    assert lab.close_code == 1011  # after 1000 and 1001 JupyterLab would not look at the model
    dead = await model(server, kernel["id"])
    assert (dead["execution_state"], "no module" in dead["reason"]) == ("dead", True)
    with pytest.raises(HTTPClientError) as raised:
        await Frontend.connect(server, kernel["id"], V1)
    assert raised.value.code == 410
    late = await Frontend.connect(server, kernel["id"])
    assert await refused(late, await late.run("print(1)")) == dead["reason"]
    # Its users have seen the reason: it is not listed for longer, so that JupyterLab offers another kernel.
    await until_status(late, "dead")
    await late.until_closed()
    assert await model(server, kernel["id"]) is None


async def until_status(frontend, state):
    """Read until the kernel has this state."""
    while (message := await frontend.receive())["content"].get("execution_state") != state:
        pass
    assert message["msg_type"] == "status"


async def test_a_kernel_whose_job_is_cancelled_shows_as_dead_with_the_reason(server, kernel_name, cluster):
    """It stays in the list, dead, with Slurm's word; its frontend is not closed before a cell has the reason, too."""
    kernel = await start(server, kernel_name)
    frontend = await Frontend.connect(server, kernel["id"])
    _reply, jobid = await frontend.execute(JOB)
    slurm("scancel", jobid, cluster=cluster)
    dead = await until_dead(server, kernel["id"])
    assert "CANCELLED" in dead["reason"] or "signal" in dead["reason"]
    assert (await frontend.execute("1"))[0]["evalue"] == dead["reason"]
    await until_status(frontend, "dead")
    await frontend.until_closed()
    assert await model(server, kernel["id"]) is None


async def test_a_restart_holds_what_is_run_meanwhile(server, kernel_name):
    """A cell that is sent at once after a restart runs in the new kernel, and none of its output is missed."""
    kernel = await start(server, kernel_name)
    frontend = await Frontend.connect(server, kernel["id"])
    assert (await frontend.execute("kept = 1"))[0]["status"] == "ok"
    for _ in range(3):
        await server.request("POST", f"/api/kernels/{kernel['id']}/restart")
        reply, printed = await frontend.execute("print('kept' in globals(), end=''); print('!')")
        assert (reply["status"], printed) == ("ok", "False!")
    await delete(server, kernel["id"])


async def test_output_while_the_frontend_is_away_is_kept_for_its_return(server, kernel_name):
    """A websocket closes under a running cell; the same session's next one gets the rest, each line once."""
    kernel = await start(server, kernel_name)
    frontend = await Frontend.connect(server, kernel["id"])
    code = "import time\nfor number in range(40):\n    print(number, flush=True); time.sleep(0.05)"
    msg_id = await frontend.begin(code, "0")
    frontend.close()
    back = await Frontend.connect(server, kernel["id"], session_id=frontend.session_id)
    _reply, printed = await back.result(msg_id)
    numbers = [int(word) for word in printed.split()]
    assert numbers == list(range(numbers[0], 40))
    await delete(server, kernel["id"])


@pytest.mark.slow
async def test_many_small_and_much_large_output_arrive_whole_and_in_order(server, kernel_name):
    """10 000 single prints, then 100 MB: nothing is lost, and each comes after the one before it."""
    kernel = await start(server, kernel_name)
    frontend = await Frontend.connect(server, kernel["id"], V1)
    await relay_small_and_large(frontend)
    frontend.close()
    await delete(server, kernel["id"])
