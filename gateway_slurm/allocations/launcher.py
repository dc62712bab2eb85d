"""The server's handle on one launcher: its link, its kernels, its probes and the job steps that it starts."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from gateway_slurm._util import RatedLog, printable
from gateway_slurm.config import ServiceSettings
from gateway_slurm.errors import (
    AllocationError,
    CryptoMissing,
    GatewaySlurmError,
    LauncherFailed,
    LinkError,
    SlurmUnavailable,
)
from gateway_slurm.link import steps, wire
from gateway_slurm.link.bounds import TEN_YEARS
from gateway_slurm.link.server import Expected, Link
from gateway_slurm.link.tunnel import Streams
from gateway_slurm.slurm import commands
from gateway_slurm.slurm.formats import HostListError, expand_hostlist
from gateway_slurm.slurm.model import StepInfo, StepSpec
from gateway_slurm.store import RENEW_SECONDS

PROBE_TIMEOUT: Final = 3.0
"""Seconds for the launcher's answer to PROBE; whether the link lives at all is the heartbeat's business."""
LIST_STEPS_TIMEOUT: Final = 30.0
"""Seconds; longer than a launcher gives squeue."""
READ_LOG_TIMEOUT: Final = 10.0
"""Seconds for the launcher's answer to READ_LOG; a slow home directory takes most of it."""
LAUNCHER_GONE: Final = "the launcher that holds the job is gone, and with it the steps that it started"
UNKNOWN_NODE: Final = "?"
"""The node's name until the launcher is linked."""
MAX_NODES: Final = 4096
"""Nodes of a job that a launcher may report: the list is expanded on the loop, in a few milliseconds a link."""
MAX_DELAY: Final = 3600.0
"""Seconds by which a launcher may start later than its job: a prolog, and a Python on a cold file system."""
MAX_SKEW: Final = 10.0
"""Seconds by which a node's clock may differ without a word in the log."""


class Questions:
    """Messages of one name that a launcher answers; ``key`` is the field that names the question.

    ``send`` sends a message to the launcher; it returns False without a link. ``seconds`` is the longest wait.
    """

    def __init__(self, send: Callable[..., bool], name: str, key: str, seconds: float) -> None:
        self._send, self._name, self._key, self._seconds = send, name, key, seconds
        self._pending: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def ask(self, **fields: Any) -> dict[str, Any]:
        """Return the answer's fields. Raises LinkError when they do not arrive in time."""
        question = secrets.token_hex(8)
        answer = self._pending[question] = asyncio.get_running_loop().create_future()
        try:
            if not self._send(self._name, **{self._key: question}, **fields):
                raise LinkError("the link to its launcher is down")
            return await asyncio.wait_for(answer, self._seconds)
        except asyncio.TimeoutError:
            raise LinkError(f"its launcher did not answer in {self._seconds:g} s") from None
        finally:
            del self._pending[question]

    def message(self, fields: dict[str, Any]) -> None:
        """Take an answer; one to no question is ignored."""
        answer = self._pending.get(fields.get(self._key, ""))
        if answer is not None and not answer.done():
            answer.set_result(fields)


# -- Job steps that the launcher starts --


class LauncherStep:
    """One job step that a launcher starts; a ``StepProcess`` for the server."""

    def __init__(self, step: str, jobid: str, send: Callable[..., bool]) -> None:
        self.step, self._jobid, self._send = step, jobid, send
        # The exit status and the end of srun's stderr. The status is None where the launcher is gone.
        self.over: asyncio.Future[tuple[int | None, str]] = asyncio.get_running_loop().create_future()

    async def wait(self) -> None:
        """Return when the step has succeeded; else raise what ``commands.parse_step_failure`` makes of srun's words.

        Raises AllocationError where the launcher is gone.
        """
        status, stderr = await asyncio.shield(self.over)
        if status is None:
            raise AllocationError(f"the step in job {self._jobid} failed: {stderr}", jobid=self._jobid)
        if status != 0:
            raise commands.parse_step_failure(status, stderr, jobid=self._jobid)

    def kill(self) -> None:
        """End the step."""
        self._send("STEP_END", step=self.step)


