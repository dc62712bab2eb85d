"""Launchers that hold their token and mean harm: what one says harms its own user, and hardly any other."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from gateway_slurm.allocations import monitor
from gateway_slurm.allocations.launcher import Launcher, LauncherEvents
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.allocations.monitor import WalltimeMonitor
from gateway_slurm.allocations.table import OwnerContext
from gateway_slurm.config import ServiceSettings
from gateway_slurm.events import Events
from gateway_slurm.link import bounds, server, wire
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.model import JobInfo
from helpers.kernel_clients import poll_async
from helpers.raw_links import LauncherEnd, RecordingHandler, connect, draw_tokens, launcher_settings

LOG = logging.getLogger("test.hostile")


class Owner:
    """A response socket and one launcher that it expects, of job 12; records the calls to the launcher's owner."""

    def __init__(self, socket: server.ResponseSocket) -> None:
        self.socket = socket
        self.told: list[tuple[Any, ...]] = []
        self.allocation = Allocation(ours=True, request=KernelRequest())
        self.allocation.accept("12")
        events = LauncherEvents(self.linked, self.link_lost, self.end_reported)
        self.launcher = Launcher("L1", self.allocation, launcher_settings(), addresses=list, events=events, log=LOG)
        self.launcher.jobid, self.launcher.tokens = "12", draw_tokens()
        self.launcher.expected = socket.expect("L1", self.launcher.tokens, self.launcher)
        self.launcher.expected.jobid.set_result("12")
        self.allocation.add_launcher(self.launcher)

    def linked(self) -> None:
        """An event of the launcher's, like the next two."""
        self.told.append(("up",))

    def link_lost(self, reason: str) -> None:
        self.told.append(("lost", reason))

    def end_reported(self, _launcher: Launcher, end_time: float | None, *, due: bool) -> None:
        self.told.append(("walltime", end_time, due))

    async def connect(self, **hello: Any) -> LauncherEnd:
        """The launcher's end, after WELCOME."""
        return await connect(self.socket, self.launcher.tokens[0], **hello)

    async def until_lost(self) -> str:
        """Why the link went down."""
        assert await poll_async(lambda: [each for each in self.told if each[0] == "lost"], timeout=10)
        return next(each[1] for each in self.told if each[0] == "lost")

    async def until_taken(self, peer: LauncherEnd) -> None:
        """Wait until all that the peer has said so far is taken."""
        before = len(self.told)
        peer.say(wire.encode("NOTICE", kind="walltime", remaining=None))
        assert await poll_async(lambda: ("walltime", None, True) in self.told[before:], timeout=10)


@pytest.fixture
async def socket() -> AsyncIterator[server.ResponseSocket]:
    """A listening response socket."""
    response_socket = server.ResponseSocket(log=LOG)
    await response_socket.listen(["127.0.0.1"], range(1))
    yield response_socket
    await response_socket.close()


@pytest.fixture
async def owner(socket: server.ResponseSocket) -> Owner:
    """One launcher's."""
    return Owner(socket)


# -- what HELLO says ------------------------------------------------------------------------------

NODELISTS = {
    "unbalanced": "[",
    "very many": "n[1-65535]",
    "a long name": "n" * 300,
    "long names": "n" * 250 + "[1-9999]",
}


@pytest.mark.parametrize("text", NODELISTS.values(), ids=NODELISTS)
async def test_a_list_of_nodes_that_is_none_is_as_nothing(owner: Owner, text: str) -> None:
    """Lists of all users' allocations hold this one, too, after a restart as well: without nodes."""
    await owner.connect(slurm_job_nodelist=text)
    assert owner.allocation.row()["nodes"] == []
    assert owner.launcher.nodelist == ""
    owner.launcher.nodelist = text  # as from a record
    assert owner.allocation.row()["nodes"] == []


async def test_the_nodes_are_reckoned_once_a_link(owner: Owner) -> None:
    """A caller gets the list that was made when the link came up."""
    await owner.connect(slurm_job_nodelist="c[1-2]")
    assert owner.allocation.nodes == ["c1", "c2"]
    made = owner.launcher.nodes
    owner.allocation.row()
    assert owner.launcher.nodes is made


ENDS = [math.inf, -math.inf, math.nan, 1e300, 10**400, True, "soon", [], None]


@pytest.mark.parametrize("end", ENDS, ids=repr)
async def test_an_end_that_no_job_has_is_not_believed(owner: Owner, end: Any) -> None:
    """Not in HELLO, and not in a warning: it would be in records, and in JSON that no browser reads."""
    peer = await owner.connect(remaining=end, age=end, clock=end, slurm_job_end_time=str(end))
    assert owner.launcher.end_time is None
    json.dumps(owner.allocation.row(), allow_nan=False)
    peer.say(wire.encode("NOTICE", kind="walltime", remaining=end))
    assert await poll_async(lambda: owner.told == [("walltime", None, True)], timeout=10)


