"""Put many kernels on record that never ran: take over a dead gateway's records, copy its one kernel, and exit.

``python -m bench.clones COUNT`` prints the input of ``bench.launchers``. All copies have the addresses of the one
kernel, which is direct. Each copy has its own launcher and job.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from dataclasses import replace
from typing import Any

from gateway_slurm.allocations.identity import new_launcher_id
from gateway_slurm.store import KernelRecord, LauncherRecord, Registry, Rows

FIRST_JOB = 900_000  # higher than the ids of real jobs


def main() -> None:
    """Copy the kernel, and exit as a killed server does."""
    registry = Registry.default(deployment="gateway")
    registry.open()
    claimed = registry.claim()
    addresses = claimed.servers[0].addresses
    registry.announce(addresses=addresses)
    facts = [_copy(registry, claimed, FIRST_JOB + number, addresses) for number in range(int(sys.argv[1]))]
    registry.flush()
    print(json.dumps(facts), flush=True)
    os._exit(0)


def _copy(registry: Registry, rows: Rows, jobid: int, addresses: tuple[str, ...]) -> dict[str, Any]:
    key, kernel_id = new_launcher_id(registry.store_id), str(uuid.uuid4())
    allocation = replace(rows.allocations[0], launcher_id=key, identity=key, jobid=str(jobid), kernel_ids=[kernel_id])
    launcher: LauncherRecord = replace(
        rows.launchers[0],
        launcher_id=key,
        record_key=key,
        jobid=str(jobid),
        tokens=(os.urandom(32), os.urandom(32)),
        slots={kernel_id: 0},
    )
    kernel: KernelRecord = replace(rows.kernels[0], kernel_id=kernel_id, launcher_id=key, record_key=key)
    registry.put(allocation)
    registry.put(launcher)
    registry.put(kernel)
    report = {name: getattr(kernel, name) for name in ("kernel_id", "generation", "pid", "mode", "ip", "ports")}
    return {
        "launcher_id": key,
        "jobid": launcher.jobid,
        "token": launcher.tokens[1].hex(),
        "addresses": list(addresses),
        "report": {**report, "state": "running"},
    }


if __name__ == "__main__":
    main()
