"""Much output through ``jupyter slurm gateway``: to a frontend that reads, that reads slowly, and that is away."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
import uuid

import psutil
import pytest
from websocket import create_connection

from gateway_slurm.gateway.channels.channels import FLUSH_BYTES
from gateway_slurm.gateway.channels.messages import CHANNELS
from gateway_slurm.gateway.channels.queue import QUEUE_LIMIT
from gateway_slurm.gateway.channels.sockets import RECEIVE_MARK
from gateway_slurm.link.flow import WINDOW
from helpers.gateway_process import running_gateway, start, stop
from helpers.kernel_clients import DROP_NOTHING
from helpers.large_output import FLOOD, PIECE, PIECES, TOTAL, numbers_of, relay_small_and_large
from helpers.notebook_server import V1, Frontend

pytestmark = pytest.mark.slow
ROUND_TRIPS = 40
# What a frontend that does not read may cost: its queue, what is on its way to the websocket and at ZMQ's
# side of it, and the windows of its kernel's channels.
ITS_OWN = QUEUE_LIMIT + FLUSH_BYTES + RECEIVE_MARK * PIECE + len(CHANNELS) * WINDOW
# The same for a frontend that reads, whose queue is all but empty; and what the allocator does not give back.
BESIDE = FLUSH_BYTES + RECEIVE_MARK * PIECE + len(CHANNELS) * WINDOW + (32 << 20)


@pytest.fixture
def gateway(gateway_environment, kernelspecs, tmp_path):
    """A gateway of the test's own: what an earlier one took and keeps of memory hides what is taken now."""
    # As the systemd unit in etc/ sets it.
    with running_gateway(tmp_path / "output", environment={"MALLOC_MMAP_THRESHOLD_": "262144"}) as gateway:
        yield gateway


class SlowFrontend:
    """A session whose websocket is read only when the test reads: tornado's own reads ahead."""

    def __init__(self, server, kernel_id):
        self.session_id = uuid.uuid4().hex
        url = f"{server.url.replace('http', 'ws')}/api/kernels/{kernel_id}/channels?session_id={self.session_id}"
        self._websocket = create_connection(url, header={"Authorization": f"token {server.token}"}, timeout=20)
        self.received = []

    def run(self, code):
        """Send a cell; return the request's id."""
        header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "session": "slow", "username": ""}
        content = {"code": code, "silent": False}
        message = {"header": {**header, "version": "5.3", "date": ""}, "content": content, "channel": "shell"}
        self._websocket.send(json.dumps({**message, "parent_header": {}, "metadata": {}}))
        return header["msg_id"]

    def read(self, cell):
        """Read on until the cell is over."""
        left = {"execute_reply", "idle"}
        while left:
            message = json.loads(self._websocket.recv())
            self.received.append(message)
            if message["parent_header"].get("msg_id") == cell:
                left -= {message["msg_type"], message["content"].get("execution_state")}

    async def drop_nothing(self):
        """The kernel drops nothing for those that it publishes to by now, as far as it has memory."""
        await asyncio.to_thread(self.read, self.run(DROP_NOTHING))
        self.received.clear()

    def close(self):
        self._websocket.close(timeout=0)


class Memory:
    """The most memory that a process has had since, by looking often."""

    def __init__(self, pid):
        self._process = psutil.Process(pid)
        self.before = self.most = self._process.memory_info().rss
        self._task = asyncio.ensure_future(self._look())

    async def _look(self):
        while True:
            self.most = max(self.most, self._process.memory_info().rss)
            await asyncio.sleep(0.02)

    def growth(self):
        """Bytes; ends the looking."""
        self._task.cancel()
        return self.most - self.before


async def round_trips(*frontends):
    """The median seconds of a cell that does nothing, for each frontend, in turns."""
    seconds = [[] for _ in frontends]
    for _ in range(ROUND_TRIPS):
        for frontend, found in zip(frontends, seconds, strict=True):
            began = time.perf_counter()
            assert (await frontend.execute("1"))[0]["status"] == "ok"
            found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


