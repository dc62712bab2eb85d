"""Programs that people start kernels with, each as it is installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import nbformat.v4 as nbf
import papermill
import pexpect
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from helpers import HELPERS
from helpers.kernel_clients import JOB, READY, install_kernelspec

BIN = Path(sys.executable).parent


def run(program, *arguments, **options):
    """Run a program of this environment to its end."""
    argv = [str(BIN / program), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, **options)


def notebook(*cells):
    """A notebook of these code cells."""
    return nbf.new_notebook(cells=[nbf.new_code_cell(cell) for cell in cells])


def printed(executed):
    """What each code cell printed."""
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs).strip() for cell in cells]


@pytest.fixture
def written(tmp_path):
    """A notebook in a file: a value that the second cell needs, and the job's id."""
    path = tmp_path / "notebook.ipynb"
    cells = notebook("value = 6", "print(value * 7)", JOB)
    cells.metadata["kernelspec"] = {"name": "slurm", "language": "python", "display_name": "Slurm"}
    cells.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(cells, path)
    return path


def test_nbclient_runs_a_notebook(service, kernel_name):
    """NotebookClient executes every cell in one kernel."""
    client = NotebookClient(notebook("value = 6", "print(value * 7)", JOB), kernel_name=kernel_name)
    texts = printed(client.execute())
    assert texts[1] == "42"
    assert texts[2].isdigit()


def test_nbclient_reports_a_cells_error(service):
    """A cell that raises ends the notebook with its traceback, and the job goes."""
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        NotebookClient(notebook("1 / 0"), kernel_name="slurm").execute()


def test_nbclient_sees_that_the_kernel_died(service):
    """A cell that kills its kernel ends the notebook at once, not at a timeout."""
    with pytest.raises(RuntimeError, match="died"):
        NotebookClient(notebook("import os; os.kill(os.getpid(), 9)"), kernel_name="slurm").execute()


def test_jupyter_execute_runs_a_notebook(cluster, kernelspecs, written, kernel_name):
    """``jupyter execute`` ends with 0 and writes the outputs."""
    done = run("jupyter-execute", f"--kernel_name={kernel_name}", "--inplace", written)
    assert done.returncode == 0, done.stderr
    assert printed(nbformat.read(written, 4))[1] == "42"


def test_papermill_runs_a_notebook_with_parameters(cluster, kernelspecs, tmp_path, written):
    """``papermill -p`` injects parameters and writes the outputs."""
    target = tmp_path / "out.ipynb"
    done = run("papermill", "-k", "slurm", "-p", "value", "5", "--no-progress-bar", written, target)
    assert done.returncode == 0, done.stderr
    assert "35" in printed(nbformat.read(target, 4))


def test_papermill_runs_from_python_too(service, tmp_path, written):
    """``papermill.execute_notebook`` works inside a process that has the service already."""
    target = tmp_path / "out.ipynb"
    executed = papermill.execute_notebook(str(written), str(target), kernel_name="slurm", progress_bar=False)
    assert "42" in printed(executed)


def test_jupyter_run_runs_a_script(cluster, kernelspecs, tmp_path):
    """``jupyter run`` prints what the script prints on the node."""
    script = tmp_path / "script.py"
    script.write_text("import os\nprint('job', os.environ['SLURM_JOB_ID'], 6 * 7)\n")
    done = run("jupyter-run", "--kernel=slurm", script)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("job ")
    assert done.stdout.split()[-1] == "42"


def test_jupyter_kernel_serves_a_connection_file(cluster, kernelspecs, jupyter_base):
    """``jupyter kernel`` starts one, another client connects by its file; SIGTERM ends kernel and job."""
    argv = [str(BIN / "jupyter-kernel"), "--kernel=slurm"]
    process = pexpect.spawn(argv[0], argv[1:], encoding="utf-8", timeout=READY)
    process.expect(r"--existing (kernel-\S+\.json)")
    path = jupyter_base / "runtime" / process.match.group(1)
    assert json.loads(path.read_text())["transport"] == "ipc"
    script = (
        "import sys; from jupyter_client import BlockingKernelClient as C; from helpers.kernel_clients import execute\n"
    )
    script += "c = C(); c.load_connection_file(sys.argv[1]); c.start_channels(); c.wait_for_ready(timeout=60)\n"
    script += "print(execute(c, 'print(6 * 7)'))"
    argv = ["-c", script, path]
    answer = run("python", *argv, env={**os.environ, "PYTHONPATH": str(HELPERS.parent)})
    assert answer.stdout.strip() == "42", answer.stderr
    process.kill(15)
    process.expect(pexpect.EOF)
    process.close()


@pytest.fixture
def console(admin_settings):
    """``jupyter console`` in a terminal; its launcher waits 1 s for a server that is gone."""
    admin_settings(orphan_timeout=1.0, heartbeat=0.5)
    environment = {**os.environ, "TERM": "dumb", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(
        str(BIN / "jupyter-console"),
        ["--simple-prompt", "--kernel=slurm", "--ZMQTerminalInteractiveShell.kernel_timeout=60"],
        env=environment,
        encoding="utf-8",
        timeout=READY,
    )
    child.expect(r"In \[\d*\]: ")
    yield child
    child.close(force=True)


def test_jupyter_console_computes_asks_and_is_interrupted(console):
    """At the prompt: a result, an error, input(), Ctrl-C of a running cell, and ``exit``."""
    console.sendline("6 * 7")
    console.expect(r"Out\[\d+\]: 42")
    console.sendline("1 / 0")
    console.expect("ZeroDivisionError")
    console.sendline("word = input('word? ')")
    console.expect(r"word\? ")
    console.sendline("ada")
    console.expect(r"In \[\d+\]: ")
    console.sendline("print('he' + 'llo', word)")
    console.expect("hello ada")
    console.sendline("import time; print('be' + 'gun'); time.sleep(300)")
    console.expect("begun")
    console.sendintr()
    console.expect("KeyboardInterrupt")
    console.sendline("print('still ' + word)")
    console.expect("still ada")
    console.sendline("exit")
    console.expect(pexpect.EOF)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_jupyter_console_that_is_killed_leaves_no_job(console, signum):
    """When the console is killed, or its terminal closed, its job goes after ``orphan_timeout``."""
    console.sendline("6 * 7")
    console.expect("42")
    console.kill(signum)
    console.expect(pexpect.EOF)


def test_a_failed_start_is_told_in_the_terminal(cluster, kernelspecs):
    """``jupyter run`` shows Slurm's own words, and ends."""
    install_kernelspec(kernelspecs, "nowhere", config_overrides={"partition": "nowhere"})
    done = run("jupyter-run", "--kernel=nowhere", input="print(1)")
    assert done.returncode != 0
    assert "nvalid partition name" in done.stderr
