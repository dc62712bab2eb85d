"""The table of attacks: what a hostile user, launcher, kernel or stranger does, and what must not come of it.

Each attack is a coroutine of the field. It returns where the attack failed, and raises AttackWorksError where it
worked. What Bob feels meanwhile, and the gateway's memory, are measured around it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from helpers.gateway_process import ask, start
from helpers.hostile import raw
from helpers.hostile.field import MEBIBYTE, Field, holds
from helpers.hostile.raw import ADA_ADDRESS, BINARY, CONTINUATION, STRANGERS_ADDRESS, TEXT, Page
from helpers.kernel_clients import poll_async
from helpers.notebook_server import HTTPClientError


@dataclass(frozen=True)
class Attack:
    """A row of the table."""

    subject: str
    name: str
    run: Callable[[Field], Awaitable[None]]
    memory: int = 200
    """MiB by which the gateway may grow meanwhile."""
    delays: bool = True
    """Whether Bob's times count: not where the gateway restarts."""
    is_mended: bool = True
    """Whether the tests run it; the table has all."""


# -- memory ----------------------------------------------------------------------------------------


async def print_at_once(field: Field) -> None:
    """Cells print up to half a gigabyte in one message, while a page is open."""
    async with field.kernel() as kernel_id, page(field, kernel_id) as one:
        one.discard()
        for size in (64, 200, 400, 500)[: field.many(2, 4)]:
            await one.send(raw.cell(f"print('x' * {size * MEBIBYTE})"))
        await asyncio.sleep(field.many(5, 25))


async def announced_frame(field: Field) -> None:
    """A kernel announces one frame of 3 GiB on shell, and sends it."""
    async with field.kernel(KERNEL_ANNOUNCE=str(3 << 30)) as kernel_id:
        with contextlib.suppress(ConnectionRefusedError):
            async with page(field, kernel_id) as one:
                one.discard()
                await one.send(raw.message("kernel_info_request", {}))
                await asyncio.sleep(field.many(4, 15))


async def stopped_kernel(field: Field) -> None:
    """Messages of 9 MiB to a kernel that is stopped."""
    async with field.kernel() as kernel_id, page(field, kernel_id) as one:
        one.discard()
        await ask(field.ada, kernel_id, "print(1)")
        await one.send(raw.cell("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"))
        await fill(one, raw.cell("#" * 9 * MEBIBYTE), field.many(40, 400))


async def waiting_kernel(field: Field) -> None:
    """Many sessions send large cells to a kernel whose job waits; afterwards all is given back."""
    before = field.memory()
    async with field.waiting_kernel() as kernel_id:
        data = raw.cell("#" * field.many(8, 14) * MEBIBYTE)
        pages: list[Page] = []
        with contextlib.suppress(ConnectionRefusedError):
            for _ in range(field.many(40, 150)):
                pages.append(await field.page(kernel_id))
                pages[-1].discard()
        holds(pages, "no page could be opened")
        await asyncio.gather(*(fill(one, data, 1) for one in pages))
        await asyncio.sleep(1)
        for one in pages:
            one.close()
    given_back = await poll_async(lambda: field.memory() - before < 150 * MEBIBYTE, timeout=10)
    holds(given_back, f"{(field.memory() - before) // MEBIBYTE} MiB are not given back")


async def fragments(field: Field) -> None:
    """Websocket messages of 11 MiB without their end, each on its own websocket."""
    async with field.kernel() as kernel_id:
        pages: list[Page] = []
        piece = b"x" * MEBIBYTE
        with contextlib.suppress(ConnectionRefusedError):
            for _ in range(field.many(40, 100)):
                pages.append(await field.page(kernel_id))
                pages[-1].discard()
        for number in range(11):
            for one in pages:
                with contextlib.suppress(OSError):
                    await one.send(piece, CONTINUATION if number else BINARY, final=False)
        for one in pages:
            one.close()


async def deaf_pages(field: Field) -> None:
    """Pages that read nothing, while their kernel prints."""
    async with field.kernel() as kernel_id:
        pages = [await field.page(kernel_id) for _ in range(field.many(10, 50))]
        await pages[0].send(raw.cell(f"kernel.flood({field.many(4, 15)}, 100_000)"))
        await asyncio.sleep(field.many(4, 15))
        for one in pages:
            one.close()


