"""The server's handle on one launcher."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from gateway_slurm._util import printable
from gateway_slurm.errors import AllocationError, CryptoMissing, GatewaySlurmError, LinkError, SlurmUnavailable
from gateway_slurm.link import steps, wire
from gateway_slurm.link.output import Kept, read_kept
from gateway_slurm.link.server import Expected, Link
from gateway_slurm.link.tunnel import Streams
from gateway_slurm.slurm import commands
from gateway_slurm.slurm.formats import HostListError, expand_hostlist
from gateway_slurm.slurm.model import StepInfo, StepSpec

if TYPE_CHECKING:
    from gateway_slurm.kernels.process import KernelProcess
from typing import TYPE_CHECKING

PROBED_SECONDS: Final = 3.0  # for the launcher's answer; its link has a heartbeat


class Probing:
    """What one launcher answers to PROBE; ``send`` sends it a message, or returns False where there is no link."""

    def __init__(self, send: Callable[..., bool]) -> None:
        self._send = send
        self._asked: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def ask(self, **fields: Any) -> dict[str, Any]:
        """PROBED's fields. Raises LinkError when they do not come in PROBED_SECONDS."""
        probe = secrets.token_hex(8)
        answer = self._asked[probe] = asyncio.get_running_loop().create_future()
        try:
            if not self._send("PROBE", probe=probe, **fields):
                raise LinkError("the link to its launcher is down")
            return await asyncio.wait_for(answer, PROBED_SECONDS)
        except asyncio.TimeoutError:
            raise LinkError(f"its launcher did not answer in {PROBED_SECONDS:g} s") from None
        finally:
            del self._asked[probe]

    def message(self, fields: dict[str, Any]) -> None:
        """PROBED came."""
        answer = self._asked.get(str(fields.get("probe")))
        if answer is not None and not answer.done():
            answer.set_result(fields)


LISTING_SECONDS: Final = 30.0
"""Longer than a launcher gives squeue."""
STEP_CHARACTERS: Final = 100
NO_LAUNCHER: Final = "the launcher that holds the job is gone, and the steps that it started with it"


class InsideStep:
    """One step; ``StepProcess`` for whoever started it."""

    def __init__(self, step: str, jobid: str, send: Callable[..., bool]) -> None:
        self.step, self._jobid, self._send = step, jobid, send
        # Exit status and the last of what srun said; a status of None: the launcher is gone.
        self.over: asyncio.Future[tuple[int | None, str]] = asyncio.get_running_loop().create_future()

    async def wait(self) -> None:
        """Return when the step has ended well; raise what ``commands.parse_step_failure`` makes of it otherwise."""
        status, stderr = await asyncio.shield(self.over)
        if status is None:
            raise AllocationError(f"the step in job {self._jobid} failed: {stderr}", jobid=self._jobid)
        if status != 0:
            raise commands.parse_step_failure(status, stderr, jobid=self._jobid)

    def kill(self) -> None:
        """End the step."""
        self._send("STEP_END", step=self.step)


