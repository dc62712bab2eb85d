"""Two users, an admin and a service at one gateway: who sees, starts and ends what."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid

import pytest

from gateway_slurm.gateway.openapi import OPERATIONS
from helpers.gateway_process import ask, running_gateway, start, stop, stop_all
from helpers.kernel_clients import JOB, READY, jupyter_files_in, poll_async
from helpers.notebook_server import Frontend, HTTPClientError
from helpers.private_slurm import jobs_of, slurm

OPEN = {"/api", "/health/live", "/health/ready"}
ROUTES = [(verb.upper(), path) for path, verbs in OPERATIONS.items() for verb in verbs]
BODIES = {"/api/kernels": {"name": "slurm"}, "/api/sessions": {"path": "x.ipynb", "kernel": {"name": "slurm"}}}


@pytest.fixture(scope="module")
def module_gateway(cluster, jupyter_base):
    """One gateway for the tests here, its log at its most talkative."""
    with jupyter_files_in(jupyter_base), running_gateway(jupyter_base / "users", "--debug") as gateway:
        yield gateway


@pytest.fixture
def gateway(module_gateway, kernelspecs):
    """The gateway, with kernelspecs."""
    return module_gateway


@contextlib.asynccontextmanager
async def session_of(server, path="work/a.ipynb", **body):
    """A user's session with a kernel that runs; its ids by the names that routes have for them."""
    body = {"path": path, "name": path, "kernel": {"name": "slurm"}, **body}
    session = await server.json("POST", "/api/sessions", body)
    kernel_id = session["kernel"]["id"]
    try:
        jobid = await ask(server, kernel_id, JOB)
        names = {"kernel_name": "slurm", "path": "logo.svg"}
        yield {"kernel_id": kernel_id, "session_id": session["id"], "jobid": jobid, "msg_id": "m", **names}
    finally:
        await stop(server, kernel_id)


async def websocket_status(server, path):
    """The status with which a websocket is refused; 101 for one that opens."""
    try:
        frontend = await Frontend.connect(server, path.split("/")[3])
    except HTTPClientError as error:
        return error.code
    frontend.close()
    return 101


async def status(server, verb, path):
    """The status of a request to the path, which may be a websocket's."""
    if path.endswith("/channels"):
        return await websocket_status(server, path)
    return await server.status(verb, path, BODIES.get(path, {}) if verb in ("POST", "PATCH") else None)


async def test_what_is_another_users_is_not_there(gateway):
    """Every route and verb of another user's kernel, session or allocation says 404, and changes nothing."""
    alice, bob = gateway.of("alice"), gateway.of("bob")
    theirs = [route for route in ROUTES if "{" in route[1] and "{kernel_name}" not in route[1]]
    assert len(theirs) >= 11
    async with session_of(alice) as ids:
        for verb, path in theirs:
            assert await status(bob, verb, path.format(**ids)) == 404, (verb, path)
        # What names a kernel in its body, too.
        session = {"path": "b.ipynb", "kernel": {"id": ids["kernel_id"]}}
        assert await bob.status("POST", "/api/sessions", session) == 404
        assert await ask(alice, ids["kernel_id"], JOB) == ids["jobid"]
        (allocation,) = await alice.json("GET", "/api/allocations")
        assert not allocation["kept"]


@pytest.mark.parametrize("who", ["nobody", "a wrong token"])
async def test_without_a_valid_token_there_is_nothing(gateway, who):
    """Every route but health and the version refuses, whether or not there is something behind it."""
    alice = gateway.of("alice")
    token = "" if who == "nobody" else gateway.anyone.token
    stranger = gateway.of("alice")
    stranger.token = token
    async with session_of(alice) as ids:
        for verb, path in ROUTES:
            got = await status(stranger, verb, path.format(**ids))
            assert got == 200 if path in OPEN else got in (401, 403), (verb, path)
        assert await ask(alice, ids["kernel_id"], JOB) == ids["jobid"]


async def test_lists_have_ones_own_and_the_admin_sees_all(gateway):
    """Kernels, sessions and allocations; an admin may end what is anybody's, too."""
    alice, bob, admin = gateway.of("alice"), gateway.of("bob"), gateway.of("carol")
    async with session_of(alice) as hers, session_of(bob) as his:
        for server, seen in ((alice, [hers]), (bob, [his]), (admin, [hers, his])):
            kernels = await server.json("GET", "/api/kernels")
            assert {one["id"] for one in kernels} == {ids["kernel_id"] for ids in seen}
            sessions = await server.json("GET", "/api/sessions")
            assert {one["id"] for one in sessions} == {ids["session_id"] for ids in seen}
            allocations = await server.json("GET", "/api/allocations")
            assert {one["jobid"] for one in allocations} == {ids["jobid"] for ids in seen}
            assert (await server.json("GET", "/api/status"))["kernels"] == len(seen)
        assert await ask(admin, his["kernel_id"], JOB) == his["jobid"]
        await admin.request("DELETE", f"/api/sessions/{his['session_id']}")
        await stop(admin, hers["kernel_id"])
        assert await bob.json("GET", "/api/kernels") == await alice.json("GET", "/api/kernels") == []


