"""A cell's outputs, folded from its messages as JupyterLab and nbclient fold them."""

from __future__ import annotations

import re
import time
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook, output_from_msg

from gateway_slurm.gateway.folding import MAX_LINE, Fold


def stream(text: object, name: str = "stdout") -> tuple[str, dict[str, Any]]:
    """A stream message."""
    return "stream", {"name": name, "text": text}


def display(text: str, display_id: str = "", kind: str = "display_data") -> tuple[str, dict[str, Any]]:
    """A message that shows a text, or updates one."""
    content: dict[str, Any] = {"data": {"text/plain": text}, "metadata": {}}
    if display_id:
        content["transient"] = {"display_id": display_id}
    if kind == "execute_result":
        content["execution_count"] = 1
    return kind, content


CLEAR = "clear_output", {"wait": False}
CLEAR_LATER = "clear_output", {"wait": True}
ERROR = "error", {"ename": "E", "evalue": "v", "traceback": ["line 1", "line 2"]}


def fold(*messages: tuple[str, dict[str, Any]], limit: int = 8 << 20) -> Fold:
    """What these messages fold to."""
    made = Fold(limit)
    for msg_type, content in messages:
        made.take(msg_type, content)
    return made


def texts(made: Fold) -> list[str]:
    """The text of each output."""
    return [output.get("text", output.get("data", {}).get("text/plain")) for output in made.outputs]


def as_jupyterlab(messages: list[str]) -> str:
    """The text of a stream, as JupyterLab 4.6's ``processText`` makes it, character by character."""
    text, place = "", 0
    for character in "".join(messages):
        if character == "\n":
            text, place = text + "\n", len(text) + 1
        elif character == "\r":
            place = text.rfind("\n", 0, place) + 1
        elif character == "\b":
            if place and text[place - 1] != "\n":
                text, place = text[: place - 1] + text[place + 1 :], place - 1
        else:
            text, place = text[:place] + character + text[place + 1 :], place + 1
    return text


@pytest.mark.parametrize(
    ("messages", "shown"),
    [
        ([stream("a"), stream("b\n"), stream("c")], ["ab\nc"]),
        ([stream("a"), stream("b", "stderr"), stream("c")], ["a", "b", "c"]),
        ([stream(["a", "b"]), stream("")], ["ab"]),
        ([stream("1%\r2%"), stream("\r100%"), stream("\rdone\n"), stream("x")], ["done\nx"]),
        ([stream("long line\rab")], ["abng line"]),
        ([stream("a\r\nb\r"), stream("\nc")], ["a\nb\nc"]),
        ([stream("|"), stream("\b/"), stream("\b-\b\\"), stream("\b\b\b")], [""]),
        ([stream("a\n\b\bb")], ["a\nb"]),
        ([stream("one"), display("shown"), stream("\rtwo")], ["one", "shown", "two"]),
        ([stream("a"), CLEAR, stream("b")], ["b"]),
        ([stream("a"), CLEAR_LATER], ["a"]),
        ([stream("a"), CLEAR_LATER, stream("b"), stream("c")], ["bc"]),
        ([display("a", "1"), CLEAR_LATER, display("b", "1", "update_display_data"), display("c")], ["c"]),
        ([display("a", "1"), stream("x"), display("b", "1", "update_display_data")], ["b", "x"]),
        ([display("a", "1", "execute_result"), display("b", "1", "update_display_data")], ["b"]),
        ([display("a", "1"), display("b", "1")], ["b", "b"]),
        ([display("a", "1"), CLEAR, display("b", "1", "update_display_data")], []),
        ([display("b", "9", "update_display_data")], []),
        ([("status", {"execution_state": "busy"}), ("comm_msg", {}), stream("a")], ["a"]),
    ],
)
def test_messages_fold_to_what_jupyterlab_shows(messages: list[Any], shown: list[str]) -> None:
    """Streams are joined, controls move in the line, clears and updates do what they do in a page."""
    assert texts(fold(*messages)) == shown


def test_outputs_are_those_of_nbformat() -> None:
    """Each output equals what nbformat makes of the message, and a notebook with all of them is valid."""
    messages = [stream("a"), display("b"), display("c", "1", "execute_result"), ERROR]
    made = fold(*messages).outputs
    assert made == [dict(output_from_msg({"header": {"msg_type": kind}, "content": body})) for kind, body in messages]
    nbformat.validate(new_notebook(cells=[new_code_cell(outputs=[nbformat.from_dict(output) for output in made])]))


def test_an_update_keeps_the_kind_and_the_place() -> None:
    """A result that is updated stays a result with its count; ``update_display`` says whether there is one."""
    made = fold(display("a", "1", "execute_result"), stream("x"))
    assert made.update_display("1", {"text/plain": "new"}, {"isolated": True})
    assert made.outputs[0] == {
        "output_type": "execute_result",
        "data": {"text/plain": "new"},
        "metadata": {"isolated": True},
        "execution_count": 1,
    }
    assert not made.update_display("2", {}, {})
    assert not made.update_display("", {}, {})


