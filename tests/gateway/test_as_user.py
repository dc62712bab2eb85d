"""``jupyter slurm gateway`` itself with ``run_as = "user"``: as an account of its own, for real Unix users.

Needs root, which makes the users; collected only then (see conftest.py). What only the service does is in
tests/kernels/test_run_as_user.py.
"""

from __future__ import annotations

import asyncio
import signal

import pytest

from helpers.gateway_process import ask, start, stop
from helpers.kernel_clients import JOB, READY, poll_async
from helpers.private_slurm import jobs_of, slurm
from helpers.unix_users import people
from helpers.user_gateway import Account

WHOAMI = "import os, pwd; print(pwd.getpwuid(os.geteuid()).pw_name, os.environ['HOME'])"
WRITE = "import os; open(os.open({!r}, os.O_CREAT | os.O_WRONLY, 0o600), 'w').write('secret'); print('written')"
READ = "try: print(open({!r}).read())\nexcept OSError as error: print(type(error).__name__)"


@pytest.fixture
def folk(cluster):
    """Two users, and the gateway's account."""
    with people(cluster) as found:
        yield found


@pytest.fixture
def gateway(folk, cluster):
    """It listens."""
    server = Account(folk, cluster).gateway()
    try:
        server.until_listening()
        yield server
    finally:
        server.end()


def owners_of(cluster):
    """Whose each job is to Slurm."""
    lines = slurm("squeue", "--noheader", "--format=%i %u", cluster=cluster).stdout.splitlines()
    return dict(line.split() for line in lines)


@pytest.mark.slow
async def test_two_unix_users_share_a_gateway_that_is_killed_and_comes_back(folk, gateway, cluster):
    """Jobs and files are each one's own, also after the gateway's restart; nothing is left at the end."""
    kernels = {user: await start(gateway.of(user)) for user in (folk.ada, folk.bob)}
    jobs = {}
    for user, other in ((folk.ada, folk.bob), (folk.bob, folk.ada)):
        mine = gateway.of(user)
        jobs[user] = await ask(mine, kernels[user], JOB)
        assert await ask(mine, kernels[user], WHOAMI) == f"{user} {folk.home(user)}"
        assert await mine.status("GET", f"/api/kernels/{kernels[other]}") == 404
        assert [kernel["id"] for kernel in await mine.json("GET", "/api/kernels")] == [kernels[user]]
    assert owners_of(cluster) == {jobs[user]: user for user in kernels}
    specs = {user: await gateway.of(user).json("GET", "/api/kernelspecs") for user in kernels}
    assert {user: sorted(found["kernelspecs"]) for user, found in specs.items()} == {
        folk.ada: ["hers.python", "slurm"],
        folk.bob: ["slurm"],
    }
    folk.base.chmod(0o1777)
    path = str(folk.base / "secret")
    assert await ask(gateway.of(folk.ada), kernels[folk.ada], f"kept = 5; {WRITE.format(path)}") == "written"
    assert await ask(gateway.of(folk.ada), kernels[folk.ada], READ.format(path)) == "secret"
    assert await ask(gateway.of(folk.bob), kernels[folk.bob], READ.format(path)) == "PermissionError"

    await asyncio.to_thread(gateway.restart, signal.SIGKILL)
    for user in kernels:
        mine = gateway.of(user)

        async def is_back(mine=mine):
            return [kernel["id"] for kernel in await mine.json("GET", "/api/kernels")]

        for _ in range(200):
            if await is_back():
                break
            await asyncio.sleep(0.1)
        assert await is_back() == [kernels[user]]
        assert await ask(mine, kernels[user], JOB) == jobs[user]
    assert await ask(gateway.of(folk.ada), kernels[folk.ada], "print(kept)") == "5"
    for user in kernels:
        await stop(gateway.of(user), kernels[user])
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)