async def test_many_small_and_much_large_output_arrive_whole_and_in_order(gateway, kernel_name):
    """10 000 single prints, then 100 MB: nothing is lost, and each comes after the one before it."""
    alice = gateway.of("alice")
    kernel_id = await start(alice, kernel_name)
    frontend = await Frontend.connect(alice, kernel_id, V1)
    await relay_small_and_large(frontend)
    frontend.close()
    await stop(alice, kernel_id)


@pytest.mark.timeout(300)
async def test_a_frontend_that_does_not_read_costs_others_nothing(gateway, kernel_name):
    """Its output waits in a bounded queue and in its kernel; others go on as before; it gets all of it later."""
    alice, bob = gateway.of("alice"), gateway.of("bob")
    kernel_id, another = await start(alice, kernel_name), await start(bob, kernel_name)
    same, other = await Frontend.connect(alice, kernel_id, V1), await Frontend.connect(bob, another, V1)
    slow = await asyncio.to_thread(SlowFrontend, alice, kernel_id)
    await slow.drop_nothing()
    idle = await round_trips(same, other)
    memory = Memory(gateway.process.pid)
    cell = slow.run(FLOOD)
    # By then the kernel has printed all of it, and who reads has had it all.
    await same.execute("1")
    stalled = await round_trips(same, other)
    growth = memory.growth()
    told = f"round trips idle {idle}, beside one that does not read {stalled}; memory + {growth >> 20} MiB"
    sys.stdout.write(f"{told}\n")
    assert growth > QUEUE_LIMIT // 2, told  # it has stalled
    assert growth < ITS_OWN + BESIDE < TOTAL // 2, told
    for before, beside in zip(idle, stalled, strict=True):
        assert beside < 2 * before, told
    await asyncio.to_thread(slow.read, cell)
    mine = [one for one in slow.received if one["parent_header"].get("msg_id") == cell]
    assert numbers_of("".join(one["content"].get("text", "") for one in mine)) == list(range(PIECES))
    slow.close()
    same.close()
    other.close()
    await stop(alice, kernel_id)
    await stop(bob, another)


@pytest.mark.timeout(300)
async def test_what_is_dropped_while_a_frontend_is_away_is_said_and_the_newest_comes(gateway, kernel_name):
    """Of more than the queue's limit the oldest goes; on its return the frontend hears how much, then the rest."""
    alice = gateway.of("alice")
    kernel_id = await start(alice, kernel_name)
    reader = await Frontend.connect(alice, kernel_id, V1)
    away = await asyncio.to_thread(SlowFrontend, alice, kernel_id)
    await away.drop_nothing()
    memory = Memory(gateway.process.pid)
    cell = away.run(f"import time; time.sleep(1)\n{FLOOD}")
    away.close()
    await reader.execute("1")
    back = await Frontend.connect(alice, kernel_id, V1, session_id=away.session_id)
    said = ""
    while "dropped" not in said:
        said = str((await back.receive())["content"].get("text"))
    _reply, printed = await back.result(cell)
    growth = memory.growth()
    assert said.startswith("gateway_slurm: ")
    assert said.endswith(" messages of output were dropped while no frontend was there\n")
    numbers = numbers_of(printed)
    assert numbers == list(range(PIECES - len(numbers), PIECES))
    dropped = int(said.split()[1])
    # ipykernel's own timer flushes, too: here and there a piece is two messages.
    assert PIECES - len(numbers) <= dropped < 1.1 * (PIECES - len(numbers))
    assert QUEUE_LIMIT // 2 < len(numbers) * PIECE <= QUEUE_LIMIT
    assert growth < ITS_OWN + BESIDE, growth
    reader.close()
    back.close()
    await stop(alice, kernel_id)
