"""What goes over a link first, and how much of it: messages, then streams in turn, each within its credit."""

from __future__ import annotations

import struct
from collections import defaultdict, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_slurm.link import flow, wire


def sent(outbox: flow.Outbox, sender: str = wire.UP) -> list[tuple[str, object]]:
    """Everything that can go now, decoded."""
    messages = []
    while (frame := outbox.next_frame()) is not None:
        messages += [wire.decode(body, sender) for body in wire.unpack(frame)]
    return messages


def test_a_message_overtakes_data_that_waits():
    """An interrupt or a heartbeat does not queue behind a full stdout."""
    outbox = flow.Outbox()
    outbox.open(1)
    outbox.data(1, bytes(10 * flow.CHUNK))
    outbox.message(wire.encode("HEARTBEAT"))
    assert sent(outbox)[0] == ("HEARTBEAT", {})


def test_a_stream_without_credit_waits_and_others_go_on():
    """A slow reader holds up its own stream only, after one window."""
    outbox = flow.Outbox()
    for stream in (1, 2):
        outbox.open(stream)
    outbox.data(1, bytes(3 * flow.WINDOW))
    outbox.data(2, b"small")
    sizes: dict[int, int] = defaultdict(int)
    for _name, (stream, payload) in sent(outbox):
        sizes[stream] += len(payload)
    assert sizes == {1: flow.WINDOW, 2: 5}
    assert not outbox.may_read(1)
    assert outbox.may_read(2)
    outbox.credit(1, 1000)
    assert [len(payload) for _name, (_stream, payload) in sent(outbox)] == [1000]


def test_streams_take_turns():
    """With two full streams neither waits for the other's end."""
    outbox = flow.Outbox()
    for stream in (1, 2):
        outbox.open(stream)
        outbox.data(stream, bytes(4 * flow.CHUNK))
    order = [stream for _name, (stream, _payload) in sent(outbox)]
    assert order[:4] == [1, 2, 1, 2]


def test_a_close_follows_the_data_before_it():
    """The last bytes of a stream arrive before its end."""
    outbox = flow.Outbox()
    outbox.open(1)
    outbox.data(1, b"last words")
    outbox.close(1)
    assert sent(outbox) == [("DATA", (1, b"last words")), ("CLOSE", (1, b""))]


def test_a_close_waits_for_credit_too():
    """Data that has no credit yet is not lost to the close behind it."""
    outbox = flow.Outbox()
    outbox.open(1)
    outbox.data(1, bytes(flow.WINDOW + 10))
    outbox.close(1)
    assert "CLOSE" not in dict(sent(outbox))
    outbox.credit(1, 10)
    assert sent(outbox) == [("DATA", (1, bytes(10))), ("CLOSE", (1, b""))]


def test_unknown_streams_are_ignored():
    """Late messages for a stream that is gone do nothing."""
    outbox = flow.Outbox()
    outbox.credit(7, 100)
    outbox.took(7, flow.WINDOW)
    outbox.close(7)
    assert not outbox.data(7, b"x")
    assert sent(outbox) == []


def test_credit_is_given_back_in_steps():
    """A CREDIT for every few bytes would double the frames."""
    outbox = flow.Outbox()
    outbox.open(1)
    outbox.took(1, flow.CREDIT_STEP - 1)
    assert sent(outbox) == []
    outbox.took(1, 1)
    assert sent(outbox) == [("CREDIT", (1, struct.pack(">I", flow.CREDIT_STEP)))]


def test_a_far_end_that_exceeds_its_credit_is_refused():
    """A sender that ignores the window cannot fill this process's memory."""
    window = flow.ReceiveWindow()
    window.arrived(flow.WINDOW)
    with pytest.raises(wire.WireError):
        window.arrived(flow.CREDIT_STEP + 1)


# -- streams that outlive their links ----------------------------------------------------------

STREAMS = 3
PATTERN = bytes(range(251)) * 16_000


