"""A cell that publishes faster than its client reads: the launcher takes every message from the kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat.v4 as nbf
import pytest
from nbclient import NotebookClient

from helpers.kernel_clients import install_kernelspec

# A kernel's publisher keeps 1000 messages for a subscriber that is slow, and drops the rest without a word.
COUNT = 10_000
FLOOD = f"""
import sys
for number in range({COUNT}):
    sys.stdout.write("0123456789"[number % 10])
    sys.stdout.flush()
"""


@pytest.fixture
def wrapper_script(kernelspecs: Path, tmp_path: Path) -> str:
    """A kernelspec whose command is a shell script of the user's, which starts the kernel."""
    script = tmp_path / "start-kernel.sh"
    script.write_text(f'#!/bin/sh\necho "loading modules" >&2\n"{sys.executable}" -m ipykernel_launcher -f "$1"\n')
    script.chmod(0o755)
    install_kernelspec(
        kernelspecs,
        "wrapped",
        config_overrides={"kernel_argv": [str(script), "{connection_file}"], "connect": "tunnel"},
    )
    return "wrapped"


def printed_by(kernel_name: str) -> str:
    """What nbclient gets of the flood."""
    notebook = nbf.new_notebook(cells=[nbf.new_code_cell(FLOOD)])
    client = NotebookClient(notebook, kernel_name=kernel_name, timeout=300)
    (cell,) = client.execute().cells
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("script", [False, True], ids=["ipykernel", "wrapper script"])
def test_nbclient_gets_every_flushed_character(service, wrapper_script, script):
    """Each character is a message; none of them is lost behind the tunnel, whatever command starts the kernel."""
    text = printed_by(wrapper_script if script else "slurm")
    is_whole = text == ("0123456789" * (COUNT // 10 + 1))[:COUNT]
    assert (len(text), is_whole) == (COUNT, True)
