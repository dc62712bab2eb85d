"""The journal of a kernel's output: what it published while its server was away, and what the next server reads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from gateway_slurm.errors import LinkError
from gateway_slurm.kernels.model import Phase
from gateway_slurm.link.journal import JournalHeader, Record
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
for number in range(120):
    display({'text/plain': 'x' * 100_000 + str(number)}, raw=True)
"""


def content_of(record: Record) -> dict[str, Any]:
    """The content of a record's message."""
    content = json.loads(record.frames[record.frames.index(b"<IDS|MSG>") + 5]) if record.frames else {}
    assert isinstance(content, dict)
    return content


def printed(records: list[Record]) -> str:
    """What the records say on stdout."""
    contents = [content_of(record) for record in records]
    return "".join(content["text"] for content in contents if content.get("name") == "stdout")


def last_state(records: list[Record]) -> str:
    """The last status that the kernel published; empty where there is none."""
    states = [content_of(record).get("execution_state") for record in records]
    return next((state for state in reversed(states) if state), "")


def lost(records: list[Record]) -> int:
    """How many numbers are missing between the records."""
    return sum(after.first - before.number - 1 for before, after in itertools.pairwise(records))


async def read(provisioner: Any, start: int | None = 1) -> tuple[JournalHeader, list[Record]]:
    """The journal as it is now."""
    reading = provisioner.read_journal(start, 10**9)
    header = await asyncio.wait_for(reading.header(), READY)
    return header, [record async for records in reading for record in records]


async def read_until(provisioner: Any, condition: Callable[[list[Record]], bool]) -> list[Record]:
    """Read one endless reading until the records so far fulfil the condition."""
    reading, found = provisioner.read_journal(1), []
    try:
        while not condition(found):
            found += await asyncio.wait_for(anext(reading), READY)
    finally:
        reading.close()
    return found


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


async def text_until(client: Any, end: str) -> str:
    """What a client gets of stdout, up to a message in which this is; several lines may come as one message."""
    text = ""
    while end not in text:
        text += (await client.get_iopub_msg(timeout=READY))["content"].get("text", "")
    return text


def is_idle(records: list[Record]) -> bool:
    """Whether the kernel was idle last."""
    return last_state(records) == "idle"


async def test_a_cell_that_ran_on_without_a_server_has_all_its_output(service, tmp_path):
    """Another server finds it in the journal from its first line on, with the positions and notes of the one before."""
    async with async_kernel(TUNNEL) as (manager, client):
        server = Server(service, manager)
        request = client.execute(COUNT.format(path=str(tmp_path / "over")))
        await text_until(client, "10\n")
        header, before = await read(manager.provisioner)
        manager.provisioner.acknowledge({"s": 2, " read": before[-1].number}, {"m": "running"}).result(READY)
        await server.cut()
        manager.provisioner.acknowledge({"s": 3, " read": before[-1].number}, {"n": "lost with the link"}).result(READY)
        assert await poll_async((tmp_path / "over").exists, timeout=READY)
        await server.back()
        header, after = await read(manager.provisioner, None)
        assert header.start == before[-1].number + 1
        assert (header.oldest, header.subscribed, header.trouble) == (1, True, "")
        assert header.positions == {"s": 3, " read": before[-1].number}
        assert header.notes == {"m": "running", "n": "lost with the link"}
        assert [int(line) for line in printed(before + after).split()] == list(range(60))
        assert lost(before + after) == 0
        parents = {json.loads(record.frames[record.frames.index(b"<IDS|MSG>") + 3]).get("msg_id") for record in after}
        assert request in parents


async def test_a_client_and_an_endless_reading_go_on_when_the_link_comes_back(service, tmp_path):
    """To the same server: the streams continue by bytes, and nothing comes twice."""
    async with async_kernel(TUNNEL) as (manager, client):
        server = Server(service, manager)
        reading = asyncio.ensure_future(
            read_until(manager.provisioner, lambda found: "59" in printed(found[-3:]) and is_idle(found))
        )
        client.execute(COUNT.format(path=str(tmp_path / "over")))
        text = await text_until(client, "5\n")
        await server.cut()
        assert await poll_async((tmp_path / "over").exists, timeout=READY)
        await server.back(same=True)
        text += await text_until(client, "59\n")
        assert text.split() == [str(number) for number in range(60)]
        records = await reading
        assert printed(records).split() == [str(number) for number in range(60)]
        assert lost(records) == 0


