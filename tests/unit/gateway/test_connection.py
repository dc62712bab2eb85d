"""A server's connection to one kernel: what its frontends get in which order, whatever is late, lost or restarted.

The connection is the gateway's; the kernel's journal and its replies are given by the test.
"""

from __future__ import annotations

import asyncio
import json
import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
from jupyter_client.session import Session as Signer

from gateway_slurm.budget import Budget
from gateway_slurm.errors import LinkError
from gateway_slurm.gateway.channels import connection as connection_module
from gateway_slurm.gateway.channels import lost, sources
from gateway_slurm.gateway.channels.connection import READ_KEY, KernelConnection
from gateway_slurm.gateway.channels.signatures import SLICE, Signatures
from gateway_slurm.gateway.channels.state import ExecutionState
from gateway_slurm.link.journal import JournalHeader, Record
from gateway_slurm.turns import Turns
from helpers.kernel_clients import poll_async

KERNEL = Signer(key=b"key")


class Journal(sources.JournalSource):
    """A journal that the test reads out; a second reading finds no launcher."""

    def __init__(self):
        pass

    def read(self, _start, _upto):
        raise LinkError("the launcher is gone")

    def close(self):
        pass


class Page:
    """A websocket that writes at once, or never."""

    protocol, reads_model = "", True

    def __init__(self, *, writes=True):
        self.writes, self.messages, self.written = writes, [], []

    def send(self, frame):
        self.messages.append(json.loads(frame))
        self.written.append(asyncio.get_running_loop().create_future())
        if self.writes:
            self.written[-1].set_result(None)
        return self.written[-1]

    def end(self, _reason):
        pass

    def end_dead(self, _reason):
        pass

    def refuse(self, _reason):
        pass

    @property
    def told(self):
        """Each message by its type, or by its text, state or prompt."""
        contents = [(message["msg_type"], message["content"]) for message in self.messages]
        return [c.get("text") or c.get("execution_state") or c.get("prompt") or kind for kind, c in contents]


def published(number, kind, content, parent, first=None):
    """A record of the journal."""
    return Record(first or number, number, [b"topic", *KERNEL.serialize(KERNEL.msg(kind, content, parent=parent))])


def request(kind="execute_request", content=None):
    """A frontend's request: its header and its parts."""
    message = KERNEL.msg(kind, content or {"code": "1"})
    parts = [KERNEL.pack(message[name]) for name in ("header", "parent_header", "metadata", "content")]
    return message["header"], parts


@pytest.fixture
def connect():
    """Make a connection to a kernel that runs; ``is_restored`` for one of an earlier server."""
    made = []

    def make(*, is_restored=False):
        provisioner = SimpleNamespace(acknowledge=lambda _positions, _notes: None)
        kernel = SimpleNamespace(kernel_id="k", execution_state="idle", session=KERNEL, provisioner=provisioner)
        manager = SimpleNamespace(
            log=logging.getLogger("test"),
            track_message_type=lambda _kind: True,
            kernel_info_timeout=60,
            budget=Budget(64 << 20, 0),
            owner_of=lambda _kernel_id: "alice",
            turns=Turns(slice_seconds=60),  # all that is pushed is there at once
        )
        state = ExecutionState(kernel, manager.track_message_type, "idle")
        ready = asyncio.Event().wait
        connection = KernelConnection(manager, kernel, ready=ready, state=state, is_restored=is_restored)
        connection._source, connection.window.limit = Journal(), 16 << 20
        if not is_restored:
            connection._set_known(1)
            connection._held = None
        made.append(connection)
        return connection

    yield make
    for connection in made:
        connection.close("the test is over")


@pytest.fixture
def no_grace(monkeypatch):
    """What is late is late at once."""
    monkeypatch.setattr(connection_module, "IDLE_GRACE", 0.05)
    monkeypatch.setattr(lost, "REPLY_GRACE", 0.05)


def opened(connection, name="alice", **kind):
    """A session with an open websocket."""
    session, page = connection.session(name), Page(**kind)
    session.attach(page)
    return session, page


def asked(connection):
    """A session with an open websocket that has sent a cell, and the cell's header."""
    session, page = opened(connection)
    header, parts = request()
    session.from_client("shell", parts)
    return session, page, header


def reply(connection, header, kind="execute_reply", content=None, channel="shell"):
    """The kernel replies."""
    content = content or {"status": "ok", "execution_count": 1}
    connection._from_kernel(channel, KERNEL.serialize(KERNEL.msg(kind, content, parent=header)))


