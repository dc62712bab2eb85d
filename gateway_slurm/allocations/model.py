"""One allocation: a Slurm job that holds nodes, its phase, the kernels in it, and what this server knows of it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from gateway_slurm.allocations.identity import identity_of
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.sharing import Offer
from gateway_slurm.errors import AllocationEnded, AllocationError, RequestError
from gateway_slurm.request import KernelRequest, parse_request, resources
from gateway_slurm.slurm.formats import Meaning, expand_hostlist, meaning
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.slurm.reasons import Outlook
from gateway_slurm.slurm.sudo.runner import process_user
from gateway_slurm.store import AllocationRecord


class AllocationPhase(enum.Enum):
    """How this server stands to an allocation. Slurm's own word for the job is ``Allocation.state``."""

    NEW = "new"
    UNCONFIRMED = "unconfirmed"
    ACTIVE = "active"
    RELEASED = "released"
    DETACHED = "detached"
    ENDED = "ended"


PHASE_TEXTS = {
    AllocationPhase.NEW: "made for a request; Slurm has not accepted a job for it",
    AllocationPhase.UNCONFIRMED: "`sbatch` gave no answer: there may be a job, which is cancelled once it is found",
    AllocationPhase.ACTIVE: "Slurm has accepted the job and kernels may run in it, whether it waits or runs",
    AllocationPhase.RELEASED: "its last kernel left: this server ends the job, through its launcher or by `scancel`",
    AllocationPhase.DETACHED: "the job lives on without this server: it is kept, or another server or user has it",
    AllocationPhase.ENDED: "Slurm says that the job is over, or no longer knows it",
}

# The one table of allowed transitions; any other one is a fault in this package and raises AssertionError.
TRANSITIONS: dict[AllocationPhase, frozenset[AllocationPhase]] = {
    AllocationPhase.NEW: frozenset({AllocationPhase.ACTIVE, AllocationPhase.UNCONFIRMED}),
    AllocationPhase.UNCONFIRMED: frozenset(),
    AllocationPhase.ACTIVE: frozenset({AllocationPhase.RELEASED, AllocationPhase.DETACHED, AllocationPhase.ENDED}),
    AllocationPhase.RELEASED: frozenset(),
    AllocationPhase.DETACHED: frozenset(),
    AllocationPhase.ENDED: frozenset(),
}


@dataclass(eq=False)
class Place:
    """A kernel's place in an allocation, from before its launcher is up until the kernel leaves."""

    kernel_id: str
    node: str | None = None
    launcher: Launcher | None = None
    kernelspec: str = ""
    """The name of its kernelspec."""
    session_name: str = ""
    """Its document's path as the client's server writes it (JPY_SESSION_NAME); empty without a document."""


