"""One journal of a kernel's output: any frontend has all of it, whichever page, session or gateway asked for it."""

from __future__ import annotations

import asyncio
import signal

import pytest
from tornado.httpclient import HTTPClientError

from gateway_slurm.testing.processes import free_port
from helpers.gateway_process import start, stop, stop_all
from helpers.kernel_clients import READY, write_admin_settings
from helpers.notebook_server import V1, Frontend
from helpers.restarting_servers import LastingFrontend, lasting_gateway
from helpers.tcp_proxy import tcp_proxy_to

NAME = "physics.python"  # the gateway's own, which it has for as long as it has the kernel
COUNT = "import time\nfor number in range({}):\n    print(number, flush=True)\n    time.sleep({})\n"
DIES = "import os, signal, time\nprint('begun', flush=True)\ntime.sleep(0.5)\nos.kill(os.getpid(), signal.SIGKILL)"
PIECE = 10_000_000


def numbers(count, first=0):
    """What the counting cell prints."""
    return "".join(f"{number}\n" for number in range(first, count))


@pytest.fixture(scope="module")
def proxy():
    """Through it the launchers dial the gateway."""
    with tcp_proxy_to(free_port()) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def gateway(gateway_environment, proxy):
    """One gateway after the other, for the tests here."""
    settings = write_admin_settings(response_port=str(proxy.target_port), response_address=f"127.0.0.1:{proxy.port}")
    with lasting_gateway(gateway_environment / "journal") as gateway:
        yield gateway
    settings.unlink()


@pytest.fixture(scope="module")
def alice(gateway):
    """Her requests."""
    return gateway.of("alice")


@pytest.fixture(scope="module")
def module_kernel(alice):
    """alice's kernel, which the tests here share."""
    kernel_id = asyncio.run(start(alice, NAME))
    yield kernel_id
    asyncio.run(stop_all(alice))


@pytest.fixture
async def kernel_id(alice, module_kernel):
    """The kernel, idle; it is restarted after a test that leaves it busy."""
    yield module_kernel
    kernel = f"/api/kernels/{module_kernel}"
    if (await alice.json("GET", kernel))["execution_state"] != "idle":
        await alice.request("POST", f"{kernel}/restart")


async def execution(server, kernel_id, msg_id):
    """What the gateway knows of one cell."""
    return await server.json("GET", f"/api/kernels/{kernel_id}/executions/{msg_id}")


async def until_status(server, kernel_id, msg_id, status):
    """Poll the execution until it has this status; return it."""
    for _ in range(10 * READY):
        model = await execution(server, kernel_id, msg_id)
        if model["status"] == status:
            return model
        await asyncio.sleep(0.1)
    raise AssertionError(f"it never was {status}: {model}")


def printed(outputs):
    """The text of all streams, of an execution's outputs or of messages."""
    return "".join(str(one.get("content", one).get("text", "")) for one in outputs)


def lines_once(text, repeats):
    """The text without lines that came twice, which are so many at most."""
    lines = text.splitlines(keepends=True)
    once = list(dict.fromkeys(lines))
    assert len(lines) - len(once) <= repeats, text
    return "".join(once)


# -- another page ---------------------------------------------------------------------------------------------


async def test_a_reloaded_page_has_a_running_cells_output_from_before_and_from_then_on(alice, kernel_id):
    """A new session hears it from then on; with the execution's outputs and ``since`` it has it whole, none twice."""
    first = await Frontend.connect(alice, kernel_id)
    cell = await first.run(COUNT.format(150, 0.02), "the-cell")
    while "20\n" not in str((await first.receive())["content"].get("text")):
        pass
    first.close()
    reloaded = await Frontend.connect(alice, kernel_id)
    model = await execution(alice, kernel_id, cell)
    assert (model["msg_id"], model["session"], model["cell_id"]) == (cell, first.session_id, "the-cell")
    assert (model["status"], model["running"], model["ended"]) == ("running", True, None)
    before = printed(model["outputs"])
    assert before.startswith(numbers(21))
    since = await Frontend.connect(alice, kernel_id, V1, since=model["number"])
    from_then_on, after = await asyncio.wait_for(asyncio.gather(reloaded.output(cell), since.output(cell)), READY)
    assert before + printed(after) == numbers(150)
    heard = printed(from_then_on).split()
    assert heard == numbers(150, int(heard[0])).split()
    assert int(heard[0]) <= len(before.split())
    model = await execution(alice, kernel_id, cell)
    assert printed(model["outputs"]) == numbers(150)
    assert (model["status"], model["running"], model["dropped"]) == ("ok", False, 0)
    assert model["ended"] >= model["started"] >= model["queued"]
    since.close()
    reloaded.close()


