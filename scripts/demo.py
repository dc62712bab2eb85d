"""Demonstrate kernels on a private Slurm: start, shared job, restart, end, gateway. ``make demo`` runs it.

The machine needs Slurm's programs only. All files are in one temporary directory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat.v4 as nbf
from demo_gateway import run_through_gateway
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import wait_until

# All nodes are on one machine, so this variable identifies a node, and not the host name.
NODE = "import os; print(os.environ['SLURMD_NODENAME'], 'in job', os.environ['SLURM_JOB_ID'])"
START_TIMEOUT = 60  # seconds
CELL_TIMEOUT = 60  # seconds


def say(text: str) -> None:
    """Announce the next step."""
    print(f"==> {text}", flush=True)


def expect(condition: bool, complaint: str) -> None:
    """End with an error if the condition does not hold."""
    if not condition:
        raise SystemExit(f"demo: {complaint}")


def install_kernelspec(jupyter_path: Path, name: str, display_name: str, **config: object) -> None:
    """Write a kernelspec as users have it in their home directories; ``config`` holds request fields."""
    defaults: dict[str, object] = {
        "partition": "batch",
        "project": "demo",
        "nodes": "1",
        "runtime": "10",
        "gpus": "0",
        "reservation": "None",
        "jobid": "None",
        "node": "None",
        "kernel_argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
    }
    provisioner = {"provisioner_name": "slurm-provisioner", "config": {**defaults, **config}}
    spec = {
        "display_name": display_name,
        "language": "python",
        "metadata": {"debugger": True, "kernel_provisioner": provisioner},
    }
    directory = jupyter_path / "kernels" / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "kernel.json").write_text(json.dumps(spec, indent=2))


def notebook() -> Any:
    """A small notebook that prints the node and the job, and computes a value."""
    return nbf.new_notebook(
        cells=[
            nbf.new_markdown_cell("# On a compute node"),
            nbf.new_code_cell(NODE),
            nbf.new_code_cell("import math\nvalue = math.factorial(20)\nvalue"),
        ]
    )


def run_notebook(kernel_name: str) -> None:
    """Run the notebook with nbclient, in its own kernel and allocation."""
    executed = NotebookClient(
        notebook(), kernel_name=kernel_name, timeout=CELL_TIMEOUT, startup_timeout=START_TIMEOUT
    ).execute()
    printed = [output for cell in executed.cells for output in cell.get("outputs", [])]
    for output in printed:
        text = output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
        print(f"    {text.rstrip()}")
    expect(any("2432902008176640000" in str(output) for output in printed), "the notebook computed nothing")


@contextmanager
def running_kernel(kernel_name: str) -> Iterator[tuple[Any, Any]]:
    """A kernel manager and a ready client; the kernel is shut down at the end."""
    manager = KernelManager(kernel_name=kernel_name)
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=START_TIMEOUT)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def execute(client: Any, code: str) -> str:
    """Run code and return its output."""
    printed: list[str] = []

    def collect(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    reply = client.execute_interactive(code, timeout=CELL_TIMEOUT, output_hook=collect)
    expect(reply["content"]["status"] == "ok", f"{code!r} failed: {reply['content']}")
    return "".join(printed).strip()


def queue() -> list[str]:
    """The ids of the jobs in the queue."""
    argv = ["squeue", "--noheader", "--format=%i"]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()


def show_queue() -> None:
    """Print the output of squeue."""
    table = subprocess.run(["squeue"], check=True, capture_output=True, text=True).stdout.rstrip()
    print("\n".join(f"    {line}" for line in table.splitlines()))


def await_empty_queue() -> None:
    """Wait until no job is left."""
    expect(wait_until(lambda: queue() == [], 15), f"jobs are left in the queue: {queue()}")
    show_queue()


def share_a_job(jupyter_path: Path) -> None:
    """Run two kernels in one job, the second by the job's id, and restart the first one in the job."""
    say("Starting a kernel; it gets a job")
    with running_kernel("slurm-demo") as (first_manager, first):
        where = execute(first, NODE)
        print(f"    first kernel:  {where}")
        jobid = where.split()[-1]
        say(f"Starting a second kernel in the same job: its kernelspec says jobid {jobid}")
        install_kernelspec(jupyter_path, "slurm-demo-join", "Slurm, joined", jobid=jobid)
        with running_kernel("slurm-demo-join") as (_second_manager, second):
            print(f"    second kernel: {execute(second, NODE)}")
            show_queue()
            expect(queue() == [jobid], f"the queue must hold one job, not {queue()}")
            restart(first_manager, first, jobid)
            expect(execute(second, NODE).endswith(jobid), "the second kernel did not survive the restart")
            say("Stopping both kernels")
    await_empty_queue()


def restart(manager: Any, client: Any, jobid: str) -> None:
    """Restart the kernel: its variables are gone, and the job is the same."""
    execute(client, "remembered = True")
    say("Restarting the first kernel: the job stays")
    manager.restart_kernel()
    client.wait_for_ready(timeout=START_TIMEOUT)
    print(f"    first kernel:  {execute(client, NODE)}")
    expect(execute(client, "print('remembered' in globals())") == "False", "the kernel was not restarted")
    expect(queue() == [jobid], f"the restart changed the queue to {queue()}")


def use_the_gateway(directory: Path) -> None:
    """Run the notebook again, through a Jupyter server that takes its kernels from the shared gateway."""
    directory.mkdir()
    say("Starting the shared gateway, and a Jupyter server with --gateway-url; running the notebook there")
    cells = [cell.source for cell in notebook().cells if cell.cell_type == "code"]
    outputs = run_through_gateway(directory, "slurm-demo", cells)
    print("\n".join(f"    {text}" for text in outputs))
    expect("2432902008176640000" in outputs[-1], "the notebook computed nothing through the gateway")
    await_empty_queue()


def demonstrate(directory: Path) -> None:
    """Run all parts, with all files in ``directory``."""
    home = directory / "home"
    home.mkdir()
    # The demonstration has its own HOME, so that it does not use or change the user's files.
    os.environ["HOME"] = str(home)
    os.environ["JUPYTER_PATH"] = str(directory / "jupyter")
    os.environ["JUPYTER_RUNTIME_DIR"] = str(directory / "runtime")
    os.environ["JUPYTER_CONFIG_DIR"] = str(directory / "config")
    install_kernelspec(directory / "jupyter", "slurm-demo", "Slurm")
    say("Bringing up a private Slurm: four nodes, on this machine")
    with PrivateCluster(directory / "slurm") as cluster:
        os.environ.update(cluster.environment())
        say("Running a notebook with nbclient, in a kernel on a node")
        run_notebook("slurm-demo")
        await_empty_queue()
        share_a_job(directory / "jupyter")
        use_the_gateway(directory / "gateway")
        say("Taking the private Slurm down")
    say("Done")


def main() -> int:
    """Run the demonstration in a temporary directory; return 0 if it succeeded."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_"))]:
        del os.environ[name]  # the demonstration must not depend on the user's Slurm
    try:
        with tempfile.TemporaryDirectory(prefix="gsd-", dir="/tmp") as directory:
            demonstrate(Path(directory))
    except GatewaySlurmError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