async def kept_output(field: Field) -> None:
    """The gateway restarts while eight kernels have 62 MiB of output that no page has read."""
    async with contextlib.AsyncExitStack() as stack:
        kernels = [await stack.enter_async_context(field.kernel()) for _ in range(field.many(4, 8))]
        code = f"for _ in range({field.many(30, 62)}): print('x' * {MEBIBYTE - 1000})"
        for kernel_id in kernels:
            one = await field.page(kernel_id)
            await one.send(raw.cell(code))
            one.close()
        await asyncio.sleep(3)
        await field.restart(signal.SIGKILL)
        for kernel_id in kernels:
            await field.until_back(field.ada, kernel_id)
        pages = [await field.page(kernel_id) for kernel_id in kernels]
        for one in pages:
            one.discard()
        await asyncio.sleep(field.many(3, 10))
        for one in pages:
            one.close()
        grown = (field.peak() - field.small_memory) // MEBIBYTE
        holds(grown < 450, f"the next gateway used {grown} MiB more than the one before at its start")


# -- without a token ---------------------------------------------------------------------------------


async def strangers_bodies(field: Field) -> None:
    """Four connections without a token, each with a body of 450 MiB."""
    head = f"POST /api/kernels HTTP/1.1\r\nHost: gateway\r\nContent-Length: {450 * MEBIBYTE}\r\n\r\n".encode()

    async def one() -> None:
        _reader, writer = await raw.connect(field.ada, STRANGERS_ADDRESS)
        writer.write(head)
        piece = b"x" * MEBIBYTE
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            for _ in range(field.many(100, 450)):
                writer.write(piece)
                await asyncio.wait_for(writer.drain(), 2)
        writer.transport.abort()

    await asyncio.gather(*(one() for _ in range(4)))


async def idle_connections(field: Field) -> None:
    """More connections of a stranger than the gateway has descriptors; Bob is still served."""
    writers = []
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        for _ in range(1500):
            connecting = raw.connect(field.ada, STRANGERS_ADDRESS)
            writers.append((await asyncio.wait_for(connecting, 2))[1])
    try:
        answered = await asyncio.wait_for(status(field, "GET", "/api/kernels"), 5)
        holds(answered == 200, f"Bob is answered {answered}")
    except (asyncio.TimeoutError, OSError, HTTPClientError) as error:
        holds(False, f"Bob is not answered beside {len(writers)} idle connections: {type(error).__name__}")
    finally:
        for writer in writers:
            writer.transport.abort()
    assert await poll_async(lambda: field.descriptors() < 500, timeout=30)


async def made_up_tokens(field: Field) -> None:
    """A flood of requests with tokens that do not exist; no user with a real one is refused."""

    async def flood() -> None:
        until = time.monotonic() + field.many(3, 10)
        while time.monotonic() < until:
            token = uuid.uuid4().hex
            with contextlib.suppress(OSError):
                await raw.request(field.ada, "GET", "/api/kernels", source=STRANGERS_ADDRESS, token=token)

    floods = asyncio.gather(*(flood() for _ in range(20)))
    while not floods.done():
        answered = await status(field, "GET", "/api/kernels")
        holds(answered == 200, f"Bob is answered {answered}")
        await asyncio.sleep(0.05)
    await floods


async def slow_head(field: Field) -> None:
    """A request whose head never ends is closed after a time."""
    reader, writer = await raw.connect(field.ada, STRANGERS_ADDRESS)
    writer.write(b"GET /api HTTP/1.1\r\nHost: gateway\r\nX-Slow: ")
    try:
        with contextlib.suppress(OSError):
            await asyncio.wait_for(reader.read(), 65)
    except asyncio.TimeoutError:
        holds(False, "the connection is open after 65 s")
    finally:
        writer.close()


# -- turns -------------------------------------------------------------------------------------------


