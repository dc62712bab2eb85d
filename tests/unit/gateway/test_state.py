"""A kernel's execution state, decided from what the server does and from what the kernel publishes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from gateway_slurm import SlurmMappingKernelManager
from gateway_slurm.gateway.channels import state as state_module
from gateway_slurm.gateway.channels.requests import MAX_BYTES, MAX_REPEATABLE_BYTES, Requests
from gateway_slurm.gateway.channels.state import ExecutionState

PACKAGE = Path(state_module.__file__).parents[2]


class Story:
    """A kernel's state while words of a story happen to it.

    ``busy:a`` is a status for the cell ``a``, ``out:a`` its output, ``sent:a`` its request and ``reply:a`` the reply.
    ``busy:a/comm_msg`` names the request's type, ``busy:a@s`` a subshell, and ``old busy:a`` a message of the process
    before the last restart. Other words are calls.
    """

    def __init__(self, begin="starting"):
        self.kernel, self.generation = SimpleNamespace(), 1
        self.state = ExecutionState(self.kernel, SlurmMappingKernelManager().track_message_type, begin)

    def tell(self, words):
        """What the state is after each of the words."""
        return [self.step(word) for word in words.split(", ")]

    def step(self, word):
        """What the state is after one of them."""
        process = f"kernel-{self.generation - word.startswith('old ')}"
        word = word.removeprefix("old ")
        name, _colon, rest = word.partition(":")
        rest, _at, subshell = rest.partition("@")
        msg_id, _slash, kind = rest.partition("/")
        header = {"msg_id": msg_id, "msg_type": kind or "execute_request", "session": "client", "subshell_id": subshell}
        if name == "sent":
            self.state.sent(header)
        elif name == "reply":
            self.state.replied(msg_id)
        elif name in ("busy", "idle", "starting", "out") and _colon:
            self.state.published({"session": process}, header if msg_id else {}, "" if name == "out" else name)
        else:
            self.generation += name == "restarts"
            getattr(self.state, name)(*([rest] if name == "restored" else []))
        return self.kernel.execution_state


STORIES = {
    "the kernel's first word comes late": ("listens, starting:, starting:", "idle idle idle"),
    "it comes first": ("starting:, listens, starting:", "starting idle idle"),
    "a nudge's answer shows that it runs": ("busy:n/kernel_info_request, idle:n/kernel_info_request", "idle idle"),
    "a cell": ("listens, busy:a, out:a, idle:a", "idle busy busy idle"),
    "from the request on": ("listens, sent:a, busy:a, idle:a, reply:a", "idle busy busy idle idle"),
    "the reply is faster": ("listens, sent:a, busy:a, reply:a, idle:a", "idle busy busy idle idle"),
    "queued cells": (
        "listens, sent:a, sent:b, busy:a, idle:a, reply:a, busy:b, idle:b",
        "idle busy busy busy busy busy busy idle",
    ),
    "a subshell beside a cell": (
        "listens, busy:a, busy:c/create_subshell_request, idle:c/create_subshell_request, idle:a",
        "idle busy busy busy idle",
    ),
    "an unknown control request beside a cell": (
        "listens, busy:a, busy:c/own_request, idle:c/own_request, idle:a",
        "idle busy busy busy idle",
    ),
    "a widget in a subshell beside a cell": (
        "listens, busy:a, busy:w/comm_msg@s, idle:w/comm_msg@s, idle:a",
        "idle busy busy busy idle",
    ),
    "a widget that computes": ("listens, busy:w/comm_msg, idle:w/comm_msg", "idle busy idle"),
    "the status busy is lost": ("listens, out:a, idle:a", "idle busy idle"),
    "a thread prints after its cell": ("listens, busy:a, idle:a, out:a", "idle busy idle idle"),
    "the status idle is lost": ("listens, busy:a, busy:b, idle:b", "idle busy busy idle"),
    "a cell that never came": ("listens, sent:a, sent:b, busy:b, idle:b", "idle busy busy busy idle"),
    "a restart in the midst of a cell": (
        "listens, busy:a, restarts, old out:a, old idle:a, listens, starting:, old busy:b, busy:d, idle:d",
        "idle busy restarting restarting restarting idle idle idle busy idle",
    ),
    "the new process speaks first": (
        "listens, restarts, starting:, idle:n/kernel_info_request",
        "idle restarting restarting idle",
    ),
    "death, and a restart by hand": (
        "listens, busy:a, dies, idle:a, listens, restarts, listens",
        "idle busy dead dead dead restarting idle",
    ),
}


@pytest.mark.parametrize("story", STORIES)
def test_the_state_follows_the_kernels_own_order(story):
    """Whatever comes late, twice or not at all."""
    words, states = STORIES[story]
    assert Story().tell(words) == states.split()


@pytest.mark.parametrize(
    ("words", "states"),
    [
        ("restored:busy, idle:a, busy:b, idle:b", "busy idle busy idle"),
        ("restored:, busy:b", "idle busy"),
        ("idle:a, restored:busy", "idle idle"),
        ("busy:n/kernel_info_request, idle:n/kernel_info_request, restored:idle", "unknown unknown idle"),
    ],
)
def test_a_restored_kernel_goes_on_from_what_is_known(words, states):
    """What the kernel publishes meanwhile is newer than what the earlier server knew."""
    assert Story("unknown").tell(words) == states.split()


def test_a_kernel_fills_no_memory():
    """Requests without an end are bounded."""
    story = Story()
    many = 2 * state_module.MAX_REQUESTS
    story.step("listens")
    for number in range(many):
        story.step(f"busy:u{number}/own_request")
        story.step(f"sent:a{number}")
    for number in range(many):
        story.step(f"idle:z{number}")
    state = story.state
    sizes = {len(state._begun), len(state._sent), len(state._ended), len(state._ended_ids)}
    assert max(sizes) <= state_module.MAX_REQUESTS


def test_no_other_place_sets_the_state():
    """Except for the restorer, which makes the kernel's manager, and sets that nothing is known yet."""
    setters = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\.execution_state\s*(,[^=\n]*)?=[^=]", path.read_text())
    }
    assert setters == {"gateway/channels/state.py", "gateway/restore.py"}