@pytest.mark.parametrize("text", ["²", "1" * 8, "9" * 400, "x"])
async def test_a_time_that_slurm_would_not_say_keeps_no_launcher_out(owner: Owner, text: str) -> None:
    """The link comes up without it."""
    await owner.connect(slurm_job_end_time=text)
    assert owner.launcher.end_time is None


async def test_an_end_that_a_job_may_have_is_believed(owner: Owner) -> None:
    """The launcher's own word before Slurm's."""
    near = int(time.time()) + 3600
    await owner.connect(remaining=1800, slurm_job_end_time=str(near))
    assert owner.launcher.end_time == pytest.approx(near - 1800, abs=30)
    await owner.connect(remaining=None, slurm_job_end_time=str(near))
    assert owner.launcher.end_time == near


async def test_a_hello_that_its_owner_cannot_take_ends_the_link(socket: server.ResponseSocket) -> None:
    """No process would watch over it."""

    class Failing(RecordingHandler):
        def link_up(self, link: server.Link, hello: dict[str, Any]) -> dict[str, Any]:
            raise KeyError("our own fault")

    handler, tokens = Failing(), draw_tokens()
    socket.expect("L1", tokens, handler).jobid.set_result("12")
    peer = await LauncherEnd.dial(socket.port)
    peer.writer.write(peer.hello("L1", tokens[0], "12"))
    assert await peer.is_closed()
    assert handler.events == [("down", "its HELLO could not be handled")]


# -- how much it says -----------------------------------------------------------------------------


async def test_a_second_report_on_one_link_ends_it(owner: Owner) -> None:
    """It answers WELCOME, which comes once."""
    peer = await owner.connect()
    report = wire.encode("REPORT", kernels=[])
    peer.say(report, report, report)
    assert "a second REPORT" in await owner.until_lost()
    assert [each for each in owner.told if each[0] == "up"] == [("up",)]


@pytest.mark.parametrize("frames", [1, 3000])
async def test_the_loop_has_its_turn_between_a_launchers_messages(socket: server.ResponseSocket, frames: int) -> None:
    """However many come at once, in one frame or in many; all are taken, in their order, before the end is."""
    handler, tokens, rounds = RecordingHandler(), draw_tokens(), [0]
    taken: list[tuple[int, int]] = []
    handler.link_message = lambda _link, _name, fields: taken.append((rounds[0], int(fields["kind"])))  # type: ignore[method-assign]
    socket.expect("L1", tokens, handler).jobid.set_result("12")
    peer = await connect(socket, tokens[0])
    loop = asyncio.get_running_loop()

    def other() -> None:
        rounds[0] += 1
        if not handler.events[1:]:
            loop.call_soon(other)

    other()
    messages = [wire.encode("NOTICE", kind=str(number)) for number in range(3000)]
    bodies = [messages[at::frames] for at in range(frames)]
    data = b"".join(wire.frame(peer.seal(wire.pack(each))) for each in bodies)
    (link,) = socket._links
    link.data_received(data)
    link.connection_lost(None)  # as the relay tells of it: at once
    assert await handler.until("down") == ("down", "the launcher closed it")
    assert [number for _round, number in taken] == list(range(3000))
    assert taken[-1][0] - taken[0][0] > 1


# -- what it does not read ------------------------------------------------------------------------


async def test_a_launcher_that_does_not_read_has_a_bounded_number_of_messages_wait(owner: Owner) -> None:
    """Its link ends; streams of data have bounds of their own."""
    await owner.connect()
    link = owner.launcher.link
    assert link is not None
    sent = 0
    while owner.launcher.link is link:
        owner.launcher.send("STDERR_LINE", kernel_id="k", text="x" * (1 << 20))
        sent += 1
        assert sent < 100
        await asyncio.sleep(0)
    assert await owner.until_lost() == "the launcher does not read its messages"
    assert owner.launcher.streams._outbox.messages_size == 0


async def test_one_that_reads_may_be_told_much(owner: Owner) -> None:
    """As when a dozen kernels with large environments start at once."""
    peer = await owner.connect()
    for number in range(15):
        owner.launcher.send("STDERR_LINE", kernel_id=str(number), text="x" * (1 << 20))
    assert [(await peer.message())[1]["kernel_id"] for _ in range(15)] == [str(number) for number in range(15)]
    assert owner.launcher.link is not None
    assert owner.launcher.link.outbox.messages_size == 0