async def printing(field: Field, user: str = "", seconds: float = 0, pages: int = 0) -> None:
    """A kernel prints as fast as it can, and many pages read it."""
    seconds = seconds or field.many(5, 15)
    async with field.kernel(user) as kernel_id:
        opened: list[Page] = []
        with contextlib.suppress(ConnectionRefusedError):
            for _ in range(pages or field.many(20, 60)):
                opened.append(await field.page(kernel_id, user))
                opened[-1].discard()
        await opened[0].send(raw.cell(f"kernel.flood({seconds}, 50)"))
        await asyncio.sleep(seconds)
        for one in opened:
            one.close()


MANY_VALUES = b"[" + b"[]," * (5 * MEBIBYTE) + b"[]]"


async def bodies_of_values(field: Field, user: str = "") -> None:
    """Requests with 16 MiB of ``[[],[],…``, in the body's JSON."""
    server = field.of(user or field.folk.ada)
    for _ in range(field.many(3, 10)):
        for path in ("/api/kernels", "/api/sessions"):
            with contextlib.suppress(OSError):
                await raw.request(server, "POST", path, b'{"name": "x", "path": ' + MANY_VALUES + b"}")
    await asyncio.sleep(0.5)


async def small_bodies_of_values(field: Field) -> None:
    """Requests whose bodies are as large as they may be, again and again."""
    body = b'{"name": "x", "path": ' + b"[" + b"[]," * 300_000 + b"[]]}"
    until = time.monotonic() + field.many(4, 10)
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            await asyncio.gather(*(raw.request(field.ada, "POST", "/api/kernels", body) for _ in range(8)))


async def websocket_values(field: Field) -> None:
    """Websocket messages of 16 MiB of ``[[],[],…``, in both protocols."""
    async with field.kernel() as kernel_id:
        legacy = await field.page(kernel_id, protocol="")
        binary = await field.page(kernel_id)
        header = json.dumps({"msg_id": "x", "msg_type": "x", "session": "x", "username": "x", "version": "5.3"})
        text = (
            f'{{"channel": "shell", "header": {header}, "parent_header": {{}}, "metadata": {{}}, "content": '.encode()
        )
        text += b'{"x": ' + MANY_VALUES + b'}, "buffers": []}'
        parts = [MANY_VALUES, b"{}", b"{}", b"{}"]
        for one in (legacy, binary):
            one.discard()
        for _ in range(field.many(2, 6)):
            with contextlib.suppress(OSError):
                await legacy.send(text, TEXT)
                await binary.send(raw._v1_frame("shell", parts))
            await asyncio.sleep(1)
        for one in (legacy, binary):
            one.close()


async def launchers_frames(field: Field, user: str = "", seconds: float = 0) -> None:
    """A launcher sends frames of 4 MiB of JSON, one after the other."""
    seconds = seconds or field.many(4, 10)
    field.order("values", seconds, user)
    await asyncio.sleep(seconds)


async def kernelspec_lists(field: Field, user: str = "") -> None:
    """150 lists of kernelspecs at once."""
    server = field.of(user or field.folk.ada)
    for _ in range(field.many(1, 4)):
        requests = (raw.request(server, "GET", "/api/kernelspecs") for _ in range(150))
        await asyncio.gather(*requests, return_exceptions=True)


async def all_at_once(field: Field) -> None:
    """Five hostile users do the worst of these at the same time."""
    users = [field.folk.ada, *field.folk.others]
    for user in users:
        await field.job_of(user)
    await field.felt()
    seconds = field.many(5, 20)

    async def repeatedly(attack: Callable[[Field, str], Awaitable[None]], user: str) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await attack(field, user)

    async def fill_one(user: str) -> None:
        async with field.kernel(user) as kernel_id:
            one = await field.page(kernel_id, user)
            one.discard()
            await one.send(raw.cell("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"))
            await fill(one, raw.cell("#" * 9 * MEBIBYTE), field.many(20, 100))
            await asyncio.sleep(seconds / 2)
            one.close()

    await asyncio.gather(
        printing(field, users[0], seconds, 60),
        repeatedly(bodies_of_values, users[1 % len(users)]),
        launchers_frames(field, users[2 % len(users)], seconds),
        repeatedly(kernelspec_lists, users[3 % len(users)]),
        fill_one(users[4 % len(users)]),
    )