def test_the_count_is_that_of_the_execution() -> None:
    """From execute_input; what is no number is none."""
    made = fold(("execute_input", {"code": "1", "execution_count": 7}))
    assert made.execution_count == 7
    assert fold(("execute_input", {"execution_count": "7"})).execution_count is None


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"name": 1, "text": 2, "data": [], "metadata": "x", "transient": 5, "traceback": "x", "wait": {}},
        {"name": None, "text": ["a", 1], "data": None, "transient": {"display_id": ["x"]}, "traceback": [1, "line"]},
        {"ename": [], "evalue": {}, "execution_count": True, "transient": {"display_id": ""}},
    ],
)
def test_malformed_contents_are_no_error(content: dict[str, Any]) -> None:
    """A kernel may send anything; what comes out is valid for a notebook."""
    made = Fold()
    for msg_type in (
        "stream",
        "display_data",
        "execute_result",
        "error",
        "update_display_data",
        "execute_input",
        "clear_output",
        "stream",
    ):
        made.take(msg_type, content)
    nbformat.validate(
        new_notebook(cells=[new_code_cell(outputs=[nbformat.from_dict(output) for output in made.outputs])])
    )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(alphabet="ab\n\r\b", max_size=12), max_size=12))
def test_any_stream_is_as_in_jupyterlab(messages: list[str]) -> None:
    """Also where a control is the first or the last character of a message."""
    made = fold(*map(stream, messages))
    assert texts(made) == ([as_jupyterlab(messages)] if messages else [])
    assert made.dropped == 0


# -- Bounds --------------------------------------------------------------------------------------


def test_beyond_the_limit_the_head_and_the_tail_stay() -> None:
    """Of a million lines the first and the last ones are kept, and a text between them says how much is not."""
    made, lines = Fold(64 << 10), 100_000
    for number in range(lines):
        made.take("stream", {"name": "stdout", "text": f"line {number}\n"})
    head, notice, tail = texts(made)
    assert head.startswith("line 0\nline 1\n")
    assert len(head) == pytest.approx(16 << 10, rel=0.1)
    assert tail.endswith(f"line {lines - 1}\n")
    assert made.size <= 64 << 10
    assert str(made.dropped) in notice
    whole = sum(len(f"line {number}\n") for number in range(lines))
    assert len(head) + len(tail) + made.dropped == whole
    made.take(*CLEAR)
    assert (made.outputs, made.dropped, made.size) == ([], 0, 0)


def test_many_small_outputs_are_bounded() -> None:
    """Displays count with what they cost; those that are left out cannot be updated any more."""
    made = Fold(64 << 10)
    for number in range(5000):
        made.take(*display(str(number), f"id{number}"))
    assert len(made.outputs) <= 129
    assert made.size <= 64 << 10
    assert texts(made)[0] == "0"
    assert texts(made)[-1] == "4999"
    assert made.update_display("id0", {"text/plain": "first"}, {})
    assert made.update_display("id4999", {"text/plain": "last"}, {})
    assert not made.update_display("id2500", {}, {})
    assert texts(made)[0] == "first"
    assert texts(made)[-1] == "last"


def test_displays_that_grow_are_bounded() -> None:
    """An update counts with its size; one that alone is larger than the limit is not taken."""
    made = Fold(64 << 10)
    for number in range(20):
        made.take(*display("x", f"id{number}"))
    for number in range(20):
        made.take(*display("y" * 10_000, f"id{number}", "update_display_data"))
    assert made.size <= 64 << 10
    assert made.dropped > 0
    before = made.outputs
    made.take(*display("z" * 100_000, "id0", "update_display_data"))
    assert made.outputs == before


def test_one_output_beyond_the_limit_is_named_in_its_place() -> None:
    """The others stay; its size is counted."""
    made = fold(stream("before\n"), display("x" * 100_000), stream("after\n"), limit=64 << 10)
    before, notice, after = texts(made)
    assert (before, after) == ("before\n", "after\n")
    assert "left out" in notice
    assert made.dropped > 100_000


def test_a_line_without_an_end_is_bounded() -> None:
    """Dots for an hour: the text stays as it is, the part in which a carriage return moves is bounded."""
    made = fold(*[stream("." * 1000) for _ in range(100)])
    assert texts(made) == ["." * 100_000]
    made.take(*stream("\r" + "x" * 10))
    assert len(texts(made)[0]) == pytest.approx(100_000, abs=MAX_LINE)


@pytest.mark.parametrize(
    "text",
    [
        "\rx" * 32_000,
        "x\b" * 32_000,
        "\b/" * 32_000,
        "x\r\b" * 21_000,
        "ab\r\n" * 16_000,
        "x" * 16_000 + "\rx\b" * 9_000,
    ],
    ids=lambda text: re.sub(r"\W+", "-", repr(text[:6])),
)
def test_hostile_controls_cost_no_seconds(text: str) -> None:
    """A text of 64 KiB that is controls only is folded in a small part of a second."""
    made, began = Fold(), time.process_time()
    for _ in range(4):
        made.take(*stream(text))
    assert time.process_time() - began < 0.5


MESSAGES = st.lists(
    st.one_of(
        st.builds(stream, st.text(alphabet="ab\n\r", max_size=2000), st.sampled_from(["stdout", "stderr"])),
        st.builds(
            display,
            st.text(alphabet="xy", max_size=600),
            st.sampled_from(["", "1", "2"]),
            st.sampled_from(["display_data", "execute_result", "update_display_data"]),
        ),
        st.sampled_from([CLEAR, CLEAR_LATER, ERROR]),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(MESSAGES)
def test_no_messages_go_beyond_the_limit(messages: list[Any]) -> None:
    """Whatever comes in whatever order, the size is at most the limit and one line, and the outputs are valid."""
    made = Fold(8 << 10)
    for msg_type, content in messages:
        made.take(msg_type, content)
        assert 0 <= made.size <= (8 << 10) + 4096
    kept = sum(len(text or "") for text in texts(made))
    assert kept <= (8 << 10) + 4096
    nbformat.validate(
        new_notebook(cells=[new_code_cell(outputs=[nbformat.from_dict(output) for output in made.outputs])])
    )
