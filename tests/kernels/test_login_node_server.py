"""A jupyter_server on the login node, with frontends at its websockets."""

from __future__ import annotations

import asyncio

import pytest

from helpers.kernel_clients import JOB, KERNEL_NAMES, READY, install_kernelspec, job_state, jupyter_files_in, poll_async
from helpers.notebook_server import V1, Frontend, HTTPClientError, running_server
from helpers.private_slurm import jobs_of, poll

FOREVER = "import time\nkept = 5\nprint('be' + 'gun', flush=True)\nwhile True: time.sleep(0.05)"


@pytest.fixture(scope="module")
def module_server(cluster, jupyter_base):
    """One server for the tests here; its kernelspecs are looked up at each request."""
    with jupyter_files_in(jupyter_base):
        directory = jupyter_base / "server"
        directory.mkdir()
        with running_server(directory) as server:
            yield server


@pytest.fixture
def server(module_server, kernelspecs):
    """The server, with kernelspecs; a kernel that a test leaves is a failure of the test."""
    return module_server


async def start(server, name):
    """POST /api/kernels, as frontends do."""
    return (await server.json("POST", "/api/kernels", {"name": name}))["id"]


async def kernels(server):
    """The ids of the server's kernels."""
    return [kernel["id"] for kernel in await server.json("GET", "/api/kernels")]


@pytest.mark.parametrize("protocol", ["", V1], ids=["json", "v1"])
async def test_a_frontend_executes_interrupts_restarts_and_deletes(server, kernel_name, protocol):
    """One session as a frontend has it: execute, interrupt and restart by REST, execute again, DELETE."""
    kernel_id = await start(server, kernel_name)
    frontend = await Frontend.connect(server, kernel_id, protocol)
    reply, jobid = await frontend.execute(JOB)
    assert reply["status"] == "ok"
    assert job_state(jobid) == "RUNNING"
    msg_id = await frontend.begin(FOREVER, "begun")
    await server.request("POST", f"/api/kernels/{kernel_id}/interrupt")
    assert (await frontend.result(msg_id))[0]["ename"] == "KeyboardInterrupt"
    assert (await frontend.execute("print(kept)"))[1] == "5"
    await server.request("POST", f"/api/kernels/{kernel_id}/restart")
    await frontend.until_ready()
    assert (await frontend.execute("print('kept' in globals())"))[1] == "False"
    assert (await frontend.execute(JOB))[1] == jobid
    frontend.close()
    await server.request("DELETE", f"/api/kernels/{kernel_id}")
    assert await kernels(server) == []
    assert await poll_async(lambda: job_state(jobid) == "", timeout=15)


async def test_input_comes_by_the_websocket(server):
    """``input()`` asks the frontend on the stdin channel."""
    kernel_id = await start(server, "slurm")
    frontend = await Frontend.connect(server, kernel_id)
    msg_id = await frontend.send(
        "shell", "execute_request", {"code": "print('hello', input('name? '))", "allow_stdin": True}
    )
    while (message := await frontend.receive())["msg_type"] != "input_request":
        pass
    assert message["content"]["prompt"] == "name? "
    await frontend.send("stdin", "input_reply", {"value": "ada", "status": "ok"})
    assert (await frontend.result(msg_id))[1].endswith("hello ada")
    await server.request("DELETE", f"/api/kernels/{kernel_id}")


async def test_an_idle_kernel_that_is_deleted_leaves_no_job(server, cluster, kernel_name):
    """DELETE of a kernel to which no client ever connected ends its job."""
    kernel_id = await start(server, kernel_name)
    await server.request("DELETE", f"/api/kernels/{kernel_id}")
    assert poll(lambda: jobs_of(cluster) == [], timeout=15)


