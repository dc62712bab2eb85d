"""``jupyter slurm allocations``: list, keep, release and cancel the user's jobs that kernels run in."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from gateway_slurm._util import in_one_line, printable
from gateway_slurm.allocations.identity import identity_of, is_launcher_id
from gateway_slurm.allocations.recovery import living_jobs
from gateway_slurm.allocations.use import Use, use_without_server
from gateway_slurm.cli.common import BlockingSlurm, print_table
from gateway_slurm.config import load_admin_config
from gateway_slurm.errors import GatewaySlurmError, SlurmError, StepsUnknown, UnknownJob
from gateway_slurm.service import SlurmService
from gateway_slurm.slurm.formats import expand_hostlist
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.store import AllocationRecord, Registry, ServerAllocation, ServerRecord, by_job

COLUMNS = ("JOBID", "STATE", "NODES", "TIME LEFT", "KERNELS", "KEPT", "WAITS FOR")
ORPHAN_SLACK = 5.0  # seconds that a launcher may take to end its kernels
LINE_END = "\n" + 11 * " "  # of a value that has several lines


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("allocations", help="list, keep, release and cancel your allocations")
    parser.set_defaults(run=_list, json=False)
    json_help = "print JSON, for programs"
    parser.add_argument("--json", action="store_true", help=json_help)
    actions = parser.add_subparsers(metavar="ACTION")
    for name, run, text in (
        ("list", _list, "list all allocations (the default)"),
        ("show", _show, "show one allocation with its kernels and request fields"),
        ("keep", _keep, "keep an allocation after its last kernel has ended"),
        ("release", _release, "undo keep; cancel the job if it has no kernels"),
        ("cancel", _cancel, "cancel the job now, with its kernels"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(run=run)
        if name == "release":
            yes_help = "end the job also if kernels without a server may run in it, without asking"
            action.add_argument("--yes", "-y", action="store_true", help=yes_help)
        if name in ("list", "show"):
            action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=json_help)
        if name != "list":
            action.add_argument("jobid", metavar="JOBID", help="job id in the list")


def _slurm() -> BlockingSlurm:
    return BlockingSlurm(load_admin_config(SlurmService).access)


@contextlib.contextmanager
def _registry() -> Iterator[Registry]:
    """The user's registry in the store that the settings name."""
    settings = load_admin_config(SlurmService)
    with contextlib.closing(Registry.default(url=settings.store_url, key_file=settings.store_key_file)) as registry:
        yield registry


def _known(registry: Registry) -> tuple[dict[str, dict[str, Any]], str]:
    """The allocations by job id, from the store and from Slurm; and the reason, if Slurm did not answer."""
    allocations = registry.all_allocations()
    records, orphans = by_job(allocations), _orphans(allocations)
    try:
        with _slurm() as slurm:
            jobs = slurm.run(living_jobs(slurm.driver, records))
    except SlurmError as error:
        rows = {jobid: _row(jobid) | _from_record(*record) for jobid, record in records.items()}
        return _marked(rows, registry, orphans), str(error)
    # A job that Slurm does not know is over, even if it is on record. A record of another job with that id is ignored.
    rows = {}
    for jobid, info in jobs.items():
        identity = identity_of(info)
        record = records.get(jobid)
        stored = _from_record(*record) if record and record[1].identity == identity else {}
        rows[jobid] = _row(jobid) | stored | _from_slurm(info) | {"identity": identity}
    return _marked(rows, registry, orphans), ""


def _orphans(allocations: list[ServerAllocation]) -> dict[tuple[str, str], list[str]]:
    """The kernels whose server is gone and that may run on, by the job's id and identity.

    A launcher ends them ``orphan_timeout`` after its server's end, which the server's lease bounds.
    """
    timeout = load_admin_config(SlurmService).orphan_timeout + ORPHAN_SLACK
    return {
        (record.jobid or "", record.identity): record.kernel_ids
        for server, record in allocations
        if server.is_gone and record.kernel_ids and time.time() < server.lease_until + timeout
    }


