"""Servers as processes of their own, with a kernel each, and the user's command line beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway_slurm.store import Registry, ServerAllocation
from helpers.kernel_clients import READY
from helpers.private_slurm import poll

PROGRAM = """
    import sys
    from jupyter_client import KernelManager
    manager = KernelManager(kernel_name=sys.argv[1])
    manager.start_kernel()
    print(manager.provisioner.jobid, manager.provisioner._handle.process.pid, flush=True)
    while sys.stdin.readline() == "stop\\n":
        manager.shutdown_kernel()
        print("stopped", flush=True)
"""


@dataclass
class ServerProcess:
    """A process with a service and one kernel."""

    process: subprocess.Popen[str]
    jobid: str
    kernel: int  # its process id

    def stop_kernel(self) -> None:
        """Shut the kernel down; the server stays."""
        self.process.stdin.write("stop\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "stopped\n"

    def end(self, how: str) -> None:
        """End, "in good order" or by a signal, with the kernel as it is."""
        if how != "in good order":
            self.process.send_signal(getattr(signal, how))
        self.process.communicate(timeout=READY)


@contextmanager
def server(name: str = "slurm") -> Iterator[ServerProcess]:
    """A server with a kernel of this kernelspec; killed at the end, if it is still there."""
    argv = [sys.executable, "-c", textwrap.dedent(PROGRAM), name]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        jobid, kernel = process.stdout.readline().split()
        yield ServerProcess(process, jobid, int(kernel))
    finally:
        process.kill()
        process.communicate()


def allocations(*arguments: str) -> str:
    """``jupyter slurm allocations …`` as its user runs it; what it printed."""
    argv = [sys.executable, "-m", "gateway_slurm.cli.app", "allocations", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=READY, check=True).stdout


def on_record() -> list[ServerAllocation]:
    """What all servers of the user have on record."""
    with closing(Registry.default()) as registry:
        return registry.all_allocations()


def noticed(jobid: str, *, keep: bool) -> bool:
    """Whether the job's server soon records whether to keep the job."""

    def there() -> bool:
        return [one.keep for _server, one in on_record() if one.jobid == jobid] == [keep]

    return poll(there, timeout=READY)


def launcher_said(jobid: str, words: str) -> bool:
    """Whether the job's launcher soon says this in its log."""
    log = Path(os.environ["HOME"], ".local/state/gateway_slurm", f"launcher-{jobid}.log")
    return poll(lambda: words in log.read_text(), timeout=READY)


def marks() -> set[str]:
    """The ids of jobs that are marked."""
    return {jobid for jobid, _identity in Registry.default().keep_flags.all()}