async def test_sessions_start_and_end_kernels(server, cluster):
    """A notebook's session (POST /api/sessions) has a kernel; deleting the session ends its job."""
    body = {"path": "a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "slurm"}}
    session = await server.json("POST", "/api/sessions", body)
    frontend = await Frontend.connect(server, session["kernel"]["id"])
    assert (await frontend.execute("print(6 * 7)"))[1] == "42"
    await server.request("DELETE", f"/api/sessions/{session['id']}")
    assert poll(lambda: jobs_of(cluster) == [], timeout=15)


async def test_the_server_answers_while_a_kernel_waits_in_the_queue(server, kernelspecs, cluster):
    """A start that has to wait delays no other request; when its kernel is there, it works."""
    install_kernelspec(kernelspecs, "whole", config_overrides={"nodes": "4", "cpus": "8"})
    first = await start(server, "whole")
    second = asyncio.ensure_future(start(server, "whole"))
    assert await poll_async(lambda: any("PENDING" in line for line in jobs_of(cluster)), timeout=READY)
    loop = asyncio.get_running_loop()
    for _ in range(5):
        begun = loop.time()
        await server.json("GET", "/api/status")
        assert loop.time() - begun < 2
    assert not second.done()
    await server.request("DELETE", f"/api/kernels/{first}")
    frontend = await Frontend.connect(server, await second)
    assert (await frontend.execute("print(6 * 7)"))[1] == "42"
    await server.request("DELETE", f"/api/kernels/{await second}")


async def test_eight_kernels_start_at_once(server, cluster, kernel_name):
    """Eight POSTs at the same time give eight kernels in eight jobs."""
    ids = await asyncio.gather(*(start(server, kernel_name) for _ in range(8)))
    frontends = await asyncio.gather(*(Frontend.connect(server, kernel_id) for kernel_id in ids))
    answers = await asyncio.gather(*(frontend.execute(JOB) for frontend in frontends))
    assert len({jobid for _reply, jobid in answers}) == 8
    await asyncio.gather(*(server.request("DELETE", f"/api/kernels/{kernel_id}") for kernel_id in ids))
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=20)


async def test_a_refused_start_tells_the_frontend_slurms_words(server, kernelspecs):
    """A session for a partition that is not there fails at once, with what Slurm said in its message."""
    install_kernelspec(kernelspecs, "nowhere", config_overrides={"partition": "nowhere"})
    body = {"path": "b.ipynb", "name": "b.ipynb", "type": "notebook", "kernel": {"name": "nowhere"}}
    with pytest.raises(HTTPClientError) as caught:
        await server.json("POST", "/api/sessions", body)
    assert caught.value.code == 500
    assert "nvalid partition name" in caught.value.response.body.decode()
    assert await kernels(server) == []


async def test_a_killed_kernel_restarts_under_its_frontend(server, kernel_name):
    """After ``kill -9`` the open websocket hears of the restart, and executes again in the same job."""
    kernel_id = await start(server, kernel_name)
    frontend = await Frontend.connect(server, kernel_id)
    _reply, jobid = await frontend.execute(JOB)
    await frontend.send("shell", "execute_request", {"code": "import os; os.kill(os.getpid(), 9)"})
    while (await frontend.receive())["content"].get("execution_state") not in ("restarting", "autorestarting"):
        pass
    await frontend.until_ready()
    assert (await frontend.execute(JOB))[1] == jobid
    await server.request("DELETE", f"/api/kernels/{kernel_id}")


async def test_a_stranger_gets_nothing(server):
    """Without the token there is no kernel to be had."""
    with pytest.raises(HTTPClientError) as caught:
        await server.request("POST", "/api/kernels", {"name": "slurm"}, token="wrong")  # noqa: S106 - not one
    assert caught.value.code == 403


async def test_a_server_that_is_terminated_ends_its_kernels_jobs(cluster, kernelspecs, tmp_path):
    """SIGTERM of a server with kernels leaves no job."""
    with running_server(tmp_path) as server:
        for name in KERNEL_NAMES.values():
            frontend = await Frontend.connect(server, await start(server, name))
            assert (await frontend.execute("print(6 * 7)"))[1] == "42"
    assert poll(lambda: jobs_of(cluster) == [], timeout=15)