@dataclass(eq=False)
class Allocation:
    """*Ours* (a server submitted it for ``request``) or *adopted* (a request named it by ``jobid``).

    Other objects read the fields; only the methods of this class set them.
    """

    ours: bool
    request: KernelRequest
    owner: str = ""
    """The name of the user that it belongs to; empty for the user of this process."""
    account: str = ""
    jobid: str = ""
    name: str = ""
    """The name with which this server submitted the job; empty for other jobs."""
    phase: AllocationPhase = AllocationPhase.NEW
    info: JobInfo | None = None
    reason_since: float = 0.0
    """When Slurm first gave the job's present reason, by the monotonic clock."""
    queue_place: int | None = None
    """Of a waiting job in its partition's queue, 1 for the next; None where it is not known."""
    size_checked: bool = False
    """Whether its number of nodes was compared with its partition's limits."""
    late: str = ""
    """Why the launcher of a running job may be late, in words for its user; empty while it is not."""
    launchers: dict[str, Launcher] = field(default_factory=dict)
    past_steps: set[str] = field(default_factory=set)
    """The steps of removed launchers."""
    past_nodes: set[str] = field(default_factory=set)
    """The nodes on which removed launchers were up."""
    places: set[Place] = field(default_factory=set)
    ended: asyncio.Future[AllocationEnded] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Resolved with the reason once the phase is ENDED."""
    used: bool = False
    """Whether a kernel ever ran in it: an adopted job is not ended because a start in it failed."""
    keep: bool = False
    """Whether the job stays after its last kernel."""
    restored: bool = False
    """Whether an earlier server process had it."""
    last_state: str = ""
    """The state on record when it was restored; ``last_nodes`` and ``last_end`` likewise."""
    last_nodes: list[str] = field(default_factory=list)
    last_end: float | None = None
    identity: str = ""
    """What tells the job from others with its id (``identity.identity_of``)."""
    record_key: str = ""
    """The key of its record in the registry; empty until it is recorded."""

    @classmethod
    def adopted(cls, info: JobInfo, owner: str) -> Allocation:
        """A job that this server has not submitted, as Slurm describes it."""
        allocation = cls(ours=False, owner=owner, request=KernelRequest(jobid=info.jobid))
        allocation.info, allocation.identity = info, identity_of(info)
        allocation.accept(info.jobid)
        return allocation

    @classmethod
    def from_record(cls, record: AllocationRecord) -> Allocation:
        """A job on record with an id. Whether it still exists is not known yet."""
        allocation = cls(ours=record.ours, owner=record.owner, request=KernelRequest(jobid=record.jobid), restored=True)
        allocation.accept(record.jobid or "")
        allocation.merge(record)
        return allocation

    # -- Transitions --

    def _enter(self, phase: AllocationPhase) -> None:
        if phase not in TRANSITIONS[self.phase]:
            raise AssertionError(f"allocation {self.jobid or '?'}: {self.phase.value} cannot become {phase.value}")
        self.phase = phase

    def accept(self, jobid: str, name: str = "") -> None:
        """Note the id that Slurm has given the job, and the name with which this server submitted it."""
        self._enter(AllocationPhase.ACTIVE)
        self.jobid, self.name = jobid, name

    def lose_answer(self) -> None:
        """``sbatch`` gave no answer. If there is a job, no start waits for it, so it is not kept either."""
        self._enter(AllocationPhase.UNCONFIRMED)
        self.keep = False

    def release(self) -> None:
        """Note that this server begins to end the job."""
        self._enter(AllocationPhase.RELEASED)

    def detach(self) -> None:
        """Note that this server drops the job and does not end it."""
        self._enter(AllocationPhase.DETACHED)

    def end(self, reason: AllocationEnded) -> None:
        """Slurm says that the job is over. This resolves ``ended``."""
        self._enter(AllocationPhase.ENDED)
        self.ended.set_result(reason)

    # -- Facts that become known --

    def update(self, info: JobInfo, queue_place: int | None = None) -> None:
        """Take Slurm's answer about the job."""
        if self.info is None or self.info.reason != info.reason:
            self.reason_since = time.monotonic()
        self.info, self.queue_place = info, queue_place

    def merge(self, record: AllocationRecord) -> None:
        """Take what another server has on record of the same job. The job is ours if either server submitted it."""
        if record.ours or not self.record_key:
            self.ours, self.identity, self.account = record.ours, record.identity, record.account
            self.record_key = record.launcher_id
            # The request is text from a file, and only says which kernels the job would suit.
            with contextlib.suppress(RequestError):
                self.request = parse_request(record.config)
        self.last_state, self.last_nodes, self.last_end = record.state, record.nodelist, record.end_time
        self.keep = self.keep or record.keep
        ran = record.ours and record.state not in ("", "PENDING")
        self.used = self.used or record.keep or ran

    def assign_record_key(self) -> str:
        """Return the key under which the registry has the job from now on."""
        self.record_key = self.identity if self.ours else f"job-{self.jobid}"
        return self.record_key

    def mark_size_checked(self) -> None:
        """Its number of nodes is compared with its partition's limits now."""
        self.size_checked = True

    def set_late(self, why: str) -> None:
        """Note why its launcher may be late; empty: it no longer is."""
        self.late = why

    def mark_used(self) -> None:
        """A kernel runs, or ran, in the job."""
        self.used = True

    def set_keep(self, keep: bool) -> None:
        """Set whether the job stays after its last kernel."""
        self.keep = keep

    # -- Kernels and launchers --

    def add_place(self, place: Place) -> None:
        """Reserve a kernel's place; the job is not ended while there is one."""
        self.places.add(place)

    def remove_place(self, place: Place) -> None:
        """Give a kernel's place back; an unknown one is ignored."""
        self.places.discard(place)

    def add_launcher(self, launcher: Launcher) -> None:
        """Count a launcher as one of the job's."""
        self.launchers[launcher.launcher_id] = launcher
        if launcher.holds_job:
            self.identity = launcher.launcher_id

    def remove_launcher(self, launcher: Launcher) -> None:
        """Forget a launcher; an unknown one is ignored."""
        self.launchers.pop(launcher.launcher_id, None)
        self.past_steps.add(launcher.stepid)
        if launcher.was_up:
            self.past_nodes.add(launcher.node)

    # -- What is known --

    @property
    def own_steps(self) -> set[str]:
        """The steps that are or were launchers of this server; other servers' launchers are not among them."""
        return self.past_steps | {launcher.stepid for launcher in self.launchers.values()}

    @property
    def begun_nodes(self) -> set[str]:
        """The nodes on which a launcher is or was up: no prolog of the job runs there any more."""
        return self.past_nodes | {launcher.node for launcher in self.launchers.values() if launcher.was_up}

    @property
    def is_over(self) -> bool:
        """Whether this server has no part in the job any more."""
        return self.phase in (AllocationPhase.RELEASED, AllocationPhase.DETACHED, AllocationPhase.ENDED)

    @property
    def is_running(self) -> bool:
        """Whether Slurm said that the job runs, or a launcher in it is linked."""
        return self.is_linked or (self.info is not None and meaning(self.info.state) is Meaning.USABLE)

    @property
    def is_linked(self) -> bool:
        """Whether a launcher in the job has a link to this server."""
        return any(launcher.link for launcher in list(self.launchers.values()))

    @property
    def state(self) -> str:
        """Slurm's word for the job's state, as far as this server knows it."""
        if self.is_linked:
            return "RUNNING"
        return (self.info.state if self.info is not None else self.last_state) or "PENDING"

    @property
    def memory_words(self) -> str:
        """That the job's memory was used up, and what to do."""
        limit = "its request names no memory, so Slurm's default holds" if self.ours else "its submitter set the limit"
        if self.request.memory:
            limit = f"its request has memory={self.request.memory}"
        return f"killed for memory, as it used more than it has ({limit}); ask for more memory, or use less"

    @property
    def never_starts(self) -> str:
        """Slurm's reason why the waiting job cannot start, and what to do; empty where it may still start."""
        info = None if self.is_running else self.info
        if info is None or not info.is_waiting or info.pending.outlook is not Outlook.NEVER:
            return ""
        settled = time.monotonic() - self.reason_since >= info.pending.settles
        return f"{info.reason}: {info.pending.advice}" if settled else ""

    @property
    def partition(self) -> str:
        """The partition that Slurm named, or that the job was submitted to; empty where neither is known."""
        return (self.info.partition if self.info is not None else "") or self.request.partition or ""

    @property
    def minutes(self) -> int | None:
        """The time limit that the job was submitted with; None for no limit, or for an adopted job."""
        return self.request.minutes if self.ours else None

    @property
    def nodes(self) -> list[str]:
        """The job's nodes, as Slurm or a launcher in it named them; empty until one of them has."""
        if self.info is not None and self.info.nodes:
            return expand_hostlist(self.info.nodes)
        reported = [launcher.nodes for launcher in list(self.launchers.values()) if launcher.nodes]
        return list(reported[0] if reported else self.last_nodes)

    @property
    def end_time(self) -> float | None:
        """When the time limit ends the job, in seconds since the epoch; None where that is not known."""
        if self.info is not None and self.is_running and self.info.end_time:
            return self.info.end_time
        known = [launcher.end_time for launcher in list(self.launchers.values()) if launcher.end_time]
        return min(known) if known else self.last_end

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the time limit; None where that is not known, or there is none."""
        end = self.end_time
        return None if end is None else end - time.time()

    @property
    def kernel_ids(self) -> list[str]:
        """The ids of the kernels that have a place in the job, sorted."""
        return sorted(place.kernel_id for place in list(self.places))

    def row(self) -> dict[str, Any]:
        """The allocation for lists. Reads memory only; any thread may call this.

        ``state`` and ``reason`` are Slurm's words; ``advice`` is what to do about the reason; ``queue_place`` is 1 for
        the next in the queue; ``expected_start`` and ``end_time`` are seconds since the epoch. None means that it is
        not known.
        """
        waiting = None if self.is_running else self.info
        return {
            "jobid": self.jobid,
            "owner": self.owner,
            "ours": self.ours,
            "state": self.state,
            "reason": waiting.reason if waiting else "",
            "advice": waiting.pending.advice if waiting else "",
            "queue_place": self.queue_place if waiting else None,
            "expected_start": waiting.start_time if waiting else None,
            "nodes": self.nodes,
            "end_time": self.end_time,
            "kernel_ids": self.kernel_ids,
            "kept": self.keep,
            "config": self.request.as_config(),
        }

    def facts(self) -> dict[str, Any]:
        """The allocation in an event (``events.FIELDS``)."""
        return {
            "user": self.owner or process_user(),
            "jobid": self.jobid,
            "name": self.name or (self.info.name if self.info is not None else ""),
            "project": self.request.project,
            "partition": self.request.partition,
            **resources(self.request),
        }

    def offer(self) -> Offer:
        """What the allocation has left for one more kernel."""
        left = self.seconds_left
        if left is None and self.minutes is not None:
            left = 60.0 * self.minutes  # the job waits in the queue: all of its time is left
        return Offer(
            jobid=self.jobid,
            request=self.request,
            account=self.account,
            seconds_left=left,
            kernels=len(self.places),
        )

    def choose_node(self, wanted: str | None) -> str | None:
        """The node for one more kernel: the one that the request names, else the one with the fewest kernels.

        None means any node. Raises AllocationError, with the job's nodes, when the named one is not among them.
        """
        nodes = self.nodes
        if wanted is not None:
            if nodes and wanted not in nodes:
                raise AllocationError(
                    f"node {wanted} is not in job {self.jobid}; its nodes are {', '.join(nodes)}", jobid=self.jobid
                )
            return wanted
        if len(nodes) < 2:
            return None
        kernels = Counter(place.node for place in self.places)
        ready = {launcher.node for launcher in self.launchers.values()}
        return min(nodes, key=lambda node: (kernels[node], node not in ready, nodes.index(node)))