class StepsInside:
    """The steps of one launcher; ``send`` sends it a message, or returns False where there is no link."""

    def __init__(self, send: Callable[..., bool]) -> None:
        self._send = send
        self._steps: dict[str, InsideStep] = {}
        # Those that were asked for before the link that is there now: its REPORT knows them, or nobody does.
        self._doubtful: set[str] = set()
        self._listings: dict[str, asyncio.Future[tuple[int, str, str]]] = {}

    async def start(self, spec: StepSpec) -> InsideStep:
        """Have a step started. Raises AllocationError where that cannot be said, or not be done like this."""
        step = InsideStep(secrets.token_hex(8), spec.jobid, self._send)
        try:
            fields = steps.checked(step_fields(step.step, spec))
        except wire.WireError as error:
            raise AllocationError(f"no step is started in job {spec.jobid}: {error}", jobid=spec.jobid) from error
        self._steps[step.step] = step
        if not self._send("STEP", **fields):
            del self._steps[step.step]
            raise AllocationError(
                f"no step can be started in job {spec.jobid} now: the link to its launcher is down", jobid=spec.jobid
            )
        return step

    async def listed(self, jobid: str) -> list[StepInfo]:
        """The running steps of the job, as Slurm tells the launcher. Raises SlurmUnavailable."""
        asked = secrets.token_hex(8)
        answer = self._listings[asked] = asyncio.get_running_loop().create_future()
        try:
            if not self._send("LIST_STEPS", asked=asked):
                raise SlurmUnavailable(f"the steps of job {jobid} are not known: the link to its launcher is down")
            status, listed, stderr = await asyncio.wait_for(answer, LISTING_SECONDS)
        except asyncio.TimeoutError as error:
            raise SlurmUnavailable(
                f"the launcher in job {jobid} did not list its steps within {LISTING_SECONDS:g} s"
            ) from error
        finally:
            del self._listings[asked]
        if status != 0:
            raise SlurmUnavailable(
                f"the launcher in job {jobid} could not list its steps: {commands.slurm_message(stderr)[:1000]}"
            )
        found = steps.parse_steps(jobid, listed)
        return [StepInfo(stepid=stepid, user=user, nodes=nodes, name=name) for stepid, user, nodes, name in found]

    def message(self, name: str, fields: dict[str, Any]) -> None:
        """STEPPED or STEPS came."""
        if name == "STEPPED":
            self._ended(fields)
            return
        answer = self._listings.get(str(fields.get("asked")))
        if answer is not None and not answer.done():
            status, listed, stderr = fields.get("status"), str(fields.get("listed")), str(fields.get("stderr"))
            answer.set_result((status if isinstance(status, int) else 1, listed, stderr))

    def linked(self) -> None:
        """A new link is there; REPORT follows."""
        self._doubtful = set(self._steps)

    def reported(self, reports: list[dict[str, Any]]) -> None:
        """What the launcher knows: of the other steps the word was lost on the way."""
        # More than an honest one has: 256 that are under way, and those that have ended since the last link.
        for fields in reports[: 4 * steps.STEPS_LIMIT]:
            if fields.get("status") is not None:
                self._ended(fields)
        for step in self._doubtful - {str(fields.get("step")) for fields in reports}:
            self._finish(step, None, "its launcher knows nothing of it")

    def _ended(self, fields: dict[str, Any]) -> None:
        step, status = str(fields.get("step")), fields.get("status")
        if len(step) > STEP_CHARACTERS:
            return  # none that a server asked for
        self._finish(step, status if isinstance(status, int) else 1, str(fields.get("stderr")))
        self._send("STEP_SEEN", step=step)

    def _finish(self, step: str, status: int | None, stderr: str) -> None:
        found = self._steps.pop(step, None)
        if found is not None and not found.over.done():
            found.over.set_result((status, stderr))

    def gone(self) -> None:
        """The launcher is no more."""
        for step in list(self._steps):
            self._finish(step, None, NO_LAUNCHER)


def step_fields(step: str, spec: StepSpec) -> dict[str, Any]:
    """Return STEP's fields."""
    options = {
        "job-name": spec.name,
        "nodelist": spec.node,
        "mem": spec.memory,
        "cpus-per-task": spec.cpus and str(spec.cpus),
        "gres": ",".join(spec.gres),
    }
    return {
        "step": step,
        "exact": spec.exact,
        "options": {name: value for name, value in options.items() if value},
        "env": dict(spec.env),
        "script": spec.script,
    }


# -- The server's handle on one launcher. --


UNKNOWN_NODE = "?"  # until the launcher dials in
# Nodes of a job that a launcher is believed: each of its links costs a few milliseconds of the loop then.
MOST_NODES = 4096
TEN_YEARS = 10 * 366 * 86400.0
# Kernels in a REPORT that nobody knows are stopped: so many at a time, with ids of so many characters.
MOST_UNKNOWN, ID_CHARACTERS = 1000, 100


def walltime_warning(jobid: str, remaining: float, end_time: float) -> str:
    """What users are told ``remaining`` seconds before their job's end; ``end_time`` is since the epoch."""
    left = f"{remaining / 60:.0f} minutes" if remaining >= 90 else f"{max(remaining, 0):.0f} seconds"
    clock = time.strftime("%H:%M", time.localtime(end_time))
    return f"gateway_slurm: job {jobid} reaches its time limit in {left}, at {clock}: save your work"