async def test_only_a_service_acts_for_its_users(gateway):
    """KERNEL_USERNAME of a service's request is whose kernel it is; anybody else's is 403 unless it is their own."""
    alice, bob, portal = gateway.of("alice"), gateway.of("bob"), gateway.of("portal")
    for_alice = {"KERNEL_USERNAME": "alice"}
    kernel_id = await start(portal, env=for_alice)
    assert await ask(portal, kernel_id, "import os; print(os.environ['KERNEL_USERNAME'])") == "alice"
    assert [one["id"] for one in await alice.json("GET", "/api/kernels")] == [kernel_id]
    assert [one["id"] for one in await portal.json("GET", "/api/kernels")] == [kernel_id]
    assert [one["owner"] for one in await alice.json("GET", "/api/allocations")] == ["alice"]
    assert await bob.json("GET", "/api/kernels") == []
    for server in (bob, gateway.of("carol")):
        assert await server.status("POST", "/api/kernels", {"name": "slurm", "env": for_alice}) == 403
        body = {"path": "a.ipynb", "kernel": {"name": "slurm"}, "env": for_alice}
        assert await server.status("POST", "/api/sessions", body) == 403
    await stop(alice, kernel_id)
    own = await start(alice, env=for_alice)
    assert await portal.status("GET", f"/api/kernels/{own}") == 404
    await stop(alice, own)


async def test_a_service_keeps_the_sessions_of_its_users_apart(gateway):
    """The same document for two users by one service's token is two sessions with two kernels."""
    portal = gateway.of("portal")
    users = [{"env": {"KERNEL_USERNAME": user}} for user in ("alice", "bob")]
    async with session_of(portal, **users[0]) as hers, session_of(portal, **users[1]) as his:
        assert hers["session_id"] != his["session_id"]
        assert hers["kernel_id"] != his["kernel_id"]
        assert [one["id"] for one in await gateway.of("bob").json("GET", "/api/sessions")] == [his["session_id"]]


async def test_a_service_gets_no_session_that_its_user_made(gateway):
    """It gets one of its own for the same document; the user's status knows the user's own activity only."""
    alice, portal, path = gateway.of("alice"), gateway.of("portal"), f"work/{uuid.uuid4().hex}.ipynb"
    body = {"path": path, "name": path, "kernel": {"name": "slurm"}}
    mine = await alice.json("POST", "/api/sessions", body)
    theirs = await portal.json("POST", "/api/sessions", {**body, "env": {"KERNEL_USERNAME": "alice"}})
    try:
        assert mine["id"] != theirs["id"]
        assert mine["kernel"]["id"] != theirs["kernel"]["id"]
        assert (await alice.json("POST", "/api/sessions", body))["id"] == mine["id"]
        status = await gateway.of("bob").json("GET", "/api/status")
        assert (status["last_activity"], status["kernels"]) == (status["started"], 0)
    finally:
        await stop(alice, mine["kernel"]["id"], theirs["kernel"]["id"])


async def test_another_users_job_cannot_be_adopted(gateway, cluster):
    """Neither one that the gateway has for them, nor one of the gateway's own Unix user; both say the same."""
    alice, bob = gateway.of("alice"), gateway.of("bob")
    stray = slurm("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 300", cluster=cluster).stdout.strip()
    async with session_of(bob) as his:
        reasons = set()
        for jobid in (his["jobid"], stray, "4000000"):
            body = {"name": "slurm", "env": {"KERNEL_SLURM_JOBID": jobid}}
            status, answer = await alice.refusal("POST", "/api/kernels", body)
            reasons.add((status, json.loads(answer)["message"].replace(jobid, "N")))
        assert reasons == {(409, "jobid N is not a job of yours; name one of your own, or none")}
        assert await ask(bob, his["kernel_id"], JOB) == his["jobid"]
    assert await poll_async(lambda: [line.split()[0] for line in jobs_of(cluster)] == [stray], timeout=READY)
    slurm("scancel", stray, cluster=cluster)


async def test_the_same_document_of_two_users_is_two_sessions(gateway):
    """With a kernel each."""
    async with session_of(gateway.of("alice")) as hers, session_of(gateway.of("bob")) as his:
        assert hers["session_id"] != his["session_id"]
        assert hers["kernel_id"] != his["kernel_id"]
        assert hers["jobid"] != his["jobid"]


@pytest.mark.slow
async def test_overlapping_starts_never_mix_what_they_were_sent(gateway):
    """Thirty at once of two users, each with a mark of its own, in one job of each user's: each has its mark."""
    servers = [gateway.of("alice"), gateway.of("bob")]
    async with session_of(servers[0], "one") as hers, session_of(servers[1], "two") as his:
        jobids = [hers["jobid"], his["jobid"]]
        code = "import os; print(os.environ['KERNEL_MARK'], os.environ['SLURM_JOB_ID'])"

        async def one(number):
            server, jobid, mark = servers[number % 2], jobids[number % 2], uuid.uuid4().hex
            env = {"KERNEL_MARK": mark, "KERNEL_SLURM_JOBID": jobid}
            kernel_id = await start(server, env=env)
            return await ask(server, kernel_id, code), f"{mark} {jobid}"

        for printed, expected in await asyncio.gather(*map(one, range(30))):
            assert printed == expected
        await asyncio.gather(*map(stop_all, servers))


async def test_no_token_is_in_the_log(gateway):
    """Whatever is asked, and however it is refused; also where a user put the token into a URL."""
    alice = gateway.of("alice")
    async with session_of(alice):
        pass
    for path in ("/api/kernels", f"/api/kernels/{uuid.uuid4()}/channels", "/metrics", "/nowhere", "/api/nowhere"):
        assert await alice.status("GET", f"{path}?token={alice.token}") in (403, 404)
    await alice.status("POST", "/api/kernels", {"name": "slurm", "env": {"KERNEL_API_TOKEN": alice.token}})
    await stop_all(alice)
    log = gateway.log.read_text()
    for token in [*gateway.tokens.values(), gateway.anyone.token]:
        assert token.split("_", 2)[2] not in log
