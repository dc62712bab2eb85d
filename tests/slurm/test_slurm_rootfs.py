"""How tests get another Slurm: what must hold of it without making a root file system."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm_rootfs.py"


@pytest.fixture(scope="module")
def rootfs() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("slurm_rootfs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_run_mounted_and_started_ends_with_it(tmp_path, number):
    """However it is ended: no process of its own is left, and nothing is mounted, then or before."""
    code = """if True:
        import importlib, sys
        sys.path.insert(0, sys.argv[1])
        rootfs = importlib.import_module("slurm_rootfs")
        rootfs.end_with_signals()
        inside = 'mount -t tmpfs tmpfs "$0"; setsid sleep 1000 & echo ready; wait'
        rootfs.call([*rootfs.namespaces(), "bash", "-c", inside, sys.argv[2]])
    """
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(SCRIPT.parent), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    with run.stdout:
        assert run.stdout.readline() == "ready\n"
    inside = psutil.Process(run.pid).children(recursive=True)
    assert {process.name() for process in inside} >= {"unshare", "bash"}
    run.send_signal(number)
    run.wait(timeout=30)
    _, left = psutil.wait_procs(inside, timeout=30)
    assert left == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_the_archive_is_the_one_that_apt_uses(rootfs):
    """It stands in this machine's apt sources."""
    sources = [path.read_text() for path in Path("/etc/apt").rglob("*") if path.suffix in (".list", ".sources")]
    assert any(rootfs.archive().rstrip("/") in text for text in sources)


def test_a_suite_that_has_moved_on_is_an_error(rootfs, tmp_path):
    """The error names the version that was asked for and the one that is there, and no test is run."""
    for name, text in {"make": "exit 0", "slurmctld": "echo slurm-wlm 26.11.1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = ["/bin/sh", "-c", rootfs.TESTS, "26.05", "sid"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)}, timeout=30)
    assert result.returncode == 3
    assert "Debian's sid now has slurm-wlm 26.11.1, not 26.05" in result.stderr


def test_the_work_tree_is_copied_again_and_the_venv_stays(rootfs, tmp_path):
    """A file that is gone here is gone there; the venv is what makes a second run quick."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "kept").touch()
    (tmp_path / "tests" / "old").mkdir(parents=True)
    (tmp_path / "old").touch()
    rootfs.copy_project(tmp_path)
    assert (tmp_path / ".venv" / "kept").exists()
    assert not (tmp_path / "tests" / "old").exists()
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "tests" / "slurm" / Path(__file__).name).read_text() == Path(__file__).read_text()
    assert (tmp_path / "Makefile").stat().st_mtime == (SCRIPT.parent.parent / "Makefile").stat().st_mtime
    assert not (tmp_path / ".slurm").exists()


def test_each_version_has_a_make_target(rootfs):
    """``make test-slurm-VERSION`` is there for each version that the script knows."""
    makefile = (SCRIPT.parent.parent / "Makefile").read_text()
    assert f"SLURM_VERSIONS := {' '.join(rootfs.SUITES)}\n" in makefile
