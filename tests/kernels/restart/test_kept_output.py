"""A kernel's output while its server is away: kept on the node, and read by the next server that has the kernel."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import psutil

from gateway_slurm.kernels.model import Phase
from gateway_slurm.link.output import KeptOutput
from helpers.kernel_clients import (
    DROP_NOTHING,
    KERNEL_NAMES,
    PID,
    READY,
    async_execute,
    async_kernel,
    poll_async,
    until_printed,
)

TUNNEL = KERNEL_NAMES["tunnel"]
# Prints at its own pace, with or without a server; ends with the last number.
COUNT = """
import pathlib, time
for number in range(60):
    print(number, flush=True)
    time.sleep(0.02)
pathlib.Path({path!r}).touch()
"""
FAREWELL = """
import os, pathlib, time
print('begun', flush=True)
while not pathlib.Path({path!r}).exists():
    time.sleep(0.02)
print('farewell', flush=True)
time.sleep(0.5)
os.write(2, b'why it died')
os._exit(3)
"""
# Begins when the server is gone, as fast as it can.
PRINTS_AND_DISPLAYS = """
import pathlib, time
from IPython.display import display
{drop_nothing}
print('begun', flush=True)
while not pathlib.Path({path!r}).exists():
    time.sleep(0.02)
for number in range(10_000):
    print(number, flush=True)
pathlib.Path({path!r} + '-printed').touch()
for number in range(100):
    display({{'text/plain': 'x' * 1_000_000 + f'<{{number}}>'}}, raw=True)
"""
FLOOD = """
from IPython.display import display
for number in range(40):
    display({'text/plain': 'x' * 100_000 + str(number)}, raw=True)
"""


def ids_of(kept: KeptOutput) -> list[str]:
    """The messages' ids."""
    return [json.loads(header_of(frames))["msg_id"] for frames in kept.messages]


def header_of(frames: list[bytes]) -> bytes:
    """The frame two behind the delimiter."""
    return frames[frames.index(b"<IDS|MSG>") + 2]


def printed(kept: KeptOutput) -> str:
    """What the kept messages say on stdout."""
    contents = [json.loads(frames[frames.index(b"<IDS|MSG>") + 5]) for frames in kept.messages]
    return "".join(content["text"] for content in contents if content.get("name") == "stdout")


def last_state(kept: KeptOutput) -> str:
    """The last status that the kernel published; empty where there is none."""
    states = [json.loads(frames[frames.index(b"<IDS|MSG>") + 5]).get("execution_state") for frames in kept.messages]
    return next((state for state in reversed(states) if state), "")


class Server:
    """What the next server process would do, in this one: it forgets its streams, and the launcher sees another."""

    def __init__(self, service: Any, manager: Any) -> None:
        self.service, self.provisioner = service, manager.provisioner
        self.launcher = self.provisioner._handle.process.launcher

    async def cut(self) -> None:
        """The link breaks, and the launcher cannot come back."""
        await self.service.run(self._cut())

    async def _cut(self) -> None:
        self.socket = self.service._socket
        self.expected = self.socket._expected.pop(self.launcher.launcher_id)
        self.launcher.link.close("cut by the test")

    async def back(self, *, same: bool = False) -> None:
        """The launcher may come back, to another server process if not ``same``."""

        async def let_in() -> None:
            if not same:
                streams = self.launcher.streams
                streams._session = "another"
                for number in list(streams._clients):
                    streams._end(number)
                streams._outbox.forget_streams()
            self.socket._expected[self.launcher.launcher_id] = self.expected

        await self.service.run(let_in())
        process = self.provisioner._handle.process
        assert await poll_async(lambda: process.phase in (Phase.RUNNING, Phase.DEAD), timeout=READY)


async def until_idle(provisioner: Any) -> KeptOutput:
    """What is kept once the kernel is idle."""
    deadline = asyncio.get_running_loop().time() + READY
    while True:
        kept: KeptOutput = await provisioner.kept_output()
        if last_state(kept) == "idle":
            return kept
        assert asyncio.get_running_loop().time() < deadline, "the kernel is busy still"
        await asyncio.sleep(0.1)