# -- counts ------------------------------------------------------------------------------------------


async def many_websockets(field: Field) -> None:
    """A user opens one websocket after the other, until one is refused."""
    async with field.kernel() as kernel_id:
        pages: list[Page] = []
        refused = ""
        try:
            for _ in range(400):
                pages.append(await field.page(kernel_id))
                pages[-1].discard()
                if sum(one.is_closed for one in pages) > 5:
                    refused = "closed"
                    break
        except ConnectionRefusedError as error:
            refused = str(error)
        for one in pages:
            one.close()
        holds(refused, f"{len(pages)} websockets are open")


async def many_starts(field: Field) -> None:
    """A user starts kernels that fail, again and again; soon the gateway refuses."""
    answered: dict[int, int] = {}
    body = json.dumps({"name": "broken", "env": {"KERNEL_SLURM_JOBID": await field.job_of(field.folk.ada)}}).encode()
    for _ in range(field.many(100, 300)):
        got = await raw.request(field.ada, "POST", "/api/kernels", body)
        answered[got] = answered.get(got, 0) + 1
        if got == 429:
            break
    listed = len(await field.ada.json("GET", "/api/kernels"))
    field.wants_restart = True  # else the next attacks may start nothing for a minute
    holds(429 in answered, f"the gateway answered {answered}, and lists {listed} kernels")
    holds(listed < 120, f"{listed} kernels are listed")


STOPS_HELPERS = """
import os, time
until = time.time() + {seconds}
while time.time() < until:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open("/proc/" + pid + "/cmdline").read()
            if "as-user" in words and "sudo" not in words:
                os.kill(int(pid), {signal})
        except OSError:
            pass
    time.sleep(0.01)
"""


async def stopped_helpers(field: Field) -> None:
    """A user stops the helper that acts as them; nothing of it stays, and Bob's starts go on."""
    ada = field.folk.ada
    stopper = field.run(ada, STOPS_HELPERS.format(signal=int(signal.SIGSTOP), seconds=100))
    try:
        jobs = [raw.request(field.ada, "POST", "/api/kernels", b'{"name": "stub"}') for _ in range(10)]
        await asyncio.gather(*jobs)
        await asyncio.sleep(field.many(3, 80))
    finally:
        stopper.kill()
        stopper.wait()
    left = field.helpers()
    if field.full:
        holds(len(left) <= 2, f"{len(left)} processes of sudo and the helper stay after 80 s")
    continuer = field.run(ada, STOPS_HELPERS.format(signal=int(signal.SIGCONT), seconds=0.5))
    await asyncio.to_thread(continuer.wait)


# -- nothing believed --------------------------------------------------------------------------------


async def forged_messages(field: Field) -> None:
    """Messages that are not signed with the kernel's key are not shown, with any signature."""
    async with field.kernel() as kernel_id, page(field, kernel_id) as one:
        # The cell's own text is shown, too, and must not have the word.
        code = "text = 'FOR' + 'GED'; kernel.forge(text); kernel.forge(text, '0' * 64); print('after', 'wards')"
        await one.send(raw.cell(code))
        got = await one.until(b"after wards", 10)
        holds(b"FORGED" not in got, "a page was shown a message without a valid signature")
        assert b"after wards" in got, got[-500:]


# -- a launcher's messages ---------------------------------------------------------------------------


async def notices(field: Field) -> None:
    """A launcher fills the log with notices."""
    seconds = field.many(4, 10)
    size = field.log_size()
    field.order("notices", seconds)
    await asyncio.sleep(seconds + 0.5)
    rate = (field.log_size() - size) / seconds
    holds(rate < 50_000, f"the log grew by {rate / 1000:.0f} kB a second")
    holds("\x1b" not in field.logged(size), "the log has control characters of a launcher's")


async def odd_types(field: Field) -> None:
    """Messages whose fields have other types than they should raise nothing."""
    size = field.log_size()
    field.order("types", 1)
    await asyncio.sleep(field.many(2, 4))
    said = field.logged(size)
    for word in ("Traceback", "TypeError", "AttributeError", "KeyError"):
        found = [line for line in said.splitlines() if word in line][:1]
        holds(not found, f"the log has {found}")
    await field.until_linked(field.ada)