class LauncherSteps:
    """The job steps of one launcher. ``send`` sends a message to it; it returns False without a link."""

    def __init__(self, send: Callable[..., bool]) -> None:
        self._send = send
        self._steps: dict[str, LauncherStep] = {}
        # Steps that were sent over an earlier link. The launcher got them only if the next REPORT names them.
        self._doubtful: set[str] = set()
        self._listings = Questions(send, "LIST_STEPS", "asked", LIST_STEPS_TIMEOUT)

    async def start(self, spec: StepSpec) -> LauncherStep:
        """Have a step started. Raises AllocationError where the link is down or the step is not allowed."""
        step = LauncherStep(secrets.token_hex(8), spec.jobid, self._send)
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

    async def list_steps(self, jobid: str) -> list[StepInfo]:
        """The running steps of the job, as Slurm lists them to the launcher. Raises SlurmUnavailable."""
        try:
            answer = await self._listings.ask()
        except LinkError as error:
            raise SlurmUnavailable(f"the steps of job {jobid} are not known: {error}") from error
        if answer.get("status") != 0:
            raise SlurmUnavailable(
                f"the launcher in job {jobid} could not list its steps: "
                f"{commands.slurm_message(answer.get('stderr', ''))[:1000]}"
            )
        found = steps.parse_steps(jobid, answer.get("listed", ""))
        return [StepInfo(stepid=stepid, user=user, nodes=nodes, name=name) for stepid, user, nodes, name in found]

    def message(self, name: str, fields: dict[str, Any]) -> None:
        """Take STEPPED or STEP_LIST."""
        if name == "STEPPED":
            self._ended(fields)
        else:
            self._listings.message(fields)

    def linked(self) -> None:
        """There is a new link; REPORT follows."""
        self._doubtful = set(self._steps)

    def reported(self, reports: list[dict[str, Any]]) -> None:
        """Take REPORT's steps. Steps that it does not name were lost with an earlier link."""
        for fields in reports:
            if fields.get("status") is not None:
                self._ended(fields)
        for step in self._doubtful - {fields["step"] for fields in reports}:
            self._finish(step, None, "its launcher knows nothing of it")

    def _ended(self, fields: dict[str, Any]) -> None:
        status = fields.get("status")
        self._finish(fields["step"], 1 if status is None else status, fields.get("stderr", ""))
        self._send("STEP_ACK", step=fields["step"])

    def _finish(self, step: str, status: int | None, stderr: str) -> None:
        found = self._steps.pop(step, None)
        if found is not None and not found.over.done():
            found.over.set_result((status, stderr))

    def gone(self) -> None:
        """The launcher has ended."""
        for step in list(self._steps):
            self._finish(step, None, LAUNCHER_GONE)


def step_fields(step: str, spec: StepSpec) -> dict[str, Any]:
    """STEP's fields."""
    options = {
        "job-name": spec.name,
        "nodelist": spec.node,
        "mem": spec.memory,
        "cpus-per-task": spec.cpus and str(spec.cpus),
        "gres": ",".join(spec.gres),
        "propagate": spec.propagate,
    }
    return {
        "step": step,
        "exact": spec.exact,
        "options": {name: value for name, value in options.items() if value},
        "env": dict(spec.env),
        "script": spec.script,
    }


# -- What a launcher works with --


