"""A start that Slurm refuses is one good sentence for the user of each program, and not two tracebacks."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import nbformat
import nbformat.v4 as nbf
import pytest

from gateway_slurm.gateway.jupyter_compat import ServerLogFilter
from helpers.failing_starts import spec
from helpers.kernel_clients import READY, poll_async
from helpers.notebook_server import running_server

SENTENCE = "Slurm refused the job (partition nosuch"
MANAGER = "--ServerApp.kernel_manager_class=gateway_slurm.SlurmMappingKernelManager"
BIN = Path(sys.executable).parent
SCRIPT = """
import nbformat.v4 as nbf
from nbclient import NotebookClient
NotebookClient(nbf.new_notebook(cells=[nbf.new_code_cell("1")]), kernel_name="asked").execute()
"""


@pytest.fixture
def refused(cluster, kernelspecs):
    """A kernelspec with a partition that does not exist."""
    return spec(kernelspecs, partition="nosuch")


@pytest.mark.slow
def test_programs_show_the_sentence_without_a_traceback(refused, tmp_path):
    """Console, nbconvert, papermill and ``jupyter execute``; each ends with a status of failure."""
    path = tmp_path / "notebook.ipynb"
    notebook = nbf.new_notebook(cells=[nbf.new_code_cell("1")])
    notebook.metadata["kernelspec"] = {"name": refused, "language": "python", "display_name": "asked"}
    nbformat.write(notebook, path)
    commands = [
        ["jupyter-console", f"--kernel={refused}"],
        ["jupyter-nbconvert", "--execute", "--to=notebook", "--output=out", str(path)],
        ["papermill", str(path), str(tmp_path / "paper.ipynb")],
        ["jupyter-execute", str(path)],
    ]
    for name, *arguments in commands:
        argv = [str(BIN / name), *arguments]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=READY)
        # The line of the event, in the log's own form, is for those who search logs.
        lines = (done.stdout + done.stderr).splitlines()
        printed = "\n".join(line for line in lines if "outcome=" not in line)
        assert done.returncode == 1, printed
        assert printed.count(SENTENCE) == 1, printed
        assert f"{name}: {SENTENCE}" in printed
        assert "Traceback" not in printed


def test_a_users_script_gets_the_exception_once(refused, tmp_path):
    """The traceback leads through the script and nbclient, and ends where this package begins."""
    (tmp_path / "script.py").write_text(SCRIPT)
    argv = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=READY)
    assert done.stderr.count(SENTENCE) == done.stderr.count("Traceback") == 1, done.stderr
    assert "script.py" in done.stderr
    assert "gateway_slurm/provisioner.py" in done.stderr
    assert "gateway_slurm/allocations" not in done.stderr


@pytest.mark.parametrize("options", [(), (MANAGER,)], ids=["plain", "our kernel manager"])
async def test_a_servers_log_has_one_line_for_the_refusal(refused, jupyter_base, options, tmp_path):
    """Neither jupyter_client's traceback nor jupyter_server's is there, and what it says of kernels is right."""
    with running_server(tmp_path, *options) as server:
        await server.status("POST", "/api/kernels", {"name": refused})
        log = server.log
        assert await poll_async(lambda: SENTENCE in log.read_text(), timeout=READY)
    text = log.read_text()
    assert text.count(f"was not started: {SENTENCE}") == 1, text
    assert "Traceback" not in text
    leaves = bool(options)
    assert ("its kernels keep running for the next one" in text) == leaves
    assert ("shut down all kernels" in text) != leaves


def test_the_log_filter_changes_nothing_where_kernels_end_with_the_server():
    """Only a server that leaves its kernels corrects what jupyter_server says."""

    def logged(text: str, *, leaves: bool) -> str | None:
        record = logging.LogRecord("ServerApp", logging.INFO, __file__, 1, text, (), None)
        return record.getMessage() if ServerLogFilter(lambda: leaves).filter(record) else None

    stop = "Use Control-C to stop this server and shut down all kernels (twice to skip confirmation)."
    assert logged(stop, leaves=False) == stop
    assert logged(stop, leaves=True) == (
        "Use Control-C to stop this server; its kernels keep running for the next one (twice to skip confirmation)."
    )
    assert "keep running" in (logged("Shutting down 2 kernels", leaves=True) or "")
    assert logged("The websocket_ping_timeout (90000) cannot be longer than x", leaves=False) is None