async def invented_sessions(field: Field) -> None:
    """A launcher's journals have thousands of sessions that never were, when the gateway restarts."""
    async with field.kernel() as kernel_id:
        await ask(field.ada, kernel_id, "print(1)")
        field.order("invent", 30)
        await asyncio.sleep(1)
        before = field.descriptors()
        began = time.monotonic()
        await field.restart(signal.SIGKILL)
        await field.until_back(field.ada, kernel_id)
        await ask(field.ada, kernel_id, "print(1)")
        took = time.monotonic() - began
        grown = field.descriptors() - before
        holds(grown < 200, f"the gateway has {grown} descriptors more")
        holds(took < 45, f"the gateway needed {took:.0f} s")


# -- logs --------------------------------------------------------------------------------------------


async def tokens_in_logs(field: Field) -> None:
    """Tokens in odd places of a request, and control characters, are not in the log."""
    size, token = field.log_size(), field.ada.token
    odd = [f"/api/kernels%3Ftoken={token}", f"/x;token={token}", f"/nowhere/{token}", f"//token={token}&x=%1b[31m"]
    odd += [f"/api/kernels?x=1&TOKEN={token}", f"/api/sessions?a=token%3D{token}", f"/?token%3d{token}"]
    for path in odd:
        reader, writer = await raw.connect(field.ada, ADA_ADDRESS)
        lines = [f"GET {path} HTTP/1.1", "Host: gateway", f"Referer: http://x/?token={token}", f"User-Agent: {token}"]
        lines += [f"X-Forwarded-For: \x1b[31m{token}", f"Authorization: token {token}x", "Connection: close"]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        await raw.status_of(reader)
        writer.close()
    await asyncio.sleep(0.5)
    said = field.logged(size)
    holds(token not in said, f"a token is in the log: {[line for line in said.splitlines() if token in line][:1]}")
    holds("\x1b" not in said, "control characters are in the log")


async def strangers_at_the_link(field: Field) -> None:
    """A stranger sends garbage to the response socket as fast as it takes it: the log has few lines of it."""
    size, port = field.log_size(), field.response_port
    until = time.monotonic() + field.many(3, 10)
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            _reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(STRANGERS_ADDRESS, 0))
            writer.write(b"GET /\x1b[31m HTTP/1.1\r\n\r\n" * 400)
            await writer.drain()
            writer.close()
    lines = field.logged(size).splitlines()
    holds(len(lines) < 300, f"the log has {len(lines)} lines more")


# -- restart under fire ------------------------------------------------------------------------------


async def taken_port(field: Field) -> None:
    """Another process takes the response port while the gateway restarts: kernels wait, and none is lost."""
    async with field.kernel() as kernel_id:
        await ask(field.ada, kernel_id, "kept = 5")
        port = field.response_port
        await asyncio.to_thread(field.gateway.signal, signal.SIGKILL)
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("0.0.0.0", port))  # noqa: S104 - every address of the machine
            thief.listen()
            field.gateway.begin()
            await asyncio.to_thread(field.gateway.until_listening)
            await asyncio.sleep(2)
            answered = await field.ada.status("GET", f"/api/kernels/{kernel_id}")
            listed = await field.ada.status("GET", "/api/kernels")
        if answered not in (200, 503):
            await field.restart(signal.SIGKILL)
            holds(False, f"a kernel is answered {answered}, and the list {listed}")
        await field.until_back(field.ada, kernel_id, timeout=40)
        await field.until_back(field.bob, field.bobs_kernel)
        got = await ask(field.ada, kernel_id, "print(kept)")
        holds(got == "5", f"the kernel says {got}")


# -- the database ------------------------------------------------------------------------------------