def stretch(start: int, size: int) -> bytes:
    """Bytes that tell where in a stream they belong."""
    return PATTERN[start % 251 : start % 251 + size]


class End:
    """One end of a launcher's links: what it has sent is in ``way`` until it is delivered or lost."""

    def __init__(self, sender: str) -> None:
        self.sender = sender
        self.outbox = flow.Outbox()
        self.outbox.hold()
        self.way: deque[bytes] = deque()
        self.streams: set[int] = set()  # open at this end
        self.opened = 0
        self.written: dict[int, int] = defaultdict(int)
        self.arrived: dict[int, int] = defaultdict(int)
        self.read: dict[int, int] = defaultdict(int)
        self.over: list[int] = []  # closed by the far end, or unknown there

    def send(self) -> None:
        """Put everything that can go on its way."""
        while (frame := self.outbox.next_frame()) is not None:
            self.way.append(frame)

    def open(self, number: int) -> None:
        self.outbox.open(number, b"opening" if self.sender == wire.DOWN else None)
        self.streams.add(number)
        self.opened = number

    def write(self, number: int, size: int) -> None:
        if number in self.streams:
            self.outbox.data(number, stretch(self.written[number], size))
            self.written[number] += size

    def take(self, number: int, size: int) -> None:
        size = min(size, self.arrived[number] - self.read[number])
        self.read[number] += size
        self.outbox.took(number, size)

    def close(self, number: int) -> None:
        if number in self.streams:
            self.streams.remove(number)
            self.outbox.close(number)

    def end(self, number: int) -> None:
        if number in self.streams:
            self.streams.remove(number)
            self.over.append(number)

    def take_frame(self, frame: bytes) -> None:
        for body in wire.unpack(frame):
            self.take_message(*wire.decode(body, wire.UP if self.sender == wire.DOWN else wire.DOWN))

    def take_message(self, name: str, payload: Any) -> None:
        if name in ("WELCOME", "REPORT"):
            if name == "WELCOME":
                report = {"streams": self.outbox.positions(), "opened": self.opened}
                self.outbox.message(wire.encode("REPORT", **report))
            for over in self.outbox.resume(payload["streams"], payload.get("opened")):
                self.end(over)
            return
        number, data = payload
        if name == "OPEN":
            assert number > self.opened
            self.open(number)
        elif name == "DATA" and number in self.streams:
            self.outbox.arrived(number, len(data))
            assert data == stretch(self.arrived[number], len(data))
            self.arrived[number] += len(data)
        elif name == "CREDIT":
            self.outbox.credit(number, flow.credit_of(data))
        elif name == "CLOSE":
            self.outbox.closed(number)
            self.end(number)


class Pair:
    """Server and launcher, and links between them that can be cut anywhere."""

    def __init__(self) -> None:
        self.server, self.launcher = End(wire.DOWN), End(wire.UP)
        self.ends = (self.server, self.launcher)
        self.linked = False

    def cut(self) -> None:
        """Everything that is on its way is lost."""
        self.linked = False
        for end in self.ends:
            end.outbox.hold()
            end.way.clear()

    def link(self) -> None:
        """A new link; where there is one already, the newest wins."""
        self.cut()
        self.linked = True
        self.server.outbox.message(wire.encode("WELCOME", streams=self.server.outbox.positions()))

    def deliver(self, sender: int, frames: int) -> None:
        end, far = self.ends[sender], self.ends[1 - sender]
        if self.linked:
            end.send()
            for _ in range(min(frames, len(end.way))):
                far.take_frame(end.way.popleft())

    def exchange(self) -> None:
        """Let both ends hear each other, and answer."""
        for sender in (0, 1, 0, 1):
            self.deliver(sender, 100)

    def open_another(self) -> None:
        """One more client, of at most ``STREAMS``."""
        if self.server.opened < STREAMS:
            self.server.open(self.server.opened + 1)

    def settle(self) -> None:
        """Let everything that can still arrive, arrive."""
        quiet = 0
        while quiet < 3:
            before = [(dict(end.arrived), dict(end.read)) for end in self.ends]
            for sender in (0, 1):
                self.deliver(sender, 1000)
            for end in self.ends:
                for number in list(end.arrived):
                    end.take(number, flow.WINDOW)
            after = [(dict(end.arrived), dict(end.read)) for end in self.ends]
            quiet = quiet + 1 if before == after else 0