def test_a_request_is_open_until_its_reply_and_its_idle_have_come():
    """In either order; a comm's message has no reply, and only the open ones are taken."""
    requests = Requests()
    for number, (channel, kind) in enumerate(
        [("shell", "execute"), ("shell", "complete"), ("control", "debug"), ("stdin", "input")], 1
    ):
        requests.add("alice", channel, {"msg_id": f"m{number}", "msg_type": f"{kind}_request"}, [])
    requests.add("alice", "shell", {"msg_id": "m5", "msg_type": "comm_msg"}, [])
    requests.add("alice", "shell", {"msg_id": "m6", "msg_type": "comm_open"}, [])
    requests.on_reply("m1")
    requests.on_idle("m1")
    requests.on_idle("m2")
    requests.on_reply("m2")
    requests.on_idle("m5")
    requests.on_reply("unknown")
    taken = [(request.channel, request.reply_type) for request in requests.take()]
    assert taken == [("control", "debug_reply"), ("shell", "")]
    assert requests.take() == []


def test_the_open_requests_are_bounded_in_bytes():
    """Only small ones are kept for the next process; the oldest go first, and what is done makes room."""
    info, large = "kernel_info_request", b"x" * MAX_REPEATABLE_BYTES
    requests = Requests()
    requests.add("alice", "shell", {"msg_id": "small", "msg_type": info}, [b"{}", b"{}"])
    requests.add("alice", "shell", {"msg_id": "large", "msg_type": info}, [b"{}", large])
    assert [request.header["msg_id"] for request in requests.take_repeatable()] == ["small"]
    assert [request.parts for request in requests.take()] == [[]]
    count = MAX_BYTES // len(large)
    for number in range(count + 2):
        requests.add("alice", "shell", {"msg_id": number, "msg_type": "execute_request"}, [large])
    requests.remove("5")
    requests.add("alice", "shell", {"msg_id": "last", "msg_type": "execute_request"}, [large])
    kept = [str(request.header["msg_id"]) for request in requests.take()]
    assert kept == [*(str(number) for number in range(2, count + 2) if number != 5), "last"]
    requests.add("alice", "shell", {"msg_id": "next", "msg_type": "execute_request"}, [large])
    assert len(requests.take()) == 1