async def changed_owner(field: Field) -> None:
    """A row's owner is changed in the database, by a person who can write it: the kernel does not become Bob's."""
    async with field.kernel() as kernel_id:
        await asyncio.sleep(1.5)  # rows are written behind
        await asyncio.to_thread(field.gateway.signal, signal.SIGKILL)
        with contextlib.closing(sqlite3.connect(field.database())) as database:
            for table in ("kernels", "allocations", "sessions"):
                database.execute(
                    f"UPDATE {table} SET owner = ?, record = replace(record, ?, ?) WHERE owner = ?",  # noqa: S608
                    (field.folk.bob, field.folk.ada, field.folk.bob, field.folk.ada),
                )
            database.commit()
        field.gateway.begin()
        await asyncio.to_thread(field.gateway.until_listening)
        await field.until_back(field.bob, field.bobs_kernel)
        await asyncio.sleep(1)
        bobs = [one["id"] for one in await field.bob.json("GET", "/api/kernels")]
        holds(kernel_id not in bobs, "Ada's kernel is Bob's")


# -- revoked means over ------------------------------------------------------------------------------


async def removed_token(field: Field) -> None:
    """The websocket of a token that is removed closes within 60 s."""
    user = field.folk.ada
    kernel_id = await start(field.ada, "hostile", env={"KERNEL_SLURM_JOBID": await field.job_of(user)})
    one = await field.page(kernel_id)
    one.discard()
    old = field.ada.token
    await asyncio.to_thread(field.account.token_command, "remove", user)
    try:
        holds(await one.closed_within(65), "the websocket is open 65 s after its token was removed")
    finally:
        one.close()
        field.account.tokens[user] = await asyncio.to_thread(field.account.make_token, user)
        assert field.ada.token != old


async def log_that_is_a_link(field: Field) -> None:
    """The log of a start that fails is a link to the gateway's tokens: the answer has nothing of them."""
    home = field.folk.home(field.folk.ada)
    secret = field.account.tokens_file
    logs = home / ".local/state/gateway_slurm"
    plant = f"""
import glob, os, threading, time
until = time.time() + 8
while time.time() < until:
    for folder in glob.glob({str(home)!r} + "/.*/**/gateway_slurm*", recursive=True) + [{str(logs)!r}]:
        for path in glob.glob(folder + "/*.log"):
            if not os.path.islink(path):
                os.unlink(path); os.symlink({str(secret)!r}, path)
    time.sleep(0.01)
"""
    python = field.run(field.folk.ada, plant)
    try:
        env = {"KERNEL_SLURM_JOBID": await field.job_of(field.folk.ada)}
        code, answer = await field.ada.refusal("POST", "/api/kernels", {"name": "broken", "env": env})
        if code == 201:
            kernel_id = json.loads(answer)["id"]
            await asyncio.sleep(4)
            answer += (await field.ada.refusal("GET", f"/api/kernels/{kernel_id}"))[1]
            answer += (await field.ada.refusal("GET", f"/api/kernels/{kernel_id}/logs"))[1]
        holds('"hash"' not in answer and '"tokens"' not in answer, f"the answer has the file: {answer[-300:]}")
    finally:
        python.kill()
        python.wait()


async def kept_by_a_field(field: Field) -> None:
    """Whom the request may not keep an allocation as a field, may not do so by POST either."""
    async with field.kernel() as kernel_id:
        jobid = await field.job_of(field.folk.ada)
        body = {"name": "stub", "env": {"KERNEL_SLURM_KEEP_ALLOCATION": "true", "KERNEL_SLURM_JOBID": jobid}}
        code, answer = await field.ada.refusal("POST", "/api/kernels", body)
        by_verb = await field.ada.status("POST", f"/api/allocations/{jobid}/keep")
        if code == 201:
            await field.ada.status("DELETE", f"/api/kernels/{json.loads(answer)['id']}")
        await field.ada.status("DELETE", f"/api/allocations/{jobid}/keep")
        holds((code == 201) == (by_verb < 300), f"as a field {code}, by POST {by_verb} (kernel {kernel_id})")


# -- small -------------------------------------------------------------------------------------------