def kept(outbox: flow.Outbox) -> int:
    """The most that any stream keeps to be sent again."""
    return max((sum(map(len, stream.sending._kept)) for stream in outbox._streams.values()), default=0)


sides = st.integers(0, 1)
numbers = st.integers(1, STREAMS)
sizes = st.one_of(st.integers(1, 100), st.integers(100_000, 600_000))
nothing = (st.just(0), st.just(0), st.just(0))
traffic = [
    st.tuples(st.just("write"), sides, numbers, sizes),
    st.tuples(st.just("read"), sides, numbers, st.just(flow.WINDOW)),
    st.tuples(st.just("deliver"), sides, st.sampled_from([0, 0, 1, 2, 3, 100]), st.just(0)),
    st.tuples(st.just("exchange"), *nothing),
    st.tuples(st.just("exchange"), *nothing),
]
breaks = [st.tuples(st.just(what), *nothing) for what in ("cut", "link", "link", "open")]
closes = [st.tuples(st.just("close"), sides, numbers, st.just(0))]


def play(pair: Pair, steps: list[tuple[str, int, int, int]]) -> None:
    """Do what the steps say, and look at the bounds after each."""
    for action, side, number, size in steps:
        end = pair.ends[side]
        {
            "write": lambda: end.write(number, size),  # noqa: B023 - it is called here
            "read": lambda: end.take(number, size),  # noqa: B023
            "close": lambda: end.close(number),  # noqa: B023
            "deliver": lambda: pair.deliver(side, number),  # noqa: B023
            "exchange": pair.exchange,
            "open": pair.open_another,
            "cut": pair.cut,
            "link": pair.link,
        }[action]()
        for each in pair.ends:
            assert kept(each.outbox) < flow.WINDOW + flow.CHUNK
            for stream in each.arrived:
                assert each.arrived[stream] - each.read[stream] <= flow.WINDOW


@given(st.lists(st.one_of(*traffic, *breaks), min_size=15, max_size=80))
@settings(max_examples=200)
def test_whatever_links_break_where_each_byte_arrives_once_and_in_order(steps):
    """Streams are pipes of one window each, however much each side writes and reads and wherever links are cut."""
    pair = Pair()
    pair.link()
    for number in range(1, STREAMS):
        pair.server.open(number)
    play(pair, steps)
    pair.link()
    pair.settle()
    opened = range(1, pair.server.opened + 1)
    for end, far in (pair.ends, pair.ends[::-1]):
        assert [far.read[number] for number in opened] == [end.written[number] for number in opened]
        assert end.over == []
        assert kept(end.outbox) < flow.CREDIT_STEP + flow.CHUNK


@given(st.lists(st.one_of(*traffic, *breaks, *closes), min_size=15, max_size=80))
@settings(max_examples=200)
def test_whatever_links_break_where_an_end_follows_the_last_byte(steps):
    """What closes at one end closes once at the other, behind all that was written, and is known to neither then."""
    pair = Pair()
    pair.link()
    for number in range(1, STREAMS):
        pair.server.open(number)
    play(pair, steps)
    pair.link()
    pair.settle()
    assert pair.server.streams == pair.launcher.streams
    for end, far in (pair.ends, pair.ends[::-1]):
        assert set(end.outbox._streams) == end.streams
        assert len(set(end.over)) == len(end.over)
        for number in far.over:
            assert far.read[number] == end.written[number] or number not in pair.launcher.arrived