async def acknowledge_and_wait(provisioner: Any, msg_id: str, positions: dict[str, str]) -> KeptOutput:
    """Acknowledge, and read what is left, which comes after it on the same link, once the node keeps anything."""
    provisioner.acknowledge(msg_id, positions)
    while not (kept := await asyncio.wait_for(provisioner.kept_output(), READY)).keeps:
        pass
    return kept


async def test_a_cell_that_ran_on_without_a_server_has_all_its_output(service, tmp_path):
    """Printed while there was no link, it is kept from the first line after, and read by another server."""
    async with async_kernel(TUNNEL) as (manager, client):
        server = Server(service, manager)
        request = client.execute(COUNT.format(path=str(tmp_path / "over")))
        while (await client.get_iopub_msg(timeout=READY))["content"].get("text") != "10\n":
            pass
        await server.cut()
        assert await poll_async((tmp_path / "over").exists, timeout=READY)
        await server.back()
        kept = await manager.provisioner.kept_output()
        numbers = [int(line) for line in printed(kept).split()]
        assert numbers == list(range(numbers[0], 60))
        assert numbers[0] < 60
        assert (kept.dropped, kept.keeps) == (0, True)
        parents = {json.loads(frames[frames.index(b"<IDS|MSG>") + 3]).get("msg_id") for frames in kept.messages}
        assert request in parents


async def test_a_flood_without_a_server_has_no_hole_that_is_not_counted(service, tmp_path):
    """Ten thousand lines and 100 MB after them: the node reads as fast as the kernel publishes, to the bound."""
    async with async_kernel(TUNNEL) as (manager, client):
        server = Server(service, manager)
        await acknowledge_and_wait(manager.provisioner, "", {})
        client.execute(PRINTS_AND_DISPLAYS.format(path=str(tmp_path / "cut"), drop_nothing=DROP_NOTHING))
        await until_printed(client, "begun")
        await server.cut()
        (tmp_path / "cut").touch()
        assert await poll_async((tmp_path / "cut-printed").exists, timeout=READY)
        await server.back()
        kept = await until_idle(manager.provisioner)
        contents = [frames[-1] for frames in kept.messages if b"<" in frames[-1]]
        shown = [int(content.rpartition(b"<")[2].partition(b">")[0]) for content in contents]
        assert shown == list(range(shown[0], 100))
        assert 60 <= len(shown) <= 67
        # Lines are published several at a time; the rest of the 100 is counted one by one.
        assert kept.dropped >= 100 - len(shown)


