"""One allocation: a Slurm job that holds nodes, who holds a place in it, and what is known of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.sharing import Offer
from gateway_slurm.errors import AllocationEnded, AllocationError, RequestError
from gateway_slurm.request import KernelRequest, parse_request
from gateway_slurm.slurm.formats import Meaning, expand_hostlist, meaning
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.store import AllocationRecord, Registry


@dataclass(frozen=True)
class Owner:
    """Whom allocations belong to."""

    name: str  # empty for the user of this process
    user: str  # the Unix user whose jobs they are to Slurm
    # Whether a job with this id, which Slurm takes for one of ``user``'s, can be this owner's.
    may_adopt: Callable[[str], Awaitable[bool]]


@dataclass(frozen=True)
class Waiting:
    """A start that waits in Slurm's queue."""

    jobid: str
    state: str
    reason: str
    place: int | None  # in its partition's queue, 1 for the next
    expected_start: float | None  # seconds since the epoch, as Slurm reckons; None where it does not


@dataclass(eq=False)
class Place:
    """A kernel's place in an allocation, from before its launcher is there until it leaves."""

    kernel_id: str
    node: str | None = None
    launcher: Launcher | None = None


@dataclass(eq=False)
class Allocation:
    """*Ours* (we submitted it for ``request``) or *adopted* (named by ``jobid``)."""

    ours: bool
    request: KernelRequest
    # Whom it belongs to; empty for the user of this process.
    owner: str = ""
    account: str = ""
    jobid: str = ""
    info: JobInfo | None = None
    # Where the job waits in its partition's queue, 1 for the next; None where that is not known.
    queue_place: int | None = None
    launchers: dict[str, Launcher] = field(default_factory=dict)
    # Of launchers that are job steps: the tasks that wait for the steps' ends.
    steps: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    # The steps that are or were launchers of ours; others' launchers are others' steps.
    own_steps: set[str] = field(default_factory=set)
    places: set[Place] = field(default_factory=set)
    # Resolved with the reason when the job is over.
    ended: asyncio.Future[AllocationEnded] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    relinquished: bool = False
    # Whether a kernel ever ran in it: a start that fails costs nobody the job that they had made.
    used: bool = False
    # Whether it stays after its last kernel (keeping).
    keep: bool = False
    # Whether an earlier server process had it before us.
    restored: bool = False
    # What was last known of it then: state, nodes and end.
    last_state: str = ""
    last_nodes: list[str] = field(default_factory=list)
    last_end: float | None = None
    # What tells the job from others with its id (launching.identity_of).
    identity: str = ""
    # By which the registry knows it.
    record_key: str = ""

    @property
    def is_over(self) -> bool:
        return self.ended.done() or self.relinquished

    @property
    def runs(self) -> bool:
        """Whether Slurm said that the job runs, or a launcher in it is linked."""
        return self.is_linked or (self.info is not None and meaning(self.info.state) is Meaning.USABLE)

    @property
    def is_linked(self) -> bool:
        return any(launcher.link for launcher in list(self.launchers.values()))

    @property
    def state(self) -> str:
        """Slurm's word for how the job is, as far as we know."""
        if self.is_linked:
            return "RUNNING"
        return (self.info.state if self.info is not None else self.last_state) or "PENDING"

    @property
    def minutes(self) -> int | None:
        """The time limit that it was made with; None for no limit, or for an adopted one."""
        return self.request.minutes if self.ours else None

    @property
    def nodes(self) -> list[str]:
        """The job's nodes, as Slurm or a launcher in it named them; empty until one of them has."""
        if self.info is not None and self.info.nodes:
            return expand_hostlist(self.info.nodes)
        told = [launcher.nodes for launcher in list(self.launchers.values()) if launcher.nodes]
        return list(told[0] if told else self.last_nodes)

    @property
    def end_time(self) -> float | None:
        """When its time limit ends it, in seconds since the epoch; None where that is not known."""
        if self.info is not None and self.runs and self.info.end_time:
            return self.info.end_time
        known = [launcher.end_time for launcher in list(self.launchers.values()) if launcher.end_time]
        return min(known) if known else self.last_end

    @property
    def seconds_left(self) -> float | None:
        """Until its time limit; None where that is not known, or there is none."""
        end = self.end_time
        return None if end is None else end - time.time()

    @property
    def kernel_ids(self) -> list[str]:
        return sorted(place.kernel_id for place in list(self.places))

    def row(self) -> dict[str, Any]:
        """What there is to know of it, for lists; memory only, any thread may ask.

        ``state`` and ``reason`` are Slurm's words; ``queue_place`` is 1 for the next in the queue;
        ``expected_start`` and ``end_time`` are seconds since the epoch; None is not known.
        """
        info, waits = self.info, not self.runs
        return {
            "jobid": self.jobid,
            "owner": self.owner,
            "ours": self.ours,
            "state": self.state,
            "reason": info.reason if waits and info is not None else "",
            "queue_place": self.queue_place if waits else None,
            "expected_start": info.start_time if waits and info is not None else None,
            "nodes": self.nodes,
            "end_time": self.end_time,
            "kernel_ids": self.kernel_ids,
            "kept": self.keep,
            "config": self.request.as_config(),
        }

    def offer(self) -> Offer:
        """What a further kernel would find here."""
        left = self.seconds_left
        if left is None and self.minutes is not None:
            left = 60.0 * self.minutes  # it waits in the queue: all of its time is left
        return Offer(
            jobid=self.jobid,
            request=self.request,
            account=self.account,
            seconds_left=left,
            kernels=len(self.places),
        )

    def choose_node(self, asked: str | None) -> str | None:
        """The node for one more kernel: the one asked for, else the one with the fewest; None for any.

        Raises AllocationError with the nodes' names when the one asked for is not among them.
        """
        nodes = self.nodes
        if asked is not None:
            if nodes and asked not in nodes:
                raise AllocationError(
                    f"node {asked} is not in job {self.jobid}; its nodes are {', '.join(nodes)}", jobid=self.jobid
                )
            return asked
        if len(nodes) < 2:
            return None
        crowd = Counter(place.node for place in self.places)
        ready = {launcher.node for launcher in self.launchers.values()}
        return min(nodes, key=lambda node: (crowd[node], node not in ready, nodes.index(node)))