def linked_pair(*, written: int = 1000) -> Pair:
    """A pair with one stream, on which the launcher has sent something."""
    pair = Pair()
    pair.link()
    pair.server.open(1)
    pair.settle()
    pair.launcher.write(1, written)
    return pair


def test_no_data_goes_out_before_the_far_end_has_told_where_it_is():
    """After a break only messages go, until positions are known."""
    pair = linked_pair()
    pair.launcher.outbox.hold()
    assert sent(pair.launcher.outbox) == []
    pair.launcher.outbox.message(wire.encode("HEARTBEAT"))
    assert sent(pair.launcher.outbox) == [("HEARTBEAT", {})]
    assert pair.launcher.outbox.resume({"1": [0, 0]}) == []
    assert sent(pair.launcher.outbox) == [("DATA", (1, stretch(0, 1000)))]


def test_credit_is_not_told_twice():
    """What is taken between two links is in the positions, and in no CREDIT beside them."""
    pair = linked_pair(written=flow.WINDOW)
    pair.deliver(1, 100)
    pair.cut()
    pair.server.take(1, flow.WINDOW)
    pair.link()
    pair.launcher.write(1, 3 * flow.WINDOW)
    pair.exchange()
    assert pair.server.arrived[1] == 2 * flow.WINDOW


def test_before_positions_are_told_not_even_credit_goes_out():
    """A frame that came before WELCOME would end the link."""
    outbox = flow.Outbox()
    outbox.open(1)
    outbox.arrived(1, flow.WINDOW)
    outbox.hold()
    outbox.took(1, flow.WINDOW)
    assert sent(outbox) == []
    assert outbox.positions() == {"1": [flow.WINDOW, flow.WINDOW]}
    assert sent(outbox) == []


def test_what_is_to_be_sent_again_counts_as_waiting():
    """Nothing more is read for a stream until that is gone."""
    pair = linked_pair(written=flow.WINDOW)
    outbox = pair.launcher.outbox
    sent(outbox)
    assert outbox.may_read(1)
    outbox.hold()
    outbox.resume({"1": [flow.CHUNK + 1, 0]})
    assert not outbox.may_read(1)
    again = b"".join(payload for _name, (_number, payload) in sent(outbox))
    assert again == stretch(flow.CHUNK + 1, flow.WINDOW - flow.CHUNK - 1)
    assert outbox.may_read(1)


def test_messages_of_a_broken_link_are_not_sent_on_the_next():
    """An interrupt that did not go out is an error already; it must not come an hour later."""
    outbox = flow.Outbox()
    outbox.message(wire.encode("SIGNAL", kernel_id="k", signum=2))
    outbox.hold()
    assert sent(outbox) == []


NONSENSE = [
    ["1", 2],
    [True, False],
    [1],
    [1, 1, 1],
    {},
    "11",
    7,
    [-1, -1],
    [0, 0],  # less than it has said it took
    [flow.WINDOW, 0],
    [flow.WINDOW - 1, flow.WINDOW],
    [10**30, 10**30],
    [flow.WINDOW, flow.WINDOW + 1],
    [1.0, 1.0],
]


@pytest.mark.parametrize("claim", NONSENSE, ids=str)
def test_a_far_end_that_claims_nonsense_of_a_stream_loses_that_stream(claim):
    """Positions that cannot be end the stream at both ends, and others go on."""
    outbox = flow.Outbox()
    for number in (1, 2):
        outbox.open(number)
        outbox.data(number, bytes(2 * flow.WINDOW))
    sent(outbox)
    outbox.credit(1, flow.CREDIT_STEP)
    outbox.hold()
    assert outbox.resume({"1": claim, "2": [flow.WINDOW, flow.WINDOW], "77": [1, 1], "x": None}) == [1]
    messages = sent(outbox)
    assert messages[0] == ("CLOSE", (1, b""))
    assert sum(len(payload) for _name, (number, payload) in messages[1:] if number == 2) == flow.WINDOW


