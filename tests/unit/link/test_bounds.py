"""The table of bounds for what launchers say: whatever arrives, readers get what the table describes, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_slurm.allocations.launcher import Launcher, LauncherEvents
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.errors import MessageRefused
from gateway_slurm.kernels.model import KernelLaunch
from gateway_slurm.kernels.process import KernelProcess
from gateway_slurm.kernels.transport import TransportSelector
from gateway_slurm.link import bounds, flow, wire
from gateway_slurm.request import KernelRequest
from helpers.raw_links import launcher_settings

UP = [name for name, (_number, who, _form) in wire.MESSAGES.items() if who in (wire.UP, wire.BOTH)]
JSON_NAMES = [name for name in UP if wire.MESSAGES[name][2] == wire.JSON]
MORE = settings(max_examples=150, deadline=None)

anything: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.just("x" * 3000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def valid(bound: Any) -> Any:  # noqa: C901 - one case for each kind
    """Values that a bound takes as they are, up to its limits."""
    if isinstance(bound, bounds.Text):
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=min(bound.limit, 20))
    if isinstance(bound, bounds.Name):
        return st.from_regex(bound.pattern, fullmatch=True, alphabet=st.characters(codec="ascii"))
    if isinstance(bound, bounds.Number):
        return st.integers(bound.low, bound.high)
    if isinstance(bound, bounds.Seconds):
        return st.floats(bound.low, bound.high) | st.integers(int(bound.low), int(bound.high))
    if isinstance(bound, bounds.Flag):
        return st.booleans()
    if isinstance(bound, bounds.OrNone):
        return st.none() | valid(bound.bound)
    if isinstance(bound, bounds.ListOf):
        return st.lists(valid(bound.bound), max_size=3)
    if isinstance(bound, bounds.Tuple):
        return st.tuples(*map(valid, bound.bounds)).map(list)
    if isinstance(bound, bounds.MapOf):
        return st.dictionaries(valid(bound.name), valid(bound.value), max_size=min(bound.limit, 5))
    if isinstance(bound, bounds.Table):
        return st.dictionaries(st.text(max_size=5), st.just([0, 0]), max_size=3)
    assert isinstance(bound, bounds.Fields), bound
    needed = {name: valid(inner) for name, inner in bound.bounds.items() if name in bound.needed}
    others = {name: valid(inner) for name, inner in bound.bounds.items() if name not in bound.needed}
    return st.fixed_dictionaries(needed, optional=others)


def hostile(bound: Any) -> Any:
    """Objects with the names of the table, and anything behind them, or nearly what is valid."""
    if isinstance(bound, bounds.Fields):
        inner = {name: hostile(inner) for name, inner in bound.bounds.items()}
        return anything | st.fixed_dictionaries({}, optional=inner)
    if isinstance(bound, bounds.ListOf):
        return anything | st.lists(hostile(bound.bound), max_size=4)
    return anything | valid(bound)


def is_within(bound: Any, value: Any) -> bool:
    """Whether a value is what the bound describes; written apart from ``take``."""
    if isinstance(bound, bounds.Text):
        return isinstance(value, str) and len(value) <= bound.limit
    if isinstance(bound, bounds.OrNone):
        return value is None or is_within(bound.bound, value)
    if isinstance(bound, bounds.ListOf):
        return len(value) <= bound.limit and all(is_within(bound.bound, entry) for entry in value)
    if isinstance(bound, bounds.Fields):
        known = value.keys() <= bound.bounds.keys() and bound.needed <= value.keys()
        return known and all(is_within(bound.bounds[name], entry) for name, entry in value.items())
    if isinstance(bound, bounds.MapOf):
        return len(value) <= bound.limit and all(is_within(bound.value, entry) for entry in value.values())
    if isinstance(bound, (bounds.Number, bounds.Seconds)):
        return not isinstance(value, bool) and bound.low <= value <= bound.high
    if isinstance(bound, bounds.Table):
        return isinstance(value, dict) and len(value) <= bound.limit
    return bool(bound.take(value) == value)


def body(name: str, fields: Any) -> bytes:
    """A message with any JSON."""
    return bytes([wire.MESSAGES[name][0]]) + json.dumps(fields).encode()


def test_each_message_of_a_launcher_has_its_bounds() -> None:
    """The table names the messages that launchers send, and no others."""
    assert sorted(bounds.MESSAGES) == sorted(UP)
    assert max(message.size for message in bounds.MESSAGES.values()) < bounds.FRAME_LIMIT <= wire.FRAME_LIMIT


@MORE
@given(st.data())
def test_what_is_within_its_bounds_is_taken_as_it_is(data: st.DataObject) -> None:
    """Each field of each message, and of HELLO."""
    name = data.draw(st.sampled_from(JSON_NAMES))
    fields = data.draw(valid(bounds.MESSAGES[name].fields))
    assert bounds.decode(body(name, fields)) == (name, fields)
    hello = data.draw(valid(bounds.HELLO))
    assert bounds.hello(hello) == hello


@MORE
@given(st.data())
def test_nothing_beyond_its_bounds_reaches_a_reader(data: st.DataObject) -> None:
    """Wrong types, infinities, long texts and fields that do not exist are left out, or the message is."""
    name = data.draw(st.sampled_from(JSON_NAMES))
    bound = bounds.MESSAGES[name].fields
    with contextlib.suppress(MessageRefused, wire.WireError):
        taken = bounds.decode(body(name, data.draw(hostile(bound))))
        assert taken[0] == name
        assert is_within(bound, taken[1])
        json.dumps(taken[1], allow_nan=False)
    assert is_within(bounds.HELLO, bounds.hello(data.draw(hostile(bounds.HELLO))))


@MORE
@given(st.sampled_from(UP), st.binary(max_size=100))
def test_bytes_that_are_no_message_end_the_link_or_are_left_out(name: str, noise: bytes) -> None:
    """Nothing else is raised."""
    with contextlib.suppress(MessageRefused, wire.WireError):
        bounds.decode(bytes([wire.MESSAGES[name][0]]) + noise)


@pytest.mark.parametrize("name", UP)
def test_a_message_that_is_too_long_ends_the_link(name: str) -> None:
    """It is not parsed."""
    size = bounds.MESSAGES[name].size
    with pytest.raises(wire.WireError, match=f"the limit is {size}"):
        bounds.decode(bytes([wire.MESSAGES[name][0]]) + b"[" * size)


def test_lists_and_texts_that_are_too_long_are_cut() -> None:
    """Of what a kernel printed, the end stays."""
    kernel = {"kernel_id": "k", "generation": 1, "state": "exited", "output_tail": "a" * 5000 + "b"}
    _name, taken = bounds.decode(
        body("REPORT", {"kernels": [kernel, {"kernel_id": "k2"}, *[{**kernel, "output_tail": ""}] * 600]})
    )
    assert len(taken["kernels"]) == bounds.MAX_KERNELS - 1  # the second one lacks its state
    assert taken["kernels"][0]["output_tail"] == "a" * 4095 + "b"


class NoLink:
    """Takes what is sent to a launcher."""

    peer = "127.0.0.1"
    outbox = None

    def send(self, *_arguments: Any, **_fields: Any) -> None:
        """Lose it."""

    flush = close = send


LOG = logging.getLogger("test.bounds")
LAUNCH = KernelLaunch(
    argv=("x",),
    env={},
    cwd="/",
    connection={"key": "k"},
    mode="ipc",
    language="",
    start_timeout=1.0,
    port_range=None,
    log_dir="~",
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_message_raises_anything_in_its_readers(data: st.DataObject) -> None:
    """A launcher's handle with a kernel takes any sequence of messages, whatever they say."""

    async def say() -> None:
        events = LauncherEvents(lambda: None, lambda _reason: None, lambda *_arguments, **_more: None)
        allocation = Allocation(ours=True, request=KernelRequest())
        allocation.accept("12")
        launcher = Launcher("L1", allocation, launcher_settings(), addresses=list, events=events, log=LOG)
        launcher.jobid, launcher.tokens = "12", (b"a", b"b")
        kernel = KernelProcess("k", launcher, tunnel_prefix="/x", transport=TransportSelector(LOG), log=LOG)
        kernel.launched, kernel.generation = LAUNCH, 1
        link: Any = NoLink()
        launcher.link_up(link, bounds.hello(data.draw(hostile(bounds.HELLO))))
        for phase in ("STARTING", "RUNNING"):
            kernel.phase = type(kernel.phase)[phase]
            for name in data.draw(st.lists(st.sampled_from(JSON_NAMES), max_size=6)):
                with contextlib.suppress(MessageRefused, wire.WireError):
                    fields = data.draw(hostile(bounds.MESSAGES[name].fields))
                    if isinstance(fields, dict) and data.draw(st.booleans()):
                        fields |= {"kernel_id": "k", "generation": 1}
                    _name, taken = bounds.decode(body(name, fields))
                    if name != "HEARTBEAT":
                        launcher.link_message(link, name, taken)
        launcher.streams.message("DATA", 7, bytes(flow.CHUNK))
        launcher.link_down(link, "over")
        launcher.forgotten()

    asyncio.run(say())