async def test_the_executions_of_a_kernel_are_listed_with_their_outputs_as_a_notebook_has_them(
    gateway, alice, kernel_id
):
    """Newest first; a bar is one line, a display is its last update; only the kernel's owner sees them."""
    frontend = await Frontend.connect(alice, kernel_id)
    bar = "import sys\nfor n in range(1000): sys.stdout.write(f'\\r{n}'); sys.stdout.flush()\n"
    shown = "h = display({'text/plain': 'old'}, raw=True, display_id=True)"
    cells = {
        "bar": bar,
        "shown": shown,
        "updated": "h.update({'text/plain': 'new'}, raw=True)\n1 + 1",
        "fails": "print('before'); 1/0",
    }
    ids = {}
    for name, code in cells.items():
        ids[name] = await frontend.run(code, name)
        await frontend.result(ids[name])
    path = f"/api/kernels/{kernel_id}/executions"
    listed = await alice.json("GET", f"{path}?limit=4")
    assert [one["msg_id"] for one in listed] == list(reversed(ids.values()))
    assert [one["status"] for one in listed] == ["error", "ok", "ok", "ok"]
    assert [one["msg_id"] for one in await alice.json("GET", f"{path}?cell_id=bar")] == [ids["bar"]]
    outputs = {name: (await execution(alice, kernel_id, msg_id))["outputs"] for name, msg_id in ids.items()}
    (line,) = outputs["bar"]
    assert (line["output_type"], line["name"], line["text"]) == ("stream", "stdout", "999")
    (display,) = outputs["shown"]
    assert (display["output_type"], display["data"]) == ("display_data", {"text/plain": "new"})
    (result,) = outputs["updated"]
    assert (result["output_type"], result["data"]) == ("execute_result", {"text/plain": "2"})
    assert [one["output_type"] for one in outputs["fails"]] == ["stream", "error"]
    assert outputs["fails"][1]["ename"] == "ZeroDivisionError"
    assert await alice.status("GET", f"{path}/none-of-it") == 404
    for other in ("", f"/{ids['bar']}"):
        assert await gateway.of("bob").status("GET", path + other) == 404
    frontend.close()


async def test_another_session_answers_an_input_whose_page_has_gone(alice, kernel_id):
    """The question is in the execution; any session of the kernel answers it, and the cell goes on."""
    first = await Frontend.connect(alice, kernel_id)
    cell = await first.run("name = input('who? ')\nprint('hello', name)")
    while (await first.receive())["msg_type"] != "input_request":
        pass
    first.close()
    second = await Frontend.connect(alice, kernel_id)
    model = await execution(alice, kernel_id, cell)
    assert (model["status"], model["input"]) == ("running", {"prompt": "who? ", "password": False})
    await second.send("stdin", "input_reply", {"status": "ok", "value": "ada"})
    assert printed(await asyncio.wait_for(second.output(cell), READY)) == "hello ada\n"
    model = await until_status(alice, kernel_id, cell, "ok")
    assert model["input"] is None
    second.close()


async def test_a_cell_whose_kernel_was_restarted_while_its_page_was_away_ends_on_its_return(alice, kernel_id):
    """The kernel died under it and the restarter started the next process: the cell has an error and its end, once."""
    first = await Frontend.connect(alice, kernel_id)
    number = (await execution(alice, kernel_id, await _one_cell(first)))["number"]
    cell = await first.begin(DIES, "begun")
    first.close()
    model = await until_status(alice, kernel_id, cell, "restarted")
    assert printed(model["outputs"]).startswith("begun\n")
    back = await Frontend.connect(alice, kernel_id, session_id=first.session_id)
    found = {"error": [], "execute_reply": [], "status": []}

    async def read_on() -> None:
        while not found["execute_reply"] or "idle" not in found["status"]:
            message = await back.receive()
            if message["parent_header"].get("msg_id") == cell and message["msg_type"] in found:
                content = message["content"]
                found[message["msg_type"]].append(content.get("ename") or content["execution_state"])

    await asyncio.wait_for(read_on(), READY)
    await asyncio.wait_for(back.until_ready(), READY)
    assert found == {
        "error": ["KernelRestarted"],
        "execute_reply": ["KernelRestarted"],
        "status": [*found["status"][:-1], "idle"],
    }
    assert (await back.execute("print('begun' in globals())"))[1] == "False"
    # A number of the earlier process is as good as any.
    later = await Frontend.connect(alice, kernel_id, since=number)
    text = ""
    last = await later.run("print('and on')")
    while "and on" not in text:
        text += printed([await asyncio.wait_for(later.receive(), READY)])
    assert text == "begun\nFalse\nand on\n"
    await later.result(last)
    later.close()
    back.close()