async def small_ones(field: Field) -> None:
    """Job ids in another spelling, others' numbers, and cookies where there is nothing."""
    metrics = await field.ada.status("GET", "/metrics")
    holds(metrics == 403, f"/metrics is answered {metrics} to a user")
    jobid = await field.job_of(field.folk.ada)
    padded = await field.ada.status(
        "POST", "/api/kernels", {"name": "stub", "env": {"KERNEL_SLURM_JOBID": f"0{jobid}"}}
    )
    holds(padded in (400, 409), f"the job id 0{jobid} is answered {padded}")
    answer = await field.ada.request("GET", "/nowhere", token="", raise_error=False)
    holds(answer.code in (403, 404), f"nothing is answered {answer.code}")
    holds("Set-Cookie" not in answer.headers, "404 sets a cookie")
    activity = (await field.ada.json("GET", "/api/status")).get("last_activity")
    await ask(field.bob, field.bobs_kernel, "print(1)")
    later = (await field.ada.json("GET", "/api/status")).get("last_activity")
    holds(activity == later, "last_activity tells of another user's work")


ATTACKS = (
    Attack("memory", "a cell prints 0.5 GiB at once", print_at_once),
    Attack("memory", "a kernel announces a frame of 3 GiB", announced_frame),
    Attack("memory", "messages of 9 MiB to a stopped kernel", stopped_kernel, memory=350),
    Attack("memory", "150 sessions of a waiting kernel", waiting_kernel, memory=350, is_mended=False),
    Attack("memory", "100 unfinished websocket messages", fragments, memory=350),
    Attack("memory", "50 pages that do not read", deaf_pages, memory=350),
    Attack("without a token", "4 bodies of 450 MiB", strangers_bodies, memory=50),
    Attack("without a token", "more idle connections than descriptors", idle_connections),
    Attack("without a token", "made-up tokens", made_up_tokens),
    Attack("turns", "a printing kernel with 60 pages", printing, memory=350),
    Attack("turns", "bodies of 16 MiB of [[],[],…", bodies_of_values),
    Attack("turns", "bodies of 1 MiB of [[],[],…, 8 at a time", small_bodies_of_values),
    Attack("turns", "websocket messages of 16 MiB of [[],[],…", websocket_values, memory=550),
    Attack("turns", "a launcher's JSON frames of 4 MiB", launchers_frames),
    Attack("turns", "150 kernelspec lists at once", kernelspec_lists),
    Attack("counts", "websockets without an end", many_websockets, is_mended=False),
    Attack("counts", "starts that fail, without an end", many_starts),
    Attack("counts", "the user stops the helpers", stopped_helpers, is_mended=False),
    Attack("believed", "messages with a wrong signature", forged_messages),
    Attack("launcher", "notices without an end", notices, is_mended=False),
    Attack("launcher", "messages with wrong types", odd_types),
    Attack("logs", "tokens and control characters in requests", tokens_in_logs, is_mended=False),
    Attack("logs", "garbage at the response socket", strangers_at_the_link, is_mended=False),
    Attack("revoked", "a log that is a link to the gateway's tokens", log_that_is_a_link),
    Attack("revoked", "keep as a field and as a verb", kept_by_a_field),
    Attack("small", "job ids, metrics, cookies, last_activity", small_ones, is_mended=False),
    Attack("turns", "five hostile users at once", all_at_once, memory=600, is_mended=False),
    Attack("memory", "a restart with 8 × 62 MiB of kept output", kept_output, memory=1 << 20, delays=False),
    Attack("launcher", "3 000 invented sessions at a restart", invented_sessions, memory=1 << 20, delays=False),
    Attack("restart", "another process takes the response port", taken_port, memory=1 << 20, delays=False),
    Attack("database", "a changed owner", changed_owner, memory=1 << 20, delays=False),
)
SLOW = (
    Attack("without a token", "a head of a request without an end", slow_head),
    Attack("revoked", "the websocket of a removed token", removed_token),
)
"""These wait for a minute."""


# -- tools -------------------------------------------------------------------------------------------


@asynccontextmanager
async def page(field: Field, kernel_id: str) -> AsyncIterator[Page]:
    """A websocket of Ada's until the end of the block."""
    one = await field.page(kernel_id)
    try:
        yield one
    finally:
        one.close()


async def fill(one: Page, data: bytes, count: int) -> None:
    """Send as much as the server takes: it may close the websocket, or stop reading."""
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        for _ in range(count):
            await asyncio.wait_for(one.send(data), 3)


async def status(field: Field, verb: str, path: str) -> int:
    """The status of a request of Bob's."""
    return await field.bob.status(verb, path)