def _row(jobid: str) -> dict[str, Any]:
    return {
        "jobid": jobid,
        "identity": "",
        "state": "",
        "nodes": [],
        "end_time": None,
        "kernel_ids": [],
        "orphans": [],
        "kept": False,
        "reason": "",
        "advice": "",
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


def _from_slurm(info: JobInfo) -> dict[str, Any]:
    return {
        "state": info.state,
        "nodes": expand_hostlist(info.nodes),
        "reason": info.reason if info.is_waiting else "",
        "advice": info.pending.advice if info.is_waiting else "",
        "end_time": None if info.is_waiting else info.end_time,
    }


def _marked(
    rows: dict[str, dict[str, Any]], registry: Registry, orphans: dict[tuple[str, str], list[str]]
) -> dict[str, dict[str, Any]]:
    marks = registry.keep_flags.all()
    for jobid, row in rows.items():
        row["kept"] = (jobid, row["identity"]) in marks
        row["orphans"] = sorted(set(orphans.get((jobid, row["identity"]), ())) - set(row["kernel_ids"]))
    return rows


# -- actions ----------------------------------------------------------------------------------


def _list(arguments: argparse.Namespace) -> int:
    with _registry() as registry:
        known, trouble = _known(registry)
    rows = sorted(known.values(), key=lambda row: int(row["jobid"]))
    if trouble:
        print(f"Slurm does not answer, so this list is from the store: {printable(trouble)}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print("You have no allocations.")
    else:
        print_table(COLUMNS, [_cells(row) for row in rows])
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    left = "" if row["end_time"] is None else _duration(row["end_time"] - time.time())
    kept = "yes" if row["kept"] else ""
    kernels = str(len(row["kernel_ids"])) if row["kernel_ids"] or not row["orphans"] else ""
    without = f"{len(row['orphans'])} without a server" if row["orphans"] else ""
    kernels = ", ".join(filter(None, (kernels, without)))
    cells = row["jobid"], row["state"], ",".join(row["nodes"]), left, kernels, kept, row["reason"]
    return tuple(map(in_one_line, cells))


def _duration(seconds: float) -> str:
    minutes = max(0, int(seconds // 60))
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"


def _find(jobid: str) -> dict[str, Any]:
    """The allocation with this job id. Raises UnknownJob for a job that is over, another user's, or without kernels."""
    with _registry() as registry:
        rows, trouble = _known(registry)
    if jobid not in rows:
        why = f"; Slurm does not answer: {trouble}" if trouble else ""
        raise UnknownJob(
            f"you have no allocation {jobid[:80]!r} that kernels run in; see: jupyter slurm allocations{why}"
        )
    return rows[jobid]


def _show(arguments: argparse.Namespace) -> int:
    row = _find(arguments.jobid)
    if arguments.json:
        print(json.dumps(row, indent=1))
        return 0
    for name, value in (
        ("job", row["jobid"]),
        ("state", row["state"] + (f" ({row['reason']})" if row["reason"] else "")),
        *((("to do", row["advice"]),) if row["advice"] else ()),
        ("nodes", ", ".join(row["nodes"]) or "none yet"),
        ("ends", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["end_time"])) if row["end_time"] else "unknown"),
        ("kept", "yes" if row["kept"] else "no"),
        ("server", row["server"] or "unknown"),
        ("kernels", "\n".join([*row["kernel_ids"], *(f"{name} (no server)" for name in row["orphans"])]) or "none"),
        ("request", json.dumps(row["config"])),
        ("logs", f"jupyter slurm logs {row['jobid']}"),
    ):
        print(f"{name + ':':<11}{printable(value, LINE_END)}")
    return 0


def _keep(arguments: argparse.Namespace) -> int:
    row = _find(arguments.jobid)
    _set_kept(row, True)
    print(f"job {arguments.jobid} is kept after its last kernel, until its time limit or until you release it")
    return 0


def _set_kept(row: dict[str, Any], kept: bool) -> None:
    with _registry() as registry:
        change = registry.keep_flags.set if kept else registry.keep_flags.remove
        change(row["jobid"], row["identity"])


def _release(arguments: argparse.Namespace) -> int:
    row = _find(arguments.jobid)
    _set_kept(row, False)
    if row["kernel_ids"]:
        print(f"job {row['jobid']} will end with the last of its kernels ({len(row['kernel_ids'])})")
        return 0
    if why := _use(row):
        print(f"job {row['jobid']} stays: {why}; to end it: jupyter slurm allocations cancel {row['jobid']}")
        return 0
    if row["orphans"] and not arguments.yes and not _confirmed(row):
        print(f"job {row['jobid']} is not kept any more; its launcher ends its kernels, and then the job")
        return 0
    return _cancel(arguments)


def _use(row: dict[str, Any]) -> str:
    """What uses a job that has no kernels; empty if there is nothing."""
    with _slurm() as slurm:
        try:
            use, what = slurm.run(use_without_server(slurm.driver, row["jobid"], row["identity"]))
        except StepsUnknown as error:
            # By REST. Of a job of ours its user says by this command that it is over.
            use, what = (None, "") if is_launcher_id(row["identity"]) else (Use.UNKNOWN, str(error))
    return use.in_words(what) if use is not None else ""


def _confirmed(row: dict[str, Any]) -> bool:
    """Whether the user agrees to end a job with kernels that have no server.

    Raises GatewaySlurmError without a terminal.
    """
    kernels = ", ".join(row["orphans"])
    what = f"In job {row['jobid']} kernels may run whose server is gone ({kernels})."
    if not sys.stdin.isatty():
        raise GatewaySlurmError(
            f"{what} Nothing was cancelled. To take them over: jupyter slurm attach KERNEL; to end them and the job: "
            f"jupyter slurm allocations release --yes {row['jobid']}"
        )
    return input(f"{what} End them and the job (y/[n])? ").strip().lower() in ("y", "yes")


def _cancel(arguments: argparse.Namespace) -> int:
    row = _find(arguments.jobid)
    with _slurm() as slurm:
        slurm.run(slurm.driver.cancel(row["jobid"]))
    _set_kept(row, False)
    number = len(row["kernel_ids"]) + len(row["orphans"])
    print(f"job {row['jobid']} is cancelled" + (f", and with it its kernels ({number})" if number else ""))
    return 0