async def test_ids_that_no_server_gives_are_not_repeated(owner: Owner) -> None:
    """What a launcher says is not sent back to it at any length."""
    peer = await owner.connect()
    stepped = {"status": 0, "stderr": ""}
    kernels = [{"kernel_id": each, "generation": 1, "state": "running"} for each in ("k" * 100, "k", 7)]
    peer.say(wire.encode("REPORT", kernels=kernels, steps=[{"step": "s" * 101, **stepped}, {"step": "s1", **stepped}]))
    peer.say(wire.encode("STEPPED", step="s" * 101, **stepped), wire.encode("STEPPED", step="s2", **stepped))
    said = [await peer.message() for _ in range(4)]
    assert sorted(said, key=repr) == [
        ("STEP_ACK", {"step": "s1"}),
        ("STEP_ACK", {"step": "s2"}),
        ("STOP", {"kernel_id": "k"}),
        ("STOP", {"kernel_id": "k" * 100}),
    ]


async def test_a_report_of_very_many_kernels_is_answered_for_some(
    owner: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the log nor the link is filled by it."""
    peer = await owner.connect()
    caplog.clear()
    fields = {"generation": 1, "state": "running"}
    peer.say(wire.encode("REPORT", kernels=[{"kernel_id": f"k{number}", **fields} for number in range(2000)]))
    assert await poll_async(lambda: ("up",) in owner.told, timeout=10)
    assert [await peer.message() for _ in range(bounds.MAX_KERNELS)][-1] == ("STOP", {"kernel_id": "k511"})
    assert len(caplog.records) <= 2


def deaf(link: server.Link | None) -> Any:
    """Have the link's other end take nothing, as far as the server can tell; returns the server's socket."""
    assert link is not None
    assert link._transport is not None
    sock = link._transport.get_extra_info("socket")
    for _megabyte in range(64):  # more than the system's buffers take
        link._transport.write(bytes(1 << 20))
    return sock


async def test_a_link_that_is_replaced_is_gone_at_once(owner: Owner) -> None:
    """One that dials again and again, and reads nothing, holds one connection."""
    first = await owner.connect()
    sock = deaf(owner.launcher.link)
    second = await owner.connect()
    assert await poll_async(lambda: sock.fileno() == -1, timeout=server.GOODBYE_SECONDS - 1)
    for peer in (first, second):
        peer.writer.close()


async def test_a_launcher_that_reads_nothing_is_waited_for_a_while_only(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said last has its time to go out."""
    monkeypatch.setattr(server, "GOODBYE_SECONDS", 0.2)
    peer = await owner.connect()
    link = owner.launcher.link
    sock = deaf(link)
    assert link is not None
    link.close("the test says so")
    assert sock.fileno() != -1
    assert await poll_async(lambda: sock.fileno() == -1, timeout=10)
    peer.writer.close()


# -- how often Slurm is asked ---------------------------------------------------------------------


async def test_a_slurmd_is_told_of_when_it_goes_and_when_it_is_back(owner: Owner) -> None:
    """Saying it again asks nothing of Slurm."""
    peer = await owner.connect()
    for missing in (False, True, True, True, False, False):
        peer.say(wire.encode("NOTICE", kind="slurmd", missing=missing))
    await owner.until_taken(peer)
    assert [each for each in owner.told if each[0] == "lost"] == [("lost", "slurmd")] * 2


class Slurm:
    """Tells when job 12 ends, and notes how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.end = time.time() + 3600

    async def jobs(self, _jobids: Any) -> dict[str, JobInfo]:
        self.asked += 1
        await asyncio.sleep(0)
        return {"12": JobInfo(jobid="12", state="RUNNING", end_time=self.end)}


@pytest.fixture
async def limits(owner: Owner) -> AsyncIterator[SimpleNamespace]:
    """What looks at ends, its Slurm, and the warnings that came of it."""
    slurm, tasks, warned = Slurm(), set(), []

    def create_task(coroutine: Any) -> asyncio.Task[Any]:
        tasks.add(task := asyncio.ensure_future(coroutine))
        return task

    table: Any = SimpleNamespace(tasks=SimpleNamespace(create_task=create_task), record=lambda _allocation: None)
    owner.launcher.warn_of_end = warned.append  # type: ignore[method-assign]
    settings = ServiceSettings(walltime_warnings=[10])
    context = OwnerContext("", "ada", slurm, owner.socket, None, table, settings, Events(LOG), LOG)  # type: ignore[arg-type]
    found = WalltimeMonitor(context)
    yield SimpleNamespace(
        look=lambda *arguments, due: found.check(owner.allocation, owner.launcher, *arguments, due=due),
        slurm=slurm,
        warned=warned,
        tasks=tasks,
    )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_launcher_that_asks_for_its_end_again_and_again_has_one_look(limits: SimpleNamespace) -> None:
    """One task and one squeue; the next come after a pause."""
    for _time in range(1000):
        limits.look(limits.slurm.end, due=False)
        await asyncio.sleep(0)
    assert limits.slurm.asked == 1
    assert sum(not task.done() for task in limits.tasks) == 1


async def test_a_changed_end_reaches_launchers_of_the_previous_version_too(
    owner: Owner, limits: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They know the moment alone, and later ones the seconds until then. In HELLO either names the end."""
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(owner.launcher, "send", lambda _name, **fields: sent.append(fields))
    monkeypatch.setitem(owner.allocation.launchers, "gs-a", owner.launcher)
    limits.look(limits.slurm.end - 600, due=False)
    assert await poll_async(lambda: bool(sent), timeout=10)
    assert sent[0] == {"end_time": limits.slurm.end, "remaining": pytest.approx(3600, abs=60)}
    for hello in ({"end_time": limits.slurm.end}, {"remaining": limits.slurm.end - time.time()}):
        assert owner.launcher._end_time_of(hello) == pytest.approx(limits.slurm.end, abs=5)


async def test_a_warning_that_is_due_is_not_lost_among_other_looks(
    limits: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's signal comes with the first warning, before it or after it."""
    monkeypatch.setattr(monitor, "CHECK_INTERVAL", 0.05)
    limits.look(limits.slurm.end, due=True)
    limits.look(limits.slurm.end, due=False)
    assert await poll_async(lambda: limits.warned == [limits.slurm.end], timeout=10)
    limits.look(limits.slurm.end, due=False)
    limits.look(limits.slurm.end, due=True)
    assert await poll_async(lambda: limits.warned == [limits.slurm.end] * 2, timeout=10)
    assert await poll_async(lambda: all(task.done() for task in limits.tasks), timeout=10)


# -- what takes the server's time -----------------------------------------------------------------


async def test_a_launcher_that_breaks_its_bounds_is_cut_off_and_kept_out_for_a_while(owner: Owner) -> None:
    """Each time for longer; a launcher of another user is not affected."""
    peer = await owner.connect()
    peer.say(wire.encode("NOTICE", kind="x", message="m" * bounds.MESSAGES["NOTICE"].size))
    assert "the limit is" in await owner.until_lost()
    again = await LauncherEnd.dial(owner.socket.port)
    again.writer.write(again.hello("L1", owner.launcher.tokens[0], "12"))
    assert await again.is_closed()
    handler, tokens = RecordingHandler(), draw_tokens()
    owner.socket.expect("L2", tokens, handler, user="bob").jobid.set_result("12")
    await connect(owner.socket, tokens[0], "L2")
    loop, expected = asyncio.get_running_loop(), owner.launcher.expected
    assert expected is not None
    assert await poll_async(lambda: loop.time() > expected.kept_out_until, timeout=10)
    await owner.connect()


async def test_data_for_streams_that_do_not_exist_ends_the_link(owner: Owner) -> None:
    """Some may be on its way when a stream ends; not more."""
    peer = await owner.connect()
    for _count in range(20 * 8):
        peer.say(wire.encode_stream("DATA", 1, bytes(128 << 10)))
        await asyncio.sleep(0)
    assert "do not exist" in await owner.until_lost()


async def test_a_launcher_that_only_talks_is_read_slowly_and_others_at_once(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its messages may take some of the processor's time, and then a small share of it."""
    monkeypatch.setattr(server, "MESSAGES_BURST", 0.02)
    handler, tokens = RecordingHandler(), draw_tokens()
    owner.socket.expect("L2", tokens, handler, user="bob").jobid.set_result("12")
    talks, other = await owner.connect(), await connect(owner.socket, tokens[0], "L2")
    link = owner.launcher.link
    assert link is not None
    link._allowance = 0.02
    notice = wire.encode("NOTICE", kind="log", message="x" * 900)
    for _count in range(100):
        talks.say(*[notice] * 100)
    assert await poll_async(lambda: link._allowance < 0, timeout=10)
    begin = asyncio.get_running_loop().time()
    for _count in range(20):
        before = len(handler.events)
        other.say(wire.encode("NOTICE", kind="x"))
        assert await poll_async(lambda: len(handler.events) > before, timeout=10)  # noqa: B023
    assert asyncio.get_running_loop().time() - begin < 5
    assert link._messages or link._frames  # the rest waits
