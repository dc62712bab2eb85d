"""Events of kernels, allocations, logins and servers: a line of the log each, in one form, and further listeners.

An event says which user did what, where, with what resources, how long it took, and how it ended and why. No event has
code, output, a command line, an environment or a secret. Values may come from users, so they are bounded and printable.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from gateway_slurm._util import in_one_line
from gateway_slurm.errors import (
    AllocationEnded,
    AllocationError,
    GatewaySlurmError,
    KernelStartError,
    LauncherFailed,
    LinkError,
    NotAllowed,
    QueueTimeout,
    RequestError,
    SlurmError,
    SlurmUnavailable,
    StartTimeout,
    StoreError,
    SubmitRefused,
)

MAX_VALUE: Final = 200
"""Characters of a value."""
MAX_REASON: Final = 1000
"""Characters of a reason."""


@dataclass(frozen=True)
class Kind:
    """One kind of event: its topic in the audit log (empty: not there), its meaning, and the level of its log line."""

    topic: str
    help: str
    level: int = logging.INFO


KINDS: Final[dict[str, Kind]] = {
    "kernel_requested": Kind("kernel", "a user asked for a kernel, and the request is valid"),
    "kernel_refused": Kind("kernel", "the request is not valid, not allowed, or beyond a limit; Slurm was not asked"),
    "kernel_started": Kind("kernel", "the kernel listens on its channels"),
    "kernel_not_started": Kind("kernel", "the start failed, or was cancelled; `outcome` says how"),
    "kernel_restarted": Kind("kernel", "the kernel was started again in its place"),
    "kernel_shutdown": Kind("kernel", "a user asked for the kernel's end; `by` is that user"),
    "kernel_restart": Kind("kernel", "a user asked for the kernel's restart; `by` is that user"),
    "kernel_interrupt": Kind("kernel", "a user interrupted the kernel, or gave its start up; `by` is that user"),
    "kernel_culled": Kind("kernel", "the server ends the kernel because it was idle"),
    "kernel_ended": Kind("kernel", "the kernel's process has ended; a restart may follow"),
    "kernel_taken_over": Kind("kernel", "this server has a kernel of another server now"),
    "allocation_submitted": Kind("allocation", "Slurm has accepted a job"),
    "allocation_adopted": Kind("allocation", "a kernel uses a job that this server has not submitted"),
    "allocation_cancelled": Kind("allocation", "a user asked for the job's end; `by` is that user"),
    "allocation_kept": Kind("allocation", "a user keeps the job after its last kernel; `by` is that user"),
    "allocation_not_kept": Kind("allocation", "a user keeps the job no longer; `by` is that user"),
    "allocation_released": Kind("allocation", "this server has ended the job after its last kernel"),
    "allocation_ended": Kind("allocation", "Slurm says that the job is over", logging.WARNING),
    "link_lost": Kind("", "the connection to a launcher broke; the kernel may live", logging.DEBUG),
    "login_refused": Kind("login", "a request had a token or a header that is not accepted", logging.WARNING),
    "gateway_started": Kind("server", "the gateway listens"),
    "gateway_stopped": Kind("server", "the gateway ends"),
}

FIELDS: Final[dict[str, str]] = {
    "user": "the user who owns the kernel or allocation",
    "by": "the user or service that sent the request, where it is not the owner",
    "kernel_id": "the kernel",
    "kernelspec": "the kernelspec's name",
    "notebook": "the notebook's file name",
    "project": "the project, as the request names it",
    "partition": "the partition",
    "nodes": "number of nodes",
    "gpus": "GPUs on each node",
    "gres": "other generic resources",
    "cpus": "CPUs on each node",
    "memory": "memory on each node",
    "time_limit": "minutes, or text in one of Slurm's formats",
    "jobid": "the Slurm job",
    "name": "the job's name",
    "node": "the node that the kernel runs on",
    "connect": "how clients reach the kernel: direct or tunnel",
    "queue_seconds": "seconds from the request until a launcher in the allocation was connected",
    "start_seconds": "seconds from then until the kernel listened",
    "outcome": "how a start ended, from a fixed list",
    "reason": "why, in words",
    "state": "Slurm's word for the job's state",
    "exit_code": "the exit code, or minus the signal",
    "address": "the client's address",
    "suppressed": "refused logins before this one that have no event of their own",
    "url": "where the gateway listens",
    "version": "the gateway's version",
}

STARTED: Final = "started"
CANCELLED: Final = "cancelled"
OVER_LIMIT: Final = "over_limit"
UNKNOWN_KERNELSPEC: Final = "unknown_kernelspec"
TAKEN_ID: Final = "taken_id"
NOT_KNOWN_NOW: Final = "not_known_now"
# How a start ends by its error; the first class that the error is an instance of counts.
_OUTCOMES: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (NotAllowed, "not_allowed"),
    (RequestError, "invalid_request"),
    (SubmitRefused, "refused_by_slurm"),
    (SlurmUnavailable, "slurm_unavailable"),
    (SlurmError, "slurm_error"),
    (QueueTimeout, "queue_timeout"),
    (AllocationEnded, "allocation_ended"),
    (AllocationError, "allocation_unusable"),
    (StartTimeout, "start_timeout"),
    (LauncherFailed, "launcher_failed"),
    (KernelStartError, "kernel_failed"),
    (LinkError, "link_lost"),
    (StoreError, "store_trouble"),
    (GatewaySlurmError, "other_error"),
    (Exception, "internal_error"),
)
_OF_SERVER: Final = (OVER_LIMIT, UNKNOWN_KERNELSPEC, TAKEN_ID, NOT_KNOWN_NOW)
OUTCOMES: Final = (STARTED, *_OF_SERVER, *(name for _kind, name in _OUTCOMES), CANCELLED)
"""All outcomes of a start. The server of a deployment finds those of a limit, of an unknown kernelspec, of an id that
another kernel has, and of what the deployment's gateways or store cannot tell now."""