async def test_a_flood_without_a_server_has_no_hole_that_is_not_counted(service, tmp_path):
    """Ten thousand lines and 100 MB after them: the node reads as fast as the kernel publishes, to the bound."""
    async with async_kernel(TUNNEL) as (manager, client):
        server = Server(service, manager)
        client.execute(PRINTS_AND_DISPLAYS.format(path=str(tmp_path / "cut"), drop_nothing=DROP_NOTHING))
        await until_printed(client, "begun")
        await server.cut()
        (tmp_path / "cut").touch()
        assert await poll_async((tmp_path / "cut-printed").exists, timeout=READY)
        await server.back()
        records = await read_until(manager.provisioner, lambda found: bool(found) and is_idle(found))
        header, records = await read(manager.provisioner)
        contents = [record.frames[-1] for record in records if record.frames and b"<" in record.frames[-1]]
        shown = [int(content.rpartition(b"<")[2].partition(b">")[0]) for content in contents]
        assert shown == list(range(shown[0], 100))
        assert 60 <= len(shown) <= 67
        assert (header.oldest, lost(records)) == (records[0].first, 0)
        assert header.oldest > 100 - len(shown)


async def test_a_kernels_last_words_can_be_read_after_its_death(service, tmp_path):
    """Its exit code, the end of its stderr, and what it published before, told to a server that comes later."""
    async with async_kernel(TUNNEL) as (manager, client):
        server = Server(service, manager)
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
        _header, records = await read(manager.provisioner)
        assert "farewell" in printed(records)
        assert lost(records) == 0


async def test_the_launch_token_is_void_on_record_too(service):
    """Once a launcher has taken the successor, what stands in the job's environment is nothing to a later server."""
    async with async_kernel(TUNNEL) as (manager, _client):
        launcher = manager.provisioner._handle.process.launcher
        (record,) = service.registry.launchers()
        assert record.tokens == launcher.tokens
        assert len({*record.tokens, *launcher.expected.tokens}) == 1


async def test_a_restarted_kernel_continues_the_journal(service):
    """A reader that is behind gets the old process's output, a marker, and the new one's, in one sequence."""
    async with async_kernel(TUNNEL) as (manager, client):
        await async_execute(client, "print('before')")
        behind = manager.provisioner.read_journal(1)
        assert (await behind.header()).start == 1
        await manager.restart_kernel(now=True)
        await client.wait_for_ready(timeout=READY)
        await async_execute(client, "print('after')")
        records: list[Record] = []
        while "after" not in printed(records):
            records += await asyncio.wait_for(anext(behind), READY)
        behind.close()
        markers = [record.number for record in records if not record.frames]
        assert len(markers) == 2
        assert markers[0] == 1
        assert "before" in printed([record for record in records if record.number < markers[1]])
        assert "before" not in printed([record for record in records if record.number > markers[1]])
        assert lost(records) == 0
        assert manager.provisioner._handle.process._delivered == records[-1].number


async def test_a_stopped_kernels_readings_end(service, monkeypatch):
    """The journal of a kernel that was shut down goes with it."""
    async with async_kernel(TUNNEL) as (manager, _client):
        reading = manager.provisioner.read_journal(1)
        await reading.header()
        await manager.shutdown_kernel(now=True)
        with contextlib.suppress(LinkError):
            while True:
                await asyncio.wait_for(anext(reading), READY)
        with pytest.raises(LinkError, match="no journal"):
            manager.provisioner.read_journal(1)


@pytest.mark.parametrize("setting", [1, 0])
async def test_the_journal_is_bounded_and_its_jump_is_the_count(admin_settings, setting):
    """The newest output is there; fewer than 8 MiB are not possible."""
    admin_settings(kept_output=setting)
    async with async_kernel(TUNNEL) as (manager, client):
        await async_execute(client, FLOOD)
        await read_until(manager.provisioner, lambda found: bool(found) and is_idle(found))
        header, records = await read(manager.provisioner)
        shown = [record for record in records if record.frames and len(record.frames[-1]) > 100_000]
        assert 78 <= len(shown) <= 84
        assert header.oldest == records[0].first > 120 - len(shown)
        assert b"x119" in shown[-1].frames[-1]


async def test_a_direct_kernel_has_no_journal(service):
    """A reading says so at once; an acknowledgement is no error."""
    async with async_kernel(KERNEL_NAMES["direct"]) as (manager, client):
        manager.provisioner.acknowledge({"s": 3}, {}).result(READY)
        await async_execute(client, "print('one')")
        assert not manager.provisioner.has_journal
        with pytest.raises(LinkError, match="no journal"):
            manager.provisioner.read_journal(1)
