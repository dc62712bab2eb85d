"""A session that another server had: what it has not had is delivered once, in order, and its cells get answers.

The kernel is sockets of ZMQ's that say what a test wants; what its launcher kept is a list.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass, field
from functools import partial

import pytest
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from gateway_slurm.errors import LinkError
from gateway_slurm.gateway.channels import messages, replay
from gateway_slurm.gateway.channels.acks import OutputAcks, Position
from gateway_slurm.gateway.channels.channels import KernelChannels
from gateway_slurm.gateway.channels.replay import Replay
from gateway_slurm.gateway.channels.sockets import KernelSocket, prepare_context
from gateway_slurm.gateway.channels.state import ExecutionState
from helpers.kernel_clients import poll_async

SESSION = "frontend-1"
WAIT = 10  # seconds


@dataclass
class Kept:
    """As a provisioner has it."""

    messages: list[list[bytes]] = field(default_factory=list)
    dropped: int = 0
    positions: dict[str, str] = field(default_factory=dict)


class Kernel:
    """Sockets of a kernel, as its manager knows them."""

    kernel_id, curve_publickey, execution_state = "kernel-1", None, "busy"

    def __init__(self, directory):
        self.context = zmq.asyncio.Context()
        self.session = Session(key=b"secret")
        self._directory = directory
        self.iopub = self._bind("iopub", zmq.XPUB)
        self.shell = self._bind("shell", zmq.ROUTER)
        self.control, self.stdin = self._bind("control", zmq.ROUTER), self._bind("stdin", zmq.ROUTER)
        self.requests = asyncio.Queue()
        self.number = 0
        self.tasks = [asyncio.ensure_future(self._welcome()), asyncio.ensure_future(self._serve())]

    def _make_url(self, channel):
        return f"ipc://{self._directory}/{channel}"

    def _bind(self, channel, kind):
        socket = self.context.socket(kind, socket_class=zmq.asyncio.Socket)
        socket.linger = 0
        socket.bind(self._make_url(channel))
        return socket

    async def _welcome(self):
        while True:
            await self.iopub.recv()
            await self.say(self.message("iopub_welcome", {}))

    async def _serve(self):
        """Answer what is asked for the answer's sake; all else is a test's to answer."""
        while True:
            identity, *frames = await self.shell.recv_multipart()
            request = json.loads(messages.parts_of(frames)[0])
            if request["msg_type"] == "kernel_info_request":
                await self.reply(request, "kernel_info_reply", identity=identity, status="ok")
            else:
                await self.requests.put((identity, request))

    def message(self, msg_type, content, parent=None):
        """Frames of a message whose id says which one it is."""
        self.number += 1
        made = self.session.msg(msg_type, content, parent=parent)
        made["header"]["msg_id"] = f"k{self.number}"
        return [b"topic", *self.session.serialize(made)]

    def output(self, text, cell="cell"):
        return self.message("stream", {"name": "stdout", "text": text}, request(cell))

    def status(self, state, cell="cell"):
        return self.message("status", {"execution_state": state}, request(cell))

    async def say(self, frames):
        await self.iopub.send_multipart(frames)

    async def reply(self, asked, msg_type="execute_reply", identity=b"frontend-1", **content):
        frames = self.session.serialize(self.session.msg(msg_type, content, parent=asked))
        await self.shell.send_multipart([identity, *frames])

    def close(self):
        for task in self.tasks:
            task.cancel()
        self.context.destroy(linger=0)


class Frontend:
    """A websocket that takes everything, or nothing any more."""

    reads_model = False

    def __init__(self):
        self.got = []
        self.open = True
        self.takes = True

    def write(self, channel, parts):
        if not self.open:
            return None
        written = asyncio.get_running_loop().create_future()
        if self.takes:
            self.got.append((channel, messages.header_of(parts)["msg_type"], messages.content_of(parts), parts))
            written.set_result(None)
        return written

    def end(self, _reason):
        self.open = False

    @property
    def printed(self):
        """What it would show as output."""
        return "".join(content["text"] for _, kind, content, _ in self.got if kind == "stream")

    @property
    def replies(self):
        """Status by cell."""
        return [(messages.parent_id(parts), content) for _, kind, content, parts in self.got if kind == "execute_reply"]


def request(cell):
    """A cell's request, as a frontend makes it."""
    return {"msg_id": cell, "msg_type": "execute_request", "session": SESSION}