@pytest.mark.parametrize("claim", [None, [], "streams", 7, {"1": None}], ids=str)
@pytest.mark.parametrize("opened", [None, "x", -1, 10**30, 1.5], ids=str)
def test_a_far_end_that_tells_no_positions_has_no_streams(claim, opened):
    """Whatever else is said instead, streams on which something came back are over, and nothing raises."""
    outbox = flow.Outbox()
    outbox.open(1, b"opening")
    outbox.data(1, b"data")
    sent(outbox, wire.DOWN)
    outbox.credit(1, 4)
    outbox.hold()
    assert outbox.resume(claim, opened) == [1]
    assert sent(outbox) == []


def test_a_second_word_on_positions_changes_nothing():
    """A far end cannot make us send again on a link that works."""
    pair = linked_pair()
    pair.settle()
    assert pair.server.outbox.resume({"1": [0, 0]}) == []
    assert pair.launcher.outbox.resume({}) == []


def test_a_stream_whose_open_was_lost_is_opened_again():
    """With what was written to it, once."""
    pair = Pair()
    pair.link()
    pair.deliver(0, 1)
    pair.deliver(1, 1)
    pair.server.open(1)
    pair.server.write(1, 10)
    pair.server.send()
    pair.link()
    pair.settle()
    assert pair.launcher.read[1] == 10
    assert pair.server.over == []


def test_a_client_that_came_and_went_without_a_link_leaves_nothing():
    """A heartbeat channel makes a connection each second of an outage: the kernel sees none of these."""
    outbox = flow.Outbox()
    outbox.hold()
    outbox.open(1, b"opening")
    outbox.data(1, b"greeting")
    outbox.close(1)
    assert outbox._streams == {}
    assert outbox.resume({}, 0) == []
    outbox.open(2, b"opening")
    sent(outbox, wire.DOWN)
    outbox.hold()
    outbox.close(2)
    assert outbox.resume({}, 0) == [2]
    assert sent(outbox) == []


@pytest.mark.parametrize(("streams", "size"), [(2000, 10), (200, flow.WINDOW)])
def test_a_far_end_that_never_says_that_it_knows_of_an_end_costs_a_bounded_memory(streams, size):
    """The oldest of the streams that ended are forgotten; those that are open stay."""
    outbox = flow.Outbox()
    outbox.open(1)
    data = bytes(size)
    for number in range(2, streams + 2):
        outbox.open(number)
        outbox.data(number, data)
        outbox.close(number)
        sent(outbox)
    kept = list(outbox._streams)
    assert kept[0] == 1
    assert kept[-1] == streams + 1
    assert len(kept) - 1 == min(flow.MAX_CLOSING_STREAMS, flow.MAX_CLOSING_BYTES // size)


def test_without_a_link_more_may_wait_up_to_a_bound_of_all_streams():
    """A kernel's output is read on through an outage, and a link that is back gets it before more is read."""
    outbox = flow.Outbox(shared_backlog=2 * flow.WINDOW)
    for number in (1, 2):
        outbox.open(number)
    outbox.hold()
    assert outbox.data(1, bytes(flow.WINDOW))
    assert outbox.data(2, bytes(flow.WINDOW - 1))
    assert not outbox.data(1, b"x")
    assert not outbox.may_read(2)
    assert outbox.resume({"1": [0, 0], "2": [0, 0]}) == []
    assert not outbox.may_read(2)
    sent(outbox)
    assert outbox.may_read(2)


def test_another_server_finds_no_streams():
    """What was for the earlier one is forgotten."""
    pair = linked_pair()
    pair.launcher.outbox.hold()
    pair.launcher.outbox.forget_streams()
    assert pair.launcher.outbox.resume({}) == []
    assert sent(pair.launcher.outbox) == []