async def test_a_reply_comes_after_the_output_that_was_published_before_it(connect):
    """It comes another way, which may be shorter."""
    connection = connect()
    _session, page, header = asked(connection)
    connection.take([published(1, "status", {"execution_state": "busy"}, header)])
    reply(connection, header)
    connection.take([published(2, "stream", {"name": "stdout", "text": "out"}, header)])
    assert page.told == ["busy", "out"]
    connection.take([published(3, "status", {"execution_state": "idle"}, header)])
    assert page.told == ["busy", "out", "execute_reply", "idle"]


async def test_what_waits_for_a_kernel_counts_for_its_user(connect):
    """A cell over the limit is answered with the reason; all is given back when the kernel is there, or is over."""
    connection = connect()
    connection._held, budget = [], connection.budget
    session, page = opened(connection)
    for _ in range(5):
        session.from_client("shell", request(content={"code": "x" * (15 << 20)})[1])
    evalues = [message["content"].get("evalue", "") for message in page.messages]
    assert sum("memory_per_user is 64 MiB" in evalue for evalue in evalues) == 2  # the error, and the reply
    assert 60 << 20 < budget.kinds()["held"] < 64 << 20
    connection.refuse_held("the kernel was restarted")
    assert budget.kinds()["held"] == 0
    connection.close("the kernel was shut down")
    assert budget.users() == {}


async def test_the_window_is_the_first_to_go_where_a_user_has_too_much(connect):
    """The kernel's node has what it had: pages that are behind read it there. Outputs of cells go as well."""
    connection = connect()
    connection.budget.per_user = 8 << 20
    header, _parts = request()
    large = {"name": "stdout", "text": "x" * (1 << 20)}
    for number in range(1, 40):
        connection.take([published(number, "stream", large, header)])
        await asyncio.sleep(0)
    assert connection.budget.used("alice") <= 11 << 20
    assert connection.budget.shed_count["window"] > 3
    assert connection.window.next == 40


@pytest.mark.usefixtures("no_grace")
async def test_a_reply_that_was_dropped_is_made_again_but_short(connect):
    """A page that did not read has the end of its cells all the same, on its next websocket."""
    connection = connect()
    session, page, header = asked(connection)
    connection.take([published(1, "status", {"execution_state": "busy"}, header)])
    reply(connection, header, content={"status": "ok", "execution_count": 7, "payload": ["x" * 1000]})
    page.writes = False
    connection.take([published(2, "status", {"execution_state": "idle"}, header)])
    session._shed("too much")
    second = Page()
    session.attach(second)
    assert await poll_async(lambda: "execute_reply" in second.told, timeout=10)
    (made,) = [message["content"] for message in second.messages if message["msg_type"] == "execute_reply"]
    assert made == {"status": "ok", "execution_count": 7, "payload": [], "user_expressions": {}}


@pytest.mark.usefixtures("no_grace")
async def test_a_reply_without_a_status_comes_all_the_same(connect):
    """A kernel may not say "idle"."""
    connection = connect()
    _session, page, header = asked(connection)
    reply(connection, header)
    assert await poll_async(lambda: page.told == ["execute_reply"], timeout=10)


@pytest.mark.usefixtures("no_grace")
async def test_the_end_of_a_cell_that_was_lost_comes_after_all_that_was_not(connect):
    """The count of what is lost, the rest of the output, the reply, and then "idle", once."""
    connection = connect()
    _session, page, header = asked(connection)
    connection.take([published(1, "stream", {"name": "stdout", "text": "early"}, header)])
    reply(connection, header)
    for number in range(100, 110):
        connection.take([published(number, "stream", {"name": "stdout", "text": f"{number}"}, header)])
        await asyncio.sleep(0.02)
    numbers = [str(number) for number in range(100, 110)]
    assert [text for text in page.told if text in numbers] == numbers
    assert await poll_async(lambda: "idle" in page.told, timeout=10)
    assert (page.told[-1], page.told.count("execute_reply"), page.told.count("idle")) == ("idle", 1, 1)
    assert sum("98 messages were dropped here" in text for text in page.told) == 1