def execute(cell):
    """The parts of a cell's request."""
    return [json.dumps(part).encode() for part in (request(cell), {}, {}, {"code": "1"})]


@pytest.fixture
async def kernel(tmp_path):
    """A kernel with no server."""
    made = Kernel(tmp_path)
    yield made
    made.close()


@pytest.fixture
async def open_channels(kernel, monkeypatch):
    """``open_channels(kept, position)``: a later server's channels of the session."""
    monkeypatch.setattr(replay, "REPLY_GRACE", 0.2)
    made = []

    def make(kept=None, position=None, *, error=None):
        async def read():
            if error is not None:
                raise error
            return kept or Kept()

        async def ready():
            return ""

        state = ExecutionState(kernel, lambda _type: True, "unknown")
        state.restored("busy")
        said = []
        acks = OutputAcks(lambda upto, positions: said.append((upto, positions)))
        one = KernelChannels(
            kernel,
            SESSION,
            ready=ready,
            subscribe_timeout=WAIT,
            log=logging.getLogger("test"),
            make_replay=partial(Replay, acks, read, position=position),
            state=state,
        )
        one.said = said
        made.append(one)
        return one

    yield make
    for one in made:
        one.close("the test is over")


async def until(condition):
    """It comes true soon."""
    assert await poll_async(condition, timeout=WAIT)


async def test_what_was_kept_comes_once_and_before_what_is_new(kernel, open_channels):
    """Each number once and in order, whichever way it came; the frontend comes back before or after."""
    numbers = [kernel.output(f"{number} ") for number in range(6)]
    last = messages.id_of(messages.parts_of(numbers[1]))
    one = open_channels(Kept(numbers), Position(last, {"cell": "+"}))
    frontend = Frontend()
    one.attach(frontend)
    await until(lambda: frontend.printed == "2 3 4 5 ")
    await kernel.say(numbers[5])
    await kernel.say(kernel.output("6 "))
    await until(lambda: frontend.printed.endswith("6 "))


async def test_a_message_that_comes_by_both_ways_counts_once(kernel, open_channels):
    """It was kept, and the session had subscribed already when the kernel said it."""
    both, after = kernel.output("1 "), kernel.output("2 ")
    reading, go_on = asyncio.Event(), asyncio.Event()
    kept = Kept([kernel.output("0 "), both])
    one = open_channels(kept, Position("none"))
    read = one._make_replay.args[1]

    async def later():
        reading.set()
        await go_on.wait()
        return await read()

    one._make_replay = partial(Replay, one._make_replay.args[0], later, position=Position("none"))
    frontend = Frontend()
    one.attach(frontend)
    await reading.wait()
    await kernel.say(both)
    await kernel.say(after)
    await until(lambda: len(one._replay._live) == 2)
    assert frontend.printed == ""
    go_on.set()
    await until(lambda: frontend.printed == "0 1 2 ")


async def test_what_was_dropped_is_said_before_what_is_left(kernel, open_channels):
    """On stderr, under the cell whose output it was."""
    one = open_channels(Kept([kernel.output("8 ")], dropped=7), Position("gone"))
    frontend = Frontend()
    one.attach(frontend)
    await until(lambda: frontend.printed.endswith("8 "))
    assert "7 messages of output were dropped" in frontend.printed
    dropped = next(parts for _, kind, content, parts in frontend.got if "dropped" in content.get("text", ""))
    assert messages.parent_id(dropped) == "cell"


async def test_a_cell_that_ended_meanwhile_is_answered(kernel, open_channels):
    """Its own reply went to the server before; the last message of it makes one, with its count."""
    told = [
        kernel.message("execute_input", {"code": "1", "execution_count": 4}, request("cell")),
        kernel.output("x"),
        kernel.status("idle"),
    ]
    one = open_channels(Kept(told), Position("none", {"cell": "-"}))
    frontend = Frontend()
    one.attach(frontend)
    await until(lambda: frontend.replies)
    ((cell, content),) = frontend.replies
    assert (cell, content["status"], content["execution_count"]) == ("cell", "ok", 4)
    # Nothing is left that the next server would have to answer.
    await until(lambda: Position.parse(one.said[-1][1][SESSION]).cells == {})