class LauncherKernel(Protocol):
    """A kernel as its launcher's handle sees it."""

    walltime_end: float | None

    def message(self, name: str, fields: dict[str, Any]) -> None:
        """Take STARTED, FAILED or EXIT."""

    def reported(self, fields: dict[str, Any]) -> None:
        """Take the kernel's part of REPORT, which follows each new link."""

    def unreported(self) -> None:
        """REPORT does not name the kernel."""

    def lost(self) -> None:
        """The link broke; the kernel may live on."""

    def job_ends(self) -> None:
        """Slurm is ending the job; the kernel may live for some seconds more."""

    def ended_with_job(self, reason: str) -> None:
        """The job or the launcher is over, and the kernel with it."""

    def warn(self, text: str) -> None:
        """Show a warning to the kernel's users."""


class LauncherJob(Protocol):
    """The allocation as its launcher's handle sees it."""

    @property
    def keep(self) -> bool:
        """Whether the job stays when its server is gone."""

    @property
    def minutes(self) -> int | None:
        """The time limit that the job was submitted with."""

    @property
    def end_time(self) -> float | None:
        """When the time limit ends the job, in seconds since the epoch."""

    @property
    def memory_words(self) -> str:
        """That the job's memory was used up, and what to do."""


@dataclass(frozen=True)
class LauncherEvents:
    """What a launcher calls on the service's loop."""

    linked: Callable[[], None]
    """The link is up, and the launcher has reported its kernels."""
    link_lost: Callable[[str], None]
    """The link broke unasked, or slurmd went away from the node or came back: Slurm must be asked."""
    end_reported: Callable[..., None]
    """``(launcher, end_time, due=)``: the launcher calculates this end. ``due``: it is time for a warning; else
    Slurm's signal arrived."""