async def test_what_clients_have_is_not_read_again(service):
    """After ACK the node keeps what comes later, and each session's position for the next server."""
    async with async_kernel(TUNNEL) as (manager, client):
        kept = await acknowledge_and_wait(manager.provisioner, "", {})
        assert kept.keeps
        await async_execute(client, "print('one')")
        assert await poll_async_kept(manager.provisioner, "one\n")
        kept = await manager.provisioner.kept_output()
        middle = ids_of(kept)[len(kept.messages) // 2]
        left = await acknowledge_and_wait(manager.provisioner, middle, {"session": ids_of(kept)[0]})
        assert ids_of(left) == ids_of(kept)[len(kept.messages) // 2 + 1 :]
        assert (left.positions, left.acked) == ({"session": ids_of(kept)[0]}, middle)
        server = Server(service, manager)
        await server.cut()
        await server.back()
        again = await manager.provisioner.kept_output()
        assert ids_of(again) == ids_of(left)
        assert again.positions == left.positions


async def poll_async_kept(provisioner: Any, text: str) -> bool:
    """Whether the text, and the idle after it, are kept in time."""
    for _ in range(200):
        kept = await provisioner.kept_output()
        if text in printed(kept) and last_state(kept) == "idle":
            return True
        await asyncio.sleep(0.1)
    return False


async def test_an_acknowledgement_that_a_broken_link_lost_is_said_again(service):
    """Nothing that clients have comes twice because of it."""
    async with async_kernel(TUNNEL) as (manager, client):
        await acknowledge_and_wait(manager.provisioner, "", {})
        await async_execute(client, "print('one')")
        assert await poll_async_kept(manager.provisioner, "one\n")
        last = ids_of(await manager.provisioner.kept_output())[-1]
        server = Server(service, manager)
        await server.cut()
        manager.provisioner.acknowledge(last, {"s": last})
        await server.back(same=True)
        kept = await manager.provisioner.kept_output()
        assert (kept.messages, kept.acked, kept.positions) == ([], last, {"s": last})


async def test_a_kernels_last_words_can_be_read_after_its_death(service, tmp_path):
    """Its exit code, the end of its stderr, and what it published before, told to a server that comes later."""
    async with async_kernel(TUNNEL) as (manager, client):
        server = Server(service, manager)
        await acknowledge_and_wait(manager.provisioner, "", {})
        pid = int(await async_execute(client, PID))
        client.execute(FAREWELL.format(path=str(tmp_path / "cut")))
        await until_printed(client, "begun")
        await server.cut()
        (tmp_path / "cut").touch()
        assert await poll_async(lambda: not psutil.pid_exists(pid), timeout=READY)
        await server.back()
        process = manager.provisioner._handle.process
        assert await poll_async(lambda: process.phase is Phase.DEAD, timeout=READY)
        assert process.returncode == 3
        assert "why it died" in process.output_tail
        kept = await manager.provisioner.kept_output()
        assert "farewell" in printed(kept)
        assert kept.dropped == 0


async def test_the_launch_token_is_void_on_record_too(service):
    """Once a launcher has taken the successor, what stands in the job's environment is nothing to a later server."""
    async with async_kernel(TUNNEL) as (manager, _client):
        launcher = manager.provisioner._handle.process.launcher
        (record,) = service.registry.launchers()
        assert record.tokens == launcher.tokens
        assert len({*record.tokens, *launcher.expected.tokens}) == 1


async def test_a_restarted_kernel_begins_with_no_output(service):
    """What its predecessor had published is no output of its own."""
    async with async_kernel(TUNNEL) as (manager, client):
        await acknowledge_and_wait(manager.provisioner, "", {"s": "x"})
        await async_execute(client, "print('before')")
        assert await poll_async_kept(manager.provisioner, "before\n")
        await manager.restart_kernel(now=True)
        await client.wait_for_ready(timeout=READY)
        await acknowledge_and_wait(manager.provisioner, "", {})
        await async_execute(client, "print('after')")
        assert await poll_async_kept(manager.provisioner, "after\n")
        kept = await manager.provisioner.kept_output()
        assert "before" not in printed(kept)
        assert kept.positions == {}


async def test_more_than_the_bound_is_dropped_and_counted(admin_settings):
    """The newest output is there, and how many messages are not."""
    admin_settings(kept_output=1)
    async with async_kernel(TUNNEL) as (manager, client):
        await acknowledge_and_wait(manager.provisioner, "", {})
        await async_execute(client, FLOOD)
        kept = await until_idle(manager.provisioner)
        shown = [frames for frames in kept.messages if len(frames[-1]) > 100_000]
        assert 8 <= len(shown) <= 10
        assert kept.dropped >= 40 - len(shown)
        assert b"x39" in shown[-1][-1]


async def test_nothing_is_kept_where_the_admin_says_so(admin_settings):
    """A reader gets an error that says so."""
    admin_settings(kept_output=0)
    async with async_kernel(TUNNEL) as (manager, _client):
        kept = await manager.provisioner.kept_output()
        assert (kept.keeps, kept.messages) == (False, [])


async def test_a_direct_kernels_output_is_not_kept(service):
    """Its launcher says so to the server that asks, and remembers the positions of the clients."""
    async with async_kernel(KERNEL_NAMES["direct"]) as (manager, client):
        manager.provisioner.acknowledge("", {"s": "x"})
        await async_execute(client, "print('one')")
        kept = await manager.provisioner.kept_output()
        assert (kept.keeps, kept.messages, kept.dropped, kept.positions) == (False, [], 0, {"s": "x"})