async def test_the_kernels_own_reply_is_the_one_where_it_comes(kernel, open_channels):
    """The cell ends after the session is back: no second answer is made."""
    one = open_channels(Kept([kernel.status("busy")]), Position("none", {"cell": "+"}))
    frontend = Frontend()
    one.attach(frontend)
    await one.resume()
    await kernel.reply(request("cell"), status="ok", execution_count=1)
    await kernel.say(kernel.status("idle"))
    await until(lambda: frontend.replies)
    await asyncio.sleep(2 * replay.REPLY_GRACE)
    assert [content["execution_count"] for _cell, content in frontend.replies] == [1]


async def test_a_cell_that_the_kernel_never_got_is_refused_in_words(kernel, open_channels):
    """It answers others and has not begun with it: so it does not show as running without an end."""
    one = open_channels(Kept(), Position("none", {"lost": "-"}))
    frontend = Frontend()
    one.attach(frontend)
    await until(lambda: frontend.replies)
    ((cell, content),) = frontend.replies
    assert (cell, content["status"]) == ("lost", "error")
    assert "never got this cell" in content["evalue"]


async def test_a_cell_that_is_still_before_the_kernel_is_not_refused(kernel, open_channels, monkeypatch):
    """While the kernel computes it answers nothing by shell, and nothing is known of those behind."""
    one = open_channels(Kept([kernel.status("busy")]), Position("none", {"cell": "+", "behind": "-"}))
    kernel.tasks[1].cancel()  # it computes
    frontend = Frontend()
    one.attach(frontend)
    await until(lambda: "status" in [kind for _, kind, _, _ in frontend.got])
    await asyncio.sleep(4 * replay.REPLY_GRACE)
    assert frontend.replies == []
    await kernel.say(kernel.status("idle"))
    await kernel.say(kernel.status("busy", "behind"))
    kernel.tasks.append(asyncio.ensure_future(kernel._serve()))
    await until(lambda: [cell for cell, _content in frontend.replies] == ["cell"])
    await asyncio.sleep(4 * replay.REPLY_GRACE)
    assert [cell for cell, _content in frontend.replies] == ["cell"]


async def test_what_is_not_signed_by_the_kernel_is_not_delivered(kernel, open_channels):
    """A process that could put a message into the kept ones has no key."""
    forged = kernel.output("forged ")
    forged[2] = b"0" * 64
    one = open_channels(Kept([forged, [b"garbage"], [], kernel.output("real ")]), Position("none"))
    frontend = Frontend()
    one.attach(frontend)
    await until(lambda: frontend.printed == "real ")


async def test_a_launcher_that_cannot_be_read_costs_what_was_kept_and_nothing_else(kernel, open_channels):
    """The session goes on with what is new."""
    one = open_channels(position=Position("none"), error=LinkError("down"))
    frontend = Frontend()
    one.attach(frontend)
    one.from_client("shell", execute("next"))
    assert (await asyncio.wait_for(kernel.requests.get(), WAIT))[1]["msg_id"] == "next"
    await kernel.say(kernel.output("new "))
    await until(lambda: frontend.printed == "new ")


async def test_what_a_websocket_did_not_send_goes_to_the_next_one(kernel, open_channels):
    """Once, and in order; it is not acknowledged before."""
    one = open_channels()
    stuck = Frontend()
    one.attach(stuck)
    await until(lambda: one._held is None)
    stuck.takes = False
    sent = [kernel.output(f"{number} ") for number in range(3)]
    for frames in sent:
        await kernel.say(frames)
    await until(lambda: len(list(one._out.ids())) == 3)
    one.detach(stuck)
    await asyncio.sleep(0.1)
    assert all(upto != messages.id_of(messages.parts_of(sent[2])) for upto, _ in one.said)
    again = Frontend()
    one.attach(again)
    await until(lambda: again.printed == "0 1 2 ")
    await until(lambda: one.said[-1][0] == messages.id_of(messages.parts_of(sent[2])))


async def test_the_frontend_hears_what_the_kernel_does(kernel, open_channels):
    """A cell that runs on in silence leaves no frontend with a kernel that is starting."""
    one = open_channels(Kept(), Position("none", {"cell": "+"}))
    frontend = Frontend()
    one.attach(frontend)
    await until(lambda: one._held is None)
    await until(lambda: frontend.got)
    assert {content["execution_state"] for _, kind, content, _ in frontend.got if kind == "status"} == {"busy"}