def outcome_of(error: BaseException) -> str:
    """How a start with this error ended; one of OUTCOMES."""
    return next((name for kind, name in _OUTCOMES if isinstance(error, kind)), CANCELLED)


def reason_of(error: BaseException) -> str:
    """Why, for an event: without the kernel's command line and output, which an error for the user may quote."""
    return getattr(error, "brief", "") or str(error).partition("\n")[0] or type(error).__name__


def by_of(owner: str, maker: str) -> str:
    """``by`` of an event of a kernel that ``maker`` asked for: "" where that is the owner, or is not known."""
    return maker if maker != owner else ""


Value = str | int | float
Listener = Callable[[str, Mapping[str, Value]], None]
"""Called with the event's kind and its fields, on any thread; it must return at once."""


class Events:
    """Where the events of one server go. Any thread may call ``emit``."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.listeners: list[Listener] = []

    def emit(self, kind: str, **fields: object) -> None:
        """Log an event of one of KINDS and pass it to the listeners. Fields (FIELDS) without a value are left out."""
        values = {name: _value(name, fields[name]) for name in FIELDS if fields.get(name) not in (None, "")}
        text = " ".join(f"{name}={_quoted(value)}" for name, value in values.items())
        self._log.log(KINDS[kind].level, "%s: %s", kind.replace("_", " "), text)
        for listener in list(self.listeners):
            try:
                listener(kind, values)
            except Exception:  # noqa: BLE001 - it is logged
                # A fault in what watches the kernels must not harm the kernels.
                self._log.exception("the event %s could not be passed on", kind)


def _value(name: str, value: object) -> Value:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, int):
        return value
    most = MAX_REASON if name == "reason" else MAX_VALUE
    return in_one_line(str(value)[:most])[: 2 * most]


def _quoted(value: Value) -> str:
    """The value for the log line: in quotation marks if it contains a space or a mark of the form."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[\s="\\]', text) else text
