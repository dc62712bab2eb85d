"""A class comes in: many starts at one moment, while the gateway still answers all other users."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys

import pytest

from helpers import HELPERS
from helpers.gateway_process import ask, running_gateway, start, stop_all
from helpers.kernel_clients import IPYKERNEL, JOB, READY, install_kernelspec, jupyter_files_in
from helpers.notebook_server import V1, Frontend

KERNELS = 50
# A session of its own counts as one to the scheduler, however nice its processes are (sched(7), autogroup).
MODEST = ["sh", "-c", 'echo 19 > /proc/self/autogroup; exec nice -n 19 "$@"', "sh"]
# Nodes and clients have processors of their own: here they share one, and the others are left to the gateway.
PROCESSORS = sorted(os.sched_getaffinity(0))
THEIRS = PROCESSORS[-1]
LATENCY = HELPERS / "latency.py"


def on(*processors):
    """What starts a command on these processors (taskset(1))."""
    return ["taskset", "--cpu-list", ",".join(map(str, processors))]


@pytest.fixture
def clients_processor():
    """The test's own thread has the clients in it."""
    os.sched_setaffinity(0, {THEIRS})
    yield
    os.sched_setaffinity(0, PROCESSORS)


@pytest.fixture
def gateway(cluster, jupyter_base, kernelspecs):
    """A gateway of its own, and kernelspecs."""
    with jupyter_files_in(jupyter_base):
        argv = [*on(THEIRS), *MODEST, *IPYKERNEL, "--HistoryManager.enabled=False"]
        install_kernelspec(kernelspecs, "nice", config_overrides={"kernel_argv": argv})
        with running_gateway(jupyter_base / "load") as gateway:
            yield gateway


@contextlib.asynccontextmanager
async def measured(gateway):
    """Measure ``GET /api`` from a process of its own; the seconds of each are in the list at the end."""
    port = gateway.url.rpartition(":")[2]
    pipe = asyncio.subprocess.PIPE
    command = [*on(*PROCESSORS), sys.executable, str(LATENCY), port]
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    seconds: list[float] = []
    try:
        yield seconds
        output, _ = await asyncio.wait_for(process.communicate(b"\n"), READY)
        seconds += json.loads(output)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def percentile(seconds):
    """The 99th."""
    return statistics.quantiles(seconds, n=100)[98]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("gateway", "clients_processor")
async def test_fifty_starts_at_once_all_succeed_and_delay_no_other_request(gateway):
    """Two users' kernels, in running jobs of theirs; each executes, and GET /api stays as quick as it was."""
    alice, bob = gateway.of("alice"), gateway.of("bob")
    jobids = [await ask(server, await start(server), JOB) for server in (alice, bob)]
    async with measured(gateway) as idle:
        await asyncio.sleep(4)  # what is measured is time itself

    async def one(number):
        server, jobid = (alice, bob)[number % 2], jobids[number % 2]
        kernel_id = await start(server, "nice", env={"KERNEL_SLURM_JOBID": jobid, "KERNEL_NUMBER": str(number)})
        code = "import os; print(os.environ['KERNEL_NUMBER'], os.environ['SLURM_JOB_ID'])"
        return await ask(server, kernel_id, code), f"{number} {jobid}"

    async with measured(gateway) as busy:
        answers = await asyncio.gather(*map(one, range(KERNELS)))
    for printed, expected in answers:
        assert printed == expected
    before, during = percentile(idle), percentile(busy)
    told = f"GET /api, 99th percentile: {before * 1e3:.1f} ms of {len(idle)} idle, {during * 1e3:.1f} ms of {len(busy)}"
    sys.stdout.write(f"{told}\n")
    assert during < max(0.05, 3 * before), told
    await asyncio.gather(stop_all(alice), stop_all(bob))


@pytest.mark.slow
async def test_kernels_that_start_together_all_become_idle(gateway):
    """Twelve pages open at one moment: each hears that its kernel is idle, and the list of kernels says so, too."""
    alice = gateway.of("alice")
    jobid = await ask(alice, await start(alice), JOB)

    async def open_page() -> str:
        kernel_id = await start(alice, env={"KERNEL_SLURM_JOBID": jobid})
        page = await Frontend.connect(alice, kernel_id, V1)
        # JupyterLab asks once, and shows what it hears from then on.
        await page.send("shell", "kernel_info_request", {})
        states = []
        while "idle" not in states:
            states += [(await page.receive())["content"].get("execution_state")]
        page.close()
        return kernel_id

    opened = await asyncio.wait_for(asyncio.gather(*(open_page() for _ in range(12))), READY)
    states = {one["id"]: one["execution_state"] for one in await alice.json("GET", "/api/kernels")}
    assert [states[kernel_id] for kernel_id in opened] == ["idle"] * 12
    await stop_all(alice)
