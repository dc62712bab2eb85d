"""``jupyter slurm allocations``: the user's own jobs that kernels run in, and what to do with them."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from gateway_slurm._util import in_one_line, printable
from gateway_slurm.allocations.identity import identity_of
from gateway_slurm.allocations.recovery import living_jobs
from gateway_slurm.cli.common import OwnSlurm
from gateway_slurm.config import load_admin_config
from gateway_slurm.errors import SlurmError, UnknownJob
from gateway_slurm.service import SlurmService
from gateway_slurm.slurm.formats import Meaning, expand_hostlist
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.store import AllocationRecord, Registry, ServerRecord, by_job

COLUMNS = ("JOBID", "STATE", "NODES", "TIME LEFT", "KERNELS", "KEPT", "WAITS FOR")
LINE_END = "\n" + 11 * " "


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("allocations", help="list, keep, release and cancel your allocations")
    parser.set_defaults(run=_list, json=False)
    parser.add_argument("--json", action="store_true", help="for programs")
    actions = parser.add_subparsers(metavar="ACTION")
    for name, run, text in (
        ("list", _list, "all of them (the default)"),
        ("show", _show, "one, with its kernels and what was asked for"),
        ("keep", _keep, "let it stay after its last kernel"),
        ("release", _release, "take that back, and end it if no kernel of a living server is in it"),
        ("cancel", _cancel, "end it now, with its kernels"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(run=run)
        if name in ("list", "show"):
            action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="for programs")
        if name != "list":
            action.add_argument("jobid", metavar="JOBID", help="as listed")


def _slurm() -> OwnSlurm:
    return OwnSlurm(load_admin_config(SlurmService).access)


@contextlib.contextmanager
def _registry() -> Iterator[Registry]:
    """The user's, where the admin has it."""
    settings = load_admin_config(SlurmService)
    with contextlib.closing(Registry.default(url=settings.store_url, key_file=settings.store_key_file)) as registry:
        yield registry


def _known(registry: Registry) -> tuple[dict[str, dict[str, Any]], str]:
    """What the records and Slurm say, by job id; and why Slurm said nothing, where it did not."""
    records = by_job(registry.all_records())
    try:
        with _slurm() as slurm:
            jobs = slurm.run(living_jobs(slurm.driver, records))
    except SlurmError as error:
        rows = {jobid: _row(jobid) | _from_record(*found) for jobid, found in records.items()}
        return _marked(rows, registry), str(error)
    # What Slurm no longer knows is over, whatever the records say; one of another job with that id says nothing.
    rows = {}
    for jobid, info in jobs.items():
        identity = identity_of(info)
        found = records.get(jobid)
        of_this_job = found is not None and found[1].identity == identity
        rows[jobid] = _row(jobid) | (_from_record(*found) if found and of_this_job else {}) | _slurms_word(info)
        rows[jobid]["identity"] = identity
    return _marked(rows, registry), ""


def _row(jobid: str) -> dict[str, Any]:
    return {
        "jobid": jobid,
        "identity": "",
        "state": "",
        "nodes": [],
        "end_time": None,
        "kernel_ids": [],
        "kept": False,
        "reason": "",
        "server": "",
        "config": {},
    }


def _from_record(server: ServerRecord, record: AllocationRecord) -> dict[str, Any]:
    return {
        "identity": record.identity,
        "kernel_ids": record.kernel_ids,
        "state": record.state,
        "nodes": record.nodelist,
        "end_time": record.end_time,
        "config": record.config,
        "server": f"{server.process.host}, process {server.process.pid}" + (" (gone)" if server.is_gone else ""),
    }


def _slurms_word(info: JobInfo) -> dict[str, Any]:
    waits = info.meaning in (Meaning.WAITING, Meaning.HELD)
    return {
        "state": info.state,
        "nodes": expand_hostlist(info.nodes),
        "reason": info.reason if waits else "",
        "end_time": None if waits else info.end_time,
    }


def _marked(rows: dict[str, dict[str, Any]], registry: Registry) -> dict[str, dict[str, Any]]:
    marks = registry.marks.all()
    for jobid, row in rows.items():
        row["kept"] = (jobid, row["identity"]) in marks
    return rows


# -- actions ----------------------------------------------------------------------------------


def _list(arguments: argparse.Namespace) -> int:
    with _registry() as registry:
        rows, trouble = _known(registry)
    if trouble:
        print(f"Slurm does not answer, this is from the records: {printable(trouble)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(sorted(rows.values(), key=_by_number), indent=1))
    elif not rows:
        print("You have no allocations.")
    else:
        _print_table([_cells(row) for row in sorted(rows.values(), key=_by_number)])
    return 0


def _by_number(row: dict[str, Any]) -> int:
    return int(row["jobid"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    left = "" if row["end_time"] is None else _duration(row["end_time"] - time.time())
    kept = "yes" if row["kept"] else ""
    cells = row["jobid"], row["state"], ",".join(row["nodes"]), left, str(len(row["kernel_ids"])), kept, row["reason"]
    return tuple(map(in_one_line, cells))


def _duration(seconds: float) -> str:
    minutes = max(0, int(seconds // 60))
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in range(len(COLUMNS))]
    for row in [COLUMNS, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _one(jobid: str) -> dict[str, Any]:
    """One of the allocations; raises UnknownJob for a job that is over, not the user's, or not a kernel's."""
    with _registry() as registry:
        rows, trouble = _known(registry)
    if jobid not in rows:
        why = f"; Slurm does not answer: {trouble}" if trouble else ""
        raise UnknownJob(
            f"{jobid[:80]!r} is no allocation of yours that kernels run in; see: jupyter slurm allocations{why}"
        )
    return rows[jobid]


def _show(arguments: argparse.Namespace) -> int:
    row = _one(arguments.jobid)
    if arguments.json:
        print(json.dumps(row, indent=1))
        return 0
    for name, value in (
        ("job", row["jobid"]),
        ("state", row["state"] + (f" ({row['reason']})" if row["reason"] else "")),
        ("nodes", ", ".join(row["nodes"]) or "none yet"),
        ("ends", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["end_time"])) if row["end_time"] else "unknown"),
        ("kept", "yes" if row["kept"] else "no"),
        ("server", row["server"] or "none that is known"),
        ("kernels", "\n".join(row["kernel_ids"]) or "none"),
        ("asked for", json.dumps(row["config"])),
        ("logs", f"{load_admin_config(SlurmService).log_directory} on the nodes"),
    ):
        print(f"{name + ':':<11}{printable(value, LINE_END)}")
    return 0


def _keep(arguments: argparse.Namespace) -> int:
    row = _one(arguments.jobid)
    _set_kept(row, True)
    print(f"job {arguments.jobid} stays after its last kernel, until its time limit or until it is released")
    return 0


def _set_kept(row: dict[str, Any], kept: bool) -> None:
    with _registry() as registry:
        change = registry.marks.set if kept else registry.marks.remove
        change(row["jobid"], row["identity"])


def _release(arguments: argparse.Namespace) -> int:
    row = _one(arguments.jobid)
    _set_kept(row, False)
    if row["kernel_ids"]:
        print(f"job {row['jobid']} ends with the last of its kernels ({len(row['kernel_ids'])})")
        return 0
    return _cancel(arguments)


def _cancel(arguments: argparse.Namespace) -> int:
    row = _one(arguments.jobid)
    with _slurm() as slurm:
        slurm.run(slurm.driver.cancel(row["jobid"]))
    _set_kept(row, False)
    print(f"job {row['jobid']} is cancelled")
    return 0