async def _one_cell(frontend):
    msg_id = await frontend.run("print('one')")
    await frontend.result(msg_id)
    return msg_id


# -- numbers --------------------------------------------------------------------------------------------------


async def test_a_number_that_the_journal_does_not_have(alice, kernel_id):
    """One from the future begins now; what is no number is refused with 400."""
    frontend = await Frontend.connect(alice, kernel_id)
    cell = await _one_cell(frontend)
    future = await Frontend.connect(alice, kernel_id, since=10**9)
    assert (await future.execute("print('two')"))[1] == "two"
    now = await Frontend.connect(alice, kernel_id, since=0)
    assert printed(await asyncio.wait_for(now.output(cell), READY)) == "one\n"
    for wrong in ("one", "-1", "1.5"):
        with pytest.raises(HTTPClientError) as refused:
            await Frontend.connect(alice, kernel_id, since=wrong)
        assert refused.value.code == 400, wrong
    for one in (frontend, future, now):
        one.close()


# -- gateways and links that break ----------------------------------------------------------------------------


async def test_executions_outlive_a_gateway_that_is_killed_as_a_message_arrives(gateway, alice, kernel_id):
    """The next one has the same outputs; the running cell goes on and ends; only the last message may come twice."""
    frontend = LastingFrontend(alice, kernel_id)
    done = await frontend.send("print('done')\n1 + 1")
    failed = await frontend.send("1/0")
    for cell in (done, failed):
        await frontend.result(cell)
    before = [await execution(alice, kernel_id, cell) for cell in (done, failed)]
    listed = await alice.json("GET", f"/api/kernels/{kernel_id}/executions")
    running = await frontend.send(COUNT.format(60, 0.1))
    for mark in ("\n3\n", "\n45\n"):
        # At once: the gateway has no time to acknowledge what was printed last.
        await frontend.until(lambda one, mark=mark: mark in one.printed(running), interval=0)
        await asyncio.to_thread(gateway.restart, signal.SIGKILL)
    model = await execution(alice, kernel_id, running)
    assert numbers(60).startswith(printed(model["outputs"]))
    reply, text = await frontend.result(running)
    assert reply["status"] == "ok"
    assert len(frontend.replies(running)) == 1
    assert lines_once(text, repeats=2) == numbers(60)
    model = await until_status(alice, kernel_id, running, "ok")
    assert (printed(model["outputs"]), model["dropped"]) == (numbers(60), 0)
    for cell, known in zip((done, failed), before, strict=True):
        again = await execution(alice, kernel_id, cell)
        names = ("status", "outputs", "execution_count", "session", "queued", "started", "ended")
        assert [again[name] for name in names] == [known[name] for name in names]
    ids = [one["msg_id"] for one in await alice.json("GET", f"/api/kernels/{kernel_id}/executions")]
    assert ids == [running, *[one["msg_id"] for one in listed]]
    await frontend.close()


@pytest.mark.slow
async def test_a_link_that_breaks_in_the_middle_of_a_large_message_loses_nothing(alice, proxy, kernel_id):
    """Ten messages of 10 MB, and the link breaks in them: each comes once, whole, and in order."""
    own = await start(alice, NAME)  # its launcher dials now, by the proxy
    frontend = await Frontend.connect(alice, own, V1)
    await frontend.execute("1")
    assert proxy.round_trips > 0
    cell = await frontend.run(f"for number in range(10): print(f'{{number:02d}}' * {PIECE // 2}, flush=True)")
    text = ""
    while "\n" not in text:
        text += str((await frontend.receive())["content"].get("text", ""))
    proxy.cut()
    proxy.mend()
    text += printed(await asyncio.wait_for(frontend.output(cell), READY))
    assert [(line[:2], len(line)) for line in text.split()] == [(f"{number:02d}", PIECE) for number in range(10)]
    frontend.close()
    await stop(alice, own)
