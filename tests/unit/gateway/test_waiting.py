"""What a user reads about a start that waits, and the messages that show it under a cell."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from gateway_slurm.allocations.owners import QueuedStart
from gateway_slurm.gateway.channels.notice import WaitingNotice
from gateway_slurm.gateway.waiting import given_up_text, waiting_text

NOON = time.mktime((2026, 5, 4, 12, 0, 0, 0, 0, -1))
ZONE = time.strftime("%Z", time.localtime(NOON))
WAITING = QueuedStart(
    jobid="14",
    partition="batch",
    state="PENDING",
    reason="Priority",
    advice="",
    queue_place=3,
    expected_start=NOON + 9720,
)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, f"Waiting for job 14 in partition batch (Priority): number 3 in the queue, expected at 14:42 {ZONE}."),
        (
            {"expected_start": NOON + 86400},
            f"Waiting for job 14 in partition batch (Priority): number 3 in the queue, "
            f"expected on 2026-05-05 at 12:00 {ZONE}.",
        ),
        ({"expected_start": None}, "Waiting for job 14 in partition batch (Priority): number 3 in the queue."),
        ({"queue_place": None, "expected_start": None}, "Waiting for job 14 in partition batch (Priority)."),
        (
            {"queue_place": None, "expected_start": None, "reason": "JobHeldUser", "advice": "scontrol release 14"},
            "Waiting for job 14 in partition batch (JobHeldUser); scontrol release 14.",
        ),
        ({"queue_place": None, "expected_start": None, "reason": "None"}, "Waiting for job 14 in partition batch."),
        ({"queue_place": None, "expected_start": None, "reason": "", "partition": ""}, "Waiting for job 14."),
    ],
)
def test_the_wait_is_one_sentence_of_what_is_known(changes, text):
    """Slurm's reason, the place and the expected start are left out where Slurm gives none."""
    assert waiting_text(replace(WAITING, **changes), NOON) == text


def test_a_start_that_was_given_up_names_its_job_where_it_had_one():
    """And says how to get another."""
    assert "while it waited for job 14 in partition batch. Start the kernel again" in given_up_text(WAITING)
    assert "by an interrupt. Start" in given_up_text(None)


def test_a_notice_is_one_display_under_the_first_cell_that_changes_only_with_its_text():
    """It is sent once there are a cell and a text, changed when the text changes, and taken away by a clear."""
    sent = []
    notice = WaitingNotice(lambda kind, content, cell: sent.append((kind, content, cell["msg_id"])))
    notice.set_text("third")
    assert sent == []
    for cell in ("a", "b"):
        notice.cell_held({"msg_id": cell})
    for text in ("third", "second", "second"):
        notice.set_text(text)
    notice.clear()
    assert [(kind, cell) for kind, _content, cell in sent] == [
        ("display_data", "a"),
        ("update_display_data", "a"),
        ("clear_output", "a"),
    ]
    first, changed, cleared = [content for _kind, content, _cell in sent]
    assert first["transient"] == changed["transient"]
    assert (first["data"], changed["data"]) == ({"text/plain": "third"}, {"text/plain": "second"})
    assert cleared == {"wait": False}

    # A restart of the kernel that runs later holds cells, too: the old text is no more true.
    notice.cell_held({"msg_id": "c"})
    notice.clear()
    assert len(sent) == 3