async def test_a_page_behind_the_window_hears_of_its_kernels_death(connect):
    """Its job is over, and its launcher with it: what is missing is counted."""
    connection = connect()
    session, page = opened(connection)
    connection.window.limit = 1
    header, parts = request()
    session.from_client("shell", parts)
    large = {"name": "stdout", "text": "x" * (1 << 20)}
    connection.take([published(number, "stream", large, header) for number in range(1, 5)])
    connection.fail("the job ended: TIMEOUT")
    assert await poll_async(lambda: not session.has_unsent, timeout=10)
    assert page.messages[-2]["content"]["evalue"] == "the job ended: TIMEOUT"
    assert any("messages were dropped here" in text for text in page.told)


@pytest.mark.usefixtures("no_grace")
async def test_a_reply_that_an_earlier_server_may_not_have_sent_is_made(connect):
    """It had come, and the page was not there: its cell would not end."""
    before = connect()
    session = before.session("alice")
    header, parts = request()
    session.from_client("shell", parts)
    busy, idle = ({"execution_state": state} for state in ("busy", "idle"))
    before.take([published(1, "status", busy, header), published(2, "execute_input", {"execution_count": 1}, header)])
    reply(before, header)
    notes = {key: text for key, text in before.executions.changed_notes().items() if text is not None}
    after = connect(is_restored=True)
    _session, page = opened(after)
    positions = {READ_KEY: 2, "alice": 0}
    after._on_header(JournalHeader(1, 3, 3, positions, notes, subscribed=True, trouble=""))
    after._held = None
    after.take([published(3, "status", idle, header)])
    assert await poll_async(lambda: "execute_reply" in page.told, timeout=10)
    assert page.messages[-1]["content"]["status"] == "ok"


async def test_a_page_that_is_back_before_the_journal_goes_on_where_it_was(connect):
    """Also if its websocket ends before all is written."""
    connection = connect(is_restored=True)
    session, page = opened(connection, writes=False)
    connection.send_status("starting")
    positions = {READ_KEY: 900, "alice": 899}
    connection._on_header(JournalHeader(1, 901, 901, positions, {}, subscribed=True, trouble=""))
    assert session.position == 899
    page.written[0].set_result(None)
    await asyncio.sleep(0)
    session.detach(page)
    assert session.position == 899


@pytest.mark.usefixtures("no_grace")
async def test_a_cell_that_runs_late_in_the_journal_is_not_taken_for_lost(connect):
    """The probes are answered at once, and what the kernel published is still being read."""
    connection = connect(is_restored=True)
    note = json.dumps({"status": "queued", "session": "alice", "queued": "2026-12-01T00:00:00Z", "header": {}})
    header = {"msg_id": "c1", "msg_type": "execute_request", "session": "alice"}
    _session, page = opened(connection)
    positions = {READ_KEY: 0, "alice": 0}
    connection._on_header(JournalHeader(1, 50, 1, positions, {"c1": note}, subscribed=True, trouble=""))
    probes = []
    connection._send_to_kernel = lambda _channel, parts: probes.append(json.loads(parts[0])) or ""
    connection._lost.find()
    for _ in range(10):
        if probes:
            reply(connection, probes[-1], "kernel_info_reply")
        await asyncio.sleep(0.05)
    assert "execute_reply" not in page.told
    busy, idle = ({"execution_state": state} for state in ("busy", "idle"))
    connection.take([published(1, "status", busy, header), published(2, "status", idle, header)])
    assert await poll_async(lambda: "execute_reply" in page.told, timeout=10)
    assert page.messages[-1]["content"]["status"] == "ok"


async def test_a_question_goes_to_the_page_that_caused_it_or_to_those_that_are_there(connect):
    """Also of a comm's message, and again to one that comes later."""
    connection = connect()
    session, page = opened(connection)
    _other, second = opened(connection, "bob")
    header, parts = request("comm_msg", {"comm_id": "1", "data": {}})
    session.from_client("shell", parts)
    reply(connection, header, "input_request", {"prompt": "comm?", "password": False}, "stdin")
    assert (page.told, second.told) == (["comm?"], [])
    header, parts = request()
    session.from_client("shell", parts)
    session.detach(page)
    reply(connection, header, "input_request", {"prompt": "cell?", "password": False}, "stdin")
    assert second.told == ["cell?"]
    _third, third = opened(connection, "carol")
    assert third.told == ["cell?"]


