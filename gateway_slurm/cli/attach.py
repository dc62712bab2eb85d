"""``jupyter slurm attach``: kernels whose server process died, and how to have one of them again.

A notebook server or console that was killed leaves its kernels running for ``SlurmService.orphan_timeout``. This
command takes one over, with what shares its job, and lets clients connect for as long as it runs.
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
from gateway_slurm.errors import GatewaySlurmError, LinkError
from gateway_slurm.kernels.model import Phase
from gateway_slurm.kernels.restore import Restored
from gateway_slurm.service import SlurmService
from gateway_slurm.store import KernelRecord, ServerRecord

COLUMNS = ("KERNEL", "NAME", "NODE", "STARTED", "SERVER")
# How long the launcher of a kernel may take to dial in; it tries at least every three seconds.
LINK_SECONDS = 15.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    text = "list kernels whose server died, and take one over for a console"
    parser = subparsers.add_parser("attach", help=text, description=text)
    parser.set_defaults(run=_run)
    parser.add_argument("kernel_id", metavar="KERNEL_ID", nargs="?", help="the kernel, or how its id begins")
    parser.add_argument("--stop", action="store_true", help="end the kernel; the last one in a job ends the job")


def _run(arguments: argparse.Namespace) -> int:
    service = SlurmService.instance()
    if arguments.kernel_id is None:
        if arguments.stop:
            raise GatewaySlurmError("--stop needs the kernel's id; jupyter slurm attach, without one, lists them")
        return _list(service)
    # As Ctrl-C: no connection file is left behind.
    for signum in (signal.SIGTERM, signal.SIGINT):  # a shell's background jobs begin with SIGINT ignored
        signal.signal(signum, signal.default_int_handler)
    kernel_id = _named(_abandoned(service), arguments.kernel_id)
    restored = service.submit(service.take_over([kernel_id])).result()
    mine = next((one for one in restored if one.record.kernel_id == kernel_id), None)
    if mine is None:
        raise GatewaySlurmError(f"kernel {kernel_id} was taken over by another server meanwhile")
    if arguments.stop:
        return _stop(service, mine)
    return _serve(service, restored, mine)


# -- which there are ------------------------------------------------------------------------------


def _abandoned(service: SlurmService) -> list[tuple[ServerRecord, KernelRecord]]:
    """Kernels whose server is dead, by this host's word or since its lease is over."""
    registry = service.make_registry()
    try:
        return [(server, kernel) for server, kernel in registry.all_kernels() if server.is_dead]
    finally:
        registry.close()


def _list(service: SlurmService) -> int:
    found = _abandoned(service)
    if not found:
        print("no kernels without a server")
        return 0
    rows = [COLUMNS, *(_row(server, kernel) for server, kernel in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(server: ServerRecord, kernel: KernelRecord) -> tuple[str, ...]:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(kernel.started_at)) if kernel.started_at else "?"
    where = server.url or f"process {server.process.pid} on {server.process.host}"
    name = _kernel_name(kernel) or "?"
    return kernel.kernel_id, *(in_one_line(text)[:80] for text in (name, kernel.node, started, where))


def _kernel_name(kernel: KernelRecord) -> str:
    return str(kernel.launch.get("connection", {}).get("kernel_name", ""))


def _named(found: list[tuple[ServerRecord, KernelRecord]], text: str) -> str:
    matching = sorted(kernel.kernel_id for _server, kernel in found if kernel.kernel_id.startswith(text))
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise GatewaySlurmError(f"several kernels' ids begin with {text!r}: {', '.join(matching)}")
    raise GatewaySlurmError(
        f"{text[:80]!r} is no kernel without a server; jupyter slurm attach, without an id, lists those that there are"
    )


# -- what is done with one --------------------------------------------------------------------------


def _stop(service: SlurmService, restored: Restored) -> int:
    held = restored.held
    # Without its launcher the job is cancelled, which ends the kernel, too.
    with contextlib.suppress(LinkError):
        service.submit(held.process.launcher.until_linked(LINK_SECONDS)).result()
    service.submit(held.release()).result()
    service.close(leave=True)  # what shares the job stays
    print(f"kernel {restored.record.kernel_id} is stopped")
    return 0


def _serve(service: SlurmService, restored: list[Restored], mine: Restored) -> int:
    process, files = mine.held.process, []
    try:
        # Dead by then, if its job is: Slurm was asked meanwhile.
        with contextlib.suppress(LinkError):
            service.submit(process.launcher.until_linked(LINK_SECONDS)).result()
        if process.phase is not Phase.DEAD:
            files = [_write_connection_file(one) for one in restored if one.held.process.phase is not Phase.DEAD]
            _explain(mine, files)
        service.submit(process.wait()).result()
        print(printable(_ending(mine)))
        service.submit(mine.held.release()).result()
        return 0 if files else 1
    except KeyboardInterrupt:
        print("\nthe kernel runs on; it is ended after SlurmService.orphan_timeout without a server")
        return 0
    finally:
        for path in files:
            path.unlink(missing_ok=True)
        service.close(leave=True)


def _ending(restored: Restored) -> str:
    process = restored.held.process
    text = f"kernel {restored.record.kernel_id} ended: {process.reason}"
    return f"{text}; the last lines of its output:\n{process.output_tail}" if process.output_tail else text


def _explain(mine: Restored, files: list[Path]) -> None:
    record, job = mine.record, mine.held.allocation.jobid
    print(f"kernel {record.kernel_id} on node {in_one_line(record.node)} (job {job}) is this process's now.")
    for path in files:
        print(f"    jupyter console --existing {path.name}")
    print("Ctrl-C leaves it running; jupyter slurm attach --stop ends it.", flush=True)


def _write_connection_file(restored: Restored) -> Path:
    """In Jupyter's runtime directory, where ``--existing`` looks; readable by the user alone."""
    info: dict[str, Any] = restored.held.process.connection_info()
    info["key"] = info["key"].decode()
    info["kernel_name"] = _kernel_name(restored.record)
    path = Path(jupyter_runtime_dir()) / f"kernel-{restored.record.kernel_id}.json"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(info, file)
    return path