async def test_warnings_are_shown_under_an_earlier_servers_cell_that_still_runs(kernel, open_channels):
    """Those that came before are shown once it is known; a cell that has ended, or has not begun, shows none."""
    one = open_channels(Kept(), Position("none", {"ended": "ok:1", "runs": "+2", "waits": "-"}))
    shown = []
    one._on_cell = lambda: shown.append(one.last_cell)
    frontend = Frontend()
    one.attach(frontend)
    await until(lambda: shown)
    one.warn("save your work", one.last_cell)
    await until(lambda: frontend.printed == "save your work")
    (warning,) = [parts for _, kind, _, parts in frontend.got if kind == "stream"]
    assert messages.parent_id(warning) == "runs"
    assert len(shown) == 1


# -- a connection that libzmq has given up ------------------------------------------------------------------------


async def test_after_a_message_over_the_limit_the_launcher_has_the_rest(kernel, open_channels):
    """The frontend gets a line about it, then what the kernel printed meanwhile, in order and once, and its replies."""
    prepare_context(kernel.context, 1000)
    kept = Kept()
    one, frontend = open_channels(kept), Frontend()
    one.attach(frontend)
    one.from_client("shell", execute("cell"))
    identity, asked = await kernel.requests.get()
    before, large, after = kernel.output("before "), kernel.output("x" * 2000), kernel.output("after ")
    await kernel.say(before)
    await until(lambda: frontend.printed == "before ")
    kept.messages += [before, after, kernel.status("idle")]
    kept.dropped = 1
    await kernel.say(large)
    await until(lambda: frontend.printed.endswith("after "))
    await kernel.reply(asked, identity=identity, status="ok")
    await until(lambda: len(frontend.replies) == 1)
    await kernel.say(kernel.output("later "))
    await until(lambda: frontend.printed.endswith("later "))
    assert frontend.printed.count("connection for iopub was ended by a message that is malformed or too large") == 1
    assert frontend.printed.count("1 messages of output were dropped") == 1
    assert [frontend.printed.count(word) for word in ("before ", "after ", "later ", "xx")] == [1, 1, 1, 0]
    assert [content["execution_state"] for _, kind, content, _ in frontend.got if kind == "status"].count("idle") >= 1


async def test_a_cell_that_was_lost_with_its_connection_is_refused(kernel, open_channels):
    """The kernel has begun neither of its cells: the one that it never got is refused, the other is answered."""
    prepare_context(kernel.context, 1000)
    one, frontend = open_channels(), Frontend()
    one.attach(frontend)
    one.from_client("shell", execute("first"))
    identity, asked = await kernel.requests.get()
    await kernel.say(kernel.status("busy", "first"))
    await kernel.reply(asked, identity=identity, status="ok", payload=["x" * 2000])
    one.from_client("shell", execute("lost"))
    await until(lambda: any("connection for shell was ended" in str(content) for _, _, content, _ in frontend.got))
    await kernel.say(kernel.status("idle", "first"))
    await until(lambda: len(frontend.replies) == 2 or not kernel.requests.empty())
    if not kernel.requests.empty():  # libzmq had it on its way already
        identity, asked = await kernel.requests.get()
        await kernel.say(kernel.status("busy", "lost"))
        await kernel.reply(asked, identity=identity, status="ok")
        await kernel.say(kernel.status("idle", "lost"))
    await until(lambda: {cell for cell, _ in frontend.replies} == {"first", "lost"})
    # With any reply, of the kernel or made here, a cell is over: the kernel can be culled, and dies without a second.
    assert not one._state.is_busy
    one.fail("the kernel died")
    await one.flushed()
    assert len(frontend.replies) == 2


async def test_what_a_kernel_does_not_take_is_refused(kernel, open_channels, monkeypatch):
    """A cell gets an error with the reason; for any other message the websocket is closed with it."""
    one, frontend = open_channels(), Frontend()
    one.attach(frontend)
    one.from_client("shell", execute("first"))
    await kernel.requests.get()

    def full(_socket, _frames):
        raise messages.MessageError("10000 messages wait for the kernel already")

    monkeypatch.setattr(KernelSocket, "send", full)
    one.from_client("shell", execute("second"))
    await until(lambda: frontend.replies)
    ((cell, content),) = frontend.replies
    assert (cell, content["status"]) == ("second", "error")
    assert content["evalue"].endswith("10000 messages wait for the kernel already")
    assert frontend.open
    one.from_client("shell", [json.dumps(part).encode() for part in ({"msg_type": "comm_msg"}, {}, {}, {})])
    assert not frontend.open