class Launcher:
    """One launcher: its link, its kernels, its node. Lives on the service's loop.

    ``job`` is its allocation. ``addresses`` are all servers that it may dial when this one is gone. The owner of the
    allocation hears of it through ``events``.
    """

    def __init__(
        self,
        launcher_id: str,
        job: LauncherJob,
        settings: ServiceSettings,
        *,
        addresses: Callable[[], list[str]],
        events: LauncherEvents,
        log: logging.Logger,
    ) -> None:
        self.launcher_id = launcher_id
        self.log = RatedLog(log)
        self.jobid = ""
        self.node = UNKNOWN_NODE
        self.link: Link | None = None
        self.kernels: dict[str, LauncherKernel] = {}
        self.streams = Streams(lambda: self.link)
        self.steps = LauncherSteps(self.send)
        self.prober = Questions(self.send, "PROBE", "probe", PROBE_TIMEOUT)
        self._logs = Questions(self.send, "READ_LOG", "asked", READ_LOG_TIMEOUT)
        self._reads_logs = False  # whether it understands READ_LOG
        self.probes = False  # whether it understands PROBE
        self.own_ip = ""  # the node's address on the way to the server, as the launcher sees it
        self.expected: Expected | None = None
        # The launch token and its successor, drawn when the launcher is made.
        self.tokens = (b"", b"")
        # Resolved once the launcher is up for the first time; carries an error when it cannot be.
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.terminated = False  # Slurm sent it SIGTERM: the job ends
        self.ended = False  # it, or the job, is over for this server
        self.slurmd_missing = False  # on its node: Slurm may declare the job lost while the link lives
        self.isolated = False  # it serves one kernel, in a job step with an exact share
        self.holds_job = False  # it is the job's own script: the job ends with it, and not with a step
        # Waits for the end of its job step, where it is a step of its own.
        self.step_watch: asyncio.Task[None] | None = None
        self.named_node: str | None = None  # the node that its job step was started for; None means any
        self.stepid = ""  # the number of its job step; Slurm numbers the batch step, too
        self.nodelist = ""  # the job's nodes, as Slurm named them to the launcher
        self.nodes: list[str] = []  # the same, as a list
        self.reached = ""  # the server's address that worked
        self.failed_dials: list[tuple[str, str]] = []  # the addresses that it tried before, and why they did not work
        self.python = ""  # the Python that runs it, and its version
        self.end_time: float | None = None  # of the job, in seconds since the epoch
        self.leaving = False  # the server sent RELEASE
        self.restored = False  # an earlier server process has seen it up, by its record
        # Set while there is no link.
        self.gone = asyncio.Event()
        self.gone.set()
        self._is_up = asyncio.Event()  # set while there is a link on which it has reported its kernels
        self._job, self._settings, self._addresses, self._events = job, settings, addresses, events
        # Where other servers take over, launchers must miss a hanging server as soon as its lease is over.
        takes_over = settings.deployment and settings.store_url
        self._heartbeat = min(settings.heartbeat, RENEW_SECONDS) if takes_over else settings.heartbeat
        # The number of the takeover by which this server has it: the launcher rejects a lower one than it has seen.
        self.epoch = 0
        self._beat: asyncio.TimerHandle | None = None
        self.slots: dict[str, int] = {}

    @property
    def memory_words(self) -> str:
        """That the memory of the launcher's job was used up, and what to do."""
        return self._job.memory_words

    @property
    def where(self) -> str:
        """The launcher in words, for messages."""
        return f"the launcher on node {self.node} (job {self.jobid})"

    @property
    def peer(self) -> str:
        """The address that its link comes from; empty where that is not known."""
        return self.link.peer if self.link is not None else ""

    def set_nodes(self, nodelist: str) -> None:
        """Take the job's nodes, as Slurm named them; a list that is malformed or too long is ignored."""
        # Expanded here, once a link: lists of all users' jobs read the nodes, on the service's loop.
        self.nodelist, self.nodes = "", []
        try:
            self.nodelist, self.nodes = nodelist, expand_hostlist(nodelist, MAX_NODES)
        except HostListError as error:
            self.log.warning("job %s: its launcher's list of nodes is ignored: %s", self.jobid or "?", error)

    @property
    def _stays(self) -> bool:
        return self.holds_job and self._job.keep

    def slot_of(self, kernel_id: str) -> int:
        """A small number that names the kernel's directory on the node: paths stay short, also over restarts."""
        return self.slots.setdefault(kernel_id, len(self.slots))

    @property
    def was_up(self) -> bool:
        """Whether it has ever been up."""
        ready = self.ready
        return self.restored or (ready.done() and not ready.cancelled() and ready.exception() is None)

    def set_jobid(self, jobid: str) -> None:
        """Take the job's id, which the launcher must name when it dials in."""
        assert self.expected is not None
        self.jobid = jobid
        self.expected.jobid.set_result(jobid)

    def fail(self, error: GatewaySlurmError) -> None:
        """It will not come up: starts that wait for it get ``error``."""
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # seen, where no start waits

    def send(self, name: str, **fields: Any) -> bool:
        """Send a message; False when there is no link."""
        if self.link is None:
            return False
        self.link.send(name, **fields)
        return True

    async def read_logs(self, kernel_id: str) -> dict[str, str]:
        """The ends of a kernel's log (``kernel``) and of the launcher's own (``launcher``). Raises LinkError."""
        if not self._reads_logs:
            raise LinkError(f"{self.where} has no link, or cannot send its logs")
        answer = await self._logs.ask(kernel_id=kernel_id)
        return {name: answer.get(name, "") for name in ("kernel", "launcher")}

    def release(self) -> None:
        """Have the launcher end its kernels and exit. If it holds the job, the job ends with it."""
        self.leaving = True
        self.send("RELEASE")

    def end(self, reason: str) -> None:
        """The job or the launcher is over for this server, and its kernels with it."""
        self.ended = True
        self.fail(LauncherFailed(reason))
        for kernel in list(self.kernels.values()):
            kernel.ended_with_job(reason)

    async def until_linked(self, seconds: float) -> None:
        """Wait for its link; raise LinkError when there is none within ``seconds``."""
        try:
            await asyncio.wait_for(self._is_up.wait(), seconds)
        except asyncio.TimeoutError as error:
            raise LinkError(f"the link to {self.where} is down, and did not come back in {seconds:g} s") from error

    # -- LinkHandler --

    def link_up(self, link: Link, hello: dict[str, Any]) -> dict[str, Any]:
        self.link = link
        self.steps.linked()
        self.gone.clear()
        self.node = hello.get("slurmd_nodename") or hello.get("hostname") or UNKNOWN_NODE
        self._reads_logs = hello.get("reads_logs", False)
        self.probes, self.own_ip = hello.get("probes", False), hello.get("ip", "")
        self.stepid = hello.get("slurm_step_id", "")
        self.set_nodes(hello.get("slurm_job_nodelist", ""))
        self.end_time = self._end_time_of(hello)
        self._compare_clocks(hello.get("clock"))
        self.python = f"{hello.get('executable', 'Python')} ({hello.get('python', '?')})"
        dialled = hello.get("dialled", {})
        self.reached = dialled.get("reached", "")
        self.failed_dials = [(address, why) for address, why in dialled.get("in_vain", [])]
        self.log.info("job %s: the launcher on node %s is linked, by %s", self.jobid or "?", self.node, self.reached)
        self._schedule_beat()
        return {
            **self.streams.attach(link),
            "keep": self._stays,
            "addresses": self._addresses(),
            "epoch": self.epoch,
            "heartbeat": self._heartbeat,
            "orphan_timeout": self._settings.orphan_timeout,
            "remaining": None if self._job.end_time is None else self._job.end_time - time.time(),
            "end_time": self._job.end_time,  # for launchers of the previous version
            "warn_minutes": self._settings.walltime_warnings,
            "kept_output": self._settings.kept_output * 2**20,
            "log_days": self._settings.log_retention,
            "loopback": self._settings.loopback_kernels,
        }

    def link_message(self, link: Link, name: str, payload: Any) -> None:
        if name in ("DATA", "CREDIT", "CLOSE"):
            self.streams.message(name, *payload)
        elif name == "REPORT":
            self.streams.resume(payload)
            self._reported(payload)
        elif name == "NOTICE":
            self._notice(payload)
        elif name == "PROBED":
            self.prober.message(payload)
        elif name == "LOG":
            self._logs.message(payload)
        elif name in ("STEPPED", "STEP_LIST"):
            self.steps.message(name, payload)
        else:
            kernel = self.kernels.get(payload["kernel_id"])
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
        self._is_up.clear()
        if not self.leaving:
            self.log.log(
                logging.INFO if self.terminated else logging.WARNING, "%s: the link is down: %s", self.where, reason
            )
            self._events.link_lost(reason)

    def link_writable(self, link: Link) -> None:
        self.streams.read_on()

    def forgotten(self) -> None:
        self.streams.end()
        self.steps.gone()

    def complained(self, reason: str) -> None:
        self.fail(
            CryptoMissing(
                f"the launcher cannot run in job {self.jobid}: {reason}; install pycryptodome for a Python "
                "on the compute nodes and name that Python in SlurmService.launcher_python"
            )
        )

    def _end_time_of(self, hello: dict[str, Any]) -> float | None:
        """The end that a server has sent it; else Slurm's, where jobs have it (22.05, some sites); else calculated.

        Slurm's time is absolute: it counts where it is the calculated one within an hour, and this server's clock is
        Slurm's. The node's clock has no part in it.
        """
        slurms = moment(float(hello.get("slurm_job_end_time", 0)))
        minutes, age = self._job.minutes, hello.get("age")
        calculated = in_seconds(60.0 * minutes - float(age or 0)) if minutes and in_seconds(age) else None
        if slurms and calculated and abs(slurms - calculated) > MAX_DELAY:
            slurms = None
        # A launcher of the previous version repeats the end that its server sent.
        return in_seconds(hello.get("remaining")) or moment(hello.get("end_time")) or slurms or calculated

    def _compare_clocks(self, clock: Any) -> None:
        """Log it where the node's clock is wrong, or this server's: kernels stamp their messages by the node's."""
        node_clock = moment(clock)
        ahead = 0.0 if node_clock is None else node_clock - time.time()
        if abs(ahead) > MAX_SKEW and not self.was_up:
            direction = "ahead of" if ahead > 0 else "behind"
            self.log.warning(
                "job %s: the clock of node %s is %.0f s %s this server's; times in notebooks are the node's",
                self.jobid or "?",
                self.node,
                abs(ahead),
                direction,
            )

    # -- REPORT, NOTICE and HEARTBEAT --

    def _reported(self, fields: dict[str, Any]) -> None:
        # The launcher has the successor. The launch token, which is in the job's environment, is void from now on,
        # at later servers too.
        self.tokens = (self.tokens[-1], self.tokens[-1])
        reports = {report["kernel_id"]: report for report in fields.get("kernels", [])}
        for kernel_id, kernel in list(self.kernels.items()):
            if kernel_id in reports:
                kernel.reported(reports[kernel_id])
            else:
                kernel.unreported()
        self.steps.reported(fields.get("steps", []))
        unknown = [kernel_id for kernel_id in reports if kernel_id not in self.kernels]
        if unknown:
            # It was shut down while there was no link, or its server died before it had the answer to START.
            self.log.warning(
                "%s has %d kernels that this server does not know, such as %s: they are stopped",
                self.where,
                len(unknown),
                printable(unknown[0]),
            )
        for kernel_id in unknown:
            self.send("STOP", kernel_id=kernel_id)
        self._is_up.set()
        if not self.ready.done():
            self.ready.set_result(None)
        self._events.linked()

    def _notice(self, fields: dict[str, Any]) -> None:
        kind = fields.get("kind")
        if kind == "sigterm":
            self.terminated = True
            self.log.warning("job %s: Slurm is ending it (SIGTERM on node %s)", self.jobid, self.node)
            for kernel in list(self.kernels.values()):
                kernel.job_ends()
        elif kind == "walltime":
            self._events.end_reported(self, in_seconds(fields.get("remaining")), due=True)
        elif kind == "signal":
            self._events.end_reported(self, self.end_time, due=False)
        elif kind == "slurmd":
            if self.slurmd_missing == fields.get("missing", False):
                return
            self.slurmd_missing = fields.get("missing", False)
            change = "is gone: Slurm will declare the job lost if it stays away" if self.slurmd_missing else "is back"
            self.log.warning("job %s: slurmd on node %s %s", self.jobid, self.node, change)
            self._events.link_lost("slurmd")
        else:
            self.log.warning("job %s, node %s: %s", self.jobid, self.node, printable(fields.get("message", "")))

    def warn_of_end(self, end_time: float) -> None:
        """The job's time limit is near: warn the kernels' users, or the log where there is no kernel."""
        self.end_time = end_time
        remaining = end_time - time.time()
        left = f"{remaining / 60:.0f} minutes" if remaining >= 90 else f"{max(remaining, 0):.0f} seconds"
        clock = time.strftime("%H:%M %Z", time.localtime(end_time))
        text = f"gateway_slurm: job {self.jobid} reaches its time limit in {left}, at {clock}: save your work"
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
        """Send HEARTBEAT: a sign of life, whether the launcher stays without a server, and where else it may dial."""
        self.send("HEARTBEAT", keep=self._stays, addresses=self._addresses())


def moment(value: Any) -> float | None:
    """``value`` as seconds since the epoch, if it is a number within ten years of now; None for anything else."""
    now = time.time()
    return float(value) if isinstance(value, (int, float)) and now - TEN_YEARS < value < now + TEN_YEARS else None


def in_seconds(value: Any) -> float | None:
    """The moment ``value`` seconds from now, by this host's clock; None for anything but a number within ten years."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return time.time() + float(value) if is_number and -TEN_YEARS < value < TEN_YEARS else None