class Launcher:
    """One launcher: its link, its kernels, its node. Lives on the service's loop.

    ``keep`` says whether its job is to stay when its server is gone, ``addresses`` where else it may
    dial. ``on_up`` is called when its link is there, ``on_lost`` when it broke unasked or the node lost
    its slurmd: who owns the allocation then asks Slurm. ``on_walltime`` gets the end that the launcher
    reckons with, and whether a warning is due; if not, Slurm said to look again.
    """

    def __init__(
        self,
        launcher_id: str,
        *,
        welcome: Callable[[], dict[str, Any]],
        keep: Callable[[], bool],
        heartbeat: float,
        addresses: Callable[[], list[str]],
        log: logging.Logger,
        on_up: Callable[[], None],
        on_lost: Callable[[Launcher, str], None],
        on_walltime: Callable[[Launcher, float | None, bool], None],
    ) -> None:
        self.launcher_id = launcher_id
        self.log = log
        self.jobid = ""
        self.node = UNKNOWN_NODE
        self.link: Link | None = None
        self.kernels: dict[str, KernelProcess] = {}
        self.streams = Streams(lambda: self.link)
        self.inside = StepsInside(self.send)
        self.probing = Probing(self.send)
        self.probes = False  # it understands PROBE
        self.own_ip = ""  # the node's address on the way to us, as it says itself
        self.expected: Expected | None = None
        # The launch token and its successor, drawn when the launcher is made.
        self.tokens = (b"", b"")
        # Set once the launcher is there for the first time; carries LauncherFailed when it cannot be.
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.terminated = False  # Slurm sent it SIGTERM: the job ends
        self.slurmd_missing = False  # on its node: Slurm may take the job for lost while the link lives
        self.isolated = False  # it serves one kernel, in a job step with an exact share
        self.holds_job = False  # it is the job's own script: the job ends with it, and not with a step
        self.stepid = ""  # of the job step that it is, a number; Slurm gives the batch step one, too
        self._nodelist = ""  # the job's nodes, as Slurm told the launcher
        self.nodes: list[str] = []  # the same, as a list
        self.reached = ""  # the address of ours that worked
        self.in_vain: list[tuple[str, str]] = []  # those tried before that, and why they did not
        self.python = ""  # that runs it, and its version
        self.end_time: float | None = None  # of the job, in seconds since the epoch
        self.leaving = False  # we sent RELEASE
        self.restored = False  # from a record: an earlier server process has seen it up
        # Set while there is no link.
        self.gone = asyncio.Event()
        self.gone.set()
        self._there = asyncio.Event()  # set while there is one, and it has said how its kernels are
        self._welcome, self._heartbeat, self._on_up, self._on_lost = welcome, heartbeat, on_up, on_lost
        self._on_walltime, self._keep, self._addresses = on_walltime, keep, addresses
        # Which taking over by a server this is: the launcher refuses one that is older than it has seen.
        self.epoch = 0
        self._beat: asyncio.TimerHandle | None = None
        self.slots: dict[str, int] = {}

    @property
    def where(self) -> str:
        return f"the launcher on node {self.node} (job {self.jobid})"

    @property
    def peer(self) -> str:
        """The address that its link comes from; empty where that is not known."""
        return self.link.peer if self.link is not None else ""

    @property
    def nodelist(self) -> str:
        """The job's nodes, as Slurm told the launcher; what it said that is none, or too long, is as nothing."""
        return self._nodelist

    @nodelist.setter
    def nodelist(self, text: str) -> None:
        # Here, and not where the nodes are wanted: those are lists of everybody's jobs, on the service's loop.
        try:
            self._nodelist, self.nodes = text, expand_hostlist(text, MOST_NODES)
        except HostListError as error:
            self._nodelist, self.nodes = "", []
            self.log.warning("job %s: what its launcher says of its nodes is not taken: %s", self.jobid or "?", error)

    @property
    def _stays(self) -> bool:
        return self.holds_job and self._keep()

    def slot_of(self, kernel_id: str) -> int:
        """A small number for the kernel's directory on the node: it stays over restarts, and paths stay short."""
        return self.slots.setdefault(kernel_id, len(self.slots))

    @property
    def was_up(self) -> bool:
        """Whether it has ever been there."""
        if self.restored:
            return True
        return self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None

    def fail(self, error: GatewaySlurmError) -> None:
        """It will not be there: whoever waits for it is told, if anybody does."""
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()

    def send(self, name: str, **fields: Any) -> bool:
        """Send a message; False when there is no link."""
        if self.link is None:
            return False
        self.link.send(name, **fields)
        return True

    async def read_kept(self, kernel_id: str) -> Kept:
        """What it has kept of a kernel's output; raises LinkError."""
        return await read_kept(self.streams, kernel_id, limit=int(self._welcome().get("kept_output", 0)))

    def release(self) -> None:
        """Tell the launcher to end its kernels and exit; with it the job ends."""
        self.leaving = True
        self.send("RELEASE")

    async def until_linked(self, seconds: float) -> None:
        """Wait for its link; raise LinkError when there is none within ``seconds``."""
        try:
            await asyncio.wait_for(self._there.wait(), seconds)
        except asyncio.TimeoutError as error:
            raise LinkError(f"the link to {self.where} is down, and did not come back in {seconds:g} s") from error

    # -- LinkHandler ------------------------------------------------------------------------

    def link_up(self, link: Link, hello: dict[str, Any]) -> dict[str, Any]:
        self.link = link
        self.inside.linked()
        self.gone.clear()
        self.node = str(hello.get("slurmd_nodename") or hello.get("hostname") or UNKNOWN_NODE)
        self.probes, self.own_ip = hello.get("probes") is True, str(hello.get("ip", ""))
        self.stepid = str(hello.get("slurm_step_id", ""))
        self.nodelist = str(hello.get("slurm_job_nodelist", ""))
        self.end_time = self._end_time_of(hello)
        self.python = f"{str(hello.get('executable', 'Python'))[:500]} ({str(hello.get('python', '?'))[:50]})"
        self.reached, self.in_vain = _dialled(hello)
        self.log.info("job %s: the launcher on node %s is there, by %s", self.jobid or "?", self.node, self.reached)
        self._schedule_beat()
        ours = {"keep": self._stays, "addresses": self._addresses(), "epoch": self.epoch}
        return {**self._welcome(), **ours, **self.streams.attach(link)}

    def link_message(self, link: Link, name: str, payload: Any) -> None:
        if name in ("DATA", "CREDIT", "CLOSE"):
            self.streams.message(name, *payload)
        elif name == "REPORT":
            self.streams.resume(payload)
            self._reported(payload)
        elif name == "NOTICE":
            self._notice(payload)
        elif name == "PROBED":
            self.probing.message(payload)
        elif name in ("STEPPED", "STEPS"):
            self.inside.message(name, payload)
        else:
            kernel = self.kernels.get(str(payload.get("kernel_id")))
            if kernel is not None:
                kernel.message(name, payload)

    def link_down(self, link: Link, reason: str) -> None:
        if self.link is not link:
            return
        self.link = None
        if self._beat is not None:
            self._beat.cancel()
        self.streams.hold()
        for kernel in self.kernels.values():
            kernel.lost()
        self.gone.set()
        self._there.clear()
        if not self.leaving:
            self.log.log(
                logging.INFO if self.terminated else logging.WARNING, "%s: the link is down: %s", self.where, reason
            )
            self._on_lost(self, reason)

    def link_writable(self, link: Link) -> None:
        self.streams.read_on()

    def forgotten(self) -> None:
        self.streams.end()
        self.inside.gone()

    def complained(self, reason: str) -> None:
        self.fail(
            CryptoMissing(
                f"the launcher cannot run in job {self.jobid}: {reason}; install pycryptodome for a Python "
                "on the compute nodes and name that Python in SlurmService.launcher_python"
            )
        )

    def _end_time_of(self, hello: dict[str, Any]) -> float | None:
        """What it was told by us; Slurm's, where it tells its jobs (from 22.05 on some sites); else reckoned."""
        told = str(hello.get("slurm_job_end_time", ""))
        slurms = float(told) if told.isascii() and told.isdigit() else None
        end = moment(hello.get("end_time")) or moment(slurms)
        minutes, started = self._welcome().get("minutes"), moment(hello.get("started"))
        return end if end or not (minutes and started) else started + 60.0 * minutes

    # -- inside -----------------------------------------------------------------------------

    def _reported(self, fields: dict[str, Any]) -> None:
        # It has the successor: the launch token, which stands in the job's environment, opens nothing any more,
        # at no later server either.
        self.tokens = (self.tokens[-1], self.tokens[-1])
        reports = {report["kernel_id"]: report for report in fields.get("kernels", [])}
        for kernel_id, kernel in list(self.kernels.items()):
            if kernel_id in reports:
                kernel.reported(reports[kernel_id])
            else:
                kernel.unreported()
        self.inside.reported(fields.get("steps", []))
        unknown = [each for each in reports if each not in self.kernels and len(str(each)) <= ID_CHARACTERS]
        for kernel_id in unknown[:MOST_UNKNOWN]:
            # Shut down while there was no link, or started by a server that died before it could be told.
            self.log.warning("%s has kernel %s, which nobody knows: it is stopped", self.where, kernel_id)
            self.send("STOP", kernel_id=kernel_id)
        self._there.set()
        if not self.ready.done():
            self.ready.set_result(None)
        self._on_up()

    def _notice(self, fields: dict[str, Any]) -> None:
        kind = fields.get("kind")
        if kind == "sigterm":
            self.terminated = True
            self.log.warning("job %s: Slurm is ending it (SIGTERM on node %s)", self.jobid, self.node)
        elif kind == "walltime":
            self._on_walltime(self, moment(fields.get("end_time")), True)
        elif kind == "signal":
            self._on_walltime(self, self.end_time, False)
        elif kind == "slurmd":
            if self.slurmd_missing == bool(fields.get("missing")):
                return
            self.slurmd_missing = bool(fields.get("missing"))
            words = "is gone: Slurm will take the job for lost if it stays away" if self.slurmd_missing else "is back"
            self.log.warning("job %s: slurmd on node %s %s", self.jobid, self.node, words)
            self._on_lost(self, "slurmd")
        else:
            self.log.warning("job %s, node %s: %s", self.jobid, self.node, printable(str(fields.get("message"))[:1000]))

    def warn_of_end(self, end_time: float) -> None:
        """The job's time limit is near: say so in the log and to the kernels' users."""
        self.end_time = end_time
        text = walltime_warning(self.jobid, end_time - time.time(), end_time)
        if not self.kernels:
            self.log.warning("%s", text)
        for kernel in list(self.kernels.values()):
            kernel.walltime_end = end_time
            kernel.warn(text)

    def _schedule_beat(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        self._beat = asyncio.get_running_loop().call_later(self._heartbeat, self._beat_once)

    def _beat_once(self) -> None:
        link = self.link
        if link is None:
            return
        silent = asyncio.get_running_loop().time() - link.last_heard
        if silent > 3 * self._heartbeat:
            link.close(f"nothing heard for {silent:.0f} s", at_once=True)
            return
        self.beat()
        self._schedule_beat()

    def beat(self) -> None:
        """A sign of life, whether the launcher is to stay when there will be none, and where else to dial then."""
        self.send("HEARTBEAT", keep=self._stays, addresses=self._addresses())


def moment(told: Any) -> float | None:
    """``told`` as seconds since the epoch, if it is a number within ten years of now; None for anything else."""
    now = time.time()
    return float(told) if isinstance(told, (int, float)) and now - TEN_YEARS < told < now + TEN_YEARS else None


def _dialled(hello: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """What HELLO says of the addresses that were tried; what is not as it should be is left out."""
    told = hello.get("dialled")
    fields = told if isinstance(told, dict) else {}
    pairs = fields.get("in_vain")
    in_vain = [
        (str(pair[0])[:300], str(pair[1])[:300])
        for pair in (pairs if isinstance(pairs, list) else [])[:32]
        if isinstance(pair, list) and len(pair) == 2
    ]
    return str(fields.get("reached", ""))[:300], in_vain
