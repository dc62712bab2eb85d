"""The kernelspec for clients that name none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager

SMALL: dict[str, Any] = {
    "partition": "batch", "project": "p", "nodes": 1, "runtime": 60, "memory": "4G", "kernel_name": "python3",
}  # fmt: skip


def default(root: Path, specs: dict[str, dict[str, Any]], *, wanted: str = "python3", **project: Any) -> str:
    """The default among these kernelspecs of a project ``p``, each given by its difference from SMALL."""
    for name, fields in specs.items():
        stanza = {"provisioner_name": "slurm-provisioner", "config": {**SMALL, **fields}}
        directory = root / "p" / name
        directory.mkdir(parents=True)
        (directory / "kernel.json").write_text(json.dumps({"metadata": {"kernel_provisioner": stanza}}))
    (root / "p" / "project.json").write_text(json.dumps(project))
    manager = GatewayKernelSpecManager(projects_root=str(root), serve_installed=False)
    return manager.default_for("ada", wanted)


@pytest.mark.parametrize(
    "more",
    [
        {"gpus": 1},
        {"gres": "gpu:a100:2"},
        {"gres": "gpu:1"},
        {"gres": "shard:1"},
        {"nodes": 2},
        {"cpus": 2},
        {"memory": "5000"},
        {"memory": None},
        {"runtime": 61},
        {"time": "UNLIMITED"},
        {"nodes": None},
        {"jobid": "12"},
    ],
    ids=str,
)
def test_the_one_that_asks_for_least(tmp_path: Path, more: dict[str, Any]) -> None:
    """Whatever the kernelspecs' names are."""
    assert default(tmp_path, {"a": more, "b": {}}) == "p.b"


def test_the_first_difference_decides(tmp_path: Path) -> None:
    """A GPU counts more than nodes, and these more than time; without a difference the name decides."""
    specs = {"a": {"gpus": 1}, "b": {"nodes": 4, "runtime": 5}, "c": {"runtime": 600}, "d": {"runtime": 600}}
    assert default(tmp_path, specs) == "p.c"


def test_settings_come_first(tmp_path: Path) -> None:
    """The project's before the gateway's; a name that does not exist is in the log, and counts for nothing."""
    specs = {"a": {"gpus": 1}, "b": {"nodes": 2}, "c": {}}
    assert default(tmp_path / "1", specs, wanted="p.b", default_kernel="a") == "p.a"
    assert default(tmp_path / "2", specs, wanted="p.b") == "p.b"
    assert default(tmp_path / "3", specs, default_kernel="nosuch") == "p.c"
    assert default(tmp_path / "4", {"a": {}}, wanted="nosuch") == "p.a"
    manager = GatewayKernelSpecManager(projects_root=str(tmp_path / "3"), serve_installed=False)
    assert [problem for problem in manager.problems() if "default_kernel='nosuch'" in problem]
