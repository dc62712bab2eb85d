"""``jupyter slurm attach``: list kernels whose server process died, and take one over.

A notebook server or console that was killed leaves its kernels running for ``SlurmService.orphan_timeout``. This
command takes over one of them and the kernels that share its job; clients can connect while the command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_runtime_dir

from gateway_slurm._util import in_one_line, printable
from gateway_slurm.cli.common import print_table
from gateway_slurm.errors import GatewaySlurmError, LinkError
from gateway_slurm.kernels.model import Phase
from gateway_slurm.kernels.restore import RestoredKernel
from gateway_slurm.service import SlurmService
from gateway_slurm.store import KernelRecord, ServerRecord

COLUMNS = ("KERNEL", "NAME", "NODE", "STARTED", "SERVER")
LINK_TIMEOUT = 15.0  # seconds for a launcher to connect; it tries at least every 3 s


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    text = "list kernels whose server died, and take one over"
    parser = subparsers.add_parser("attach", help=text, description=text)
    parser.set_defaults(run=_run)
    parser.add_argument("kernel_id", metavar="KERNEL_ID", nargs="?", help="the kernel's id, or its beginning")
    parser.add_argument("--stop", action="store_true", help="end the kernel, and its job if no other kernel runs in it")


def _run(arguments: argparse.Namespace) -> int:
    service = SlurmService.instance()
    if arguments.kernel_id is None:
        if arguments.stop:
            raise GatewaySlurmError("--stop needs a kernel's id; see: jupyter slurm attach")
        return _list(service)
    # SIGTERM ends the command as Ctrl-C does, so that no connection file is left behind. SIGINT is set as well, since a
    # shell starts its background jobs with SIGINT ignored.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.default_int_handler)
    kernel_id = _find(_abandoned(service), arguments.kernel_id)
    restored = service.submit(service.take_over([kernel_id])).result()
    chosen = next((kernel for kernel in restored if kernel.record.kernel_id == kernel_id), None)
    if chosen is None:
        raise GatewaySlurmError(f"another server has taken over kernel {kernel_id} in the meantime")
    if arguments.stop:
        return _stop(service, chosen)
    return _serve(service, restored, chosen)


# -- kernels without a server ------------------------------------------------------------------------------


def _abandoned(service: SlurmService) -> list[tuple[ServerRecord, KernelRecord]]:
    """Kernels whose server is dead: its process on this host has ended, or its lease is over."""
    with contextlib.closing(service.make_registry()) as registry:
        return [(server, kernel) for server, kernel in registry.store.all_kernels() if server.is_dead]


def _list(service: SlurmService) -> int:
    found = _abandoned(service)
    if not found:
        print("There are no kernels without a server.")
        return 0
    print_table(COLUMNS, [_row(server, kernel) for server, kernel in found])
    return 0


def _row(server: ServerRecord, kernel: KernelRecord) -> tuple[str, ...]:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(kernel.started_at)) if kernel.started_at else "?"
    last_server = server.url or f"process {server.process.pid} on {server.process.host}"
    name = _kernel_name(kernel) or "?"
    return kernel.kernel_id, *(in_one_line(text)[:80] for text in (name, kernel.node, started, last_server))


def _kernel_name(kernel: KernelRecord) -> str:
    return str(kernel.launch.get("connection", {}).get("kernel_name", ""))


def _find(found: list[tuple[ServerRecord, KernelRecord]], text: str) -> str:
    """The id of the one kernel whose id begins with ``text``. Raises GatewaySlurmError."""
    matching = sorted(kernel.kernel_id for _server, kernel in found if kernel.kernel_id.startswith(text))
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise GatewaySlurmError(f"several kernels' ids begin with {text!r}: {', '.join(matching)}")
    raise GatewaySlurmError(
        f"no kernel without a server has an id that begins with {text[:80]!r}; see: jupyter slurm attach"
    )


# -- a kernel that was taken over --------------------------------------------------------------------------


def _stop(service: SlurmService, restored: RestoredKernel) -> int:
    handle = restored.handle
    # If the launcher does not connect, release() cancels the job, which ends the kernel as well.
    with contextlib.suppress(LinkError):
        service.submit(handle.process.launcher.until_linked(LINK_TIMEOUT)).result()
    service.submit(handle.release()).result()
    service.close(leave=True)  # other kernels in the job keep running
    print(f"kernel {restored.record.kernel_id} has ended")
    return 0


def _serve(service: SlurmService, restored: list[RestoredKernel], chosen: RestoredKernel) -> int:
    process, files = chosen.handle.process, []
    try:
        # While the command waits, Slurm is asked, and a kernel whose job is over becomes DEAD.
        with contextlib.suppress(LinkError):
            service.submit(process.launcher.until_linked(LINK_TIMEOUT)).result()
        if process.phase is not Phase.DEAD:
            living = [kernel for kernel in restored if kernel.handle.process.phase is not Phase.DEAD]
            files = [_write_connection_file(kernel) for kernel in living]
            _explain(chosen, files)
        service.submit(process.wait()).result()
        print(printable(_ending(chosen)))
        service.submit(chosen.handle.release()).result()
        return 0 if files else 1
    except KeyboardInterrupt:
        print("\nThe kernel keeps running. Its launcher ends it after SlurmService.orphan_timeout without a server.")
        return 0
    finally:
        for path in files:
            path.unlink(missing_ok=True)
        service.close(leave=True)


def _ending(restored: RestoredKernel) -> str:
    process = restored.handle.process
    text = f"kernel {restored.record.kernel_id} ended: {process.reason}"
    return f"{text}; the last lines of its output:\n{process.output_tail}" if process.output_tail else text


def _explain(chosen: RestoredKernel, files: list[Path]) -> None:
    record, job = chosen.record, chosen.handle.allocation.jobid
    print(f"Kernel {record.kernel_id} on node {in_one_line(record.node)} (job {job}) is attached. To connect:")
    for path in files:
        if "curve_publickey" in path.read_text():
            # Up to jupyter_client 8.10 its consoles read the keys, and do not give them to their sockets.
            print(f'    a program: BlockingKernelClient(connection_file="{path}"); consoles do not support CurveZMQ')
        else:
            print(f"    jupyter console --existing {path.name}")
    # For exit, jupyter_console asks the kernel to shut down, also a kernel that it did not start.
    print("Leave a console with Ctrl-D, or in a Python kernel with exit(keep_kernel=True): exit alone ends the kernel.")
    print("Ctrl-C here leaves it running. To end it: jupyter slurm attach --stop", flush=True)


def _write_connection_file(restored: RestoredKernel) -> Path:
    """Write a connection file to Jupyter's runtime directory, where ``--existing`` looks, with mode 0600."""
    info: dict[str, Any] = restored.handle.process.connection_info()
    info["key"] = info["key"].decode()
    info["kernel_name"] = _kernel_name(restored.record)
    path = Path(jupyter_runtime_dir()) / f"kernel-{restored.record.kernel_id}.json"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(info, file)
    return path
