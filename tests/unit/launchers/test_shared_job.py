"""Whether others work in a job, as a launcher without a server reads it from Slurm."""

from __future__ import annotations

import pytest

from launchers import node
from launchers.steps import job_is_shared, lists_foreign_steps


@pytest.mark.parametrize(
    ("listed", "others"),
    [
        ("", False),
        ("12.batch\n12.extern\n", False),
        ("12.0\n12.batch\n", True),
        ("  12.interactive  \n", True),
        ("123.0\n", False),
        ("x12.0\nrubbish\n", False),
    ],
)
def test_steps_beside_the_jobs_own_are_others(listed, others):
    """Ids are compared whole, and what is no step says nothing."""
    assert lists_foreign_steps("12", listed) is others


@pytest.mark.parametrize(("script", "answer"), [("echo 12.3", True), ("exit 1", None), ("echo", False)])
def test_an_answer_that_fails_is_none(tmp_path, monkeypatch, script, answer):
    """A squeue that fails says nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "squeue").chmod(0o755)
    assert job_is_shared("12") is answer


@pytest.mark.parametrize(
    ("titles", "nodes", "answer"),
    [
        (["slurmstepd: [12.batch]", "slurmstepd: [12.extern]", "slurmstepd: [123.0]"], "1", False),
        (["slurmstepd: [12.batch]", "slurmstepd: [12.0]", "bash"], "1", True),
        (["slurmstepd: [12.batch]", "slurmstepd: [12.interactive]"], "2", True),
        (["slurmstepd: [12.batch]"], "2", None),
        (["slurmstepd: [13.0]"], "1", None),
    ],
)
def test_without_squeue_the_daemons_of_steps_are_looked_for(tmp_path, monkeypatch, titles, nodes, answer):
    """What cannot be seen from the node is not taken for nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", nodes)
    monkeypatch.setattr(node, "pids", lambda: list(range(len(titles))))
    monkeypatch.setattr(node, "command_line", titles.__getitem__)
    assert job_is_shared("12") is answer
