"""Slurm's version and partitions, as Slurm's commands and slurmrestd print them."""

from __future__ import annotations

import pytest

from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.slurm.commands import parse_partitions, parse_version, partitions_in, version_in
from gateway_slurm.slurm.model import ClusterInfo, Partition


def test_partitions_are_read_with_the_default_and_their_state():
    """The format is that of sinfo 22.05; other lines are ignored."""
    found = parse_partitions("batch*|up|4|1-infinite\ndevel|down|0|2-3\nodd\n")
    assert found == (Partition("batch", True, "up", 4, 1), Partition("devel", False, "down", 0, 2, 3))
    assert [str(each) for each in found] == ["batch*", "devel (down)"]
    assert parse_partitions("") == ()


def test_the_controllers_version_is_read():
    """It is one line among two hundred; without that line the version is empty."""
    text = "Configuration data as of 2026-01-01\nSLURM_CONF = /etc/slurm.conf\nSLURM_VERSION           = 22.05.8\n"
    assert parse_version(text) == "22.05.8"
    assert parse_version("") == ""


@pytest.mark.parametrize("name", ["Slurm", "slurm"])
def test_slurmrestd_says_its_version_in_either_spelling(name):
    """The field is ``Slurm`` before 23.11; a malformed version is empty."""
    assert version_in({"meta": {name: {"release": "24.11.5", "version": {"major": "24"}}}}) == "24.11.5"
    for odd in ({}, {"meta": None}, {"meta": {name: "x"}}, {"meta": {name: {"release": 5}}}):
        assert version_in(odd) == ""


def test_slurmrestds_partitions_are_read_and_what_is_no_list_is_unknown():
    """Only v0.0.38 tells which partition is the default."""
    old = {"partitions": [{"name": "batch", "flags": ["default"]}, {"name": "devel", "flags": []}, {"name": 5}, "x"]}
    assert partitions_in(old) == (Partition("batch", True), Partition("devel"))
    assert ClusterInfo("", partitions_in(old)).default_partition == "batch"
    new = {"partitions": [{"name": "batch", "nodes": {}}, {"name": "devel", "flags": None}]}
    assert ClusterInfo("", partitions_in(new)).default_partition is None
    with pytest.raises(SlurmUnavailable):
        partitions_in({"jobs": []})


@pytest.mark.parametrize(
    "row",
    [
        {"total_nodes": 9, "min_nodes_per_job": 2, "maximum_nodes_per_job": 4},
        {"nodes": {"total": 9}, "minimums": {"nodes": 2}, "maximums": {"nodes": {"set": True, "number": 4}}},
    ],
)
def test_the_sizes_of_a_partitions_jobs_are_read_in_either_shape(row):
    """A size that is not known, or has no limit, allows any job."""
    (found,) = partitions_in({"partitions": [{"name": "batch", **row}]})
    assert [found.allows(nodes) for nodes in (1, 2, 4, 5)] == [False, True, True, False]
    assert Partition("batch").allows(99)
    for limit in ({"set": True, "infinite": True, "number": 0}, 0xFFFFFFFF, "x", {"set": False, "number": 1}):
        (found,) = partitions_in(
            {"partitions": [{"name": "batch", "nodes": {"total": 9}, "maximums": {"nodes": limit}}]}
        )
        assert (found.allows(9), found.allows(10)) == (True, False)


def test_the_only_partition_is_the_default():
    """A cluster with one partition need not mark it."""
    assert ClusterInfo("", (Partition("all"),)).default_partition == "all"
    assert ClusterInfo("").default_partition is None
