"""How long a start waits for a late launcher, by what is known of prologs, and what it says meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from types import SimpleNamespace
from typing import Any

from gateway_slurm.allocations.launcher import Launcher, LauncherEvents
from gateway_slurm.allocations.model import Allocation, Place
from gateway_slurm.allocations.owners import LATE_LAUNCHER, Owners
from gateway_slurm.allocations.start import DialAddresses, LauncherStarter
from gateway_slurm.config import ServiceSettings
from gateway_slurm.errors import OutOfReach, SlurmUnavailable
from gateway_slurm.gateway.waiting import waiting_text
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.model import ClusterInfo, JobInfo, Partition

LOG = logging.getLogger("test.late")
LINK, PROLOG = 0.2, 3.0


class Start:
    """A start in a running job on nodes c1 and c2, in which no launcher dials in."""

    def __init__(self, prolog: str | Exception | None, *, launcher: str = "script", up: str = "") -> None:
        self.prolog, self.asked = prolog, 0
        self.partitions: tuple[Partition, ...] = ()
        self.allocation = Allocation(ours=True, request=KernelRequest())
        self.allocation.accept("12")
        self.allocation.update(JobInfo(jobid="12", state="RUNNING", partition="batch", nodes="c[1-2]"))
        settings: Any = ServiceSettings(link_timeout=LINK, prolog_timeout=PROLOG)
        events = LauncherEvents(lambda: None, lambda _reason: None, lambda *_end, **_due: None)
        for name, node in (("late", launcher), *(("up", node) for node in up.split())):
            made = Launcher(name + node, self.allocation, settings, addresses=list, events=events, log=LOG)
            if name == "up":
                made.node = node
                made.ready.set_result(None)
            else:
                self.launcher = made
                made.holds_job, made.named_node = node == "script", node if node.startswith("c") else None
            self.allocation.add_launcher(made)
        table = SimpleNamespace(registry=None)
        context: Any = SimpleNamespace(
            driver=None, socket=None, table=table, log=LOG, settings=settings, owner="", user="ada"
        )
        addresses = DialAddresses(first=lambda: ["tcp://login:7"], later=list)
        self.starter = LauncherStarter(context, None, addresses, log_end=self.log_end, cluster_info=self.cluster_info)  # type: ignore[arg-type]

    async def log_end(self, _path: str) -> None:
        """No log is seen."""

    async def cluster_info(self) -> ClusterInfo:
        self.asked += 1
        if isinstance(self.prolog, Exception):
            raise self.prolog
        return ClusterInfo("", self.partitions, self.prolog)

    async def error(self) -> tuple[str, float]:
        """The error, and the seconds until it."""
        began = time.monotonic()
        try:
            await self.starter.wait_for(self.allocation, self.launcher)
        except OutOfReach as error:
            return str(error), time.monotonic() - began
        raise AssertionError("no error")


async def test_only_a_prolog_that_cannot_run_shortens_the_wait() -> None:
    """An error, and a Slurm that does not say, leave a prolog possible; its cause then is named after the likelier."""
    refused = SlurmUnavailable("scontrol is not one of the commands that the helper runs")
    unknown, failed, none, known = Start(None), Start(refused), Start(""), Start("/etc/prolog")
    found = await asyncio.gather(*(start.error() for start in (unknown, failed, none, known)))
    assert [seconds >= LINK + PROLOG for _text, seconds in found] == [True, True, False, True]
    assert [start.asked for start in (unknown, failed, none, known)] == [1] * 4
    for text in (found[0][0], found[1][0]):
        assert 0 < text.find("response_address") < text.find("prolog_timeout")
    assert "prolog" not in found[2][0]
    assert 0 < found[3][0].find("the prolog /etc/prolog") < found[3][0].find("response_address")


async def test_a_step_does_not_wait_for_a_prolog_that_is_over() -> None:
    """A prolog runs once for a job and node: it is over where a launcher was up."""
    over = [Start("/p", launcher="c1", up="c1"), Start("/p", launcher="any", up="c1 c2")]
    may_run = [Start("/p", launcher="c2", up="c1"), Start("/p", launcher="any", up="c1"), Start("/p", launcher="c1")]
    gone = Start("/p", launcher="c1", up="c1")
    gone.allocation.remove_launcher(gone.allocation.launchers["upc1"])
    found = await asyncio.gather(*(start.error() for start in [*over, gone, *may_run]))
    assert [seconds >= LINK + PROLOG for _text, seconds in found] == [False] * 3 + [True] * 3
    assert [start.asked for start in over] == [0, 0]


async def test_a_number_of_nodes_is_wrong_by_the_partitions_limits_only() -> None:
    """Slurm has the same reason for nodes that are down: then the start waits, and says what to do."""
    for sizes, fits in (
        ((4, 1, None), True),
        ((4, 1, 2), False),
        ((2, 1, None), False),
        ((9, 4, 9), False),
        (None, True),
    ):
        start = Start(None)
        start.partitions = () if sizes is None else (Partition("batch", False, "up", *sizes),)
        start.allocation.request = KernelRequest(nodes=3)
        start.allocation.update(
            JobInfo(jobid="12", state="PENDING", partition="batch", reason="PartitionNodeLimit", nodes="")
        )
        waits = asyncio.ensure_future(start.starter.wait_for(start.allocation, start.launcher))
        await asyncio.wait([waits], timeout=1.5 if fits else 30)
        assert waits.done() is not fits
        waits.cancel()
        (result,) = await asyncio.gather(waits, return_exceptions=True)
        assert fits or "PartitionNodeLimit: ask for another number of nodes (" in str(result)
        assert start.asked == 1


async def test_the_page_says_after_link_timeout_why_the_start_may_wait() -> None:
    """A server that the nodes cannot reach is not first named when all of the time is over."""
    start = Start(None)
    start.allocation.add_place(Place("k"))
    allocations: Any = SimpleNamespace(table=SimpleNamespace(listed=lambda: [start.allocation]))
    owners = Owners(lambda _owner: allocations, None)  # type: ignore[arg-type]
    owners.of("")
    waits = asyncio.ensure_future(start.error())
    while not start.allocation.late:
        assert owners.waiting("k", None) is None
        assert not waits.done()
        await asyncio.sleep(0.02)
    waiting = owners.waiting("k", None)
    assert waiting is not None
    text = waiting_text(waiting)
    words = ("job 12 in partition batch", LATE_LAUNCHER, "prolog", "does not reach this server at tcp://login:7")
    assert [word for word in words if word not in text] == []
    waits.cancel()
    await asyncio.wait([waits])
    assert owners.waiting("k", None) is None
