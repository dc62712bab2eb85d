"""A kernel's executions: their states and outputs, from the messages that pass, and from notes and the journal."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_slurm.gateway import executions as module
from gateway_slurm.gateway.executions import MAX, MAX_NOTE, Executions, reply_of

BUSY, IDLE = ("status", {"execution_state": "busy"}), ("status", {"execution_state": "idle"})
ERROR = "error", {"ename": "ValueError", "evalue": "no", "traceback": ["Traceback", "ValueError: no"]}


def begins(count: int) -> tuple[str, dict[str, Any]]:
    """The kernel begins a cell."""
    return "execute_input", {"code": "x", "execution_count": count}


def prints(text: str) -> tuple[str, dict[str, Any]]:
    """The cell prints."""
    return "stream", {"name": "stdout", "text": text}


def shows(text: str, display_id: str = "", kind: str = "display_data") -> tuple[str, dict[str, Any]]:
    """The cell shows something, or updates it."""
    return kind, {"data": {"text/plain": text}, "metadata": {}, "transient": {"display_id": display_id}}


def request(msg_id: str, session: str = "page", **fields: Any) -> dict[str, Any]:
    """The header of an execute_request."""
    return {"msg_id": msg_id, "session": session, "msg_type": "execute_request", "username": "ada", **fields}


class Journal:
    """Messages with their numbers, as a kernel's launcher keeps them."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, str, dict[str, Any], list[bytes]]] = []

    def add(self, msg_id: str, message: tuple[str, dict[str, Any]], parent: dict[str, Any] | None = None) -> None:
        """The kernel publishes a message for a cell."""
        msg_type, content = message
        parent = request(msg_id) if parent is None else parent
        header = {"msg_type": msg_type, "msg_id": f"m{len(self.messages)}"}
        parts = [json.dumps(part).encode() for part in (header, parent, {}, content)]
        self.messages.append((len(self.messages) + 1, msg_type, parent, parts))

    def run(self, msg_id: str, *messages: tuple[str, dict[str, Any]], count: int = 1) -> None:
        """A whole cell."""
        for message in (BUSY, begins(count), *messages, IDLE):
            self.add(msg_id, message)

    def publish(self, executions: Executions, upto: int | None = None) -> None:
        """The gateway gets the messages up to a number, by default all."""
        for number, msg_type, parent, parts in self.messages[:upto]:
            executions.published(number, number, msg_type, parent, parts)

    def read(self, first: int, upto: int) -> Iterator[tuple[int, list[bytes]]]:
        """What the launcher sends of these numbers."""
        return ((number, parts) for number, _type, _parent, parts in self.messages if first <= number <= upto)

    def refold(self, executions: Executions, msg_id: str) -> None:
        """The gateway reads a cell's outputs again, in two batches."""
        if wanted := executions.needs_reading(msg_id):
            read = list(self.read(*wanted))
            executions.refold(msg_id, read[: len(read) // 2], done=False)
            executions.refold(msg_id, read[len(read) // 2 :])


@pytest.fixture
def executions() -> Executions:
    """Those of a kernel that has done nothing."""
    return Executions()


@pytest.fixture
def journal() -> Journal:
    """An empty journal."""
    return Journal()


def text_of(executions: Executions, msg_id: str) -> str:
    """All text of a cell's outputs."""
    outputs = executions.outputs(msg_id)["outputs"]
    return "".join(output.get("text") or output["data"]["text/plain"] for output in outputs)


# -- States --------------------------------------------------------------------------------------


def test_a_cell_from_its_request_to_its_end(executions: Executions, journal: Journal) -> None:
    """Each step is in its model, with its time; the reply makes no difference after the end."""
    executions.queued(request("a"), {"cellId": "cell-1"})
    (model,) = executions.models()
    assert (model["status"], model["cell_id"], model["session"]) == ("queued", "cell-1", "page")
    assert model["running"]
    assert model["queued"].endswith("Z")
    journal.run("a", prints("hello"), count=3)
    journal.publish(executions, 2)
    assert executions.open() == [executions.get("a")]
    (model,) = executions.models()
    assert (model["status"], model["execution_count"], model["started"] >= model["queued"]) == ("running", 3, True)
    journal.publish(executions)
    executions.replied("a", {"status": "ok", "execution_count": 3, "payload": []})
    (model,) = executions.models()
    assert (model["status"], model["running"], model["first"], model["number"]) == ("ok", False, 1, 4)
    assert model["ended"] >= model["started"]
    assert executions.open() == []
    outputs = executions.outputs("a")
    assert outputs["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "hello"}]
    assert (outputs["number"], outputs["dropped"], outputs["complete"]) == (4, 0, True)


def test_statuses_without_a_reply(executions: Executions, journal: Journal) -> None:
    """A cell that fails is an error, one that was sent after it is aborted; replies can be made from that."""
    for msg_id in "abc":
        executions.queued(request(msg_id), {})
    journal.run("a", count=1)
    journal.run("b", ERROR, count=2)
    journal.add("c", BUSY)
    journal.add("c", IDLE)
    journal.publish(executions)
    assert [one["status"] for one in executions.models()] == ["aborted", "error", "ok"]
    replies = [reply_of(one) for one in executions.ended_between(0, 99)]
    assert [(reply["status"], reply["execution_count"]) for reply in replies] == [
        ("ok", 1),
        ("error", 2),
        ("aborted", None),
    ]
    assert replies[1]["ename"] == "ValueError"
    assert replies[1]["traceback"] == ERROR[1]["traceback"]
    assert [one.msg_id for one in executions.ended_between(3, 7)] == ["b"]


def test_a_restart_ends_what_is_open(executions: Executions, journal: Journal) -> None:
    """Those that are over keep their status; what the old process says afterwards changes nothing."""
    for msg_id in "abc":
        executions.queued(request(msg_id), {})
    journal.run("a")
    journal.add("b", BUSY)
    journal.add("b", begins(2))
    journal.publish(executions)
    ended = executions.interrupted_all("restarted", "the kernel was restarted")
    assert [one.msg_id for one in ended] == ["b", "c"]
    journal.add("b", IDLE)
    journal.publish(executions)
    assert [(one["status"], one["reason"]) for one in executions.models()] == [
        *[("restarted", "the kernel was restarted")] * 2,
        ("ok", ""),
    ]
    assert reply_of(ended[0])["ename"] == "KernelRestarted"
    assert executions.end("a", "lost") is None


def test_the_next_cell_ends_one_whose_end_is_lost(executions: Executions, journal: Journal) -> None:
    """A kernel takes cells in turn, each subshell its own."""
    journal.add("a", BUSY)
    journal.add("a", begins(1))
    journal.add("s", BUSY, request("s", subshell_id="other"))
    journal.add("b", BUSY)
    journal.publish(executions)
    assert {one["msg_id"]: one["status"] for one in executions.models()} == {"a": "ok", "s": "running", "b": "running"}


def test_input_that_a_cell_waits_for(executions: Executions, journal: Journal) -> None:
    """The prompt is in the model until the user has typed, or the cell is over."""
    executions.queued(request("a"), {})
    executions.input_requested("a", {"prompt": "who? ", "password": False})
    assert executions.models()[0]["input"] == {"prompt": "who? ", "password": False}
    executions.input_answered("a")
    assert executions.models()[0]["input"] is None
    executions.input_requested("a", {"prompt": ["?"], "password": True})
    assert executions.models()[0]["input"] == {"prompt": "", "password": True}
    executions.replied("a", {"status": "ok"})
    assert executions.models()[0]["input"] is None
    executions.input_requested("x", {})


def test_what_is_not_a_page_s_cell(executions: Executions, journal: Journal) -> None:
    """Silent cells are followed and not listed, another client's are listed, other requests are neither."""
    executions.queued(request("silent"), {}, silent=True)
    journal.add("silent", BUSY)
    journal.run("foreign", prints("x"))
    journal.add("info", BUSY, {"msg_id": "info", "msg_type": "kernel_info_request"})
    journal.publish(executions)
    assert [one["msg_id"] for one in executions.models()] == ["foreign"]
    assert executions.get("silent") is not None
    assert executions.get("info") is None
    assert executions.models()[0]["cell_id"] is None


def test_a_page_of_help_is_an_output(executions: Executions, journal: Journal) -> None:
    """``name?`` comes with the reply, and JupyterLab shows it under the cell."""
    executions.queued(request("a"), {})
    executions.replied("a", {"status": "ok", "payload": [{"source": "page", "data": {"text/plain": "help"}}, 5]})
    assert text_of(executions, "a") == "help"


def test_numbers_are_taken_once(executions: Executions, journal: Journal) -> None:
    """A message that comes again is ignored; a marker takes its number."""
    journal.run("a", prints("x"))
    journal.publish(executions)
    journal.publish(executions)
    assert text_of(executions, "a") == "x"
    executions.published(9, 9, "", {}, ())
    assert executions.number == 9


@pytest.mark.parametrize(
    "parent", [{}, {"msg_id": ["a"]}, {"msg_id": {}, "msg_type": "execute_request"}, {"msg_id": ""}]
)
def test_malformed_messages_are_no_error(executions: Executions, parent: dict[str, Any]) -> None:
    """A kernel may send anything."""
    executions.queued(parent, {})
    executions.queued({"msg_id": "a", "session": 5}, {"cellId": 7})
    number = 0
    for msg_type in ("status", "execute_input", "error", "stream", "display_data", "update_display_data"):
        for parts in (
            (),
            (b"{}",),
            (b"", b"", b"", b"\xff"),
            (b"{}", b"{}", b"{}", b"[" * 5000),
            (b"", b"", b"", b"[]"),
        ):
            for given_parent in (parent, {"msg_id": "a"}):
                number += 1
                executions.published(number, number, msg_type, given_parent, parts)
    executions.replied("a", {"status": ["ok"], "payload": {}})
    assert executions.outputs("a")["status"] == "ok"
    assert [one["msg_id"] for one in executions.models()] == ["a"]


# -- Outputs -------------------------------------------------------------------------------------


def test_a_display_is_updated_from_another_cell(executions: Executions, journal: Journal) -> None:
    """Also by a message that no cell has sent, such as a widget's."""
    journal.run("a", shows("one", "d"), shows("other", "e"))
    journal.run("b", shows("two", "d", "update_display_data"), prints("x"))
    journal.publish(executions)
    assert text_of(executions, "a") == "twoother"
    assert text_of(executions, "b") == "x"
    journal.add("w", shows("three", "d", "update_display_data"), {"msg_id": "w", "msg_type": "comm_msg"})
    journal.run("c", shows("four", "e"))
    journal.publish(executions)
    assert text_of(executions, "a") == "threefour"
    assert executions.models()[2]["number"] == len(journal.messages) - 1


def test_json_that_browsers_do_not_read_is_mended(executions: Executions, journal: Journal) -> None:
    """Some kernels write NaN."""
    journal.run("a")
    journal.publish(executions)
    parts = [b'{"msg_type":"display_data"}', b"{}", b"{}", b'{"data":{"application/json":[NaN,Infinity]}}']
    executions.published(9, 9, "display_data", request("a"), parts)
    assert executions.outputs("a")["outputs"][0]["data"] == {"application/json": [None, None]}


def test_outputs_of_all_cells_are_bounded(
    executions: Executions, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest outputs are dropped, the entries stay, and the journal has them again."""
    monkeypatch.setattr(module, "MAX_OUTPUT", 100_000)
    for number in range(20):
        journal.run(f"c{number}", prints(f"{number}," * 5000), count=number)
    journal.publish(executions)
    assert executions.outputs("c19")["complete"]
    old = executions.outputs("c0")
    assert (old["complete"], old["outputs"], old["execution_count"]) == (False, [], 0)
    assert executions.needs_reading("c19") is None
    assert executions.needs_reading("c0") == (1, 4)
    journal.refold(executions, "c0")
    assert text_of(executions, "c0") == "0," * 5000
    kept = [executions.get(f"c{number}") for number in range(20)]
    assert sum(one.fold.size for one in kept if one and one.fold) <= 100_000


def test_executions_are_bounded(executions: Executions, journal: Journal) -> None:
    """The oldest that is over is forgotten; one that is open never, while there is one that is over."""
    executions.queued(request("open"), {})
    for number in range(MAX + 50):
        executions.queued(request(f"c{number}"), {})
        executions.replied(f"c{number}", {"status": "ok"})
    assert len(executions.models()) == MAX
    assert executions.get("open") is not None
    assert executions.get("c0") is None
    notes = executions.changed_notes()
    assert notes["c0"] is None
    for number in range(2 * MAX):
        executions.queued(request(f"waits{number}"), {})
    assert len(executions.open()) == 2 * MAX + 1
    for number in range(module.MAX_OPEN):
        executions.queued(request(f"flood{number}"), {})
    assert len(executions.open()) == module.MAX_OPEN


def test_a_message_costs_a_few_microseconds(executions: Executions, journal: Journal) -> None:
    """A flood of single lines; the folding is in it, and no step of it is long."""
    executions.queued(request("a"), {})
    parent = request("a")
    parts = [json.dumps(part).encode() for part in ({"msg_type": "stream"}, parent, {}, prints("a line of text\n")[1])]
    gc.disable()  # a collection of what all earlier tests have left is not this module's
    try:
        count, longest, began = 50_000, 0.0, time.process_time()
        for number in range(1, count + 1):
            before = time.process_time()
            executions.published(number, number, "stream", parent, parts)
            longest = max(longest, time.process_time() - before)
    finally:
        gc.enable()
    assert (time.process_time() - began) / count < 50e-6
    assert longest < 0.1
    assert text_of(executions, "a") == "a line of text\n" * count


# -- Another server ------------------------------------------------------------------------------


def test_a_later_server_goes_on(executions: Executions, journal: Journal) -> None:
    """From the notes it has the states, and from the journal the outputs; what it gets meanwhile follows once."""
    executions.queued(request("a"), {"cellId": "1"})
    executions.queued(request("b"), {"cellId": "2"})
    journal.run("a", prints("first"), shows("shown", "d"))
    journal.add("b", BUSY)
    journal.add("b", begins(2))
    journal.add("b", prints("1 "))
    journal.publish(executions)
    notes = {msg_id: text for msg_id, text in executions.changed_notes().items() if text is not None}
    assert executions.changed_notes() == {}

    later = Executions()
    later.restore(notes, len(journal.messages))
    assert [(one["status"], one["cell_id"], one["queued"]) for one in later.models()] == [
        (one["status"], one["cell_id"], one["queued"]) for one in executions.models()
    ]
    assert later.changed_notes() == {}
    journal.add("b", prints("2 "))
    journal.publish(later)
    assert later.outputs("b")["complete"] is False
    wanted = later.needs_reading("b")
    assert wanted == (6, 9)
    read = list(journal.read(*wanted))
    later.refold("b", read[:2], done=False)
    journal.add("b", prints("3 "))
    journal.publish(later)
    journal.add("b", shows("new", "d", "update_display_data"))
    later.refold("b", read[2:])
    later.refold("b", read)
    journal.publish(later)
    assert text_of(later, "b") == "1 2 3 "
    assert text_of(later, "a") == ""
    journal.refold(later, "a")
    assert text_of(later, "a") == "firstshown"
    journal.add("b", shows("newer", "d", "update_display_data"))
    journal.add("b", IDLE)
    journal.publish(later)
    assert text_of(later, "a") == "firstnewer"
    assert later.outputs("b")["status"] == "ok"
    assert json.loads(str(later.changed_notes()["b"]))["status"] == "ok"


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", "[]", "{}", "[" * 3000, '{"status": "done"}', '{"status": ["ok"]}', '{"status": {}}', "\ud800"),
        '{"status": "ok"' + " " * MAX_NOTE + "}",
    ],
)
def test_notes_that_cannot_be_read_are_ignored(executions: Executions, text: str) -> None:
    """They are on a node, where the user may write them."""
    executions.restore(
        {"bad": text, "good": '{"status":"ok","number":1e400,"first":-1,"header":[],"queued":5}', "": "{}"}
    )
    assert [one["msg_id"] for one in executions.models()] == ["good"]


def test_notes_are_short(executions: Executions) -> None:
    """Whatever a client writes into its header."""
    header = request("a", "\ud800" * 5000, username="\U0001f600" * 5000, version="x" * 5000, subshell_id="\n" * 900)
    executions.queued(header, {"cellId": "\0" * 5000})
    text = executions.changed_notes()["a"]
    assert text is not None
    assert len(text) <= MAX_NOTE
    text.encode()
    later = Executions()
    later.restore({"a": text})
    assert later.models()[0]["status"] == "queued"


CELLS = ("a", "b", "c")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(CELLS),
        st.one_of(
            st.builds(prints, st.text(alphabet="xy\n\r\b", max_size=6)),
            st.builds(
                shows,
                st.text(alphabet="pq", max_size=3),
                st.sampled_from(["", "d1", "d2"]),
                st.sampled_from(["display_data", "execute_result", "update_display_data"]),
            ),
            st.sampled_from([("clear_output", {"wait": True}), ("clear_output", {"wait": False}), ERROR]),
        ),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_two_servers_fold_the_same_as_one(
    steps: list[tuple[str, tuple[str, dict[str, Any]]]], restarted: int, asked: int, answered: int
) -> None:
    """Whenever the second server begins, is asked for the outputs, and has read them, while the kernel goes on."""
    journal = Journal()
    for cell in CELLS:
        journal.add(cell, begins(1))
    for cell, message in steps:
        journal.add(cell, message)
    whole = Executions()
    for cell in CELLS:
        whole.queued(request(cell, subshell_id=cell), {})
    journal.publish(whole)

    first, second = Executions(), Executions()
    for cell in CELLS:
        first.queued(request(cell, subshell_id=cell), {})
    journal.publish(first, restarted)
    second.restore({msg_id: text for msg_id, text in first.changed_notes().items() if text}, first.number)
    for number, msg_type, parent, parts in journal.messages[restarted:asked]:
        second.published(number, number, msg_type, parent, parts)
    begun = max(restarted, min(asked, len(journal.messages)))
    readings = {cell: wanted for cell in CELLS if (wanted := second.needs_reading(cell))}
    for number, msg_type, parent, parts in journal.messages[begun : max(begun, answered)]:
        second.published(number, number, msg_type, parent, parts)
    for cell, wanted in readings.items():
        second.refold(cell, journal.read(wanted[0], len(journal.messages)))
    for number, msg_type, parent, parts in journal.messages[max(begun, answered) :]:
        second.published(number, number, msg_type, parent, parts)
    for cell in CELLS:
        journal.refold(second, cell)
        assert second.outputs(cell)["outputs"] == whole.outputs(cell)["outputs"]


@pytest.mark.parametrize("is_read", [False, True], ids=["published", "read again"])
def test_large_outputs_are_folded_in_short_steps_and_hostile_ones_are_left_out(journal: Journal, is_read: bool) -> None:
    """An image and a long text are there whole; megabytes of brackets are a notice."""
    image, text = "iVBOR" * 400_000, 'a "quoted" line, and [brackets]\n' * 60_000
    nested = ("display_data", {"data": {"application/json": [[]] * 700_000}, "metadata": {}})
    journal.run("1", shows(image), prints(text), nested, shows("last"), count=7)
    executions = Executions()
    steps: Iterator[None]
    if is_read:
        executions.restore({"1": json.dumps({"status": "ok", "first": 1, "number": 8})}, 8)
        steps = executions.refolding("1", journal.read(*(executions.needs_reading("1") or (0, 0))))
    else:
        journal.publish(executions)
        steps = executions.fold()
    longest, more = 0.0, True
    while more:
        began = time.thread_time()
        more = next(steps, steps) is None
        longest = max(longest, time.thread_time() - began)
    found = executions.outputs("1")["outputs"]
    assert found[0]["data"] == {"text/plain": image}
    assert found[1]["text"] == text
    assert "left out" in found[2]["text"]
    assert found[3]["data"] == {"text/plain": "last"}
    assert longest < 0.1


def test_the_number_of_a_large_cell_is_known(executions: Executions, journal: Journal) -> None:
    """Its text is not parsed, and what looks like a number in it is none."""
    code = '{"execution_count": 3}\n' + "x = 1\n" * 20_000 + ', "execution_count": 4}'
    journal.run("1", ("execute_input", {"code": code, "execution_count": 12}))
    journal.publish(executions, 3)
    execution = executions.get("1")
    assert execution is not None
    assert execution.execution_count == 12