async def test_a_marker_ends_the_cells_of_the_process_before_it(connect):
    """The kernel was restarted while no server was there."""
    connection = connect()
    session, page = opened(connection)
    _header, parts = request()
    session.from_client("shell", parts)
    connection.take([Record(1, 1, [])])
    replies = [message["content"] for message in page.messages if message["msg_type"] == "execute_reply"]
    assert [content["ename"] for content in replies] == ["KernelRestarted"]
    assert page.told[-1] == "idle"


async def test_what_the_kernel_has_not_signed_is_neither_shown_nor_believed(connect):
    """Another process may have its port: output and replies are dropped, and the page says so once."""
    connection = connect()
    _session, page, header = asked(connection)
    forged = Signer(key=b"another key")
    output, idle = (
        forged.serialize(forged.msg(kind, content, parent=header))
        for kind, content in (("stream", {"name": "stdout", "text": "forged"}), ("status", {"execution_state": "idle"}))
    )
    unsigned = [b"<IDS|MSG>", b"", *output[2:]]
    malformed = ([b"topic"], [b"<IDS|MSG>"], [b"<IDS|MSG>", b"x"], [b""])
    for number, frames in enumerate((output, unsigned, idle, *malformed), 1):
        connection.take([Record(number, number, frames)])
    connection._from_kernel("shell", forged.serialize(forged.msg("execute_reply", {"status": "ok"}, parent=header)))
    connection.take([published(8, "execute_input", {"code": "1", "execution_count": 1}, header)])
    connection.take([published(9, "stream", {"name": "stdout", "text": "own"}, header)])
    assert page.told[0] == "execute_input"
    assert "not signed with the kernel's key" in page.told[1]
    assert page.told[2:] == ["own"]
    assert connection.executions.get(header["msg_id"]).is_open
    reply(connection, header)
    connection.take([published(10, "status", {"execution_state": "idle"}, header)])
    assert page.told[3:] == ["execute_reply", "idle"]


async def test_a_server_without_a_key_takes_what_is_not_signed(connect):
    """``Session.key`` may be set to nothing; the kernel then signs nothing."""
    connection = connect()
    connection.kernel.session = Signer(key=b"")
    _session, page, header = asked(connection)
    plain = Signer(key=b"")
    frames = plain.serialize(plain.msg("stream", {"name": "stdout", "text": "own"}, parent=header))
    connection.take([Record(1, 1, frames)])
    assert page.told == ["own"]


@pytest.mark.parametrize("size", [100, 3 << 20])
def test_a_large_message_is_signed_and_checked_in_steps(size):
    """Each step takes about a millisecond; the signature is that of Jupyter's own session."""
    signatures = Signatures(SimpleNamespace(session=KERNEL))
    parts = [b"{}", b"{}", b"{}", b"x" * size]

    def run(steps):
        count = 0
        while True:
            try:
                next(steps)
                count += 1
            except StopIteration as end:
                return end.value, count

    signed, steps = run(signatures.signing(parts))
    assert (steps > 2) == (size > SLICE)
    assert signatures.sign(signed) == KERNEL.sign(parts)
    frames = [b"<IDS|MSG>", KERNEL.sign(parts), *parts, b"buffer"]
    checked, count = run(signatures.checking(frames))
    assert (checked, count, signatures.is_valid(checked)) == (frames, steps, True)
    frames[5] += b"y"
    assert not signatures.is_valid(run(signatures.checking(frames))[0])


async def test_a_flood_to_many_pages_takes_turns_with_other_users(connect):
    """Between two pieces of another user's work only some milliseconds of the flood's are done."""
    connection = connect()
    turns = connection._manager.turns = Turns()
    pages = [opened(connection, f"page{number}")[1] for number in range(60)]
    content = {"name": "stdout", "text": "x" * 1000}
    records = [published(number, "stream", content, {"msg_id": "1"}) for number in range(1, 193)]
    batches = [asyncio.ensure_future(connection.turn(connection.take, records[n : n + 64])) for n in (0, 64, 128)]
    delivered, seen = [], []
    await asyncio.sleep(0)
    while not all(batch.done() for batch in batches) or any(len(page.messages) < 192 for page in pages):
        await turns.run("bob", delivered.append, len(seen))
        seen.append(sum(len(page.messages) for page in pages))
    steps = [after - before for before, after in pairwise(seen)]
    assert sum(steps) > 60 * 100
    # One batch of 64 is read at once; it is written page by page, in slices.
    assert max(steps) < 60 * 192 / 4
    assert all(page.told == [content["text"]] * 192 for page in pages)
