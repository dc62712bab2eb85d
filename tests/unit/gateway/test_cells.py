"""Cells with lost replies: the messages on iopub are enough to make a reply."""

from __future__ import annotations

import json

import pytest

from gateway_slurm.gateway.channels.cells import Cells


def header(msg_id, msg_type="execute_request", **fields):
    """A request's header."""
    return {"msg_id": msg_id, "msg_type": msg_type, **fields}


def told(cell, msg_type, **content):
    """The parts of a message of iopub's under the cell."""
    parts = [{"msg_id": "m", "msg_type": msg_type}, header(cell), {}, content]
    return [json.dumps(part).encode() for part in parts]


def run(cells, cell, *, count=None, error=None):
    """The kernel runs the cell to its end."""
    cells.on_iopub(told(cell, "status", execution_state="busy"))
    if count is not None:
        cells.on_iopub(told(cell, "execute_input", code="1", execution_count=count))
    if error is not None:
        cells.on_iopub(told(cell, "error", ename=error, evalue="it", traceback=["t"]))
    return cells.on_iopub(told(cell, "status", execution_state="idle"))


@pytest.fixture
def cells():
    """Two cells that an earlier server sent to the kernel, without a message on iopub yet."""
    made = Cells()
    made.restore({"a": "-", "b": "-"})
    return made


def test_a_cell_that_ended_well_is_answered_with_its_count(cells):
    """And with the header of its request, as iopub's messages carry it."""
    assert run(cells, "a", count=3) == (True, "a")
    made_for, content = cells.make_reply("a")
    assert made_for["msg_id"] == "a"
    assert (content["status"], content["execution_count"]) == ("ok", 3)
    assert cells.make_reply("a") is None


def test_a_cell_that_failed_is_answered_with_its_error_and_those_behind_it_as_aborted(cells):
    """As the kernel itself would have it."""
    run(cells, "a", count=3, error="ValueError")
    run(cells, "b")
    failed, aborted = cells.make_reply("a")[1], cells.make_reply("b")[1]
    assert (failed["status"], failed["ename"], failed["traceback"]) == ("error", "ValueError", ["t"])
    assert aborted["status"] == "aborted"


def test_a_reply_that_comes_after_ours_is_one_too_many(cells):
    """A frontend gets one answer for each cell."""
    run(cells, "a", count=1)
    assert cells.on_reply("b")
    cells.make_reply("a")
    assert not cells.on_reply("a")


def test_what_is_remembered_of_a_cell_is_what_the_next_server_knows(cells):
    """Whether it was asked, had begun, or was over, and how."""
    run(cells, "a", count=7, error="E")
    cells.on_iopub(told("b", "status", execution_state="busy"))
    cells.on_iopub(told("b", "execute_input", execution_count=8))
    cells.add_request(header("c"))
    cells.add_request(header("d"))
    cells.on_iopub(told("d", "error", ename="E"))
    marks = cells.marks()
    assert marks == {"a": "error:7", "b": "+8", "c": "-", "d": "!"}
    later = Cells()
    later.restore(marks)
    assert later.marks() == marks
    assert list(later.ended()) == ["a"]
    assert later.unconfirmed() == {"c"}
    assert later.make_reply("a")[1]["execution_count"] == 7
    run(later, "d")
    assert later.make_reply("d")[1]["status"] == "error"


def test_a_cell_of_no_record_counts_if_it_may_be_the_sessions():
    """The earlier server was killed before it acknowledged that it had sent the cell."""
    cells = Cells()
    assert cells.on_iopub(told("a", "status", execution_state="busy"), lambda _header: False) == (False, "")
    assert not cells
    cells.on_iopub(told("a", "status", execution_state="busy"), lambda _header: True)
    assert cells.marks() == {"a": "+"}


def test_other_requests_are_no_cells():
    """A completion without a reply leaves no cell that runs without end."""
    cells = Cells()
    assert not cells.add_request(header("a", "complete_request"))
    assert not cells
