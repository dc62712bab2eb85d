"""The table of docs/admins/networks.md has a test behind each cell, and a cell for each test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ("tests/sites/test_supported_combinations.py", "tests/sites/test_supported_combinations_failures.py")
WAYS = {"commands": "local", "SSH": "ssh", "SSH only": "ssh-no-forwarding", "REST": "rest"}
MODES = ("direct", "tunnel")
Cell = tuple[str, str, str]  # test, way, mode


def written() -> tuple[set[Cell], set[Cell]]:
    """The table's cells: those with a mark, and all."""
    lines = (ROOT / "docs" / "admins" / "networks.md").read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("| what | test |"))
    lines = lines[: lines.index("", begin)]
    columns = [part.strip().split(", ") for part in lines[begin].split("|")[3:-1]]
    marked, every = set(), set()
    for line in lines[begin + 2 :]:
        _what, test, *marks = (part.strip() for part in line.split("|")[1:-1])
        for (way, mode), mark in zip(columns, marks, strict=True):
            assert mark in ("✓", "–"), line
            every.add((test.strip("`"), WAYS[way], mode))
            if mark == "✓":
                marked.add((test.strip("`"), WAYS[way], mode))
    return marked, every


@pytest.fixture(scope="module")
def collected() -> set[Cell]:
    """What pytest would run; a test that has no mode of its own does both."""
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *MODULES]
    output = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.findall(r"::(test_\w+)\[(.+?)(?:-(direct|tunnel))?\]$", output, re.MULTILINE)
    assert len(found) == output.count("::")
    return {(test, way, each) for test, way, mode in found for each in ([mode] if mode else MODES)}


def test_each_mark_has_a_test_and_each_test_a_mark(collected):
    """No cell says more than is tested, and nothing that is tested is left out."""
    assert written()[0] == collected


def test_every_row_has_all_ways_and_modes():
    """All four, each with both, and no column twice."""
    every = written()[1]
    for test in {cell[0] for cell in every}:
        assert {(way, mode) for name, way, mode in every if name == test} == {
            (way, mode) for way in WAYS.values() for mode in MODES
        }