# -- Whether a kernel may go into a job that its ``jobid`` names: whose the job is, how it is, how long it lives. --


def not_yours(jobid: str) -> AllocationError:
    """Whose it is, and whether it is there at all, is not for everybody to know."""
    return AllocationError(f"jobid {jobid} is not a job of yours; name one of your own, or none", jobid=jobid)


def check_adoptable(jobid: str, info: JobInfo, user: str) -> None:
    """Raise AllocationError for a job that is not ``user``'s, AllocationEnded for one that is over."""
    if info.user != user:
        raise not_yours(jobid)
    if meaning(info.state) not in (Meaning.USABLE, Meaning.WAITING, Meaning.HELD):
        raise AllocationEnded(
            f"job {jobid} is {info.state}: name in jobid a job that runs or waits, or leave it out for a new one",
            jobid=jobid,
            state=info.state,
        )


def check_time(jobid: str, seconds_left: float | None, least: float) -> None:
    """Raise AllocationError for a job that ends in less than ``least`` seconds."""
    if seconds_left is not None and seconds_left < least:
        raise AllocationError(
            f"job {jobid} (RUNNING) ends in {max(seconds_left, 0):.0f} s: too soon for a kernel "
            f"(SlurmService.min_time_left is {least:g} s); name another job, or none",
            jobid=jobid,
        )


# -- The books of an owner's allocations: which there are, what is on record of them, the tasks under way for them. --


T = TypeVar("T")

# A command may have a thousand arguments of 128 KiB: a record is for finding a job, and for people to read.
ARGUMENTS, CHARACTERS = 20, 200


class Books:
    """Kept on the service's loop; whoever made them awaits ``close``."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        # Those that Slurm has given an id and that are not over.
        self.by_jobid: dict[str, Allocation] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def record(self, allocation: Allocation) -> None:
        """Put what is known of it on record, for whoever comes after this process."""
        if allocation.is_over:
            return
        key = allocation.record_key = allocation.identity if allocation.ours else f"job-{allocation.jobid}"
        self.registry.put(
            AllocationRecord(
                launcher_id=key,
                jobid=allocation.jobid or None,
                ours=allocation.ours,
                state=allocation.state,
                nodelist=allocation.nodes,
                end_time=allocation.end_time,
                kernel_ids=allocation.kernel_ids,
                config=_short(allocation.request.as_config()),
                keep=allocation.keep,
                owner=allocation.owner,
                account=allocation.account,
                identity=allocation.identity,
            )
        )

    def let_go(self, allocation: Allocation) -> None:
        """It is another server's; so are its records."""
        if self.by_jobid.get(allocation.jobid) is allocation:
            del self.by_jobid[allocation.jobid]

    def unsettle(self, allocation: Allocation) -> None:
        """No kernel is to join it; it stays on record, whoever ends meanwhile, until it is known to be over."""
        self.registry.unsettled.add(allocation.record_key)
        self.let_go(allocation)

    def is_unsettled(self, allocation: Allocation) -> bool:
        """Whether there may be a job of it that Slurm is to end, or of which it has not said that there is one."""
        return allocation.record_key in self.registry.unsettled

    def forget(self, allocation: Allocation) -> None:
        """It is over, or no longer ours to see to."""
        self.let_go(allocation)
        self.registry.unsettled.discard(allocation.record_key)
        if allocation.record_key:
            self.registry.remove(allocation.record_key)
        for launcher_id in allocation.launchers:
            self.registry.remove_launcher(launcher_id)

    def own(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run as a task that ``close`` cancels; none begins after it: what is on record then, the next server does."""
        task = asyncio.ensure_future(coroutine)
        if self._closed:
            task.cancel()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Cancel the tasks that are under way."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def restored_allocation(record: AllocationRecord) -> Allocation:
    """What the record says of a job; whether it is still there nobody has asked yet."""
    allocation = Allocation(ours=record.ours, request=KernelRequest(jobid=record.jobid), jobid=record.jobid or "")
    allocation.owner, allocation.restored = record.owner, True
    take_over(allocation, record)
    return allocation


def take_over(allocation: Allocation, record: AllocationRecord) -> None:
    """The record of another server that had kernels in the same job: the job is ours if it is of either's making."""
    if record.ours or not allocation.record_key:
        allocation.ours, allocation.identity, allocation.account = record.ours, record.identity, record.account
        allocation.record_key = record.launcher_id
        # Text from a file: what it was made for only says which kernels it would suit.
        with contextlib.suppress(RequestError):
            allocation.request = parse_request(record.config)
    allocation.last_state, allocation.last_nodes, allocation.last_end = record.state, record.nodelist, record.end_time
    allocation.keep = allocation.keep or record.keep
    ran = record.ours and record.state not in ("", "PENDING")
    allocation.used = allocation.used or record.keep or ran


def _short(config: dict[str, Any]) -> dict[str, Any]:
    argv = config.get("kernel_argv")
    return config if argv is None else {**config, "kernel_argv": [item[:CHARACTERS] for item in argv[:ARGUMENTS]]}
